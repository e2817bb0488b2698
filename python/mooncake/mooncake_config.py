"""`mooncake.json`, as upstream's `mooncake_config.py` reads it."""

import json
import logging
import os
from dataclasses import dataclass

DEFAULT_GLOBAL_SEGMENT_SIZE = 3355443200
DEFAULT_LOCAL_BUFFER_SIZE = 1073741824
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

_log = logging.getLogger(__name__)


def _parse_segment_size(value):
    """Bytes from an int or a text such as "512MB" (binary units)."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a size")
    if isinstance(value, int):
        return value
    if not isinstance(value, str):
        return int(value)
    text = value.strip().lower()
    digits = text.rstrip("bkmgt ")
    unit = text[len(digits) :].strip()
    if unit.endswith("b") and len(unit) > 1:
        unit = unit[:-1]
    if unit not in _UNITS or not digits:
        raise ValueError(f"{value!r} is not a size: use bytes or a unit of b, kb, mb, gb, tb")
    try:
        return int(float(digits) * _UNITS[unit]) if "." in digits else int(digits) * _UNITS[unit]
    except ValueError:
        raise ValueError(f"{value!r} is not a size") from None


parse_segment_size = _parse_segment_size


def _flag(value):
    return value if isinstance(value, bool) else str(value).strip().lower() in ("1", "true", "yes", "on")


@dataclass
class MooncakeConfig:
    """What a client of a pool is told."""

    local_hostname: str
    metadata_server: str
    global_segment_size: int
    local_buffer_size: int
    protocol: str
    device_name: str
    master_server_address: str
    enable_ssd_offload: bool = False
    ssd_offload_path: str = ""
    tenant_id: str = "default"
    enable_client_http_server: bool = False
    client_http_port: int = 9300

    def __post_init__(self):
        for name in ("local_hostname", "metadata_server", "protocol", "device_name", "master_server_address"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a text, not {type(value).__name__} ({value!r})")
        self.protocol = self.protocol.lower()
        if self.protocol not in ("tcp", "rdma"):
            _log.warning("protocol %r is unknown: tcp and rdma are", self.protocol)

    @staticmethod
    def from_file(file_path):
        """From a JSON file; `local_hostname`, `metadata_server` and `master_server_address` must be there."""
        with open(file_path, encoding="utf-8") as file:
            config = json.load(file)
        missing = [
            key
            for key in ("local_hostname", "metadata_server", "master_server_address")
            if key not in config
        ]
        if missing:
            raise ValueError(f"Missing required config fields: {missing} in {file_path}")
        return MooncakeConfig(
            local_hostname=config["local_hostname"],
            metadata_server=config["metadata_server"],
            global_segment_size=_parse_segment_size(
                config.get("global_segment_size", DEFAULT_GLOBAL_SEGMENT_SIZE)
            ),
            local_buffer_size=_parse_segment_size(
                config.get("local_buffer_size", DEFAULT_LOCAL_BUFFER_SIZE)
            ),
            protocol=config.get("protocol", "tcp"),
            device_name=config.get("device_name", ""),
            master_server_address=config["master_server_address"],
            enable_ssd_offload=_flag(config.get("enable_ssd_offload", False)),
            ssd_offload_path=config.get("ssd_offload_path", ""),
            tenant_id=config.get("tenant_id", "default"),
            enable_client_http_server=_flag(config.get("enable_client_http_server", False)),
            client_http_port=int(config.get("client_http_port", 9300)),
        )

    @staticmethod
    def load_from_env():
        """From the file named by MOONCAKE_CONFIG_PATH, else from variables, of which MOONCAKE_MASTER must be set."""
        path = os.getenv("MOONCAKE_CONFIG_PATH")
        if path:
            return MooncakeConfig.from_file(path)
        master = os.getenv("MOONCAKE_MASTER")
        if not master:
            raise ValueError("Neither MOONCAKE_CONFIG_PATH nor MOONCAKE_MASTER is set")
        return MooncakeConfig(
            local_hostname=os.getenv("MOONCAKE_LOCAL_HOSTNAME", "localhost"),
            metadata_server=os.getenv("MOONCAKE_TE_META_DATA_SERVER", "P2PHANDSHAKE"),
            global_segment_size=_parse_segment_size(
                os.getenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", DEFAULT_GLOBAL_SEGMENT_SIZE)
            ),
            local_buffer_size=_parse_segment_size(
                os.getenv("MOONCAKE_LOCAL_BUFFER_SIZE", DEFAULT_LOCAL_BUFFER_SIZE)
            ),
            protocol=os.getenv("MOONCAKE_PROTOCOL", "tcp"),
            device_name=os.getenv("MOONCAKE_DEVICE", ""),
            master_server_address=master,
            enable_ssd_offload=_flag(os.getenv("MOONCAKE_OFFLOAD_ENABLED", "false")),
            ssd_offload_path=os.getenv("MOONCAKE_OFFLOAD_FILE_STORAGE_PATH", ""),
            tenant_id=os.getenv("MOONCAKE_TENANT_ID", "default"),
            enable_client_http_server=_flag(
                os.getenv("MOONCAKE_ENABLE_CLIENT_HTTP_SERVER", "false")
            ),
            client_http_port=int(os.getenv("MOONCAKE_CLIENT_HTTP_PORT", "9300")),
        )
