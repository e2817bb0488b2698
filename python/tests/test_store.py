"""Return values and traps of `mooncake.store`, as upstream documents or answers them."""

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time

import numpy
import pytest
from conftest import Master, joined

from mooncake.store import TaskStatus, TaskType
from mooncake.store import (
    BufferPool,
    MooncakeDistributedStore,
    MooncakeHostMemAllocator,
    ReplicateConfig,
    SoftPinAction,
)


class Buffer:
    """Anonymous memory with an address."""

    def __init__(self, size):
        self.bytes = mmap.mmap(-1, size)
        self.ptr = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.size = size


@pytest.fixture
def buffer(store):
    made = Buffer(1 << 20)
    assert store.register_buffer(made.ptr, made.size) == 0
    yield made
    assert store.unregister_buffer(made.ptr) == 0


def test_put_and_get(store):
    assert store.put("k", b"one") == 0
    assert store.put("k", b"two") == 0, "existing key: success, and the first value stays"
    assert store.get("k") == b"one"
    assert store.get("missing") == b""
    assert store.get_batch(["k", "missing"]) == [b"one", b""]
    assert store.upsert("k", b"three") == 0 and store.get("k") == b"three"
    assert store.put_batch(["a", "b"], [b"1", bytearray(b"2")]) == 0
    assert store.put("n", numpy.arange(4, dtype=numpy.int32)) == 0
    assert store.get("n") == numpy.arange(4, dtype=numpy.int32).tobytes()
    assert store.put_parts("p", b"ab", b"", b"cd") == 0 and store.get("p") == b"abcd"
    assert store.put_batch(["a"], [b"1", b"2"]) == -600


def test_exist_size_remove(store):
    store.put("k", b"value")
    answers = [store.is_exist("k"), store.is_exist("x"), *store.batch_is_exist(["k", "x"])]
    assert answers == [1, 0, 1, 0] and all(type(a) is int for a in answers)
    assert store.get_size("k") == 5 and store.get_size("x") == -704
    assert store.remove("k") == -706, "leased by the checks above"
    assert store.remove("k", force=True) == 0
    assert store.remove("k") == -704
    store.put_batch(["r1", "r2", "s"], [b"1", b"2", b"3"])
    assert store.remove_by_regex("^r", force=True) == 2
    assert store.batch_remove(["s", "gone"], force=True) == [0, -704]
    assert store.remove_by_regex("(") < 0
    store.put("t", b"1")
    assert store.remove_all(force=True) == 1


@pytest.mark.parametrize("size", [1, 4096, 65536, 300_000])
def test_buffers(store, buffer, size):
    data = os.urandom(size)
    buffer.bytes[:size] = data
    assert store.put_from("k", buffer.ptr, size) == 0
    assert store.put_from(key="k2", buffer_ptr=buffer.ptr, size=size) == 0
    buffer.bytes[:size] = bytes(size)
    assert store.get_into("k", buffer.ptr, size) == size and buffer.bytes[:size] == data
    assert store.get_into("k", buffer.ptr, buffer.size) == size, "a larger buffer"
    assert store.batch_get_into(["k", "x"], [buffer.ptr, buffer.ptr], [size, size]) == [size, -704]
    if size > 1:
        assert store.get_into("k", buffer.ptr, size - 1) == -600, "a smaller buffer"


def test_multi_buffers(store, buffer):
    """Shapes of vLLM: a key per block, an address inside a registered region per layer."""
    layers, part = 56, 4096
    keys = [f"b{i}" for i in range(3)]
    data = os.urandom(len(keys) * layers * part)
    buffer.bytes[: len(data)] = data
    at = [[buffer.ptr + (k * layers + n) * part for n in range(layers)] for k in range(len(keys))]
    sizes = [[part] * layers] * len(keys)
    config = ReplicateConfig()
    config.preferred_segment = "nobody"
    assert store.batch_put_from_multi_buffers(keys, at, sizes, config) == [0] * len(keys)
    buffer.bytes[: len(data)] = bytes(len(data))
    assert store.batch_get_into_multi_buffers(keys, at, sizes) == [layers * part] * len(keys)
    assert buffer.bytes[: len(data)] == data
    assert store.batch_get_into_multi_buffers(keys[:1], [at[0][:2]], [[part, part]]) == [-600]
    longer = [at[0] + at[1][:1]]
    assert store.batch_get_into_multi_buffers(keys[:1], longer, [[part] * (layers + 1)]) == [-800]
    assert store.batch_put_from_multi_buffers(keys, at[:1], sizes) == [-600] * len(keys)


def test_handles_and_descriptors(store, lender):
    store.put("k", b"abc" * 1000)
    handle = store.get_buffer("k")
    assert (handle.size(), len(handle), bytes(handle)) == (3000, 3000, b"abc" * 1000)
    assert ctypes.string_at(handle.ptr(), 3) == b"abc"
    assert store.get_buffer("x") is None
    assert [h and h.size() for h in store.batch_get_buffer(["k", "x"])] == [3000, None]
    described = store.batch_get_replica_desc(["k", "x"])
    assert list(described) == ["k"]
    replica = described["k"][0]
    assert replica.is_memory_replica() and not replica.is_disk_replica()
    assert not replica.is_local_disk_replica() and replica.status.name == "COMPLETE"
    memory = replica.get_memory_descriptor().buffer_descriptor
    assert memory.size == 3000 and memory.transport_endpoint.startswith("127.0.0.1:")


def test_reading_sessions(store, buffer):
    store.put("k", bytes(range(100)))
    assert store.batch_get_session_start(["k", "x"]) == [0, -704]
    read = store.batch_get_into_multi_buffer_ranges(
        ["k", "x"], [[buffer.ptr, buffer.ptr + 50], [buffer.ptr]], [[5, 5], [1]], [[0, 90], [0]]
    )
    assert read == [10, -600]
    assert buffer.bytes[:5] == bytes(range(5)) and buffer.bytes[50:55] == bytes(range(90, 95))
    outside = store.batch_get_into_multi_buffer_ranges(["k"], [[buffer.ptr]], [[20]], [[90]])
    assert outside == [-600]
    assert store.batch_get_session_end(["k", "x"]) == 0
    got = store.get_into_ranges([buffer.ptr], [["k"]], [[[7, 9]]], [[[1, 98]]], [[[2, 2]]])
    assert got == [[[2, 2]]] and buffer.bytes[7:11] == bytes([1, 2, 98, 99])


def test_writing_sessions(store, buffer):
    data = os.urandom(1000)
    buffer.bytes[:1000] = data
    assert store.batch_put_session_start(["w", "v"], [1000, 10]) == [0, 0]
    assert store.is_exist("w") == 0, "not before its end"
    for offset in (500, 0):
        put = store.batch_put_from_multi_buffer_ranges(
            ["w"], [[buffer.ptr + offset]], [[500]], [[offset]]
        )
        assert put == [500]
    assert store.batch_put_session_revoke(["v"]) == [0]
    assert store.batch_put_session_end(["w", "v"]) == [0, -600]
    assert store.get("w") == data and store.is_exist("v") == 0


def test_config():
    config = ReplicateConfig()
    assert (config.replica_num, config.with_hard_pin, config.group_ids) == (1, False, None)
    assert config.soft_pin_action == SoftPinAction.PRESERVE and config.preferred_segments == []
    config.with_soft_pin = True
    assert config.soft_pin_action == SoftPinAction.ENABLE
    with pytest.raises(AttributeError):
        config.nonsense = 1
    assert "replica_num: 1" in str(config)


def test_groups_and_replicas(store):
    config = ReplicateConfig()
    config.replica_num, config.group_ids = 2, ["g", "g"]
    assert store.put_batch(["a", "b"], [b"1", b"2"], config) == 0, "best effort on one node"
    assert store.get("b") == b"2"


def test_before_setup_and_after_close(master):
    store = MooncakeDistributedStore()
    for _ in range(2):
        assert store.put("k", b"v") == -600 and store.get("k") == b""
        assert store.is_exist("k") == -600 and store.batch_is_exist(["a", "b"]) == [-600, -600]
        assert store.get_buffer("k") is None and store.get_size("k") == -600
        assert store.remove_all() == -600 and store.health_check() == 1
        assert store.batch_put_from(["k"], [1], [1]) == [-600]
        assert store.get_hostname() == "" and store.close() == 0
        code = store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master.address)
        assert code == 0 and store.health_check() == 0
        again = store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master.address)
        assert again == -600, "two setups"
        assert store.close() == 0


def test_setup_forms(master):
    dictionary = {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": master.address,
        "global_segment_size": "0",
        "protocol": "rdma",
    }
    store = MooncakeDistributedStore()
    assert store.setup(dictionary) == 0 and store.close() == 0
    assert store.setup({"local_hostname": "x"}) == -600
    with pytest.raises(TypeError, match="enable_nonsense"):
        store.setup("h", "m", 0, 0, "tcp", "", master.address, enable_nonsense=True)
    with pytest.raises(TypeError):
        store.setup()
    start = time.monotonic()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", "127.0.0.1:9") == -900
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", "no such host:1") < 0
    assert time.monotonic() - start < 10
    assert store.setup_dummy(1 << 20, 1 << 20, master.address) == 0 and store.close() == 0
    # As SGLang does it: the address is a node's.
    lender = joined(master.address, segment=1 << 20)
    assert store.setup_dummy(1 << 20, 1 << 20, lender.get_hostname()) == 0
    assert store.put("by-a-node", b"1") == 0 and store.remove("by-a-node", True) == 0
    assert store.close() == 0 and lender.close() == 0
    assert store.setup_dummy(1 << 20, 1 << 20, "127.0.0.1:9") == -900


def test_embedded_pool():
    store = joined("", segment=32 << 20)
    assert store.put("k", b"v") == 0 and store.get("k") == b"v"
    other = joined(store.get_master_address())
    assert other.get("k") == b"v", "other processes may join"
    extra = store.allocate_and_mount_segment(8 << 20)
    assert extra["ret"] == 0 and extra["allocated_size"] == 8 << 20
    assert store.unmount_segment(extra["segment_ids"]) == 0
    assert store.unmount_segment(["nobody"]) == -101


def test_a_file_is_lent(master, tmp_path):
    """Its memory takes objects, which other processes read; afterwards the file is the caller's again."""
    path = f"/dev/shm/mooncake-test-lent-{os.getpid()}"
    with open(path, "wb") as file:
        file.truncate(9 << 20)
    lending, reading = joined(master.address), joined(master.address)
    try:
        lent = lending.mount_segment(path, 8 << 20, offset=1 << 20)
        assert lent["ret"] == 0 and lent["allocated_size"] == 8 << 20 and len(lent["segment_ids"]) == 1
        config = ReplicateConfig()
        config.preferred_segment = lent["segment_ids"][0]
        value = os.urandom(1 << 20)
        assert reading.put("lent", value, config) == 0 and reading.put("small", b"small", config) == 0
        (replica,) = reading.get_replica_desc("lent")
        place = replica.get_memory_descriptor().buffer_descriptor
        assert place.transport_endpoint == lent["segment_ids"][0]
        assert reading.get("lent") == value == lending.get("lent") and lending.get("small") == b"small"
        with open(path, "rb") as file:
            assert value in file.read()
        assert lending.unmount_segment(lent["segment_ids"]) == 0
        for wrong in ((path, 8 << 20, 2 << 20), (path, 100), (path, 4096, 100), (path, 0), (path, 2**63, 4096), ("/dev/null", 4096)):
            refused = lending.mount_segment(*wrong)
            assert refused["ret"] == -600 and refused["segment_ids"] == [], wrong
        assert lending.mount_segment(str(tmp_path / "missing"), 4096)["ret"] == -1101
    finally:
        os.unlink(path)
    reading.remove_all(force=True)
    assert lending.close() == 0 and reading.close() == 0


def test_an_engine_is_shared(master, lender):
    """What is registered with the engine is known to the store, and the other way round."""
    from mooncake.engine import TransferEngine

    engine, peer = TransferEngine(), TransferEngine()
    store = MooncakeDistributedStore()
    arguments = ("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master.address)
    assert store.setup(*arguments, engine=engine) == -600, "not initialized"
    for each in (engine, peer):
        assert each.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    with pytest.raises(TypeError, match="TransferEngine"):
        store.setup(*arguments, engine=object())
    listening = listeners()
    assert store.setup(*arguments, engine=engine.get_engine()) == 0
    assert listeners() == listening, "no second listener"
    mine, theirs = ctypes.create_string_buffer(b"m" * 5000, 5000), ctypes.create_string_buffer(5000)
    base, target = ctypes.addressof(mine), ctypes.addressof(theirs)
    name = f"127.0.0.1:{engine.get_rpc_port()}"
    assert peer.transfer_sync_read(name, target, base, 5000) == -1, "not open yet"
    assert store.register_buffer(base, 5000) == 0 and engine.register_memory(base, 5000) == -7
    assert peer.transfer_sync_read(name, target, base, 5000) == 0 and theirs.raw == mine.raw
    assert store.unregister_buffer(base) == 0
    assert peer.transfer_sync_read(name, target, base, 5000) == -1, "closed again"
    assert engine.register_memory(base, 5000) == 0 and store.register_buffer(base + 100, 100) == 0
    assert store.put_from("shared", base, 5000) == 0 and store.get("shared") == mine.raw
    assert store.unregister_buffer(base + 100) == 0
    assert peer.transfer_sync_read(name, target, base, 5000) == 0, "it is the engine's own"
    store.remove("shared", force=True)
    assert store.register_buffer(target, 5000) == 0 and store.close() == 0
    assert peer.transfer_sync_read(f"127.0.0.1:{peer.get_rpc_port()}", base, target, 10) == -1
    assert engine.unregister_memory(base) == 0


@pytest.mark.parametrize("transport", ["any", "tcp"])
def test_an_engines_port_serves_the_pool_too(master, lender, monkeypatch, transport):
    """Memory lent by a store that shares an engine is served where peers reach the engine's: one port for both."""
    from mooncake.engine import TransferEngine

    monkeypatch.setenv("MOONCAKE_TRANSPORT", transport)
    engine, peer = TransferEngine(), TransferEngine()
    for each in (engine, peer):
        assert each.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    store = MooncakeDistributedStore()
    listening = listeners()
    arguments = ("127.0.0.1", "P2PHANDSHAKE", 8 << 20, 0, "tcp", "", master.address)
    assert store.setup(*arguments, engine=engine) == 0
    name = f"127.0.0.1:{engine.get_rpc_port()}"
    assert store.get_hostname() == name
    lent = [store.allocate_and_mount_segment(8 << 20) for _ in range(2)]
    ids = [name, *(each["segment_ids"][0] for each in lent)]
    assert len(set(ids)) == 3 and set(ids) <= set(store._segment_names())
    assert listeners() == listening, "no second listener"
    # From another process's point of view: by the network, or mapped, but not as one's own.
    code = """
import sys
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
master, *ids = sys.argv[1:]
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master) == 0
for n, id in enumerate(ids):
    config = ReplicateConfig()
    config.preferred_segment = id
    assert store.put(f"port{n}", bytes([n + 1]) * 700_000, config) == 0
    where = store.get_replica_desc(f"port{n}")[0].get_memory_descriptor().buffer_descriptor.transport_endpoint
    assert where == id, (where, id)
    assert store.get(f"port{n}") == bytes([n + 1]) * 700_000
assert store.close() == 0
"""
    done = subprocess.run([sys.executable, "-c", code, master.address, *ids], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # Peers read by address at the same port, and find the pool's memory not among what they may.
    mine, theirs = ctypes.create_string_buffer(b"m" * 5000, 5000), ctypes.create_string_buffer(5000)
    base, target = ctypes.addressof(mine), ctypes.addressof(theirs)
    assert engine.register_memory(base, 5000) == 0
    assert peer.transfer_sync_read(name, target, base, 5000) == 0 and theirs.raw == mine.raw
    assert peer.get_first_buffer_address(name) == base
    reading = joined(master.address)
    assert [reading.get(f"port{n}") for n in range(3)] == [bytes([n + 1]) * 700_000 for n in range(3)]
    # One goes, the others stay.
    assert store.unmount_segment([ids[1]]) == 0
    # What is mapped and leased may still be read; somebody who comes now finds nothing.
    assert reading.get("port1") in (b"", b"\x02" * 700_000) and reading.get("port2") == b"\x03" * 700_000
    later = joined(master.address)
    assert later.get_batch(["port0", "port1", "port2"]) == [b"\x01" * 700_000, b"", b"\x03" * 700_000]
    assert later.close() == 0
    assert peer.transfer_sync_read(name, target, base, 5000) == 0
    reading.remove_all(force=True)
    assert reading.close() == 0 and store.close() == 0
    assert listeners() == listening, "the engine's, as before"
    assert peer.transfer_sync_read(name, target, base, 5000) == 0
    assert engine.unregister_memory(base) == 0


def listeners():
    mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
    with open("/proc/self/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}
    assert other.close() == 0 and store.close() == 0


def test_wrong_types(store):
    for call in (
        lambda: store.put(1, b"v"),
        lambda: store.put("k", "text"),
        lambda: store.put("\ud800", b"v"),
        lambda: store.put_from("k", -1, 5),
        lambda: store.put_from("k", 1 << 70, 5),
        lambda: store.batch_is_exist("keys"),
        lambda: store.batch_is_exist([1]),
        lambda: store.batch_get_into(["k"], "x", [1]),
        lambda: store.put("k", b"v", config=3),
        lambda: store.put("k"),
        lambda: store.put("k", numpy.zeros((4, 4))[:, 1]),
    ):
        with pytest.raises(TypeError):
            call()


def test_wrong_addresses(store, buffer):
    store.put("k", b"value")
    assert store.put_from("w", 0, 5) == -600
    assert store.put_from("w", 0xDEAD0000, 5) == -600
    assert store.get_into("k", 0xDEAD0000, 5) == -600
    assert store.put_from("w", (1 << 64) - 1, 5) == -600
    assert store.put_from("w", buffer.ptr, 1 << 60) == -600, "huge"
    assert store.put_from("w", buffer.ptr + 3, 5) == 0, "misaligned is fine"
    end = buffer.ptr + buffer.size
    assert store.register_buffer(0, 5) == -600 and store.register_buffer(buffer.ptr, 0) == -600
    assert store.register_buffer(buffer.ptr, buffer.size) == -600, "twice"
    assert store.register_buffer(end - 8, 16) == -600, "overlap"
    assert store.unregister_buffer(12345) == -600
    readonly = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
    address = numpy.frombuffer(readonly, dtype=numpy.uint8).ctypes.data
    assert store.get_into("k", address, 5) == -600, "cannot be written"
    loose = Buffer(4096)
    assert store.get_into("k", loose.ptr, 5) == 5, "memory that is not registered, as upstream"


def test_bad_keys_and_values(store):
    assert store.put("", b"v") == -600 and store.put("k", b"") == -600
    assert store.put_parts("k") == 0 and store.is_exist("k") == 0, "nothing stored, as upstream"
    assert store.put("k" * 5000, b"v") == -400
    assert store.batch_is_exist(["", "x"])[1] == 0
    assert store.get("") == b"" and store.remove("") < 0
    assert store.put("big", bytes(300 << 20)) == -200, "larger than the pool"
    assert store.put(b"raw\xff", b"v") == 0 and store.get(b"raw\xff") == b"v"


def test_freed_buffer(store):
    freed = Buffer(1 << 20)
    assert store.register_buffer(freed.ptr, freed.size) == 0
    pointer = freed.ptr
    del freed
    assert store.unregister_buffer(pointer) == 0


def test_many_threads(store):
    failures = []

    def work(number):
        for i in range(100):
            key, value = f"t{number}-{i}", os.urandom(100 + i * 37)
            if store.put(key, value) != 0 or store.get(key) != value:
                failures.append(key)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_lock_is_released(master, lender):
    """A call that waits for a missing master leaves other threads running."""
    dying = Master()
    store = joined(dying.address)
    dying.kill()
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    assert store.batch_is_exist(["a"]) in ([-900], [-901])
    waited = time.monotonic() - start
    assert store.is_exist("a") in (-900, -901), "later callers do not wait anew"
    later = time.monotonic() - start - waited
    assert store.put("k", b"v") < 0 and store.get("k") == b""
    done.set()
    thread.join()
    store.close()
    assert waited < 8 and later < 1.5
    assert len(ticks) > 20 * waited


def test_fork(store):
    store.put("k", b"v")
    child = os.fork()
    if child == 0:
        good = store.is_exist("k") == -600 and store.get("k") == b"" and store.close() == 0
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.get("k") == b"v", "the parent's connections are unharmed"


def test_exit_without_close(master):
    import subprocess
    import sys

    code = f"""
from mooncake.store import MooncakeDistributedStore
s = MooncakeDistributedStore()
assert s.setup("127.0.0.1", "P2PHANDSHAKE", 16 << 20, 0, "tcp", "", {master.address!r}) == 0
assert s.put("exit", b"v") == 0
print(s.get_hostname())
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    watcher = joined(master.address)
    assert watcher.put("alive", b"v") in (0, -200)
    watcher.close()


def test_allocator_and_pool(store):
    allocator = MooncakeHostMemAllocator()
    address = allocator.alloc(100_000)
    assert address % 4096 == 0
    ctypes.memset(address, 1, 100_000)
    assert allocator.free(address) == 0 and allocator.free(address) == -600
    assert allocator.alloc(0) == 0 and allocator.alloc(1 << 62) == 0
    with BufferPool(store, max_bytes=256 << 10) as pool:
        with pool.acquire(1000) as lease:
            lease.buffer[:5] = b"hello"
            assert store.put_from("pooled", lease.ptr, 5) == 0
        first = pool.acquire(200 << 10)
        with pytest.raises(RuntimeError, match="timed out"):
            pool.acquire(100_000, timeout=0.05)
        with pytest.raises(RuntimeError, match="exhausted"):
            pool.acquire(100_000, block=False)
        with pytest.raises(RuntimeError, match="capacity"):
            pool.acquire(300 << 10)
        with pytest.raises(RuntimeError, match="active leases"):
            pool.close()
        view = first.buffer[10:20]
        with pytest.raises(RuntimeError, match="exported views"):
            first.release()
        view[:] = b"0123456789"
        assert bytes(first.buffer[10:20]) == b"0123456789"
        del view
        first.release()
        first.release()
        with pytest.raises(RuntimeError, match="closed"):
            first.buffer
        lost = pool.acquire(100_000)
        kept = lost.buffer
        del lost
        kept[:] = b"x" * 100_000
        del kept
        pool.acquire(100_000, block=False).release()
        empty = pool.acquire(0)
        assert empty.size == 0 and len(empty.buffer) == 0
        empty.release()
    with pytest.raises(RuntimeError, match="closed"):
        pool.acquire(1)
    with pytest.raises(RuntimeError, match="alignment"):
        BufferPool(store, alignment=12345)
    assert store.get("pooled") == b"hello"


def test_tenants(master, lender):
    one, two = joined(master.address, tenant_id="one"), joined(master.address, tenant_id="two")
    assert one.put("k", b"1") == 0 and two.is_exist("k") == 0 and two.put("k", b"2") == 0
    assert (one.get("k"), two.get("k")) == (b"1", b"2")
    assert one.remove_all(force=True) == 1 and two.get("k") == b"2"
    one.close(), two.close()


def finished(store, started):
    task_id, code = started
    assert code == 0
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        task, code = store.query_task(task_id)
        assert code == 0 and task.id == task_id
        if task.status in (TaskStatus.SUCCESS, TaskStatus.FAILED):
            return task
        time.sleep(0.01)
    raise AssertionError("the task did not end")


def places(store, key):
    found = store.get_replica_desc(key)
    return sorted(d.get_memory_descriptor().buffer_descriptor.transport_endpoint for d in found)


def test_copy_move_and_clear(master, lender):
    store, one, two = joined(master.address), joined(master.address, 8 << 20), joined(master.address, 8 << 20)
    first, second = one.get_hostname(), two.get_hostname()
    value = os.urandom(100_000)
    # One whose first replica is on neither of the two.
    for n in range(100):
        name = f"mobile-{n}"
        assert store.put(name, value) == 0
        [home] = places(store, name)
        if home not in (first, second):
            break
    task = finished(store, store.create_copy_task(name, [first]))
    assert task.status == TaskStatus.SUCCESS and task.type == TaskType.REPLICA_COPY, task
    assert places(store, name) == sorted({home, first}) and store.get(name) == value
    task = finished(store, store.create_move_task(name, first, second))
    assert task.status == TaskStatus.SUCCESS, task
    assert set(places(store, name)) == {home, second} and store.get(name) == value
    # A replica that is not there, a segment nobody has, a key that is missing, a task nobody began.
    assert store.create_move_task(name, "nowhere", first) == ((0, 0), -600)
    assert store.create_move_task(name, first, first) == ((0, 0), -600)
    assert store.create_copy_task(name, [first, "nowhere"]) == ((0, 0), -600)
    failed = finished(store, store.create_move_task(name, first, second))
    assert failed.status == TaskStatus.FAILED, "no replica there"
    assert store.create_copy_task("missing", [first]) == ((0, 0), -704)
    assert store.create_copy_task(name, []) == ((0, 0), -600)
    assert store.query_task((1, 2)) == (None, -1400)
    time.sleep(0.4)  # the leases of the checks above
    assert store.batch_replica_clear([name, "missing"], second) == [name]
    assert places(store, name) == [home]
    time.sleep(0.4)
    assert store.batch_replica_clear([name]) == [name] and store.is_exist(name) == 0
    for opened in (store, one, two):
        assert opened.close() == 0


def test_a_copy_never_undoes_what_came_in_between(master, lender):
    store, other = joined(master.address), joined(master.address, 8 << 20)
    wrong, stop = [], threading.Event()

    def mover():
        mover_store = joined(master.address)
        while not stop.is_set():
            mover_store._copy_replicas("contended", [other.get_hostname()])
        mover_store.close()

    moving = threading.Thread(target=mover)
    moving.start()
    for n in range(150):
        assert store.upsert("contended", b"%d" % n) == 0
        if store.get("contended") != b"%d" % n:
            wrong.append(n)
        if n % 10 == 0:
            assert store.remove("contended", True) == 0
            if store.is_exist("contended") != 0:
                wrong.append(-n)
    stop.set()
    moving.join()
    assert not wrong, wrong
    for opened in (store, other):
        opened.close()
