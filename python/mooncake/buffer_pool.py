"""Registered buffers to borrow and give back: `BufferPool`. Errors are upstream's: `RuntimeError`, with its texts."""

import threading
import time

from mooncake._native import LentMemory, MooncakeHostMemAllocator

_POINTER = 8


class BufferLease:
    """A borrowed buffer; give it back with `release`, a `with` block, or by letting go of it and its views."""

    def __init__(self, pool, ptr, size, size_class):
        self.size = size
        self._ptr = ptr
        self._pool = pool
        self._class = size_class
        self._memory = LentMemory(ptr, size)

    @property
    def ptr(self):
        """Address of the first byte."""
        self._must_be_open()
        return self._ptr

    @property
    def buffer(self):
        """The bytes, as a writable view, which keeps the lease."""
        self._must_be_open()
        return memoryview(self._memory.view(self))

    def _must_be_open(self):
        if self._pool is None:
            raise RuntimeError("buffer lease is closed")

    def release(self):
        """Gives the buffer back; a second call does nothing. RuntimeError while there are views of it."""
        if self._pool is not None and self._memory.views():
            raise RuntimeError("cannot release buffer while exported views exist")
        self._give_back()

    def _give_back(self):
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._take_back(self._ptr, self._class)

    def __del__(self):
        # Its views would keep it: there are none.
        if getattr(self, "_pool", None) is not None:
            self._give_back()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


class BufferPool:
    """Buffers registered with a store, in power-of-two size classes, reused.

    `max_bytes` bounds what is allocated at once, `max_regions` how many buffers (0, None = no bound). At the bound `acquire`
    waits, up to `timeout` seconds, unless `block` is False. Buffers larger than `max_size_class` are not kept for reuse.
    `alignment` is checked; buffers begin at pages.
    """

    def __init__(
        self,
        store,
        max_bytes=0,
        min_size_class=64 << 10,
        max_size_class=None,
        alignment=8 << 20,
        block_on_exhaustion=True,
        default_timeout=None,
        max_regions=None,
        prewarm_size=None,
        prewarm_count=0,
    ):
        if store is None:
            raise RuntimeError("MooncakeDistributedStore is not initialized")
        if min_size_class <= 0 or alignment <= 0:
            raise RuntimeError("min_size_class and alignment must be positive")
        if max_bytes < 0:
            raise ValueError("max_bytes must not be negative")
        if alignment < _POINTER or alignment & (alignment - 1):
            raise RuntimeError("alignment must be a power of two and at least sizeof(void*)")
        self._store = store
        self._max_bytes = max_bytes
        self._min = min_size_class
        self._max = max_size_class
        self._block = block_on_exhaustion
        self._timeout = default_timeout
        self._max_regions = max_regions
        self._memory = MooncakeHostMemAllocator()
        self._free = {}
        self._all = {}
        self._out = 0
        self._bytes = 0
        self._closed = False
        # A lease may be given back by the garbage collector, inside any of these methods.
        self._changed = threading.Condition(threading.RLock())
        if prewarm_size and prewarm_count:
            self.prewarm(prewarm_size, prewarm_count)

    def _is_kept(self, size):
        return self._max is None or size <= self._max

    def _class_of(self, size):
        size = max(size, 1)
        if not self._is_kept(size):
            return size
        size_class = self._min
        while size_class < size:
            size_class *= 2
        if self._max is not None:
            size_class = max(min(size_class, self._max), size)
        # The last class is what fits, when the next power of two does not.
        if self._max_bytes and size_class > self._max_bytes >= size:
            return self._max_bytes
        return size_class

    def _fits(self, size_class):
        regions = self._max_regions is None or len(self._all) < self._max_regions
        return regions and (self._max_bytes == 0 or self._bytes + size_class <= self._max_bytes)

    def _drop_idle(self):
        for buffers in self._free.values():
            while buffers:
                self._forget(buffers.pop())

    def _forget(self, ptr):
        self._store.unregister_buffer(ptr)
        self._memory.free(ptr)
        self._bytes -= self._all.pop(ptr)

    def _make(self, size_class):
        ptr = self._memory.alloc(size_class)
        if ptr == 0:
            raise RuntimeError(f"no memory for a buffer of {size_class} bytes: it exceeds the capacity of this host")
        if self._store.register_buffer(ptr, size_class) != 0:
            self._memory.free(ptr)
            raise RuntimeError("overflow buffer registration failed: is the store set up?")
        self._all[ptr] = size_class
        self._bytes += size_class
        return ptr

    def acquire(self, size, block=None, timeout=None):
        """A lease of `size` bytes."""
        if size < 0:
            raise TypeError("size must not be negative")
        wait = self._timeout if timeout is None else timeout
        if wait is not None and wait < 0:
            raise RuntimeError("timeout must be non-negative")
        size_class = self._class_of(size)
        if self._max_bytes and size_class > self._max_bytes:
            raise RuntimeError("requested buffer size exceeds pool capacity")
        blocks = self._block if block is None else block
        until = None if wait is None else time.monotonic() + wait
        with self._changed:
            ptr = self._one(size_class, blocks, until)
            self._out += 1
        return BufferLease(self, ptr, size, size_class)

    def _one(self, size_class, blocks, until):
        while True:
            if self._closed:
                raise RuntimeError("buffer pool is closed")
            free = self._free.get(size_class)
            if free:
                return free.pop()
            if not self._fits(size_class):
                self._drop_idle()
            if self._fits(size_class):
                return self._make(size_class)
            if not blocks:
                raise RuntimeError("buffer pool is exhausted")
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise RuntimeError("timed out waiting for buffer")
            self._changed.wait(left)

    def buffer(self, size, block=None, timeout=None):
        """The same as `acquire`."""
        return self.acquire(size, block, timeout)

    def _take_back(self, ptr, size_class):
        with self._changed:
            self._out -= 1
            if self._closed or not self._is_kept(size_class):
                self._forget(ptr)
            else:
                self._free.setdefault(size_class, []).append(ptr)
            self._changed.notify()

    def prewarm(self, size, count=1):
        """Makes `count` buffers for `size` bytes ahead, as far as there is room."""
        size_class = self._class_of(size)
        with self._changed:
            for _ in range(count):
                if not self._fits(size_class):
                    break
                self._free.setdefault(size_class, []).append(self._make(size_class))

    def close(self):
        """Frees the buffers; RuntimeError, and nothing done, while any are lent out."""
        with self._changed:
            if self._out:
                raise RuntimeError("cannot close buffer pool with active leases")
            self._closed = True
            self._drop_idle()
            self._changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


RegisteredBufferPool = BufferPool
RegisteredBufferLease = BufferLease
