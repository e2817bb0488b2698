"""Every public method with wrong types, wild addresses, huge sizes, before `setup`, after `close` and with a master that
dies: an answer or one of Python's exceptions, in bounded time; never a signal and never a panic."""

import itertools
import pathlib
import subprocess
import sys

import pytest
from conftest import Master

from mooncake.store import MooncakeDistributedStore

SCRIPT = pathlib.Path(__file__).parent / "hostile_calls.py"


def test_lists_without_end_are_refused():
    store = MooncakeDistributedStore()
    with pytest.raises(ValueError, match="more than"):
        store.batch_is_exist(itertools.repeat("k"))
    with pytest.raises(ValueError, match="more than"):
        store.batch_get_into(["k"], itertools.count(), [1])


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("store", "before"), ("store", "open"), ("store", "after"), ("store", "dying"),
        ("engine", "before"), ("engine", "open"), ("others", "open"),
    ],
)  # fmt: skip
def test_hostile_calls(kind, state, tmp_path):
    master = Master()
    command = [sys.executable, "-X", "faulthandler", str(SCRIPT), kind, master.address, state, str(master.process.pid), "4"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    finally:
        master.kill()
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-4000:])
    assert "panicked" not in done.stderr, done.stderr[-4000:]
    assert done.stdout.startswith("done "), done.stdout
    calls = int(done.stdout.split()[1])
    assert calls > (30 if state == "dying" else 300)
