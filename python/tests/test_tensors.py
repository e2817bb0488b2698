"""The tensor family of `mooncake.store`: upstream's names, answers and stored bytes, and what wrong input comes to.

The literal bytes are what Mooncake 0.3.13.post1 stores.
"""

import ctypes
import inspect
import json
import mmap
import os
import struct
import time
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import mooncake.store as module  # noqa: E402
from mooncake.store import (  # noqa: E402
    MooncakeDistributedStore,
    ParallelAxis,
    ReadTarget,
    ReplicateConfig,
    TensorParallelism,
)

HEADER = 304
FLOATS = torch.arange(24, dtype=torch.float32).reshape(4, 6)
CUBE = torch.arange(8 * 12 * 6, dtype=torch.int32).reshape(8, 12, 6)
DTYPES = """float32 float64 int8 uint8 int16 uint16 int32 uint32 int64 uint64 bool float16 bfloat16 float8_e4m3fn
float8_e5m2""".split()
REST = "ff" * 8
WHOLE = f"""4e4f4f4d 0100 3001 00000000 03000000 00000000 00000000 3001000000000000 6000000000000000
0200000000000000 0300000000000000 0400000000000000 {REST * 5}
0200000000000000 0300000000000000 0400000000000000 {REST * 5}
00000000 00000000 {"00" * 128}"""
SHARD = f"""4e4f4f4d 0100 3001 06000000 03000000 01000000 00000000 3001000000000000 4002000000000000
0800000000000000 0c00000000000000 0600000000000000 {REST * 5}
0800000000000000 0300000000000000 0600000000000000 {REST * 5}
04000000 00000000
00000000 00000000 01000000 02000000 ffffffff 00000000 0000000000000000
01000000 01000000 01000000 04000000 01000000 00000000 0300000000000000
02000000 02000000 00000000 04000000 ffffffff 07000000 0000000000000000
03000000 03000000 02000000 03000000 ffffffff 05000000 0000000000000000"""
MANIFEST = f"""4e414d57 0100 6000 06000000 03000000 01000000 04000000 00000000 00000000
0800000000000000 0c00000000000000 0600000000000000 {REST * 5}"""
# Names and parameters of upstream's binding.
UPSTREAM = """
put_tensor key tensor|pub_tensor key tensor config|upsert_tensor key tensor|upsert_pub_tensor key tensor config
batch_put_tensor keys tensors_list|batch_pub_tensor keys tensors_list config|batch_upsert_tensor keys tensors_list
batch_upsert_pub_tensor keys tensors_list config|get_tensor key|batch_get_tensor keys
put_tensor_from key buffer_ptr size|upsert_tensor_from key buffer_ptr size
batch_put_tensor_from keys buffer_ptrs sizes|batch_upsert_tensor_from keys buffer_ptrs sizes
get_tensor_into key buffer_ptr size|batch_get_tensor_into keys buffer_ptrs sizes
get_tensor_into_cuda key tensor|batch_get_tensor_into_cuda keys tensors_list
put_tensor_with_tp key tensor tp_rank tp_size split_dim|pub_tensor_with_tp key tensor config tp_rank tp_size split_dim
batch_put_tensor_with_tp base_keys tensors_list tp_rank tp_size split_dim
batch_pub_tensor_with_tp base_keys tensors_list config tp_rank tp_size split_dim
put_tensor_with_tp_from key buffer_ptr size tp_rank tp_size split_dim
batch_put_tensor_with_tp_from base_keys buffer_ptrs sizes tp_rank tp_size split_dim
get_tensor_with_tp key tp_rank tp_size split_dim|batch_get_tensor_with_tp base_keys tp_rank tp_size
get_tensor_with_tp_into key buffer_ptr size tp_rank tp_size split_dim
batch_get_tensor_with_tp_into base_keys buffer_ptrs sizes tp_rank tp_size
put_tensor_with_parallelism key tensor parallelism config writer_partition
upsert_tensor_with_parallelism key tensor parallelism config writer_partition
batch_put_tensor_with_parallelism keys tensors_list parallelisms config writer_partitions
batch_upsert_tensor_with_parallelism keys tensors_list parallelisms config writer_partitions
put_tensor_with_parallelism_from key buffer_ptr size parallelism config writer_partition
upsert_tensor_with_parallelism_from key buffer_ptr size parallelism config writer_partition
batch_put_tensor_with_parallelism_from keys buffer_ptrs sizes parallelisms config writer_partitions
batch_upsert_tensor_with_parallelism_from keys buffer_ptrs sizes parallelisms config writer_partitions
get_tensor_with_parallelism key target|batch_get_tensor_with_parallelism keys targets
get_tensor_with_parallelism_into key buffer_ptr size target
batch_get_tensor_with_parallelism_into keys buffer_ptrs sizes targets
save_tensor_to_safetensor key file_name|load_tensor_from_safetensor key file_name
"""


@pytest.fixture
def buffer(store):
    memory = mmap.mmap(-1, 1 << 18)
    made = SimpleNamespace(bytes=memory, ptr=ctypes.addressof(ctypes.c_char.from_buffer(memory)), size=len(memory))
    assert store.register_buffer(made.ptr, made.size) == 0
    yield made
    assert store.unregister_buffer(made.ptr) == 0


def axis(kind, rank, size, **more):
    return ParallelAxis(kind=kind, rank=rank, size=size, **more)


def tp(rank, size, split_dim):
    return TensorParallelism([axis("tp", rank, size, split_dim=split_dim)])


def mixed(rank, size, split_dim, backwards=False):
    axes = [
        axis("dp", 1, 2),
        axis("tp", rank, size, split_dim=split_dim),
        axis("ep", 0, 4, expert_id=7),
        axis("pp", 2, 3, stage_id=5),
    ]
    return TensorParallelism(axes[::-1] if backwards else axes)


def writer(rank, size, split_dim):
    return SimpleNamespace(rank=rank, size=size, split_dim=split_dim)


def full(parallelism=None):
    return ReadTarget("full", parallelism)


def shard(parallelism):
    return ReadTarget("shard", parallelism)


def config(**fields):
    made = ReplicateConfig()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def same(left, right):
    """Equal in shape, dtype and bytes."""
    return left.dtype == right.dtype and left.shape == right.shape and data(left) == data(right)


def data(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def part(tensor, rank, size, split_dim):
    return tensor.chunk(size, dim=split_dim)[rank]


def test_names():
    for line in UPSTREAM.replace("\n", "|").split("|"):
        if line:
            name, *wanted = line.split()
            assert list(inspect.signature(getattr(MooncakeDistributedStore, name)).parameters)[1:] == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(store, dtype):
    tensor = torch.arange(24).to(getattr(torch, dtype)).reshape(2, 3, 4)
    assert store.put_tensor("t", tensor) == 0 and same(store.get_tensor("t"), tensor)
    assert struct.unpack_from("<i", store.get("t"), 8)[0] == DTYPES.index(dtype)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (1, 2) * 4, (7, 5)])
def test_shapes(store, shape):
    tensor = torch.ones(shape)
    assert store.put_tensor("t", tensor) == 0 and same(store.get_tensor("t"), tensor)


def test_stored_bytes(store):
    tensor = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    assert store.put_tensor("t", tensor) == 0 and store.get("t") == bytes.fromhex(WHOLE) + data(tensor)
    assert store.put_tensor_with_parallelism("m", CUBE, mixed(1, 4, 1)) == 0
    key = "m__dp_1of2__tp_1of4_sd1__ep_0of4_eid7__pp_2of3_sid5"
    assert store.get(key) == bytes.fromhex(SHARD) + data(part(CUBE, 1, 4, 1))
    assert store.get("m__parallelism_manifest") == bytes.fromhex(MANIFEST)


def test_kinds_of_tensors(store):
    assert store.put_tensor("view", FLOATS.t()[1:]) == 0 and same(store.get_tensor("view"), FLOATS.t()[1:])
    assert store.put_tensor("leaf", torch.nn.Parameter(FLOATS)) == 0 and same(store.get_tensor("leaf"), FLOATS)
    negative = torch.imag(torch.tensor([1 + 2j]).conj())
    assert store.put_tensor("lazy", negative) == 0 and store.get_tensor("lazy").item() == -2
    gone = torch.zeros(9)
    gone.untyped_storage().resize_(0)
    refused = [[1.0], None, torch.zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.zeros((1,) * 9)]
    for wrong in [*refused, torch.zeros(3, device="meta"), gone]:
        assert store.put_tensor("wrong", wrong) == store.put_tensor_with_tp("wrong", wrong, 0, 3) == -600
        assert store.put_tensor_with_parallelism("wrong", wrong, tp(0, 1, 0)) == -600
    assert store.get_tensor("wrong") is None
    store.get_tensor("view").zero_()
    assert same(store.get_tensor("view"), FLOATS.t()[1:]), "what was read is the caller's own"


def test_put_keeps_and_upsert_replaces(store):
    assert store.put_tensor("t", FLOATS) == 0 and store.put_tensor("t", CUBE) == 0
    assert same(store.get_tensor("t"), FLOATS)
    assert store.upsert_tensor("t", CUBE) == 0 and same(store.get_tensor("t"), CUBE)
    assert store.upsert_pub_tensor("t", FLOATS, config(replica_num=1)) == 0 and same(store.get_tensor("t"), FLOATS)
    assert store.batch_upsert_tensor(["t", "u"], [CUBE, FLOATS]) == [0, 0] and same(store.get_tensor("t"), CUBE)
    assert store.batch_upsert_pub_tensor(keys=["u"], tensors_list=[CUBE]) == [0] and same(store.get_tensor("u"), CUBE)


def test_batches(store):
    assert store.batch_put_tensor(["a", "b", "c"], [FLOATS, "text", CUBE]) == [0, -600, 0]
    a, b, c = store.batch_get_tensor(["a", "b", "c"])
    assert same(a, FLOATS) and b is None and same(c, CUBE)
    assert store.batch_put_tensor(["a", "b"], [FLOATS]) == [-600, -600] and store.batch_put_tensor([], []) == []
    with pytest.raises(TypeError):
        store.batch_put_tensor("keys", [FLOATS] * 4)


def test_configurations(store):
    torn = config(preferred_segments=["a", "b"])
    grouped = config(group_ids=["g", "h"], soft_pin_action=2, host_id="x")
    assert store.pub_tensor("a", FLOATS, torn) == -600 and store.batch_pub_tensor(["a"], [FLOATS], torn) == [-600]
    assert store.pub_tensor("a", FLOATS, grouped) == -600, "two groups, one object"
    assert store.batch_pub_tensor(["a", "b"], [FLOATS, FLOATS], grouped) == [0, 0]
    assert store.batch_pub_tensor(["a"], [FLOATS], grouped) == [-600]
    assert store.pub_tensor_with_tp("c", FLOATS, grouped, 0, 2) == 0, "a group per shard"
    assert store.batch_pub_tensor_with_tp(["d", "e"], [FLOATS] * 2, grouped, 0, 4) == [0, 0], "a group per key"
    assert store.batch_put_tensor_with_parallelism(["f", "g"], [CUBE] * 2, [tp(0, 2, 0), None], grouped) == [0, 0]
    with pytest.raises(TypeError):
        store.pub_tensor("a", FLOATS, config="fast")


def test_into_and_from(store, buffer):
    assert store.put_tensor("t", FLOATS) == 0
    size = HEADER + FLOATS.nbytes
    got = store.get_tensor_into("t", buffer.ptr, buffer.size)
    assert same(got, FLOATS) and got.data_ptr() == buffer.ptr + HEADER and buffer.bytes[:size] == store.get("t")
    assert store.put_tensor_from("u", buffer.ptr, size) == 0 and same(store.get_tensor("u"), FLOATS)
    assert store.upsert_tensor_from("u", buffer.ptr, size) == 0
    assert store.batch_put_tensor_from(["v", "w"], [buffer.ptr] * 2, [size] * 2) == [0, 0]
    assert store.batch_upsert_tensor_from(["v"], [buffer.ptr], [size]) == [0]
    assert store.batch_put_tensor_from(["x", "y"], [buffer.ptr] * 2, [size, size - 1]) == [-600] * 2, "all or nothing"
    assert store.get_tensor("x") is None
    first, none = store.batch_get_tensor_into(["t", "none"], [buffer.ptr, buffer.ptr + 4096], [4096, 4096])
    assert same(first, FLOATS) and none is None
    assert store.batch_get_tensor_into(["t"], [buffer.ptr], []) == [-600]
    assert store.batch_get_tensor_into(["t"], [0], [4096]) == [-600]
    assert store.get_tensor_into("t", buffer.ptr, size - 1) is None


@pytest.mark.parametrize("address", [0, 0xDEAD0000, (1 << 64) - 4096])
def test_wrong_addresses(store, address):
    store.put_tensor("t", FLOATS)
    store.put_tensor_with_tp("s", FLOATS, 0, 2)
    assert store.get_tensor_into("t", address, 4096) is None
    assert store.get_tensor_with_parallelism_into("s", address, 4096, full(tp(0, 2, 0))) is None
    for call in (store.put_tensor_from, store.upsert_tensor_from, store.put_tensor_with_parallelism_from):
        assert call("w", address, 4096) == -600
    assert store.put_tensor_with_tp_from("w", address, 4096, 0, 2) == -600
    assert store.put_tensor_with_parallelism_from("w", address, 4096, tp(0, 2, 0)) == -600
    assert store.batch_put_tensor_with_tp_from(["w"], [address], [4096], 0, 2) == [-600]


@pytest.mark.parametrize(
    "at, kind, value",
    [
        *[(0, "I", 1), (4, "H", 2), (6, "H", 40), (8, "i", 15), (8, "i", -1), (12, "i", 9), (12, "i", -1)],
        *[(16, "I", 2), (24, "Q", 303), (24, "Q", 312), (24, "Q", 1 << 63), (32, "Q", 95), (32, "Q", (1 << 64) - 1)],
        *[(40, "q", -1), (56, "q", 3), (104, "q", 5), (104, "q", 1 << 62), (112, "q", -6), (120, "q", 3)],
        *[(12, "i", 1), (168, "I", 5), (168, "I", 1)],
    ],
)
def test_lying_headers(store, buffer, at, kind, value):
    store.put_tensor("t", FLOATS)
    raw = bytearray(store.get("t"))
    struct.pack_into("<" + kind, raw, at, value)
    assert store.put("raw", raw) == 0 and store.get_tensor("raw") is None
    assert store.get_tensor_into("raw", buffer.ptr, buffer.size) is None
    assert store.get_tensor_with_parallelism("raw") is None and store.batch_get_tensor(["raw"]) == [None]
    assert store.put("lie_tp_0", raw) == 0 and store.get_tensor_with_parallelism("lie", full(tp(0, 1, 0))) is None
    buffer.bytes[: len(raw)] = raw
    assert store.put_tensor_from("again", buffer.ptr, len(raw)) == -600


def test_data_further_back(store):
    """Upstream writes the data right behind the header, and reads it where the header says."""
    store.put_tensor("t", FLOATS)
    for gap in (8, 1):
        raw = bytearray(store.get("t"))
        struct.pack_into("<Q", raw, 24, HEADER + gap)
        raw[HEADER:HEADER] = bytes(gap)
        assert store.put(f"gap{gap}", raw) == 0
    assert same(store.get_tensor("gap8"), FLOATS)
    assert store.get_tensor("gap1") is None, "not aligned"


def test_a_zero_among_huge_sizes(store):
    raw = bytearray(bytes.fromhex(WHOLE))
    struct.pack_into("<Q", raw, 32, 0)
    for shape_at in (40, 104):
        struct.pack_into("<3q", raw, shape_at, 0, (1 << 63) - 1, (1 << 63) - 1)
    assert store.put("t", raw) == 0 and store.get_tensor("t") is None


@pytest.mark.parametrize(
    "dims, split_dim, count, shape",
    [
        *[(1, 0, (1 << 31) - 1, (0,)), (2, 0, 4096, (1 << 50, 1 << 12)), (2, 0, 2, (1 << 60, 1 << 60))],
        *[(9, 0, 2, (8,)), (1, 1, 2, (8,)), (1, -1, 2, (8,)), (1, 0, 0, (8,)), (1, 0, -2, (8,))],
        *[(1, 0, 3, (8,)), (1, 0, 2, (-8,)), (1, 0, 2, (16,)), (0, 0, 1, ()), (1, 0, 1 << 18, (1 << 18,))],
    ],
)
def test_lying_manifests(store, buffer, dims, split_dim, count, shape):
    sizes = (*shape, *[-1] * (8 - len(shape)))
    raw = struct.pack("<IHHiiiii4x8q", 0x574D414E, 1, 96, 3, dims, split_dim, count, 0, *sizes)
    for suffix in ("__parallelism_manifest", "__writer_manifest"):
        assert store.put("k" + suffix, raw) == 0
    for rank in range(2):
        store.put_tensor_with_parallelism("other", torch.zeros(4, dtype=torch.uint8), tp(rank, 2, 0))
        store.put(f"k_tp_{rank}", store.get(f"other_tp_{rank}")[:-1])
    start = time.monotonic()
    for target in (full(), full(tp(0, 2, 0)), shard(tp(0, 4, 0))):
        assert store.get_tensor_with_parallelism("k", target) is None
        assert store.get_tensor_with_parallelism_into("k", buffer.ptr, buffer.size, target) is None
    assert time.monotonic() - start < 5


def test_shards_that_do_not_belong(store, buffer):
    whole = torch.arange(8)
    for rank in range(2):
        store.put_tensor_with_parallelism("k", part(whole, rank, 2, 0), tp(rank, 2, 0))
        store.put_tensor_with_tp("old", whole, 0, 2)
    store.put_tensor_with_tp("type", whole.float(), 0, 2)
    store.put_tensor_with_tp("shape", whole.reshape(2, 4), 0, 2)
    store.put_tensor_with_tp("longer", torch.arange(16), 0, 2)
    store.put_tensor("plain", part(whole, 1, 2, 0))
    target = full(tp(0, 2, 0))
    assert same(store.get_tensor_with_parallelism("k", target), whole)
    for wrong in ("k_tp_0", "type_tp_1", "shape_tp_1", "longer_tp_1", "plain"):
        for key in ("k", "old"):
            assert store.upsert(key + "_tp_1", store.get(wrong)) == 0
            assert store.get_tensor_with_parallelism(key, target) is None
            assert store.get_tensor_with_parallelism_into(key, buffer.ptr, buffer.size, target) is None


@pytest.mark.parametrize("rank, size, split_dim", [(0, 2, 0), (1, 3, 1), (3, 4, 0), (0, 1, 0)])
def test_tensor_parallelism(store, buffer, rank, size, split_dim):
    at = (rank, size, split_dim)
    wanted = part(FLOATS, *at)
    assert store.put_tensor_with_tp("t", FLOATS, *at) == 0 and same(store.get_tensor_with_tp("t", *at), wanted)
    assert store.is_exist(f"t_tp_{size - 1}") == (size > 1) and store.is_exist("t") == (size == 1)
    assert same(store.get_tensor_with_tp_into("t", buffer.ptr, buffer.size, *at), wanted)
    store.put_tensor("whole", FLOATS)
    store.get_tensor_into("whole", buffer.ptr, buffer.size)
    length = HEADER + FLOATS.nbytes
    assert store.put_tensor_with_tp_from("u", buffer.ptr, length, *at) == 0
    assert same(store.get_tensor_with_tp("u", *at), wanted)
    codes = store.batch_put_tensor_with_tp_from(["v", "w"], [buffer.ptr] * 2, [length, length - 1], *at)
    assert codes == ([0, -600] if size > 1 else [-600, -600])
    assert store.batch_put_tensor_with_tp(["x", "y"], [FLOATS, None], *at) == [0, -600]
    found = store.batch_get_tensor_with_tp(["x", "y"], rank, size)
    assert same(found[0], wanted) and found[1] is None
    places = [buffer.ptr, buffer.ptr + 4096]
    found = store.batch_get_tensor_with_tp_into(["x", "y"], places, [4096, 4096], rank, size)
    assert same(found[0], wanted) and found[1] is None


@pytest.mark.parametrize("size, split_dim", [(5, 0), (2, 2), (2, -1), (1 << 40, 0)])
def test_only_even_splits(store, size, split_dim):
    assert store.put_tensor_with_tp("t", FLOATS, 0, size, split_dim) == -600
    assert store.put_tensor_with_parallelism("t", FLOATS, writer_partition=writer(0, size, split_dim)) == -600
    axes = [axis("dp", 0, 1), axis("tp", 0, size, split_dim=split_dim)]
    assert store.put_tensor_with_parallelism("t", FLOATS, TensorParallelism(axes)) == -600


@pytest.mark.parametrize("size, split_dim", [(1, 0), (2, 0), (4, 1), (3, 2)])
def test_reading_another_split(store, buffer, size, split_dim):
    for rank in range(size):
        given = part(CUBE, rank, size, split_dim)
        assert store.put_tensor_with_parallelism("t", given, tp(rank, size, split_dim)) == 0
        assert store.put_tensor_with_parallelism("m", CUBE, mixed(rank, size, split_dim)) == 0
        assert store.put_tensor_with_parallelism("w", CUBE, writer_partition=writer(rank, size, split_dim)) == 0
    store.put_tensor_with_tp("old", CUBE, 0, size, split_dim)
    wanted = full(mixed(0, size, split_dim, backwards=True))
    targets = [("t", full(tp(0, size, split_dim))), ("m", wanted), ("w", full()), ("old", full(tp(0, size, split_dim)))]
    if size == 1:
        targets.pop()  # a whole object, without a layout: nothing to put together
    for key, target in targets:
        assert same(store.get_tensor_with_parallelism(key, target), CUBE)
        assert same(store.get_tensor_with_parallelism_into(key, buffer.ptr, buffer.size, target), CUBE)
        assert store.get_tensor_with_parallelism_into(key, buffer.ptr, HEADER + CUBE.nbytes - 1, target) is None
    for count in (1, 2, 4, 6):
        for key, axes in (("t", tp), ("m", mixed)):
            target = shard(axes(count - 1, count, split_dim))
            got = store.get_tensor_with_parallelism(key, target)
            if CUBE.shape[split_dim] % count:
                assert got is None
                continue
            assert same(got, part(CUBE, count - 1, count, split_dim))
            into = store.get_tensor_with_parallelism_into(key, buffer.ptr, buffer.size, target)
            assert same(into, got) and into.data_ptr() == buffer.ptr + HEADER
    assert store.get_tensor_with_parallelism("t", full(tp(0, size, (split_dim + 1) % 3))) is None
    store.remove(f"t_tp_{size - 1}", force=True)
    assert store.get_tensor_with_parallelism("t", full(tp(0, size, split_dim))) is None, "a shard is missing"


def test_empty_shards(store):
    empty = torch.zeros(4, 0, 3)
    for rank in range(2):
        axes = [axis("dp", 0, 1), axis("tp", rank, 2, split_dim=0)]
        assert store.put_tensor_with_parallelism("t", empty, TensorParallelism(axes)) == 0
    assert same(store.get_tensor_with_parallelism("t", full(TensorParallelism(axes))), empty)
    axes[1] = axis("tp", 3, 4, split_dim=0)
    assert same(store.get_tensor_with_parallelism("t", shard(TensorParallelism(axes))), empty[:1])


@pytest.mark.parametrize(
    "key, axes",
    [
        ("t__dp_1of2", [axis("DP", 1, 2)]),
        ("t__ep_0of2_eid3", [axis("ep", 0, 2, expert_id=3)]),
        ("t__dp_0of1__pp_1of4_sid9", [axis("pp", 1, 4, stage_id=9), axis("dp", 0, 1)]),
    ],
)
def test_axes_that_do_not_split(store, key, axes):
    parallelism = TensorParallelism(axes)
    assert store.put_tensor_with_parallelism("t", CUBE, parallelism) == 0 and store.is_exist(key) == 1
    assert same(store.get_tensor_with_parallelism("t", shard(parallelism)), CUBE)
    assert store.get_tensor_with_parallelism("t", full(parallelism)) is None


@pytest.mark.parametrize(
    "axes",
    [
        *[[], [axis("tp", 0, 2)], [axis("dp", 0, 2, split_dim=0)], [axis("ep", 0, 2)], [axis("pp", 0, 2)]],
        *[[axis("tp", 2, 2, split_dim=0)], [axis("tp", -1, 2, split_dim=0)], [axis("tp", 0, 0, split_dim=0)]],
        *[[axis("tp", 0, 2, split_dim=-1)], [axis("tp", 0, 2, split_dim=99)], [axis("tp", 0, 1 << 40, split_dim=0)]],
        *[[axis("xp", 0, 1)], [axis(None, 0, 1)], [axis("dp", "0", 1)], [axis("dp", 0, 1)] * 2, [None], 7],
    ],
)
def test_axes_that_make_no_sense(store, buffer, axes):
    parallelism = TensorParallelism(axes)
    assert store.put_tensor_with_parallelism("t", CUBE, parallelism) == -600
    assert store.batch_put_tensor_with_parallelism(["t"], [CUBE], [parallelism]) == [-600]
    assert store.get_tensor_with_parallelism("t", shard(parallelism)) is None
    assert store.get_tensor_with_parallelism_into("t", buffer.ptr, buffer.size, full(parallelism)) is None


def test_targets(store):
    assert ReadTarget().mode == "as_stored" and ReadTarget().parallelism is None
    plain = ParallelAxis()
    assert (plain.kind, plain.rank, plain.size, plain.split_dim, plain.expert_id) == ("", 0, 1, None, None)
    target = ReadTarget()
    target.mode = "FULL"
    assert target.mode == "full" and TensorParallelism().axes == []
    with pytest.raises(RuntimeError):
        target.mode = "half"
    store.put_tensor("t", CUBE)
    for wanted in (None, ReadTarget(), full()):
        assert same(store.get_tensor_with_parallelism("t", wanted), CUBE)
    for wanted in (shard(None), ReadTarget("as_stored", tp(0, 2, 0)), "full", SimpleNamespace(mode="half")):
        assert store.get_tensor_with_parallelism("t", wanted) is None
    store.put_tensor("plain_tp_1", CUBE)
    assert same(store.get_tensor_with_parallelism("plain", shard(tp(1, 2, 0))), CUBE), "what is there, as upstream"


def test_shards_from_a_buffer(store, buffer):
    store.put_tensor("t", CUBE)
    store.get_tensor_into("t", buffer.ptr, buffer.size)
    at = (buffer.ptr, HEADER + CUBE.nbytes)
    assert store.put_tensor_with_parallelism_from("a", *at) == 0 and same(store.get_tensor("a"), CUBE)
    assert store.put_tensor_with_parallelism_from("b", *at, tp(1, 3, 2)) == 0, "every rank's shard"
    assert same(store.get_tensor_with_parallelism("b", full(tp(0, 3, 2))), CUBE)
    assert store.put_tensor_with_parallelism_from("c", *at, mixed(0, 2, 1)) == 0
    assert same(store.get_tensor_with_parallelism("c", full(mixed(0, 2, 1))), CUBE)
    dp = TensorParallelism([axis("dp", 0, 2)])
    assert store.upsert_tensor_with_parallelism_from("d", *at, dp) == 0
    assert same(store.get_tensor_with_parallelism("d", shard(dp)), CUBE)
    for rank in range(2):
        assert store.put_tensor_with_parallelism_from("e", *at, writer_partition=writer(rank, 2, 2)) == 0
    assert same(store.get_tensor_with_parallelism("e", full()), CUBE)
    assert store.put_tensor_with_parallelism_from("f", at[0], at[1] - 1, tp(0, 2, 0)) == -600
    store.get_tensor_into("b_tp_0", buffer.ptr, buffer.size)
    length = HEADER + part(CUBE, 0, 3, 2).nbytes
    assert store.put_tensor_with_parallelism_from("g", buffer.ptr, length, tp(0, 2, 0)) == -600, "a part only"


def test_batches_of_shards(store, buffer):
    put = store.batch_put_tensor_with_parallelism
    assert put(["a", "b", "c"], [CUBE] * 3, [mixed(0, 1, 0), None, TensorParallelism()]) == [0, 0, -600]
    assert put(["d"], [CUBE], None, ReplicateConfig(), [writer(0, 1, 0)]) == [0]
    assert put(["e"], [CUBE]) == [0] and store.batch_upsert_tensor_with_parallelism(["e"], [FLOATS]) == [0]
    assert put(["f"], [CUBE], [None], None, [None]) == put(["f"], [CUBE], (None,)) == put(["f"], [CUBE], []) == [-600]
    assert put(["f"], []) == [-600]
    assert store.put_tensor_with_parallelism("f", CUBE, tp(0, 2, 0), None, writer(0, 2, 0)) == -600
    targets = [full(mixed(0, 1, 0)), None, full()]
    found = store.batch_get_tensor_with_parallelism(["a", "none", "d"], targets)
    assert same(found[0], CUBE) and found[1] is None and same(found[2], CUBE)
    assert same(store.batch_get_tensor_with_parallelism(["e"])[0], FLOATS)
    assert store.batch_get_tensor_with_parallelism(["a", "b"], [None]) == [None, None]
    places = [buffer.ptr + i * 8192 for i in range(3)]
    found = store.batch_get_tensor_with_parallelism_into(["a", "none", "d"], places, [8192] * 3, targets)
    assert same(found[0], CUBE) and found[1] is None and same(found[2], CUBE)
    assert store.batch_get_tensor_with_parallelism_into(["a"], places, [8192]) == [None]
    at = ([buffer.ptr, buffer.ptr + 16384], [HEADER + CUBE.nbytes] * 2)
    put_from = store.batch_put_tensor_with_parallelism_from
    assert put_from(["g", "h"], *at) == [0, 0] and put_from(["i", "j"], *at, [tp(0, 2, 0), None]) == [0, 0]
    assert store.batch_upsert_tensor_with_parallelism_from(["k", "l"], *at, None, None, [writer(0, 1, 0)] * 2) == [0, 0]
    assert put_from(["m", "n"], at[0], at[1][:1], [None, None]) == [-600, -600]


def test_into_cuda(store):
    class Device(torch.Tensor):
        """Stands in for memory of a device."""

        is_cuda = True

    store.put_tensor("t", FLOATS)
    target = torch.zeros_like(FLOATS).as_subclass(Device)
    assert store.get_tensor_into_cuda("t", target) == FLOATS.nbytes and (target == FLOATS).all()
    assert store.get_tensor_into_cuda("none", target) == -600
    assert store.get_tensor_into_cuda("t", torch.zeros(4, 6)) == -600, "memory of the host"
    for wrong in (torch.zeros(6, 4), torch.zeros(4, 6, dtype=torch.int32), torch.zeros(6, 4).t()):
        assert store.get_tensor_into_cuda("t", wrong.as_subclass(Device)) == -600
    assert store.get_tensor_into_cuda("t", 7) == -600
    assert store.batch_get_tensor_into_cuda(["t", "t"], [target, None]) == [FLOATS.nbytes, -600]
    assert store.batch_get_tensor_into_cuda(["t"], []) == [-600]


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors(store, tmp_path, dtype):
    tensor = torch.arange(6).to(getattr(torch, dtype)).reshape(2, 3)
    path = tmp_path / "file"
    assert store.put_tensor("kéy", tensor) == 0 and store.save_tensor_to_safetensor("kéy", path) == 0
    assert same(store.load_tensor_from_safetensor("again", str(path)), tensor), "the first one"
    assert same(store.get_tensor("again"), tensor)
    real = pytest.importorskip("safetensors.torch")
    assert path.read_bytes() == real.save({"kéy": tensor}) and same(real.load_file(path)["kéy"], tensor)


def test_safetensors_names(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "I32", "shape": [2], "data_offsets": [4, 12]},
            "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        }
    ).encode()
    with open("file", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<f2i", 1.5, 7, 8))
    assert store.load_tensor_from_safetensor("b", "file").tolist() == [7, 8]
    assert store.load_tensor_from_safetensor("other", "file").item() == 1.5 == store.get_tensor("other").item()
    assert store.load_tensor_from_safetensor(file_name="file").item() == store.get_tensor("file").item() == 1.5
    assert store.save_tensor_to_safetensor("b") == 0 and os.path.exists("b")
    assert store.save_tensor_to_safetensor("none", "x") == -1100 and not os.path.exists("x")
    for wrong in ("no/such/directory", ".", 7, "nul\0"):
        assert store.save_tensor_to_safetensor("b", wrong) == -600
        assert store.load_tensor_from_safetensor("b", wrong) is None
    store.put_tensor("__metadata__", FLOATS)
    assert store.save_tensor_to_safetensor("__metadata__", "x") == -600
    with pytest.raises(TypeError):
        store.load_tensor_from_safetensor("b")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "raw",
    [
        *[b"", b"1234567", struct.pack("<Q", (1 << 64) - 1), struct.pack("<Q", 1 << 40) + b"{}"],
        struct.pack("<Q", 2) + b"[]",
        *[{}, {"a": 7}, {"a": {}}, {"a": ENTRY | {"dtype": "C64"}}, {"a": ENTRY | {"shape": [1 << 62, 4]}}],
        *[
            {"a": ENTRY | {"shape": [1], "data_offsets": [0, 4]}},
            {"a": ENTRY | {"shape": [-1, -2]}},
            {"a": ENTRY | {"shape": 2}},
        ],
        {"a": ENTRY | {"shape": [2.0]}},
        *[{"a": ENTRY | {"data_offsets": at}} for at in ([0, 4], [0, 1 << 62], [4, 8], [-8, 8], [8, 0])],
        *[{"a": ENTRY | {"data_offsets": at}} for at in ([0.0, 8.0], "x")],
        *[{"a": ENTRY, "b": ENTRY}, "[" * 100_000],
    ],
)
def test_files_that_are_none(store, tmp_path, raw):
    if not isinstance(raw, bytes):
        text = (raw if isinstance(raw, str) else json.dumps(raw)).encode()
        raw = struct.pack("<Q", len(text)) + text + bytes(8)
    (tmp_path / "file").write_bytes(raw)
    assert store.load_tensor_from_safetensor("a", tmp_path / "file") is None and store.is_exist("a") == 0


def test_serialization():
    header, address, size, owner = module._serialize_tensor(FLOATS)
    assert module._tensor_metadata_size() == HEADER == len(header) and (address, size) == (owner.data_ptr(), 96)
    assert same(module._deserialize_tensor(header + ctypes.string_at(address, size)), FLOATS)
    for wrong in (b"", header, header + bytes(95)):
        with pytest.raises(ValueError):
            module._deserialize_tensor(wrong)
    with pytest.raises(ValueError):
        module._serialize_tensor(torch.zeros(2, dtype=torch.complex64))


def test_without_a_pool(tmp_path):
    store = MooncakeDistributedStore()
    memory = torch.zeros(512, dtype=torch.uint8)
    at = (memory.data_ptr(), 512)
    assert store.put_tensor("t", CUBE) == store.upsert_tensor("t", CUBE) == -600
    assert store.put_tensor_with_tp("t", CUBE, 0, 2) == -600
    assert store.put_tensor_from("t", *at) == store.put_tensor_with_parallelism("t", CUBE, tp(0, 2, 0)) == -600
    assert store.get_tensor("t") is None and store.get_tensor_into("t", *at) is None
    assert store.batch_get_tensor(["t"]) == [None] and store.batch_get_tensor_into(["t"], at[:1], at[1:]) == [-600]
    assert store.batch_get_tensor_with_tp_into(["t"], at[:1], at[1:]) == [None]
    assert store.get_tensor_with_parallelism_into("t", *at, full(tp(0, 2, 0))) is None
    assert store.get_tensor_into_cuda("t", CUBE) == store.save_tensor_to_safetensor("t", tmp_path / "x") == -600
    assert store.load_tensor_from_safetensor("t", tmp_path / "x") is None
