"""The master's KV events, as a subscriber with libzmq sees them: PUB and replay on one port."""

import re
import struct
import subprocess
import time

import msgpack
import pytest
import zmq
from conftest import BINARY, joined

LIMIT_MS = 10_000


class Publisher:
    """A master that hosts memory and publishes what happens."""

    def __init__(self, *flags):
        command = [BINARY, "master", "--port", "0", "--metrics-port", "off", "--memory", "64MiB"]
        command += ["--kv-events-endpoint", "tcp://127.0.0.1:0", "--kv-events-backend-id", "pool-1", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = re.search(r"listening on (\S+)", self.process.stdout.readline()).group(1)
        self.endpoint = re.search(r"kv events on (\S+)", self.process.stdout.readline()).group(1)
        assert "embedded node" in self.process.stdout.readline()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def publisher():
    running = Publisher()
    yield running
    running.kill()


@pytest.fixture
def context():
    with zmq.Context() as opened:
        opened.linger = 0
        yield opened


def subscriber(context, endpoint, topic=b""):
    socket = context.socket(zmq.SUB)
    socket.rcvtimeo = LIMIT_MS
    socket.subscribe(topic)
    socket.connect(endpoint)
    time.sleep(0.3)
    return socket


def received(socket):
    """A batch: its number and its events."""
    topic, number, payload = socket.recv_multipart()
    assert topic == b""
    at, events, rank = msgpack.unpackb(payload)
    assert rank == 0
    assert abs(at / 1000 - time.time()) < 60
    return struct.unpack(">Q", number)[0], events


def collected(socket, count):
    numbers, events = [], []
    while len(events) < count:
        number, more = received(socket)
        numbers.append(number)
        events += more
    return numbers, events


def test_stored_removed_cleared(publisher, context):
    socket = subscriber(context, publisher.endpoint)
    other = subscriber(context, publisher.endpoint, b"another topic")
    store = joined(publisher.address)
    assert store.put("12345", b"x" * 100) == 0
    assert store.put("0xff", b"x") == 0
    assert store.put("model@1@0@abc", b"x") == 0
    assert store.remove("12345", True) == 0
    assert store.remove_all(True) == 2
    numbers, events = collected(socket, 7)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    kinds = [(e["event_type"], e["type"], e["object_key"]) for e in events]
    assert kinds[:5] == [
        ("stored", "BlockStored", "12345"),
        ("stored", "BlockStored", "0xff"),
        ("stored", "BlockStored", "model@1@0@abc"),
        ("removed", "BlockRemoved", "12345"),
        ("cleared", "AllBlocksCleared", None),
    ]
    assert {k[2] for k in kinds[5:]} == {"0xff", "model@1@0@abc"}
    assert [e["event_id"] for e in events] == list(range(1, 8))
    assert [e["seq_hashes"] for e in events[:4]] == [[12345], [255], [], [12345]]
    assert events[0]["block_hashes"] == [12345]
    assert {e["backend_id"] for e in events} == {"pool-1"}
    assert {e["tenant_id"] for e in events} == {"default"}
    assert {e["medium"] for e in events} == {"cpu"}
    assert set(events[0]) == {
        "event_id", "timestamp", "event_type", "type", "model_name", "block_size", "additional_salt", "lora_name",
        "tenant_id", "backend_id", "group_id", "medium", "dp_rank", "object_key", "seq_hashes", "block_hashes",
        "base_block_idx", "parent_hash", "token_ids", "parent_block_hash",
    }  # fmt: skip
    assert events[0]["base_block_idx"] == 0 and events[3]["base_block_idx"] is None
    assert other.poll(100) == 0
    store.close()


def replayed(context, endpoint, first, kind):
    """All batches from a number on, asked for over a socket of that kind."""
    socket = context.socket(kind)
    socket.rcvtimeo = LIMIT_MS
    socket.connect(endpoint)
    request = struct.pack(">Q", first)
    socket.send_multipart([b"", request] if kind == zmq.DEALER else [request])
    found = []
    while True:
        parts = socket.recv_multipart()
        number, payload = parts[-2:]
        if struct.unpack(">q", number)[0] == -1:
            assert payload == b""
            return found
        found.append((struct.unpack(">Q", number)[0], msgpack.unpackb(payload)[1]))
        if kind == zmq.REQ:
            # This kind takes one answer per request.
            return found


def test_a_late_subscriber_replays(publisher, context):
    store = joined(publisher.address)
    for n in range(200):
        assert store.put(f"k{n}", b"x") == 0
    # What is under way has left before anybody listens.
    time.sleep(0.2)
    socket = subscriber(context, publisher.endpoint)
    assert store.put("last", b"x") == 0
    number, events = received(socket)
    assert [e["object_key"] for e in events] == ["last"]
    batches = replayed(context, publisher.endpoint, 0, zmq.DEALER)
    assert [n for n, _ in batches] == list(range(number + 1))
    keys = [e["object_key"] for _, events in batches for e in events]
    assert keys == [f"k{n}" for n in range(200)] + ["last"]
    assert replayed(context, publisher.endpoint, number, zmq.DEALER) == batches[number:]
    assert replayed(context, publisher.endpoint, number, zmq.REQ) == batches[number:]
    assert replayed(context, publisher.endpoint, number + 1, zmq.DEALER) == []
    store.close()


def test_without_the_engines_names_and_keys(context):
    publisher = Publisher("--kv-events-emit-legacy-compat=false", "--kv-events-emit-object-key=false")
    socket = subscriber(context, publisher.endpoint)
    store = joined(publisher.address)
    assert store.put("not a hash", b"x") == 0
    assert store.put("7", b"x") == 0
    _, events = received(socket)
    assert [e["seq_hashes"] for e in events] == [[7]]
    assert not {"type", "block_hashes", "object_key", "parent_block_hash"} & set(events[0])
    store.close()
    publisher.kill()


def test_heartbeats_and_slow_subscribers(publisher, context):
    beating = context.socket(zmq.SUB)
    beating.heartbeat_ivl, beating.heartbeat_timeout, beating.rcvtimeo = 100, 300, LIMIT_MS
    beating.subscribe(b"")
    monitor = beating.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    beating.connect(publisher.endpoint)
    stuck = context.socket(zmq.SUB)
    stuck.rcvhwm = 1
    stuck.subscribe(b"")
    stuck.connect(publisher.endpoint)
    time.sleep(1)
    assert monitor.poll(0) == 0, "PINGs are answered"
    store = joined(publisher.address)
    keys = [f"{'k' * 1000}{n}" for n in range(1000)]
    for at in range(0, len(keys), 100):
        assert store.put_batch(keys[at : at + 100], [b"x"] * 100) == 0
    _, events = collected(beating, 1000)
    assert [e["object_key"] for e in events] == keys
    beating.disable_monitor()
    store.close()
