"""What a clone reads: an image's file as it lies there, the disk that is in it, or what its key opens."""

from pathlib import Path
from typing import assert_never

from csi_driver.images.base import ImageFormat, Reader
from csi_driver.images.checkpoint import Operation
from csi_driver.images.luks_reader import LuksReader
from csi_driver.images.qemu import QemuReader
from csi_driver.images.requests import Clone, passphrase_of
from csi_driver.images.source import RawReader
from csi_driver.images.store import ImageRecord
from csi_driver.keys.secret import SecretKey, with_either
from csi_driver.luks.header import PRIMARY_MAGIC
from csi_driver.model.errors import FailedPrecondition


def reader_of(source: ImageRecord, file: Path, wanted: Clone, where: str) -> Reader:
    """The reader of an image's file for that operation; `where` names the image.

    Raises FailedPrecondition (no passphrase, LUKS inside what is to be encrypted), and what the readers raise.
    """
    match wanted.operation:
        case Operation.IGNORE:
            return RawReader(str(file), where)
        case Operation.DECRYPT | Operation.REENCRYPT:
            return opened(file, wanted.key, where)
        case Operation.ENCRYPT:
            is_raw = source.format is ImageFormat.RAW
            reader = RawReader(str(file), where) if is_raw else QemuReader(str(file), source.format, where)
            try:
                _refuse_encrypted(reader, where)
            except BaseException:
                reader.close()
                raise
            return reader
        case _:
            assert_never(wanted.operation)


def opened(file: Path, key: SecretKey | None, where: str) -> LuksReader:
    """What is inside an encrypted image's file; a passphrase that the secret had before opens it as well.

    Raises FailedPrecondition without a passphrase, and what `LuksReader` raises.
    """
    key = key or SecretKey(None)
    passphrase = passphrase_of(key, where)
    raw = RawReader(str(file), where)
    try:
        return with_either(key, passphrase, lambda each: LuksReader(raw, each, where))
    except BaseException:
        raw.close()
        raise


def _refuse_encrypted(reader: Reader, where: str) -> None:
    """Record and data decide: a disk that holds LUKS is not encrypted once more."""
    head = bytearray(min(len(PRIMARY_MAGIC), reader.size))
    reader.read_into(0, memoryview(head))
    if head == PRIMARY_MAGIC:
        raise FailedPrecondition(
            f"{where} is recorded as not encrypted and its disk begins like LUKS; export that disk as raw and import "
            f"it, then use reencrypt or ignore"
        )
