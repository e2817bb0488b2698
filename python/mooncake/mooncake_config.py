"""`mooncake.json`, as upstream's `mooncake_config.py` reads it."""

import json
import logging
import os
from dataclasses import dataclass

DEFAULT_GLOBAL_SEGMENT_SIZE = 3355443200
DEFAULT_LOCAL_BUFFER_SIZE = 1073741824
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_REQUIRED = ("local_hostname", "metadata_server", "master_server_address")
# Upstream's transports. Here all but tcp and rdma are unknown to the store, which says so itself.
_KNOWN_PROTOCOLS = frozenset(
    """tcp rdma efa nvmeof nvlink musa nvlink_intra hip barex cxl ascend ub ubshmem maca sunrise_link rpc_only""".split()
)

logger = logging.getLogger(__name__)


def _parse_segment_size(value):
    """Bytes from a number or a text such as "512MB" (binary units)."""
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
        return int(digits) * _UNITS[unit] if digits.isdecimal() else int(float(digits) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a size") from None


parse_segment_size = _parse_segment_size


def _parse_bool(value):
    """A flag, which files and the environment may write as text."""
    if value is None or isinstance(value, (bool, int, float)):
        return bool(value)
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on", "enable"):
        return True
    if text in ("false", "0", "no", "off", "disable", ""):
        return False
    raise ValueError(f"Invalid boolean value: {value!r}")


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
        if not isinstance(self.protocol, str) or not self.protocol.strip():
            raise ValueError(f"Invalid protocol: {self.protocol!r}. It must be a non-empty string, as in 'tcp'.")
        self.protocol = self.protocol.strip().lower()
        if self.protocol not in _KNOWN_PROTOCOLS:
            logger.warning("Unrecognised protocol %r: it is passed on. Known: %s", self.protocol, sorted(_KNOWN_PROTOCOLS))
        for name in ("global_segment_size", "local_buffer_size"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"Invalid {name}: {value}. Size must be non-negative.")
        for name in _REQUIRED:
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"Config field {name!r} must be a non-empty string, got {value!r}.")
        if self.device_name is not None and not isinstance(self.device_name, str):
            raise ValueError(f"Config field 'device_name' must be a string, got {self.device_name!r}.")

    @staticmethod
    def from_file(file_path):
        """From a JSON file; `local_hostname`, `metadata_server` and `master_server_address` must be there."""
        with open(file_path, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise ValueError(f"{file_path} does not hold a JSON object")
        for name in _REQUIRED:
            if name not in config:
                raise ValueError(f"Missing required config field: {name} in {file_path}")

        def text(name, default):
            value = config.get(name)
            return default if value is None else str(value)

        return MooncakeConfig(
            local_hostname=config["local_hostname"],
            metadata_server=config["metadata_server"],
            global_segment_size=_parse_segment_size(config.get("global_segment_size", DEFAULT_GLOBAL_SEGMENT_SIZE)),
            local_buffer_size=_parse_segment_size(config.get("local_buffer_size", DEFAULT_LOCAL_BUFFER_SIZE)),
            protocol=config.get("protocol", "tcp"),
            device_name=config.get("device_name", ""),
            master_server_address=config["master_server_address"],
            enable_ssd_offload=_parse_bool(config.get("enable_ssd_offload", False)),
            ssd_offload_path=text("ssd_offload_path", ""),
            tenant_id=text("tenant_id", "default"),
            enable_client_http_server=_parse_bool(config.get("enable_client_http_server", False)),
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
            raise ValueError("Neither the environment variable 'MOONCAKE_CONFIG_PATH' nor 'MOONCAKE_MASTER' is set.")
        return MooncakeConfig(
            local_hostname=os.getenv("MOONCAKE_LOCAL_HOSTNAME", "localhost"),
            metadata_server=os.getenv("MOONCAKE_TE_META_DATA_SERVER", "P2PHANDSHAKE"),
            global_segment_size=_parse_segment_size(os.getenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", DEFAULT_GLOBAL_SEGMENT_SIZE)),
            local_buffer_size=_parse_segment_size(os.getenv("MOONCAKE_LOCAL_BUFFER_SIZE", DEFAULT_LOCAL_BUFFER_SIZE)),
            protocol=os.getenv("MOONCAKE_PROTOCOL", "tcp"),
            device_name=os.getenv("MOONCAKE_DEVICE", ""),
            master_server_address=master,
            enable_ssd_offload=_parse_bool(os.getenv("MOONCAKE_OFFLOAD_ENABLED", "false")),
            ssd_offload_path=os.getenv("MOONCAKE_OFFLOAD_FILE_STORAGE_PATH", ""),
            tenant_id=os.getenv("MOONCAKE_TENANT_ID", "default"),
            enable_client_http_server=_parse_bool(os.getenv("MOONCAKE_ENABLE_CLIENT_HTTP_SERVER", "false")),
            client_http_port=int(os.getenv("MOONCAKE_CLIENT_HTTP_PORT", "9300")),
        )
