"""`mooncake.engine`: read and write the memory of other processes by address, with upstream's names."""

from mooncake._enums import TransferOpcode
from mooncake._native import TransferEngine as _Engine
from mooncake._native import TransferNotify

SUPPORT_EFA = False
SUPPORT_HIP = False
SUPPORT_MNNVL = False
SUPPORT_MUSA = False
SUPPORT_INTRA_NVLINK = False
# The driver is looked for when an address is not memory of the host.
SUPPORT_CUDA = True


class TransferEngine(_Engine):
    """Memory of this process and of its peers; see `initialize`. Every method may be called from any thread."""

    def transfer_write_on_cuda(
        self, target_hostname, buffer, peer_buffer_address, length, stream_ptr=0, transport_hint=""
    ):
        """Writes once the work begun on a CUDA stream has ended; returns when the bytes are there: 0, or a negative code."""
        return self.batch_transfer_write_on_cuda(target_hostname, [buffer], [peer_buffer_address], [length], stream_ptr)

    def transfer_read_on_cuda(
        self, target_hostname, buffer, peer_buffer_address, length, stream_ptr=0, transport_hint=""
    ):
        """Reads once the work begun on a CUDA stream has ended; returns when the bytes are here: 0, or a negative code."""
        return self.batch_transfer_read_on_cuda(target_hostname, [buffer], [peer_buffer_address], [length], stream_ptr)

    def batch_transfer_write_on_cuda(
        self, target_hostname, buffers, peer_buffer_addresses, lengths, stream_ptr=0, transport_hint=""
    ):
        """Several ranges; see `transfer_write_on_cuda`."""
        code = self._await_stream(buffers, stream_ptr)
        return code or self.batch_transfer_sync_write(target_hostname, buffers, peer_buffer_addresses, lengths)

    def batch_transfer_read_on_cuda(
        self, target_hostname, buffers, peer_buffer_addresses, lengths, stream_ptr=0, transport_hint=""
    ):
        """Several ranges; see `transfer_read_on_cuda`."""
        code = self._await_stream(buffers, stream_ptr)
        return code or self.batch_transfer_sync_read(target_hostname, buffers, peer_buffer_addresses, lengths)


InnerTransferEngine = TransferEngine

__all__ = ["InnerTransferEngine", "TransferEngine", "TransferNotify", "TransferOpcode"]
