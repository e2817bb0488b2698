"""What the REST API of a store reads from requests, whom it lets in, and its error replies. Knows no store."""

import functools
import hmac
import json
import logging
import os
import re

from aiohttp import web

BODY_LIMIT = 100 << 20
GRACE_LIMIT = 3600
# Sizes and offsets are 64 bits wide in the store; half of that keeps their sum within.
SIZE_LIMIT = 1 << 63

_log = logging.getLogger(__name__)
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)


class _Refused(Exception):
    """Ends a request with an error reply."""

    def __init__(self, status, error, **more):
        super().__init__(error)
        self.status = status
        self.body = {"error": error, **more}


def _json(status, body, **more):
    return web.Response(status=status, text=json.dumps(body), content_type="application/json", **more)


def _success(**more):
    return _json(200, {"status": "success", **more})


def _answers(handler):
    """Turns what a handler raises into a JSON reply."""

    @functools.wraps(handler)
    async def answered(self, request):
        try:
            return await handler(self, request)
        except _Refused as refused:
            return _json(refused.status, refused.body)
        except web.HTTPException:
            raise
        except Exception as error:
            _log.exception("%s failed", handler.__name__)
            return _json(500, {"error": str(error)})

    return answered


async def _object(request):
    """The JSON object of a request."""
    try:
        data = await request.json()
    # An unknown charset is a LookupError, a body nested too deeply a RecursionError.
    except (ValueError, LookupError, RecursionError):
        raise _Refused(400, "Malformed JSON body") from None
    if not isinstance(data, dict):
        raise _Refused(400, "Request body must be a JSON object")
    return data


def _text(data, name, default):
    value = data.get(name, default)
    if not isinstance(value, str):
        raise _Refused(400, f"Invalid {name}, must be a string")
    return value


def _integer(data, name, lowest, limit, what, default=None):
    value = data.get(name, default)
    # A bool is an int to isinstance.
    if type(value) is not int or not lowest <= value <= limit:
        raise _Refused(400, f"Invalid {name}, must be {what}")
    return value


def _size(data):
    return _integer(data, "size", 1, SIZE_LIMIT - 1, "a positive integer")


def _offset(data):
    return _integer(data, "offset", 0, SIZE_LIMIT - 1, "a non-negative integer", 0)


def _grace(data):
    what = f"a non-negative integer no greater than {GRACE_LIMIT}"
    return _integer(data, "grace_period_seconds", 0, GRACE_LIMIT, what, 0)


def _segment_ids(data):
    ids = data.get("segment_ids", [])
    if isinstance(ids, str) and ids:
        ids = [ids]
    if not ids:
        raise _Refused(400, "Missing segment_ids")
    if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
        raise _Refused(400, "Invalid segment_ids, must be strings")
    return ids


def _encoded(text, what):
    try:
        return text.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which is no text.
        raise _Refused(400, f"Invalid {what}, not valid Unicode") from None


def _shm_name_to_path(name):
    """The file of a POSIX shared memory name, or None. shm_open's leading slash is allowed, no other is."""
    if not isinstance(name, str):
        return None
    name = name.removeprefix("/")
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return None
    return f"/dev/shm/{name}"


def _range_of(header, size):
    """(first, length) of a Range header; None: send everything; refused when nothing of it exists."""
    found = _RANGE.fullmatch(header.replace(" ", ""))
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        length = min(int(last), size)
        start = size - length
    else:
        start = int(first)
        if last and int(last) < start:
            return None
        length = min(int(last) + 1, size) - start if last else size - start
    if length <= 0:
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"})
    return start, length


def _number(request, name, default, limit):
    """A number of the query."""
    text = request.query.get(name, str(default))
    if not re.fullmatch(r"\d{1,20}", text, re.ASCII) or int(text) > limit:
        raise _Refused(400, f"Invalid {name}, must be an integer from 0 to {limit}")
    return int(text)


def _token():
    # The pool strips it too.
    return os.environ.get("MOONCAKE_TOKEN", "").strip()


def _authorized(header, token):
    scheme, _, given = header.partition(" ")
    if scheme.lower() != "bearer":
        return False
    # Header bytes that are no UTF-8 arrive as surrogates.
    return hmac.compare_digest(given.strip().encode(errors="surrogateescape"), token.encode(errors="surrogateescape"))


@web.middleware
async def _errors_as_json(request, handler):
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kept = {k: error.headers[k] for k in ("Allow", "Content-Range") if k in error.headers}
        return _json(error.status, {"error": error.reason}, headers=kept)
    except Exception:
        _log.exception("%s %s failed", request.method, request.rel_url.path)
        return _json(500, {"error": "internal error"})


def _guard(token):
    """Refuses strangers, and bodies that say themselves that they are too large, before reading."""

    @web.middleware
    async def guarded(request, handler):
        health = request.method in ("GET", "HEAD") and request.path == "/health"
        if token and not health and not _authorized(request.headers.get("Authorization", ""), token):
            return _json(401, {"error": "Unauthorized"}, headers={"WWW-Authenticate": "Bearer"})
        if (request.content_length or 0) > BODY_LIMIT:
            raise web.HTTPRequestEntityTooLarge(BODY_LIMIT, request.content_length)
        return await handler(request)

    return guarded
