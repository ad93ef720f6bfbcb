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
