"""`MooncakeDistributedStoreAsync`: the store for asyncio.

Calls that answer from memory of this host take microseconds; a hop to another thread would cost more than they do. The
async methods therefore hand the call to a small pool of threads of this object only, never to the loop's default one, so
that a slow peer holds up neither the loop nor other users of its executor. Cancelling stops waiting; the call ends by its
own deadline.
"""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

from mooncake.store import MooncakeDistributedStore

_PREFIX = "async_"


class MooncakeDistributedStoreAsync(MooncakeDistributedStore):
    """`await store.async_get(key)`: every method of the store, prefixed with `async_`."""

    def __init__(self, *_, max_workers=8, **__):
        self._executor = ThreadPoolExecutor(max_workers, thread_name_prefix="mooncake-async")

    def __getattr__(self, name):
        if not name.startswith(_PREFIX):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        method = getattr(self, name[len(_PREFIX) :])

        async def call(*args, **kwargs):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._executor, functools.partial(method, *args, **kwargs)
            )

        call.__name__ = name
        call.__doc__ = method.__doc__
        return call

    def close(self):
        """Closes the store; calls under way end first."""
        self._executor.shutdown(wait=True)
        return super().close()
