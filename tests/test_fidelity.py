"""docs/fidelity.md: every command in it parses, and every config it names builds."""

import functools
import pathlib
import re

import pytest

from configs import vivi
from evaluation import attention, davis, probe, vid_robust
from helpers.commands import run_module
from helpers.documented import configured
from vivi_jax.build import build

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "fidelity.md"
COMMANDS = sorted(
    set(re.findall(r"`((?:vivi_jax\.main|evaluation\.\w+|input_pipeline\.\w+) -[^`]+)`", PAGE.read_text()))
)
PARSERS = {  # of the commands without a config, and what else they must be given
    "evaluation.attention": (attention, ["--checkpoint=/nowhere", "--out=/nowhere/a.png"]),
    "evaluation.davis": (davis, ["--checkpoint=/nowhere", "--data=/nowhere", "--workdir=/nowhere"]),
    "evaluation.probe": (probe, ["--checkpoint=/nowhere", "--data=/nowhere"]),
    "evaluation.vid_robust": (vid_robust, ["--checkpoint=/nowhere", "--data=/nowhere"]),
}


@functools.cache
def flags_of(module: str) -> str:
    """What a command with absl's flags says of them."""
    return run_module(module, "--helpfull").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses_and_builds(command):
    module, *words = command.split()
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    if module in PARSERS:
        door, rest = PARSERS[module]
        with pytest.raises(SystemExit, match="^error: ") as end:
            door.main([*words, *rest])
        assert "lists the options" not in str(end.value)  # what Parser says of a wrong one; here nothing is at /nowhere
        return
    file = flags.pop("config", "")
    overrides = {name.removeprefix("config."): flags.pop(name) for name in list(flags) if name.startswith("config.")}
    for name in flags:
        assert re.search(rf"^ +--(\[no\])?{name}:", flags_of(module), re.MULTILINE), name
    if file:
        config = configured(file, overrides)
        if module == "vivi_jax.main":
            build(config)


def test_it_has_every_row_of_vivis_tables():
    for row, argument in vivi.PAPER.items():
        assert f"| {row} | `vivi_jax.main --config=configs/vivi.py:{argument}` |" in PAGE.read_text()


def test_a_wrong_command_is_noticed():
    with pytest.raises(ValueError, match="unknown variant"):
        configured("configs/vito.py:clop=1", {})
    with pytest.raises((KeyError, AttributeError)):
        configured("configs/vito.py", {"data.min_crop": "1"})
