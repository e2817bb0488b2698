"""A pool inside this process: nothing else has to run. `python embedded_pool.py`"""

from mooncake.store import MooncakeDistributedStore

store = MooncakeDistributedStore()
# No master address: one is started here, on a free loopback port.
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 0, "tcp", "", "") == 0
assert store.put("greeting", b"hello") == 0
print(store.get("greeting"), "from", store.get_hostname())
print("other processes of this host may join at", store.get_master_address())
store.close()
