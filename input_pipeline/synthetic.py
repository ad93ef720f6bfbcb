"""Rendered moving scenes, written as real video files, for the demo and the tests.

    python -m input_pipeline.synthetic --out=DIR --videos=400 --seed=0
    python -m input_pipeline.synthetic --out=DIR --videos=400 --seed=0 --shots=4 --seconds=8 --fps=10

writes OUT/{train,test}/CLASS/*.mp4 (H.264, by default 25 frames per second). A class is the shape of one moving object
and nothing else: every shape has the same area, and position, size, rotation, colours, backgrounds and their motion are
drawn from one distribution for all classes. Within a clip all of these drift and only the shape stays, so a loss
between frames of a clip can rely on nothing but what the object is. Videos under test/ have scenes of their own.

With several shots, hard cuts join scenes that share the shape of the object and nothing else, so that a prediction from
shot to shot can only rely on the shape. Colours then drift four times slower: within a shot they change less than at a
cut, by which preparation/shots.py finds it. A shot that makes its cut unclear is drawn again.

The pixels are a pure function of (seed, split, number of the video) and the settings. OUT/.settings.json holds the
settings; a rendering that was broken off goes on when started again with the same ones.
"""

import argparse

from input_pipeline.rendered.shapes import FPS, SHAPES, write_videos
from vivi_jax import command_line


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("input_pipeline.synthetic", __doc__)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--videos", type=int, required=True, help="number of clips in all; one in four is for test/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="side of the picture in pixels")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a clip")
    parser.add_argument("--fps", type=int, default=FPS, help="frames per second")
    parser.add_argument("--classes", default=",".join(SHAPES), help="comma-separated")
    parser.add_argument("--shots", type=int, default=1, help="camera shots per clip")
    command_line.run_parser(write, parser, argv)


def write(options: argparse.Namespace) -> None:
    arguments = vars(options)
    write_videos(arguments.pop("out"), classes=tuple(arguments.pop("classes").split(",")), **arguments)


if __name__ == "__main__":
    main()
