"""Plans a run on hardware that is not at hand: does it fit, what does it send, how long will it take?

    python -m vivi_jax.plan --config=configs/vito.py --topology=v3:8x8
    python -m vivi_jax.plan --config=configs/vivi.py:ex4,big --topology=v5e:16x16 --config.encoder.remat=True
    python -m vivi_jax.plan --config=configs/vito.py --topology=gpu:h100x8
    python -m vivi_jax.plan --all                      # docs/plan.md

Compiles the real step of the config, as training does, for all devices of the topology: for TPUs with the TPU
compiler (pip install -e .[plan]; Linux, no TPU needed), else for as many simulated CPU devices. Memory, FLOPs and
collectives are read from the compiled program, what is in loops as often as it runs. Times are ESTIMATES: the TPU
compiler's own cycles, or a roofline over chips.py, plus bytes over links and latencies for the collectives; nobody has
measured them.
"""

import subprocess
import sys

from absl import flags

from vivi_jax import command_line, files
from vivi_jax.errors import ConfigError
from vivi_jax.planning.planner import plan, text

CONFIG = command_line.define_config(None, "Config file, with variants: configs/vito.py")
TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v3:8x8 (chips) or gpu:h100x8.")
ALL = flags.DEFINE_bool("all", False, "All rows of docs/plan.md that are missing (benchmarks/plan.py).")
JSON = flags.DEFINE_string("json", None, "File to write the plan to.")


def main(values: dict) -> None:
    if ALL.value:
        sys.exit(subprocess.call([sys.executable, "-m", "benchmarks.plan"]))
    if not values["topology"] or values["config"] is None:
        raise ConfigError("give --config and --topology; for example --config=configs/vito.py --topology=v3:8x8")
    result = plan(values["config"], values["topology"])
    print(text(result))
    if values["json"]:
        files.write_json(values["json"], result)
    if not result["fits"]:
        sys.exit(2)


if __name__ == "__main__":
    not_opened = ("data.path", "data.labelled_path", "evaluation.dataset", "init_from")
    command_line.run(
        main,
        {"config": CONFIG, "topology": TOPOLOGY, "json": JSON},
        optional=["config", "topology", "json"],
        remote=[f"config.{key}" for key in not_opened],
    )
