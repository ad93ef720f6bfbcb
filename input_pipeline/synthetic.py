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

--world=scenes renders creatures of moving parts instead, each with a skin (rendered/creatures.py), under a moving
camera, with distractors and something in front of them now and then: the class is harder to see, and as little to be
had from colours or thumbnails.

The pixels are a pure function of (seed, split, number of the video) and the settings. OUT/.settings.json holds the
settings; a rendering that was broken off goes on when started again with the same ones.
"""

import argparse

from input_pipeline.rendered import scenes, shapes
from vivi_jax import command_line


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("input_pipeline.synthetic", __doc__)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--videos", type=int, required=True, help="number of clips in all; one in four is for test/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=("shapes", "scenes"), default="shapes")
    parser.add_argument("--size", type=int, default=96, help="side of the picture in pixels")
    parser.add_argument("--seconds", type=float, help="length of a clip; by default 3, of scenes 3.4")
    parser.add_argument("--fps", type=int, help=f"frames per second; by default {shapes.FPS}, of scenes {scenes.FPS}")
    parser.add_argument("--classes", help="comma-separated; by default all of the world")
    parser.add_argument("--shots", type=int, default=1, help="camera shots per clip")
    command_line.run_parser(write, parser, argv)


def write(options: argparse.Namespace) -> None:
    arguments = {name: value for name, value in vars(options).items() if value is not None}
    write_world = {"shapes": shapes.write_videos, "scenes": scenes.write_scenes}[arguments.pop("world")]
    if "classes" in arguments:
        arguments["classes"] = tuple(arguments["classes"].split(","))
    write_world(arguments.pop("out"), **arguments)


if __name__ == "__main__":
    main()
