"""A shared KV-cache pool for LLM inference: a drop-in for upstream Mooncake's Python package."""

from mooncake._native import __version__

__all__ = ["BufferPool", "RegisteredBufferPool", "__version__"]


def __getattr__(name):
    # The console names import this package and need no store.
    if name in ("BufferPool", "RegisteredBufferPool"):
        from mooncake import buffer_pool

        return getattr(buffer_pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
