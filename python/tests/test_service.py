"""The REST service as a process of its own, over a real master."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.parse

import pytest
from conftest import BINARY, Master, joined

from mooncake import _console
from mooncake.mooncake_store_service import BODY_LIMIT, MooncakeStoreService, _range_of, _shm_name_to_path

MODULE = [sys.executable, "-m", "mooncake.mooncake_store_service"]
MIB = 1 << 20


def until(found, seconds=20):
    """The first true answer of `found`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = found()
        if answer:
            return answer
        time.sleep(0.05)
    raise AssertionError("not within the time")


class Service:
    """A service process; what it logs goes to a file."""

    def __init__(self, directory, master, *flags, settings=None, environment=None, wait=True):
        config = directory / "mooncake.json"
        given = {
            "local_hostname": "127.0.0.1",
            "metadata_server": "P2PHANDSHAKE",
            "master_server_address": master,
            "global_segment_size": 0,
            **(settings or {}),
        }
        config.write_text(json.dumps(given))
        self.log = directory / "log"
        command = [*MODULE, "--config", str(config), "--port", "0", *flags]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stderr=log, env={**os.environ, **(environment or {})})
        if wait:
            self.wait()

    def wait(self):
        def listening():
            assert self.process.poll() is None, self.log.read_text()
            return re.search(r"listening on (\S+) port (\d+)", self.log.read_text())

        host, port = until(listening).groups()
        self.host, self.port = host, int(port)

    def call(self, method, path, body=None, headers=None):
        """Status, headers and body of a request."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    def ask(self, method, path, body=None, headers=None):
        """Status and JSON of a request whose body, when there is one, is JSON."""
        body = None if body is None else json.dumps(body)
        status, _, text = self.call(method, path, body, headers)
        return status, json.loads(text)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(20)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory, master, lender):
    running = Service(tmp_path_factory.mktemp("service"), master.address)
    yield running
    running.kill()


@pytest.fixture
def start(tmp_path):
    """Starts services that the test itself may end."""
    started = []

    def begin(*arguments, **more):
        started.append(Service(tmp_path, *arguments, **more))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


def test_text(service, store):
    assert service.ask("PUT", "/api/put", {"key": "text", "value": "grüße"}) == (200, {"status": "success"})
    status, headers, body = service.call("GET", "/api/get/text")
    assert (status, body) == (200, "grüße".encode())
    assert headers["Content-Type"] == "application/octet-stream"
    assert store.get("text") == "grüße".encode(), "another process of the pool reads the same"


@pytest.mark.parametrize("size", [1, 4096, 3 * MIB + 1])
def test_binary(service, store, size):
    value = os.urandom(size)
    status, _, body = service.call("PUT", f"/api/put/raw{size}", value)
    assert (status, json.loads(body)) == (200, {"status": "success"})
    assert service.call("GET", f"/api/get/raw{size}")[2] == value == store.get(f"raw{size}")


@pytest.mark.parametrize("key", ["a/b", "a b", "ключ", "100%", "a?b#c", "{k}"])
def test_keys_are_quoted_in_paths(service, store, key):
    quoted = urllib.parse.quote(key, safe="")
    assert store.put(key, key.encode()) == 0
    assert service.call("GET", f"/api/get/{quoted}")[2] == key.encode()
    assert service.ask("GET", f"/api/exist/{quoted}") == (200, {"exists": True})


def test_empty_value(service, store):
    """The pool decides whether it takes empty objects; what it took is read as empty, what not is missing."""
    status, answer = service.ask("PUT", "/api/put", {"key": "empty", "value": ""})
    if status == 200:
        assert service.call("GET", "/api/get/empty")[::2] == (200, b"")
        assert service.call("GET", "/api/get/empty", headers={"Range": "bytes=0-"})[0] == 416
    else:
        assert (status, answer["ret"]) == (400, -600) and service.call("GET", "/api/get/empty")[0] == 404


def test_missing_keys(service, store):
    assert service.ask("GET", "/api/get/missing") == (404, {"error": "Key not found"})
    assert service.call("HEAD", "/api/get/missing")[0] == 404
    assert service.call("GET", "/api/get/missing", headers={"Range": "bytes=0-1"})[0] == 404
    assert service.ask("GET", "/api/exist/missing") == (200, {"exists": False})
    assert service.ask("DELETE", "/api/remove/missing") == (404, {"error": "Key not found", "ret": -704})


def test_remove(service, store):
    assert store.put("gone", b"1") == 0
    assert service.ask("GET", "/api/exist/gone") == (200, {"exists": True})
    # A look at a key leases it for 300 ms here.
    until(lambda: service.ask("DELETE", "/api/remove/gone") == (200, {"status": "success"}))
    assert service.ask("GET", "/api/exist/gone") == (200, {"exists": False})


def test_remove_of_a_leased_key(service, store):
    assert store.put("leased", b"1") == 0
    for _ in range(20):
        assert store.is_exist("leased") == 1
        status, answer = service.ask("DELETE", "/api/remove/leased")
        if status == 409:
            break
    assert status == 409 and answer["ret"] == -706 and "force" in answer["error"]
    assert service.ask("DELETE", "/api/remove/leased?force=true") == (200, {"status": "success"})


def test_keys_in_pages(service, store):
    wanted = {f"page/{n}ä": n + 1 for n in range(25)}
    for key, size in wanted.items():
        assert store.put(key, b"v" * size) == 0
    assert store.put("elsewhere", b"v") == 0
    found, pages, cursor = {}, 0, ""
    while cursor is not None:
        query = urllib.parse.urlencode({"prefix": "page/", "limit": 10, **({"cursor": cursor} if cursor else {})})
        status, page = service.ask("GET", f"/api/keys?{query}")
        assert status == 200 and len(page["keys"]) <= 10
        new = {row["key"]: row["size"] for row in page["keys"]}
        assert not set(new) & set(found), "no key twice"
        found.update(new)
        cursor, pages = page["next_cursor"], pages + 1
        assert pages < 100
    assert found == wanted and pages >= 3
    status, page = service.ask("GET", "/api/keys?prefix=nothing")
    assert (status, page) == (200, {"keys": [], "next_cursor": None})
    assert "elsewhere" in [row["key"] for row in service.ask("GET", "/api/keys")[1]["keys"]]
    for wrong in ("limit=1001", "limit=-1", "limit=x", "cursor=x", f"cursor={1 << 64}", "limit=1e1"):
        assert service.ask("GET", f"/api/keys?{wrong}")[0] == 400, wrong


def test_many_requests_at_once(service, store):
    """More than the store has threads, of all sizes, and nobody gets another's bytes."""
    from concurrent.futures import ThreadPoolExecutor

    values = {f"many{n}": os.urandom((n % 7 + 1) * (300_000 if n % 5 == 0 else 1000)) for n in range(60)}

    def round_trip(key):
        value = values[key]
        put, _, _ = service.call("PUT", f"/api/put/{key}", value)
        got, _, body = service.call("GET", f"/api/get/{key}")
        part, headers, piece = service.call("GET", f"/api/get/{key}", headers={"Range": "bytes=100-199"})
        right = body == value and piece == value[100:200] and headers["Content-Range"] == f"bytes 100-199/{len(value)}"
        return put, got, part, right

    with ThreadPoolExecutor(24) as pool:
        assert set(pool.map(round_trip, values)) == {(200, 200, 206, True)}


def test_remove_all(service, store):
    assert store.put_batch([f"all{i}" for i in range(5)], [b"v"] * 5) == 0
    assert service.ask("DELETE", "/api/remove_all") == (200, {"status": "success removed 5 keys"})
    assert store.is_exist("all0") == 0


def test_head(service, store):
    assert store.put("headed", bytes(1000)) == 0
    status, headers, body = service.call("HEAD", "/api/get/headed")
    assert (status, headers["Content-Length"], headers["Accept-Ranges"], body) == (200, "1000", "bytes", b"")


@pytest.mark.parametrize(
    ("asked", "status", "first", "length"),
    [
        ("bytes=0-9", 206, 0, 10),
        ("bytes=990-", 206, 990, 10),
        ("bytes=990-5000", 206, 990, 10),
        ("bytes=-10", 206, 990, 10),
        ("bytes=-5000", 206, 0, 1000),
        ("bytes=1000-", 416, None, None),
        ("bytes=-0", 416, None, None),
        ("bytes=5-4", 200, 0, 1000),
        ("bytes=0-1,4-5", 200, 0, 1000),
        ("bytes=-", 200, 0, 1000),
        ("lines=0-1", 200, 0, 1000),
        ("bytes=" + "9" * 5000 + "-", 200, 0, 1000),
    ],
)
def test_ranges(service, store, asked, status, first, length):
    value = bytes(i % 251 for i in range(1000))
    assert store.put("ranged", value) == 0
    got, headers, body = service.call("GET", "/api/get/ranged", headers={"Range": asked})
    assert got == status
    if status == 416:
        assert headers["Content-Range"] == "bytes */1000" and "error" in json.loads(body)
        return
    assert body == value[first : first + length]
    if status == 206:
        assert headers["Content-Range"] == f"bytes {first}-{first + length - 1}/1000"


def test_range_of_a_large_object(service, store):
    value = os.urandom(8 * MIB)
    assert store.put("large", value) == 0
    got = service.call("GET", "/api/get/large", headers={"Range": "bytes=1000000-7000000"})
    assert got[0] == 206 and got[2] == value[1000000:7000001]
    conditional = {"Range": "bytes=0-1", "If-Range": '"tag"'}
    assert service.call("GET", "/api/get/large", headers=conditional)[0] == 200


PUT, MOUNT, SHM, MODE = ("PUT", "/api/put"), ("POST", "/api/mount"), ("POST", "/api/mount_shm"), ("POST", "/api/reconfigure")
UNMOUNTS = [("POST", "/api/unmount"), ("POST", "/api/unmount_shm")]
BAD = [
    (PUT, {}),
    (PUT, {"key": "k"}),
    (PUT, {"value": "v"}),
    (PUT, {"key": "", "value": "v"}),
    (PUT, {"key": 1, "value": "v"}),
    (PUT, {"key": "k", "value": 1}),
    (PUT, {"key": "k", "value": {"a": 1}}),
    (PUT, {"key": "k", "value": "\ud800"}),
    (PUT, {"key": "\ud800", "value": "v"}),
    *[(MOUNT, {"size": size}) for size in (None, 0, -1, 1.5, "1", True, 1 << 64)],
    (MOUNT, {"size": 4096, "protocol": 1}),
    (MOUNT, {"size": 4096, "location": []}),
    *[(SHM, {"name": name, "size": 4096}) for name in (None, "", 1, "/", "..", "../x", "a/b", "/../x", "a\0b")],
    (SHM, {"name": "n"}),
    (SHM, {"name": "n", "size": 0}),
    (SHM, {"name": "n", "size": 4096, "offset": -1}),
    *[(path, {"segment_ids": ids}) for path in UNMOUNTS for ids in ([], "", None, 1, [1], {"a": 1})],
    *[(path, {"segment_ids": ["s"], "grace_period_seconds": g}) for path in UNMOUNTS for g in (-1, 3601, "1", 1.5)],
    *[(("POST", "/api/unmount_local_disk"), {"grace_period_seconds": g}) for g in (-1, 3601, True)],
    *[(MODE, {"mode": mode}) for mode in (None, 1, "", "both", "decode")],
    (MODE, {"mode": "decode", "path": "/dev/shm/x", "size": "1"}),
    (MODE, {"mode": "decode", "path": 1, "size": 1}),
]


@pytest.mark.parametrize(("where", "body"), BAD, ids=str)
def test_bad_fields(service, where, body):
    status, reply = service.ask(*where, body)
    assert status == 400 and list(reply) == ["error"], reply


BODIES = [b"", b"{", b"[]", b"1", b"\xff\xfe", b"[" * 100000, b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("body", BODIES, ids=lambda b: repr(b[:8]))
@pytest.mark.parametrize(
    "where", [PUT, MOUNT, SHM, MODE, *UNMOUNTS, ("POST", "/api/unmount_local_disk")], ids=lambda w: w[1]
)
def test_bad_json(service, where, body):
    status, _, reply = service.call(*where, body)
    assert status == 400 and "error" in json.loads(reply)
    assert b"Traceback" not in reply


def test_other_bad_requests(service):
    charset = {"Content-Type": "application/json; charset=nonsense"}
    assert service.call("PUT", "/api/put", b"{}", charset)[0] == 400
    assert service.ask("GET", "/api/nothing") == (404, {"error": "Not Found"})
    status, headers, body = service.call("POST", "/api/put", b"{}")
    assert status == 405 and headers["Allow"] == "PUT" and "error" in json.loads(body)


def test_too_large(service, store):
    """A body that says that it is too large is refused before it is read, one that does not is when it has become so."""
    with socket.create_connection((service.host, service.port), 30) as raw:
        raw.sendall(f"PUT /api/put/big HTTP/1.1\r\nHost: h\r\nContent-Length: {BODY_LIMIT + 1}\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")

    def chunks():
        for _ in range(BODY_LIMIT // MIB + 1):
            yield bytes(MIB)

    try:
        status, _, body = service.call("PUT", "/api/put/big", chunks())
        assert status == 413 and "error" in json.loads(body)
    except (BrokenPipeError, ConnectionResetError):
        pass  # It hung up while we were still sending.
    assert store.is_exist("big") == 0
    assert service.call("GET", "/health")[0] == 200


def test_largest(service, store):
    value = os.urandom(MIB) * (BODY_LIMIT // MIB)
    assert service.call("PUT", "/api/put/largest", value)[0] == 200
    assert service.call("GET", "/api/get/largest")[2] == value


def test_mount_and_unmount(service):
    status, mounted = service.ask("POST", "/api/mount", {"size": 16 * MIB, "protocol": "tcp", "location": "cpu:0"})
    assert status == 200 and mounted["status"] == "success" and mounted["allocated_size"] == 16 * MIB
    ids = mounted["segment_ids"]
    assert len(ids) == 1
    assert service.ask("POST", "/api/unmount", {"segment_ids": ids}) == (200, {"status": "success"})
    status, again = service.ask("POST", "/api/unmount", {"segment_ids": ids[0], "grace_period_seconds": 1})
    assert status == 500 and again["ret"] == -101
    status, disk = service.ask("POST", "/api/unmount_local_disk", {})
    assert status == 500 and disk["error"].startswith("Unmount local disk failed, ret=")


@pytest.fixture
def shared_file():
    name = f"mooncake-test-service-{os.getpid()}"
    path = f"/dev/shm/{name}"
    with open(path, "wb") as file:
        file.truncate(4 * MIB)
    yield name, path
    os.unlink(path)


def test_mount_shm_relays_the_store(service, shared_file):
    name, _ = shared_file
    status, mounted = service.ask("POST", "/api/mount_shm", {"name": f"/{name}", "size": 4 * MIB})
    assert status == 200, mounted
    assert service.ask("POST", "/api/unmount_shm", mounted) == (200, {"status": "success"})
    status, again = service.ask("POST", "/api/unmount_shm", mounted)
    assert status == 500 and again["failed_segment_ids"] == mounted["segment_ids"]


def test_reconfigure(service, shared_file):
    _, path = shared_file
    status, decode = service.ask("POST", "/api/reconfigure", {"mode": "decode", "path": path, "size": 4 * MIB})
    if status == 200:
        assert decode["mode"] == "decode" and decode["segment_ids"]
    else:
        assert decode["mode"] == "prefill" and "rolled back to prefill" in decode["error"]
    assert service.ask("POST", "/api/reconfigure", {"mode": "PREFILL"}) == (200, {"status": "success", "mode": "prefill"})


def test_token(start):
    secret = {"MOONCAKE_TOKEN": "s3cret"}
    environment = {**os.environ, **secret}
    pool = subprocess.Popen(
        [BINARY, "master", "--port", "0", "--metrics-port", "off", "--memory", "64MiB"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        address = re.search(r"listening on (\S+)", pool.stdout.readline()).group(1)
        service = start(address, environment=secret)
        wrong = ["", "Bearer", "Bearer ", "Bearer wrong", "Basic s3cret", "s3cret", "Bearer s3cret2", b"Bearer \xff\xfe"]
        for header in [{}, *({"Authorization": w} for w in wrong)]:
            status, headers, body = service.call("GET", "/api/exist/k", headers=header)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), header
            assert json.loads(body) == {"error": "Unauthorized"}
        for path in ("/nothing", "/health/", "//health"):
            assert service.call("GET", path)[0] == 401
        assert service.call("POST", "/health")[0] == 401
        assert service.ask("GET", "/health") == (200, {"status": "ok"})
        right = {"Authorization": "Bearer s3cret"}
        assert service.ask("PUT", "/api/put", {"key": "k", "value": "v"}, right) == (200, {"status": "success"})
        assert service.call("GET", "/api/get/k", headers=right)[2] == b"v"
    finally:
        pool.kill()
        pool.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_master_comes_later(start):
    port = free_port()
    service = start(f"127.0.0.1:{port}", wait=False)
    until(lambda: "setup of the store failed" in service.log.read_text())
    late = _master_on(port)
    try:
        service.wait()
        assert service.ask("PUT", "/api/put", {"key": "k", "value": "v"})[0] == 200
    finally:
        late.kill()
        late.wait()
    assert service.ask("GET", "/health") == (503, {"error": "the pool does not answer"})


def _master_on(port):
    command = [BINARY, "master", "--port", str(port), "--metrics-port", "off", "--memory", "64MiB"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def test_master_never_comes(start):
    service = start(f"127.0.0.1:{free_port()}", "--max-wait-time", "1", wait=False)
    assert service.process.wait(20) == 1
    log = service.log.read_text()
    assert "could not be set up" in log and "Traceback" not in log


def test_stopped_while_it_waits(start):
    service = start(f"127.0.0.1:{free_port()}", wait=False)
    until(lambda: "setup of the store failed" in service.log.read_text())
    assert service.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount(start, number):
    """What the service lent, at its start and later, is gone from the master when it has ended."""
    own = Master("--client-ttl", "1h")
    try:
        service = start(own.address, "-D", "global_segment_size=16MB", settings={"global_segment_size": 0})
        assert service.ask("POST", "/api/mount", {"size": 8 * MIB})[0] == 200
        assert service.ask("PUT", "/api/put", {"key": "k", "value": "v"})[0] == 200
        watching = joined(own.address)
        assert watching.is_exist("k") == 1
        assert service.stop(number) == 0
        log = service.log.read_text()
        assert "store closed" in log and "Traceback" not in log
        assert watching.put("later", b"v") < 0, "nobody lends memory now"
        watching.close()
    finally:
        own.kill()


def test_bad_starts(tmp_path, master):
    def fails(*flags, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOONCAKE_")}
        done = subprocess.run(
            [*MODULE, *flags], capture_output=True, text=True, timeout=30, env={**environment, **variables}
        )
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "MOONCAKE_CONFIG_PATH" in fails()
    assert "No such file" in fails("--config", str(tmp_path / "none"))
    assert "key=value" in fails("-D", "nonsense")
    given = {"MOONCAKE_MASTER": master.address, "MOONCAKE_LOCAL_HOSTNAME": "127.0.0.1"}
    assert "not a size" in fails("-D", "global_segment_size=much", **given)
    given["MOONCAKE_GLOBAL_SEGMENT_SIZE"] = "0"
    assert "nosuch" in fails("-D", "nosuch=1", "--port", "70000", **given)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in fails("--port", str(taken.getsockname()[1]), **given)


def test_slow_calls_do_not_hold_others_up():
    """The loop goes on while a store call sleeps."""
    import asyncio

    class Slow:
        def is_exist(self, _key):
            time.sleep(0.5)
            return 1

    class Request:
        match_info = {"key": "k"}

    async def run():
        service = MooncakeStoreService.__new__(MooncakeStoreService)
        service.store = Slow()
        begun = time.monotonic()
        answers = asyncio.gather(*(service.handle_exist(Request()) for _ in range(8)))
        await asyncio.sleep(0.01)
        assert time.monotonic() - begun < 0.3
        assert [a.status for a in await answers] == [200] * 8
        assert time.monotonic() - begun < 2

    asyncio.run(run())


def test_names_of_shared_memory():
    assert _shm_name_to_path("n") == _shm_name_to_path("/n") == "/dev/shm/n"
    assert _shm_name_to_path("a..b") == "/dev/shm/a..b"
    for bad in (None, 1, "", "/", ".", "..", "/..", "//n", "a/b", "../n", "n/..", "a\0"):
        assert _shm_name_to_path(bad) is None


def test_range_of_spaces():
    assert _range_of("bytes= 1 - 2", 10) == (1, 2)


def test_gflags_spelling():
    two = _console._two_dashes
    assert two(["-port", "1", "-port=1", "--port=1"]) == ["--port", "1", "--port=1", "--port=1"]
    assert two(["-h", "-V", "-1", "-", "--", "-port"]) == ["-h", "-V", "-1", "-", "--", "-port"]


@pytest.mark.parametrize(
    ("given", "become"),
    [
        ([], ["--port", "50052"]),
        (["--port=1"], ["--port", "1"]),
        (["--host", "10.0.0.1:7"], ["--bind", "10.0.0.1", "--port", "7"]),
        (["--host=10.0.0.1:7", "--port", "8"], ["--bind", "10.0.0.1", "--port", "8"]),
        (["--host=10.0.0.1"], ["--bind", "10.0.0.1", "--port", "50052"]),
        (["--host=[::1]:7"], ["--bind", "::1", "--port", "7"]),
        (["--host=::1"], ["--bind", "::1", "--port", "50052"]),
        (["--config", "f", "--memory", "1"], ["--config", "f", "--memory", "1"]),
    ],
)
def test_client_arguments(given, become, monkeypatch):
    monkeypatch.delenv("MOONCAKE_PORT", raising=False)
    assert _console._node_arguments(given) == become


def test_client_and_master_start_with_one_dash():
    scripts = sysconfig.get_path("scripts")
    ports = free_port(), free_port()
    command = [os.path.join(scripts, "mooncake_master"), "-port", str(ports[0]), "-metrics-port=off"]
    own = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    client = None
    try:
        assert f"127.0.0.1:{ports[0]}" in own.stdout.readline()
        command = [
            os.path.join(scripts, "mooncake_client"),
            f"-master_server_address=127.0.0.1:{ports[0]}",
            "-global_segment_size",
            "64MB",
            f"-host=127.0.0.1:{ports[1]}",
        ]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = []
        while not lines or "in service" not in lines[-1]:
            lines.append(client.stdout.readline())
            assert lines[-1], lines
        with socket.create_connection(("127.0.0.1", ports[1]), 10):
            pass
    finally:
        for process in filter(None, (client, own)):
            process.kill()
            process.wait()


def test_metadata_server_module():
    port = free_port()
    command = [sys.executable, "-m", "mooncake.http_metadata_server", "--port", str(port), "--log-level", "WARNING"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert str(port) in process.stdout.readline()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("PUT", "/metadata?key=a", b"{}")
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200
        connection.request("GET", "/metadata?key=a")
        assert connection.getresponse().read() == b"{}"
        connection.close()
    finally:
        process.kill()
        process.wait()
