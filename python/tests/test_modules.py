"""Configuration, the asyncio store, console names."""

import asyncio
import json
import os
import subprocess
import sysconfig

import pytest

from mooncake.async_store import MooncakeDistributedStoreAsync
from mooncake.mooncake_config import MooncakeConfig


def test_config_file(tmp_path, monkeypatch):
    path = tmp_path / "mooncake.json"
    path.write_text(
        json.dumps(
            {
                "local_hostname": "h",
                "metadata_server": "P2PHANDSHAKE",
                "master_server_address": "m:1",
                "global_segment_size": "4GB",
                "local_buffer_size": 512,
                "protocol": "RDMA",
            }
        )
    )
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(path))
    config = MooncakeConfig.load_from_env()
    assert config.global_segment_size == 4 << 30 and config.local_buffer_size == 512
    assert config.protocol == "rdma" and config.tenant_id == "default"
    path.write_text('{"local_hostname": "h"}')
    with pytest.raises(ValueError, match="metadata_server"):
        MooncakeConfig.load_from_env()


def test_config_variables(monkeypatch):
    monkeypatch.delenv("MOONCAKE_CONFIG_PATH", raising=False)
    monkeypatch.delenv("MOONCAKE_MASTER", raising=False)
    with pytest.raises(ValueError):
        MooncakeConfig.load_from_env()
    monkeypatch.setenv("MOONCAKE_MASTER", "m:1")
    monkeypatch.setenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", "1.5gb")
    config = MooncakeConfig.load_from_env()
    assert config.local_hostname == "localhost" and config.global_segment_size == 3 << 29
    monkeypatch.setenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", "4 GBB")
    with pytest.raises(ValueError, match="not a size"):
        MooncakeConfig.load_from_env()


def config(**more):
    given = {
        "local_hostname": "h", "metadata_server": "m", "master_server_address": "a:1", "global_segment_size": 1,
        "local_buffer_size": 1, "protocol": "tcp", "device_name": "",
    }  # fmt: skip
    return MooncakeConfig(**{**given, **more})


@pytest.mark.parametrize("name", ["protocol", "local_hostname", "metadata_server", "master_server_address"])
@pytest.mark.parametrize("value", [5, None, "", "  "])
def test_a_config_says_what_is_no_text(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}.*non-empty string|Invalid protocol"):
        config(**{name: value})
    given = {"local_hostname": "h", "metadata_server": "m", "master_server_address": "a:1", name: value}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError):
        MooncakeConfig.from_file(path)


def test_a_config_reads_what_upstream_reads(tmp_path, caplog):
    assert config(protocol="  RDMA ").protocol == "rdma" and not caplog.records
    assert config(protocol="carrier-pigeon").protocol == "carrier-pigeon" and "carrier-pigeon" in caplog.text
    with pytest.raises(ValueError, match="non-negative"):
        config(global_segment_size=-1)
    path = tmp_path / "config.json"
    given = {"local_hostname": "h", "metadata_server": "m", "master_server_address": "a:1"}

    def read(**more):
        path.write_text(json.dumps({**given, **more}))
        return MooncakeConfig.from_file(path)

    assert read(global_segment_size="1e9").global_segment_size == 10**9
    assert read(ssd_offload_path=None, tenant_id=None).tenant_id == "default"
    assert read(enable_ssd_offload="off").enable_ssd_offload is False
    assert read(enable_client_http_server="enable").enable_client_http_server is True
    for wrong in ({"enable_ssd_offload": "perhaps"}, {"global_segment_size": "inf"}, {"local_buffer_size": "4 GBB"}):
        with pytest.raises(ValueError):
            read(**wrong)
    path.write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        MooncakeConfig.from_file(path)


def test_async_store(master, lender):
    async def run():
        store = MooncakeDistributedStoreAsync()
        arguments = ("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master.address)
        assert await store.async_setup(*arguments) == 0
        keys = [f"async{i}" for i in range(20)]
        put = await asyncio.gather(*(store.async_put(k, k.encode()) for k in keys))
        assert put == [0] * 20
        got = await asyncio.gather(*(store.async_get(k) for k in keys))
        assert got == [k.encode() for k in keys]
        with pytest.raises(AttributeError):
            store.async_nonsense
        with pytest.raises(TypeError):
            await store.async_put(1, b"v")
        await store.async_remove_all(force=True)
        store.close()

    asyncio.run(run())


def test_console_names():
    for name in ("mooncake", "mooncake_master", "mooncake_client"):
        path = os.path.join(sysconfig.get_path("scripts"), name)
        done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and "Usage: mooncake" in done.stdout
    for name in ("mc_store_rest_server", "mooncake_http_metadata_server"):
        path = os.path.join(sysconfig.get_path("scripts"), name)
        done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and f"usage: {name}" in done.stdout


EXAMPLES = os.path.join(os.path.dirname(__file__), "..", "examples")


@pytest.mark.parametrize("name", ["embedded_pool.py", "kv_blocks.py", "memory_by_address.py"])
def test_examples_run(name, master, lender):
    import sys

    command = [sys.executable, os.path.join(EXAMPLES, name), master.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
