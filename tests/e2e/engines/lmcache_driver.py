"""LMCache's own Mooncake classes on our module: `lmcache_driver.py MASTER` (HOST:PORT of a running master).

Everything of LMCache is the installed package. Only the accelerator is ours: `Accelerator` copies between a tensor of
this process and LMCache's chunks, in the place of the CUDA kernels.
"""

import asyncio
import json
import os
import socket
import sys
import tempfile
import threading
import time

# The keys hold Python's hash of the tokens, and both processes have to agree on it.
assert os.environ.get("PYTHONHASHSEED") == "0", "run this through tests/e2e/engines/run"

import torch
from checks import Checks, OwnMaster, another, reply, within
from lmcache.utils import CacheEngineKey
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.transfer_channel.api import TransferChannelAddress
from lmcache.v1.distributed.transfer_channel.factory import create_transfer_channel_context
from lmcache.v1.distributed.transfer_channel.impl import mooncake_te_impl
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.lookup_client.factory import LookupClientFactory
from lmcache.v1.lookup_client.mooncake_lookup_client import MooncakeLookupClient
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import CreateConnector
from lmcache.v1.storage_backend.connector.mooncakestore_connector import MooncakestoreConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.remote_backend import RemoteBackend

LAYERS, HEADS, WIDTH, CHUNK = 4, 4, 64, 256
CHUNK_BYTES = 2 * LAYERS * CHUNK * HEADS * WIDTH * 2
TOKENS = 4 * CHUNK + 100
CONNECTOR = "connector-model"
checks = Checks("LMCache")


def metadata(model, mla=False):
    return LMCacheMetadata(
        model_name=model,
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 1 if mla else 2, CHUNK, HEADS, WIDTH),
        use_mla=mla,
        role="worker",
        chunk_size=CHUNK,
        engine_id="engine",
    )


def config(master, save_chunk_meta, segment=64 << 20, **more):
    extra = {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "global_segment_size": segment,
        "local_buffer_size": 16 << 20,
        "protocol": "tcp",
        "device_name": "",
        "master_server_address": master,
        "transfer_timeout": 10,
        "save_chunk_meta": save_chunk_meta,
        **more.pop("extra", {}),
    }
    return LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK,
        local_cpu=False,
        max_local_cpu_size=0.25,
        remote_url=f"mooncakestore://{master}/",
        remote_serde="naive",
        extra_config=extra,
        **more,
    )


def key(number, model=CONNECTOR):
    return CacheEngineKey(model, 1, 0, number, torch.bfloat16)


def pattern(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def chunk(backend, seed, tokens=CHUNK, mla=False):
    """A chunk from LMCache's own allocator, filled so that every byte depends on the seed."""
    shape = torch.Size([1 if mla else 2, LAYERS, tokens, HEADS * WIDTH])
    memory = backend.allocate([shape], [torch.bfloat16], MemoryFormat.KV_MLA_FMT if mla else MemoryFormat.KV_2LTD)
    memory.tensor.copy_(pattern(seed, shape))
    return memory


def same(memory, seed, tokens=CHUNK, mla=False):
    shape = torch.Size([1 if mla else 2, LAYERS, tokens, HEADS * WIDTH])
    return memory is not None and memory.tensor.shape == shape and torch.equal(memory.tensor, pattern(seed, shape))


def loop():
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def ran(coroutine, on):
    return asyncio.run_coroutine_threadsafe(coroutine, on).result(60)


def used(backend):
    """Chunks that are still taken from LMCache's pinned memory."""
    return backend.memory_allocator.pin_allocator.num_active_allocations


def connector_part(master, base, save_chunk_meta, mla=False, **more):
    """MooncakestoreConnector behind CreateConnector, as RemoteBackend makes it."""
    what = f"connector, save_chunk_meta={save_chunk_meta}, mla={mla}, {more}: "
    settings, about, on = config(master, save_chunk_meta, **more), metadata(CONNECTOR, mla), loop()
    backend = LocalCPUBackend(settings, about, "cpu")
    outer = CreateConnector(settings.remote_url, on, backend, settings, about)
    inner = outer.getWrappedConnector()
    checks.equal(what + "class", type(inner), MooncakestoreConnector)
    checks.equal(what + "registered", inner.registered_buffer_ptr, backend.memory_allocator.buffer.data_ptr())
    keys = [key(base + i) for i in range(8)]
    # Absent first: every kind of question.
    checks.true(what + "exists before", not ran(outer.exists(keys[0]), on))
    checks.true(what + "exists_sync before", not outer.exists_sync(keys[0]))
    checks.equal(what + "hits before", ran(outer.batched_async_contains("id", keys), on), 0)
    checks.equal(what + "batched_get before", ran(outer.batched_get(keys[:2]), on), [None, None])
    checks.equal(what + "nothing leaks at a miss", used(backend), 0)
    # One, then a batch, then one chunk that is not full.
    ran(outer.put(keys[0], chunk(backend, base, mla=mla)), on)
    ran(outer.batched_put(keys[1:6], [chunk(backend, base + i, mla=mla) for i in range(1, 6)]), on)
    ran(outer.batched_put([keys[6]], [chunk(backend, base + 6, 100, mla)]), on)
    checks.equal(what + "puts give their chunks back", used(backend), 0)
    checks.true(what + "exists", ran(outer.exists(keys[0]), on))
    checks.equal(what + "exists_sync", [bool(outer.exists_sync(k)) for k in keys], [True] * 7 + [False])
    checks.equal(what + "hits", ran(outer.batched_async_contains("id", keys), on), 7)
    got = ran(outer.batched_get(keys), on)
    checks.equal(what + "batched_get length", len(got), 8)
    for i in range(6):
        checks.true(what + f"bytes of chunk {i}", same(got[i], base + i, mla=mla))
    checks.true(what + "bytes of the short chunk", same(got[6], base + 6, 100, mla))
    checks.equal(what + "absent among present", got[7], None)
    for memory in got[:7]:
        memory.ref_count_down()
    # A key that is there keeps its first value.
    ran(outer.put(keys[0], chunk(backend, base + 77, mla=mla)), on)
    again = ran(outer.batched_get(keys[:1]), on)[0]
    checks.true(what + "the first value stays", same(again, base, mla=mla))
    again.ref_count_down()
    # The same from many threads of the loop at once.
    many = [asyncio.run_coroutine_threadsafe(outer.batched_get(keys[:7]), on) for _ in range(8)]
    fine = 0
    for future in many:
        for i, memory in enumerate(future.result(60)):
            fine += same(memory, base + i, 100 if i == 6 else CHUNK, mla)
            memory.ref_count_down()
    checks.equal(what + "chunks of eight gets at once", fine, 56)
    checks.equal(what + "gets give their chunks back", used(backend), 0)
    return outer, backend, on, inner


def remote_backend_part(master):
    """RemoteBackend, the caller of the connector: its keys' life in `put_tasks` depends on our puts ending."""
    settings, about, on = config(master, False), metadata("remote-model"), loop()
    backend = LocalCPUBackend(settings, about, "cpu")
    remote = RemoteBackend(settings, about, on, backend, "cpu")
    checks.true("RemoteBackend: connected", remote.connection is not None)
    keys = [key(i, "remote-model") for i in range(6)]
    checks.equal("RemoteBackend: contains before", remote.contains(keys[0]), False)
    done = []
    objects = [chunk(backend, 500 + i) for i in range(5)]
    remote.batched_submit_put_task(keys[:5], objects, on_complete_callback=done.append)
    remote.submit_put_task(keys[5], chunk(backend, 505), on_complete_callback=done.append).result(30)
    checks.equal("RemoteBackend: completed puts", within(30, lambda: len(done), 6), 6)
    checks.equal("RemoteBackend: failed puts", remote.put_failed_count, 0)
    checks.equal("RemoteBackend: contains", [bool(remote.contains(k)) for k in keys], [True] * 6)
    checks.equal("RemoteBackend: batched_contains", remote.batched_contains([*keys, key(99, "remote-model")]), 6)
    got = remote.batched_get_blocking(keys)
    checks.equal("RemoteBackend: bytes", [same(m, 500 + i) for i, m in enumerate(got)], [True] * 6)
    for memory in got:
        memory.ref_count_down()
    checks.equal("RemoteBackend: failed gets", remote.get_blocking_failed_count, 0)
    hits = ran(remote.batched_async_contains("id", [*keys, key(99, "remote-model")]), on)
    checks.equal("RemoteBackend: batched_async_contains", hits, 6)
    remote.close()


class Accelerator(GPUConnectorInterface):
    """The KV cache of a model that is not there: one tensor, [2, layers, tokens, width], copied by slices."""

    def from_gpu(self, memory_obj, start, end, **kwargs):
        memory_obj.tensor.copy_(kwargs["kv"][:, :, start:end])

    def to_gpu(self, memory_obj, start, end, **kwargs):
        kwargs["kv"][:, :, start:end].copy_(memory_obj.tensor)

    def batched_from_gpu(self, memory_objs, starts, ends, **kwargs):
        for memory, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory, start, end, **kwargs)

    def batched_to_gpu(self, memory_objs=None, starts=None, ends=None, **kwargs):
        for memory, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory, start, end, **kwargs)

    def get_shape(self, num_tokens):
        return torch.Size([2, LAYERS, num_tokens, HEADS * WIDTH])


def engine_of(master, name, save_chunk_meta, model):
    settings = config(master, save_chunk_meta, lmcache_instance_id=name, save_unfull_chunk=True)
    engine = LMCacheEngineBuilder.get_or_create(
        name, settings, metadata(model), Accelerator(), lambda tensor, rank: None, lambda thing, rank: thing
    )
    engine.post_init()
    return engine


def kv_of(model):
    return pattern(len(model), (2, LAYERS, TOKENS, HEADS * WIDTH))


MODELS = {"engine-meta": True, "engine-bare": False}


def engine_part(master):
    """LMCacheEngine.store of a prompt, which a second process then looks up and retrieves."""
    for model, save_chunk_meta in MODELS.items():
        engine = engine_of(master, model, save_chunk_meta, model)
        tokens, kv = list(range(TOKENS)), kv_of(model)
        checks.equal(f"{model}: lookup before", engine.lookup(tokens), 0)
        engine.store(tokens, kv=kv)
        checks.equal(f"{model}: lookup", within(30, lambda: engine.lookup(tokens), TOKENS), TOKENS)
        back = torch.zeros_like(kv)
        mask = engine.retrieve(tokens, kv=back)
        checks.equal(f"{model}: tokens retrieved", int(mask.sum()), TOKENS)
        checks.true(f"{model}: bytes retrieved", torch.equal(back, kv))


def lookup_part(master):
    """The scheduler's side: MooncakeLookupClient asks the master how much of a prompt is there."""
    settings = config(master, True, save_unfull_chunk=True, external_lookup_client=f"mooncakestore://{master}")
    client = LookupClientFactory.create_lookup_client(settings, metadata("engine-meta"))
    checks.equal("lookup client: class", type(client), MooncakeLookupClient)
    tokens = list(range(TOKENS))
    checks.equal("lookup client: all", client.lookup(tokens), TOKENS)
    checks.equal("lookup client: a tensor", client.lookup(torch.tensor(tokens)), TOKENS)
    checks.equal("lookup client: a prefix", client.lookup(tokens[: 2 * CHUNK] + [9] * CHUNK), 2 * CHUNK)
    checks.equal("lookup client: nothing", client.lookup([5] * TOKENS), 0)
    checks.equal("lookup client: no tokens", client.lookup([]), 0)
    client.close()


def file_part(master):
    """The configuration from MOONCAKE_CONFIG_PATH, keys with LMCache's prefix, a binding to a NUMA node."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(
            {
                "mooncake_local_hostname": "127.0.0.1",
                "mooncake_metadata_server": "P2PHANDSHAKE",
                "mooncake_global_segment_size": 0,
                "mooncake_local_buffer_size": 16 << 20,
                "mooncake_protocol": "tcp",
                "mooncake_master_server_addr": master,
                "mooncake_not_invented_yet": "x",
                "transfer_timeout": 10,
            },
            file,
        )
        file.flush()
        os.environ["MOONCAKE_CONFIG_PATH"] = file.name
        settings, about, on = (
            config(master, False, numa_mode="manual", extra={"gpu_to_numa_mapping": {0: 0}}),
            metadata(CONNECTOR),
            loop(),
        )
        try:
            outer = CreateConnector(settings.remote_url, on, LocalCPUBackend(settings, about, "cpu"), settings, about)
        finally:
            del os.environ["MOONCAKE_CONFIG_PATH"]
    inner = outer.getWrappedConnector()
    checks.equal("file: upstream's spelling went through", inner.config.setup_config["master_server_addr"], master)
    checks.equal(
        "file: hits of the other connector", ran(outer.batched_async_contains("id", [key(100), key(101)]), on), 2
    )
    got = ran(outer.batched_get([key(200)]), on)[0]
    checks.true("file: bytes of the other connector", same(got, 200))
    got.ref_count_down()
    ran(outer.close(), on)


def loss_part():
    """The master goes: every call of the connector ends soon and as a miss; it comes back: the connector works again."""
    master = OwnMaster()
    settings, about, on = config(master.address, False), metadata("loss"), loop()
    backend = LocalCPUBackend(settings, about, "cpu")
    outer = CreateConnector(settings.remote_url, on, backend, settings, about)
    keys = [key(i, "loss") for i in range(4)]
    ran(outer.batched_put(keys, [chunk(backend, 700 + i) for i in range(4)]), on)
    checks.equal("loss: hits before", ran(outer.batched_async_contains("id", keys), on), 4)
    master.kill()
    began = time.time()
    checks.equal("loss: gets", ran(outer.batched_get(keys), on), [None] * 4)
    ran(outer.put(key(5, "loss"), chunk(backend, 705)), on)
    ran(outer.batched_put([key(6, "loss")], [chunk(backend, 706)]), on)
    checks.true("loss: no call waits long", time.time() - began < 10)
    checks.equal("loss: chunks given back", used(backend), 0)
    master = OwnMaster(master.port())

    def works():
        ran(outer.put(key(8, "loss"), chunk(backend, 708)), on)
        got = ran(outer.batched_get([key(8, "loss")]), on)[0]
        fine = same(got, 708)
        if got is not None:
            got.ref_count_down()
        return fine

    checks.equal("loss: works again", within(20, works, True), True)
    checks.equal("loss: unknown is a miss again", bool(outer.exists_sync(key(9, "loss"))), False)
    ran(outer.close(), on)
    master.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


REGION = 32 << 20


def region(seed):
    return torch.randint(0, 256, (REGION,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def channel(memory, port):
    return create_transfer_channel_context(
        "mooncake_te",
        L1MemoryDesc(ptr=memory.data_ptr(), size=REGION, align_bytes=4096),
        listen_url=f"127.0.0.1:{port}",
        advertise_url=f"127.0.0.1:{port}",
    )


def finished(client, task, seconds=30):
    until = time.time() + seconds
    while time.time() < until:
        result = client.query_read_status(task)
        if result.finished:
            return result.succeeded_mask
        time.sleep(0.001)
    return "not finished"


def channel_part():
    """mooncake_te_impl: this process reads from the second one's memory over the transfer engine."""
    port = free_port()
    peer = another("channel", port)
    checks.equal("channel: peer", reply(peer), "ready")
    mine = region(1)
    context = channel(mine, free_port())
    checks.equal("channel: class", type(context), mooncake_te_impl.MooncakeTeTransferChannelContext)
    client = context.get_transfer_channel_client(f"127.0.0.1:{port}")
    theirs, before = region(2), mine.clone()
    pairs = [(0, 4096, 100), (1 << 20, 2 << 20, 1 << 20), (5 << 20, 9 << 20, 3), (16 << 20, 8 << 20, 8 << 20)]
    to = context.get_transfer_channel_address([(a, n) for a, _, n in pairs])
    source = context.get_transfer_channel_address([(b, n) for _, b, n in pairs])
    checks.equal("channel: read", finished(client, client.submit_read(to, source)), [True] * 4)
    for a, b, n in pairs:
        before[a : a + n] = theirs[b : b + n]
    checks.true("channel: bytes, and nothing beside them", torch.equal(mine, before))
    tasks = [
        client.submit_read(
            [TransferChannelAddress(i << 16, 1 << 16)], [TransferChannelAddress((63 - i) << 16, 1 << 16)]
        )
        for i in range(64)
    ]
    checks.equal("channel: 64 reads at once", [finished(client, t) for t in tasks], [[True]] * 64)
    expected = theirs[: 4 << 20].reshape(64, -1).flip(0).reshape(-1)
    checks.true("channel: bytes of 64 reads", torch.equal(mine[: 4 << 20], expected))
    wrong = client.submit_read([TransferChannelAddress(0, 4096)], [TransferChannelAddress(REGION - 100, 4096)])
    checks.equal("channel: a read beyond the peer's memory", finished(client, wrong), [False])
    # The peer reads from here now, over the connection that this process opened.
    print("go", file=peer.stdin, flush=True)
    checks.equal("channel: peer has read", reply(peer), "read")
    print("leave", file=peer.stdin, flush=True)
    checks.absorb(peer, "channel: peer")
    try:
        gone = finished(
            client, client.submit_read([TransferChannelAddress(0, 4096)], [TransferChannelAddress(0, 4096)])
        )
    except RuntimeError:
        gone = [False]  # a refused submission is the other way of its contract
    checks.equal("channel: a peer that left", gone, [False])
    context.close()


def as_channel(port):
    memory = region(2)
    context = channel(memory, port)
    print("ready", flush=True)
    sys.stdin.readline()
    checks.equal("peer: clients", context.get_num_connected_clients(), 1)
    (client,) = context._clients.values()
    at = [TransferChannelAddress(24 << 20, 1 << 20)]
    checks.equal("peer: read back", finished(client, client.submit_read(at, at)), [True])
    checks.true("peer: bytes", torch.equal(memory[24 << 20 : 25 << 20], region(1)[24 << 20 : 25 << 20]))
    print("read", flush=True)
    sys.stdin.readline()
    context.close()


def as_reader(master):
    """The second instance: it has stored nothing and finds everything that the first did."""
    for model, save_chunk_meta in MODELS.items():
        engine = engine_of(master, model, save_chunk_meta, model)
        tokens, kv = list(range(TOKENS)), kv_of(model)
        checks.equal(f"second instance, {model}: lookup", engine.lookup(tokens), TOKENS)
        checks.equal(
            f"second instance, {model}: lookup of a prefix", engine.lookup(tokens[:CHUNK] + [7] * CHUNK), CHUNK
        )
        back = torch.zeros_like(kv)
        mask = engine.retrieve(tokens, kv=back)
        checks.equal(f"second instance, {model}: tokens", int(mask.sum()), TOKENS)
        checks.true(f"second instance, {model}: bytes", torch.equal(back, kv))
    for base, save_chunk_meta in ((100, True), (200, False)):
        settings, about, on = config(master, save_chunk_meta), metadata(CONNECTOR), loop()
        backend = LocalCPUBackend(settings, about, "cpu")
        outer = CreateConnector(settings.remote_url, on, backend, settings, about)
        keys = [key(base + i) for i in range(8)]
        checks.equal(f"second instance, {base}: hits", ran(outer.batched_async_contains("id", keys), on), 7)
        got = ran(outer.batched_get(keys), on)
        fine = [same(m, base + i, 100 if i == 6 else CHUNK) for i, m in enumerate(got[:7])]
        checks.equal(f"second instance, {base}: bytes", fine, [True] * 7)
        checks.equal(f"second instance, {base}: absent", got[7], None)
        for memory in got[:7]:
            memory.ref_count_down()
        ran(outer.close(), on)


def main():
    if sys.argv[1] == "channel":
        checks.part(as_channel, int(sys.argv[2]))
        checks.tell()
        os._exit(0)
    if sys.argv[1] == "reader":
        checks.part(as_reader, sys.argv[2])
        checks.tell()
        os._exit(0)
    master = sys.argv[1]
    parts = [
        checks.part(connector_part, master, 100, True),
        checks.part(connector_part, master, 200, False),
        checks.part(connector_part, master, 300, False, True),
        checks.part(lambda: connector_part(master, 400, False, extra={"mooncake_prefer_local_alloc": True})),
    ]
    preferring = parts[3]
    if preferring:
        store = preferring[3].store
        ends = {
            store.get_replica_desc(key(400 + i).to_string())[0]
            .get_memory_descriptor()
            .buffer_descriptor.transport_endpoint
            for i in range(7)
        }
        checks.equal("connector, prefer_local_alloc: where the chunks are", ends, {store.get_hostname()})
    checks.part(remote_backend_part, master)
    checks.part(engine_part, master)
    checks.part(lookup_part, master)
    checks.part(file_part, master)
    checks.absorb(another("reader", master), "second instance")
    checks.part(channel_part)
    checks.part(loss_part)
    for part in parts:
        if part:
            outer, _, on, inner = part
            ran(outer.close(), on)
            checks.equal("connector: unregistered at close", inner.registered_buffer_ptr, None)
    checks.finish()


if __name__ == "__main__":
    main()
