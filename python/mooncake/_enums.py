"""Enumerations with upstream's names and numbers."""

from enum import IntEnum


class ObjectDataType(IntEnum):
    """What an object holds; kept with it and shown, never interpreted."""

    UNKNOWN = 0
    KVCACHE = 1
    TENSOR = 2
    WEIGHT = 3
    SAMPLE = 4
    ACTIVATION = 5
    GRADIENT = 6
    OPTIMIZER_STATE = 7
    METADATA = 8
    GENERAL = 9


class SoftPinAction(IntEnum):
    """What a put does with the object's soft pin."""

    PRESERVE = 0
    ENABLE = 1
    DISABLE = 2


class ReplicaStatus(IntEnum):
    """State of a replica."""

    UNDEFINED = 0
    INITIALIZED = 1
    PROCESSING = 2
    COMPLETE = 3
    REMOVED = 4
    FAILED = 5


class TaskType(IntEnum):
    """What a task does."""

    REPLICA_COPY = 0
    REPLICA_MOVE = 1


class TaskStatus(IntEnum):
    """How far a task is."""

    PENDING = 0
    PROCESSING = 1
    SUCCESS = 2
    FAILED = 3


class TransferOpcode(IntEnum):
    """Direction of a transfer, seen from the caller. Both of upstream's spellings."""

    Read = 0
    READ = 0
    Write = 1
    WRITE = 1
