#!/usr/bin/env bash
# optax 0.2.8: global_norm adds the leaves' squared norms in the leaves' own precision. Of bfloat16 gradients the sum stops
# once it is 256 times a leaf's part, at 16 times a leaf's norm, however many leaves there are, and clip_by_global_norm(1)
# lets norms above 1 through: 2 with 1,000 leaves, 6.25 with 10,000. One would expect bfloat16's rounding of some
# thousandths, not a factor that grows with the number of leaves; jnp.linalg.norm of the same numbers in one array is right.
# Seen: leaves of norm 1, true norm 10, 31.6, 100: 10, 16, 16. The script fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import numpy as np
import optax

print("optax", optax.__version__)
norms = {}
for leaves in (100, 1000, 10000):
    gradients = [jnp.ones(1, jnp.bfloat16)] * leaves
    norms[leaves] = float(optax.global_norm(gradients))
    clipped, _ = optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    left = float(np.linalg.norm(np.array(clipped, np.float32)))
    one = float(jnp.linalg.norm(jnp.ones(leaves, jnp.bfloat16)))
    print(f"{leaves} leaves of norm 1: global_norm {norms[leaves]}, of one array {one}, true {leaves**0.5:.4g};", end=" ")
    print(f"after clip_by_global_norm(1): {left:.4g}")
    assert abs(one / leaves**0.5 - 1) < 0.01 and (leaves == 100) == (left < 1.01)
assert norms == {100: 10, 1000: 16, 10000: 16}
print("as stated")
PYTHON
