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
