"""Every name of upstream's is there, with a docstring and a type stub, and answers as upstream's own tests want it to."""

import ast
import ctypes
import inspect
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import joined

import mooncake
import mooncake.async_store
import mooncake.engine
import mooncake.store
from mooncake.store import MooncakeDistributedStore, ReplicateConfig, SoftPinAction

PACKAGE = pathlib.Path(mooncake.store.__file__).parent

# Upstream's bindings at 3b5a594 (mooncake-integration/store/store_py.cpp, transfer_engine/transfer_engine_py.cpp).
STORE = """
    alloc_from_mem_pool allocate_and_mount_segment batch_get_buffer batch_get_into batch_get_into_multi_buffer_ranges
    batch_get_into_multi_buffers batch_get_replica_desc batch_get_session_end batch_get_session_start batch_get_tensor
    batch_get_tensor_into batch_get_tensor_into_cuda batch_get_tensor_with_parallelism
    batch_get_tensor_with_parallelism_into batch_get_tensor_with_tp batch_get_tensor_with_tp_into batch_is_exist
    batch_pub_tensor batch_pub_tensor_with_tp batch_put_from batch_put_from_multi_buffer_ranges
    batch_put_from_multi_buffers batch_put_session_end batch_put_session_revoke batch_put_session_start
    batch_put_tensor batch_put_tensor_from batch_put_tensor_with_parallelism batch_put_tensor_with_parallelism_from
    batch_put_tensor_with_tp batch_put_tensor_with_tp_from batch_remove batch_replica_clear batch_upsert_from
    batch_upsert_pub_tensor batch_upsert_tensor batch_upsert_tensor_from batch_upsert_tensor_with_parallelism
    batch_upsert_tensor_with_parallelism_from close create_copy_task create_move_task get get_batch get_buffer
    get_hostname get_into get_into_ranges get_offload_rpc_read_count get_replica_desc get_size get_tensor
    get_tensor_into get_tensor_into_cuda get_tensor_with_parallelism get_tensor_with_parallelism_into
    get_tensor_with_tp get_tensor_with_tp_into health_check init_all is_exist load_tensor_from_safetensor
    mount_segment pub_tensor pub_tensor_with_tp put put_batch put_from put_from_with_metadata put_parts put_tensor
    put_tensor_from put_tensor_with_parallelism put_tensor_with_parallelism_from put_tensor_with_tp
    put_tensor_with_tp_from query_task register_buffer remove remove_all remove_by_regex save_tensor_to_safetensor
    setup setup_dummy unmount_and_free_segment unmount_local_disk_segment unmount_segment unregister_buffer upsert
    upsert_batch upsert_from upsert_parts upsert_pub_tensor upsert_tensor upsert_tensor_from
    upsert_tensor_with_parallelism upsert_tensor_with_parallelism_from
""".split()
ENGINE = """
    allocate_managed_buffer batch_register_memory batch_transfer_async batch_transfer_async_read
    batch_transfer_async_write batch_transfer_read_on_cuda batch_transfer_sync batch_transfer_sync_read
    batch_transfer_sync_write batch_transfer_write_on_cuda batch_unregister_memory free_managed_buffer
    get_batch_transfer_status get_engine get_engine_ptr get_first_buffer_address get_local_topology get_notifies
    get_rpc_port initialize initialize_ext read_bytes_from_buffer register_memory send_probe transfer_check_status
    transfer_read_on_cuda transfer_submit_write transfer_sync transfer_sync_read transfer_sync_write
    transfer_write_on_cuda unregister_memory warmup_efa_segment write_bytes_to_buffer
""".split()
STORE_MODULE = """
    BufferHandle BufferPool MooncakeDistributedStore MooncakeHostMemAllocator ObjectDataType ParallelAxis
    QueryTaskResponse ReadTarget RegisteredBufferPool ReplicaDescriptor ReplicaStatus ReplicateConfig SoftPinAction
    TaskStatus TaskType TensorParallelism bind_to_numa_node _serialize_tensor _deserialize_tensor _tensor_metadata_size
""".split()


def stubbed(module):
    """Classes of a stub with what they define."""
    tree = ast.parse((PACKAGE / f"{module}.pyi").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name: {n.name: n for n in node.body if isinstance(n, kinds)}
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def public(kind):
    return [name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))]


@pytest.mark.parametrize(
    ("kind", "module", "upstream"),
    [
        (MooncakeDistributedStore, "store", STORE),
        (mooncake.engine.TransferEngine, "engine", ENGINE),
        (mooncake.async_store.MooncakeDistributedStoreAsync, "async_store", [f"async_{name}" for name in STORE]),
    ],
)
def test_every_method_is_there_with_stub_and_docstring(kind, module, upstream):
    stubs = stubbed(module)[kind.__name__]
    ours = [name for name in public(kind) if module != "async_store" or name.startswith("async_")]
    assert not set(upstream) - set(ours), "upstream's"
    assert not set(ours) - set(stubs), "without a stub"
    assert not {name for name in stubs if not name.startswith("__")} - set(public(kind)), "stubs of nothing"
    undocumented = [name for name in ours if not (getattr(kind, name).__doc__ or "").strip()]
    assert not undocumented


def test_stubs_name_the_arguments_as_they_are():
    wrong = []
    for kind, module in ((MooncakeDistributedStore, "store"), (mooncake.engine.TransferEngine, "engine")):
        for name, node in stubbed(module)[kind.__name__].items():
            if name.startswith("__"):
                continue
            real = [p for p in inspect.signature(getattr(kind, name)).parameters.values() if p.name != "self"]
            if any(p.kind == p.VAR_POSITIONAL and p.name == "args" for p in real):
                continue  # setup: two forms.
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)][1:]
            expected = [p.name for p in real if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if given != expected:
                wrong.append((name, given, expected))
    assert not wrong


def test_classes_and_functions_of_the_module():
    for name in STORE_MODULE:
        assert (getattr(mooncake.store, name).__doc__ or "").strip(), name
    assert mooncake.BufferPool is mooncake.RegisteredBufferPool is mooncake.store.BufferPool
    assert set(stubbed("store")) <= set(dir(mooncake.store))


def test_the_asyncio_stubs_are_fresh():
    tool = pathlib.Path(__file__).parents[2] / "tools" / "async-stubs"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What upstream's own tests ask for.


def test_the_host_name_that_was_given_stays(master):
    store = MooncakeDistributedStore()
    assert store.setup("localhost", "P2PHANDSHAKE", 16 << 20, 0, "tcp", "", master.address) == 0
    host, port = store.get_hostname().split(":")
    assert host == "localhost" and 12300 <= int(port) < 14300
    config = ReplicateConfig()
    config.preferred_segment = store.get_hostname()
    other = joined(master.address)
    assert other.put("named", os.urandom(100_000), config) == 0
    (replica,) = other.get_replica_desc("named")
    endpoint = replica.get_memory_descriptor().buffer_descriptor.transport_endpoint
    assert endpoint == store.get_hostname() and len(other.get("named")) == 100_000
    assert store.close() == 0 and other.close() == 0


def test_soft_pins_that_mean_nothing(store):
    config = ReplicateConfig()
    for wrong in (-1, 1 << 64, "1"):
        with pytest.raises(TypeError):
            config.soft_pin_ttl_ms = wrong
    config.soft_pin_ttl_ms = 1000
    assert store.upsert("pin", b"v", config) == -600, "a time and no pin"
    config.soft_pin_action = SoftPinAction.DISABLE
    assert store.put_batch(["pin"], [b"v"], config) == -600
    config.soft_pin_action = SoftPinAction.ENABLE
    assert store.put("pin", b"v", config) == 0
    config.soft_pin_ttl_ms = None
    assert store.upsert("pin", b"v", config) == 0


def test_ranges_of_different_lengths(store):
    memory = ctypes.create_string_buffer(100)
    at = ctypes.addressof(memory)
    assert store.put_batch(["r1", "r2"], [b"0123456789", b"abcdefghij"]) == 0
    answer = store.get_into_ranges([at], [["r1", "r2"]], [[[0], []]], [[[0, 1], []]], [[[], []]])
    assert len(answer) == 1 and len(answer[0]) == 2 and answer[0][1] == []
    assert answer[0][0] and all(code < 0 for code in answer[0][0])


def test_ranges_beyond_a_registered_buffer(store):
    """Refused even where other memory follows; but neighbours may be used as one."""
    memory = ctypes.create_string_buffer(b"." * 100, 100)
    at = ctypes.addressof(memory)
    assert store.put("r", b"0123456789") == 0
    assert store.register_buffer(at, 32) == 0
    assert store.get_into_ranges([at], [["r"]], [[[31]]], [[[0]]], [[[4]]]) == [[[-600]]]
    assert store.get_into("r", at + 30, 10) == -600 and store.put_from("x", at + 30, 10) == -600
    assert memory.raw == b"." * 100
    assert store.register_buffer(at + 32, 32) == 0
    assert store.get_into("r", at + 30, 10) == 10 and memory.raw[30:40] == b"0123456789"
    assert store.get_into("r", at + 80, 10) == 10, "not registered at all"
    assert store.unregister_buffer(at) == 0 and store.unregister_buffer(at + 32) == 0


def test_numbers_of_sessions(store):
    memory = ctypes.create_string_buffer(b"x" * 100, 100)
    at = ctypes.addressof(memory)
    assert store.batch_put_session_start(["n"], [100]) == [0]
    assert store.batch_put_from_multi_buffer_ranges(["n"], [[at, at + 50]], [[50, 50]], [[0, 50]]) == [100], "bytes"
    assert store.batch_put_session_end(["n"]) == [0]
    assert store.batch_get_session_start(["n"]) == [0]
    assert store.batch_get_session_end(["n", "never begun"]) == 0
