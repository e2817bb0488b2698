"""The calls that LMCache 0.5.6 and SGLang 0.5.23 make, replayed with their shapes: neither package runs here."""

import ctypes
import re
import urllib.request

from conftest import joined

from mooncake.store import MooncakeDistributedStore, MooncakeHostMemAllocator, ReplicateConfig


def test_lmcache_remote_connector(master, lender):
    store = MooncakeDistributedStore()
    # Its own spellings, all values text; the result is not checked there.
    given = {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "global_segment_size": str(32 << 20),
        "local_buffer_size": str(16 << 20),
        "protocol": "tcp",
        "device_name": "",
        "master_server_address": master.address,
    }
    assert store.setup(given) == 0
    config = ReplicateConfig()
    config.replica_num = 1
    config.preferred_segment = store.get_hostname()
    chunk = ctypes.create_string_buffer(b"k" * 100_000, 100_000)
    pointer = ctypes.addressof(chunk)
    assert store.register_buffer(pointer, 100_000) == 0
    assert store.put_from("lm-a", pointer, 100_000, config) == 0
    assert store.batch_put_from(["lm-b", "lm-c"], [pointer] * 2, [10, 20], config) == [0, 0]
    assert store.put_parts("lm-d", b"metadata", memoryview(b"kv" * 50)) == 0
    assert store.get_replica_desc("lm-a")[0].get_memory_descriptor().buffer_descriptor
    segment = store.get_replica_desc("lm-a")[0].get_memory_descriptor()
    assert segment.buffer_descriptor.transport_endpoint == store.get_hostname(), "preferred"
    assert store.is_exist("lm-a") and not store.is_exist("lm-z"), "used as a truth value"
    assert store.batch_is_exist(["lm-a", "lm-z"]) == [1, 0]
    found = store.batch_get_buffer(["lm-d", "lm-z"])
    assert found[1] is None and bytes(memoryview(found[0])[:8]) == b"metadata"
    assert store.batch_get_into(["lm-b", "lm-z"], [pointer] * 2, [10, 10]) == [10, -704]
    assert store.unregister_buffer(pointer) == 0
    store.remove_all(force=True)
    store.close()


def test_sglang_hicache(master, lender):
    store = MooncakeDistributedStore()
    positional = ("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", master.address, None)
    keywords = {"enable_ssd_offload": False, "ssd_offload_path": "", "tenant_id": "default"}
    # A keyword we do not know is dropped by the name in the TypeError's text, and the call repeated.
    try:
        store.setup(*positional, **keywords, not_invented_yet=1)
        raise AssertionError("an unknown keyword was taken")
    except TypeError as error:
        assert re.search(r"'?not_invented_yet'?", str(error))
    assert not store.setup(*positional, **keywords)
    answer = urllib.request.urlopen(f"http://{master.address}/get_all_segments", timeout=5)
    assert answer.read().strip(), "check_server"
    assert store.put("sglang_mooncake_warmup", b"x" * 4096) == 0
    assert store.is_exist("sglang_mooncake_warmup") == 1
    assert store.get("sglang_mooncake_warmup") == b"x" * 4096
    page = 65536
    allocator = MooncakeHostMemAllocator()
    base = allocator.alloc(16 * page)
    assert base
    assert store.register_buffer(base, 16 * page) == 0
    ctypes.memset(base, 7, 16 * page)
    keys = [f"hash{i}_k" for i in range(4)] + [f"hash{i}_v" for i in range(4)]
    at, sizes = [base + i * page for i in range(8)], [page] * 8
    config = ReplicateConfig()
    config.group_ids = [k[:5] for k in keys]
    assert store.batch_put_from(keys, at, sizes, config) == [0] * 8
    assert store.batch_is_exist(keys + ["hash9_k"]) == [1] * 8 + [0]
    assert all(n > 0 for n in store.batch_get_into(keys, at, sizes))
    parts = [[base, base + page]]
    assert store.batch_put_from_multi_buffers(["multi"], parts, [[page, page]]) == [0]
    assert store.batch_get_into_multi_buffers(["multi"], parts, [[page, page]]) == [2 * page]
    assert store.batch_get_session_start(["multi"]) == [0]
    got = store.batch_get_into_multi_buffer_ranges(["multi"], parts, [[100, 200]], [[0, page]])
    assert got == [300] and store.batch_get_session_end(["multi"]) == 0
    assert store.remove_all() >= 0
    store.remove_all(force=True)
    store.unregister_buffer(base)
    store.close()


def test_vllm_reset_and_lookup_threads(master, lender):
    """Lookups from one thread while saves go on in another; `remove_all(force=True)` by keyword."""
    import threading

    store = joined(master.address)
    buffer = ctypes.create_string_buffer(1 << 20)
    base = ctypes.addressof(buffer)
    assert store.register_buffer(base, 1 << 20) == 0
    keys = [f"m@tp_rank:0@pcp0@dcp0@pp_rank:0@group:0@{i:064x}" for i in range(64)]
    seen = []
    thread = threading.Thread(
        target=lambda: seen.extend(store.batch_is_exist(keys) for _ in range(50))
    )
    thread.start()
    for key in keys:
        put = store.batch_put_from_multi_buffers(
            [key], [[base, base + 5000]], [[5000, 5000]], ReplicateConfig()
        )
        assert put == [0]
    thread.join()
    assert all(len(s) == 64 and set(s) <= {0, 1} for s in seen)
    assert store.batch_is_exist(keys) == [1] * 64
    assert store.remove_all(force=True) == 64
    store.close()
