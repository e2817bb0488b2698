"""The asyncio store: native threads carry operations out, one eventfd per loop brings the answers."""

import asyncio
import ctypes
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
from conftest import Master, joined

from mooncake.async_store import _NATIVE, MooncakeDistributedStoreAsync
from mooncake.store import MooncakeDistributedStore

uvloop = pytest.importorskip("uvloop")
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def opened(master, **how):
    store = MooncakeDistributedStoreAsync(**how)
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master) == 0
    return store


def run(coroutine, loop="asyncio"):
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture(params=["shm", "tcp"])
def store(request, master, lender, monkeypatch):
    monkeypatch.setenv("MOONCAKE_TRANSPORT", request.param)
    store = opened(master.address)
    yield store
    store.remove_all(force=True)
    assert store.close() == 0


def test_every_method_has_its_twin():
    for name in dir(MooncakeDistributedStore):
        if not name.startswith("_") and callable(getattr(MooncakeDistributedStore, name)):
            assert inspect.iscoroutinefunction(getattr(MooncakeDistributedStoreAsync, "async_" + name)), name
    assert all(hasattr(MooncakeDistributedStore, name) for name in _NATIVE)


@pytest.mark.parametrize("loop", LOOPS)
def test_answers_are_those_of_the_calls(store, loop):
    memory = ctypes.create_string_buffer(2000)
    base = ctypes.addressof(memory)

    async def work():
        assert await store.async_put("a", b"1" * 1000) == 0
        assert await store.async_put_parts("b", b"2" * 500, bytearray(b"3" * 500)) == 0
        assert await store.async_put_batch(["c", "d"], [b"c", b"d" * 100_000]) == 0
        assert await store.async_get("a") == b"1" * 1000
        assert await store.async_get("b") == b"2" * 500 + b"3" * 500
        assert await store.async_get("missing") == b""
        assert await store.async_get_batch(["c", "no", "d"]) == [b"c", b"", b"d" * 100_000]
        assert bytes(await store.async_get_buffer("d")) == b"d" * 100_000
        assert await store.async_get_buffer("no") is None
        assert await store.async_register_buffer(base, 2000) == 0
        assert await store.async_get_into("a", base, 2000) == 1000 and memory.raw[:1000] == b"1" * 1000
        assert await store.async_batch_get_into(["a", "no"], [base, base + 1000], [1000, 1000]) == [1000, -704]
        assert await store.async_batch_put_from(["e", "a"], [base, base], [10, 10]) == [0, 0]
        assert await store.async_batch_get_into_multi_buffers(["a"], [[base, base + 600]], [[600, 400]]) == [1000]
        assert await store.async_batch_is_exist(["a", "no"]) == [1, 0] and await store.async_is_exist("e") == 1
        assert await store.async_get_size("d") == 100_000
        assert await store.async_get_into_ranges([base], [["a"]], [[[0]]], [[[10]]], [[[5]]]) == [[[5]]]
        assert await store.async_batch_put_session_start(["s"], [20]) == [0]
        assert await store.async_batch_put_from_multi_buffer_ranges(["s"], [[base]], [[20]], [[0]]) == [20]
        assert await store.async_batch_put_session_end(["s"]) == [0]
        assert await store.async_batch_get_session_start(["s"]) == [0]
        assert await store.async_batch_get_into_multi_buffer_ranges(["s"], [[base]], [[20]], [[0]]) == [20]
        assert await store.async_batch_get_session_end(["s"]) == 0
        assert [d.is_memory_replica() for d in await store.async_get_replica_desc("a")] == [True]
        assert set(await store.async_batch_get_replica_desc(["a", "no"])) == {"a"}
        assert await store.async_upsert("a", b"new") == 0
        assert await store.async_get("a") == b"new", "not the one of before"
        assert await store.async_remove("e", force=True) == 0 and await store.async_get("e") == b""
        assert await store.async_health_check() == 0
        assert await store.async_unregister_buffer(base) == 0
        with pytest.raises(TypeError):
            await store.async_put(1, b"v")
        with pytest.raises(AttributeError):
            store.async_nonsense
        assert await store.async_remove_all(force=True) >= 4

    run(work(), loop)


def test_many_at_once_are_bounded_and_do_not_starve(master, lender):
    store = opened(master.address, max_workers=2, max_in_flight=4)

    async def work():
        async def one(n):
            assert await store.async_put(f"m{n}", str(n).encode()) == 0
            assert len(store._here()[0].waiting) <= 4
            return await store.async_get(f"m{n}")

        tasks = [asyncio.create_task(one(n)) for n in range(200)]
        await asyncio.sleep(0.005)
        for task in tasks[::7]:
            task.cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        for n, value in enumerate(got):
            assert value == str(n).encode() or (n % 7 == 0 and isinstance(value, asyncio.CancelledError))
        await store.async_settle()
        assert not store._here()[0].waiting
        names = [t.name for t in threading.enumerate()]
        assert not any("mooncake" in name for name in names), "no threads of Python's"

    run(work())
    store.remove_all(force=True)
    assert store.close() == 0


def test_small_operations_that_wait_together_get_their_own_answers(store):
    """Hundreds at once are joined into batches: each still has its own keys, sizes and codes."""
    memory = ctypes.create_string_buffer(200 * 100)
    base = ctypes.addressof(memory)

    async def work():
        sizes = {f"j{n}": (n * 37) % 9000 + 1 for n in range(300)}
        sizes["j7"], sizes["j150"] = 600_000, 70_000  # Not small, among the others.
        values = {key: (key * size)[:size].encode() for key, size in sizes.items()}
        puts = [store.async_put(key, value) for key, value in values.items()]
        puts += [store.async_put("same", f"same{n}".encode()) for n in range(100)]
        puts += [store.async_put("", b"no key"), store.async_put("none", b""), store.async_put("k" * 5000, b"long")]
        codes = await asyncio.gather(*puts)
        assert codes[:400] == [0] * 400, "an existing key is no error"
        assert codes[400:402] == [-600, -600] and codes[402] < 0
        gets = [store.async_get(key) for key in values]
        gets += [store.async_get_batch([key, f"missing-{key}", "j7"]) for key in values]
        gets += [store.async_is_exist(key) for key in values]
        gets += [store.async_batch_is_exist([key, f"missing-{key}"]) for key in values]
        got = await asyncio.gather(*gets)
        count = len(values)
        assert got[:count] == list(values.values())
        assert got[count : 2 * count] == [[value, b"", values["j7"]] for value in values.values()]
        assert got[2 * count : 3 * count] == [1] * count
        assert got[3 * count :] == [[1, 0]] * count
        assert (await store.async_get("same")).startswith(b"same")
        into = [store.async_get_into(f"j{n}", base + n * 100, 100) for n in range(200)]
        into += [store.async_batch_get_into_multi_buffers([f"j{n}"], [[base + n * 100]], [[100]]) for n in range(200)]
        into += [store.async_get_into("missing", base, 100), store.async_get_into("j1", 8, 10)]
        read = await asyncio.gather(*into)
        for n in range(200):
            size = sizes[f"j{n}"]
            assert read[n] == (size if size <= 100 else -600), (n, size)
            assert read[200 + n] == [100 if size == 100 else -800 if size < 100 else -600], (n, size)
            if size <= 100:
                assert memory.raw[n * 100 : n * 100 + size] == values[f"j{n}"]
        assert read[400:] == [-704, -600]

    run(work())


def test_small_operations_share_round_trips(master, lender, monkeypatch):
    """Many at once take far less time than one after the other: over TCP each of those waits for an answer."""
    monkeypatch.setenv("MOONCAKE_TRANSPORT", "tcp")
    store = opened(master.address)

    async def work():
        keys = [f"trip{n}" for n in range(400)]
        for kind in (lambda k: store.async_put(k, k.encode()), store.async_get, lambda k: store.async_is_exist(k + "-no")):
            began = time.perf_counter()
            for key in keys[:100]:
                await kind(key)
            alone = (time.perf_counter() - began) / 100
            began = time.perf_counter()
            await asyncio.gather(*(kind(key) for key in keys[100:]))
            together = (time.perf_counter() - began) / 300
            assert together < alone / 2, (alone, together)
        await store.async_remove_all(force=True)

    run(work())
    assert store.close() == 0


def test_small_operations_do_not_wait_behind_large_ones(master, lender, monkeypatch):
    monkeypatch.setenv("MOONCAKE_TRANSPORT", "tcp")
    store = opened(master.address, max_workers=4)

    async def work():
        assert await store.async_put("heavy", os.urandom(48 << 20)) == 0
        assert await store.async_put("light", b"l" * 1000) == 0
        began = time.perf_counter()
        heavy = [asyncio.create_task(store.async_get("heavy")) for _ in range(16)]
        await asyncio.sleep(0)
        latencies = []
        while not all(task.done() for task in heavy):
            before = time.perf_counter()
            assert await store.async_get("light") == b"l" * 1000
            latencies.append(time.perf_counter() - before)
        took = time.perf_counter() - began
        assert all(len(task.result()) == 48 << 20 for task in heavy)
        # As many rounds of four as there are, and a small one in each of them would be four.
        assert len(latencies) > 16 and sorted(latencies)[len(latencies) // 2] < took / 16, (latencies, took)
        await store.async_remove_all(force=True)

    run(work())
    assert store.close() == 0


def test_the_loop_is_not_held_up(store):
    """A large get is carried out elsewhere, without the interpreter lock."""

    async def work():
        assert await store.async_put("large", os.urandom(64 << 20)) == 0
        worst, done = 0.0, False

        async def ticker():
            nonlocal worst
            while not done:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                worst = max(worst, time.perf_counter() - before)

        ticking = asyncio.create_task(ticker())
        for _ in range(3):
            assert len(await store.async_get("large")) == 64 << 20
        done = True
        await ticking
        return worst

    assert run(work()) < 0.2


def test_a_cancelled_call_goes_on_and_keeps_its_value(store):
    async def work():
        value = bytearray(os.urandom(8 << 20))
        kept = weakref.ref(task := asyncio.create_task(store.async_put("cancelled", value)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(BufferError):
            value.clear()  # Exported until the put has ended.
        await store.async_settle()
        expected = bytes(value)
        value.clear()
        assert await store.async_get("cancelled") == expected
        assert kept

    run(work())


def test_several_loops_in_several_threads(store):
    wrong = []

    def work(name, loop):
        async def turns():
            for turn in range(30):
                key = f"{name}{turn}"
                put = await asyncio.gather(*(store.async_put(f"{key}-{i}", f"{key}-{i}".encode()) for i in range(8)))
                got = await asyncio.gather(*(store.async_get(f"{key}-{i}") for i in range(8)))
                if any(put) or got != [f"{key}-{i}".encode() for i in range(8)]:
                    wrong.append((key, put, got))

        run(turns(), loop)

    threads = [threading.Thread(target=work, args=(f"l{i}", kind)) for i in range(3) for kind in LOOPS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_loop_that_closes_with_calls_under_way(store):
    for kind in LOOPS.values():
        loop = kind()

        async def begin():
            for n in range(50):
                asyncio.ensure_future(store.async_put(f"closing{n}", b"x" * 100_000))
            await asyncio.sleep(0)

        loop.run_until_complete(begin())
        loop.close()
        gone = weakref.ref(loop)
        del loop
        # Another loop is not concerned.
        run(store.async_put("other", b"y"))
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert gone() is None, "the store keeps no loop alive"


def test_close_with_calls_under_way(master, lender):
    store = opened(master.address, max_workers=2)

    async def work():
        tasks = [asyncio.create_task(store.async_put(f"close{n}", b"x" * 200_000)) for n in range(100)]
        await asyncio.sleep(0.002)
        began = time.monotonic()
        assert await store.async_close() == 0
        assert time.monotonic() - began < 12
        codes = await asyncio.gather(*tasks)
        assert set(codes) <= {0, -600} and -600 in codes
        assert await store.async_get("close0") == b"" and await store.async_put("k", b"v") == -600
        # And it can be set up again.
        assert await store.async_setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master.address) == 0
        assert await store.async_put("again", b"v") == 0 and await store.async_get("again") == b"v"
        await store.async_remove_all(force=True)
        assert await store.async_tearDownAll() == 0

    run(work())


def test_a_master_that_goes_is_an_answer_in_time(lender):
    master = Master()
    pool = joined(master.address, 32 << 20)
    store = opened(master.address)

    async def work():
        assert await store.async_put("k", b"v") == 0
        os.kill(master.process.pid, signal.SIGSTOP)
        while open(f"/proc/{master.process.pid}/stat").read().rsplit(")", 1)[1].split()[0] != "T":
            await asyncio.sleep(0.01)
        began = time.monotonic()
        waiting = [asyncio.create_task(store.async_put(f"k{n}", b"v" * 300_000)) for n in range(12)]
        await asyncio.sleep(0.05)
        assert await store.async_get_hostname() is not None, "the loop runs"
        master.kill()
        codes = await asyncio.gather(*waiting)
        assert all(code < 0 for code in codes), codes
        assert time.monotonic() - began < 25

    run(work())
    assert store.close() == 0 and pool.close() == 0


def test_subclasses_are_asked(master, lender):
    class Counting(MooncakeDistributedStoreAsync):
        asked = 0

        def get(self, key):
            self.asked += 1
            return super().get(key)

        def twice(self, key):
            return self.get(key) * 2

    store = Counting()

    async def work():
        assert await store.async_setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master.address) == 0
        assert await store.async_put("sub", b"v") == 0
        assert await store.async_get("sub") == b"v" and await store.async_twice("sub") == b"vv"
        assert store.asked == 2
        await store.async_remove("sub", force=True)

    run(work())
    assert store.close() == 0


SCRIPT = """
import asyncio, os, sys
from mooncake.async_store import MooncakeDistributedStoreAsync
store = MooncakeDistributedStoreAsync()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", sys.argv[1]) == 0

async def begin():
    tasks = [asyncio.ensure_future(store.async_put(f"exit{n}", b"x" * 500_000)) for n in range(60)]
    await asyncio.sleep(0.001)
    if sys.argv[2] == "exit":
        sys.exit(0)
    if sys.argv[2] == "abandon":
        return
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert store.get("exit0") == b""
            asyncio._set_running_loop(None)
            async def child():
                assert await store.async_get("exit0") == b"" and await store.async_put("c", b"v") == -600
                assert await store.async_setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", sys.argv[1]) == 0
                assert await store.async_put("child", b"v") == 0 and await store.async_get("child") == b"v"
            loop = asyncio.new_event_loop()
            loop.run_until_complete(child())
            code = store.close()
        finally:
            os._exit(code)
    assert await asyncio.gather(*tasks) == [0] * 60
    assert os.waitpid(pid, 0)[1] == 0, "the child"
    assert await store.async_get("exit7") == b"x" * 500_000

asyncio.run(begin())
print("done")
"""


@pytest.mark.parametrize("how", ["exit", "abandon", "fork"])
def test_the_process_ends_and_forks(master, lender, how):
    command = [sys.executable, "-c", SCRIPT, master.address, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "panicked" not in done.stderr, done.stderr
    if how == "fork":
        assert "done" in done.stdout
    store = joined(master.address)
    store.remove_all(force=True)
    store.close()
