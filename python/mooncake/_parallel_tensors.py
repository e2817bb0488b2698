"""Sharded tensors: the `*_with_tp` and `*_with_parallelism` calls of `MooncakeDistributedStore`. What a shard is, and where it
lies, is in `_shards.py`.
"""

import ctypes
from functools import partial
from itertools import repeat

from mooncake._shards import (
    _PARALLELISM_MANIFEST,
    _WRITER_MANIFEST,
    _Manifest,
    _Shard,
    _cut_all,
    _given,
    _is_shard,
    _list_of,
    _part_of,
    _rank_key,
    _request_of,
    _resized,
    _shard_key,
    _stored_axes,
    _suffixed,
    _target_of,
    _tp_key,
    _tp_of,
    _uniform,
    _with_tp,
    _writer_key,
)
from mooncake._tensors import (
    HEADER_SIZE,
    INVALID_PARAMS,
    TP,
    Header,
    config_for,
    decode,
    fits,
    key_list,
    memory_at,
    per_key,
    storable,
    tensor_over,
    TensorMethods,
)


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
