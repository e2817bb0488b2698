"""Registered buffers to borrow and give back: `BufferPool`."""

import ctypes
import threading
import time

from mooncake._native import MooncakeHostMemAllocator


class BufferLease:
    """A borrowed buffer; give it back with `release` or a `with` block."""

    def __init__(self, pool, ptr, size, size_class):
        self.ptr = ptr
        self.size = size
        self._pool = pool
        self._class = size_class

    @property
    def buffer(self):
        """The bytes, as a writable view."""
        if self._pool is None:
            raise ValueError("the lease is released")
        return memoryview((ctypes.c_ubyte * self.size).from_address(self.ptr)).cast("B")

    def release(self):
        """Gives the buffer back; a second call does nothing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._give_back(self.ptr, self._class)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


class BufferPool:
    """Buffers registered with a store, in power-of-two size classes, reused.

    `max_bytes` bounds what is allocated at once (0 = no bound). At the bound `acquire` waits up to `timeout` seconds
    (`block_on_exhaustion`), or raises `MemoryError`.
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
        if min_size_class <= 0 or max_bytes < 0:
            raise ValueError("sizes must be positive")
        self._store = store
        self._max_bytes = max_bytes
        self._min = min_size_class
        self._max = max_size_class
        self._alignment = alignment
        self._block = block_on_exhaustion
        self._timeout = default_timeout
        self._max_regions = max_regions
        self._memory = MooncakeHostMemAllocator()
        self._free = {}
        self._all = {}
        self._out = 0
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        if prewarm_size and prewarm_count:
            self.prewarm(prewarm_size, prewarm_count)

    def _class_of(self, size):
        if size <= 0:
            raise ValueError("size must be positive")
        size_class = self._min
        while size_class < size:
            size_class *= 2
        if self._max is not None and size_class > self._max:
            raise ValueError(f"{size} bytes are more than max_size_class")
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
            raise MemoryError(f"no memory for a buffer of {size_class} bytes")
        if self._store.register_buffer(ptr, size_class) != 0:
            self._memory.free(ptr)
            raise RuntimeError("the store did not register the buffer: is it set up?")
        self._all[ptr] = size_class
        self._bytes += size_class
        return ptr

    def acquire(self, size, timeout=None):
        """A lease of at least `size` bytes."""
        size_class = self._class_of(size)
        if self._max_bytes and size_class > self._max_bytes:
            raise MemoryError(f"{size} bytes are more than the pool's max_bytes")
        wait = self._timeout if timeout is None else timeout
        until = None if wait is None else time.monotonic() + wait
        with self._changed:
            while True:
                if self._closed:
                    raise RuntimeError("the pool is closed")
                free = self._free.get(size_class)
                if free:
                    ptr = free.pop()
                    break
                if not self._fits(size_class):
                    self._drop_idle()
                if self._fits(size_class):
                    ptr = self._make(size_class)
                    break
                left = None if until is None else until - time.monotonic()
                if not self._block or (left is not None and left <= 0):
                    raise MemoryError("all buffers of the pool are in use")
                self._changed.wait(left)
            self._out += 1
        return BufferLease(self, ptr, size, size_class)

    buffer = acquire

    def _give_back(self, ptr, size_class):
        with self._changed:
            self._out -= 1
            if self._closed:
                self._forget(ptr)
            else:
                self._free.setdefault(size_class, []).append(ptr)
            self._changed.notify()

    def prewarm(self, size, count=1):
        """Makes `count` buffers for `size` bytes ahead."""
        size_class = self._class_of(size)
        with self._changed:
            for _ in range(count):
                if not self._fits(size_class):
                    break
                self._free.setdefault(size_class, []).append(self._make(size_class))

    def close(self):
        """Frees idle buffers; those lent out are freed when they come back."""
        with self._changed:
            self._closed = True
            self._drop_idle()
            self._changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


RegisteredBufferPool = BufferPool
