"""The flags that both commands of preparation share, and their parsing."""

import dataclasses
import logging

from absl import flags

from input_pipeline.preparation import pixels, shots
from input_pipeline.preparation.steps import Settings

DEFAULT = Settings()


def settings_of(values: flags.FlagValues) -> Settings:
    given = values.flag_values_dict()
    return Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})


def define_flags() -> None:
    """Defines the flags of both commands; for programs only, because others have flags of the same names."""
    flags.DEFINE_string("videos", None, "directory, searched recursively, or quoted glob pattern", required=True)
    flags.DEFINE_string("out", None, "directory to write the frame store to", required=True)
    flags.DEFINE_string("labels", "", "list of videos and labels, see docs/own_videos.md; or the word: folder")
    flags.DEFINE_bool("labelled_only", False, "leave out files without a label, such as those that a curation dropped")
    flags.DEFINE_string(
        "only", "", "list of the videos to use, such as UCF-101's trainlist01.txt or Kinetics' train.csv"
    )
    flags.DEFINE_float("fps", DEFAULT.fps, "frames per second kept; never more than the video has")
    flags.DEFINE_integer("short_side", DEFAULT.short_side, "pixels of the short side; smaller videos keep their size")
    flags.DEFINE_integer("jpeg_quality", DEFAULT.jpeg_quality, "1 to 100")
    flags.DEFINE_enum(
        "shot_rule", DEFAULT.shot_rule, ["auto", *shots.RULES], "how cuts are found, see preparation/shots.py"
    )
    flags.DEFINE_enum(
        "untagged_matrix",
        DEFAULT.untagged_matrix,
        list(pixels.MATRICES),
        "colour matrix of video that does not say which; for HD bt709 is likelier, and the ledger names such files",
    )
    flags.DEFINE_integer("videos_per_shard", DEFAULT.videos_per_shard, "input files per shard of the store")
    flags.DEFINE_integer("memory_mb", DEFAULT.memory_mb, "limit per file: address space, MiB")
    flags.DEFINE_integer("cpu_s", DEFAULT.cpu_s, "limit per file: CPU time, seconds")
    flags.DEFINE_float("wall_s", DEFAULT.wall_s, "limit per file: wall time, seconds")
    flags.DEFINE_integer("max_frames", DEFAULT.max_frames, "limit per file: frames kept; a pause is as many equal ones")
    flags.DEFINE_integer("max_mb", DEFAULT.max_mb, "limit per file: what its frames take, MiB")
    flags.DEFINE_float(
        "max_expansion", DEFAULT.max_expansion, "limit per file: the same, times its size; 64 MiB are always free"
    )


def parse_known_flags(argv: list[str]) -> list[str]:
    """Parses the flags of a command that runs on Beam; returns the unknown ones, which are Beam's."""
    remaining = flags.FLAGS(argv, known_only=True)
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("input_pipeline").setLevel(logging.INFO)
    return remaining
