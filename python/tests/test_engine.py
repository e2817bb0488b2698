"""`mooncake.engine`: two processes exchange memory by address."""

import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from mooncake.engine import TransferEngine, TransferNotify, TransferOpcode

PEER = """
import ctypes, sys
from mooncake.engine import TransferEngine
engine = TransferEngine()
assert engine.initialize(sys.argv[1], sys.argv[2], "tcp", "") == 0
memory = ctypes.create_string_buffer(b"\\x07" * 300_000, 300_000)
assert engine.register_memory(ctypes.addressof(memory), 300_000) == 0
print(engine.get_rpc_port(), ctypes.addressof(memory), flush=True)
for line in sys.stdin:
    if line.strip() == "notifies":
        print([(n.name, n.msg) for n in engine.get_notifies()], flush=True)
    else:
        at, n = map(int, line.split())
        print(memory.raw[at : at + n].hex(), flush=True)
"""


class Peer:
    def __init__(self, name, metadata="P2PHANDSHAKE"):
        command = [sys.executable, "-c", PEER, name, metadata]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        port, base = self.process.stdout.readline().split()
        self.name, self.base = f"127.0.0.1:{port}", int(base)

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def stop(self):
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture
def peer():
    running = Peer("127.0.0.1")
    yield running
    running.stop()


@pytest.fixture
def engine():
    made = TransferEngine()
    assert made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    return made


def test_transfers(engine, peer):
    address = engine.allocate_managed_buffer(1 << 20)
    assert address
    data = os.urandom(200_000)
    assert engine.write_bytes_to_buffer(address, data, len(data)) == 0
    assert engine.transfer_sync_write(peer.name, address, peer.base + 50, 200_000) == 0
    assert peer.ask("49 3") == (b"\x07" + data[:2]).hex()
    assert engine.transfer_sync_read(peer.name, address + 300_000, peer.base, 100) == 0
    got = engine.read_bytes_from_buffer(address + 300_000, 100)
    assert got == b"\x07" * 50 + data[:50]
    notify = TransferNotify("layer", "done")
    code = engine.transfer_sync(
        peer.name, address, peer.base, 10, TransferOpcode.WRITE, notify=notify
    )
    assert code == 0 and peer.ask("notifies") == "[('layer', 'done')]"
    read = engine.transfer_sync(peer.name, address + 9, peer.base, 1, TransferOpcode.Read)
    assert read == 0
    assert engine.get_first_buffer_address(peer.name) == peer.base
    assert engine.free_managed_buffer(address, 1 << 20) == 0


def test_batches(engine, peer):
    memory = ctypes.create_string_buffer(os.urandom(4096), 4096)
    base = ctypes.addressof(memory)
    assert engine.batch_register_memory([base], [4096]) == 0
    local, remote = [base, base + 1000], [peer.base + 7, peer.base + 9000]
    assert engine.batch_transfer_sync_write(peer.name, local, remote, [10, 20]) == 0
    assert peer.ask("9000 20") == memory.raw[1000:1020].hex()
    first = engine.batch_transfer_async_write(peer.name, local, remote, [11, 21])
    second = engine.batch_transfer_async_read(peer.name, [base + 2000], [peer.base], [5])
    assert first > 0 and second > 0
    assert engine.get_batch_transfer_status([first, second]) == 0
    assert memory.raw[2000:2005] == b"\x07" * 5
    third = engine.transfer_submit_write(peer.name, base, peer.base, 5)
    until = time.monotonic() + 10
    while (state := engine.transfer_check_status(third)) == 0 and time.monotonic() < until:
        time.sleep(0.001)
    assert state == 1 and engine.transfer_check_status(third) == -1
    assert engine.batch_unregister_memory([base]) == 0


def test_refusals(engine, peer):
    memory = ctypes.create_string_buffer(4096)
    base = ctypes.addressof(memory)
    assert engine.register_memory(base, 4096) == 0
    assert engine.register_memory(base + 100, 10) == -7, "overlaps"
    assert engine.register_memory(0, 10) == -1 and engine.register_memory(0xDEAD0000, 10) == -1
    assert engine.transfer_sync_write(peer.name, base, peer.base + 299_999, 2) == -1, "outside"
    assert engine.transfer_sync_write(peer.name, 0xDEAD0000, peer.base, 2) == -1
    assert engine.transfer_sync_write("127.0.0.1:9", base, peer.base, 2) == -1, "nobody"
    assert engine.transfer_sync_write("nonsense", base, peer.base, 2) == -1
    assert engine.batch_transfer_sync_write(peer.name, [base], [peer.base], [1, 2]) == -1
    assert engine.send_probe(peer.name) == 0 and engine.send_probe("127.0.0.1:9") == -102
    assert engine.unregister_memory(base) == 0 and engine.unregister_memory(base) == -3
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == -1, "twice"
    fresh = TransferEngine()
    assert fresh.initialize("127.0.0.1", "ftp://x", "tcp", "") == -200
    assert fresh.initialize("no such host", "P2PHANDSHAKE", "tcp", "") == -101
    assert fresh.get_rpc_port() == -1 and fresh.register_memory(base, 1) == -1
    assert fresh.transfer_sync_write(peer.name, base, peer.base, 2) == -1
    assert fresh.get_notifies() == [] and fresh.get_engine_ptr() == 0
    with pytest.raises(TypeError):
        engine.register_memory("x", 1)
    with pytest.raises(ValueError):
        engine.read_bytes_from_buffer(0xDEAD0000, 5)


def test_a_peer_that_dies(engine, peer):
    memory = ctypes.create_string_buffer(4096)
    base = ctypes.addressof(memory)
    assert engine.transfer_sync_write(peer.name, base, peer.base, 10) == 0
    peer.process.kill()
    peer.process.wait()
    start = time.monotonic()
    assert engine.transfer_sync_write(peer.name, base, peer.base, 10) == -1
    assert time.monotonic() - start < 10


class Metadata(BaseHTTPRequestHandler):
    """Upstream's HTTP metadata server, as far as names go."""

    values = {}

    def key(self):
        return parse_qs(urlsplit(self.path).query)["key"][0]

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        self.values[self.key()] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200)

    def do_GET(self):
        value = self.values.get(self.key())
        self.answer(*((404,) if value is None else (200, value)))

    def do_DELETE(self):
        self.answer(200 if self.values.pop(self.key(), None) else 404)

    def log_message(self, *_):
        pass


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(params=["master", "console", "http", "redis", "etcd"])
def metadata(request, tmp_path):
    if request.param == "master":
        yield f"http://{request.getfixturevalue('master').address}/metadata"
        return
    if request.param == "console":
        script = os.path.join(sysconfig.get_path("scripts"), "mooncake_http_metadata_server")
        process = subprocess.Popen([script, "--port", "0"], stdout=subprocess.PIPE, text=True)
        address = re.search(r"listening on (\S+)", process.stdout.readline()).group(1)
        yield f"http://{address}/metadata"
        process.kill()
        process.wait()
        return
    if request.param == "http":
        server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metadata"
        server.shutdown()
        return
    program = "redis-server" if request.param == "redis" else "etcd"
    binary = shutil.which(program)
    # tools/test-python installs both.
    assert binary, f"{program} is not installed"
    port, other = free_port(), free_port()
    if request.param == "redis":
        command = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    else:
        client, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{other}"
        command = ["--data-dir", str(tmp_path), "--listen-client-urls", client]
        command += ["--advertise-client-urls", client, "--listen-peer-urls", peers]
        command += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([binary, *command], stdout=quiet, stderr=quiet)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.02)
    yield f"{request.param}://127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_names(metadata):
    """A peer is found by the name it gave itself."""
    other = Peer("localhost:12345", metadata)
    engine = TransferEngine()
    assert engine.initialize("127.0.0.1:23456", metadata, "tcp", "") == 0
    memory = ctypes.create_string_buffer(16)
    base = ctypes.addressof(memory)
    assert engine.transfer_sync_read("localhost:12345", base, other.base, 16) == 0
    assert memory.raw == b"\x07" * 16
    assert engine.transfer_sync_read("somebody:1", base, other.base, 16) == -1
    other.stop()


def test_large_metadata_values(master):
    """An engine with very many buffers describes each of them."""
    from urllib.request import Request, urlopen

    url, value = f"http://{master.address}/metadata?key=large", os.urandom(5 << 20)
    with urlopen(Request(url, data=value, method="PUT"), timeout=10) as answer:
        assert answer.status == 200
    with urlopen(url, timeout=10) as answer:
        assert answer.read() == value
    with urlopen(Request(url, method="DELETE"), timeout=10) as answer:
        assert answer.status == 200


def test_the_status_of_a_batch_comes_in_time(peer, monkeypatch):
    import signal

    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", "1")
    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    memory = ctypes.create_string_buffer(1000)
    assert engine.transfer_sync_read(peer.name, ctypes.addressof(memory), peer.base, 1000) == 0
    os.kill(peer.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        batch = engine.batch_transfer_async_read(peer.name, [ctypes.addressof(memory)], [peer.base], [1000])
        assert batch > 0 and engine.get_batch_transfer_status([batch]) == -1
        assert time.monotonic() - began < 4
    finally:
        os.kill(peer.process.pid, signal.SIGCONT)
