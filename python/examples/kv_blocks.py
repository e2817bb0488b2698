"""KV-cache blocks as an engine moves them: one key per block, one buffer per layer, straight from and to its memory.

Start a pool first: `mooncake master --memory 1GiB`; then `python kv_blocks.py [HOST:PORT]`.
"""

import sys

import numpy

from mooncake.store import MooncakeDistributedStore

master = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
layers, block_bytes, blocks = 32, 16384, 8

store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master) == 0, "is the master there?"
cache = numpy.random.randint(0, 256, (layers, blocks, block_bytes), dtype=numpy.uint8)
base = cache.ctypes.data
assert store.register_buffer(base, cache.nbytes) == 0

keys = [f"example@{cache[:, b].tobytes().__hash__():x}" for b in range(blocks)]
where = [[base + (n * blocks + b) * block_bytes for n in range(layers)] for b in range(blocks)]
sizes = [[block_bytes] * layers] * blocks
print("put", store.batch_put_from_multi_buffers(keys, where, sizes))

before = cache.copy()
cache[:] = 0
print("present", store.batch_is_exist(keys))
print("read", store.batch_get_into_multi_buffers(keys, where, sizes))
assert (cache == before).all()
store.unregister_buffer(base)
store.close()
