"""Rendered action clips, written as real video files: the classes differ by motion and by nothing else.

    python -m input_pipeline.synthetic_actions --out=DIR --videos=400 --seed=0

writes OUT/{train,test}/CLASS/*.mp4 (H.264, 25 frames per second), as input_pipeline.synthetic does. A disc has a
horizontal and a vertical place and a size. A class says which of these run through their cycle and how; the others
stand still at a random point of the same cycle. So in a single frame place and size each have the same distribution for
all classes, and so have colours, background, light and speed. Only the order of the frames tells classes apart; single
frames of clockwise and anticlockwise clips are even distributed alike in every respect. Clips differ in little but
motion, size and colours, so that two windows of a clip have chiefly its motion in common.
"""

import argparse

from input_pipeline.rendered.actions import ACTIONS, write_actions
from input_pipeline.rendered.shapes import FPS
from vivi_jax import command_line


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("input_pipeline.synthetic_actions", __doc__)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--videos", type=int, required=True, help="number of clips in all; one in four is for test/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=80, help="side of the picture in pixels")
    parser.add_argument("--seconds", type=float, default=2.4, help="length of a clip")
    parser.add_argument("--fps", type=int, default=FPS, help="frames per second")
    parser.add_argument("--classes", default=",".join(ACTIONS), help="comma-separated")
    command_line.run_parser(write, parser, argv)


def write(options: argparse.Namespace) -> None:
    arguments = vars(options)
    write_actions(arguments.pop("out"), classes=tuple(arguments.pop("classes").split(",")), **arguments)


if __name__ == "__main__":
    main()
