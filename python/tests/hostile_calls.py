"""Run by test_hostile.py: calls every public method with what it does not expect. Ends with "done N calls", or with the
signal, the panic or the call that took too long."""

import collections.abc
import ctypes
import faulthandler
import inspect
import logging
import mmap
import os
import random
import signal
import sys
import time

import mooncake.engine
import mooncake.store
from mooncake.store import MooncakeDistributedStore

KIND, MASTER, STATE, MASTER_PID, SECONDS = sys.argv[1:6]
SECONDS = float(SECONDS)
logging.disable(logging.CRITICAL)
rng = random.Random(7)


def page():
    """A page between two that cannot be touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    base = libc.mmap(None, 3 * mmap.PAGESIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(base + mmap.PAGESIZE, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    return base + mmap.PAGESIZE


PAGE = page()
SCALARS = [
    None, -1, 0, 1, 3, 2**31, 2**63, 2**64 - 1, 2**64, 2**70, True, 1.5, float("nan"), "", "k", "k" * 5000, "\ud800", "a\0b",
    b"", b"\xff\xfe", b"k", bytearray(10), memoryview(bytes(20))[::2], object(), {}, {"a": 1}, (), PAGE, PAGE + 1,
    PAGE + mmap.PAGESIZE, PAGE - 1, id(rng) | 1, 0xFFFF_8000_0000_0000, mmap.PAGESIZE, lambda: 1, "127.0.0.1:1", "P2PHANDSHAKE",
]  # fmt: skip


class Liar(collections.abc.Sequence):
    """A sequence that lies about itself."""

    def __len__(self):
        return 2**40

    def __getitem__(self, at):
        if at > 3:
            raise IndexError
        return "k"


class Breaking:
    def __iter__(self):
        raise RuntimeError("no")

    def __index__(self):
        raise RuntimeError("no")

    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__


def value(depth=0):
    kind = rng.random()
    if depth < 3 and kind < 0.45:
        return [value(depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.5:
        return rng.choice([Liar(), Breaking(), ["k"] * 3, [PAGE] * 3, [8] * 3, [["k"]], [[PAGE]], [[8]]])
    return rng.choice(SCALARS)


def likely(name):
    """What has the right type, mostly: so that calls get beyond their arguments."""
    if "key" in name:
        return ["k", "no"] if name.endswith("s") else "k"
    if name.startswith("all_"):
        return [[rng.choice([8, 0, 2**63, PAGE])], [PAGE]]
    if "addr" in name or "ptr" in name or "buffer" in name:
        one = rng.choice([PAGE, PAGE + 4000, 0, 1, 2**64 - 8])
        return [one, PAGE] if name.endswith("s") else one
    if "size" in name or "len" in name or "capacit" in name:
        one = rng.choice([8, 0, 4096, 5000, 2**63 - 1, 2**64 - 1])
        return [one, 8] if name.endswith("s") else one
    return value()


def parameters(method):
    try:
        return [p for p in inspect.signature(method).parameters.values() if p.kind != p.VAR_KEYWORD]
    except (TypeError, ValueError):
        return []


def arguments(method):
    yield (), {}
    expected = parameters(method)
    count = len(expected) or 2
    for scalar in SCALARS:
        yield (scalar,) * count, {}
    for _ in range(int(60)):
        yield tuple(value() for _ in range(rng.randrange(count + 2))), {}
        yield tuple(likely(p.name) for p in expected), {}
    yield (), {p.name: value() for p in expected}
    yield (), {"nonsense": 1}


def setup():
    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 16 << 20, 0, "tcp", "", MASTER) == 0
    store.put("k", b"v" * 100)
    return store


def subject():
    if KIND == "engine":
        engine = mooncake.engine.TransferEngine()
        if STATE != "before":
            assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        return engine
    if KIND == "others":
        return None
    if STATE == "before":
        return MooncakeDistributedStore()
    store = setup()
    if STATE == "after":
        store.close()
    return store


def calls():
    what = subject()
    if KIND == "others":
        for module in (mooncake.store, mooncake.engine):
            for name in sorted(set(module.__all__)):
                made = getattr(module, name)
                if callable(made):
                    yield name, made, arguments(made)
        for made in (mooncake.store.ReplicateConfig(), mooncake.store.MooncakeHostMemAllocator()):
            for name in dir(type(made)):
                if not name.startswith("_"):
                    if callable(getattr(made, name)):
                        yield name, getattr(made, name), arguments(getattr(made, name))
                    else:
                        yield name, lambda v, made=made, name=name: setattr(made, name, v), [((s,), {}) for s in SCALARS]
        return
    for name in dir(what):
        # These end or begin what the others need; they are called at the end.
        if name.startswith("_") or name in ("close", "tearDownAll", "setup", "init_all", "setup_dummy", "initialize"):
            continue
        method = getattr(what, name)
        if STATE == "dying":
            yield name, method, [(tuple(likely(p.name) for p in parameters(method)), {})]
        else:
            yield name, method, arguments(method)
    for name in ("setup", "init_all", "setup_dummy", "initialize", "close", "tearDownAll", "setup"):
        if hasattr(what, name) and STATE != "dying":
            yield name, getattr(what, name), list(arguments(getattr(what, name)))[::4]
    if STATE == "dying":
        yield "close", what.close, [((), {})]


if STATE == "dying":
    generator = calls()
    first = next(generator)
    os.kill(int(MASTER_PID), signal.SIGKILL)
    work = [first, *generator]
else:
    work = calls()
count = 0
for name, method, each in work:
    spent = time.monotonic()
    for given, named in each:
        # The call that hangs shows itself.
        faulthandler.dump_traceback_later(30, exit=True)
        start = time.monotonic()
        try:
            method(*given, **named)
        except Exception:
            pass  # Anything of Python's own; a panic is none of these.
        took = time.monotonic() - start
        assert took < 15, (name, took)
        count += 1
        if time.monotonic() - spent > SECONDS:
            break
faulthandler.cancel_dump_traceback_later()
print(f"done {count} calls", flush=True)
