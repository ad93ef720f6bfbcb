"""The methods by name. A method is one file, one line here and one config.

    batch_spec(batch_size, config.data) -> shapes of the global batch
    init(key, batch) -> (params, model_state, target)
    embed(params, model_state, target, batch, keys) -> (embeddings, model_state, target)
    loss(embeddings, batch) -> (scalar, dict of scalars)

A batch is a dict of arrays whose leading axis is the examples; `keys` has a random key per row of each of them.
`embed` holds all that has parameters and treats rows separately, BatchNorm apart; `loss` sees the whole global batch.

Every method names its image encoder "encoder" in the parameter tree, which is how evaluation and export find it.
"""

from vivi_jax.methods.vdim import Vdim
from vivi_jax.methods.vito import Vito
from vivi_jax.methods.vivi import Vivi

METHODS = {"vito": Vito, "vivi": Vivi, "vdim": Vdim}
