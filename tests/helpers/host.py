"""One host of a run for test_multiprocess.py: trains tiny VITO, VIVI and VDIM, one after the other, as main does.

python -m helpers.host STORE WORKDIR              ten steps of each
python -m helpers.host STORE WORKDIR vito 100     so many steps of one
"""

import hashlib
import json
import logging
import pathlib
import sys

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import vdim, vito, vivi
from helpers.networks import TinyVideoEncoder
from vivi_jax import command_line, main
from vivi_jax.distributed import processes, sharding
from vivi_jax.distributed.prefetch import Prefetcher
from vivi_jax.models import ENCODERS

BATCH, SIZE = 8, 32


ENCODERS["tiny"] = TinyVideoEncoder


def systems(store: str, steps: int) -> dict[str, ConfigDict]:
    configs = {
        "vito": vito.get_config("demo"),
        "vivi": vivi.get_config("ex2,co=100,demo"),
        "vdim": vdim.get_config("layers=68,demo"),
    }
    configs["vito"].method.update(dict(projector_hidden=16, projector_out=8, attention_hidden=8))
    configs["vito"].schedule.update(dict(examples_per_epoch=BATCH, epochs=1.0 * steps, warmup_epochs=2.0))
    configs["vito"].evaluation = ConfigDict(dict(dataset=store, image_size=SIZE, batch_size=8, linear=False, k=3))
    configs["vivi"].method.update(dict(num_classes=2, exemplar_dim=8, shot_dim=8, predictor_hidden=8, predictor_out=8))
    configs["vivi"].data.update(dict(frames=2, labelled_path=store, labelled_batch_size=BATCH))
    # The paper's SGD at a low rate: Adam makes whole steps of gradients that are but rounding, and after them mining
    # takes other negatives.
    configs["vivi"].optimizer = ConfigDict(dict(name="sgd", weight_decay=1e-4, momentum=0.9))
    configs["vivi"].schedule.update(dict(lr=0.01, total_steps=steps, warmup_steps=2))
    configs["vdim"].method.embed_dim = 16
    configs["vdim"].data.update(dict(frames=4, offset=4))
    configs["vdim"].schedule.update(dict(total_steps=steps, warmup_steps=2))
    for config in configs.values():
        config.batch_size, config.data.path, config.data.image_size = BATCH, store, SIZE
        config.encoder = ConfigDict(dict(name="tiny", norm=config.encoder.norm))
        config.run.update(dict(log_every=1, checkpoint_every=steps))
    return configs


def order(config) -> dict[str, str]:
    """{"step array row": hash} of this process's rows of the first global batches, wherever they lie."""
    feed, hashes = Prefetcher(main.open_data(config)(0), sharding.make_mesh()), {}
    for step, batch in zip(range(3), feed, strict=False):
        for name, array in batch.items():
            for shard in array.addressable_shards:
                first = shard.index[0].indices(len(array))[0]
                hashes |= {
                    f"{step} {name} {first + i}": hashlib.sha256(row.tobytes()).hexdigest()
                    for i, row in enumerate(np.asarray(shard.data))
                }
    feed.close()
    return hashes


def run(store: str, workdir: pathlib.Path, only: str = "", steps: int = 10) -> None:
    processes.start(start_timeout_seconds=600, heartbeat_seconds=600)
    for name, config in systems(store, steps).items():
        if only in ("", name):
            main.run(config, str(workdir / name))
            (workdir / f"{name}.order.{jax.process_index()}.json").write_text(json.dumps(order(config)))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    command_line.set_log_level(logging.INFO)
    command_line.ended(lambda: run(sys.argv[1], pathlib.Path(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:])))
