"""Every public method with wrong types, wild addresses, huge sizes, before `setup`, after `close` and with a master that
dies: an answer or one of Python's exceptions, in bounded time; never a signal and never a panic."""

import asyncio
import ctypes
import itertools
import mmap
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import BINARY, Master, joined

from mooncake.async_store import MooncakeDistributedStoreAsync
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


MEMORY = 1 << 20


def families(store, at):
    """A call of each family: name and what to call. The keys `k0` to `k9` are there, 1,000 bytes each."""
    keys = [f"k{n}" for n in range(10)]
    value = b"v" * 200_000
    return {
        "put": lambda: store.put("new1", value),
        "put small": lambda: store.put("new2", b"v"),
        "put_parts": lambda: store.put_parts("new3", value, value),
        "put_batch": lambda: store.put_batch(["new4", "new5"], [value, b"v"]),
        "put_from": lambda: store.put_from("new6", at, MEMORY),
        "batch_put_from": lambda: store.batch_put_from(["new7"], [at], [1000]),
        "multi put": lambda: store.batch_put_from_multi_buffers(["new8"], [[at, at + 5000]], [[1000, 1000]]),
        "upsert": lambda: store.upsert("k0", value),
        "batch_upsert_from": lambda: store.batch_upsert_from(["k1"], [at], [1000]),
        "put session": lambda: store.batch_put_session_start(["new9"], [1000]),
        "get missing": lambda: store.get("missing"),
        "get_batch": lambda: store.get_batch(keys),
        "get_buffer": lambda: store.get_buffer("k2"),
        "batch_get_into": lambda: store.batch_get_into(keys, [at + n * 1000 for n in range(10)], [1000] * 10),
        "multi get": lambda: store.batch_get_into_multi_buffers(["k3"], [[at]], [[1000]]),
        "ranges": lambda: store.get_into_ranges([at], [["k4"]], [[[0]]], [[[0]]], [[[10]]]),
        "get session": lambda: store.batch_get_session_start(["k5"]),
        "exist": lambda: store.is_exist("elsewhere"),
        "batch_is_exist": lambda: store.batch_is_exist([*keys, "elsewhere"]),
        "get_size": lambda: store.get_size("missing"),
        "remove": lambda: store.remove("k6", True),
        "batch_remove": lambda: store.batch_remove(["k7", "k8"], True),
        "remove_by_regex": lambda: store.remove_by_regex("k9", True),
        "remove_all": lambda: store.remove_all(True),
        "replicas": lambda: store.get_replica_desc("k0"),
        "copy": lambda: store.create_copy_task("k0", ["nowhere"]),
        "move": lambda: store.create_move_task("k0", "here", "there"),
        "clear": lambda: store.batch_replica_clear(["k0"], "here"),
        "health": lambda: store.health_check(),
        "lend": lambda: store.allocate_and_mount_segment(1 << 20),
    }


@pytest.mark.parametrize("how", ["calls", "asyncio"])
def test_a_master_that_dies_in_the_middle_of_every_family(how):
    """All of them wait for a master that has stopped; then it is gone."""
    master = Master()
    node = subprocess.Popen([BINARY, "node", "--master", master.address, "--memory", "64MiB"], stdout=subprocess.PIPE, text=True)
    while "in service" not in node.stdout.readline():
        assert node.poll() is None
    memory = mmap.mmap(-1, MEMORY)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    store = MooncakeDistributedStoreAsync(max_workers=64)
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 8 << 20, 0, "tcp", "", master.address) == 0
    for n in range(10):
        assert store.put(f"k{n}", bytes(1000)) == 0
    calls = families(store, at)
    took = {}

    def call(name, what):
        began = time.monotonic()
        try:
            what()
        finally:
            took[name] = time.monotonic() - began

    def die():
        time.sleep(0.3)
        master.kill()

    def in_threads():
        threads = [threading.Thread(target=call, args=one, daemon=True) for one in calls.items()]
        for thread in threads:
            thread.start()
        die()
        for thread in threads:
            thread.join(30)

    async def in_a_loop():
        async def one(name, what):
            began = time.monotonic()
            await what
            took[name] = time.monotonic() - began

        class Twins:
            def __getattr__(self, name):
                return getattr(store, "async_" + name)

        tasks = [asyncio.create_task(one(name, what())) for name, what in families(Twins(), at).items()]
        await asyncio.to_thread(die)
        await asyncio.wait_for(asyncio.gather(*tasks), 30)

    try:
        os.kill(master.process.pid, signal.SIGSTOP)
        in_threads() if how == "calls" else asyncio.run(in_a_loop())
        assert set(took) == set(calls), set(calls) - set(took)
        assert max(took.values()) < 25, took
        began = time.monotonic()
        assert store.close() == 0 and time.monotonic() - began < 15
    finally:
        master.kill()
        node.kill()
        node.wait()


CUT = """
import os, sys, time
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
path, master = sys.argv[1:3]
lending = MooncakeDistributedStore()
assert lending.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master) == 0
lent = lending.mount_segment(path, 16 << 20)
assert lent["ret"] == 0
config = ReplicateConfig()
config.preferred_segment = lent["segment_ids"][0]
values = {f"cut{n}": os.urandom(300_000) for n in range(20)}
for key, value in values.items():
    assert lending.put(key, value, config) == 0
where = {k: d.get_memory_descriptor().buffer_descriptor.transport_endpoint for k in values for d in lending.get_replica_desc(k)}
assert lent["segment_ids"][0] in where.values()
print("lent", flush=True)
left, *rest = sys.stdin.readline().split()
os.truncate(path, int(left))
if "grown" in rest:
    # Nobody touches it meanwhile: the file is asked.
    os.truncate(path, 16 << 20)
    time.sleep(1)
# What is whole may still be read; what is not is no value at all, from here and from elsewhere.
for key, value in values.items():
    assert lending.get(key) in (b"", value), key
print("read", flush=True)
sys.stdin.readline()
for key, value in values.items():
    code = lending.put("again" + key, value, config)
    assert code <= 0
    if code == 0:
        assert lending.get("again" + key) in (b"", value)
deadline = time.monotonic() + 10
while lending.unmount_segment(lent["segment_ids"]) != -101 and time.monotonic() < deadline:
    time.sleep(0.05)
assert lending.put("after", b"after") == 0 and lending.get("after") == b"after"
assert lending.close() == 0
print("done", flush=True)
"""


@pytest.mark.parametrize("left", ["0", f"{1 << 20}", f"{(2 << 20) + 4096}", f"{(2 << 20) + 4096} grown"])
@pytest.mark.parametrize("transport", ["any", "tcp"])
def test_a_lent_file_is_cut(master, lender, left, transport):
    """Neither a signal nor wrong bytes: its objects are lost, the process and the rest of the pool go on."""
    path = f"/dev/shm/mooncake-test-cut-{os.getpid()}"
    with open(path, "wb") as file:
        file.truncate(16 << 20)
    environment = {**os.environ, "MOONCAKE_TRANSPORT": transport}
    command = [sys.executable, "-X", "faulthandler", "-c", CUT, path, master.address]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)
    reader = joined(master.address)
    try:
        assert process.stdout.readline() == "lent\n", process.stderr.read()
        before = reader.get_batch([f"cut{n}" for n in range(20)])
        assert all(len(value) == 300_000 for value in before)
        process.stdin.write(f"{left}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "read\n", process.stderr.read()
        after = reader.get_batch([f"cut{n}" for n in range(20)])
        assert all(now in (b"", then) for now, then in zip(after, before, strict=True))
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n", process.stderr.read()
        assert process.wait(20) == 0
        assert reader.put("others", b"go on") == 0 and reader.get("others") == b"go on"
    finally:
        process.kill()
        process.communicate()
        os.unlink(path)
        reader.remove_all(force=True)
        reader.close()


def test_two_setups(master, lender):
    """The second is refused, or takes the first one's place: the store works, and closing leaves nothing behind."""
    store = joined(master.address, 8 << 20)
    name = store.get_hostname()
    for _ in range(3):
        code = store.setup("127.0.0.1", "P2PHANDSHAKE", 8 << 20, 0, "tcp", "", master.address)
        assert code == 0 or code < 0
        assert store.put("twice", b"v") == 0 and store.get("twice") == b"v"
    assert store.close() == 0 and store.close() == 0
    watcher = joined(master.address)
    assert name not in watcher._segment_names()
    watcher.remove_all(force=True)
    watcher.close()


def test_memory_that_is_gone_before_it_is_unregistered(master, lender):
    store = joined(master.address)
    memory = mmap.mmap(-1, MEMORY)
    view = ctypes.c_char.from_buffer(memory)
    at = ctypes.addressof(view)
    assert store.register_buffer(at, MEMORY) == 0
    assert store.put_from("gone", at, 1000) == 0
    del view
    memory.close()
    assert store.unregister_buffer(at) == 0 and store.unregister_buffer(at) == -600
    # No longer vouched for: looked up, and not there.
    assert store.get_into("gone", at, 1000) in (-600, 1000)
    store.remove_all(force=True)
    assert store.close() == 0
