"""What all config files share: their argument, and the values of a run that change no result."""

import difflib
from collections.abc import Callable, Iterable, Mapping

import ml_collections
from ml_collections.config_dict import placeholder


def expand(
    argument: str,
    make: Callable[[dict[str, str]], ml_collections.ConfigDict],
    *,
    one_of: Iterable[str] = (),
    beside: Mapping[str, dict[str, str]] = {},
    **options: tuple[str, ...],
) -> ml_collections.ConfigDict:
    """The config that an argument asks for, after a check that it obeys every word of it.

    Args:
      argument, one_of: see parse_argument.
      make: value of each name, and of "variant" where there is `one_of` -> config. What it refuses is a ValueError.
      beside: word -> values that it gives to names which the argument does not.
      **options: the values each name may have, the default first.

    Raises:
      ValueError: as parse_argument; or a word that changes nothing beside the others.
    """
    given = {name: value for name, value in parse_argument(argument, one_of=one_of, **options).items() if value}
    options = options | {"variant": tuple(one_of)}

    def made(given: dict[str, str]) -> ml_collections.ConfigDict:
        values = {name: values[0] for name, values in options.items() if values} | given
        for word, defaults in beside.items():
            name, _, value = word.partition("=")
            if values[name] == (value or "yes"):
                values |= defaults | given
        return make(values)

    def equal(other: dict[str, str]) -> bool:
        try:
            return made(other).to_dict() == config.to_dict()
        except ValueError:  # the other words exclude it
            return False

    config = made(given)
    for name, value in given.items():
        if any(equal(given | {name: other}) for other in options[name] if other != value):
            others = [word for word in argument.split(",") if word.partition("=")[0] not in (name, value)]
            word = value if name == "variant" else f"{name}={value}"
            raise ValueError(f"{word} has no effect beside {','.join(others)}: leave one of them out")
    return config


def parse_argument(argument: str, *, one_of: Iterable[str] = (), **options: tuple[str, ...]) -> dict[str, str | None]:
    """Parses a config's argument: `--config=configs/vito.py:demo,scales=1` -> {"demo": "yes", "scales": "1"}.

    Args:
      argument: comma-separated words; `name` alone means `name=yes`.
      one_of: words of which the argument may hold one; it is the value of "variant".
      **options: the values each name may have.

    Returns:
      The value of each name; None where the argument does not give it.

    Raises:
      ValueError: an unknown name or value; the message has the nearest valid one. A name that is given twice.
    """
    variants = tuple(one_of)
    chosen: dict[str, str | None] = dict.fromkeys([*options, "variant"])
    for word in filter(None, (argument or "").split(",")):
        name, _, value = word.partition("=")
        _check("variant", name, (*options, *variants))
        values = options.get(name, ("yes",))
        _check(f"value of variant {name}", value or "yes", values)
        name, value = ("variant", name) if name in variants else (name, value or "yes")
        if (before := chosen[name]) is not None:
            raise ValueError(
                f"{before} and {value} exclude each other: choose one"
                if name == "variant" and before != value
                else f"{word.partition('=')[0]} is given twice: {argument}"
            )
        chosen[name] = value
    return chosen


def _check(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown {what} {given!r}; did you mean {nearest!r}? Known: {', '.join(known)}")


def own(config: ml_collections.ConfigDict, *, largest_batch: int, paper: str) -> None:
    """Leaves to the data what follows from their number; vivi_jax.main.fit_to_data fills it in.

    config.batch_size becomes the largest power of two that the data fill, at most `largest_batch`, unless it is given;
    an epoch becomes one pass over the data. `paper` says what the run of the paper is, for the log.

    The batch is one that a single device takes, far below the papers'. BatchNorm stays: exports to torchvision need it,
    and 16 pictures or more are enough for its statistics. LARS goes: it is made for batches of thousands, and Adam
    needs less care with the rate.
    """
    config.batch_size = placeholder(int)
    config.schedule.examples_per_epoch = placeholder(int)
    config.own = ml_collections.ConfigDict(dict(largest_batch=largest_batch, paper=paper))


def run_section(**changes) -> ml_collections.ConfigDict:
    """`config.run`: how often to log, save and evaluate. May differ between the starts of one run."""
    return ml_collections.ConfigDict(
        dict(
            log_every=50,  # steps
            checkpoint_every=1000,  # steps
            keep_checkpoints=3,
            eval_every=0,  # steps between online evaluations; 0: only at the end
            watchdog_seconds=1800.0,  # a step that takes longer ends the process; 0: never
            on_nan="stop",  # where a step is not finite; "skip" it, or "roll_back" to a checkpoint: docs/running.md
            compilation_cache="~/.cache/vivi_jax",  # compiled programs for later starts; "": none are kept
            profile=0,  # steps of this start that JAX's profiler traces into WORKDIR/profile
            wandb="",  # project of Weights & Biases that gets the metrics too; "": none
            fsdp=1,  # devices that hold one copy of parameters, optimizer and target; 1: all on every device
        )
        | changes
    )


def hosts_section() -> ml_collections.ConfigDict:
    """`config.hosts`: how the processes of a run meet. May differ between the starts of one run."""
    return ml_collections.ConfigDict(
        dict(
            start_timeout_seconds=600.0,  # a process whose peers have not come by then ends
            heartbeat_seconds=100,  # after so long a silence a process counts as dead, which ends the run
        )
    )


def evaluation_section(*, image_size: int, batch_size: int) -> ml_collections.ConfigDict:
    """`config.evaluation`: k-NN and linear probe of the online encoder, by evaluation/probe.py."""
    return ml_collections.ConfigDict(
        dict(
            dataset="",  # labelled images: class folders or stores; "": no online evaluation
            image_size=image_size,
            batch_size=batch_size,
            linear=True,  # a linear probe beside k-NN
            k=20,  # neighbours
        )
    )
