"""`mooncake.engine`: read and write the memory of other processes by address, with upstream's names."""

from mooncake._enums import TransferOpcode
from mooncake._native import TransferEngine, TransferNotify

SUPPORT_EFA = False
SUPPORT_HIP = False
SUPPORT_MNNVL = False
SUPPORT_MUSA = False
SUPPORT_INTRA_NVLINK = False
SUPPORT_CUDA = False

InnerTransferEngine = TransferEngine

__all__ = ["InnerTransferEngine", "TransferEngine", "TransferNotify", "TransferOpcode"]
