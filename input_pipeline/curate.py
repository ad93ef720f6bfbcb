"""Curates videos as VITO's VideoNet: those whose title names a class and of which a classifier sees that class.

    python -m input_pipeline.curate --manifest=CSV --classes=CSV --classifier=WEIGHTS --out=DIR [--videos=DIR]
                                    [--workers=N | --runner=BEAM_RUNNER ...]

CSV files: the manifest has the columns video,title and, if the videos were searched for by class, class; the classes,
one a line in the order of the classifier's outputs, class,names with synonyms between semicolons. WEIGHTS is a ResNet
with a classifier: a .safetensors file in torchvision's or timm's names, or a run. The rule
is Rule in curation/steps.py.

OUT/decisions.jsonl says of every line of the manifest whether its video is kept, or why not; OUT/kept.csv is for
prepare: --videos=DIR --labels=OUT/kept.csv --labelled_only. Report: OUT/report.json, .md and .png. Started again after
a kill, the same command goes on where it was. With --runner the work is done by an Apache Beam runner, and flags that
are not this command's are Beam's. The result is the same, byte for byte.
"""

import dataclasses
import json

from absl import app, flags

from input_pipeline import storage
from input_pipeline.curation import steps
from input_pipeline.curation.local import DEFAULT, curate
from input_pipeline.curation.steps import Rule
from input_pipeline.preparation.flags import parse_known_flags
from vivi_jax import command_line
from vivi_jax.errors import DataError


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if values.runner is None and argv[1:]:
        raise DataError(f"unexpected argument {argv[1]}; options of Beam need --runner")
    given = values.flag_values_dict()
    rule = Rule(**{field.name: given[field.name] for field in dataclasses.fields(Rule)})
    made = curate(
        values.manifest,
        values.classes,
        values.classifier,
        values.out,
        videos=values.videos,
        rule=rule,
        workers=values.workers,
        beam_options=None if values.runner is None else [f"--runner={values.runner}", *argv[1:]],
    )
    report = json.loads(storage.read(storage.join(values.out, steps.REPORT)))
    print(f"{report['lines']:>9,} lines\n{report['kept']:>9,} kept")
    for reason, count in report["reasons"].items():
        print(f"{count:>9,} dropped: {steps.REASONS[reason]}")
    print(
        f"{values.out}: "
        + ("written" if made else "was complete already; nothing to do")
        + "; report.md has the classes, decisions.jsonl every line"
    )


def define_flags() -> None:
    flags.DEFINE_string("manifest", None, "CSV file with columns video,title and perhaps class", required=True)
    flags.DEFINE_string("classes", None, "CSV file with columns class,names", required=True)
    flags.DEFINE_string("classifier", None, "run directory or file of weights of a ResNet", required=True)
    flags.DEFINE_string("out", None, "directory to write to", required=True)
    flags.DEFINE_string("videos", "", "what the manifest's paths are relative to; default: the folder it is in")
    flags.DEFINE_integer("workers", None, "files decoded at a time; default: one per core", lower_bound=1)
    flags.DEFINE_string("runner", None, "a runner of Apache Beam, such as DirectRunner; default: do it without Beam")
    for field in dataclasses.fields(Rule):
        define = flags.DEFINE_float if field.type in (float, "float") else flags.DEFINE_integer
        define(field.name, getattr(DEFAULT, field.name), "see Rule in input_pipeline/curation/steps.py")


if __name__ == "__main__":
    define_flags()
    command_line.ended(lambda: app.run(main, flags_parser=parse_known_flags), resumes=True)
