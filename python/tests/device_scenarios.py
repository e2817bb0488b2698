"""What test_device.py runs in processes that find the stand-in driver: `device_scenarios.py MASTER SCENARIO`."""

import ctypes
import hashlib
import os
import sys
import threading

from mooncake.engine import TransferEngine
from mooncake.store import MooncakeDistributedStore

MASTER, SCENARIO = sys.argv[1], sys.argv[2]
MIB = 1 << 20
DOWN, UP, WAITS, PINNED, STREAMS, NO_CONTEXT, PUSHED, BYTES = range(8)


class Gpu:
    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.standin_alloc.restype = ctypes.c_ulonglong
        self.library.standin_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int]
        self.library.standin_write.argtypes = [ctypes.c_ulonglong, ctypes.c_char_p, ctypes.c_size_t]
        self.library.standin_read.argtypes = [ctypes.c_char_p, ctypes.c_ulonglong, ctypes.c_size_t]
        self.library.standin_count.restype = ctypes.c_ulonglong

    def alloc(self, size, device=0):
        address = self.library.standin_alloc(size, device)
        assert address
        return address

    def write(self, address, data):
        assert self.library.standin_write(address, data, len(data)) == 0

    def read(self, address, size):
        out = ctypes.create_string_buffer(size)
        assert self.library.standin_read(out, address, size) == 0
        return out.raw

    def count(self, which):
        return self.library.standin_count(which)


def pattern(size, seed):
    block = hashlib.sha256(f"{SCENARIO}{os.getpid()}{seed}".encode()).digest()
    return (block * (size // 32 + 1))[:size]


def opened():
    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, MIB, "tcp", "", MASTER) == 0
    return store


def key(n):
    return f"device-{SCENARIO}-{os.getpid()}-{n}"


def tidy(gpu):
    assert gpu.count(NO_CONTEXT) == 0, "the driver was called without its context"
    assert gpu.count(PUSHED) == 0, "a context was left current"


def round_trip():
    gpu, store = Gpu(), opened()
    source, target = gpu.alloc(4 * MIB), gpu.alloc(4 * MIB)
    data = pattern(3 * MIB + 17, 1)
    gpu.write(source, data)
    assert store.register_buffer(source, 4 * MIB) == 0 and store.register_buffer(target, 4 * MIB) == 0
    assert store.register_buffer(source + 8, 16) == -600
    assert store.put_from(key(1), source, len(data)) == 0
    assert store.get(key(1)) == data
    assert store.get_into(key(1), target, 4 * MIB) == len(data)
    assert gpu.read(target, len(data)) == data
    assert gpu.read(target + len(data), 100) == bytes(100), "not beyond the object"
    # Metadata of the host before a payload of the device, read back into both.
    header = ctypes.create_string_buffer(b"head", 4)
    assert store.put_from_with_metadata(key(2), source, ctypes.addressof(header), 1000, 4) == 0
    assert store.get(key(2)) == b"head" + data[:1000]
    back = ctypes.create_string_buffer(4)
    read = store.batch_get_into_multi_buffers([key(2)], [[ctypes.addressof(back), target]], [[4, 1000]])
    assert read == [1004] and back.raw == b"head" and gpu.read(target, 1000) == data[:1000]
    # Not registered, beyond the allocation, upserts.
    other = gpu.alloc(MIB)
    gpu.write(other, b"x" * 100)
    assert store.upsert_from(key(1), other, 100) == 0 and store.get(key(1)) == b"x" * 100
    assert store.put_from(key(3), other + MIB - 10, 11) == -600
    assert store.get_into(key(1), other + MIB - 10, 100) == -600
    assert store.unregister_buffer(source) == 0
    # Memory of a driver's pool has no context of its own.
    gpu.library.standin_without_context(1)
    gpu.write(source, b"pool" * 10)
    assert store.put_from(key(4), source, 40) == 0 and store.get(key(4)) == b"pool" * 10
    assert store.close() == 0
    tidy(gpu)


def many_windows():
    gpu, store = Gpu(), opened()
    blocks, parts, part = 40, 16, 128 << 10
    source, target = gpu.alloc(blocks * parts * part), gpu.alloc(blocks * parts * part)
    assert store.register_buffer(source, blocks * parts * part) == 0
    assert store.register_buffer(target, blocks * parts * part) == 0
    whole = [pattern(parts * part, n) for n in range(blocks)]
    for n in range(blocks):
        gpu.write(source + n * parts * part, whole[n])
    keys = [key(n) for n in range(blocks)]
    places = lambda base: [[base + (n * parts + p) * part for p in range(parts)] for n in range(blocks)]
    sizes = [[part] * parts for _ in range(blocks)]
    pinned = gpu.count(PINNED)
    assert store.batch_put_from_multi_buffers(keys, places(source), sizes) == [0] * blocks
    assert gpu.count(DOWN) == blocks * parts, "each part once"
    assert gpu.count(PINNED) - pinned <= 2, "two staging buffers, however many windows"
    keys[7] = key("missing")
    read = store.batch_get_into_multi_buffers(keys, places(target), sizes)
    assert read[7] == -704 and all(n == parts * part for i, n in enumerate(read) if i != 7), read
    for n in range(blocks):
        got = gpu.read(target + n * parts * part, parts * part)
        assert got == (bytes(parts * part) if n == 7 else whole[n]), n
    assert store.close() == 0
    tidy(gpu)


def larger_than_a_window():
    gpu, store = Gpu(), opened()
    size = 48 * MIB
    source, target = gpu.alloc(size), gpu.alloc(size)
    data = pattern(size, 1)
    gpu.write(source, data)
    assert store.put_from(key(1), source, size) == 0
    assert store.get_into(key(1), target, size) == size and gpu.read(target, size) == data
    assert store.close() == 0
    tidy(gpu)


def sessions():
    gpu, store = Gpu(), opened()
    memory = gpu.alloc(MIB)
    data = pattern(3000, 1)
    gpu.write(memory, data)
    assert store.batch_put_session_start([key(1)], [3000]) == [0]
    for layer in range(3):
        at = layer * 1000
        assert store.batch_put_from_multi_buffer_ranges([key(1)], [[memory + at]], [[1000]], [[at]]) == [1000]
    assert store.batch_put_session_end([key(1)]) == [0]
    assert store.get(key(1)) == data
    assert store.batch_get_session_start([key(1)]) == [0]
    into = memory + 512 * 1024
    assert store.batch_get_into_multi_buffer_ranges([key(1)], [[into, into + 5000]], [[500, 10]], [[2000, 7]]) == [510]
    assert gpu.read(into, 500) == data[2000:2500] and gpu.read(into + 5000, 10) == data[7:17]
    assert store.batch_get_session_end([key(1)]) == 0
    read = store.get_into_ranges([into], [[key(1)]], [[[100, 300]]], [[[0, 50]]], [[[10, 20]]])
    assert read == [[[10, 20]]]
    assert gpu.read(into + 100, 10) == data[:10] and gpu.read(into + 300, 20) == data[50:70]
    assert gpu.read(into, 100) == data[2000:2100], "what lies between stays"
    assert store.close() == 0
    tidy(gpu)


def two_devices():
    gpu, store = Gpu(), opened()
    first, second = gpu.alloc(MIB, 0), gpu.alloc(MIB, 1)
    gpu.write(first, b"a" * 1000)
    gpu.write(second, b"b" * 1000)
    assert store.batch_put_from([key(1), key(2)], [first, second], [1000, 1000]) == [0, 0]
    assert store.get_batch([key(1), key(2)]) == [b"a" * 1000, b"b" * 1000]
    assert store.put_from(key(3), second, 1000) == 0 and store.get(key(3)) == b"b" * 1000
    assert store.batch_get_into([key(1), key(2)], [second, first], [1000, 1000]) == [1000, 1000]
    assert gpu.read(first, 1000) == b"b" * 1000 and gpu.read(second, 1000) == b"a" * 1000
    # One object of both, with the host in between, put and got.
    host = ctypes.create_string_buffer(b"host", 4)
    parts, sizes = [second, ctypes.addressof(host), first], [1000, 4, 1000]
    assert store.batch_put_from_multi_buffers([key(4)], [parts], [sizes]) == [0]
    assert store.get(key(4)) == b"a" * 1000 + b"host" + b"b" * 1000
    parts = [first + 2000, ctypes.addressof(host), second + 2000]
    assert store.batch_get_into_multi_buffers([key(4)], [parts], [sizes]) == [2004]
    assert gpu.read(first + 2000, 1000) == b"a" * 1000 and gpu.read(second + 2000, 1000) == b"b" * 1000
    assert store.close() == 0
    tidy(gpu)


def failures():
    gpu, store = Gpu(), opened()
    memory = gpu.alloc(MIB)
    gpu.write(memory, b"c" * 1000)
    assert store.put_from(key(1), memory, 1000) == 0
    gpu.library.standin_fail_after(0)
    assert store.put_from(key(2), memory, 1000) == -800
    assert store.is_exist(key(2)) == 0, "nothing was stored"
    assert store.get_into(key(1), memory, 1000) == -800
    assert store.get(key(1)) == b"c" * 1000, "the host is not concerned"
    gpu.library.standin_fail_after(-1)
    assert store.put_from(key(2), memory, 1000) == 0
    assert store.get_into(key(1), memory, 1000) == 1000
    assert store.close() == 0
    tidy(gpu)


def threads():
    gpu, store = Gpu(), opened()
    store.remove_all(force=True)
    wrong = []

    def work(n):
        memory = gpu.alloc(2 * MIB)
        for turn in range(5):
            data = pattern(MIB, (n, turn))
            gpu.write(memory, data)
            ok = store.put_from(key((n, turn)), memory, MIB) == 0
            ok = ok and store.get_into(key((n, turn)), memory + MIB, MIB) == MIB
            if not ok or gpu.read(memory + MIB, MIB) != data:
                wrong.append((n, turn))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong
    assert gpu.count(STREAMS) <= 16, "at most eight lanes of two streams each"
    assert store.close() == 0
    tidy(gpu)


def no_driver():
    store = opened()
    assert store.put_from(key(1), 0x7000_0000_0000, 100) == -600
    assert store.register_buffer(0x7000_0000_0000, 100) == -600
    assert store.put(key(1), b"host") == 0 and store.get(key(1)) == b"host"
    assert store.close() == 0


def engines():
    pair = [TransferEngine(), TransferEngine()]
    for engine in pair:
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    return pair, f"127.0.0.1:{pair[1].get_rpc_port()}"


def engine():
    gpu = Gpu()
    (here, there), peer = engines()
    size = 40 * MIB
    source, target = gpu.alloc(size), gpu.alloc(size)
    data = pattern(size, 1)
    gpu.write(source, data)
    assert there.register_memory(target, size) == 0
    assert there.register_memory(target + 10, 10) == -7
    assert here.transfer_sync_write(peer, source, target, size) == 0
    assert gpu.read(target, size) == data
    # A device there, the host here; and pieces.
    host = ctypes.create_string_buffer(1000)
    assert here.transfer_sync_read(peer, ctypes.addressof(host), target + 500, 1000) == 0
    assert host.raw == data[500:1500]
    gpu.write(source, bytes(3000))
    code = here.batch_transfer_sync_read(peer, [source, source + 2000], [target, target + 100], [1000, 1000])
    assert code == 0 and gpu.read(source, 1000) == data[:1000] and gpu.read(source + 2000, 1000) == data[100:1100]
    batch = here.batch_transfer_async_write(peer, [source + 2000], [target], [1000])
    assert batch and here.get_batch_transfer_status([batch]) == 0
    assert gpu.read(target, 1000) == data[100:1100]
    assert here.transfer_sync_write(peer, source + size - 5, target, 10) == -1, "beyond the allocation"
    assert here.transfer_sync_write(peer, source, target + size - 5, 10) == -1, "beyond what is registered"
    assert here.write_bytes_to_buffer(source, b"hello", 5) == 0 and gpu.read(source, 5) == b"hello"
    assert here.read_bytes_from_buffer(source, 5) == b"hello"
    gpu.library.standin_fail_after(0)
    assert here.transfer_sync_write(peer, source, target, 10) == -1
    gpu.library.standin_fail_after(-1)
    assert there.unregister_memory(target) == 0
    tidy(gpu)


def engine_on_cuda():
    gpu = Gpu()
    (here, there), peer = engines()
    source, target = gpu.alloc(MIB), gpu.alloc(MIB)
    gpu.write(source, b"stream" * 10)
    assert there.register_memory(target, MIB) == 0
    waits = gpu.count(WAITS)
    assert here.transfer_write_on_cuda(peer, source, target, 60) == 0
    assert gpu.count(WAITS) > waits and gpu.read(target, 60) == b"stream" * 10
    assert here.batch_transfer_read_on_cuda(peer, [source + 100], [target], [60], stream_ptr=0) == 0
    assert gpu.read(source + 100, 60) == b"stream" * 10
    # Memory of the host works, too, alone and with a device's.
    host = ctypes.create_string_buffer(60)
    assert here.transfer_read_on_cuda(peer, ctypes.addressof(host), target, 60) == 0
    assert host.raw == b"stream" * 10
    code = here.batch_transfer_read_on_cuda(peer, [ctypes.addressof(host), source], [target + 6, target], [54, 6])
    assert code == 0 and host.raw == b"stream" * 10
    tidy(gpu)


globals()[SCENARIO]()
print("done")
