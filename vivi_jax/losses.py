"""Losses as plain functions on the global batch: arrays in, scalar out.

None knows of devices, axis names or configs. Under `jax.jit` with the batch sharded over a mesh, XLA partitions the
logits by rows and gathers the (small) keys.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from vivi_jax.errors import ConfigError

# A large batch is compared with an eighth of its keys at a time: neither all logits nor all gathered keys ever exist.
# The number of parts is fixed, not their size: on a pod each part costs the time of a message to all devices.
PARTS, SMALLEST_IN_PARTS = 8, 4096


def info_nce(queries_BxQxD: jax.Array, keys_BxD: jax.Array) -> jax.Array:
    """InfoNCE with in-batch negatives (van den Oord et al. 2018; VITO Eq. 1).

    The positive of example b's queries (Q of them, or one [B, D]) is key b; their negatives are the keys of all other
    examples. Similarities are dot products: any temperature is in the norm of the embeddings. No gradient flows to the
    keys, which are a target network's.

    Memory: B x Q x B logits, of a large batch an eighth of them at a time; sharded by rows it divides by the number of
    devices.

    Returns:
      float32 scalar, mean over b and queries of -log( exp(q_b.k_b) / sum_c exp(q_b.k_c) ).
    """
    batch, dim = keys_BxD.shape
    queries_RxD = queries_BxQxD.reshape(-1, dim).astype(jnp.float32)  # two axes: why, see models/resnet.py, Conv
    keys_BxD = jax.lax.stop_gradient(keys_BxD.astype(jnp.float32))
    queries_per_key = len(queries_RxD) // batch
    if batch < SMALLEST_IN_PARTS or batch % PARTS:
        own_key_R = jnp.arange(len(queries_RxD)) // queries_per_key
        return optax.softmax_cross_entropy_with_integer_labels(queries_RxD @ keys_BxD.T, own_key_R).mean()

    # Part p has keys p, p + P, ...: with rows sharded over devices, each device gives as many to every part.
    keys_PxCxD = jnp.moveaxis(keys_BxD.reshape(-1, PARTS, dim), 1, 0)
    fixed_RxD = jax.lax.stop_gradient(queries_RxD)

    def add_part(sums, keys_CxD):
        log_sum_R, mean_key_RxD = sums
        logits_RxC = fixed_RxD @ keys_CxD.T
        new_log_sum_R = jnp.logaddexp(log_sum_R, jax.nn.logsumexp(logits_RxC, axis=1))
        mean_key_RxD = (
            mean_key_RxD * jnp.exp(log_sum_R - new_log_sum_R)[:, None]
            + jnp.exp(logits_RxC - new_log_sum_R[:, None]) @ keys_CxD
        )
        return (new_log_sum_R, mean_key_RxD), None

    nothing = jnp.full(len(fixed_RxD), -jnp.inf), jnp.zeros_like(fixed_RxD)
    (log_sum_R, mean_key_RxD), _ = jax.lax.scan(add_part, nothing, keys_PxCxD)
    # A query's gradient is the mean key, weighted by softmax, less its own key: one pass over the keys gives it too.
    own_key_RxD = jnp.repeat(keys_BxD, queries_per_key, axis=0)
    loss_R = log_sum_R - (fixed_RxD * own_key_RxD).sum(axis=1)
    along_gradient_R = (queries_RxD * (mean_key_RxD - own_key_RxD)).sum(axis=1)
    return (loss_R + along_gradient_R - jax.lax.stop_gradient(along_gradient_R)).mean()


def moclr(online_BxVxD: jax.Array, target_BxVxD: jax.Array) -> jax.Array:
    """MoCLR loss (VITO §3.1): InfoNCE summed over all ordered pairs of different views i -> j.

    View i is the query from the online network, view j the key from the target network; negatives are the target's
    view j of all other examples (the paper does not say which of their views: method choice as in its Eq. 1, one
    negative per other example). The sum is not divided by the number of pairs, as in the paper.

    Args:
      online_BxVxD, target_BxVxD: projections of norm 1/sqrt(temperature). No gradient flows to the target.
    """
    views = online_BxVxD.shape[1]
    # All views i against view j, for all j at once: a message brings keys of every view from the other devices.
    queries_VxBxQxD = jnp.stack([jnp.delete(online_BxVxD, j, axis=1) for j in range(views)])
    return (views - 1) * jax.vmap(info_nce)(queries_VxBxQxD, jnp.moveaxis(target_BxVxD, 1, 0)).sum()


def semi_hard_triplet(exemplars_SxMxD: jax.Array, *, margin: float, groups: int) -> tuple[jax.Array, dict]:
    """Triplet loss with semi-hard negatives between the frames of S shots (VIVI §3.2; Schroff et al. 2015).

    For each ordered pair of frames (a, p) of one shot: of the frames n of all other shots, take the nearest to `a` that
    is farther from it than p is; if none is farther, the farthest of all. The loss is the mean over all pairs of
    max(0, margin + d(a, p) - d(a, n)), with d the squared distance of L2-normalised embeddings. (VIVI names the loss
    only; these are the semantics of the TensorFlow op that the code of its reference [33] calls, with margin 0.5. That
    code normalises over the batch instead of the features, which is not followed.)

    Args:
      exemplars_SxMxD: embeddings of M >= 2 frames each of S shots.
      groups: this many equal, consecutive groups of shots are mined separately. VIVI's code base mines within the local
        batch of each TPU core: groups = cores. 1 mines in the whole batch.

    Returns:
      float32 scalar, and shares of the pairs: triplet_active (loss above 0), triplet_semi_hard (there is a negative
      farther than p).

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

    Arguments, shares and errors are those of semi_hard_triplet.
    """
    distance_GxAxA, negative_AxA = grouped_distances(exemplars_SxMxD, groups)
    hardest_GxA = own_shot(distance_GxAxA, exemplars_SxMxD.shape[1]).max(axis=-1)
    nearest_GxA = jnp.where(negative_AxA[None], distance_GxAxA, jnp.inf).min(axis=-1)
    gap_GxA = jnp.sqrt(jnp.maximum(hardest_GxA, 1e-12)) - jnp.sqrt(jnp.maximum(nearest_GxA, 1e-12))
    return jax.nn.softplus(gap_GxA).mean(), {"triplet_correct": (gap_GxA < 0).mean()}


def grouped_distances(exemplars_SxMxD: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Squared distances of the L2-normalised embeddings within each group of shots.

    Returns:
      float32[G, A, A] with A = S / G * M, and bool[A, A]: True where two embeddings are of different shots.
    """
    shots, exemplars, dim = exemplars_SxMxD.shape
    if exemplars < 2 or shots % groups or shots // groups < 2:
        raise ConfigError(
            f"a triplet loss over {shots} shots of {exemplars} frames in {groups} group(s): it needs two "
            "frames of each shot, and equal groups of two shots or more; change config.data.frames, "
            "config.batch_size or config.method.triplet_groups"
        )
    z_GxAxD = unit_length(exemplars_SxMxD.astype(jnp.float32)).reshape(groups, -1, dim)
    # Full precision: hinges and ranks hang on small differences, which a TPU's default product would round away.
    cosine_GxAxA = jnp.einsum("gad,gbd->gab", z_GxAxD, z_GxAxD, precision=jax.lax.Precision.HIGHEST)
    shot_A = jnp.arange(z_GxAxD.shape[1]) // exemplars
    return 2 - 2 * cosine_GxAxA, shot_A[:, None] != shot_A[None, :]


def own_shot(distance_GxAxA: jax.Array, exemplars: int) -> jax.Array:
    """[G, A, M]: from each embedding to the M of its own shot, itself included."""
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
      predicted_NxPxD: phi1 of what was predicted for the last P shots.
      shots_NxKxD: phi2 of the shots.

    Returns:
      float32 scalar, mean over N and P: log(1 + K (N - 1)) if all scores are equal; and nce_accuracy, the share of
      predictions whose own shot has a higher score than every negative (none, if all are equal).
    """
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
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
    return loss, {f"{name}_accuracy": (logits.argmax(axis=-1) == labels).mean()}


def unit_length(z: jax.Array) -> jax.Array:
    """[..., D] -> the same with norm 1. A floor under the norm keeps zeros zeros, and their gradients finite."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(axis=-1, keepdims=True), 1e-12))


def collapse_indicators(embeddings_NxD: jax.Array) -> dict[str, jax.Array]:
    """Two numbers that fall when representations collapse, from unit-normalised embeddings.

    Returns:
      embedding_std: mean over dimensions of the standard deviation over examples, times sqrt(D): 1 for directions
        spread evenly over the sphere, 0 for a point.
      embedding_effective_rank: participation ratio tr(C)^2 / tr(C^2) of the covariance C, from 1 (a line) to D. It
        needs one matmul, for the smaller of C and the Gram matrix, whose squares have the same sum; the entropy-based
        rank of Roy & Vetterli (2007) would need an eigendecomposition per step.
    """
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
    locations of all OTHER clips; other locations of the same clip stand in no denominator. Eq. 3 as printed would sum
    over the clip's own locations too, under a view drawn independently; AMDIM, which VDIM extends, does not.

    Memory: B^2 N M scores (and their gradient). Where one side is the global layer, N or M is 1 and that is B^2 N, not
    (B N)^2; sharded by rows it divides by the number of devices.

    Args:
      antecedents_BxNxD, consequents_BxMxD: phi's output at each location; scores are dot products over sqrt(D).
      clip_score: c of the soft clip c tanh(s / c) of AMDIM, which keeps the exponentials finite.

    Returns:
      (float32 scalar, mean over clips and pairs of locations of -log of the positive's share;
       float32 scalar, mean of the squared scores before the clip, which AMDIM adds to the loss with weight 0.05).
    """
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
    """Near the identity for small scores, never beyond +-bound."""
    return bound * jnp.tanh(scores / bound)
