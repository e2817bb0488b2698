"""`mc_store_rest_server`: a store behind a small REST API, with upstream's paths, fields and replies.

Loopback only unless `--host` says otherwise. With MOONCAKE_TOKEN set, every request but `GET /health` needs
`Authorization: Bearer TOKEN`.
"""

import argparse
import asyncio
import ctypes
import ipaddress
import logging
import signal
import sys
import time

from aiohttp import web

from mooncake._store_requests import (
    BODY_LIMIT,
    _Refused,
    _answers,
    _encoded,
    _errors_as_json,
    _grace,
    _guard,
    _json,
    _number,
    _object,
    _offset,
    _range_of,
    _segment_ids,
    _shm_name_to_path,
    _size,
    _success,
    _text,
    _token,
)
from mooncake.async_store import MooncakeDistributedStoreAsync as MooncakeDistributedStore
from mooncake.mooncake_config import MooncakeConfig, _parse_bool, _parse_segment_size

KEY_NOT_FOUND = -704
OBJECT_HAS_LEASE = -706
INVALID_KEY = -400
INVALID_PARAMS = -600
# aiohttp's default pattern leaves out keys with braces.
KEY = "{key:[^/]+}"
# Keys of a page.
PAGE_DEFAULT = 100
PAGE_LIMIT = 1000
RETRY_FIRST = 0.25
RETRY_LONGEST = 2.0
# How long requests under way may take once the service is told to stop.
STOP_PATIENCE = 5.0

_log = logging.getLogger(__name__)


def _override(config, key, text):
    """Sets a field of the configuration from the command line, as the file's reader would."""
    if not hasattr(config, key):
        _log.warning("-D %s: there is no such setting", key)
        return
    now = getattr(config, key)
    if key.endswith("_size"):
        value = _parse_segment_size(text)
    elif isinstance(now, bool):
        value = _parse_bool(text)
    elif isinstance(now, int):
        value = int(text)
    else:
        value = text
    setattr(config, key, value)


class MooncakeStoreService:
    """A store and its REST API."""

    _runner = None

    def __init__(self, config_path=None, cli_config=None):
        self.store = None
        self.config = MooncakeConfig.from_file(config_path) if config_path else MooncakeConfig.load_from_env()
        for key, value in (cli_config or {}).items():
            _override(self.config, key, value)
        self.current_mode = "prefill"
        self.mounted_segment_ids = []
        self.last_mount_info = {}
        self._state_lock = asyncio.Lock()

    def _settings(self):
        return {
            "local_hostname": self.config.local_hostname,
            "metadata_server": self.config.metadata_server,
            "global_segment_size": self.config.global_segment_size,
            "local_buffer_size": self.config.local_buffer_size,
            "protocol": self.config.protocol,
            "rdma_devices": self.config.device_name,
            "master_server_addr": self.config.master_server_address,
            "enable_ssd_offload": self.config.enable_ssd_offload,
            "ssd_offload_path": self.config.ssd_offload_path,
            "tenant_id": self.config.tenant_id,
            "enable_client_http_server": self.config.enable_client_http_server,
            "client_http_port": self.config.client_http_port,
        }

    async def _try_setup(self):
        """Whether the store is set up now."""
        store = MooncakeDistributedStore()
        try:
            code = await asyncio.to_thread(store.setup, self._settings())
        except Exception as error:
            _log.warning("setup of the store failed: %s", error)
            return False
        if code != 0:
            _log.warning("setup of the store failed: %s", code)
            return False
        self.store = store
        return True

    async def start_store_service(self, max_wait_time=60, shutdown_event=None):
        """Sets the store up, again and again until it works or the time is over: whether it did."""
        stopping = shutdown_event or asyncio.Event()
        deadline = time.monotonic() + max_wait_time
        pause = RETRY_FIRST
        while not stopping.is_set():
            if await self._try_setup():
                # A signal that came during the setup is handled in the loop's next round.
                await asyncio.sleep(0)
                if not stopping.is_set():
                    _log.info("store set up as %s", self.config.local_hostname)
                    return True
                await self.stop()
                return False
            left = deadline - time.monotonic()
            if left <= 0:
                _log.error("no store after %g s", max_wait_time)
                return False
            try:
                await asyncio.wait_for(stopping.wait(), min(pause, left))
            except asyncio.TimeoutError:
                pause = min(pause * 2, RETRY_LONGEST)
        return False

    def _application(self, token):
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[_errors_as_json, _guard(token)])
        app.add_routes(
            [
                web.get("/health", self.handle_health),
                web.post("/api/reconfigure", self.handle_reconfigure),
                web.post("/api/mount_shm", self.handle_mount_shm),
                web.post("/api/unmount_shm", self.handle_unmount_shm),
                web.post("/api/mount", self.handle_mount),
                web.post("/api/unmount", self.handle_unmount),
                web.post("/api/unmount_local_disk", self.handle_unmount_local_disk),
                web.put("/api/put", self.handle_put),
                web.put("/api/put/" + KEY, self.handle_put_raw),
                web.get("/api/get/" + KEY, self._get_or_range, allow_head=False),
                web.head("/api/get/" + KEY, self.handle_head),
                web.get("/api/keys", self.handle_keys),
                web.get("/api/exist/" + KEY, self.handle_exist),
                web.delete("/api/remove/" + KEY, self.handle_remove),
                web.delete("/api/remove_all", self.handle_remove_all),
            ]
        )
        return app

    async def start_http_service(self, port=8080, host="127.0.0.1"):
        """Listens; True, or OSError."""
        token = _token()
        if not token and not _loopback(host):
            _log.warning("NO TOKEN: anybody who reaches %s can read and write the pool; set MOONCAKE_TOKEN", host)
        self._runner = web.AppRunner(self._application(token), shutdown_timeout=STOP_PATIENCE)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        where = self._runner.addresses[0]
        _log.info("REST API listening on %s port %s", where[0], where[1])
        return True

    async def stop(self):
        """Ends the API, then leaves the pool: what was lent is unmounted."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
        store, self.store = self.store, None
        if store is None:
            return
        code = await asyncio.to_thread(store.close)
        if code != 0:
            _log.warning("the store's close returned %s", code)
        else:
            _log.info("store closed")

    async def _data(self, name, *arguments):
        """A call about objects, by the store's own threads. Mounts, which may wait for long, do not take those."""
        natively = getattr(self.store, "async_" + name, None)
        if natively is not None:
            return await natively(*arguments)
        # A stand-in that knows the plain calls only.
        return await asyncio.to_thread(getattr(self.store, name), *arguments)

    # Objects

    async def _store_value(self, key, value):
        code = await self._data("put", key, value)
        if code != 0:
            status = 400 if code in (INVALID_KEY, INVALID_PARAMS) else 500
            raise _Refused(status, "PUT operation failed", ret=code)
        return _success()

    @_answers
    async def handle_put(self, request):
        data = await _object(request)
        key, value = data.get("key"), data.get("value")
        if not key or value is None:
            raise _Refused(400, "Missing key or value")
        if not isinstance(key, str) or not isinstance(value, str):
            raise _Refused(400, "Invalid key or value, must be strings")
        _encoded(key, "key")
        return await self._store_value(key, _encoded(value, "value"))

    @_answers
    async def handle_put_raw(self, request):
        key = request.match_info["key"]
        return await self._store_value(key, await request.read())

    async def _must_exist(self, key):
        exists = await self._data("is_exist", key)
        if exists < 0:
            raise _Refused(500, "Exist check failed", ret=exists)
        if not exists:
            raise _Refused(404, "Key not found")

    async def _size_of(self, key):
        size = await self._data("get_size", key)
        if size == KEY_NOT_FOUND:
            raise _Refused(404, "Key not found")
        if size < 0:
            raise _Refused(500, "GET operation failed", ret=size)
        return size

    async def _get_or_range(self, request):
        # Objects have no validator here, so an If-Range never holds and asks for everything.
        ranged = "Range" in request.headers and "If-Range" not in request.headers
        return await (self.handle_range(request) if ranged else self.handle_get(request))

    @_answers
    async def handle_get(self, request):
        key = request.match_info["key"]
        value = await self._data("get", key)
        if value is None:
            raise _Refused(500, "GET operation failed")
        if value == b"":
            # Missing, unreadable or really empty.
            await self._must_exist(key)
            if await self._size_of(key) > 0:
                raise _Refused(500, "GET operation failed")
        return web.Response(
            body=value, content_type="application/octet-stream", headers={"Accept-Ranges": "bytes"}
        )

    async def _read_range(self, key, start, length):
        """`length` bytes of an object from `start`, or None."""
        target = bytearray(length)
        view = (ctypes.c_char * length).from_buffer(target)
        address = ctypes.addressof(view)
        read = await self._data("get_into_ranges", [address], [[key]], [[[0]]], [[[start]]], [[[length]]])
        return target if read == [[[length]]] else None

    @_answers
    async def handle_range(self, request):
        key = request.match_info["key"]
        size = await self._size_of(key)
        wanted = _range_of(request.headers["Range"], size)
        if wanted is None:
            return await self.handle_get(request)
        # Shielded, since the memory must stay until the store has done with it, whoever stops waiting.
        value = await asyncio.shield(asyncio.ensure_future(self._read_range(key, *wanted)))
        if value is None:
            raise _Refused(500, "GET operation failed")
        first, length = wanted
        headers = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {first}-{first + length - 1}/{size}"}
        return web.Response(status=206, body=value, content_type="application/octet-stream", headers=headers)

    @_answers
    async def handle_head(self, request):
        size = await self._size_of(request.match_info["key"])
        return web.Response(
            content_type="application/octet-stream", headers={"Accept-Ranges": "bytes", "Content-Length": str(size)}
        )

    @_answers
    async def handle_keys(self, request):
        limit = max(1, _number(request, "limit", PAGE_DEFAULT, PAGE_LIMIT))
        cursor = _number(request, "cursor", 0, 2**64 - 1)
        page = await asyncio.to_thread(self.store._page, request.query.get("prefix", ""), cursor, limit)
        if isinstance(page, int):
            raise _Refused(500, "Listing keys failed", ret=page)
        keys, following = page
        # As text: a script's numbers may be too narrow for it.
        cursor = str(following) if following else None
        return _json(200, {"keys": [{"key": key, "size": size} for key, size in keys], "next_cursor": cursor})

    @_answers
    async def handle_exist(self, request):
        exists = await self._data("is_exist", request.match_info["key"])
        if exists < 0:
            raise _Refused(500, "Exist check failed")
        return _json(200, {"exists": exists > 0})

    @_answers
    async def handle_remove(self, request):
        force = request.query.get("force", "").lower() in ("1", "true", "yes")
        code = await self._data("remove", request.match_info["key"], force)
        if code == KEY_NOT_FOUND:
            raise _Refused(404, "Key not found", ret=code)
        if code == OBJECT_HAS_LEASE:
            raise _Refused(409, "the object is leased by a reader: try later, or with ?force=true", ret=code)
        if code != 0:
            raise _Refused(500, "Remove operation failed", ret=code)
        return _success()

    @_answers
    async def handle_remove_all(self, request):
        removed = await self._data("remove_all")
        if removed < 0:
            raise _Refused(500, "RemoveAll operation failed", ret=removed)
        return _json(200, {"status": f"success removed {removed} keys"})

    @_answers
    async def handle_health(self, request):
        code = await self._data("health_check")
        return _json(200, {"status": "ok"}) if code == 0 else _json(503, {"error": "the pool does not answer"})

    # Segments

    def _placed(self, data):
        return _text(data, "protocol", self.config.protocol), _text(data, "location", "")

    @_answers
    async def handle_mount(self, request):
        data = await _object(request)
        size = _size(data)
        result = await asyncio.to_thread(self.store.allocate_and_mount_segment, size, *self._placed(data))
        code = result["ret"]
        if code != 0:
            raise _Refused(500, f"Allocate and mount failed, ret={code}", ret=code)
        return _success(segment_ids=list(result["segment_ids"]), allocated_size=result["allocated_size"])

    @_answers
    async def handle_unmount(self, request):
        data = await _object(request)
        ids, grace = _segment_ids(data), _grace(data)
        code = await asyncio.to_thread(self.store.unmount_and_free_segment, ids, grace)
        if code != 0:
            raise _Refused(500, f"Unmount and free failed, ret={code}", ret=code)
        return _success()

    @_answers
    async def handle_mount_shm(self, request):
        data = await _object(request)
        path = _shm_name_to_path(data.get("name"))
        if path is None or data.get("size") is None:
            raise _Refused(400, "Missing or invalid name or size")
        _encoded(path, "name")
        size, offset = _size(data), _offset(data)
        result = await asyncio.to_thread(self.store.mount_segment, path, size, offset, *self._placed(data))
        code, ids = result["ret"], list(result["segment_ids"])
        if code != 0:
            raise _Refused(500, f"Mount failed, ret={code}", ret=code, segment_ids=ids)
        return _success(segment_ids=ids)

    async def _unmount_each(self, ids, grace=0):
        """One at a time, since one code for many would not say which of them failed: those that did."""
        failed = []
        for segment in ids:
            if await asyncio.to_thread(self.store.unmount_segment, [segment], grace) != 0:
                failed.append(segment)
        return failed

    @_answers
    async def handle_unmount_shm(self, request):
        data = await _object(request)
        ids, grace = _segment_ids(data), _grace(data)
        async with self._state_lock:
            failed = await self._unmount_each(ids, grace)
            gone = set(ids) - set(failed)
            self.mounted_segment_ids = [i for i in self.mounted_segment_ids if i not in gone]
            if not self.mounted_segment_ids:
                self.current_mode = "prefill"
        if failed:
            raise _Refused(500, "Unmount failed for one or more segments", failed_segment_ids=failed)
        return _success()

    @_answers
    async def handle_unmount_local_disk(self, request):
        grace = _grace(await _object(request))
        code = await asyncio.to_thread(self.store.unmount_local_disk_segment, grace)
        if code != 0:
            raise _Refused(500, f"Unmount local disk failed, ret={code}", ret=code)
        return _success()

    # Decode nodes lend a segment, prefill nodes do not.

    @_answers
    async def handle_reconfigure(self, request):
        data = await _object(request)
        mode = data.get("mode", "")
        mode = mode.lower() if isinstance(mode, str) else ""
        if mode not in ("decode", "prefill"):
            raise _Refused(400, "Invalid mode. Use 'decode' or 'prefill'")
        if mode == "prefill":
            async with self._state_lock:
                return await self._become_prefill()
        if not data.get("path") or data.get("size") is None:
            raise _Refused(400, "Missing path or size for decode mode")
        path = _text(data, "path", "")
        _encoded(path, "path")
        protocol, location = self._placed(data)
        segment = {
            "path": path,
            "size": _size(data),
            "offset": _offset(data),
            "protocol": protocol,
            "location": location,
        }
        async with self._state_lock:
            return await self._become_decode(segment)

    async def _become_prefill(self):
        if self.mounted_segment_ids:
            code = await asyncio.to_thread(self.store.unmount_segment, list(self.mounted_segment_ids))
            if code != 0:
                raise _Refused(500, f"Unmount failed, ret={code}", ret=code)
        self._no_segments()
        return _success(mode=self.current_mode)

    async def _become_decode(self, segment):
        # The new segment comes first: when it cannot be mounted, the old ones go on serving.
        previous = list(self.mounted_segment_ids)
        result = await asyncio.to_thread(self.store.mount_segment, *segment.values())
        code = result["ret"]
        if code != 0:
            if not previous:
                self._no_segments()
            after = "keeping previous decode segments" if previous else "rolled back to prefill"
            raise _Refused(500, f"Mount failed, ret={code}; {after}", mode=self.current_mode, ret=code)
        # What cannot be unmounted now stays in the list, for the next change of mode.
        failed = await self._unmount_each(previous)
        if failed:
            _log.warning("segments %s could not be unmounted", failed)
        self.mounted_segment_ids = list(result["segment_ids"]) + failed
        self.current_mode = "decode"
        self.last_mount_info = segment
        return _success(mode=self.current_mode, segment_ids=self.mounted_segment_ids)

    def _no_segments(self):
        self.current_mode = "prefill"
        self.mounted_segment_ids = []
        self.last_mount_info = {}


def _loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _install_shutdown_signal_handlers(loop, shutdown_event):
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda _number: shutdown_event.set(), number)


def _unblock_shutdown_signals():
    # A parent may have started us with these blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def _pair(text):
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return key.strip(), value


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="mc_store_rest_server", description="REST API of a store; settings as in mooncake.json"
    )
    parser.add_argument("--config", metavar="FILE", help="mooncake.json [default: MOONCAKE_CONFIG_PATH, or variables]")
    parser.add_argument(
        "-D", "--define", metavar="KEY=VALUE", type=_pair, action="append", default=[], help="override a setting"
    )
    parser.add_argument("--port", type=int, default=8080, help="port of the API; 0 = any free one [default: 8080]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [default: 127.0.0.1]")
    parser.add_argument(
        "--max-wait-time", type=float, default=60, metavar="SECONDS", help="patience with the master [default: 60]"
    )
    return parser.parse_args()


async def main():
    arguments = parse_arguments()
    service = MooncakeStoreService(arguments.config, dict(arguments.define))
    stopping = asyncio.Event()
    _install_shutdown_signal_handlers(asyncio.get_running_loop(), stopping)
    _unblock_shutdown_signals()
    try:
        if await service.start_store_service(arguments.max_wait_time, stopping):
            await service.start_http_service(arguments.port, arguments.host)
            await stopping.wait()
        elif not stopping.is_set():
            raise RuntimeError("the store could not be set up")
    finally:
        await service.stop()


def sync_main():
    """`mc_store_rest_server`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(main())
    except (OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"mc_store_rest_server: {error}")


if __name__ == "__main__":
    sync_main()
