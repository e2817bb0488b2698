"""`MooncakeDistributedStoreAsync`: the store for asyncio.

`await store.async_get(key)`: every method of the store, prefixed with `async_`. What needs nothing but a copy of few bytes
is done at once, in the loop's thread: small objects whose place is known and whose memory this process has mapped. Whatever
waits for the network is carried out by native threads of this store, which need no interpreter lock for it; their answers
come to the loop in batches, by one eventfd per loop. Calls written in Python (tensors, `setup`, segments) run on the same
threads.

Cancelling a call stops waiting for it: it goes on by itself, and values, keys and bytes it was given are kept until it has
ended. Memory named by address must stay until then: `await store.async_settle()`.
"""

import asyncio
import functools
import os
import weakref
from collections import deque

from mooncake._native import Begun, Mailbox, Workers
from mooncake.store import MooncakeDistributedStore

_PREFIX = "async_"
# Methods whose waiting part the native store hands to its threads.
_NATIVE = frozenset(
    """get get_batch get_buffer batch_get_buffer get_into batch_get_into batch_get_into_multi_buffers get_into_ranges
    put put_parts put_batch put_from put_from_with_metadata batch_put_from batch_put_from_multi_buffers
    upsert upsert_parts upsert_batch upsert_from batch_upsert_from
    is_exist batch_is_exist get_size remove batch_remove remove_by_regex remove_all
    get_replica_desc batch_get_replica_desc batch_get_session_start batch_get_session_end
    batch_get_into_multi_buffer_ranges batch_put_session_start batch_put_from_multi_buffer_ranges
    batch_put_session_end batch_put_session_revoke""".split()
)
# Methods that ask nobody.
_AT_ONCE = frozenset(
    """register_buffer unregister_buffer alloc_from_mem_pool get_hostname get_master_address query_task
    get_offload_rpc_read_count unmount_local_disk_segment""".split()
)
# Methods that wait for the threads themselves.
_CLOSING = frozenset(("close", "tearDownAll"))


class _Inbox:
    """What one event loop has under way. Used in the loop's thread only; held by the loop, and does not hold it."""

    def __init__(self, loop, in_flight_max):
        self.mailbox = Mailbox()
        self.waiting = {}
        self._in_flight_max = in_flight_max
        self._room = deque()
        self._quiet = []
        self._retired = False
        loop.add_reader(self.mailbox.fileno(), self._take)

    def is_full(self):
        return len(self.waiting) >= self._in_flight_max

    async def room(self):
        """Waits until something has ended. First come, first served."""
        turn = asyncio.get_running_loop().create_future()
        self._room.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._wake(1)
            raise

    def answer(self, begun):
        """A future of what was begun."""
        future = asyncio.get_running_loop().create_future()
        self.waiting[begun.token] = future
        return future

    async def settle(self):
        """Waits until nothing is under way, cancelled calls included."""
        while self.waiting:
            quiet = asyncio.get_running_loop().create_future()
            self._quiet.append(quiet)
            await quiet

    def retire(self):
        """No more will begin here: stops listening once all have ended."""
        self._retired = True
        self._leave_if_done()

    def _take(self):
        taken = self.mailbox.take()
        for token, value, error in taken:
            future = self.waiting.pop(token, None)
            if future is None or future.done():
                continue
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
        self._wake(len(taken))
        if not self.waiting:
            quiet, self._quiet = self._quiet, []
            for future in quiet:
                if not future.done():
                    future.set_result(None)
            self._leave_if_done()

    def _wake(self, count):
        while count and self._room:
            turn = self._room.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def _leave_if_done(self):
        if self._retired and not self.waiting:
            asyncio.get_running_loop().remove_reader(self.mailbox.fileno())


_all = weakref.WeakSet()


class MooncakeDistributedStoreAsync(MooncakeDistributedStore):
    """`await store.async_get(key)`: every method of the store, prefixed with `async_`.

    `max_workers`: native threads, 1 to 64. `max_in_flight`: operations of one event loop that may be under way at once;
    further ones wait for their turn before they begin.
    """

    def __new__(cls, *args, max_workers=8, max_in_flight=1024, **kwargs):
        if max_workers < 1 or max_in_flight < 1:
            raise ValueError("max_workers and max_in_flight must be at least 1")
        store = super().__new__(cls, *args, **kwargs)
        store._workers = Workers(max_workers)
        store._max_workers = max_workers
        store._max_in_flight = max_in_flight
        store._loops = weakref.WeakKeyDictionary()
        store._last = (None, None)
        _all.add(store)
        return store

    def __init__(self, *_, **__):
        pass

    def _here(self):
        """This loop's inbox, and the native store that answers to it."""
        loop = asyncio.get_running_loop()
        known, here = self._last
        if known is not None and known() is loop:
            return here
        here = self._loops.get(loop)
        if here is None:
            # What a closed loop had under way nobody awaits any more; its futures would keep it alive.
            for gone in [known for known in list(self._loops) if known.is_closed()]:
                self._loops.pop(gone, None)
            inbox = _Inbox(loop, self._max_in_flight)
            here = inbox, self._apart(self._workers, inbox.mailbox)
            self._loops[loop] = here
        self._last = weakref.ref(loop), here
        return here

    async def _place(self):
        """`_here`, once there is room."""
        here = self._here()
        while here[0].is_full():
            await here[0].room()
            here = self._here()
        return here

    async def _elsewhere(self, method, *args, **kwargs):
        """Carries out a call of Python's on a native thread."""
        inbox, _ = await self._place()
        begun = self._workers.call(inbox.mailbox, functools.partial(method, *args, **kwargs))
        return await inbox.answer(begun)

    async def async_settle(self):
        """Returns when nothing that this loop began is under way any more, cancelled calls included."""
        await self._here()[0].settle()

    def __getattr__(self, name):
        # Methods that a subclass has added.
        if not name.startswith(_PREFIX) or not callable(method := getattr(self, name[len(_PREFIX) :])):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return functools.partial(self._elsewhere, method)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in list(vars(cls)):
            if hasattr(MooncakeDistributedStore, name) and not name.startswith("_") and _PREFIX + name not in vars(cls):
                setattr(cls, _PREFIX + name, _by_thread(name))

    def close(self):
        """Closes the store. Operations that have not begun are refused; those under way end first (12 s at most)."""
        self._workers.close()
        code = super().close()
        self._retire()
        return code

    def tearDownAll(self):
        """Upstream's name for `close`."""
        return self.close()

    def _retire(self):
        loops, self._loops, self._last = self._loops, weakref.WeakKeyDictionary(), (None, None)
        for loop, (inbox, _) in list(loops.items()):
            try:
                loop.call_soon_threadsafe(inbox.retire)
            except RuntimeError:
                pass  # A closed loop listens to nothing.

    def __del__(self):
        # The loops would hold on to the inboxes.
        if "_loops" in self.__dict__:
            self._retire()

    def _forget_parent(self):
        self._workers = Workers(self._max_workers)
        self._loops, self._last = weakref.WeakKeyDictionary(), (None, None)


def _natively(name):
    async def call(self, *args, **kwargs):
        inbox, native = self._here()
        if inbox.is_full():
            inbox, native = await self._place()
        answer = getattr(native, name)(*args, **kwargs)
        return await inbox.answer(answer) if type(answer) is Begun else answer

    return call


def _at_once(name):
    async def call(self, *args, **kwargs):
        return getattr(self, name)(*args, **kwargs)

    return call


def _by_thread(name):
    async def call(self, *args, **kwargs):
        return await self._elsewhere(getattr(self, name), *args, **kwargs)

    return call


def _closing(name):
    async def call(self):
        inbox, _ = self._here()
        return await inbox.answer(self._workers.call_apart(inbox.mailbox, getattr(self, name)))

    return call


def _add_methods():
    kinds = ((_NATIVE, _natively), (_AT_ONCE, _at_once), (_CLOSING, _closing))
    for name in dir(MooncakeDistributedStore):
        method = getattr(MooncakeDistributedStore, name)
        if name.startswith("_") or not callable(method):
            continue
        make = next((make for names, make in kinds if name in names), _by_thread)
        call = make(name)
        call.__name__ = _PREFIX + name
        call.__qualname__ = f"{MooncakeDistributedStoreAsync.__name__}.{call.__name__}"
        call.__doc__ = method.__doc__
        setattr(MooncakeDistributedStoreAsync, call.__name__, call)


_add_methods()


def _in_child():
    # The threads and the loops are the parent's.
    for store in list(_all):
        store._forget_parent()


os.register_at_fork(after_in_child=_in_child)
