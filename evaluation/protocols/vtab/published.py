"""Published VTAB scores (V1, 1000 examples, per cent), to stand beside measured ones.

ResNet-50 v2 with images resized to 224 pixels; "Big" is three times as wide.
"""

# task_adaptation, docs/data/results.csv: the first version's leaderboard.
LEADERBOARD = ("From-Scratch", "Exemplar", "Rotation", "Semi-Exemplar-10%", "Sup-100%", "Sup-Rotation-100%")
BY_TASK = {
    "caltech101": (38.2, 69.6, 77.6, 88.6, 91.0, 91.7),
    "cifar100": (13.2, 11.0, 27.3, 53.2, 57.0, 53.7),
    "dtd": (20.6, 48.9, 51.4, 60.8, 66.0, 69.5),
    "flowers102": (40.2, 69.9, 68.8, 86.8, 88.6, 90.8),
    "pets": (12.1, 42.3, 48.3, 85.3, 89.9, 88.1),
    "sun397": (5.0, 13.7, 12.9, 29.0, 34.4, 32.8),
    "svhn": (66.1, 87.1, 89.4, 88.0, 87.3, 88.5),
    "eurosat": (85.0, 94.7, 93.5, 95.2, 95.3, 96.0),
    "resisc45": (42.6, 67.3, 69.4, 77.3, 80.8, 82.0),
    "patch_camelyon": (75.6, 79.1, 80.4, 83.2, 80.6, 83.4),
    "retinopathy": (72.6, 72.5, 70.9, 71.7, 73.2, 71.1),
    "clevr_count": (38.8, 54.8, 45.6, 42.3, 41.0, 47.3),
    "clevr_dist": (55.2, 60.9, 60.9, 57.4, 56.1, 57.2),
    "dmlab": (26.6, 36.7, 40.4, 36.7, 36.3, 36.6),
    "kitti_dist": (42.7, 75.5, 75.9, 71.4, 70.6, 77.1),
    "dsprites_loc": (78.4, 91.8, 89.6, 74.9, 85.7, 88.3),
    "dsprites_orient": (39.2, 44.3, 49.5, 53.9, 46.0, 52.1),
    "smallnorb_azim": (30.1, 42.1, 52.2, 52.7, 45.7, 51.6),
    "smallnorb_elev": (37.6, 40.3, 44.3, 32.3, 35.4, 33.7),
}

# VIVI, table 1: means over all 19 tasks, and over the natural, specialized and structured ones.
MEANS = {
    "Ex-ImageNet": (59.5, 50.5, 81.4, 56.4),
    "VIVI-Ex(4)": (62.5, 55.9, 80.9, 59.1),
    "VIVI-Ex(4)-Big": (63.3, 57.5, 81.0, 59.5),
    "Semi-Ex-10%": (65.3, 70.2, 81.9, 52.7),
    "VIVI-Ex(4)-Co(10%)": (67.2, 63.3, 82.6, 62.9),
    "Sup-100%": (66.4, 73.5, 82.5, 52.1),
    "Sup-Rot-100%": (68.0, 73.6, 83.1, 55.5),
    "VIVI-Ex(4)-Co(100%)": (69.4, 69.9, 83.3, 62.1),
    "VIVI-Ex(4)-Co(100%)-Big": (71.7, 72.5, 84.3, 64.7),
}
