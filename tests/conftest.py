"""Test set-up: eight simulated devices, strict broadcasting, and the one way to reach the sample data."""

import os
import pathlib
import signal
import tempfile

# Before the first `import jax`: every test can then build meshes of 1, 2 and 8 devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Their programs are tiny and most of their time is compiling: without LLVM's optimisation it halves.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["EPATH_USE_TF"] = "0"  # as buckets/runs.py has it: it counts at the first path that any library makes
# Many tests and their child processes compile the same programs; all workers of a test run share one cache of them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="vivi_jax_tests_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # silent broadcasting is an error here
# A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP; what tests start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SAMPLE_DATA = pathlib.Path(
    os.environ.get("VIVI_JAX_SAMPLE_DATA", pathlib.Path(__file__).resolve().parents[2] / "shared" / "data")
)

# Files that take longest, first: workers take whole files in this order (launch/test.sh), so that none starts at the
# end with a long one while the others idle.
LONGEST = (
    "test_multiprocess",
    "test_benchmarks",
    "test_benchmarks_gpu",
    "test_detection",
    "test_readers",
    "test_resume",
    "test_plan",
    "test_configs",
    "test_vivi",
    "test_film",
    "test_action",
    "test_vtab",
    "test_train_step",
    "test_vdim",
    "test_segmentation",
    "test_sharding",
    "test_real_videos",
    "test_moco_v3",
    "test_sweep",
    "test_resnet",
    "test_prepare",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))  # stable: all else stays in its order


@pytest.fixture(scope="session")
def sample_data() -> pathlib.Path:
    """Folder of small real videos and images; tests that need it are skipped, by name, where it is absent."""
    if not SAMPLE_DATA.is_dir():
        pytest.skip(f"no sample data at {SAMPLE_DATA}; set VIVI_JAX_SAMPLE_DATA to run this test")
    return SAMPLE_DATA
