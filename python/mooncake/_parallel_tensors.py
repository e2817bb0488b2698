"""Sharded tensors: the `*_with_tp` and `*_with_parallelism` calls of `MooncakeDistributedStore`.

Where upstream keeps them, for a tensor `key`:

- one shard of tensor parallelism alone: `key_tp_<rank>`;
- a shard of other or several axes, in the order dp, tp, ep, pp: `key__dp_<rank>of<size>__tp_<rank>of<size>_sd<dim>...`;
- a writer's partition: `key__writer_<rank>of<size>_sd<dim>`;
- how a tensor was split: `key__parallelism_manifest` and `key__writer_manifest`.
"""

import ctypes
import operator
import struct
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

from mooncake._tensors import (
    DP,
    EP,
    HEADER_SIZE,
    INVALID_PARAMS,
    MAX_AXES,
    MAX_DIMS,
    PP,
    TP,
    Axis,
    Header,
    TensorMethods,
    config_for,
    decode,
    fits,
    header_of,
    host_copy,
    key_list,
    memory_at,
    padded,
    per_key,
    storable,
    tensor_over,
    unpadded,
)

_KINDS = {"dp": DP, "tp": TP, "ep": EP, "pp": PP}
_MODES = ("as_stored", "shard", "full")
_MANIFEST = struct.Struct("<IHHiiiii4x8q")
_MANIFEST_MAGIC = 0x574D414E
_PARALLELISM_MANIFEST = "__parallelism_manifest"
_WRITER_MANIFEST = "__writer_manifest"
_INT_MAX = (1 << 31) - 1
# Of one tensor. Upstream has no bound; a stored header must not make a reader ask for billions of keys.
_SHARDS_MAX = 4096


@dataclass
class ParallelAxis:
    """One axis of a sharded tensor: `tp` needs `split_dim`, `ep` needs `expert_id`, `pp` needs `stage_id`."""

    kind: str = ""
    rank: int = 0
    size: int = 1
    split_dim: int | None = None
    expert_id: int | None = None
    stage_id: int | None = None


@dataclass
class TensorParallelism:
    """Which shard of a tensor: its axes, at most four, each kind once."""

    axes: list[ParallelAxis] = field(default_factory=list)


class ReadTarget:
    """What a read shall give: the object `as_stored`, one `shard`, or the `full` tensor."""

    def __init__(self, mode="as_stored", parallelism=None):
        self.mode = mode
        self.parallelism = parallelism

    @property
    def mode(self):
        """`as_stored`, `shard` or `full`."""
        return self._mode

    @mode.setter
    def mode(self, mode):
        if not isinstance(mode, str):
            raise TypeError("mode must be str")
        if mode.lower() not in _MODES:
            raise RuntimeError("Unsupported ReadTarget mode")
        self._mode = mode.lower()

    def __repr__(self):
        return f"ReadTarget(mode={self.mode!r}, parallelism={self.parallelism!r})"


class _Shard(NamedTuple):
    """A checked axis."""

    kind: int
    rank: int
    size: int
    split_dim: int | None = None
    expert_id: int | None = None
    stage_id: int | None = None

    def suffix(self):
        name = next(name for name, kind in _KINDS.items() if kind == self.kind)
        parts = (("_sd", self.split_dim), ("_eid", self.expert_id), ("_sid", self.stage_id))
        return f"{name}_{self.rank}of{self.size}" + "".join(f"{p}{n}" for p, n in parts if n is not None)

    def stored(self, index, shape):
        """As it stands in a header of a part of that shape."""
        number = {EP: self.expert_id, PP: self.stage_id}.get(self.kind) or 0
        if self.split_dim is None:
            return Axis(self.kind, index, self.rank, self.size, -1, number)
        return Axis(self.kind, index, self.rank, self.size, self.split_dim, number, shape[self.split_dim])


class _Manifest(NamedTuple):
    """How a tensor was split."""

    dtype: int
    shape: tuple
    split_dim: int
    count: int

    def pack(self):
        fixed = (_MANIFEST_MAGIC, 1, _MANIFEST.size, self.dtype, len(self.shape), self.split_dim, self.count, 0)
        return _MANIFEST.pack(*fixed, *padded(self.shape))

    @classmethod
    def parse(cls, data):
        """None when the bytes are no manifest."""
        if len(data) < _MANIFEST.size:
            return None
        magic, version, size, dtype, dims, split_dim, count, _, *sizes = _MANIFEST.unpack_from(data)
        shape = unpadded(sizes, dims) if 0 <= dims <= MAX_DIMS else None
        known = (magic, version, size) == (_MANIFEST_MAGIC, 1, _MANIFEST.size)
        return cls(dtype, shape, split_dim, count) if known and shape and _uniform(shape, split_dim, count) else None


class _Part(NamedTuple):
    """A tensor's object to store."""

    key: Any
    header: Header
    host: Any


def _uniform(shape, split_dim, count):
    """Whether a shape can be split evenly. Nothing else is supported, as upstream."""
    return 0 <= split_dim < len(shape) and 0 < count <= _SHARDS_MAX and shape[split_dim] % count == 0


# -- what callers ask for


def _number(value):
    number = operator.index(value)
    if not 0 <= number <= _INT_MAX:
        raise ValueError("out of range")
    return number


def _shard_of(axis):
    """An axis of the caller's, which is any object with the attributes; None when it makes no sense."""
    try:
        kind = _KINDS[axis.kind.lower()]
        rank, size = _number(axis.rank), _number(axis.size)
        optional = (axis.split_dim, axis.expert_id, axis.stage_id)
        optional = [None if n is None else _number(n) for n in optional]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    split_dim, expert_id, stage_id = optional
    needed = (split_dim is not None) == (kind == TP) and (kind != EP or expert_id is not None)
    needed = needed and (kind != PP or stage_id is not None)
    return _Shard(kind, rank, size, *optional) if needed and rank < size and (split_dim or 0) < MAX_DIMS else None


def _axes_of(parallelism):
    """The checked axes, in the caller's order, or None."""
    axes = getattr(parallelism, "axes", None)
    shards = [_shard_of(axis) for axis in axes] if isinstance(axes, (list, tuple)) else []
    if not 0 < len(shards) <= MAX_AXES or None in shards or len({s.kind for s in shards}) < len(shards):
        return None
    return shards


def _request_of(parallelism, writer_partition):
    """What to write: the axes (None for a whole tensor) and whether they are a writer's; None when refused."""
    if writer_partition is None:
        axes = _axes_of(parallelism)
        return (axes, False) if axes or parallelism is None else None
    given = (getattr(writer_partition, name, None) for name in ("rank", "size", "split_dim"))
    axis = _shard_of(ParallelAxis("tp", *given))
    return ([axis], True) if axis and parallelism is None else None


def _target_of(target):
    """What to read: the mode and the axes, if any; None when refused."""
    if target is None:
        return _MODES[0], None
    mode, parallelism = str(getattr(target, "mode", "")).lower(), getattr(target, "parallelism", None)
    axes = _axes_of(parallelism)
    if axes is None and parallelism is not None:
        return None
    allowed = {"as_stored": axes is None, "shard": axes is not None, "full": True}
    return (mode, axes) if allowed.get(mode) else None


def _list_of(requests, count):
    """A batch's requests, one per key; None when they are no such list."""
    if requests is None:
        return [None] * count
    return requests if isinstance(requests, list) and len(requests) == count else None


# -- axes and keys


def _tp_of(axes):
    return next((axis for axis in axes if axis.kind == TP), None)


def _with_tp(axes, rank, size):
    """The axes of another rank, or of another number of shards."""
    return [axis._replace(rank=rank, size=size) if axis.kind == TP else axis for axis in axes]


def _suffixed(key, suffix):
    """A key that belongs to another, which is text or bytes."""
    return key + (suffix.encode() if isinstance(key, bytes) else suffix)


def _rank_key(key, tp_rank, tp_size):
    return key if tp_size <= 1 else _suffixed(key, f"_tp_{tp_rank}")


def _tp_key(key, axes):
    """The shard of `put_tensor_with_tp`, which does not split for one rank."""
    return _rank_key(key, axes[0].rank, axes[0].size)


def _shard_key(key, axes):
    if len(axes) == 1 and axes[0].kind == TP:
        return _suffixed(key, f"_tp_{axes[0].rank}")
    return _suffixed(key, "".join("__" + axis.suffix() for axis in sorted(axes)))


def _writer_key(key, axes):
    return _suffixed(key, f"__writer_{axes[0].rank}of{axes[0].size}_sd{axes[0].split_dim}")


def _stored_axes(axes, shape):
    return tuple(axis.stored(index, shape) for index, axis in enumerate(axes))


def _is_shard(header, axes):
    """Whether a stored object is the shard these axes name, whatever their order."""
    stored, wanted = (
        sorted((axis.kind, axis.rank, axis.size, axis.split_dim, axis.number) for axis in side)
        for side in (header.axes, _stored_axes(axes, [0] * MAX_DIMS))
    )
    return header.sharded and stored == wanted


def _resized(shape, dim, extent):
    return (*shape[:dim], extent, *shape[dim + 1 :])


# -- objects to store


def _given(name, tensor, axes, whole):
    """A tensor that is the shard already."""
    host = host_copy(tensor)
    tp = _tp_of(axes)
    if host is None or max(whole, default=0) >= 1 << 63 or (tp and not _uniform(whole, tp.split_dim, tp.size)):
        return None
    return _Part(name, header_of(host, whole, _stored_axes(axes, host.shape)), host)


def _cut(name, tensor, axes):
    """The shard of a whole tensor that the axes name."""
    tp = _tp_of(axes)
    if not _uniform(tensor.shape, tp.split_dim, tp.size):
        return None
    extent = tensor.shape[tp.split_dim] // tp.size
    return _given(name, tensor.narrow(tp.split_dim, tp.rank * extent, extent), axes, tuple(tensor.shape))


def _cut_all(tensor, axes, name):
    """Every rank's shard of a whole tensor, one at a time."""
    tp = _tp_of(axes)
    ranks = range(tp.size if _uniform(tensor.shape, tp.split_dim, tp.size) else 1)
    return (_cut(name(axes), tensor, axes) for axes in (_with_tp(axes, rank, tp.size) for rank in ranks))


def _part_of(key, tensor, axes, writer):
    """The shard to store: with a tp axis alone the given tensor; otherwise, and from a writer, it is cut out."""
    if writer:
        return _cut(_writer_key(key, axes), tensor, axes)
    tp, shape, name = _tp_of(axes), tuple(tensor.shape), _shard_key(key, axes)
    if tp and len(axes) > 1:
        return _cut(name, tensor, axes)
    if tp and tp.split_dim < len(shape):
        shape = _resized(shape, tp.split_dim, shape[tp.split_dim] * tp.size)
    return _given(name, tensor, axes, shape)


# -- where reads go


class _Fresh:
    """Memory of torch's."""

    def __init__(self, store):
        self.load = store._load

    def room(self, header):
        """An empty tensor for that header."""
        return tensor_over(None, header)


class _Into:
    """The caller's buffer."""

    def __init__(self, store, buffer_ptr, size):
        self.load = partial(store._load_into, buffer_ptr=buffer_ptr, size=size)
        self._usable, self._at, self._size = store._usable, buffer_ptr, size

    def room(self, header):
        """A tensor over the buffer, with the header before it; None when it does not fit."""
        total = HEADER_SIZE + header.nbytes
        if total > self._size or not self._usable(self._at, total, write=True):
            return None
        ctypes.memmove(self._at, header.pack(), HEADER_SIZE)
        return tensor_over(memory_at(self._at, total), header)


class ParallelTensorMethods(TensorMethods):
    """Shards in and out. Puts answer 0 or a negative code, gets a tensor on the host or None."""

    # -- writing

    def _put_parts(self, upsert, parts, configs):
        """Stores objects in order: 0 or the first code."""
        for part, config in zip(parts, configs):
            code = INVALID_PARAMS if part is None else self._put_object(upsert, *part, config)
            if code:
                return code
        return 0

    def _put_split(self, key, tensor, config, tp_size, split_dim):
        if not storable(tensor) or not fits(config, tp_size):
            return INVALID_PARAMS
        parts = _cut_all(tensor, [_Shard(TP, 0, tp_size, split_dim)], partial(_shard_key, key))
        return self._put_parts(False, parts, (config_for(config, rank) for rank in range(tp_size)))

    def _put_shard(self, upsert, key, tensor, parallelism, writer_partition, config):
        request = _request_of(parallelism, writer_partition)
        if request is None or not storable(tensor) or not fits(config, 1):
            return INVALID_PARAMS
        axes, writer = request
        if axes is None:
            return self._put_whole(upsert, key, tensor, config)
        part, tp = _part_of(key, tensor, axes, writer), _tp_of(axes)
        code = self._put_parts(upsert, [part], [config])
        if code or tp is None:
            return code
        manifest = _Manifest(part.header.dtype, part.header.global_shape, tp.split_dim, tp.size)
        name = _suffixed(key, _WRITER_MANIFEST if writer else _PARALLELISM_MANIFEST)
        return (self.upsert if upsert else self.put)(name, manifest.pack(), config)

    def _put_shard_from(self, upsert, key, buffer_ptr, size, parallelism, writer_partition, config):
        request = _request_of(parallelism, writer_partition)
        if request is None:
            return INVALID_PARAMS
        axes, writer = request
        if axes is None:
            return self._put_from(upsert, key, buffer_ptr, size, config)
        header, tensor = self._tensor_at(buffer_ptr, size)
        if header is None or not fits(config, 1) or (_tp_of(axes) and header.shape != header.global_shape):
            return INVALID_PARAMS
        if writer:
            return self._put_shard(upsert, key, tensor, None, writer_partition, config)
        if _tp_of(axes):
            return self._put_parts(upsert, _cut_all(tensor, axes, partial(_shard_key, key)), repeat(config))
        return self._put_parts(upsert, [_given(_shard_key(key, axes), tensor, axes, header.global_shape)], [config])

    def _batch_put_shards(self, write, keys, columns, parallelisms, writer_partitions, config):
        keys = key_list(keys)
        axes, writers = _list_of(parallelisms, len(keys)), _list_of(writer_partitions, len(keys))
        both = parallelisms is not None and writer_partitions is not None
        if both or axes is None or writers is None:
            return [INVALID_PARAMS] * len(keys)
        return per_key(keys, config, (*columns, axes, writers), write)

    def _batch_put_shards_from(self, upsert, keys, buffer_ptrs, sizes, parallelisms, writer_partitions, config):
        if parallelisms is None and writer_partitions is None:
            return self._batch_put_from(upsert, keys, buffer_ptrs, sizes, config)
        write = partial(self._put_shard_from, upsert)
        return self._batch_put_shards(write, keys, (buffer_ptrs, sizes), parallelisms, writer_partitions, config)

    # -- reading

    def _peek(self, key):
        """The header of a stored tensor, or None."""
        memory = ctypes.create_string_buffer(HEADER_SIZE)
        read = self.get_into_ranges([ctypes.addressof(memory)], [[key]], [[[0]]], [[[0]]], [[[HEADER_SIZE]]])
        return Header.parse(memory, whole=False) if read == [[[HEADER_SIZE]]] else None

    def _splits(self, key, axes):
        """How the tensor may have been split, and the name of a shard by its axes."""
        tp = _tp_of(axes)
        manifest = _Manifest.parse(self.get(_suffixed(key, _PARALLELISM_MANIFEST)))
        if manifest is not None:
            yield manifest, partial(_shard_key, key)
        name = partial(_tp_key if len(axes) == 1 else _shard_key, key)
        header = self._peek(name(_with_tp(axes, 0, tp.size)))
        stored = header and header.sharded and _tp_of(header.axes)
        if stored:
            yield _Manifest(header.dtype, header.global_shape, stored.split_dim, stored.size), name

    def _gather(self, split, name, axes, start, end):
        """The shards with that stretch of the split dimension, each with its beginning; None unless all are right."""
        per = split.shape[split.split_dim] // split.count
        ranks = range(start // per, -(-end // per)) if start < end else range(1)
        wanted = [_with_tp(axes, rank, split.count) for rank in ranks]
        shape = _resized(split.shape, split.split_dim, per)
        shards = []
        for rank, shard, handle in zip(ranks, wanted, self.batch_get_buffer([name(shard) for shard in wanted])):
            header, tensor = decode(handle)
            if header is None or header[:3] != (split.dtype, split.shape, shape) or not _is_shard(header, shard):
                return None
            shards.append((tensor, rank * per))
        return shards

    def _assemble(self, split, name, axes, full, into):
        """The whole tensor or the shard of the axes, from shards of another split."""
        tp, dim = _tp_of(axes), split.split_dim
        if not all(_uniform(split.shape, dim, n) for n in (split.count, tp.size)):
            return None
        extent = split.shape[dim] if full else split.shape[dim] // tp.size
        start = 0 if full else tp.rank * extent
        shards = self._gather(split, name, axes, start, start + extent)
        if shards is None:
            return None
        shape = _resized(split.shape, dim, extent)
        stored = () if full else _stored_axes(axes, shape)
        room = into.room(Header(split.dtype, split.shape, shape, stored, not full))
        for tensor, at in shards if room is not None else ():
            low, high = max(at, start), min(at + tensor.shape[dim], start + extent)
            if low < high:
                room.narrow(dim, low - start, high - low).copy_(tensor.narrow(dim, low - at, high - low))
        return room

    def _read_written(self, key, into):
        """The whole tensor of a writer's partitions, else the object itself."""
        manifest = _Manifest.parse(self.get(_suffixed(key, _WRITER_MANIFEST)))
        if manifest is not None:
            axes = [_Shard(TP, 0, manifest.count, manifest.split_dim)]
            tensor = self._assemble(manifest, partial(_writer_key, key), axes, True, into)
            if tensor is not None:
                return tensor
        return into.load(key)[1]

    def _read_shard(self, key, axes, into):
        """The stored shard of exactly these axes."""
        alone = len(axes) == 1 and axes[0].kind == TP
        for name in (_shard_key(key, axes), *([_writer_key(key, axes)] if alone else ())):
            header = self._peek(name)
            if header is not None and _is_shard(header, axes):
                return into.load(name)[1]
        return None

    def _read_split(self, key, axes, full, into):
        splits = self._splits(key, axes) if _tp_of(axes) else ()
        tensors = (self._assemble(split, name, axes, full, into) for split, name in splits)
        return next((tensor for tensor in tensors if tensor is not None), None)

    def _read(self, key, target, into):
        request = _target_of(target)
        if request is None:
            return None
        mode, axes = request
        if axes is None:
            return into.load(key)[1] if mode == "as_stored" else self._read_written(key, into)
        if mode == "full":
            return self._read_split(key, axes, True, into)
        tensor = self._read_shard(key, axes, into)
        if tensor is None:
            tensor = self._read_split(key, axes, False, into)
        if tensor is None and isinstance(into, _Fresh) and len(axes) == 1 and _tp_of(axes):
            return into.load(_tp_key(key, axes))[1]  # whatever is there, as upstream
        return tensor

    # -- shards of tensor parallelism alone

    def put_tensor_with_tp(self, key, tensor, tp_rank=0, tp_size=1, split_dim=0):
        """Splits a whole tensor along `split_dim` and stores every rank's shard, whatever `tp_rank` is."""
        return self.pub_tensor_with_tp(key, tensor, None, tp_rank, tp_size, split_dim)

    def pub_tensor_with_tp(self, key, tensor, config=None, tp_rank=0, tp_size=1, split_dim=0):
        """`put_tensor_with_tp` with a replica configuration, which has a group per shard if any."""
        if tp_size <= 1:
            return self.pub_tensor(key, tensor, config)
        return self._put_split(key, tensor, config, tp_size, split_dim)

    def batch_put_tensor_with_tp(self, base_keys, tensors_list, tp_rank=0, tp_size=1, split_dim=0):
        """A code per key."""
        return self.batch_pub_tensor_with_tp(base_keys, tensors_list, None, tp_rank, tp_size, split_dim)

    def batch_pub_tensor_with_tp(self, base_keys, tensors_list, config=None, tp_rank=0, tp_size=1, split_dim=0):
        """A code per key; the configuration has a group per key if any."""

        def write(key, tensor, single):
            return self.pub_tensor_with_tp(key, tensor, single, tp_rank, tp_size, split_dim)

        return per_key(base_keys, config, (tensors_list,), write, objects=max(tp_size, 1))

    def put_tensor_with_tp_from(self, key, buffer_ptr, size, tp_rank=0, tp_size=1, split_dim=0):
        """`put_tensor_with_tp` of a whole tensor whose header and data lie in a buffer."""
        if tp_size <= 1:
            return self.put_tensor_from(key, buffer_ptr, size)
        return self._put_split(key, self._tensor_at(buffer_ptr, size)[1], None, tp_size, split_dim)

    def batch_put_tensor_with_tp_from(self, base_keys, buffer_ptrs, sizes, tp_rank=0, tp_size=1, split_dim=0):
        """A code per key."""
        if tp_size <= 1:
            return self.batch_put_tensor_from(base_keys, buffer_ptrs, sizes)

        def write(key, buffer_ptr, size, _):
            return self.put_tensor_with_tp_from(key, buffer_ptr, size, tp_rank, tp_size, split_dim)

        return per_key(base_keys, None, (buffer_ptrs, sizes), write)

    def get_tensor_with_tp(self, key, tp_rank=0, tp_size=1, split_dim=0):
        """The shard of a rank."""
        return self.get_tensor(_rank_key(key, tp_rank, tp_size))

    def batch_get_tensor_with_tp(self, base_keys, tp_rank=0, tp_size=1):
        """A shard or None per key."""
        return self.batch_get_tensor([_rank_key(key, tp_rank, tp_size) for key in key_list(base_keys)])

    def get_tensor_with_tp_into(self, key, buffer_ptr, size, tp_rank=0, tp_size=1, split_dim=0):
        """`get_tensor_into` for the shard of a rank."""
        return self.get_tensor_into(_rank_key(key, tp_rank, tp_size), buffer_ptr, size)

    def batch_get_tensor_with_tp_into(self, base_keys, buffer_ptrs, sizes, tp_rank=0, tp_size=1):
        """`batch_get_tensor_into` for the shards of a rank."""
        keys = [_rank_key(key, tp_rank, tp_size) for key in key_list(base_keys)]
        return [None] * len(keys) if self._closed() else self.batch_get_tensor_into(keys, buffer_ptrs, sizes)

    # -- shards of any parallelism

    def put_tensor_with_parallelism(self, key, tensor, parallelism=None, config=None, writer_partition=None):
        """Stores a tensor's shard, or the tensor when neither `parallelism` nor `writer_partition` is given.

        With a tp axis alone `tensor` is the shard; with further axes, or a writer's partition (anything with `rank`,
        `size` and `split_dim`), it is the whole tensor, of which that shard is stored.
        """
        return self._put_shard(False, key, tensor, parallelism, writer_partition, config)

    def upsert_tensor_with_parallelism(self, key, tensor, parallelism=None, config=None, writer_partition=None):
        """`put_tensor_with_parallelism`, replacing existing objects."""
        return self._put_shard(True, key, tensor, parallelism, writer_partition, config)

    def batch_put_tensor_with_parallelism(
        self, keys, tensors_list, parallelisms=None, config=None, writer_partitions=None
    ):
        """A code per key."""
        write = partial(self._put_shard, False)
        return self._batch_put_shards(write, keys, (tensors_list,), parallelisms, writer_partitions, config)

    def batch_upsert_tensor_with_parallelism(
        self, keys, tensors_list, parallelisms=None, config=None, writer_partitions=None
    ):
        """A code per key."""
        write = partial(self._put_shard, True)
        return self._batch_put_shards(write, keys, (tensors_list,), parallelisms, writer_partitions, config)

    def put_tensor_with_parallelism_from(
        self, key, buffer_ptr, size, parallelism=None, config=None, writer_partition=None
    ):
        """Stores a tensor whose header and data lie in a buffer; every rank's shard when there is a tp axis."""
        return self._put_shard_from(False, key, buffer_ptr, size, parallelism, writer_partition, config)

    def upsert_tensor_with_parallelism_from(
        self, key, buffer_ptr, size, parallelism=None, config=None, writer_partition=None
    ):
        """`put_tensor_with_parallelism_from`, replacing existing objects."""
        return self._put_shard_from(True, key, buffer_ptr, size, parallelism, writer_partition, config)

    def batch_put_tensor_with_parallelism_from(
        self, keys, buffer_ptrs, sizes, parallelisms=None, config=None, writer_partitions=None
    ):
        """A code per key."""
        return self._batch_put_shards_from(False, keys, buffer_ptrs, sizes, parallelisms, writer_partitions, config)

    def batch_upsert_tensor_with_parallelism_from(
        self, keys, buffer_ptrs, sizes, parallelisms=None, config=None, writer_partitions=None
    ):
        """A code per key."""
        return self._batch_put_shards_from(True, keys, buffer_ptrs, sizes, parallelisms, writer_partitions, config)

    def get_tensor_with_parallelism(self, key, target=None):
        """The object as stored, a shard, or the whole tensor put together, as the `ReadTarget` says; or None."""
        return self._read(key, target, _Fresh(self))

    def batch_get_tensor_with_parallelism(self, keys, targets=None):
        """A tensor or None per key."""
        keys = key_list(keys)
        wanted = _list_of(targets, len(keys))
        if wanted is None:
            return [None] * len(keys)
        return [self.get_tensor_with_parallelism(*pair) for pair in zip(keys, wanted)]

    def get_tensor_with_parallelism_into(self, key, buffer_ptr, size, target=None):
        """`get_tensor_with_parallelism` into a buffer, header first: a tensor over it, or None."""
        return self._read(key, target, _Into(self, buffer_ptr, size))

    def batch_get_tensor_with_parallelism_into(self, keys, buffer_ptrs, sizes, targets=None):
        """A tensor over its buffer, or None, per key."""
        keys = key_list(keys)
        wanted = _list_of(targets, len(keys))
        if wanted is None or not len(keys) == len(buffer_ptrs) == len(sizes):
            return [None] * len(keys)
        return [self.get_tensor_with_parallelism_into(*row) for row in zip(keys, buffer_ptrs, sizes, wanted)]
