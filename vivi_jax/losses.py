"""Losses as plain functions on the global batch: arrays in, scalar out.

None knows of devices, axis names or configs. Under `jax.jit` with the batch sharded over a mesh, XLA partitions the
logits by rows and gathers the (small) keys. All take float arrays of any precision and compute in float32; arrays of
other shapes or types than documented are an AssertionError.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import optax

from vivi_jax.errors import ConfigError

# A large batch is compared with an eighth of its keys at a time: all logits, or all gathered keys, never exist at once.
# The number of parts is fixed, not their size: on a pod each part costs the time of a message to all devices.
PARTS, SMALLEST_IN_PARTS = 8, 4096


def info_nce(queries_BxQxD: jax.Array, keys_BxD: jax.Array) -> jax.Array:
    """InfoNCE with in-batch negatives (van den Oord et al. 2018; VITO Eq. 1).

    The positive of example b's queries is key b; their negatives are the keys of all other examples. Similarities are
    dot products: any temperature is in the norm of the embeddings. No gradient flows to the keys, which are a target
    network's.

    Memory: B x Q x B logits, of a large batch an eighth of them at a time; sharded by rows it divides by the number of
    devices.

    Args:
      queries_BxQxD: Q queries of each example, or one, [B, D].
      keys_BxD: a key of each example.

    Returns:
      float32 scalar, mean over b and queries of -log( exp(q_b.k_b) / sum_c exp(q_b.k_c) ).

    >>> loss = jax.jit(info_nce)(jnp.ones((8, 3, 2)), jnp.ones((8, 2)))
    >>> round(float(loss), 4)  # equal scores: log 8
    2.0794
    """
    chex.assert_rank([queries_BxQxD, keys_BxD], [{2, 3}, 2])
    chex.assert_shape(queries_BxQxD, (len(keys_BxD), ..., keys_BxD.shape[-1]))
    chex.assert_type([queries_BxQxD, keys_BxD], float)
    batch, dim = keys_BxD.shape
    queries_RxD = queries_BxQxD.reshape(-1, dim).astype(jnp.float32)  # two axes: why, see models/resnet.py, Conv
    keys_BxD = jax.lax.stop_gradient(keys_BxD.astype(jnp.float32))
    if batch < SMALLEST_IN_PARTS or batch % PARTS:
        own_key_R = jnp.arange(len(queries_RxD)) // (len(queries_RxD) // batch)
        return optax.softmax_cross_entropy_with_integer_labels(queries_RxD @ keys_BxD.T, own_key_R).mean()
    return _info_nce_in_parts(queries_RxD, keys_BxD)


@jax.custom_vjp
def _info_nce_in_parts(queries_RxD: jax.Array, keys_BxD: jax.Array) -> jax.Array:
    """info_nce of R = B Q queries, float32, over PARTS parts of the keys.

    The gradient of a query is the mean key, weighted by softmax, minus its own key: it is computed with the value, in
    the same pass over the keys.
    """
    return _info_nce_and_gradient(queries_RxD, keys_BxD)[0]


def _info_nce_and_gradient(queries_RxD: jax.Array, keys_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float32 scalar, its gradient with respect to the queries [R, D])."""
    # Part p has keys p, p + P, ...: with rows sharded over devices, each device gives as many to every part.
    keys_PxCxD = jnp.moveaxis(keys_BxD.reshape(-1, PARTS, keys_BxD.shape[1]), 1, 0)

    def add_part(sums, keys_CxD):
        log_sum_R, mean_key_RxD = sums
        logits_RxC = queries_RxD @ keys_CxD.T
        new_log_sum_R = jnp.logaddexp(log_sum_R, jax.nn.logsumexp(logits_RxC, axis=1))
        mean_key_RxD = (
            mean_key_RxD * jnp.exp(log_sum_R - new_log_sum_R)[:, None]
            + jnp.exp(logits_RxC - new_log_sum_R[:, None]) @ keys_CxD
        )
        return (new_log_sum_R, mean_key_RxD), None

    nothing = jnp.full(len(queries_RxD), -jnp.inf), jnp.zeros_like(queries_RxD)
    (log_sum_R, mean_key_RxD), _ = jax.lax.scan(add_part, nothing, keys_PxCxD)
    own_key_RxD = jnp.repeat(keys_BxD, len(queries_RxD) // len(keys_BxD), axis=0)
    loss_R = log_sum_R - (queries_RxD * own_key_RxD).sum(axis=1)
    return loss_R.mean(), (mean_key_RxD - own_key_RxD) / len(queries_RxD)


_info_nce_in_parts.defvjp(
    _info_nce_and_gradient,
    lambda gradient_RxD, cotangent: (cotangent * gradient_RxD, None),  # None: no gradient to the keys
)


def moclr(online_BxVxD: jax.Array, target_BxVxD: jax.Array) -> jax.Array:
    """MoCLR loss (VITO §3.1): InfoNCE summed over all ordered pairs of different views i -> j.

    View i is the query from the online network, view j the key from the target network; negatives are the target's
    view j of all other examples (the paper does not say which of their views; one negative per other example is its
    Eq. 1). The sum is not divided by the number of pairs, as in the paper.

    Args:
      online_BxVxD: projections of norm 1/sqrt(temperature), V >= 2.
      target_BxVxD: the same of the target network. No gradient flows to it.

    Returns:
      float32 scalar: V (V - 1) log B if all scores are equal.
    """
    chex.assert_rank(online_BxVxD, 3)
    chex.assert_equal_shape([online_BxVxD, target_BxVxD])
    views = online_BxVxD.shape[1]
    # All views i against view j, for all j at once: one message then brings the keys of every view.
    queries_VxBxQxD = jnp.stack([jnp.delete(online_BxVxD, j, axis=1) for j in range(views)])
    return (views - 1) * jax.vmap(info_nce)(queries_VxBxQxD, jnp.moveaxis(target_BxVxD, 1, 0)).sum()


def semi_hard_triplet(exemplars_SxMxD: jax.Array, *, margin: float, groups: int) -> tuple[jax.Array, dict]:
    """Triplet loss with semi-hard negatives between the frames of S shots (VIVI §3.2; Schroff et al. 2015).

    For each ordered pair of frames (a, p) of one shot, the negative n is a frame of another shot: the nearest to `a`
    of those farther from it than p is; if none is farther, the farthest of all. The loss is the mean over all pairs of
    max(0, margin + d(a, p) - d(a, n)), with d the squared distance of L2-normalised embeddings. (VIVI names the loss
    only; these are the semantics of the TensorFlow op that the code of its reference [33] calls, with margin 0.5. That
    code normalises over the batch instead of the features, which is not followed.)

    Args:
      exemplars_SxMxD: embeddings of M >= 2 frames each of S shots.
      margin: by how much a negative should be farther than the positive.
      groups: this many equal, consecutive groups of shots are mined separately. VIVI's code base mines within the local
        batch of each TPU core: groups = cores. 1 mines in the whole batch.

    Returns:
      float32 scalar, and shares of the pairs: triplet_active (loss above 0), triplet_semi_hard (a negative is farther
      than p).

    Raises:
      ConfigError: fewer than two frames a shot or two shots a group, or groups of unequal size.
    """
    distance_GxAxA, negative_AxA = grouped_distances(exemplars_SxMxD, groups)
    shots, exemplars, _ = exemplars_SxMxD.shape
    positive_GxAxM = own_shot(distance_GxAxA, exemplars)
    mined_GxAxM = jax.vmap(functools.partial(mine_semi_hard, negative_AxA=negative_AxA))(
        *jax.lax.stop_gradient((distance_GxAxA, positive_GxAxM))
    )
    negative_GxAxM = jnp.take_along_axis(distance_GxAxA, mined_GxAxM, axis=-1)
    is_pair_1xAxM = ~jnp.tile(jnp.eye(exemplars, dtype=bool), (shots // groups, 1))[None]  # p is not a itself

    def mean(values_GxAxM: jax.Array) -> jax.Array:
        return jnp.where(is_pair_1xAxM, values_GxAxM, 0.0).sum() / (shots * exemplars * (exemplars - 1))

    hinge_GxAxM = jnp.maximum(0.0, margin + positive_GxAxM - negative_GxAxM)
    semi_hard_GxAxM = negative_GxAxM > positive_GxAxM  # the farthest of all is taken only where none is semi-hard
    return mean(hinge_GxAxM), {"triplet_active": mean(hinge_GxAxM > 0), "triplet_semi_hard": mean(semi_hard_GxAxM)}


def mine_semi_hard(distance_AxA: jax.Array, positive_AxM: jax.Array, *, negative_AxA: jax.Array) -> jax.Array:
    """Indices int32[A, M] of the negative for each anchor a and positive p, see semi_hard_triplet."""
    farthest_A = jnp.where(negative_AxA, distance_AxA, -jnp.inf).argmax(axis=1)

    def for_positive(positive_A: jax.Array) -> jax.Array:
        semi_hard_AxA = negative_AxA & (distance_AxA > positive_A[:, None])
        nearest_A = jnp.where(semi_hard_AxA, distance_AxA, jnp.inf).argmin(axis=1)
        return jnp.where(semi_hard_AxA.any(axis=1), nearest_A, farthest_A)

    # One positive after the other: A x A numbers at a time instead of A x M x A.
    return jax.lax.map(for_positive, positive_AxM.T).T


def batch_hard_triplet(exemplars_SxMxD: jax.Array, *, groups: int) -> tuple[jax.Array, dict]:
    """Triplet loss with the hardest positive and negative of each frame and a soft margin (Hermans et al. 2017).

    The mean over frames a of log(1 + exp(max_p d(a, p) - min_n d(a, n))), with d the distance (not squared) of
    L2-normalised embeddings, p of the same shot and n of the others. The form of VIVI's reference [68] (S4L).

    Args:
      exemplars_SxMxD: embeddings of M >= 2 frames each of S shots.
      groups: this many equal, consecutive groups of shots are mined separately; see semi_hard_triplet.

    Returns:
      float32 scalar, and triplet_correct: the share of frames whose positives are all nearer than every negative.

    Raises:
      ConfigError: fewer than two frames a shot or two shots a group, or groups of unequal size.
    """
    distance_GxAxA, negative_AxA = grouped_distances(exemplars_SxMxD, groups)
    hardest_GxA = own_shot(distance_GxAxA, exemplars_SxMxD.shape[1]).max(axis=-1)
    nearest_GxA = jnp.where(negative_AxA[None], distance_GxAxA, jnp.inf).min(axis=-1)
    gap_GxA = jnp.sqrt(jnp.maximum(hardest_GxA, 1e-12)) - jnp.sqrt(jnp.maximum(nearest_GxA, 1e-12))
    return jax.nn.softplus(gap_GxA).mean(), {"triplet_correct": (gap_GxA < 0).mean()}


def grouped_distances(exemplars_SxMxD: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Squared distances of the L2-normalised embeddings within each of G groups of shots.

    Returns:
      float32[G, A, A] with A = S / G * M, and bool[A, A]: True where two embeddings are of different shots.

    Raises:
      ConfigError: fewer than two frames a shot or two shots a group, or groups of unequal size.
    """
    chex.assert_rank(exemplars_SxMxD, 3)
    chex.assert_type(exemplars_SxMxD, float)
    shots, exemplars, dim = exemplars_SxMxD.shape
    if exemplars < 2 or shots % groups or shots // groups < 2:
        raise ConfigError(
            f"a triplet loss over {shots} shots of {exemplars} frames in {groups} group(s): it needs two "
            "frames of each shot, and equal groups of two shots or more; change config.data.frames, config.batch_size "
            "or config.method.triplet_groups"
        )
    z_GxAxD = unit_length(exemplars_SxMxD.astype(jnp.float32)).reshape(groups, -1, dim)
    # Full precision: hinges and ranks depend on small differences, which a TPU's default product would round away.
    cosine_GxAxA = jnp.einsum("gad,gbd->gab", z_GxAxD, z_GxAxD, precision=jax.lax.Precision.HIGHEST)
    shot_A = jnp.arange(z_GxAxD.shape[1]) // exemplars
    return 2 - 2 * cosine_GxAxA, shot_A[:, None] != shot_A[None, :]


def own_shot(distance_GxAxA: jax.Array, exemplars: int) -> jax.Array:
    """Distances [G, A, A] -> [G, A, M]: from each embedding to the M of its own shot, itself included."""
    groups, anchors, _ = distance_GxAxA.shape
    blocks_GxSxMxSxM = distance_GxAxA.reshape(groups, anchors // exemplars, exemplars, anchors // exemplars, exemplars)
    shot = jnp.arange(anchors // exemplars)
    return blocks_GxSxMxSxM[:, shot, :, shot, :].swapaxes(0, 1).reshape(groups, anchors, exemplars)


def shot_info_nce(predicted_NxPxD: jax.Array, shots_NxKxD: jax.Array) -> tuple[jax.Array, dict]:
    """InfoNCE between predicted and true shot embeddings (VIVI Eq. 2, with the negatives of its footnote 3).

    Prediction p of video i is of its shot k = K - P + p. Its negatives are all K shots of all other videos; the other
    shots of video i itself are left out. Scores are dot products, without normalisation or temperature (the paper
    names neither). This is Eq. 2 up to the constant that its 1/N under the logarithm adds.

    Args:
      predicted_NxPxD: phi1 of the predictions of the last P shots, P <= K.
      shots_NxKxD: phi2 of the shots.

    Returns:
      float32 scalar, mean over N and P: log(1 + K (N - 1)) if all scores are equal; and nce_accuracy, the share of
      predictions whose own shot has a higher score than every negative (none, if all are equal).

    >>> loss, metrics = jax.jit(shot_info_nce)(jnp.ones((5, 3, 2)), jnp.ones((5, 4, 2)))
    >>> round(float(loss), 4), float(metrics["nce_accuracy"])  # equal scores: log(1 + 4 * (5 - 1))
    (2.8332, 0.0)
    """
    chex.assert_rank([predicted_NxPxD, shots_NxKxD], 3)
    chex.assert_shape(predicted_NxPxD, (len(shots_NxKxD), None, shots_NxKxD.shape[-1]))
    chex.assert_axis_dimension_lteq(predicted_NxPxD, 1, shots_NxKxD.shape[1])
    chex.assert_type([predicted_NxPxD, shots_NxKxD], float)
    (videos, predictions, dim), shots = predicted_NxPxD.shape, shots_NxKxD.shape[1]
    # Two axes, as in info_nce: rows are predictions, columns the shots of all videos.
    logits_RxC = (
        predicted_NxPxD.reshape(-1, dim).astype(jnp.float32) @ shots_NxKxD.reshape(-1, dim).astype(jnp.float32).T
    )
    row_Rx1 = jnp.arange(videos * predictions)[:, None]
    own_Rx1 = row_Rx1 // predictions * shots + shots - predictions + row_Rx1 % predictions
    column_1xC = jnp.arange(videos * shots)[None, :]
    is_own_RxC = column_1xC == own_Rx1
    same_video_RxC = column_1xC // shots == row_Rx1 // predictions
    positive_R = jnp.where(is_own_RxC, logits_RxC, 0.0).sum(axis=1)
    negatives_RxC = jnp.where(same_video_RxC, -jnp.inf, logits_RxC)
    loss = jax.nn.logsumexp(jnp.where(is_own_RxC, logits_RxC, negatives_RxC), axis=1) - positive_R
    return loss.mean(), {"nce_accuracy": (positive_R > negatives_RxC.max(axis=1)).mean()}


def cross_entropy(logits: jax.Array, labels: jax.Array, name: str) -> tuple[jax.Array, dict]:
    """Mean softmax cross-entropy of logits [..., C] and labels int[...] in [0, C); and {name}_accuracy."""
    chex.assert_shape(labels, logits.shape[:-1])
    chex.assert_type([logits, labels], [float, int])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
    return loss, {f"{name}_accuracy": (logits.argmax(axis=-1) == labels).mean()}


def unit_length(z: jax.Array) -> jax.Array:
    """[..., D] -> the same with norm 1. A lower bound of 1e-6 on the norm keeps zeros zeros, and gradients finite.

    >>> jax.jit(unit_length)(jnp.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    return z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(axis=-1, keepdims=True), 1e-12))


def collapse_indicators(embeddings_NxD: jax.Array) -> dict[str, jax.Array]:
    """Two numbers that fall when representations collapse; of the embeddings, normalised to length 1.

    Returns:
      embedding_std: mean over dimensions of the standard deviation over examples, times sqrt(D): 1 for directions
        spread evenly over the sphere, 0 for a point.
      embedding_effective_rank: participation ratio tr(C)^2 / tr(C^2) of the covariance C, from 1 (a line) to D. It
        needs one matmul, for the smaller of C and the Gram matrix, whose squares have the same sum; the entropy-based
        rank of Roy & Vetterli (2007) would need an eigendecomposition per step.
    """
    chex.assert_rank(embeddings_NxD, 2)
    chex.assert_type(embeddings_NxD, float)
    z_NxD = unit_length(embeddings_NxD)
    centred_NxD = z_NxD - z_NxD.mean(axis=0, keepdims=True)
    examples, dim = z_NxD.shape
    products = centred_NxD.T @ centred_NxD if dim <= examples else centred_NxD @ centred_NxD.T
    variance_D = jnp.square(centred_NxD).mean(axis=0)
    return {
        "embedding_std": jnp.sqrt(variance_D).mean() * jnp.sqrt(1.0 * dim),
        "embedding_effective_rank": variance_D.sum() ** 2 / jnp.maximum(jnp.square(products / examples).sum(), 1e-12),
    }


def deep_infomax_nce(
    antecedents_BxNxD: jax.Array, consequents_BxMxD: jax.Array, *, clip_score: float
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE between the locations of two layers (VDIM Eq. 1-3, in the form of AMDIM's code).

    Every pair of locations (i, i') of the same clip is a positive of its own. Its negatives are all M consequent
    locations of all OTHER clips; other locations of the same clip never appear in the denominator. Eq. 3 as printed
    would sum over the clip's own locations too, under a view drawn independently; AMDIM, which VDIM extends, does not.

    Memory: B^2 N M scores (and their gradient). Where one side is the global layer, N or M is 1 and that is B^2 N, not
    (B N)^2; sharded by rows it divides by the number of devices.

    Args:
      antecedents_BxNxD: phi's output at each location of one layer; scores are dot products over sqrt(D).
      consequents_BxMxD: the same of the other layer.
      clip_score: c of the soft clip c tanh(s / c) of AMDIM, which keeps the exponentials finite.

    Returns:
      (float32 scalar, mean over clips and pairs of locations of -log of the positive's share;
       float32 scalar, mean of the squared scores before the clip, which AMDIM adds to the loss with weight 0.05).
    """
    chex.assert_rank([antecedents_BxNxD, consequents_BxMxD], 3)
    chex.assert_shape(consequents_BxMxD, (len(antecedents_BxNxD), None, antecedents_BxNxD.shape[-1]))
    chex.assert_type([antecedents_BxNxD, consequents_BxMxD], float)
    a_BxNxD = antecedents_BxNxD.astype(jnp.float32) / jnp.sqrt(1.0 * antecedents_BxNxD.shape[-1])
    c_BxMxD = consequents_BxMxD.astype(jnp.float32)
    raw_BxNxBxM = jnp.einsum("bnd,cmd->bncm", a_BxNxD, c_BxMxD)
    positives_BxNxM = soft_clip(jnp.einsum("bnd,bmd->bnm", a_BxNxD, c_BxMxD), clip_score)
    same_clip = jnp.eye(len(raw_BxNxBxM), dtype=bool)[:, None, :, None]  # [B, 1, B, 1]
    negatives_BxNxBxM = jnp.where(same_clip, jnp.finfo(jnp.float32).min, soft_clip(raw_BxNxBxM, clip_score))
    log_negatives_BxNx1 = jax.nn.logsumexp(negatives_BxNxBxM, axis=(2, 3))[..., None]
    # -log( e^p / (e^p + sum e^n) ) = softplus( log sum e^n - p )
    return jax.nn.softplus(log_negatives_BxNx1 - positives_BxNxM).mean(), jnp.square(raw_BxNxBxM).mean()


def soft_clip(scores: jax.Array, bound: float) -> jax.Array:
    """bound * tanh(scores / bound): near the identity for small scores, never beyond +-bound."""
    return bound * jnp.tanh(scores / bound)
