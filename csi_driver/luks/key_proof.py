"""The proof that a volume key is that of an open mapping, without which no table is loaded with it. Runs in a worker.

Kernel keyrings find keys by name, and whoever is root in a container without a user namespace shares root's. A table
that is loaded with another key garbles all that is read and lets that key's owner read all that is written.
"""

import mmap
import os
import time
from contextlib import ExitStack
from typing import Final

from csi_driver.host.devicemapper import Device, DeviceMapper, Target
from csi_driver.model.errors import DeviceUnreadable

_SECTOR: Final = 512
_BLOCK: Final = 4096
_BYTES: Final = 16 * _BLOCK
_TRIES: Final = 50
_PAUSE: Final = 0.01


def proof_name(name: str) -> str:
    """Name of the mapping that lives while the key of the mapping `name` is proven; no volume's has a colon.

    A killed proof leaves it: the next one removes it, and so must whoever closes the mapping, as it holds the device.
    """
    return f"{name}:proof"


def is_key_of(where: str, mapper: DeviceMapper, mapping: Device) -> bool:
    """Whether the key that dm-crypt finds in this thread's keyring, by the name in its table, is the live mapping's.

    A second mapping, read-only and of the first 64 KiB alone, is made with that key over the same device. One block
    that both decrypt to the same bytes proves the key, whatever it holds: another key makes other noise of it. Reads
    go past the page cache. Somebody may write meanwhile, so there are several blocks and several tries. Raises
    DeviceUnreadable, and FailedPrecondition when the key or the mapping is gone.
    """
    (target,) = mapping.targets
    length = min(target.length, _BYTES // _SECTOR)
    name = proof_name(mapping.name)
    mapper.remove(name)
    with ExitStack() as undo:
        table = [Target(0, length, target.type, target.params)]
        proof = mapper.create(name, f"luks-csi-proof-{mapping.name}", table, read_only=True)
        undo.callback(mapper.remove, name)
        live, second = (_open(mapper, device.name, undo) for device in (mapping, proof))
        buffers = [undo.enter_context(mmap.mmap(-1, length * _SECTOR)) for _ in range(2)]  # aligned, for direct I/O
        for _ in range(_TRIES):
            for descriptor, buffer in zip((live, second), buffers, strict=True):
                _read(where, descriptor, buffer)
            if any(
                buffers[0][at : at + _BLOCK] == buffers[1][at : at + _BLOCK] for at in range(0, len(buffers[0]), _BLOCK)
            ):
                return True
            time.sleep(_PAUSE)
    return False


def _open(mapper: DeviceMapper, name: str, undo: ExitStack) -> int:
    with mapper.open(name) as handle:
        descriptor = os.open(handle, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    undo.callback(os.close, descriptor)
    return descriptor


def _read(where: str, descriptor: int, buffer: mmap.mmap) -> None:
    try:
        if os.preadv(descriptor, [buffer], 0) == len(buffer):
            return
        reason = "the device ends early"
    except OSError as error:
        reason = error.strerror or str(error)
    raise DeviceUnreadable(
        f"{where} cannot be enlarged: its first blocks, by which its volume key is proven, cannot be read ({reason}); "
        f"look at the kernel log and the storage below it"
    )
