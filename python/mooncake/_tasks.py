"""Copy and move tasks of `MooncakeDistributedStore`: replicas of an object on other segments, carried out by threads of this
process. A task that its process does not live to end is gone; what it had not finished changes nothing.
"""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from mooncake._enums import TaskStatus, TaskType

_INVALID_PARAMS = -600
_REPLICA_NOT_FOUND = -710
_TASK_NOT_FOUND = -1400
_TASK_PENDING_LIMIT_EXCEEDED = -1401
_NOBODY = (0, 0)
_PENDING_MAX = 10_000
# Ended tasks that are remembered; the oldest go first.
_ENDED_MAX = 10_000


class QueryTaskResponse:
    """What is known of a task."""

    def __init__(self, task_id, kind, client):
        now = int(time.time() * 1000)
        self.id = task_id
        self.type = kind
        self.status = TaskStatus.PENDING
        self.created_at_ms_epoch = now
        self.last_updated_at_ms_epoch = now
        self.assigned_client = client
        self.message = ""

    def _becomes(self, status, message=""):
        self.status, self.message = status, message
        self.last_updated_at_ms_epoch = int(time.time() * 1000)

    def __repr__(self):
        return f"QueryTaskResponse(id={self.id}, type={self.type.name}, status={self.status.name}, message={self.message!r})"


class _Tasks:
    """The tasks of one store."""

    def __init__(self):
        self._lock = threading.Lock()
        self._all = {}
        self._pending = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="mooncake-task")
        self.client = (os.getpid(), id(self))

    def start(self, kind, run):
        task_id = (int.from_bytes(os.urandom(8)) | 1, int.from_bytes(os.urandom(8)))
        task = QueryTaskResponse(task_id, kind, self.client)
        with self._lock:
            if self._pending >= _PENDING_MAX:
                return _NOBODY, _TASK_PENDING_LIMIT_EXCEEDED
            self._pending += 1
            self._all[task_id] = task
            for old in [i for i, t in self._all.items() if t.status >= TaskStatus.SUCCESS][:-_ENDED_MAX]:
                del self._all[old]
        self._threads.submit(self._carry_out, task, run)
        return task_id, 0

    def _carry_out(self, task, run):
        task._becomes(TaskStatus.PROCESSING)
        try:
            code = run()
        except Exception as error:  # a task reports, it does not raise into a thread
            code, reason = -1, str(error)
        else:
            reason = f"error {code}"
        with self._lock:
            self._pending -= 1
            if code == 0:
                task._becomes(TaskStatus.SUCCESS)
            else:
                task._becomes(TaskStatus.FAILED, reason)

    def find(self, task_id):
        with self._lock:
            return self._all.get(tuple(task_id))

    def close(self):
        self._threads.shutdown(wait=True, cancel_futures=True)


class TaskMethods:
    """Tasks, and single replicas given up."""

    def _task_list(self):
        tasks = self.__dict__.get("_tasks")
        if tasks is None:
            tasks = self.__dict__.setdefault("_tasks", _Tasks())
        return tasks

    def _start_task(self, kind, key, run):
        size = self.get_size(key)
        if size < 0:
            return _NOBODY, int(size)
        return self._task_list().start(kind, run)

    def _are_segments(self, names):
        known = self._segment_names()
        # A master that does not answer says so to the task.
        return known is None or set(names) <= set(known)

    def create_copy_task(self, key, targets):
        """Begins to put further replicas of an object on segments: `(task id, 0)`, or `((0, 0), negative code)`: -600 for
        a segment that does not exist."""
        targets = list(targets)
        if not targets or not self._are_segments(targets):
            return _NOBODY, _INVALID_PARAMS
        return self._start_task(TaskType.REPLICA_COPY, key, lambda: self._copy_replicas(key, targets))

    def create_move_task(self, key, source, target):
        """Begins to move an object's replica from one segment to another: like `create_copy_task`."""
        if source == target or not self._are_segments([source, target]):
            return _NOBODY, _INVALID_PARAMS
        return self._start_task(TaskType.REPLICA_MOVE, key, lambda: self._move_replica(key, source, target))

    def query_task(self, task_id):
        """`(QueryTaskResponse, 0)`, or `(None, -1400)` for a task this store did not begin."""
        task = self._task_list().find(task_id)
        return (task, 0) if task is not None else (None, _TASK_NOT_FOUND)

    def batch_replica_clear(self, keys, segment_name=""):
        """Gives up the replicas of keys (on one segment) whose leases have lapsed; the keys for which that was done."""
        keys = list(keys)
        if not segment_name:
            return [key for key, code in zip(keys, self.batch_remove(keys)) if code == 0]
        return [key for key in keys if self._clear_replica(key, segment_name) == 0]
