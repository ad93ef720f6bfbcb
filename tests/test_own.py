"""The variant `own`: batch, epochs, warm-up and decays follow from the number of the user's videos."""

import re

import numpy as np
import pytest

from configs import vdim, vito, vivi
from helpers.commands import assert_one_line_error, run_module
from helpers.frame_stores import jpeg, write_store
from vivi_jax import main
from vivi_jax.build import build
from vivi_jax.errors import DataError

CONFIGS = {"vito": vito.get_config, "vivi": vivi.get_config, "vdim": vdim.get_config}
LARGEST = {"vito": 256, "vivi": 8, "vdim": 32}


def store_of(directory, videos: int) -> str:
    """Videos of two shots of four seconds."""
    video = dict(frames=32, fps=4.0, height=16, width=16, shot_starts=[0, 16])
    write_store(directory, [video] * videos, [jpeg(np.zeros((16, 16, 3), np.uint8))] * (32 * videos))
    return str(directory)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("videos", [20, 27])
def test_batch_and_length_follow_from_the_videos(name, videos, tmp_path, caplog):
    config = CONFIGS[name]("own")
    config.data.path = store_of(tmp_path / "store", videos)
    if name == "vivi":
        config.data.shots = 2
    main.check_sections(config)
    main.fit_to_data(config)
    batch = min(16, LARGEST[name])
    assert (config.batch_size, config.schedule.examples_per_epoch) == (batch, videos)
    experiment = build(config)
    assert abs(experiment.total_steps - 300 * videos / batch) < 1
    assert main.open_data(config).examples == videos  # as configured, the data can be opened
    with caplog.at_level("INFO", "vivi_jax.main"):
        main.say_length(config, experiment.total_steps, videos)
    passes = re.search(rf"{experiment.total_steps} steps of {batch} examples: ([\d.]+) passes", caplog.text)
    assert passes and 298 < float(passes[1]) <= 300
    assert f"passes over the {videos} videos" in caplog.text and "the paper: " in caplog.text
    assert "more videos would help" not in caplog.text  # 16, or the largest that there is


@pytest.mark.parametrize("epochs, warmup", [(4.0, 0.4), (10.0, 1.0), (11.0, 10.0)])
def test_a_run_as_short_as_its_warm_up_gets_a_shorter_one(epochs, warmup, tmp_path):
    config = vito.get_config("own")
    config.data.path = store_of(tmp_path / "store", 20)
    config.batch_size, config.schedule.examples_per_epoch, config.schedule.epochs = 4, 20, epochs
    main.fit_to_data(config)
    assert config.schedule.warmup_epochs == pytest.approx(warmup)
    assert build(config).total_steps == 5 * epochs


@pytest.mark.parametrize("name", CONFIGS)
def test_the_arithmetic_for_two_hundred_thousand(name):
    config = CONFIGS[name]("own")
    config.batch_size = main.fitting_batch(200_000, config.own.largest_batch)
    config.schedule.examples_per_epoch = 200_000
    assert config.batch_size == LARGEST[name]
    assert abs(build(config).total_steps - 300 * 200_000 / LARGEST[name]) < 1


def test_what_the_user_gives_stays_and_a_batch_beyond_the_data_is_refused_with_one_that_works(tmp_path):
    config = vito.get_config("own")
    config.data.path = store_of(tmp_path / "store", 20)
    config.batch_size = 64
    main.fit_to_data(config)
    assert (config.batch_size, config.schedule.examples_per_epoch) == (64, 20)
    with pytest.raises(DataError, match=r"lower --config.batch_size \(to 16\)"):
        main.open_data(config)
    config.batch_size = 16
    main.open_data(config)


def test_a_paper_config_says_that_its_epochs_are_not_passes_over_few_videos(tmp_path, caplog):
    config = vito.get_config()
    main.say_length(config, 93835, 26)
    assert "an epoch of this config is 1281167 examples" in caplog.text and "--config=vito:own" in caplog.text


def test_vivi_with_videos_of_one_shot_is_told_what_works(tmp_path):
    """`own` asks for four shots in a row; the message's options are tried until one opens, as a reader would."""
    video = dict(frames=32, fps=4.0, height=16, width=16, shot_starts=[0])
    write_store(tmp_path / "store", [video] * 20, [jpeg(np.zeros((16, 16, 3), np.uint8))] * 640)
    config = vivi.get_config("own")
    config.data.path = str(tmp_path / "store")
    with pytest.raises(DataError, match="shots=4 consecutive shots") as refused:
        main.fit_to_data(config)
    words = re.search(r"--config=configs/vivi.py:(\S+), or ", str(refused.value))
    assert words
    config = vivi.get_config(words[1])
    config.data.path = str(tmp_path / "store")
    main.fit_to_data(config)
    assert main.open_data(config).examples == 20


def test_own_excludes_what_it_would_overrule():
    for get_config, words in (
        (vito.get_config, "own,demo"),
        (vdim.get_config, "demo,own"),
        (vivi.get_config, "own,co=10"),
    ):
        with pytest.raises(ValueError, match="exclude"):
            get_config(words)


@pytest.mark.slow
def test_the_sample_videos_are_trained_on_by_the_readmes_command(sample_data, tmp_path):
    """Small overrides only; the log says the length beforehand, and the run ends."""
    done = run_module("input_pipeline.prepare", f"--videos={sample_data / 'videos'}", f"--out={tmp_path / 'store'}")
    assert done.returncode == 0, done.stderr
    flags = ["--config=vito:own", f"--config.data.path={tmp_path / 'store'}", f"--workdir={tmp_path / 'run'}"]
    small = ["encoder.depth=18", "encoder.width=0.1", "data.image_size=32", "data.views=2", "schedule.epochs=2"]
    small += ["schedule.warmup_epochs=0.5", "method.projector_hidden=32", "data.clip_seconds=0.5"]
    done = run_module("vivi_jax.main", *flags, *[f"--config.{word}" for word in small], timeout=500)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ steps of \d+ examples: [\d.]+ passes over the \d+ videos", done.stderr), done.stderr
    assert "the paper: batches of 4096" in done.stderr and "compiling the step" in done.stderr
    printed = run_module("vivi_jax.main", "--print_config", *flags, "--config.seed=7")
    assert "config.seed = 7  # 0 in the file itself" in printed.stdout, printed.stderr
    assert_one_line_error(run_module("vivi_jax.main", "--config=vito:own"), "config.data.path is empty")
