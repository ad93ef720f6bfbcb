"""One host of a run for test_multiprocess.py: trains tiny VITO, VIVI and VDIM, one after the other, as main does.

    python tests/host.py STORE WORKDIR
"""
import hashlib
import json
import pathlib
import sys

import jax
import numpy as np

from configs import vdim, vito, vivi
from vivi_jax import main, processes, sharding
from vivi_jax.feed import Feed

STEPS, BATCH = 20, 8


def systems(store: str) -> dict:
    """Configs of the three systems, as small as they get."""
    encoder = dict(width=0.125)
    configs = {"vito": vito.get_config("demo"), "vivi": vivi.get_config("ex2,co=100,demo"),
               "vdim": vdim.get_config("demo")}
    configs["vito"].encoder.update(encoder)
    configs["vito"].method.update(dict(projector_hidden=16, attention_hidden=8))
    configs["vito"].schedule.update(dict(examples_per_epoch=BATCH, epochs=1.0 * STEPS, warmup_epochs=2.0))
    configs["vivi"].encoder.update(encoder)
    configs["vivi"].method.num_classes = 2
    configs["vivi"].data.update(dict(frames=2, labelled_path=store, labelled_batch_size=BATCH))
    configs["vivi"].schedule.update(dict(total_steps=STEPS, warmup_steps=2))
    configs["vdim"].encoder.update(encoder | dict(frames=8))
    configs["vdim"].method.embed_dim = 16
    configs["vdim"].data.update(dict(frames=8, offset=8))
    configs["vdim"].schedule.update(dict(total_steps=STEPS, warmup_steps=2))
    for config in configs.values():
        config.batch_size, config.data.path, config.data.image_size = BATCH, store, 48
        config.run.update(dict(log_every=1, checkpoint_every=STEPS))
    return configs


def order(config) -> dict[str, str]:
    """{"step array device-rows": hash} of this process's rows of the first global batches, as the step gets them."""
    feed, hashes = Feed(main.SOURCES[config.data.source](config)(0), sharding.make_mesh()), {}
    for step, batch in zip(range(3), feed, strict=False):
        for name, array in batch.items():
            for shard in array.addressable_shards:
                rows = shard.index[0].indices(len(array))
                hashes[f"{step} {name} {rows}"] = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
    feed.close()
    return hashes


if __name__ == "__main__":
    store, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
    processes.start(start_timeout_seconds=120, heartbeat_seconds=100)
    for name, config in systems(store).items():
        main.run(config, str(workdir / name))
        (workdir / f"{name}.order.{jax.process_index()}.json").write_text(json.dumps(order(config)))
