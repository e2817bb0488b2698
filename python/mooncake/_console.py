"""Upstream's console names: each becomes the `mooncake` binary of this wheel."""

import os
import re
import shutil
import sys
import sysconfig

# Python's names of log levels, as the binary calls them.
_LEVELS = {"DEBUG": "debug", "INFO": "info", "WARNING": "warn", "ERROR": "error", "CRITICAL": "error"}


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


def _become(command, arguments):
    binary = _binary()
    os.execv(binary, [binary, command, *arguments])


def _two_dashes(arguments):
    """gflags takes names with one dash, as in `-port=1`. A single letter (`-h`) and a number (`-1`) stay as they are."""
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    named = re.compile(r"-[A-Za-z][\w-]+(=.*)?", re.DOTALL)
    return [f"-{a}" if named.fullmatch(a) else a for a in arguments[:end]] + arguments[end:]


def _take(arguments, name):
    """The last value of a flag, and the arguments without the flag."""
    value, others = None, []
    left = iter(arguments)
    for argument in left:
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}":
            value = next(left, "")
        else:
            others.append(argument)
    return value, others


def _host_and_port(text):
    """`IP:PORT` or `[IP]:PORT` in two parts; an address without a port is left alone."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        return text.removeprefix("[").removesuffix("]"), None
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], port
    return (text, None) if ":" in host else (host, port)


def _node_arguments(arguments):
    """Upstream's client has one `--host` for address and port, and port 50052 unless told otherwise."""
    host, arguments = _take(arguments, "host")
    port, arguments = _take(arguments, "port")
    if host is not None:
        host, with_it = _host_and_port(host)
        port = port if port is not None else with_it
        arguments += ["--bind", host]
    # A file or the environment may name the port: a flag would win over both.
    elsewhere = "MOONCAKE_PORT" in os.environ or _take(arguments, "config")[0] is not None
    if port is None and not elsewhere:
        port = "50052"
    return arguments if port is None else [*arguments, "--port", port]


def master():
    """`mooncake_master`: `mooncake master`, which takes upstream's flags."""
    _become("master", _two_dashes(sys.argv[1:]))


def http_metadata_server():
    """`mooncake_http_metadata_server`: a master serves `/metadata` on its port. Loopback unless `--host` says otherwise."""
    import argparse

    parser = argparse.ArgumentParser(prog="mooncake_http_metadata_server")
    parser.add_argument("--port", default="8080")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--log-level", default="INFO", type=str.upper, choices=list(_LEVELS))
    given = parser.parse_args()
    os.environ.setdefault("RUST_LOG", _LEVELS[given.log_level])
    _become("master", ["--port", given.port, "--bind", given.host, "--metrics-port", "off"])


def client():
    """`mooncake_client`: `mooncake node`."""
    _become("node", _node_arguments(_two_dashes(sys.argv[1:])))
