"""How far apart in time the frames are that a loss compares: VITO, Figure A.2."""

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from evaluation.pictures.views import first_rows, groups, open_stream, places
from input_pipeline.store import FrameStore
from vivi_jax.build import build_method
from vivi_jax.errors import DataError

DRAWS, PAIRS = 2000, 64  # examples, and pairs of pictures of each
BINS = 16


def time_differences(config: dict) -> dict[str, np.ndarray]:
    """Seconds between pairs of pictures of an example, of examples 0 to DRAWS - 1 of a run with this config.

    Returns:
      {"different views" (or shots): float64[n], and where these have several frames "the same view": float64[m]}; of an
      example at most PAIRS pairs each, evenly spaced over all.

    Raises:
      DataError: they are of still images, or of one frame each; or the data are not there any more.
    """
    stream = open_stream(config, first_rows(config))
    if stream.seconds is None:
        raise DataError("the run is trained on still images, between which there is no time")
    seconds = np.stack([stream.seconds(i) for i in range(DRAWS)])
    of_picture = group_of_each_picture(config)
    a, b = np.triu_indices(len(of_picture), k=1)
    unit = "shot" if "shots" in config["data"] else "view"
    kinds = {f"different {unit}s": of_picture[a] != of_picture[b], f"the same {unit}": of_picture[a] == of_picture[b]}
    found = {}
    for name, of_kind in kinds.items():
        if of_kind.any():
            pairs = np.flatnonzero(of_kind)
            pairs = pairs[np.unique(np.linspace(0, len(pairs) - 1, PAIRS).round().astype(int))]
            found[name] = np.abs(seconds[:, a[pairs]] - seconds[:, b[pairs]]).ravel()
    if not any(differences.any() for differences in found.values()):
        raise DataError("the views of an example are crops of one frame, between which there is no time")
    return found


def group_of_each_picture(config: dict) -> np.ndarray:
    """int[V]: which view or shot each picture of an example belongs to."""
    found = ml_collections.ConfigDict(config)
    spec = build_method(found).batch_spec(found.batch_size, found.data)
    shapes = {name: x.shape for name, x in spec.items() if len(x.shape) > 3}
    taken = places(groups({name: np.broadcast_to(np.uint8(0), (1, *shape[1:])) for name, shape in shapes.items()}))
    return np.concatenate([np.full(len(pictures), number) for number, pictures in enumerate(taken.values())])


def triangular(num_frames: int) -> np.ndarray:
    """P(|dt| = k frames), k = 0 to T - 1, of two frames drawn independently from a clip of T: float64[T].

    1 / T for k = 0, since T of the T^2 pairs are equal, and 2 (T - k) / T^2 for each other k.

    >>> triangular(4).tolist()
    [0.25, 0.375, 0.25, 0.125]
    """
    k = np.arange(num_frames)
    return np.where(k == 0, 1, 2) * (num_frames - k) / num_frames**2


def expected(config: dict, edges: np.ndarray) -> np.ndarray | None:
    """The share of pairs that the law of VITO's sampler puts into each bin of seconds; None: another sampler's run.

    Every video of a clip's length or more counts alike, as an epoch has each once.
    """
    if config["data"].get("sampler") != "marginal":
        return None
    store = FrameStore(config["data"]["path"])
    clips = np.maximum(np.rint(config["data"]["clip_seconds"] * store.fps.astype(float)), 1).astype(int)
    share = np.zeros(len(edges) - 1)
    used = store.num_frames >= clips
    for fps, count in zip(*np.unique(store.fps[used], return_counts=True), strict=True):
        law = triangular(int(clips[used][store.fps[used] == fps][0]))
        share += count / used.sum() * np.histogram(np.arange(len(law)) / float(fps), edges, weights=law)[0]
    return share


def edges_of(differences: np.ndarray) -> np.ndarray:
    """Edges of about BINS bins, each of the same number of frames where all videos have the same rate.

    >>> edges_of(np.array([0, 0.25, 0.5, 4.0])).tolist()[:3]
    [-0.125, 0.375, 0.875]
    """
    frame = differences[differences > 0].min()
    width = frame * np.ceil(differences.max() / frame / BINS)
    return np.arange(0, differences.max() + width, width) - frame / 2


def times_figure(config: dict) -> Figure:
    """Histogram of time_differences, with the law that VITO's sampler obeys."""
    found = time_differences(config)
    edges = edges_of(np.concatenate([*found.values()]))
    figure = Figure(figsize=(4.2, 2.3), dpi=180, layout="constrained")
    axis = figure.subplots()
    for (name, differences), colour in zip(found.items(), ("#0b6e99", "#d9822b"), strict=False):
        share = np.histogram(differences, edges)[0] / len(differences)
        axis.stairs(share, edges, fill=True, color=colour, alpha=0.6, label=name)
    if (law := expected(config, edges)) is not None:
        middle = (edges[1:] + edges[:-1]) / 2
        axis.plot(middle, law, color="#1d2733", marker="o", markersize=3, linewidth=1, label="triangular law")
    axis.set_xlabel("|dt| in seconds", fontsize=9)
    axis.set_ylabel("share of pairs", fontsize=9)
    axis.tick_params(labelsize=9, colors="#5b6875")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, frameon=False)
    return figure
