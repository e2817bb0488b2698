"""A real master on a free port for each test session; its binary comes with the wheel."""

import os
import re
import subprocess
import sysconfig

import pytest

from mooncake.store import MooncakeDistributedStore

BINARY = os.path.join(sysconfig.get_path("scripts"), "mooncake")


class Master:
    """A `mooncake master` process."""

    def __init__(self, *flags):
        command = [BINARY, "master", "--port", "0", "--metrics-port", "off", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.address = re.search(r"listening on (\S+)", line).group(1)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def master():
    running = Master("--default-kv-lease-ttl", "300ms")
    yield running
    running.kill()


def joined(address, segment=0, **more):
    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment, 16 << 20, "tcp", "", address, **more)
    assert code == 0
    return store


@pytest.fixture(scope="session")
def lender(master):
    """Lends the memory all tests use, from a process of its own, so that data crosses processes."""
    command = [BINARY, "node", "--master", master.address, "--memory", "256MiB"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "in service" not in process.stdout.readline():
        assert process.poll() is None
    yield process
    process.kill()
    process.wait()


@pytest.fixture(params=["shm", "tcp"])
def store(request, master, lender, monkeypatch):
    monkeypatch.setenv("MOONCAKE_TRANSPORT", request.param)
    opened = joined(master.address)
    yield opened
    opened.remove_all(force=True)
    assert opened.close() == 0
