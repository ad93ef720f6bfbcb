"""Losses as plain functions on the global batch: arrays in, scalar out.

None knows of devices, axis names or configs. Under `jax.jit` with the batch sharded over a mesh, XLA partitions the
logits by rows and gathers the (small) keys.
"""
import jax
import jax.numpy as jnp
import optax


def info_nce(queries_BxD: jax.Array, keys_BxD: jax.Array) -> jax.Array:
    """InfoNCE with in-batch negatives (van den Oord et al. 2018; VITO Eq. 1).

    Query b's positive is key b; its negatives are the keys of all other examples. Similarities are dot products: any
    temperature is in the norm of the embeddings.

    Returns:
      float32 scalar, mean over b of -log( exp(q_b.k_b) / sum_c exp(q_b.k_c) ).
    """
    logits_BxB = queries_BxD.astype(jnp.float32) @ keys_BxD.astype(jnp.float32).T
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxB, jnp.arange(logits_BxB.shape[0])).mean()


def moclr(online_BxVxD: jax.Array, target_BxVxD: jax.Array) -> jax.Array:
    """MoCLR loss (VITO §3.1): InfoNCE summed over all ordered pairs of different views i -> j.

    View i is the query from the online network, view j the key from the target network; negatives are the target's
    view j of all other examples (the paper does not say which of their views: method choice as in its Eq. 1, one
    negative per other example). The sum is not divided by the number of pairs, as in the paper.

    Args:
      online_BxVxD, target_BxVxD: projections of norm 1/sqrt(temperature). No gradient flows to the target.
    """
    target_BxVxD = jax.lax.stop_gradient(target_BxVxD)
    views = online_BxVxD.shape[1]
    return sum(info_nce(online_BxVxD[:, i], target_BxVxD[:, j]) for i in range(views) for j in range(views) if i != j)


def collapse_indicators(embeddings_NxD: jax.Array) -> dict[str, jax.Array]:
    """Two numbers that fall when representations collapse, from unit-normalised embeddings.

    Returns:
      embedding_std: mean over dimensions of the standard deviation over examples, times sqrt(D): 1 for directions
        spread evenly over the sphere, 0 for a point.
      embedding_effective_rank: participation ratio tr(C)^2 / tr(C^2) of the covariance C, from 1 (a line) to D. It
        needs one matmul; the entropy-based rank of Roy & Vetterli (2007) would need an eigendecomposition per step.
    """
    z_NxD = embeddings_NxD / jnp.linalg.norm(embeddings_NxD, axis=-1, keepdims=True)
    centred_NxD = z_NxD - z_NxD.mean(axis=0, keepdims=True)
    covariance_DxD = centred_NxD.T @ centred_NxD / z_NxD.shape[0]
    variance = jnp.diagonal(covariance_DxD)
    return {
        "embedding_std": jnp.sqrt(variance).mean() * jnp.sqrt(1.0 * z_NxD.shape[1]),
        "embedding_effective_rank": variance.sum() ** 2 / jnp.maximum(jnp.square(covariance_DxD).sum(), 1e-12),
    }


def deep_infomax_nce(antecedents_BxNxD: jax.Array, consequents_BxMxD: jax.Array, *, clip_score: float
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
