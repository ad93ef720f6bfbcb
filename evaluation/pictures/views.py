"""What a run is trained on: the first examples of its first step, augmented by the code that the step runs."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from evaluation.attention import spread
from input_pipeline.streams import sources
from input_pipeline.streams.decode import Batches
from input_pipeline.streams.order import Order
from vivi_jax.build import build_method
from vivi_jax.errors import ConfigError
from vivi_jax.methods.base import HasViews
from vivi_jax.train_step import example_keys

EXAMPLES, ROWS = 8, 3  # shown, where an example has few pictures, and where it has many
PICTURES = 12  # in a row, at most
GAP = 2  # pixels between the frames of a shot or view


class Views(NamedTuple):
    """The first examples of a run's first step.

    Attributes:
      groups: view or shot -> its pictures float32[R, n, H, W, 3], as the network is given them.
      seconds: view or shot -> when in its video each picture is, float64[R, n]; {} of still images.
    """

    groups: dict[str, np.ndarray]
    seconds: dict[str, np.ndarray]


def first_views(config: dict) -> Views:
    """The first examples of the first step of a run with this config.

    They are prepared as by the first of as many processes as leave it few rows, which get the rows of one process.

    Raises:
      ConfigError: its method cannot show them.
      DataError: its data are not there any more, or damaged.
    """
    method, order = build_method(ml_collections.ConfigDict(config)), first_rows(config)
    if not isinstance(method, HasViews):
        raise ConfigError(f"{type(method).__name__} has no function views, which would show what it is trained on")
    stream = open_stream(config, order)
    batch = jax.tree.map(jnp.asarray, next(stream(0, 1)))
    keys = example_keys(config["seed"], jnp.int32(0), batch)  # row by row, so the same as of the whole batch
    views = {name: np.asarray(array) for name, array in jax.jit(method.views)(batch, keys).items()}
    rows = min(EXAMPLES, *map(len, views.values()))
    found = groups({name: array[:rows] for name, array in views.items()})
    if stream.seconds is None:
        return Views(found, {})
    times = np.stack([stream.seconds(order.example(row)) for row in range(rows)])
    return Views(found, {name: times[:, taken] for name, taken in places(found).items()})


def open_stream(config: dict, order: Order) -> Batches:
    """What training reads."""
    return sources.open_stream(config["data"], order, num_classes=config["method"].get("num_classes"))


def first_rows(config: dict) -> Order:
    """An order whose batches are the first few rows of the run's: at least EXAMPLES, as far as the batch has them."""
    sizes = [config["batch_size"], config["data"].get("labelled_batch_size") or config["batch_size"]]
    enough = (n for n in range(min(sizes) // EXAMPLES, 0, -1) if not any(size % n for size in sizes))
    return Order(config["seed"], config["batch_size"], 0, next(enough, 1))


def groups(views: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What belongs together: each of several views, shots or arrays -> its pictures [R, n, H, W, 3].

    >>> def pictures_in(**layouts):
    ...     arrays = {name: np.zeros((2, *layout, 8, 8, 3)) for name, layout in layouts.items()}
    ...     return {name: pictures.shape[1] for name, pictures in groups(arrays).items()}
    >>> pictures_in(views=(3,))
    {'view 1': 1, 'view 2': 1, 'view 3': 1}
    >>> pictures_in(shots=(2, 5), image=())
    {'shot 1': 5, 'shot 2': 5, 'image': 1}
    >>> pictures_in(view1=(7,), view2=(14,))
    {'view 1': 7, 'view 2': 14}
    """
    found = {}
    for name, array in sorted(views.items(), key=lambda item: (-item[1].ndim, item[0])):
        inner = array.shape[1:-3]
        if len(inner) == 2 or (len(inner) == 1 and name.endswith("s")):  # "shots" [K, M], "views" [V]
            parts = array if len(inner) == 2 else array[:, :, None]
            found |= {f"{name.removesuffix('s')} {k + 1}": parts[:, k] for k in range(inner[0])}
        else:
            found[re.sub(r"(\d+)$", r" \1", name)] = array if inner else array[:, None]
    return found


def places(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Group -> where its pictures stand among an example's; labelled images are none of them."""
    counts = {name: pictures.shape[1] for name, pictures in found.items() if name != "image"}
    stops = np.cumsum([*counts.values()])
    return {name: np.arange(stop - counts[name], stop) for name, stop in zip(counts, stops, strict=True)}


def views_figure(views: Views) -> tuple[Figure, list[str]]:
    """A row per example, a column per view or shot, or where these are single pictures the other way round.

    Of a group with many pictures some are shown, evenly spaced. Values outside [0, 1] are moved into it. What was done
    is returned beside the figure.
    """
    notes, strips = [], {}
    most = max(1, PICTURES // len(views.groups))
    for name, pictures in views.groups.items():
        taken = spread(pictures.shape[1], most)
        if len(taken) < pictures.shape[1]:
            notes.append(f"of the {pictures.shape[1]} frames of {name} {len(taken)} are shown")
        low, high = float(pictures.min()), float(pictures.max())
        if low < -1e-3 or high > 1 + 1e-3:
            notes.append(f"{name} is no RGB in [0, 1]: its values, {low:.2f} to {high:.2f}, are scaled")
            pictures = (pictures - low) / (high - low)
        strips[name] = side_by_side(pictures[:, taken])
    examples = len(next(iter(strips.values())))
    across = all(pictures.shape[1] == 1 for pictures in views.groups.values())  # examples as columns
    examples = examples if across else min(examples, ROWS)
    ratios = [strip.shape[2] / strip.shape[1] for strip in strips.values()]
    shape = (len(strips), examples) if across else (examples, len(strips))
    width = examples if across else sum(ratios)
    figure = Figure(figsize=(1.1 * width + 0.2, 1.35 * shape[0]), dpi=140, layout="constrained")
    axes = figure.subplots(*shape, squeeze=False, width_ratios=[1] * examples if across else ratios)
    for (name, strip), of_group in zip(strips.items(), axes if across else axes.T, strict=True):
        for example, axis in enumerate(of_group):
            axis.imshow(strip[example].clip(0, 1))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_title(f"{name}{_when(views, name, example)}", fontsize=9)
    return figure, notes


def side_by_side(pictures: np.ndarray) -> np.ndarray:
    """[R, n, H, W, 3] -> [R, H, n W + gaps, 3], white between."""
    rows, n, height, width, channels = pictures.shape
    strip = np.ones((rows, height, n * (width + GAP) - GAP, channels), np.float32)
    for i in range(n):
        strip[:, :, i * (width + GAP) : i * (width + GAP) + width] = pictures[:, i]
    return strip


def _when(views: Views, name: str, row: int) -> str:
    if name not in views.seconds:
        return ""
    seconds = views.seconds[name][row]
    first, last = seconds.min(), seconds.max()
    return f", {first:.2f} s" if first == last else f", {first:.2f} to {last:.2f} s"
