"""Two processes exchange memory by address, without a pool. `python memory_by_address.py`"""

import ctypes
import multiprocessing

from mooncake.engine import TransferEngine


def owner(pipe):
    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    memory = ctypes.create_string_buffer(b"from the other process", 4096)
    assert engine.register_memory(ctypes.addressof(memory), 4096) == 0
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", ctypes.addressof(memory)))
    pipe.recv()
    print("owner now sees", memory.value)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=owner, args=(there,))
    process.start()
    peer, address = here.recv()
    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    buffer = ctypes.create_string_buffer(4096)
    assert engine.transfer_sync_read(peer, ctypes.addressof(buffer), address, 4096) == 0
    print("read", buffer.value)
    buffer.value = b"written from here"
    assert engine.transfer_sync_write(peer, ctypes.addressof(buffer), address, 64) == 0
    here.send("done")
    process.join()
