"""`mooncake.store`: the pool's client, with upstream's names.

Calls return upstream's values: 0 or a negative code, ints instead of bools, `b""` for what is missing. Only arguments of
a wrong type raise.
"""

import atexit
import weakref

from mooncake._enums import ObjectDataType, ReplicaStatus, SoftPinAction, TaskStatus, TaskType
from mooncake._native import (
    BufferDescriptor,
    BufferHandle,
    DiskDescriptor,
    MemoryDescriptor,
    MooncakeHostMemAllocator,
    ReplicaDescriptor,
    ReplicateConfig,
    Store as _Store,
    bind_to_numa_node,
)
from mooncake._parallel_tensors import ParallelTensorMethods
from mooncake._shards import ParallelAxis, ReadTarget, TensorParallelism
from mooncake._tasks import QueryTaskResponse, TaskMethods
from mooncake._tensors import _deserialize_tensor, _serialize_tensor, _tensor_metadata_size
from mooncake.buffer_pool import BufferPool, RegisteredBufferPool

__all__ = [
    "BufferDescriptor",
    "BufferHandle",
    "BufferPool",
    "DiskDescriptor",
    "MemoryDescriptor",
    "MooncakeDistributedStore",
    "MooncakeHostMemAllocator",
    "ObjectDataType",
    "ParallelAxis",
    "QueryTaskResponse",
    "ReadTarget",
    "RegisteredBufferPool",
    "ReplicaDescriptor",
    "ReplicaStatus",
    "ReplicateConfig",
    "SoftPinAction",
    "TaskStatus",
    "TaskType",
    "TensorParallelism",
    "bind_to_numa_node",
]

_open = weakref.WeakSet()


class MooncakeDistributedStore(ParallelTensorMethods, TaskMethods, _Store):
    """A client of a pool; see `setup`. Every method may be called from any thread."""

    def setup(self, *args, **kwargs):
        code = super().setup(*args, **kwargs)
        if code == 0:
            _open.add(self)
        return code

    def close(self):
        """Leaves the pool; what this process lent is unmounted. 0, also when there is nothing to close."""
        tasks = self.__dict__.pop("_tasks", None)
        if tasks is not None:
            tasks.close()
        return super().close()

    def tearDownAll(self):
        """Upstream's name for `close`."""
        return self.close()


MooncakeDistributedStore.setup.__doc__ = _Store.setup.__doc__


@atexit.register
def _close_all():
    # A process that leaves without closing would stay in the master's list until its silence is noticed.
    for store in list(_open):
        store.close()
