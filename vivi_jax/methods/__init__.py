"""The methods by name. A method is one file here, one line of METHODS and one config; base.py has the contract."""

from vivi_jax.methods.moco_v3 import MocoV3
from vivi_jax.methods.vdim import Vdim
from vivi_jax.methods.vito import Vito
from vivi_jax.methods.vivi import Vivi

METHODS = {"vito": Vito, "vivi": Vivi, "vdim": Vdim, "moco_v3": MocoV3}
