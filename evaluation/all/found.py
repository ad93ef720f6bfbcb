"""The evaluations that there are, the folders each looks for, and the command that it is.

Needs no JAX: an accelerator belongs to the process of each evaluation in turn.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable

from input_pipeline.folders import folders_in
from vivi_jax.errors import CheckpointError, DataError, lookup

Scores = dict[str, float]  # name -> share in [0, 1]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One command on one set of data.

    Attributes:
      name: of its folder in --out.
      places: folders below --data where its data may be, the first that is there counts. Case does not matter.
      needs: a file or folder that must be in it; "": nothing more.
      module: the command.
      options: of the command, beside --checkpoint and --data; "{out}" is the evaluation's folder.
      demo: the same with --demo, its small form.
      result: the JSON file that the command leaves in its folder.
      scores: reads that file.
      note: what to say beside the scores, from the same file.
      of_clips: True: only for encoders of clips (VDIM), False: only for those of images, None: for both.
    """

    name: str
    places: tuple[str, ...]
    needs: str
    module: str
    options: tuple[str, ...]
    demo: tuple[str, ...]
    result: str
    scores: Callable[[dict], Scores]
    note: Callable[[dict], str] = lambda result: ""
    of_clips: bool | None = None


def _probe(name: str, places: tuple[str, ...], mode: str) -> Evaluation:
    options = (f"--mode={mode}", "--out={out}/result.json")
    return Evaluation(
        name, places, "", "evaluation.probe", options, options, "result.json", lambda r: {"top-1": r[f"{mode}_top1"]}
    )


def _trained(
    name: str,
    places: tuple[str, ...],
    needs: str,
    config: str,
    score: str,
    key: str,
    *more: str,
    demo: str = "",
    demo_options: tuple[str, ...] = (),
    of_clips: bool | None = None,
) -> Evaluation:
    """An evaluation on transfer.py, of configs/MODULE.py:VARIANT; `demo` is its small form, else VARIANT,demo."""
    options = (f"--config={config}", "--workdir={out}", *more)
    return Evaluation(
        name,
        places,
        needs,
        f"evaluation.{config.partition(':')[0]}",
        options,
        (f"--config={demo or f'{config},demo'}", *options[1:], *demo_options),
        "result.json",
        lambda r: {score: r[key]},
        of_clips=of_clips,
    )


def _vtab(name: str, place: str, options: tuple[str, ...], result: str, scores, note=lambda result: "") -> Evaluation:
    options = ("--workdir={out}", *options)
    return Evaluation(
        name, (place,), "", "evaluation.vtab", options, ("--config=vtab:demo", *options), result, scores, note
    )


def _vtab_means(result: dict) -> Scores:
    return {group: part["mean"] for group, part in result["means"].items() if part["tasks"]}


def _vtab_note(result: dict) -> str:
    part = result["means"]["all"]
    return f"Means over the {part['tasks']} of {part['of']} tasks that have data. "


def _davis_scores(result: dict) -> Scores:
    found = result["scores"] or {}  # None: no sequence has masks to score against
    return {name: found[key] for name, key in (("J&F", "J&F"), ("J", "J_mean"), ("F", "F_mean")) if found}


_IMAGENET, _CLASSES = ("imagenet",), ("classes",)
_COCO, _UCF, _HMDB = ("coco",), ("ucf101", "ucf-101"), ("hmdb51", "hmdb-51", "hmdb")


def _of_coco(annotations: str) -> tuple[str, ...]:
    """The official files, where the small form of detection has a sample's."""
    return tuple(
        f"--config.data.{part}_{key}"
        for part, split in (("train", "train"), ("test", "val"))
        for key in (f"annotations=annotations/{annotations.format(split)}.json", f"images={split}2017")
    )


_DAVIS = ("--protocol=vfs", "--workdir={out}")

EVALUATIONS = {  # those of minutes first
    evaluation.name: evaluation
    for evaluation in (
        _probe("imagenet-knn", _IMAGENET, "knn"),
        _probe("imagenet-linear", _IMAGENET, "linear"),
        _probe("classes-knn", _CLASSES, "knn"),
        _probe("classes-linear", _CLASSES, "linear"),
        Evaluation(
            "vid_robust",
            ("vid_robust", "imagenet-vid-robust"),
            "pmsets.json",
            "evaluation.vid_robust",
            ("--out={out}/result.json",),
            ("--out={out}/result.json", "--image_size=64"),
            "result.json",
            lambda r: {f"PM-{row['k']}": row["accuracy"] for row in (r["pm"][0], r["pm"][-1])} | {"drop": r["drop"]},
        ),
        Evaluation(
            "davis",
            ("davis",),
            "JPEGImages",
            "evaluation.davis",
            _DAVIS,
            (*_DAVIS, "--short_side=120"),
            "davis.json",
            _davis_scores,
        ),
        _vtab("classes-finetune", "classes", ("--tasks=own",), "own.json", lambda r: {"top-1": r["accuracy"]}),
        _vtab("vtab", "vtab", ("--tasks=all", "--protocol=v1"), "vtab.json", _vtab_means, _vtab_note),
        _trained("voc", ("VOC2012", "VOCdevkit/VOC2012"), "JPEGImages", "segmentation:voc", "mIoU", "miou"),
        _trained("ade20k", ("ADEChallengeData2016",), "annotations", "segmentation:ade20k", "mIoU", "miou"),
        _trained("segmentation", ("segmentation",), "", "segmentation:own", "mIoU", "miou"),
        *(
            _trained(
                f"{name}-{kind}",
                places,
                "",
                f"action:{name}_{kind}",
                "top-1",
                "top1",
                f"--split={split}",
                demo=demo,
                of_clips=of_clips,
            )
            for name, places in (("ucf101", _UCF), ("hmdb51", _HMDB))
            for kind, split, demo, of_clips in (
                ("vito", "1" if name == "ucf101" else "all", "action:demo_vito", False),
                ("vdim", "all", "action:demo", True),
            )
        ),
        _trained(
            "coco",
            _COCO,
            "annotations/instances_train2017.json",
            "detection:coco",
            "AP",
            "AP",
            of_clips=False,
            demo_options=_of_coco("instances_{}2017"),
        ),
        _trained(
            "lvis",
            _COCO,
            "annotations/lvis_v1_train.json",
            "detection:lvis",
            "AP",
            "AP",
            of_clips=False,
            demo_options=_of_coco("lvis_v1_{}"),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes: found: what will be done, and where its data are; left_out: what will not, and why."""

    found: dict[str, pathlib.Path]
    left_out: dict[str, str]


def plan(data: str, checkpoint: str, *, only: str = "", demo: bool = False) -> Plan:
    """What of EVALUATIONS (those named by `only`, with commas) has its data below the folder `data`.

    Raises:
      ConfigError: a name in `only` that is none.
      DataError: no folder, or none of the data in it.
    """
    root = pathlib.Path(data)
    if not root.is_dir():
        raise DataError(f"no folder {data}: give the folder that holds the data sets' own folders")
    names = [lookup("--only", name, EVALUATIONS).name for name in only.split(",") if name]
    found, left_out, clips = {}, {}, is_of_clips(checkpoint)
    for name, evaluation in EVALUATIONS.items():
        folder = next((there for place in evaluation.places if (there := _below(root, place.split("/")))), None)
        if names and name not in names:
            left_out[name] = "not among --only"
        elif folder is None:
            left_out[name] = f"not found: looked for {_or(str(root / place) for place in evaluation.places)}"
        elif not (folder / evaluation.needs).exists():
            left_out[name] = f"not found: {folder} has no {evaluation.needs}"
        elif evaluation.of_clips not in (None, clips):
            left_out[name] = f"only for encoders of {'clips' if evaluation.of_clips else 'images'}"
        else:
            found[name] = folder
    if not found:
        raise DataError(f"nothing to do with {data}: " + "; ".join(f"{k}: {why}" for k, why in left_out.items()))
    return Plan(found, left_out)


def _below(folder: pathlib.Path, parts: list[str]) -> pathlib.Path | None:
    """The folder of these names, whatever their case, below another; of several the first that is spelt so."""
    for part in parts:
        there = {path.name.lower(): path for path in reversed(folders_in(folder))}
        if part.lower() not in there:
            return None
        folder = folder / part if (folder / part).is_dir() else there[part.lower()]
    return folder


def _or(words: Iterable[str]) -> str:
    return " or ".join(words)


def is_of_clips(checkpoint: str) -> bool:
    """Whether a run directory is of an encoder of clips; files of weights are of images.

    Raises:
      CheckpointError: nothing there, or a config that cannot be read.
    """
    path = pathlib.Path(checkpoint)
    if not path.exists():
        raise CheckpointError(f"no {checkpoint}: give a run directory or a file of weights")
    config = path / "config.json"
    if not config.is_file():
        return False
    try:
        return json.loads(config.read_text()).get("encoder", {}).get("name") == "vdim"
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is damaged: {error}") from None


def command(name: str, *, checkpoint: str, data: pathlib.Path, out: pathlib.Path, demo: bool) -> list[str]:
    """The words behind `python -m` of an evaluation."""
    evaluation = EVALUATIONS[name]
    options = evaluation.demo if demo else evaluation.options
    ours = [f"--checkpoint={checkpoint}", f"--data={os.fspath(data)}"]
    return [evaluation.module, *ours, *(option.replace("{out}", os.fspath(out)) for option in options)]
