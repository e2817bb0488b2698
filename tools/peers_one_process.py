"""For tools/performance-peers: our store where the master has all the memory (`mooncake master --memory`), so that the
harness's holder, which lends memory beside other masters, lends none."""

import mooncake.store
from mooncake.store import *  # noqa: F403


class MooncakeDistributedStore(mooncake.store.MooncakeDistributedStore):
    def setup(self, hostname, metadata, segment, *rest):
        return super().setup(hostname, metadata, 0, *rest)
