"""The directions that the papers report, each with its place and figure there, and what is compared for it here.

A direction is a contrast: a weighted sum of one measure over settings (settings.py), whose sign the paper gives. Most
are "this minus that". Figures are the papers', in their own measures (mIoU, VTAB's mean, top-1): only their signs are
comparable with ours.
"""

from typing import NamedTuple

NO_EFFECT = 0.03  # a difference below this, in all of its interval, agrees with "no effect"


class Direction(NamedTuple):
    """One claim of a paper.

    Attributes:
      claim: in words.
      where: table, figure or section of the paper.
      figure: the paper's difference in its own measure; "" where it gives none.
      measure: of the trainings (measures.py).
      contrast: setting -> weight; the claim is that the weighted sum is positive.
      sign: 1; or 0, if the paper finds no effect.
    """

    claim: str
    where: str
    figure: str
    measure: str
    contrast: dict[str, float]
    sign: int = 1


def _over(better: str, worse: str) -> dict[str, float]:
    return {better: 1.0, worse: -1.0}


# What the papers measure by segmentation and VTAB is measured here by few labels and a linear probe.
VITO_MEASURE, VIVI_MEASURE, VDIM_MEASURE = "linear_top1", "few_labels_top1", "action_top1"


def _vito(claim: str, where: str, figure: str, better: str, worse: str, measure: str = VITO_MEASURE) -> Direction:
    return Direction(claim, f"VITO {where}", figure, measure, _over(better, worse))


def _vivi(claim: str, where: str, figure: str, better: str, worse: str, measure: str = VIVI_MEASURE) -> Direction:
    return Direction(claim, f"VIVI {where}", figure, measure, _over(better, worse))


def _vdim(claim: str, figure: str, better: str, worse: str, sign: int = 1) -> Direction:
    return Direction(claim, "VDIM §4.2", figure, VDIM_MEASURE, _over(better, worse), sign)


DIRECTIONS = {
    # VITO: differences in mIoU on PASCAL, where nothing else is said
    "vito-moclr": _vito("VITO above MoCLR on the same videos", "§4.2", "+2.8", "vito", "moclr"),
    "vito-moclr-knn": _vito("the same, by k-NN", "§4.2", "+2.8", "vito", "moclr", "knn_top1"),
    "vito-moclr-labels": _vito("the same, by few labels", "§4.2", "+2.8", "vito", "moclr", "few_labels_top1"),
    "vito-moclr-davis": _vito(
        "VITO above MoCLR in label propagation", "Table 2 (J on DAVIS)", "+2.4", "vito", "moclr", "propagation"
    ),
    "attention-two": _vito("attention above average pooling, at two scales", "Fig. 4 right", "+0.6", "vito", "average"),
    "attention-one": _vito(
        "attention above average pooling, at one scale", "Fig. 4 right", "+0.2", "one-scale", "one-scale-average"
    ),
    "scales-attention": _vito("two scales above one, with attention", "Fig. 4 right", "+1.0", "vito", "one-scale"),
    "scales-average": _vito(
        "two scales above one, with average pooling", "Fig. 4 right", "+0.6", "average", "one-scale-average"
    ),
    "crop": _vito("crops of at least 40 % above those of 8 %", "Fig. 4 left", "+1.7", "vito", "crop-8"),
    "clip-short": _vito("clips of 2.56 s above 1.28 s", "Fig. 4 centre", "+1.0", "vito", "clip-1.28"),
    "clip-long": _vito("clips of 2.56 s above 3.2 s", "Fig. 4 centre", "a little", "vito", "clip-3.2"),
    "fixed-delay": _vito("marginal sampling above a fixed delay", "Fig. A.2", "best overall", "vito", "fixed-delay"),
    "chunks": _vito("marginal sampling above uniform chunks", "Fig. A.2", "best overall", "vito", "chunks"),
    # VIVI: differences in VTAB's mean over 19 tasks with 1000 labels
    "shots-frames": _vivi("shots above single frames, exemplar", "Table 2", "+1.9", "ex-s", "ex-f"),
    "lambda": _vivi("InfoNCE over shots above lambda = 0", "Table 2", "+1.2", "ex4", "ex-s"),
    "ex2-lambda": _vivi("InfoNCE over two shots above lambda = 0", "§5.1", "modest", "ex2", "ex-s"),
    "ex4-ex2": _vivi("four shots above two", "§5.1", "largest with 4", "ex4", "ex2"),
    "nce-order": _vivi("InfoNCE over four shots above the order of two", "§5.1", "largest", "ex4", "order"),
    "order-lambda": _vivi("the order of two shots above lambda = 0", "§5.1", "modest", "order", "ex-s"),
    "rotation-video": _vivi("InfoNCE over shots above rotation of frames alone", "Table 2", "+2.0", "rot4", "rot-f"),
    "rot4-rot2": _vivi("four shots above two, with rotation", "§5.1", "larger with 4", "rot4", "rot2"),
    "exemplar-rotation": _vivi("exemplar above rotation, four shots", "Table 2", "+3.6", "ex4", "rot4"),
    "exemplar-rotation-frames": _vivi("exemplar above rotation, single frames", "Table 2", "+2.5", "ex-f", "rot-f"),
    "co-10": _vivi("co-training with 10 % of the labels above none", "Table 1", "+4.7", "ex4-co10", "ex4"),
    "co-100": _vivi("co-training with all labels above 10 %", "Table 1", "+2.2", "ex4-co100", "ex4-co10"),
    "co-supervised": _vivi("co-training above labels alone", "Table 1", "+3.0", "ex4-co100", "supervised"),
    "robust": _vivi(
        "co-training loses less over neighbouring frames", "Table 3", "+2.2", "ex4-co100", "supervised", "robustness"
    ),
    "autoaugment-frames": _vivi("AutoAugment helps single frames", "Table 2", "+2.4", "ex-f-aa", "ex-f"),
    "autoaugment-video": _vivi("AutoAugment helps four shots", "Table 2", "+0.5", "ex4-aa", "ex4"),
    "autoaugment-rotation": _vivi("AutoAugment helps rotation", "Table 2", "+2.0", "rot-f-aa", "rot-f"),
    "autoaugment-more": Direction(
        "AutoAugment helps single frames more than four shots",
        "VIVI Table 2",
        "+1.9",
        VIVI_MEASURE,
        {"ex-f-aa": 1.0, "ex-f": -1.0, "ex4-aa": -1.0, "ex4": 1.0},
    ),
    # VDIM: p-values of its ablation on UCF-101, where it gives no difference
    "layers-two": _vdim("local layers help", "nearly 10 points", "vdim", "vdim-global"),
    "layers-one": _vdim("the first local layer helps a little", "< 1 point", "vdim", "vdim-68"),
    "lab": _vdim("colour jitter above Lab with a channel dropped", "p = 9.5e-9", "vdim", "vdim-lab"),
    "rotation": _vdim("turning the clips has no effect", "p = 0.40", "vdim-rotate", "vdim", 0),
    "offset": _vdim("both views from the same start above an offset", "p = 0.19", "vdim-offset0", "vdim"),
    "difference": _vdim("temporal differences help", "p = 0.05", "vdim-difference", "vdim"),
    "down-sampling": _vdim("down-sampling of the second view helps", "p = 0.12", "vdim-down2", "vdim"),
    "pretraining": Direction("pretraining above random weights", "VDIM Table 2", "", "action_gain", {"vdim": 1.0}),
}
