"""The methods by name. A method is one file, one line here and one config.

    init(key, batch) -> (params, model_state, target)
    embed(params, model_state, target, batch, keys) -> (embeddings, model_state, target)
    loss(embeddings) -> (scalar, dict of scalars)

Every method names its image encoder "encoder" in the parameter tree, which is how evaluation and export find it.
"""
from vivi_jax.methods.vito import Vito

METHODS = {"vito": Vito}
