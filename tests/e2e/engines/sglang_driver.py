"""SGLang's own Mooncake classes on our module: `sglang_driver.py MASTER METRICS_PORT` (HOST:PORT of a running master).

Everything of SGLang is the installed package, its KV pools included. Device pools live in host memory (`device="cpu"`)
and host pools are not pinned: pinning is a call to CUDA.
"""

import http.server
import json
import os
import socket
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

# The transfer engine's protocol and the addresses of the PD managers; SGLang reads both when it needs them.
os.environ.setdefault("MOONCAKE_PROTOCOL", "tcp")
os.environ.setdefault("SGLANG_HOST_IP", "127.0.0.1")

import numpy as np
import torch
from checks import Checks, Command, OwnMaster, another, reply, within
from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
from sglang.srt.server_args import ServerArgs

checks = Checks("SGLang")
PAGE, LAYERS, HEADS, WIDTH = 16, 3, 4, 32
SLOTS = 32 * PAGE
ROLE = sys.argv[1] if sys.argv[1] in ("reader", "target", "decode", "weights") else "writer"
# The decode process is told the bootstrap server's port by the prefill.
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    BOOTSTRAP = int(sys.argv[2]) if ROLE == "decode" else probe.getsockname()[1]
arguments = ServerArgs(
    model_path="dummy",
    device="cpu",
    host="127.0.0.1",
    disaggregation_mode={"decode": "decode", "writer": "prefill"}.get(ROLE, "null"),
    disaggregation_bootstrap_port=BOOTSTRAP,
)
publish(arguments, role="test", ranks=SpawnRanks(world_rank=0))

from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll
from sglang.srt.disaggregation.mooncake.conn import (
    MooncakeKVBootstrapServer,
    MooncakeKVManager,
    MooncakeKVReceiver,
    MooncakeKVSender,
)
from sglang.srt.disaggregation.utils import DisaggregationMode, setup_state_kv_args
from sglang.srt.distributed.device_communicators import mooncake_transfer_engine as te
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage.mooncake_store import mooncake_store
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_direct_linker import MooncakeDirectLinker
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_embedding_store import MooncakeEmbeddingStore
from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeHostTensorAllocator, MooncakeStore
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.model_executor.model_runner_components.remote_instance_weight_transporter import (
    RemoteInstanceWeightTransporter,
)
from sglang.srt.model_loader import remote_instance_weight_loader_utils as weights
from sglang.srt.model_loader.loader import RemoteInstanceModelLoader

MASTER = None


def extra(**more):
    return {
        "master_server_address": MASTER,
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "global_segment_size": 32 << 20,
        **more,
    }


def storage_config(mla=False, tp_rank=0, tp_size=1, **more):
    given = {
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "some/model",
        "extra_config": extra(),
        **more,
    }
    return HiCacheStorageConfig(tp_rank=tp_rank, tp_size=tp_size, is_mla_model=mla, **given)


def fill(tensor, seed):
    """Every byte of a tensor from the seed; whatever its type says, only bytes are compared."""
    assert tensor.is_contiguous()
    flat = tensor.view(torch.uint8).reshape(-1)
    flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


def raw(tensor):
    """Equality of floats would fail on NaN, which random bytes hold."""
    return tensor.contiguous().view(torch.uint8)


def mha_device():
    return MHATokenToKVPool(SLOTS, PAGE, torch.bfloat16, HEADS, WIDTH, LAYERS, "cpu", False)


def mla_device():
    return MLATokenToKVPool(SLOTS, PAGE, torch.bfloat16, 64, 16, LAYERS, "cpu", False)


def mha_host(layout, allocator="mooncake", device=None):
    return MHATokenToKVPoolHost(
        (device or mha_device()).get_device_pool_infos()[0].buffer_info,
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        allocator_type=allocator,
        device_capacity_tokens=SLOTS,
        start_layer=0,
        end_layer=LAYERS,
    )


def mla_host(layout, allocator="mooncake", device=None, page=PAGE):
    device = device or mla_device()
    return MLATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info,
        2.0,
        0,
        page,
        layout,
        pin_memory=False,
        allocator_type=allocator,
        override_kv_cache_dim=device.kv_cache_dim,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
    )


def page_of(pool, index):
    return raw(pool.get_data_page(int(index)))


def pages_equal(pool, ones, others):
    page = pool.page_size
    return all(
        torch.equal(page_of(pool, a), page_of(pool, b)) for a, b in zip(ones[::page], others[::page], strict=True)
    )


def store_part(what, make_host, mla, count=10, **config_more):
    """One MooncakeStore over one real host pool: v1, the single calls, exists, metrics."""
    what = f"store, {what}: "
    pool = make_host()
    store = MooncakeStore(storage_config(mla, enable_storage_metrics=True, **config_more), pool)
    store.register_mem_pool_host(pool)
    checks.equal(what + "the host pool's allocator is ours", type(pool.allocator), MooncakeHostTensorAllocator)
    fill(pool.kv_buffer, 1)
    keys = [f"{what}{i}" for i in range(count)]
    ours, back = pool.alloc(count * PAGE), pool.alloc(count * PAGE)
    checks.equal(what + "nothing before", store.batch_exists(keys), 0)
    checks.equal(what + "get of absent pages", store.batch_get_v1(keys, back), [False] * count)
    half = count // 2
    checks.equal(what + "batch_set_v1 of half", store.batch_set_v1(keys[:half], ours[: half * PAGE]), [True] * half)
    checks.equal(what + "batch_exists after half", store.batch_exists(keys), half)
    got = store.batch_get_v1(keys, back)
    checks.equal(what + "batch_get_v1 of half", got, [True] * half + [False] * (count - half))
    checks.equal(what + "batch_set_v1 of all", store.batch_set_v1(keys, ours), [True] * count)
    checks.equal(what + "batch_set_v1 again", store.batch_set_v1(keys, ours), [True] * count)
    checks.equal(what + "batch_exists", store.batch_exists(keys), count)
    checks.equal(what + "batch_exists with a hole", store.batch_exists([*keys[:3], "no", *keys[3:]]), 3)
    for index in back[::PAGE]:
        pool.set_from_flat_data_page(int(index), torch.zeros_like(pool.get_dummy_flat_data_page()))
    before = [page_of(pool, i).clone() for i in ours[::PAGE]]
    checks.equal(what + "batch_get_v1", store.batch_get_v1(keys, back), [True] * count)
    checks.true(what + "bytes", pages_equal(pool, ours, back))
    checks.true(
        what + "the source is as it was", all(torch.equal(a, page_of(pool, i)) for a, i in zip(before, ours[::PAGE]))
    )
    stats = store.get_stats()
    checks.equal(what + "pages in the metrics", (sum(stats.prefetch_pgs) > 0, sum(stats.backup_pgs) > 0), (True, True))
    return store, pool


def single_part(store, pool):
    """set, get, exists, batch_set, batch_get: an address and a size each."""
    base, size = pool.kv_buffer.data_ptr(), 4096
    flat = pool.kv_buffer.view(torch.uint8).reshape(-1)
    fill(pool.kv_buffer, 3)
    checks.equal("single: exists before", store.exists("one"), False)
    checks.equal("single: get before", store.get("one", base, size), False)
    checks.equal("single: set", store.set("one", None, base, size), True)
    checks.equal("single: set again", store.set("one", None, base, size), True)
    checks.equal("single: exists", store.exists("one"), True)
    checks.equal("single: get", store.get("one", base + (1 << 16), size), True)
    checks.true("single: bytes", torch.equal(flat[:size], flat[1 << 16 : (1 << 16) + size]))
    keys = [f"many{i}" for i in range(6)]
    at = [base + i * size for i in range(6)]
    to = [base + (1 << 17) + i * size for i in range(6)]
    checks.equal("single: batch_set", store.batch_set(keys, None, at, [size] * 6), True)
    checks.equal("single: batch_get", store.batch_get(keys, to, [size] * 6), 3)  # MHA: two keys a page
    checks.true("single: batch bytes", torch.equal(flat[: 6 * size], flat[1 << 17 : (1 << 17) + 6 * size]))
    checks.equal("single: batch_get to a hole", store.batch_get([*keys[:2], "no", "no"], to[:4], [size] * 4), 1)


def split_part():
    """Heads split over a wider group: a rank of tp 1 writes what the ranks of tp 2 read."""
    wide = mha_host("page_head")
    config = storage_config(should_split_heads=True, tp_lcm_size=2)
    store = MooncakeStore(config, wide)
    store.register_mem_pool_host(wide)
    fill(wide.kv_buffer, 5)
    keys = [f"split{i}" for i in range(4)]
    at = wide.alloc(4 * PAGE)
    checks.equal("split heads: set", store.batch_set_v1(keys, at), [True] * 4)
    checks.equal("split heads: exists", store.batch_exists([*keys, "no"]), 4)
    to = wide.alloc(4 * PAGE)
    checks.equal("split heads: get", store.batch_get_v1(keys, to), [True] * 4)
    checks.true("split heads: bytes", pages_equal(wide, at, to))
    for rank in range(2):
        device = MHATokenToKVPool(SLOTS, PAGE, torch.bfloat16, HEADS // 2, WIDTH, LAYERS, "cpu", False)
        narrow = mha_host("page_head", device=device)
        reader = MooncakeStore(storage_config(tp_rank=rank, tp_size=2), narrow)
        reader.register_mem_pool_host(narrow)
        there = narrow.alloc(4 * PAGE)
        checks.equal(f"split heads: rank {rank} of 2 finds", reader.batch_exists(keys), 4)
        checks.equal(f"split heads: rank {rank} of 2 gets", reader.batch_get_v1(keys, there), [True] * 4)
        heads = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)
        same = all(
            torch.equal(raw(narrow.kv_buffer[:, b // PAGE]), raw(wide.kv_buffer[:, a // PAGE, heads]))
            for a, b in zip(at[::PAGE].tolist(), there[::PAGE].tolist(), strict=True)
        )
        checks.true(f"split heads: rank {rank} of 2 bytes", same)


def groups_part():
    """Group semantics: ReplicateConfig.group_ids, through v1 and v2, and session_ids through v2."""
    pool = mha_host("page_first")
    store = MooncakeStore(
        storage_config(extra_config=extra(enable_group_semantics=True, extra_backend_tag="tag")), pool
    )
    store.register_mem_pool_host(pool)
    checks.equal("groups: our ReplicateConfig has them", store._can_use_group_semantics(), True)
    checks.equal("groups: and sessions", store._supports_session_ids, True)
    checks.equal("groups: prefix", store.config_prefix, "tag_some-model")
    fill(pool.kv_buffer, 6)
    keys = [f"group{i}" for i in range(4)]
    at, to = pool.alloc(4 * PAGE), pool.alloc(4 * PAGE)
    checks.equal("groups: set", store.batch_set_v1(keys, at), [True] * 4)
    checks.equal("groups: get", store.batch_get_v1(keys, to), [True] * 4)
    checks.true("groups: bytes", pages_equal(pool, at, to))
    draft = mha_host("page_first")
    store.register_mem_host_pool_v2(draft, PoolName.DRAFT)
    fill(draft.kv_buffer, 7)
    there = draft.alloc(4 * PAGE)
    info = HiCacheStorageExtraInfo(extra_info={"session_id": "session-1"})
    result = store.batch_set_v2([PoolTransfer(PoolName.DRAFT, host_indices=there, keys=keys)], info)
    checks.equal("groups: set v2 with a session", result, {PoolName.DRAFT: [True] * 4})


def hybrid_part():
    """The v2 calls over sidecar pools: DSA's indexer beside MLA, Mamba states, a draft of MHA, an SWA pool."""
    device = dsa_device()
    anchor = mla_host("page_first", device=device, page=64)
    store = MooncakeStore(storage_config(True), anchor)
    store.register_mem_pool_host(anchor)
    indexer = DSAIndexerPoolHost(
        next(d for d in device.host_pool_decls() if d.pool_name == PoolName.INDEXER),
        anchor,
        pin_memory=False,
        allocator_type="mooncake",
    )
    mamba = MambaPoolHost(
        MambaStateBufferInfo(
            temporal=torch.zeros(2, 9, 4, 8, 8), conv=(torch.zeros(2, 9, 16, 3, dtype=torch.bfloat16),)
        ),
        4.0,
        0,
        device_capacity=8,
        pin_memory=False,
        allocator_type="mooncake",
        layout="page_first",
    )
    draft = mha_host("page_first_direct")
    pools = {PoolName.INDEXER: indexer, PoolName.MAMBA: mamba, PoolName.DRAFT: draft}
    for name, pool in pools.items():
        store.register_mem_host_pool_v2(pool, name)
    for seed, pool in enumerate((anchor, indexer, mamba, draft), 20):
        buffers = pool.get_hybrid_pool_buffer() if pool is not anchor else [pool.kv_buffer]
        for buffer in buffers:
            fill(buffer, seed)
    keys = [f"hybrid{i}" for i in range(6)]
    at = anchor.alloc(6 * 64)
    checks.equal("v2: KV", store.batch_set_v1(keys, at), [True] * 6)
    states, drafts = mamba.alloc(2), draft.alloc(6 * PAGE)
    transfers = [
        PoolTransfer(PoolName.INDEXER, host_indices=at, keys=keys),
        PoolTransfer(PoolName.MAMBA, host_indices=states, keys=[keys[2], keys[5]]),
        PoolTransfer(PoolName.DRAFT, host_indices=drafts, keys=keys),
    ]
    expected = {PoolName.INDEXER: [True] * 6, PoolName.MAMBA: [True] * 2, PoolName.DRAFT: [True] * 6}
    # A part first, so that the whole is a mixture of what is there and what is not.
    part = [PoolTransfer(PoolName.DRAFT, host_indices=drafts[: 2 * PAGE], keys=keys[:2])]
    checks.equal("v2: a part", store.batch_set_v2(part), {PoolName.DRAFT: [True] * 2})
    checks.equal("v2: all", store.batch_set_v2(transfers), expected)
    checks.equal("v2: all again", store.batch_set_v2(transfers), expected)
    asked = [
        PoolTransfer(PoolName.INDEXER, keys=keys),
        PoolTransfer(PoolName.MAMBA, keys=[keys[5]], hit_policy=PoolHitPolicy.TRAILING_PAGES),
        PoolTransfer(PoolName.DRAFT, keys=keys),
    ]
    hit = store.batch_exists_v2(keys, asked)
    checks.equal("v2: hit pages", hit.kv_hit_pages, 6)
    checks.equal("v2: stops that Mamba's states allow", hit.restorable_prefix_pages, [3, 6])
    hit = store.batch_exists_v2([*keys[:4], "no"], asked)
    checks.equal("v2: hit pages of a shorter prefix", (hit.kv_hit_pages, hit.restorable_prefix_pages), (3, [3]))
    checks.equal("v2: nothing", store.batch_exists_v2(["no"], asked).kv_hit_pages, 0)
    wanted = {}
    for name, pool in pools.items():
        wanted[name] = [raw(b).clone() for b in pool.get_hybrid_pool_buffer()]
        for buffer in pool.get_hybrid_pool_buffer():
            fill(buffer, 99)
    checks.equal("v2: get", store.batch_get_v2(transfers), expected)
    for transfer in transfers:
        pool = pools[transfer.name]
        pointers, sizes = pool.get_page_buffer_meta(transfer.host_indices)
        touched = 0
        for buffer, before in zip(pool.get_hybrid_pool_buffer(), wanted[transfer.name], strict=True):
            now, start = raw(buffer).reshape(-1), buffer.data_ptr()
            for pointer, size in zip(pointers, sizes, strict=True):
                offset = pointer - start
                if 0 <= offset < now.numel():
                    touched += torch.equal(now[offset : offset + size], before.reshape(-1)[offset : offset + size])
        checks.equal(f"v2: bytes of {transfer.name}", touched, len(pointers))
    missing = store.batch_get_v2([PoolTransfer(PoolName.INDEXER, host_indices=at[:128], keys=[keys[0], "no"])])
    checks.equal("v2: get of an absent page", missing, {PoolName.INDEXER: [True, False]})


def dsa_device():
    return DSATokenToKVPool(8 * 64, 64, 512, torch.bfloat16, 64, LAYERS, "cpu", 128, False, 576)


def settings_part(metrics_port):
    """The ways to configure, check_server, the keywords of setup, tenants."""
    os.environ.update(
        MOONCAKE_MASTER=MASTER,
        MOONCAKE_LOCAL_HOSTNAME="127.0.0.1",
        MOONCAKE_GLOBAL_SEGMENT_SIZE="33554432",
        MOONCAKE_TE_META_DATA_SERVER="P2PHANDSHAKE",
        MOONCAKE_CHECK_SERVER="true",
        MOONCAKE_MASTER_METRICS_PORT=str(metrics_port),
    )
    try:
        # check_server asks for as long as 10 minutes; ten seconds tell as much.
        mooncake_store.SETUP_TIMEOUT = 10
        store = MooncakeStore(storage_config(extra_config=None, model_name=None))
        checks.equal("settings: environment and check_server", store.config.check_server, True)
        checks.equal("settings: no model, no prefix", store.config_prefix, None)
    finally:
        for name in list(os.environ):
            if name.startswith("MOONCAKE_") and name != "MOONCAKE_PROTOCOL":
                del os.environ[name]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(extra(global_segment_size="0"), file)
        file.flush()
        os.environ["SGLANG_HICACHE_MOONCAKE_CONFIG_PATH"] = file.name
        try:
            store = MooncakeStore(storage_config(extra_config=None))
            checks.equal("settings: file", store.config.global_segment_size, 0)
        finally:
            del os.environ["SGLANG_HICACHE_MOONCAKE_CONFIG_PATH"]
    with tempfile.TemporaryDirectory() as directory:
        config = storage_config(extra_config=extra(enable_ssd_offload=True, ssd_offload_path=directory))
        checks.part(lambda: MooncakeStore(config))
        checks.equal("settings: a directory for each rank", os.listdir(directory), ["rank_0_0_0_0"])
    pool = mha_host("page_first")
    stores = {}
    for tenant in ("default", "other"):
        stores[tenant] = MooncakeStore(storage_config(extra_config=extra(tenant_id=tenant)), pool)
        stores[tenant].register_mem_pool_host(pool)
    at = pool.alloc(PAGE)
    checks.equal("tenants: set", stores["other"].batch_set_v1(["tenant"], at), [True])
    checks.equal("tenants: the other's is not seen", stores["default"].batch_exists(["tenant"]), 0)
    checks.equal("tenants: one's own is", stores["other"].batch_exists(["tenant"]), 1)


def standalone(what, address):
    """A store that owns no memory and names a client's address: setup_dummy."""
    pool = mha_host("page_first")
    given = {"client_server_address": address, "standalone_storage": True, "protocol": "tcp"}
    store = MooncakeStore(storage_config(extra_config=given), pool)
    store.register_mem_pool_host(pool)
    fill(pool.kv_buffer, 8)
    keys = [f"{what}{i}" for i in range(4)]
    at, to = pool.alloc(4 * PAGE), pool.alloc(4 * PAGE)
    checks.equal(what + ": set", store.batch_set_v1(keys, at), [True] * 4)
    checks.equal(what + ": get", store.batch_get_v1(keys, to), [True] * 4)
    checks.true(what + ": bytes", pages_equal(pool, at, to))


def standalone_part():
    standalone("standalone at the master", MASTER)


def standalone_client_part():
    """As SGLang's README has it: the address is the one of a `mooncake_client`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = Command(
        "in service",
        "mooncake_client",
        "--global_segment_size=64MB",
        f"--port={port}",
        f"--master_server_address={MASTER}",
    )
    try:
        standalone("standalone at a mooncake_client", f"127.0.0.1:{port}")
    finally:
        client.kill()


def embedding_part():
    store = MooncakeEmbeddingStore(SimpleNamespace(extra_config=extra()))
    buffer = torch.empty(1 << 20, dtype=torch.uint8)
    store.register_buffer(buffer)
    fill(buffer, 9)
    base, size = buffer.data_ptr(), 50_000
    hashes = [f"image{i}" for i in range(4)]
    at, to = [base + i * size for i in range(4)], [base + (1 << 19) + i * size for i in range(4)]
    checks.equal("embeddings: before", store.batch_is_exist(hashes), [False] * 4)
    checks.equal("embeddings: put", store.batch_put(hashes[:2], at[:2], [size] * 2), [True] * 2)
    checks.equal("embeddings: put all", store.batch_put(hashes, at, [size] * 4), [True] * 4)
    checks.equal("embeddings: there", store.batch_is_exist([*hashes, "no"]), [True] * 4 + [False])
    checks.equal("embeddings: get", store.batch_get([*hashes, "no"], [*to, base], [size] * 5), [True] * 4 + [False])
    checks.true("embeddings: bytes", torch.equal(buffer[: 4 * size], buffer[1 << 19 : (1 << 19) + 4 * size]))
    fill(buffer, 10)
    # No ReplicateConfig in this call.
    parts = [[base, base + 2 * size], [base + 100, base + 300]]
    into = [[base + 4 * size, base + 6 * size], [base + 8 * size, base + 9 * size]]
    sizes = [[size, 1000], [1, 4097]]
    pair = ["parted0", "parted1"]
    checks.equal("embeddings: put of parts", store.batch_put_from_multi_buffers(pair, parts, sizes), [True] * 2)
    checks.equal("embeddings: get of parts", store.batch_get_into_multi_buffers(pair, into, sizes), [True] * 2)
    same = all(
        torch.equal(buffer[a - base : a - base + n], buffer[b - base : b - base + n])
        for aa, bb, nn in zip(parts, into, sizes, strict=True)
        for a, b, n in zip(aa, bb, nn, strict=True)
    )
    checks.true("embeddings: bytes of parts", same)


TOKENS = list(range(20 * PAGE + 5))


def controller(mla):
    """HiCacheController with the backend `mooncake`, made by SGLang's factory."""
    device = mla_device() if mla else mha_device()
    host = mla_host("layer_first", device=device) if mla else mha_host("page_first", device=device)
    allocator = PagedTokenToKVPoolAllocator(SLOTS, PAGE, torch.bfloat16, "cpu", device, False)
    made = HiCacheController(
        allocator,
        host,
        PAGE,
        None,
        threading.Event(),
        write_policy="write_through",
        io_backend="direct",
        storage_backend="mooncake",
        model_name="the/model",
        prefetch_threshold=PAGE,
        storage_backend_extra_config=extra(),
    )
    checks.equal("controller: backend", type(made.storage_backend), MooncakeStore)
    return made, host


def prefetched(made, host, rid, tokens):
    """What the scheduler does with a request: query, allocate, load, wait for the acknowledgement."""
    made.prefetch(rid, tokens)
    operation = made.prefetch_hit_queue.get(timeout=30)
    if not operation.storage_hit_count:
        return 0, None
    operation.host_indices = host.alloc(operation.storage_hit_count)
    made.prefetch_buffer.put(operation)
    done = 0
    while True:
        ack = made.ack_prefetch_queue.get(timeout=30)
        if ack.completed_tokens is not None:
            done = ack.completed_tokens
        if ack.completed_req:
            return done, operation.host_indices


def controller_part():
    for mla in (False, True):
        what = f"controller, mla={mla}: "
        made, host = controller(mla)
        count = len(TOKENS) // PAGE
        hashes = get_storage_hash_str(TOKENS[: count * PAGE], None, page_size=PAGE)
        at = host.alloc(count * PAGE)
        fill(host.kv_buffer, 30 + mla)
        checks.equal(what + "hit before", prefetched(made, host, "r0", TOKENS)[0], 0)
        made.write_storage(at, TOKENS[: count * PAGE], hashes)
        checks.equal(what + "tokens saved", made.ack_backup_queue.get(timeout=30).completed_tokens, count * PAGE)
        done, back = prefetched(made, host, "r1", TOKENS)
        checks.equal(what + "tokens loaded", done, count * PAGE)
        checks.true(what + "bytes", back is not None and pages_equal(host, at, back))
        made.detach_storage_backend()


def as_reader_of_controller():
    for mla in (False, True):
        what = f"second instance, mla={mla}: "
        made, host = controller(mla)
        count = len(TOKENS) // PAGE
        mine = mla_host("layer_first", "default") if mla else mha_host("page_first", "default")
        at = mine.alloc(count * PAGE)
        fill(mine.kv_buffer, 30 + mla)
        done, back = prefetched(made, host, "r", TOKENS)
        checks.equal(what + "tokens loaded", done, count * PAGE)
        same = back is not None and all(
            torch.equal(page_of(mine, a), page_of(host, b)) for a, b in zip(at[::PAGE], back[::PAGE], strict=True)
        )
        checks.true(what + "bytes", same)
        done, _ = prefetched(made, host, "other", TOKENS[: 7 * PAGE] + [1] * (3 * PAGE))
        checks.equal(what + "tokens of a common prefix", done, 7 * PAGE)


def linker():
    """MooncakeDirectLinker: device pools straight to the store, loaded layer by layer (ranges of objects)."""
    device = dsa_device()
    allocator = PagedTokenToKVPoolAllocator(device.size, 64, torch.bfloat16, "cpu", device, False)
    made = MooncakeDirectLinker(
        arguments,
        CacheInitParams(disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=allocator, page_size=64),
        components={ComponentType.FULL},
        extra_config=extra(),
    )
    return made, device


def linker_buffers(device):
    return [*device.kv_buffer, *device.index_k_with_scale_buffer]


LINKED = [f"linked{i}" for i in range(4)]


def loaded(made, rid, indices):
    made.load(rid, [PoolTransfer(PoolName.KV, keys=LINKED, device_indices=indices)])
    return made.finish_layer_wise_loading(made.start_layer_wise_loading())


def linker_part():
    made, device = linker()
    for i, buffer in enumerate(linker_buffers(device)):
        fill(buffer, 40 + i)
    indices = torch.arange(64, 64 + 4 * 64)
    asked = [PoolTransfer(PoolName.KV, keys=LINKED)]
    checks.equal("linker: before", made.lookup("r", asked), [])
    made.offload([PoolTransfer(PoolName.KV, keys=LINKED, device_indices=indices)], "session-2")
    within(30, made.num_completed_offloads, 1)
    checks.equal("linker: offload", made.pop_completed_offload(), True)
    checks.equal("linker: lookup", made.lookup("r", asked), [1, 2, 3, 4])
    before = [raw(b).clone() for b in linker_buffers(device)]
    for buffer in device.kv_buffer:
        buffer[64 : 64 + 4 * 64].zero_()
    for buffer in device.index_k_with_scale_buffer:
        buffer[1:5].zero_()
    checks.equal("linker: load", loaded(made, "r", indices), True)
    same = [torch.equal(raw(b), a) for b, a in zip(linker_buffers(device), before, strict=True)]
    checks.equal("linker: bytes of each layer", same, [True] * (2 * LAYERS))
    made.close()


def as_reader_of_linker():
    made, device = linker()
    expected = dsa_device()
    for i, buffer in enumerate(linker_buffers(expected)):
        fill(buffer, 40 + i)
    checks.equal(
        "second instance, linker: lookup", made.lookup("r", [PoolTransfer(PoolName.KV, keys=LINKED)]), [1, 2, 3, 4]
    )
    checks.equal("second instance, linker: load", loaded(made, "r", torch.arange(2 * 64, 6 * 64)), True)
    for layer in range(LAYERS):
        same = torch.equal(raw(device.kv_buffer[layer][128:384]), raw(expected.kv_buffer[layer][64:320]))
        checks.true(f"second instance, linker: KV of layer {layer}", same)
        mine, other = device.index_k_with_scale_buffer[layer], expected.index_k_with_scale_buffer[layer]
        checks.true(f"second instance, linker: index of layer {layer}", torch.equal(raw(mine[2:6]), raw(other[1:5])))
    checks.true("second instance, linker: nothing beside", not raw(device.kv_buffer[0][384:]).any())
    made.close()


REGION = 8 << 20


def region(seed):
    made = torch.empty(REGION, dtype=torch.uint8)
    fill(made, seed)
    return made


def engine_part():
    """MooncakeTransferEngine, the wrapper under PD: this process writes into the second one's memory."""
    engine = te.init_mooncake_transfer_engine("127.0.0.1", 0, None)
    checks.equal("engine: shared", te.get_mooncake_transfer_engine(), engine)
    checks.true("engine: session", engine.get_session_id().startswith("127.0.0.1:"))
    checks.true("engine: get_engine", engine.get_engine() is not None)
    mine = region(50)
    engine.register(mine.data_ptr(), REGION)
    others = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(3)]
    pointers, lengths = [t.data_ptr() for t in others], [1 << 20] * 3
    checks.equal("engine: batch_register", engine.batch_register(pointers, lengths), 0)
    peer = another("target")
    told = json.loads(reply(peer))
    session, base = told["session"], told["base"]
    at = mine.data_ptr()
    checks.equal("engine: transfer_sync", engine.transfer_sync(session, at, base, 1 << 20), 0)
    pairs = [(2 << 20, 3 << 20, 4096), (3 << 20, 5 << 20, 1 << 20), (5 << 20, 2 << 20, 7)]
    result = engine.batch_transfer_sync(
        session, [at + a for a, _, _ in pairs], [base + b for _, b, _ in pairs], [n for _, _, n in pairs]
    )
    checks.equal("engine: batch_transfer_sync", result, 0)
    print(json.dumps([[0, 0, 1 << 20], *pairs]), file=peer.stdin, flush=True)
    checks.equal("engine: peer has looked", reply(peer), "looked")
    checks.equal("engine: send_probe", engine.send_probe(session), 0)
    checks.true("engine: beyond the peer's memory", engine.transfer_sync(session, at, base + REGION, 4096) < 0)
    print("leave", file=peer.stdin, flush=True)
    checks.absorb(peer, "engine: peer")
    checks.true("engine: send_probe to one that left", engine.send_probe(session) != 0)
    checks.true("engine: transfer to one that left", engine.transfer_sync(session, at, base, 4096) < 0)
    engine.deregister(at)
    try:
        engine.deregister(at)
        twice = "no error"
    except RuntimeError:
        twice = "RuntimeError"
    checks.equal("engine: deregister twice", twice, "RuntimeError")
    checks.equal("engine: batch_deregister", engine.batch_deregister(pointers), 0)


def as_target():
    engine = te.init_mooncake_transfer_engine("127.0.0.1", 0, None)
    memory = torch.zeros(REGION, dtype=torch.uint8)
    engine.register(memory.data_ptr(), REGION)
    print(json.dumps({"session": engine.get_session_id(), "base": memory.data_ptr()}), flush=True)
    expected, source = torch.zeros_like(memory), region(50)
    for a, b, n in json.loads(sys.stdin.readline()):
        expected[b : b + n] = source[a : a + n]
    checks.true("engine: what arrived", torch.equal(memory, expected))
    print("looked", flush=True)
    sys.stdin.readline()


PD_PAGES = 12


def manager(mode):
    """MooncakeKVManager over a real device pool, its arguments filled as the scheduler fills them."""
    te.init_mooncake_transfer_engine("127.0.0.1", 0, None)
    get_parallel().override_permanently(pp_group=None)  # one stage: the manager reads it and never calls it
    device = mha_device()
    given = KVArgs()
    given.engine_rank = given.pp_rank = given.gpu_id = 0
    given.system_dp_rank = None
    given.rust_http_port = None
    given.kv_cache_dtype_str = "bfloat16"
    given.prefill_start_layer, given.prefill_end_layer = 0, LAYERS
    given.kv_data_ptrs, given.kv_data_lens, given.kv_item_lens = device.get_contiguous_buf_infos()
    given.kv_layer_ids = []
    given.kv_head_num = given.total_kv_head_num = HEADS
    given.page_size = PAGE
    given.ib_device = None
    given.mla_compression_ratios = None
    aux = torch.zeros(4, 256, dtype=torch.uint8)
    given.aux_data_ptrs, given.aux_data_lens, given.aux_item_lens = [aux.data_ptr()], [aux.nbytes], [256]
    setup_state_kv_args(given, device, None, LAYERS)
    return MooncakeKVManager(given, mode, arguments, False), device, aux


def polled(side):
    """Success or Failed, or what it is after 30 s."""
    within(30, lambda: side.poll() in (KVPoll.Success, KVPoll.Failed), True)
    return side.poll()


def pd_part():
    """Prefill and decode: SGLang's managers, sender, receiver and bootstrap server carry a request's pages."""
    server = MooncakeKVBootstrapServer("127.0.0.1", BOOTSTRAP)
    prefill, device, aux = manager(DisaggregationMode.PREFILL)
    for i, buffer in enumerate([*device.k_buffer, *device.v_buffer]):
        fill(buffer, 60 + i)
    fill(aux, 70)
    child = another("decode", BOOTSTRAP)
    checks.equal("PD: decode is up", reply(child), "up")
    for room in (1, 2):
        sender = MooncakeKVSender(prefill, f"127.0.0.1:{BOOTSTRAP}", room)
        sender.init(PD_PAGES, room)
        print("go", file=child.stdin, flush=True)
        waiting = within(30, sender.poll, KVPoll.WaitingForInput)
        checks.equal(f"PD: room {room}: decode's request arrived", waiting, KVPoll.WaitingForInput)
        pages = np.arange(1, 1 + PD_PAGES, dtype=np.int32)
        # Two chunks, as of a chunked prefill.
        sender.send(pages[:5])
        sender.send(pages[5:])
        checks.equal(f"PD: room {room}: sent", polled(sender), KVPoll.Success)
        checks.equal(f"PD: room {room}: received", reply(child), str(KVPoll.Success))
    print("leave", file=child.stdin, flush=True)
    checks.absorb(child, "PD: decode")
    server.close()


def as_decode():
    decode, device, aux = manager(DisaggregationMode.DECODE)
    expected = mha_device()
    for i, buffer in enumerate([*expected.k_buffer, *expected.v_buffer]):
        fill(buffer, 60 + i)
    metadata = torch.empty_like(aux)
    fill(metadata, 70)
    address = f"127.0.0.1:{BOOTSTRAP}"
    within(30, lambda: decode.try_ensure_parallel_info(address), True)
    print("up", flush=True)
    for room in (1, 2):
        sys.stdin.readline()
        receiver = MooncakeKVReceiver(decode, address, room)
        receiver.init(0)
        within(30, receiver.poll, KVPoll.WaitingForInput)
        pages = np.array([7, 8, 9, 3, 4, 20, 21, 22, 15, 16, 17, 30], dtype=np.int32)
        receiver.send_metadata(pages, aux_index=room)
        state = polled(receiver)
        for mine, theirs in zip(
            [*device.k_buffer, *device.v_buffer], [*expected.k_buffer, *expected.v_buffer], strict=True
        ):
            same = all(
                torch.equal(raw(mine[to * PAGE : (to + 1) * PAGE]), raw(theirs[at * PAGE : (at + 1) * PAGE]))
                for at, to in enumerate(pages.tolist(), 1)
            )
            checks.true(f"PD: room {room}: bytes of a layer", same)
        checks.true(f"PD: room {room}: metadata", torch.equal(aux[room], metadata[room]))
        for buffer in [*device.k_buffer, *device.v_buffer]:
            buffer.zero_()
        receiver.clear()
        print(int(state), flush=True)
    sys.stdin.readline()


def small_model(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(100, 37), torch.nn.Linear(37, 1000), torch.nn.LayerNorm(1000))


def weights_part():
    """Weights of one instance read into another's: the transporter's engine and the loader of remote instances."""
    seed = another("weights")
    url = json.loads(reply(seed))["url"]
    transporter = RemoteInstanceWeightTransporter(get_model=lambda: None, gpu_id=0)
    transporter.init_engine()
    model, expected = small_model(91), small_model(90)
    # v1: the other one asks CUDA's allocator where the weights are.
    weights.register_memory_region_v1(model, transporter.engine)
    load = RemoteInstanceModelLoader.load_model_from_remote_instance_by_transfer_engine
    checks.equal("weights: loaded", load(None, model, transporter.engine, url, 0), True)
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        checks.true(f"weights: {name}", torch.equal(mine, theirs))
    print("leave", file=seed.stdin, flush=True)
    checks.absorb(seed, "weights: seed instance")


def as_weights():
    transporter = RemoteInstanceWeightTransporter(get_model=lambda: None, gpu_id=0)
    transporter.init_engine()
    model = small_model(90)
    table = weights.register_memory_region_v1(model, transporter.engine)
    checks.equal("weights: regions", len(table), len(list(model.parameters())))
    answer = json.dumps({"remote_instance_transfer_engine_info": [transporter.session_id, table]}).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        """The one endpoint of SGLang's server that the loader asks."""

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}"}), flush=True)
    sys.stdin.readline()


def loss_part():
    """The master goes: every call of the store ends soon and as a miss; it comes back: the store works again."""
    master = OwnMaster()
    pool = mha_host("page_first")
    store = MooncakeStore(storage_config(extra_config=extra(master_server_address=master.address)), pool)
    store.register_mem_pool_host(pool)
    keys = [f"loss{i}" for i in range(4)]
    at, to = pool.alloc(4 * PAGE), pool.alloc(4 * PAGE)
    fill(pool.kv_buffer, 95)
    checks.equal("loss: set before", store.batch_set_v1(keys, at), [True] * 4)
    master.kill()
    began = time.time()
    checks.equal("loss: exists", store.batch_exists(keys), 0)
    checks.equal("loss: get", store.batch_get_v1(keys, to), [False] * 4)
    checks.equal("loss: set", store.batch_set_v1(["lost"], at[:PAGE]), [False])
    checks.true("loss: no call waits long", time.time() - began < 10)
    master = OwnMaster(master.port())
    checks.equal("loss: set works again", within(20, lambda: store.batch_set_v1(["again"], at[:PAGE]), [True]), [True])
    checks.equal("loss: get works again", store.batch_get_v1(["again"], to[:PAGE]), [True])
    checks.true("loss: bytes", pages_equal(pool, at[:PAGE], to[:PAGE]))
    master.kill()


def reuse_part():
    """A store over the transfer engine that the process already has (SGLANG_HICACHE_MOONCAKE_REUSE_TE)."""
    te._mooncake_transfer_engine = None
    os.environ.update(MOONCAKE_PROTOCOL="rdma", MC_FORCE_TCP="1")
    try:
        engine = te.init_mooncake_transfer_engine("127.0.0.1", 0, None)
        pool = mha_host("page_first")
        store = MooncakeStore(storage_config(extra_config=extra(protocol="rdma", device_name="")), pool)
        checks.equal("reuse: SGLang reuses the engine", store._shared_mooncake_transfer_engine, engine)
        store.register_mem_pool_host(pool)
        fill(pool.kv_buffer, 80)
        keys = [f"reuse{i}" for i in range(4)]
        at, to = pool.alloc(4 * PAGE), pool.alloc(4 * PAGE)
        checks.equal("reuse: set", store.batch_set_v1(keys, at), [True] * 4)
        checks.equal("reuse: get", store.batch_get_v1(keys, to), [True] * 4)
        checks.true("reuse: bytes", pages_equal(pool, at, to))
    finally:
        os.environ["MOONCAKE_PROTOCOL"] = "tcp"
        del os.environ["MC_FORCE_TCP"]


def clear_part(store, keys):
    """HiCacheStorage.clear, at an endpoint of the server: everything that is not leased goes."""
    store.clear()
    until = time.time() + 30
    while store.batch_exists(keys[:1]) and time.time() < until:
        time.sleep(6)  # each question leases anew
        store.clear()
    checks.equal("clear: nothing is left", store.batch_exists(keys), 0)


def main():
    global MASTER
    roles = {
        "target": [as_target],
        "decode": [as_decode],
        "weights": [as_weights],
        "reader": [as_reader_of_controller, as_reader_of_linker],
    }
    if ROLE != "writer":
        MASTER = sys.argv[2] if ROLE == "reader" else None
        for part in roles[ROLE]:
            checks.part(part)
        checks.tell()
        os._exit(0)
    MASTER = sys.argv[1]
    kept = []
    for layout in ("page_first", "page_first_direct", "page_head"):
        kept.append(checks.part(store_part, f"MHA {layout}", lambda: mha_host(layout), False))
    for layout in ("page_first", "page_first_direct", "layer_first"):
        kept.append(checks.part(store_part, f"MLA {layout}", lambda: mla_host(layout), True))
    kept.append(
        checks.part(
            lambda: store_part(
                "MHA pp", lambda: mha_host("page_first"), False, pp_rank=1, pp_size=2, tp_rank=1, tp_size=2
            )
        )
    )
    if kept[0]:
        checks.part(single_part, *kept[0])
    checks.part(split_part)
    checks.part(groups_part)
    checks.part(hybrid_part)
    checks.part(settings_part, int(sys.argv[2]))
    checks.part(standalone_part)
    checks.part(standalone_client_part)
    checks.part(embedding_part)
    checks.part(controller_part)
    checks.part(linker_part)
    checks.absorb(another("reader", MASTER), "second instance")
    checks.part(engine_part)
    checks.part(pd_part)
    checks.part(weights_part)
    checks.part(reuse_part)
    checks.part(loss_part)
    if kept[0]:
        checks.part(clear_part, kept[0][0], [f"store, MHA page_first: {i}" for i in range(10)])
    checks.finish()


if __name__ == "__main__":
    main()
