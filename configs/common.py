"""What all config files share: their argument, and the values of a run that change no result."""

import difflib

import ml_collections


def parse_argument(argument: str, **options: tuple[str, ...]) -> dict[str, str]:
    """Parses a config's argument: `--config=configs/vito.py:demo,scales=1` -> {"demo": "yes", "scales": "1"}.

    Args:
      argument: comma-separated words; `name` alone means `name=yes`.
      **options: the values each name may have, the default first.

    Raises:
      ValueError: an unknown name or value; the message has the nearest valid one.
    """
    chosen = {name: values[0] for name, values in options.items()}
    for word in filter(None, (argument or "").split(",")):
        name, _, value = word.partition("=")
        _check("variant", name, tuple(options))
        _check(f"value of variant {name}", value or "yes", options[name])
        chosen[name] = value or "yes"
    return chosen


def _check(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown {what} {given!r}; did you mean {nearest!r}? Known: {', '.join(known)}")


def run_section(**changes) -> ml_collections.ConfigDict:
    """`config.run`: how often to log, save and evaluate. May differ between the starts of one run."""
    return ml_collections.ConfigDict(
        dict(
            log_every=50,  # steps
            checkpoint_every=1000,  # steps
            keep_checkpoints=3,
            eval_every=0,  # steps between online evaluations; 0: only at the end
            watchdog_seconds=1800.0,  # a step that takes longer ends the process; 0: never
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
        )
    )
