"""A shared KV-cache pool for LLM inference: a drop-in for upstream Mooncake's Python package."""

from mooncake._native import __version__

__all__ = ["__version__"]
