"""The papers' figures beside which evaluation.all sets its own, in per cent, and where each is from.

docs/fidelity.md says what differs here; none has been reproduced with this code.
"""

from typing import NamedTuple

from evaluation.protocols.vtab.published import MEANS


class Row(NamedTuple):
    """A published model: its scores by the names of found.EVALUATIONS, and the source."""

    model: str
    scores: dict[str, float]
    source: str


_LIST = "VITO's NeurIPS version (arXiv:2210.06433), by a third-party list"
_MEMORY = "VITO's NeurIPS version, from memory, not confirmed"
_MOCLR = "the same list's row of MoCLR, taken to be VITO's baseline"
_VTAB = "VIVI (arXiv:1912.02783), table 1: all 19 tasks, and the natural, specialized and structured ones"
_VID = "VIVI, table 3, counted again from its intervals"
_VDIM = "VDIM (arXiv:2007.13278), table 3: pretrained on Kinetics-600, mean of three splits"

PUBLISHED: dict[str, tuple[Row, ...]] = {
    "voc": (Row("VITO", {"mIoU": 76.3}, _MEMORY),),
    "ade20k": (Row("VITO", {"mIoU": 39.4}, _LIST), Row("MoCLR", {"mIoU": 39.2}, _MOCLR)),
    "coco": (Row("VITO", {"AP": 44.0}, _LIST), Row("MoCLR", {"AP": 43.9}, _MOCLR)),
    "lvis": (Row("VITO", {"AP": 25.7}, _LIST),),
    "davis": (
        Row("VITO", {"J": 65.5}, _LIST),
        Row("MoCLR", {"J": 63.1}, _MOCLR),
        Row("VFS, ResNet-50", {"J&F": 69.5, "J": 67.0, "F": 72.0}, "its own code's table (xvjiarui/VFS)"),
    ),
    "ucf101-vito": (Row("VITO", {"top-1": 87.4}, _LIST),),
    "ucf101-vdim": (Row("VDIM", {"top-1": 79.7}, _VDIM),),
    "hmdb51-vdim": (Row("VDIM", {"top-1": 49.2}, _VDIM),),
    "vid_robust": (Row("supervised ResNet-50", {"PM-0": 68.0, "PM-10": 49.9, "drop": 18.1}, _VID),),
    "vtab": tuple(
        Row(model, dict(zip(("all", "natural", "specialized", "structured"), means, strict=True)), _VTAB)
        for model, means in MEANS.items()
    ),
}
