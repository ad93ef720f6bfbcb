"""The sweep over learning rate and weight decay by which protocols judge models from elsewhere (VITO A.2).

With --sweep, evaluation.segmentation, detection and action train once with each setting of config.sweep, on a part of
the training data, and are scored on the rest of it; the best setting, by the first of the scores, then makes the
evaluation proper. "When fine-tuning external models, we sweep over the base learning rate and weight decay and report
their performance given the optimal configuration": the paper prints no grid, and does not say on what data it chose.
Here the test data choose nothing. It leaves, beside what transfer.py says of WORKDIR,

    WORKDIR/sweep/SETTING/     the trial of each setting, as WORKDIR of an evaluation
    WORKDIR/sweep.{json,md}    {"score": its name, "held_out", "trials": [{"lr", "weight_decay", score}], "chosen"}

Started again, it goes on from there.
"""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Callable
from typing import Annotated

import jax
import ml_collections
import numpy as np

from vivi_jax import files
from vivi_jax.config import NonNegative, NotEmpty, Part, Positive, check
from vivi_jax.errors import ConfigError

KEYS = {
    "lr": Annotated[tuple[Positive, ...], NotEmpty()],
    "weight_decay": Annotated[tuple[NonNegative, ...], NotEmpty()],
    "held_out": Part,
}
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Setting:
    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"lr{self.lr:g}-decay{self.weight_decay:g}"

    def put_into(self, config: ml_collections.ConfigDict) -> None:
        config.schedule.lr, config.optimizer.weight_decay = self.lr, self.weight_decay


def hold_out(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """int64 numbers of (training examples, held-out ones) of `count`: each n-th is held out, n = 1 / share, rounded.

    >>> hold_out(6, 0.3)
    (array([0, 1, 3, 4]), array([2, 5]))

    Raises:
      ConfigError: one of the two would be empty.
    """
    every = round(1 / share) if 0 < share < 1 else 0
    numbers = np.arange(count)
    held = numbers % every == every - 1 if every else numbers < 0
    if not held.any() or held.all():
        raise ConfigError(f"held_out={share} of {count} training examples leaves none to train on, or to score")
    return numbers[~held], numbers[held]


def evaluate(
    protocol: Callable[..., dict], config: ml_collections.ConfigDict, *, sweep: bool, workdir: str, **arguments: str
) -> dict:
    """protocol(config, workdir=workdir, **arguments), with `sweep` by the best of the settings in config.sweep.

    Args:
      protocol: an evaluation on transfer.evaluate, which scores on held-out training examples if its config says so.
      config: its `sweep`, which no protocol sees, is {"lr", "weight_decay": values to try, "held_out": share}.

    Raises:
      ConfigError: a value of config.sweep that cannot be, or nothing to try; and what `protocol` raises.
    """
    grid = config.sweep
    check("sweep", KEYS, grid)
    config = ml_collections.ConfigDict({key: value for key, value in config.to_dict().items() if key != "sweep"})
    if not sweep:
        return protocol(config, workdir=workdir, **arguments)
    settings = [Setting(lr, decay) for lr, decay in itertools.product(grid.lr, grid.weight_decay)]
    root, scores, name = pathlib.Path(workdir), {}, ""
    for setting in settings:
        trial = ml_collections.ConfigDict(config.to_dict() | {"held_out": grid.held_out})
        setting.put_into(trial)
        if "repeats" in trial:
            trial.repeats = 1
        result = protocol(trial, workdir=str(root / "sweep" / str(setting)), **arguments)
        name = next(key for key, value in result.items() if isinstance(value, float))
        scores[setting] = result[name]
        _LOG.info("sweep, %s: %s %.1f %%", setting, name, 100 * scores[setting])
    chosen = max(scores, key=scores.__getitem__)  # of equal ones the first
    found = {
        "config": config.name,
        **arguments,
        "score": name,
        "held_out": grid.held_out,
        "trials": [dataclasses.asdict(setting) | {name: score} for setting, score in scores.items()],
        "chosen": dataclasses.asdict(chosen),
    }
    if jax.process_index() == 0:
        files.write_json(root / "sweep.json", found)
        files.write_text(root / "sweep.md", markdown(found))
    chosen.put_into(config)
    return protocol(config, workdir=workdir, **arguments)


def markdown(found: dict) -> str:
    """A row per setting, the chosen one marked."""
    name, chosen = found["score"], found["chosen"]
    rows = [
        f"| {trial['lr']:g} | {trial['weight_decay']:g} | {100 * trial[name]:.1f} | "
        f"{'chosen' if trial.items() >= chosen.items() else ''} |"
        for trial in found["trials"]
    ]
    return "\n".join(
        [
            f"# Sweep: {found['config']}",
            "",
            f"Encoder: {found['source']}. Scores on {100 * found['held_out']:g} % of the training data, held out.",
            "",
            f"| learning rate | weight decay | {name}, % | |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )
