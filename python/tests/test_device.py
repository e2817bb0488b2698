"""Device memory, against a stand-in for the CUDA driver (standin/cuda.c): its memory cannot be touched, its copies happen
only when their stream is waited for, and it counts. No GPU was seen."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed, as for Rust's linker"
    directory = tmp_path_factory.mktemp("standin")
    library = directory / "libcuda.so.1"
    source = HERE / "standin" / "cuda.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-lpthread"], check=True)
    return directory


def run(standin, master, scenario, **environment):
    """The scenario in a process of its own: the driver is found by the loader, as on a machine with a GPU."""
    script = HERE / "device_scenarios.py"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(standin), **environment}
    outcome = subprocess.run(
        [sys.executable, str(script), master, scenario],
        env=environment, capture_output=True, text=True, timeout=120,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert outcome.stdout.strip().endswith("done"), outcome.stdout + outcome.stderr


@pytest.fixture(scope="module")
def pool(master, lender):
    return master


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize(
    "scenario", ["round_trip", "many_windows", "larger_than_a_window", "sessions", "two_devices", "failures", "threads"]
)
def test_store(standin, pool, scenario, transport):
    run(standin, pool.address, scenario, MOONCAKE_TRANSPORT=transport)


@pytest.mark.parametrize("scenario", ["engine", "engine_on_cuda"])
def test_engine(standin, pool, scenario):
    run(standin, pool.address, scenario)


def test_without_a_driver_addresses_are_refused(pool, tmp_path):
    run(tmp_path, pool.address, "no_driver")
