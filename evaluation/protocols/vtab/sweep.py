"""VTAB: each task's sweep over settings, the choice among them, the final runs. The command is evaluation/vtab.py."""

import dataclasses
import itertools
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Annotated

import ml_collections
import numpy as np

from evaluation.protocols.vtab import data as vtab_data
from evaluation.protocols.vtab import finetune
from evaluation.protocols.vtab import report as vtab_report
from evaluation.protocols.vtab.data import Examples
from evaluation.protocols.vtab.tasks import OWN, Task
from vivi_jax import checkpoint, files, lock
from vivi_jax.config import Count, Decay, NotEmpty, Positive, Seed, Share, check
from vivi_jax.errors import DataError, lookup
from vivi_jax.models.base import Encoder

_LOG = logging.getLogger(__name__)


KEYS = {
    "seed": Seed,
    "image_size": Count,
    "batch_size": Count,
    "learning_rates": Annotated[tuple[Positive, ...], NotEmpty()],
    "steps": Annotated[tuple[Count, ...], NotEmpty()],
    "decay_at": tuple[Share, ...],
    "decay_factor": Share,
    "momentum": Decay,
    "repeats": Count,
    "shuffle_buffer": Count,
    "check_sizes": bool,
    "encoder": dict,
}


@dataclasses.dataclass(frozen=True)
class SweepProtocol:
    """Which splits the trial runs and the final runs train and are measured on, and who shares a setting."""

    trial: tuple[str, str]
    final: tuple[str, str]
    one_setting: bool  # for all tasks, by the mean of their trial accuracies; else each task has its own


PROTOCOLS = {
    # VIVI §4. It takes 1000 random images of train and val; task_adaptation's code the first 1000, as here.
    "v1": SweepProtocol(("train1000", "val"), ("train1000", "test"), one_setting=True),
    # VTAB-1k, arXiv:1910.04867v2.
    "v2": SweepProtocol(("train800", "val200"), ("train800val200", "test"), one_setting=False),
    # All images. No source says how its settings are chosen.
    "full": SweepProtocol(("train", "val"), ("trainval", "test"), one_setting=False),
}


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
    lr: float
    steps: int

    def __str__(self) -> str:
        return f"lr{self.lr:g}-steps{self.steps}"


# ---- Choice of settings ---------------------------------------------------------------------------------------------
def choose_settings(scores: dict[str, dict[Setting, float]], *, one_setting: bool) -> dict[str, Setting]:
    """Task -> the setting of its final runs: the best trial accuracy, averaged over all tasks if `one_setting`.

    Of equal settings the one tried first is taken.
    """
    if not one_setting:
        return {task: max(of_task, key=of_task.__getitem__) for task, of_task in scores.items()}
    settings = next(iter(scores.values()), {})
    means = {setting: np.mean([of_task[setting] for of_task in scores.values()]) for setting in settings}
    return {task: max(means, key=means.__getitem__) for task in scores}


# ---- Runs -----------------------------------------------------------------------------------------------------------
class Runs:
    """The training runs of one encoder. Each leaves a file in WORKDIR/runs/TASK and is then never repeated."""

    def __init__(self, config: ml_collections.ConfigDict, encoder: Encoder, variables: dict, workdir: pathlib.Path):
        self.config, self.encoder, self.variables, self.workdir = config, encoder, variables, workdir
        self._trainers: dict[int, finetune.Trainer] = {}  # by number of classes

    def path(self, task: Task, stage: str, setting: Setting, repeat: int) -> pathlib.Path:
        return self.workdir / "runs" / task.name / f"{stage}-{setting}-{repeat}.json"

    def result(self, task: Task, stage: str, setting: Setting, repeat: int) -> dict | None:
        path = self.path(task, stage, setting, repeat)
        return json.loads(path.read_text()) if path.exists() else None

    def do(
        self,
        task: Task,
        load: Callable[[str], Examples],
        stage: str,
        splits: tuple[str, str],
        runs: Iterable[tuple[Setting, int]],
    ) -> None:
        """Trains and measures those without a file; the training images are decoded once for all."""
        missing = [run for run in runs if self.result(task, stage, *run) is None]
        if not missing:
            return
        with lock.hold(self.workdir / "runs" / task.name):  # other shards, of other tasks, are at work beside this one
            self._do(task, load, stage, splits, missing)

    def _do(
        self,
        task: Task,
        load: Callable[[str], Examples],
        stage: str,
        splits: tuple[str, str],
        missing: list[tuple[Setting, int]],
    ) -> None:
        config, train, test = self.config, load(splits[0]), load(splits[1])
        size = dict(batch_size=config.batch_size, image_size=config.image_size)
        held = vtab_data.load_all(train, **size) if splits[0] not in ("train", "trainval") else None
        module, variables, trainer, compiled = self._trainer(train.classes)
        for setting, repeat in missing:
            rates = finetune.learning_rates(
                setting.lr, setting.steps, decay_at=config.decay_at, decay_factor=config.decay_factor
            )
            seed = int(np.random.SeedSequence([config.seed, repeat]).generate_state(1)[0])
            batches = (
                vtab_data.shuffled_stream(train, **size, buffer=config.shuffle_buffer, seed=seed)
                if held is None
                else finetune.shuffled_batches(held, batch_size=config.batch_size, seed=seed)
            )
            fit = finetune.fit(trainer, variables, batches, rates)
            start = time.perf_counter()
            accuracy = finetune.accuracy(module, fit.variables, vtab_data.batches(test, **size))
            result = {
                "task": task.name,
                "stage": stage,
                **dataclasses.asdict(setting),
                "repeat": repeat,
                "accuracy": accuracy,
                "loss": fit.loss if np.isfinite(fit.loss) else None,
                "trained_on": [splits[0], train.size],
                "measured_on": [splits[1], test.size],
                "cost": {
                    "train_seconds": fit.seconds,
                    "wait_seconds": fit.wait_seconds,
                    "train_images": setting.steps * config.batch_size,
                    "measure_seconds": time.perf_counter() - start,
                    "compilations": compiled,
                    "compile_seconds": trainer.compile_seconds if compiled else 0.0,
                },
            }
            compiled = 0
            path = self.path(task, stage, setting, repeat)
            files.write_json(path, result)
            _LOG.info(
                "%s %s %s repeat %d: %.1f %% of %s, %.0f s",
                task.name,
                stage,
                setting,
                repeat,
                100 * accuracy,
                splits[1],
                time.perf_counter() - start + fit.seconds,
            )

    def _trainer(self, classes: int) -> tuple[finetune.Classifier, dict, finetune.Trainer, int]:
        """(classifier, its variables, the compiled step, compilations it took: 1 or 0)."""
        config = self.config
        module, variables = finetune.make_classifier(
            self.encoder, self.variables, num_classes=classes, image_size=config.image_size
        )
        known = classes in self._trainers
        if not known:
            self._trainers[classes] = finetune.compile_trainer(
                module, variables, batch_size=config.batch_size, image_size=config.image_size, momentum=config.momentum
            )
        return module, variables, self._trainers[classes], 0 if known else 1


# ---- The whole ------------------------------------------------------------------------------------------------------
def evaluate(
    config: ml_collections.ConfigDict,
    encoder: Encoder,
    variables: dict,
    *,
    name: str,
    tasks: list[Task],
    protocol: str,
    data: str,
    workdir: str,
    shard: tuple[int, int] = (0, 1),
) -> dict:
    """Does the missing runs of this shard, then writes and returns the tables of all runs in `workdir`.

    Args:
      name: of the encoder, for the tables.

    Raises:
      ConfigError, DataError: before anything is trained, unless an image does not decode.
    """
    check("", KEYS, config)
    rules = lookup("--protocol", protocol, PROTOCOLS)
    found, absent = find_all(tasks, data, config.check_sizes)
    identity = {
        "config": json.loads(config.to_json()),
        "protocol": protocol,
        "encoder_sha256": checkpoint.state_sha256(variables),
    }
    if tasks == [OWN]:  # whose name does not say which data
        identity["data"] = os.path.realpath(data)
    files.refuse_remote("--workdir", workdir)
    root = pathlib.Path(workdir)
    files.claim(root / "evaluation.json", identity)
    runs = Runs(config, encoder, variables, root)
    settings = [Setting(lr, steps) for lr, steps in itertools.product(config.learning_rates, config.steps)]
    mine = list(found.items())[shard[0] :: shard[1]]
    for task, load in mine:
        runs.do(task, load, "trial", rules.trial, [(setting, 0) for setting in settings])

    trials = {
        task.name: {s: r["accuracy"] for s in settings if (r := runs.result(task, "trial", s, 0))} for task in found
    }
    complete = {name: scores for name, scores in trials.items() if len(scores) == len(settings)}
    waiting = [name for name in trials if name not in complete]
    if waiting and rules.one_setting:
        _LOG.warning(
            "no final runs yet: protocol %s chooses one setting by the trials of all tasks, and those of %s "
            "are not finished; run their shards, then this command again",
            protocol,
            ", ".join(waiting),
        )
        chosen = {}
    else:
        chosen = choose_settings(complete, one_setting=rules.one_setting)
    for task, load in mine:
        if task.name in chosen:
            runs.do(task, load, "final", rules.final, [(chosen[task.name], r) for r in range(config.repeats)])

    finals = {
        task.name: [runs.result(task, "final", chosen[task.name], r) for r in range(config.repeats)]
        for task in found
        if task.name in chosen
    }
    finished = {task: [r for r in results if r] for task, results in finals.items() if all(results)}
    done = [r for task in found for s in settings if (r := runs.result(task, "trial", s, 0))]
    if tasks == [OWN]:
        return vtab_report.write_own(
            root,
            finished.get(OWN.name, []),
            trials=done,
            protocol=protocol,
            encoder=name,
            data=data,
            class_count=found[OWN]("train").classes,
        )
    return vtab_report.write(
        root,
        finished,
        trials=done,
        absent=absent,
        protocol=protocol,
        encoder=name,
        official=config.check_sizes,
    )


def find_all(
    tasks: list[Task], data: str, check_sizes: bool
) -> tuple[dict[Task, Callable[[str], Examples]], dict[str, str]]:
    """({task: its data}, {name of a task without data: the step that brings them}).

    Raises:
      DataError: none of the tasks has data, or sizes are wrong; everything that is wrong is listed.
    """
    found, absent, wrong = {}, {}, []
    for task in tasks:
        try:
            found[task] = vtab_data.find(task, data, check_sizes=check_sizes)
        except vtab_data.Absent as error:
            absent[task.name] = str(error)
            _LOG.warning("left out: %s", error)
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(" | ".join(wrong))
    if not found:
        raise DataError(f"no task has data in {data}; the first: {next(iter(absent.values()))}")
    return found, absent
