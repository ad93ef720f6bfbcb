"""Test set-up: eight simulated devices, strict broadcasting, and the one way to reach the sample data."""

import os
import pathlib
import tempfile

# Before the first `import jax`: every test can then build meshes of 1, 2 and 8 devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Many tests and their child processes compile the same programs; all workers of a test run share one cache of them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="vivi_jax_tests_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # silent broadcasting is an error here

SAMPLE_DATA = pathlib.Path(
    os.environ.get("VIVI_JAX_SAMPLE_DATA", pathlib.Path(__file__).resolve().parents[2] / "shared" / "data")
)


@pytest.fixture(scope="session")
def sample_data() -> pathlib.Path:
    """Folder of small real videos and images; tests that need it are skipped, by name, where it is absent."""
    if not SAMPLE_DATA.is_dir():
        pytest.skip(f"no sample data at {SAMPLE_DATA}; set VIVI_JAX_SAMPLE_DATA to run this test")
    return SAMPLE_DATA
