"""The Python module over RDMA, in the guest: a store that lends memory on rxe1 and one that has none on rxe0; then two
transfer engines. Every byte is compared; that packets went over the devices is read from the kernel's counters."""

import ctypes
import os
import subprocess
import sys

SIZES = [1, 100, 4096, 70_000, 1 << 20, 9_000_001]


def packets():
    total = 0
    for device in ("rxe0", "rxe1"):
        with open(f"/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts") as file:
            total += int(file.read())
    return total


def check(good, what):
    print(("ok: " if good else "FAILED: ") + what, flush=True)
    if not good:
        sys.exit(1)


def child(*arguments):
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def lend(master):
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 1 << 20, "rdma", "rxe1", master)
    print(code, flush=True)
    sys.stdin.readline()
    store.close()


def peer():
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    engine.initialize("127.0.0.1:0", "P2PHANDSHAKE", "rdma", "rxe1")
    memory = ctypes.create_string_buffer(bytes(n * 7 % 251 for n in range(4_000_000)), 4_000_000)
    engine.register_memory(ctypes.addressof(memory), 4_000_000)
    print(engine.get_rpc_port(), ctypes.addressof(memory), flush=True)
    sys.stdin.readline()
    print(all(byte == 9 for byte in memory.raw[:3_000_000]) and memory.raw[3_000_000] != 9, flush=True)


def store(master):
    from mooncake.store import MooncakeDistributedStore

    lender = child("lend", master)
    check(lender.stdout.readline().strip() == "0", "a store lends memory by RDMA")
    mine = MooncakeDistributedStore()
    check(mine.setup("127.0.0.1", "P2PHANDSHAKE", 0, 1 << 20, "rdma", "rxe0", master) == 0, "setup with protocol rdma")
    before = packets()
    for size in SIZES:
        data = os.urandom(size)
        check(mine.put(f"plain-{size}", data) == 0 and mine.get(f"plain-{size}") == data, f"put and get of {size} bytes")
    buffer = ctypes.create_string_buffer(16 << 20)
    address = ctypes.addressof(buffer)
    check(mine.register_buffer(address, 16 << 20) == 0, "register_buffer")
    for size in SIZES:
        data = os.urandom(size)
        ctypes.memmove(address, data, size)
        put = mine.put_from(f"from-{size}", address, size)
        ctypes.memset(address, 0, 16 << 20)
        got = mine.get_into(f"from-{size}", address, 16 << 20)
        check(put == 0 and got == size and buffer.raw[:size] == data, f"put_from and get_into of {size} bytes")
    check(mine.unregister_buffer(address) == 0, "unregister_buffer")
    check(packets() - before > 4 * sum(SIZES) // 4096, f"the devices sent {packets() - before} packets")
    mine.close()
    lender.communicate("\n", timeout=30)


def engine():
    from mooncake.engine import TransferEngine

    other = child("peer")
    port, there = other.stdout.readline().split()
    mine = TransferEngine()
    check(mine.initialize("127.0.0.1:0", "P2PHANDSHAKE", "rdma", "rxe0") == 0, "initialize with protocol rdma")
    buffer = ctypes.create_string_buffer(3_000_000)
    address = ctypes.addressof(buffer)
    mine.register_memory(address, 3_000_000)
    before = packets()
    name = f"127.0.0.1:{port}"
    code = mine.transfer_sync_read(name, address, int(there) + 1, 3_000_000)
    good = code == 0 and buffer.raw == bytes(n * 7 % 251 for n in range(1, 3_000_001))
    check(good, f"transfer_sync_read ({code})")
    ctypes.memset(address, 9, 3_000_000)
    check(mine.transfer_sync_write(name, address, int(there), 3_000_000) == 0, "transfer_sync_write")
    out, _ = other.communicate("\n", timeout=30)
    check(out.strip() == "True", "the peer has the bytes, and no other")
    check(packets() - before > 6_000_000 // 4096, f"the devices sent {packets() - before} packets")
    print(mine.get_local_topology(), flush=True)


if __name__ == "__main__":
    what = sys.argv[1]
    {"lend": lend, "peer": peer, "store": store, "engine": engine}[what](*sys.argv[2:])
