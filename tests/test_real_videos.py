"""The whole path on real videos: prepared, trained on, looked at."""

import json

import cv2
import numpy as np
import pytest

from helpers.commands import run_module
from input_pipeline.store import FrameStore


def run(module: str, *arguments) -> None:
    result = run_module(module, *arguments, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_vito_trains_on_real_videos_and_draws_its_attention(sample_data, tmp_path):
    store, workdir, picture = tmp_path / "store", tmp_path / "run", tmp_path / "attention.png"
    run("input_pipeline.prepare", f"--videos={sample_data / 'videos'}", f"--out={store}", "--short_side=128")
    inputs = [path for path in (sample_data / "videos").rglob("*") if path.is_file()]
    ledger = [json.loads(line) for line in (store / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == len(inputs)
    assert sum(row["status"] == "ok" for row in ledger) == len(FrameStore(str(store))) == len(inputs) - 2

    run(
        "vivi_jax.main",
        "--config=configs/vito.py:demo,views=2",
        f"--workdir={workdir}",
        f"--config.data.path={store}",
        "--config.batch_size=8",
        "--config.schedule.examples_per_epoch=8",
        "--config.schedule.epochs=150.0",
        "--config.schedule.base_lr=0.1",
        "--config.run.log_every=1",
        "--config.encoder.width=0.125",
    )
    loss = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(loss) == 150 and np.mean(loss[-20:]) < 0.8 * np.mean(loss[:10])

    run("evaluation.attention", f"--checkpoint={workdir}", f"--images={store}", f"--out={picture}", "--count=6")
    image = cv2.imread(str(picture))
    assert image is not None and image.shape[1] > image.shape[0] > 300 and image.std() > 10
