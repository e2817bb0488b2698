"""Shards of tensors: the axes along which a tensor is split, what callers ask for, and under which keys shards are stored.

Where upstream keeps them, for a tensor `key`:

- one shard of tensor parallelism alone: `key_tp_<rank>`;
- a shard of other or several axes, in the order dp, tp, ep, pp: `key__dp_<rank>of<size>__tp_<rank>of<size>_sd<dim>...`;
- a writer's partition: `key__writer_<rank>of<size>_sd<dim>`;
- how a tensor was split: `key__parallelism_manifest` and `key__writer_manifest`.

Knows no store: `_parallel_tensors.py` has the calls.
"""

import operator
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mooncake._tensors import (
    DP,
    EP,
    MAX_AXES,
    MAX_DIMS,
    PP,
    TP,
    Axis,
    Header,
    header_of,
    host_copy,
    padded,
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
