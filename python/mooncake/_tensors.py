"""The tensor family of `MooncakeDistributedStore`: a fixed header, then the raw bytes. torch is imported when used.

Header (40 bytes, little endian): dtype i32, number of dimensions i32, four sizes i64. Tensors of more than four
dimensions are refused. Objects with tensor parallelism are kept under `key_tp_<rank>`.
"""

import struct

_HEADER = struct.Struct("<ii4q")
_DTYPES = (
    "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "bool", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
)
_INVALID_PARAMS = -600


def _tensor_metadata_size():
    return _HEADER.size


def _dtype_number(torch, tensor):
    for number, name in enumerate(_DTYPES):
        if tensor.dtype == getattr(torch, name, None):
            return number
    return None


def _split(tensor):
    """Header and a byte view of a tensor's contiguous host copy; None for what is no storable tensor."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.dim() > 4:
        return None
    number = _dtype_number(torch, tensor)
    if number is None:
        return None
    host = tensor.detach().contiguous().cpu()
    shape = list(host.shape) + [-1] * (4 - host.dim())
    header = _HEADER.pack(number, host.dim(), *shape)
    payload = memoryview(host.reshape(-1).view(torch.uint8).numpy()) if host.numel() else b""
    return header, payload


def _serialize_tensor(tensor):
    """Header and payload in one bytes object."""
    parts = _split(tensor)
    if parts is None:
        raise TypeError("not a tensor of at most 4 dimensions with a known dtype")
    return b"".join(parts)


def _deserialize_tensor(data):
    """A tensor over a writable copy of the bytes, or None when they are no tensor."""
    import torch

    view = memoryview(data)
    if len(view) < _HEADER.size:
        return None
    number, dims, *shape = _HEADER.unpack_from(view)
    if not (0 <= number < len(_DTYPES) and 0 <= dims <= 4):
        return None
    dtype = getattr(torch, _DTYPES[number], None)
    shape = shape[:dims]
    if dtype is None or any(n < 0 for n in shape):
        return None
    count = 1
    for n in shape:
        count *= n
    size = torch.empty((), dtype=dtype).element_size()
    if count * size != len(view) - _HEADER.size:
        return None
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    payload = bytearray(view[_HEADER.size :])
    return torch.frombuffer(payload, dtype=torch.uint8).view(dtype).reshape(shape)


def _rank_key(key, tp_rank, tp_size):
    return key if tp_size <= 1 else f"{key}_tp_{tp_rank}"


class TensorMethods:
    """Tensors in and out. Puts answer 0 or a negative code, gets a tensor or None."""

    def _put_tensor(self, put, key, tensor, config):
        parts = _split(tensor)
        if parts is None:
            return _INVALID_PARAMS
        return put(key, *parts, config=config)

    def put_tensor(self, key, tensor):
        """Stores a tensor."""
        return self._put_tensor(self.put_parts, key, tensor, None)

    def pub_tensor(self, key, tensor, config=None):
        """Stores a tensor with a replica configuration."""
        return self._put_tensor(self.put_parts, key, tensor, config)

    def upsert_tensor(self, key, tensor, config=None):
        """Stores a tensor, replacing an existing object."""
        return self._put_tensor(self.upsert_parts, key, tensor, config)

    def get_tensor(self, key):
        """The tensor, on the host, or None."""
        data = self.get(key)
        return _deserialize_tensor(data) if data else None

    def batch_put_tensor(self, keys, tensors):
        """A code per key."""
        return self.batch_pub_tensor(keys, tensors)

    def batch_pub_tensor(self, keys, tensors, config=None):
        """A code per key."""
        if len(keys) != len(tensors):
            return [_INVALID_PARAMS] * len(keys)
        return [self.pub_tensor(k, t, config) for k, t in zip(keys, tensors)]

    def batch_upsert_tensor(self, keys, tensors, config=None):
        """A code per key."""
        if len(keys) != len(tensors):
            return [_INVALID_PARAMS] * len(keys)
        return [self.upsert_tensor(k, t, config) for k, t in zip(keys, tensors)]

    def batch_get_tensor(self, keys):
        """A tensor or None per key."""
        return [_deserialize_tensor(data) if data else None for data in self.get_batch(keys)]

    def _shards(self, tensor, tp_size, split_dim):
        if tp_size < 1 or not -tensor.dim() <= split_dim < tensor.dim():
            return None
        shards = tensor.chunk(tp_size, dim=split_dim)
        return shards if len(shards) == tp_size else None

    def put_tensor_with_tp(self, key, tensor, tp_rank=0, tp_size=1, split_dim=0):
        """Splits a full tensor along `split_dim` and stores every rank's shard."""
        return self.pub_tensor_with_tp(key, tensor, None, tp_rank, tp_size, split_dim)

    def pub_tensor_with_tp(self, key, tensor, config=None, tp_rank=0, tp_size=1, split_dim=0):
        """`put_tensor_with_tp` with a replica configuration."""
        shards = self._shards(tensor, tp_size, split_dim)
        if shards is None:
            return _INVALID_PARAMS
        for rank, shard in enumerate(shards):
            code = self.pub_tensor(_rank_key(key, rank, tp_size), shard, config)
            if code != 0:
                return code
        return 0

    def get_tensor_with_tp(self, key, tp_rank=0, tp_size=1, split_dim=0):
        """The shard of a rank."""
        return self.get_tensor(_rank_key(key, tp_rank, tp_size))

    def batch_put_tensor_with_tp(self, keys, tensors, tp_rank=0, tp_size=1, split_dim=0):
        """A code per key."""
        if len(keys) != len(tensors):
            return [_INVALID_PARAMS] * len(keys)
        return [self.put_tensor_with_tp(k, t, tp_rank, tp_size, split_dim) for k, t in zip(keys, tensors)]

    def batch_get_tensor_with_tp(self, keys, tp_rank=0, tp_size=1, split_dim=0):
        """A shard or None per key."""
        return self.batch_get_tensor([_rank_key(k, tp_rank, tp_size) for k in keys])

    def put_tensor_from(self, key, buffer_ptr, size, config=None):
        """Stores header and payload that lie in a registered buffer."""
        return self.put_from(key, buffer_ptr, size, config)

    def batch_put_tensor_from(self, keys, buffer_ptrs, sizes, config=None):
        """A code per key."""
        return self.batch_put_from(keys, buffer_ptrs, sizes, config)

    def get_tensor_into(self, key, buffer_ptr, size):
        """Reads header and payload into a registered buffer: a tensor over it, or None."""
        import ctypes

        import torch

        read = self.get_into(key, buffer_ptr, size)
        if read < _HEADER.size:
            return None
        memory = (ctypes.c_ubyte * read).from_address(buffer_ptr)
        number, dims, *shape = _HEADER.unpack_from(memory)
        if not (0 <= number < len(_DTYPES) and 0 <= dims <= 4):
            return None
        flat = torch.frombuffer(memory, dtype=torch.uint8)[_HEADER.size :]
        try:
            return flat.view(getattr(torch, _DTYPES[number])).reshape(shape[:dims])
        except RuntimeError:
            return None

    def batch_get_tensor_into(self, keys, buffer_ptrs, sizes):
        """A tensor over its buffer, or None, per key."""
        if not len(keys) == len(buffer_ptrs) == len(sizes):
            return [None] * len(keys)
        return [self.get_tensor_into(k, p, s) for k, p, s in zip(keys, buffer_ptrs, sizes)]
