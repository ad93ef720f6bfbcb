"""Label propagation: the mask of a sequence's first frame, carried to the others by the similarity of features.

Each location of a frame takes the labels of the `top_k` most similar locations in its context, weighted by
softmax(cosine / temperature). The context is the first frame and the `context` frames before this one; except, in one
of the protocols, for the first frame, only locations nearer than `radius` count. Labels stay soft along the way.
"""

import dataclasses
import functools
from collections.abc import Sequence

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from evaluation.encoders import HasApply, apply_to_pixels
from evaluation.protocols.interpolation import EXACT, as_map

TILE = 16  # locations a side of the squares that queries are processed in; each sees only the keys within reach


@dataclasses.dataclass(frozen=True)
class PropagationProtocol:
    """A published setting of label propagation.

    Attributes:
      short_side: pixels that the frames' short side is resized to; None: not resized.
      first_near: the first frame too counts only within the radius.
      copies: the context before the first frame is filled with copies of it (else it is shorter), so that early on the
        nearest neighbours are many times the same location.
      soft_start: the first mask is brought to the feature map bilinearly; else each location takes the nearest pixel.
      stretch: each object's map is stretched to [0, 1] before the largest wins.
    """

    context: int
    radius: int
    top_k: int
    temperature: float
    short_side: int | None
    first_near: bool
    copies: bool
    soft_start: bool
    stretch: bool


PROTOCOLS = {
    # xvjiarui/VFS, configs/r50_nc_sgd_cos_100e_r5_1xNx2_k400.py and trackers/vanilla_tracker.py: VITO's procedure.
    "vfs": PropagationProtocol(
        context=20,
        radius=18,
        top_k=10,
        temperature=0.07,
        short_side=480,
        first_near=True,
        copies=False,
        soft_start=False,
        stretch=True,
    ),
    # ajabri/videowalk, code/test.py and README.md, data/vos.py. Frames stay at 480p.
    "crw": PropagationProtocol(
        context=20,
        radius=12,
        top_k=10,
        temperature=0.05,
        short_side=None,
        first_near=False,
        copies=True,
        soft_start=True,
        stretch=False,
    ),
}
VFS_SHALLOW_RADIUS = 12  # VFS' configs of ResNet-18: neighbor_range=24


class Propagator:
    """Follows the objects of one sequence, frame by frame. Memory: the features and labels of the context, no more.

    Attributes:
      state: {"keys": float32[N, h', w', C] unit features, "labels": float32[N, h', w', K], "valid": bool[N]}, N =
        context + 1 frames, slot 0 the first frame's, each with a margin of `radius` around its h x w locations.
    """

    def __init__(
        self,
        encoder: HasApply,
        layer: str,
        variables: dict,
        protocol: PropagationProtocol,
        mask: np.ndarray,
        first_frame: np.ndarray,
        objects: int,
    ):
        """Begins with a frame uint8[H, W, 3] and its mask uint8[H, W] of numbers 0..objects."""
        self._features = functools.partial(_features, encoder, layer, variables)
        self._protocol, self._size, self._done = protocol, mask.shape, 0
        features = self._features(self._resized(first_frame))
        height, width, _ = features.shape
        labels = start_labels(mask, objects, height, width, soft=protocol.soft_start)
        slots = protocol.context + 1
        known = np.zeros(slots, bool)
        known[: slots if protocol.copies else 2] = True  # slot 1: the first frame is the one before the second, too
        self.state = {
            "keys": jnp.stack([self._padded(features)] * slots),
            "valid": jnp.asarray(known),
            "labels": jnp.stack([self._padded(jnp.asarray(labels))] * slots),
        }

    def step(self, frame: np.ndarray) -> np.ndarray:
        """The next frame uint8[H, W, 3] -> its objects uint8[H, W]."""
        self._done += 1
        features = self._features(self._resized(frame))
        slot = 1 + self._done % self._protocol.context  # the oldest frame's
        self.state, objects = _step(self._protocol, self._size, self.state, features, slot)
        return np.asarray(objects)

    def _resized(self, frame: np.ndarray) -> np.ndarray:
        side = self._protocol.short_side
        if side is None or min(frame.shape[:2]) == side:
            return frame
        factor = side / min(frame.shape[:2])
        size = tuple(round(length * factor) for length in frame.shape[1::-1])
        return cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)

    def _padded(self, maps: jax.Array) -> jax.Array:
        return jnp.pad(maps, (*_margins(maps.shape[:2], self._protocol.radius), (0, 0)))


def start_labels(mask: np.ndarray, objects: int, height: int, width: int, *, soft: bool) -> np.ndarray:
    """float32[height, width, objects + 1] shares of background and objects, of a mask uint8[H, W]."""
    if soft:
        one_hot = np.eye(objects + 1, dtype=np.float32)[mask]
        return cv2.resize(one_hot, (width, height), interpolation=cv2.INTER_LINEAR)
    nearest = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    return np.eye(objects + 1, dtype=np.float32)[nearest]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(encoder: HasApply, layer: str, variables: dict, frame: jax.Array) -> jax.Array:
    """float32[h, w, C], each location of length 1."""
    _, stages = apply_to_pixels(encoder, variables, frame[None])
    features = as_map(stages[layer])[0].astype(jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(
    protocol: PropagationProtocol, size: tuple[int, int], state: dict, features: jax.Array, slot: jax.Array
) -> tuple[dict, jax.Array]:
    """Returns (state with this frame in `slot`, objects uint8[H, W])."""
    height, width, _ = features.shape
    labels = attend(protocol, state, features)
    corner = (slot, protocol.radius, protocol.radius, 0)
    state = {
        "keys": jax.lax.dynamic_update_slice(state["keys"], features[None], corner),
        "labels": jax.lax.dynamic_update_slice(state["labels"], labels[None], corner),
        "valid": state["valid"].at[slot].set(True),
    }
    full = jax.image.resize(labels, (*size, labels.shape[-1]), "linear", antialias=False)
    if protocol.stretch:
        low, high = full.min((0, 1), keepdims=True), full.max((0, 1), keepdims=True)
        full = jnp.where(high > 0, (full - low) / (high - low + 1e-12), full)
    return state, full.argmax(axis=-1).astype(jnp.uint8)


def attend(protocol: PropagationProtocol, state: dict, queries_hxwxC: jax.Array) -> jax.Array:
    """float32[h, w, K] labels of the queries, from a state as Propagator's."""
    height, width, channels = queries_hxwxC.shape
    radius, side = protocol.radius, TILE + 2 * protocol.radius
    queries = jnp.pad(queries_hxwxC, (*((0, -length % TILE) for length in (height, width)), (0, 0)))
    inside = jnp.pad(jnp.ones((height, width), bool), _margins((height, width), radius))
    near = jnp.asarray(_reach(radius))  # [TILE * TILE, side * side]
    windowed = slice(None) if protocol.first_near else slice(1, None)
    keys, labels, valid = (state[name][windowed] for name in ("keys", "labels", "valid"))

    def tile(corner: jax.Array) -> jax.Array:
        y, x = corner
        cut = functools.partial(jax.lax.dynamic_slice, start_indices=(0, y, x, 0))
        query = jax.lax.dynamic_slice(queries, (y, x, 0), (TILE, TILE, channels)).reshape(-1, channels)
        key = cut(keys, slice_sizes=(len(keys), side, side, channels)).reshape(-1, channels)
        label = cut(labels, slice_sizes=(len(labels), side, side, labels.shape[-1])).reshape(-1, labels.shape[-1])
        allowed = near & jax.lax.dynamic_slice(inside, (y, x), (side, side)).reshape(1, -1)
        allowed = (valid[None, :, None] & allowed[:, None]).reshape(len(query), -1)
        similarity = jnp.where(allowed, jnp.matmul(query, key.T, precision=EXACT), -jnp.inf)
        if not protocol.first_near:
            whole = tuple(slice(radius, radius + length) for length in (height, width))
            first = state["keys"][0][whole].reshape(-1, channels)
            similarity = jnp.concatenate([jnp.matmul(query, first.T, precision=EXACT), similarity], axis=1)
            label = jnp.concatenate([state["labels"][0][whole].reshape(-1, label.shape[-1]), label])
        best, index = jax.lax.top_k(similarity, protocol.top_k)
        weights = jax.nn.softmax(best / protocol.temperature, axis=-1)
        return jnp.einsum("qk,qkc->qc", weights, label[index], precision=EXACT).reshape(TILE, TILE, -1)

    rows, columns = queries.shape[0] // TILE, queries.shape[1] // TILE
    corners = TILE * jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    tiles = jax.lax.map(tile, corners).reshape(rows, columns, TILE, TILE, -1)
    return jnp.moveaxis(tiles, 1, 2).reshape(rows * TILE, columns * TILE, -1)[:height, :width]


def _margins(size: Sequence[int], radius: int) -> tuple[tuple[int, int], ...]:
    """Padding of height and width: the radius on both sides, and behind it what fills the last tile."""
    return tuple((radius, radius + -length % TILE) for length in size)


@functools.cache
def _reach(radius: int) -> np.ndarray:
    """bool[TILE * TILE, side * side]: key locations nearer than `radius` to each query of a tile."""
    side = TILE + 2 * radius
    query, key = np.arange(TILE) + radius, np.arange(side)
    square = (query[:, None] - key[None]) ** 2  # [TILE, side]
    return (square[:, None, :, None] + square[None, :, None, :] < radius**2).reshape(TILE * TILE, side * side)
