"""Upstream's console names: each becomes the `mooncake` binary of this wheel."""

import os
import shutil
import sys
import sysconfig


def _binary():
    installed = os.path.join(sysconfig.get_path("scripts"), "mooncake")
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "mooncake")
    for candidate in (beside, installed):
        if os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which("mooncake")
    if found is None:
        sys.exit("mooncake: the binary of this package is not installed: reinstall the wheel")
    return found


def _become(*arguments):
    binary = _binary()
    os.execv(binary, [binary, *arguments, *sys.argv[1:]])


def master():
    """`mooncake_master`: `mooncake master`, which takes upstream's flags."""
    _become("master")


def http_metadata_server():
    """`mooncake_http_metadata_server`: a master serves `/metadata` on its port. Loopback unless `--host` says otherwise."""
    import argparse

    parser = argparse.ArgumentParser(prog="mooncake_http_metadata_server")
    parser.add_argument("--port", default="8080")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--log-level", default="info")
    given = parser.parse_args()
    os.environ.setdefault("RUST_LOG", given.log_level.lower())
    sys.argv[1:] = ["--port", given.port, "--bind", given.host, "--metrics-port", "off"]
    _become("master")


def client():
    """`mooncake_client`: `mooncake node`."""
    _become("node")
