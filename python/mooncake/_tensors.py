"""The tensor family of `MooncakeDistributedStore`: a fixed header, then the raw bytes. torch is imported when used.

Header, 304 bytes, little endian, as upstream since its #1389:

- 40 bytes: magic `MOON` as u32, version u16, header size u16, dtype i32, dimensions i32, layout u32 (0 full, 1 shard),
  flags u32, offset of the data u64, its bytes u64;
- 136 bytes: shape of the whole tensor and of the stored part (8 sizes i64 each, -1 where unused), number of axes u32,
  reserved u32;
- 128 bytes: four axes of kind, index, rank, size, split dimension, expert or stage (i32 each) and size of the split
  dimension in the part (i64).

`_shards.py` knows what shards are, `_parallel_tensors.py` has the calls that store and read them.
"""

import ctypes
import json
import logging
import math
import os
import struct
from typing import NamedTuple

from mooncake._native import ReplicateConfig

INVALID_PARAMS = -600
FILE_NOT_FOUND = -1100
MAX_DIMS = 8
MAX_AXES = 4
# Name in torch, bytes of an element, name in safetensors. The index is the stored dtype.
_DTYPES = (
    ("float32", 4, "F32"),
    ("float64", 8, "F64"),
    ("int8", 1, "I8"),
    ("uint8", 1, "U8"),
    ("int16", 2, "I16"),
    ("uint16", 2, "U16"),
    ("int32", 4, "I32"),
    ("uint32", 4, "U32"),
    ("int64", 8, "I64"),
    ("uint64", 8, "U64"),
    ("bool", 1, "BOOL"),
    ("float16", 2, "F16"),
    ("bfloat16", 2, "BF16"),
    ("float8_e4m3fn", 1, "F8_E4M3"),
    ("float8_e5m2", 1, "F8_E5M2"),
)
_NUMBERS = {"torch." + name: number for number, (name, _, _) in enumerate(_DTYPES)}
_SAFETENSORS = {name: number for number, (_, _, name) in enumerate(_DTYPES)}
_SAFETENSORS_HEADER_MAX = 100_000_000
_OBJECT = struct.Struct("<IHHiiIIQQ")
_SHAPES = struct.Struct("<8q8qII")
_AXIS = struct.Struct("<6iq")
HEADER_SIZE = _OBJECT.size + _SHAPES.size + MAX_AXES * _AXIS.size
_MAGIC = 0x4D4F4F4E
_VERSION = 1
DP, TP, EP, PP, RESERVED = range(5)
# Longer than any key may be: refused without a word to the master, but only after the buffer was looked at.
_NO_KEY = "k" * 5000
_log = logging.getLogger(__name__)


class Axis(NamedTuple):
    """One axis of a sharded tensor, as stored."""

    kind: int
    index: int
    rank: int
    size: int
    split_dim: int = -1
    number: int = 0
    extent: int = 0

    def _valid(self, dims):
        kind, rank = DP <= self.kind <= RESERVED, 0 <= self.rank < self.size
        return kind and rank and -1 <= self.split_dim < dims


class Header(NamedTuple):
    """What a stored tensor is: the whole tensor's shape, the stored part's, and which part it is."""

    dtype: int
    global_shape: tuple
    shape: tuple
    axes: tuple = ()
    sharded: bool = False
    offset: int = HEADER_SIZE

    @property
    def nbytes(self):
        """Bytes of data."""
        return math.prod(self.shape) * _DTYPES[self.dtype][1]

    def pack(self):
        """The stored bytes."""
        fixed = (_MAGIC, _VERSION, HEADER_SIZE, self.dtype, len(self.shape), self.sharded, 0, HEADER_SIZE, self.nbytes)
        shapes = _SHAPES.pack(*padded(self.global_shape), *padded(self.shape), len(self.axes), 0)
        axes = b"".join(_AXIS.pack(*axis) for axis in self.axes)
        return _OBJECT.pack(*fixed) + shapes + axes.ljust(MAX_AXES * _AXIS.size, b"\0")

    @classmethod
    def parse(cls, memory, whole=True):
        """The header of a whole object, or of the beginning of one; None when it is no tensor of exactly that size."""
        if len(memory) < HEADER_SIZE:
            return None
        magic, version, size, dtype, dims, layout, _, offset, nbytes = _OBJECT.unpack_from(memory)
        *shapes, count, _ = _SHAPES.unpack_from(memory, _OBJECT.size)
        if (magic, version, size) != (_MAGIC, _VERSION, HEADER_SIZE) or not 0 <= dtype < len(_DTYPES):
            return None
        if not 0 <= dims <= MAX_DIMS or count > MAX_AXES or layout > 1 or offset % 8:
            return None
        stored = [Axis(*_AXIS.unpack_from(memory, HEADER_SIZE - (MAX_AXES - i) * _AXIS.size)) for i in range(count)]
        global_shape, shape = unpadded(shapes[:MAX_DIMS], dims), unpadded(shapes[MAX_DIMS:], dims)
        if global_shape is None or shape is None or not all(axis._valid(dims) for axis in stored):
            return None
        header = cls(dtype, global_shape, shape, tuple(stored), bool(layout), offset)
        total = len(memory) if whole else offset + nbytes
        exact = HEADER_SIZE <= offset <= total and nbytes == header.nbytes == total - offset
        return header if exact else None


def padded(shape):
    """A shape as it is stored."""
    return (*shape, *[-1] * (MAX_DIMS - len(shape)))


def unpadded(sizes, dims):
    """The shape of a stored one, or None."""
    used, rest = tuple(sizes[:dims]), sizes[dims:]
    return used if all(n >= 0 for n in used) and all(n == -1 for n in rest) else None


def memory_at(address, size):
    """Memory that somebody else keeps alive."""
    return memoryview((ctypes.c_ubyte * size).from_address(address))


def storable(tensor):
    """Whether this is a tensor with shape, strides, a dtype that can be stored, and memory for all its elements."""
    import torch

    dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_nested
    if not dense or tensor.dim() > MAX_DIMS or str(tensor.dtype) not in _NUMBERS:
        return False
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    try:
        return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size()
    except RuntimeError:  # a kind of tensor without any storage
        return False


def host_copy(tensor):
    """A contiguous tensor on the host (the same one when it is that already), or None for what cannot be stored."""
    if not storable(tensor):
        return None
    try:
        host = tensor.detach().resolve_neg().contiguous().cpu()
        return host if host.numel() == 0 or host.data_ptr() else None
    except RuntimeError:  # only a shape, as a meta tensor
        return None


def header_of(tensor, global_shape=None, axes=()):
    """The header for a tensor, which is a shard when it has axes."""
    shape = tuple(tensor.shape)
    whole = shape if global_shape is None else tuple(global_shape)
    return Header(_NUMBERS[str(tensor.dtype)], whole, shape, tuple(axes), bool(axes))


def tensor_over(memory, header):
    """A tensor over the bytes behind a header, which it keeps alive, or over new ones; None when torch refuses."""
    import torch

    dtype, count = getattr(torch, _DTYPES[header.dtype][0], None), math.prod(header.shape)
    try:
        if memory is None or count == 0:
            return torch.empty(header.shape, dtype=dtype)
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=header.offset)
        return flat.reshape(header.shape)
    except (RuntimeError, ValueError, TypeError, OverflowError):
        return None


def decode(memory):
    """Header and tensor of a whole object; twice None for what is none."""
    header = None if memory is None else Header.parse(memory)
    tensor = None if header is None else tensor_over(memory, header)
    return (None, None) if tensor is None else (header, tensor)


def _tensor_metadata_size():
    """Bytes of the header."""
    return HEADER_SIZE


def _serialize_tensor(tensor):
    """Header, address and size of the data, and the tensor that owns it (on the host)."""
    host = host_copy(tensor)
    if host is None:
        raise ValueError("unsupported tensor for Mooncake tensor serialization")
    header = header_of(host)
    return header.pack(), host.data_ptr(), header.nbytes, host


def _deserialize_tensor(payload):
    """A tensor over a copy of header and data."""
    tensor = decode(bytearray(payload))[1]
    if tensor is None:
        raise ValueError("invalid serialized Mooncake tensor payload")
    return tensor


def key_list(keys):
    """Keys as a list; a single key is a mistake."""
    if isinstance(keys, (str, bytes)):
        raise TypeError("keys must be a list of str")
    return list(keys)


def fits(config, keys):
    """Whether upstream takes a configuration for that many objects."""
    if config is None:
        return True
    if not isinstance(config, ReplicateConfig):
        raise TypeError(f"config must be a ReplicateConfig, not {type(config).__name__}")
    segments, groups = config.preferred_segments, config.group_ids
    return (not segments or len(segments) == config.replica_num) and (groups is None or len(groups) == keys)


def config_for(config, index, objects=1):
    """The configuration of one key of a batch, which is stored as some objects."""
    if config is None or config.group_ids is None:
        return config
    single = ReplicateConfig()
    for name in dir(config):
        if not name.startswith("_") and name != "with_soft_pin":  # an older name of soft_pin_action
            setattr(single, name, getattr(config, name))
    single.group_ids = [config.group_ids[index]] * objects
    return single


def per_key(keys, config, columns, write, objects=1):
    """A code per key, from `write(key, *values, config)`; -600 for all when the lists or the config do not fit."""
    keys = key_list(keys)
    if any(len(column) != len(keys) for column in columns) or not fits(config, len(keys)):
        return [INVALID_PARAMS] * len(keys)
    rows = enumerate(zip(keys, *columns))
    return [write(*row, config_for(config, index, objects)) for index, row in rows]


def write_safetensors(path, name, tensor):
    """One tensor in a file of its own, with the bytes the `safetensors` package would write."""
    if name == "__metadata__":
        raise ValueError("safetensors has another use for that name")
    header = header_of(tensor)
    entry = {"dtype": _DTYPES[header.dtype][2], "shape": header.shape, "data_offsets": [0, header.nbytes]}
    text = json.dumps({name: entry}, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(memory_at(tensor.data_ptr(), header.nbytes))


def _safetensors_entries(file):
    """Where the data begins, and the entries in its order. ValueError when they do not cover it exactly."""
    length = int.from_bytes(file.read(8), "little")
    rest = os.fstat(file.fileno()).st_size - 8 - length
    if rest < 0 or length > _SAFETENSORS_HEADER_MAX:
        raise ValueError("no header")
    entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    at = 0
    for _, entry in ordered:
        begin, end = entry["data_offsets"]
        if begin != at or end < begin:
            raise ValueError("tensors overlap or leave a gap")
        at = end
    if at != rest or not ordered:
        raise ValueError("the data is not what the header says")
    return 8 + length, dict(ordered)


def read_safetensors(path, name):
    """The named tensor of a file, or its first one. ValueError and its like for what is no such file."""
    with open(path, "rb") as file:
        start, entries = _safetensors_entries(file)
        if name is not None and name not in entries:
            _log.warning("key %s not found in safetensor file; using first entry", name)
        entry = entries.get(name) or next(iter(entries.values()))
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        header = Header(_SAFETENSORS[entry["dtype"]], shape, shape, offset=0)
        if any(type(n) is not int or n < 0 for n in shape) or header.nbytes != end - begin:
            raise ValueError("shape and size disagree")
        data = bytearray(end - begin)
        file.seek(start + begin)
        if file.readinto(data) != len(data):
            raise ValueError("the file became shorter")
    return tensor_over(data, header)


class TensorMethods:
    """Tensors in and out. Puts answer 0 or a negative code, gets a tensor on the host or None."""

    # -- what the calls below have in common

    def _closed(self):
        return not self.get_hostname()

    def _usable(self, buffer_ptr, size, write=False):
        """Whether a range is memory of this process; asks the native calls, which check before anything else."""
        probe = self.get_into if write else self.put_from
        return probe(_NO_KEY, buffer_ptr, size) != INVALID_PARAMS

    def _header_at(self, buffer_ptr, size):
        """The header of a tensor that lies in the caller's memory, or None."""
        return Header.parse(memory_at(buffer_ptr, size)) if self._usable(buffer_ptr, size) else None

    def _tensor_at(self, buffer_ptr, size):
        """Header and tensor that lie in the caller's memory; twice None when there are none."""
        return decode(memory_at(buffer_ptr, size) if self._usable(buffer_ptr, size) else None)

    def _load(self, key):
        return decode(self.get_buffer(key))

    def _load_into(self, key, buffer_ptr, size):
        read = self.get_into(key, buffer_ptr, size)
        return decode(memory_at(buffer_ptr, read) if read >= 0 else None)

    def _put_object(self, upsert, key, header, host, config):
        put = self.upsert_parts if upsert else self.put_parts
        return put(key, header.pack(), memory_at(host.data_ptr(), header.nbytes), config=config)

    def _put_whole(self, upsert, key, tensor, config):
        host = host_copy(tensor)
        if host is None or not fits(config, 1):
            return INVALID_PARAMS
        return self._put_object(upsert, key, header_of(host), host, config)

    def _put_from(self, upsert, key, buffer_ptr, size, config):
        if self._header_at(buffer_ptr, size) is None or not fits(config, 1):
            return INVALID_PARAMS
        return (self.upsert_from if upsert else self.put_from)(key, buffer_ptr, size, config)

    def _batch_put_whole(self, upsert, keys, tensors, config):
        return per_key(keys, config, (tensors,), lambda *row: self._put_whole(upsert, *row))

    def _batch_put_from(self, upsert, keys, buffer_ptrs, sizes, config):
        """All or nothing, as upstream: one wrong buffer refuses the batch."""
        keys = key_list(keys)
        same = len(keys) == len(buffer_ptrs) == len(sizes) and fits(config, len(keys))
        if not same or any(self._header_at(*at) is None for at in zip(buffer_ptrs, sizes)):
            return [INVALID_PARAMS] * len(keys)
        return (self.batch_upsert_from if upsert else self.batch_put_from)(keys, buffer_ptrs, sizes, config)

    # -- whole tensors

    def put_tensor(self, key, tensor):
        """Stores a tensor."""
        return self._put_whole(False, key, tensor, None)

    def pub_tensor(self, key, tensor, config=None):
        """Stores a tensor with a replica configuration."""
        return self._put_whole(False, key, tensor, config)

    def upsert_tensor(self, key, tensor):
        """Stores a tensor, replacing an existing object."""
        return self._put_whole(True, key, tensor, None)

    def upsert_pub_tensor(self, key, tensor, config=None):
        """`upsert_tensor` with a replica configuration."""
        return self._put_whole(True, key, tensor, config)

    def batch_put_tensor(self, keys, tensors_list):
        """A code per key."""
        return self._batch_put_whole(False, keys, tensors_list, None)

    def batch_pub_tensor(self, keys, tensors_list, config=None):
        """A code per key."""
        return self._batch_put_whole(False, keys, tensors_list, config)

    def batch_upsert_tensor(self, keys, tensors_list):
        """A code per key."""
        return self._batch_put_whole(True, keys, tensors_list, None)

    def batch_upsert_pub_tensor(self, keys, tensors_list, config=None):
        """A code per key."""
        return self._batch_put_whole(True, keys, tensors_list, config)

    def get_tensor(self, key):
        """The tensor, or None."""
        return self._load(key)[1]

    def batch_get_tensor(self, keys):
        """A tensor or None per key."""
        return [decode(handle)[1] for handle in self.batch_get_buffer(keys)]

    # -- header and data in the caller's memory

    def put_tensor_from(self, key, buffer_ptr, size):
        """Stores header and data that lie in a buffer."""
        return self._put_from(False, key, buffer_ptr, size, None)

    def upsert_tensor_from(self, key, buffer_ptr, size):
        """`put_tensor_from`, replacing an existing object."""
        return self._put_from(True, key, buffer_ptr, size, None)

    def batch_put_tensor_from(self, keys, buffer_ptrs, sizes):
        """A code per key."""
        return self._batch_put_from(False, keys, buffer_ptrs, sizes, None)

    def batch_upsert_tensor_from(self, keys, buffer_ptrs, sizes):
        """A code per key."""
        return self._batch_put_from(True, keys, buffer_ptrs, sizes, None)

    def get_tensor_into(self, key, buffer_ptr, size):
        """Reads header and data into a buffer: a tensor over it, or None."""
        return self._load_into(key, buffer_ptr, size)[1]

    def batch_get_tensor_into(self, keys, buffer_ptrs, sizes):
        """A tensor over its buffer, or None, per key; -600 for all when the lists do not fit."""
        keys = key_list(keys)
        if not len(keys) == len(buffer_ptrs) == len(sizes) or 0 in buffer_ptrs or self._closed():
            return [INVALID_PARAMS] * len(keys)
        reads = zip(buffer_ptrs, self.batch_get_into(keys, buffer_ptrs, sizes))
        return [decode(memory_at(at, read) if read >= 0 else None)[1] for at, read in reads]

    # -- memory of a device

    def get_tensor_into_cuda(self, key, tensor):
        """Reads into a contiguous CUDA tensor of the stored shape and dtype: bytes, or -600."""
        import torch

        if not isinstance(tensor, torch.Tensor) or not (tensor.is_cuda or tensor.numel() == 0):
            return INVALID_PARAMS
        found = self.get_tensor(key)
        if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape) or not tensor.is_contiguous():
            return INVALID_PARAMS
        tensor.detach().copy_(found)
        return found.numel() * found.element_size()

    def batch_get_tensor_into_cuda(self, keys, tensors_list):
        """Bytes or -600 per key."""
        return per_key(keys, None, (tensors_list,), lambda key, tensor, _: self.get_tensor_into_cuda(key, tensor))

    # -- files

    def save_tensor_to_safetensor(self, key, file_name=None):
        """Writes a tensor to a safetensors file (named like the key by default): 0, -1100 when there is no such tensor,
        -600 when the file could not be written."""
        tensor = self.get_tensor(key)
        if tensor is None:
            return INVALID_PARAMS if self._closed() else FILE_NOT_FOUND
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
        try:
            write_safetensors(os.fspath(key if file_name is None else file_name), name, tensor)
        except (OSError, TypeError, ValueError):
            return INVALID_PARAMS
        return 0

    def load_tensor_from_safetensor(self, key=None, file_name=None):
        """Stores a tensor of a safetensors file (the key's, else the first one) under the key (by default the file's
        name): the tensor, or None."""
        if file_name is None:
            raise TypeError("load_tensor_from_safetensor: file_name is missing")
        if self._closed():
            return None
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
        try:
            path = os.fspath(file_name)
            tensor = read_safetensors(path, name)
        except (OSError, TypeError, ValueError, KeyError, AttributeError, RecursionError, MemoryError):
            return None
        stored = tensor is not None and self.put_tensor(path if key is None else key, tensor) == 0
        return tensor if stored else None
