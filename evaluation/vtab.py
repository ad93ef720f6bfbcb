"""Fine-tunes an encoder on VTAB or on own class folders: sweeps, the choice of settings, final runs, tables.

    python -m evaluation.vtab --checkpoint=RUN_OR_FILE|none --tasks=all --protocol=v1|v2|full --data=DIR \\
        --workdir=DIR [--shard=0/4] [--config=configs/vtab.py:demo]

    python -m evaluation.vtab --checkpoint=RUN_OR_FILE|none --tasks=own --data=CLASSES --workdir=DIR

--data holds TFDS data sets, or class folders DATA/TASK/{train,test}/CLASS/*.png. Each finished run is a file in
WORKDIR/runs; started again, the program goes on after the last one. Machines that share WORKDIR divide the tasks by
--shard; with v1 they meet before the final runs, as one setting is chosen for all tasks. Tables are in
WORKDIR/vtab.{json,csv,md,png}.

With --tasks=own, --data is what evaluation.probe takes: a folder with train/ and test/, each with a folder per class
(and perhaps val/), one folder of classes alone, of which one image in five is for the score, a frame store with labels
or a TFDS name. All training images are used (--protocol=full); settings are chosen on val/, or on one training image in
five. The score is in WORKDIR/own.{json,md}.
"""

from absl import flags

from evaluation import encoders
from evaluation.protocols.vtab import tasks as vtab_tasks
from evaluation.protocols.vtab.sweep import PROTOCOLS, evaluate
from vivi_jax import command_line
from vivi_jax.errors import ConfigError


def define_flags() -> dict[str, flags.FlagHolder]:
    default = str(command_line.configs_folder() / "vtab.py")
    text = flags.DEFINE_string
    return {
        "config": command_line.define_config(default, "The numbers; configs/vtab.py:demo is small."),
        "checkpoint": text("checkpoint", None, "Run directory, file of weights, or none: random weights."),
        "tasks": text("tasks", "all", f"own; or all, or {', '.join(vtab_tasks.GROUPS)} or names, with commas."),
        "protocol": text("protocol", None, f"One of {', '.join(PROTOCOLS)}; by default v1, of own folders full."),
        "data": text("data", None, "TFDS data or class folders; with --tasks=own the folder of the classes."),
        "workdir": text("workdir", None, "Where the runs and tables go."),
        "shard": text("shard", "0/1", "i/n: this machine does every n-th task, from the i-th."),
    }


def parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--shard={text}: must be i/n with 0 <= i < n, for example 0/4")
    return int(index), int(count)


def result_of(
    *,
    config,
    checkpoint: str,
    data: str,
    workdir: str,
    tasks: str = "all",
    protocol: str | None = None,
    shard: str = "0/1",
) -> dict:
    """The report, from the values of the options."""
    chosen, part = vtab_tasks.select(tasks), parse_shard(shard)
    encoder, variables, _ = encoders.load_encoder(checkpoint, random=config.encoder)
    return evaluate(
        config,
        encoder,
        variables or encoders.random_variables(encoder, config.seed),
        name=checkpoint,
        tasks=chosen,
        shard=part,
        protocol=protocol or ("full" if chosen == [vtab_tasks.OWN] else "v1"),
        data=data,
        workdir=workdir,
    )


def main(values: dict) -> None:
    print(result_of(**values)["summary"])


if __name__ == "__main__":
    remote = ["checkpoint", "data"]  # TFDS reads data sets from buckets
    command_line.run(main, define_flags(), optional=["protocol"], remote=remote)
