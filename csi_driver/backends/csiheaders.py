"""Copies of LUKS2 headers beside the records: compressed, in pieces, as etcd takes some 1.5 MiB for an object.

A piece never changes and is called after what it is of, so writing one again is fine. The record points to the copy
that counts once all its pieces are there.
"""

import base64
import binascii
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from csi_driver.backends.base import Fill, drop_before
from csi_driver.backends.csipins import digest as short
from csi_driver.backends.csirecords import GROUP, Api, HeaderPointer, Known, RecordObjects
from csi_driver.host.files import Files, read_file
from csi_driver.kube.kinds import HEADER_PIECE, MANAGED_BY, MANAGER, Json, name_of
from csi_driver.model.errors import AlreadyExists, FailedPrecondition, ResourceExhausted

LABEL: Final = f"{GROUP}/volume"
"""Of pieces, claims and holder pods: a digest of the volume's id, which may be longer than a label can be."""
_PIECE: Final = 700_000  # characters: an object has some hundred more
_MOST_PIECES: Final = 8
_LARGEST: Final = 64 << 20  # what is unpacked; a copy has the length of the data offset, nearly all of it holes
_YOUNG: Final = timedelta(minutes=10)  # whoever has written it may be about to point to it


class HeaderCopies:
    """Header copies of the volumes of `records`; `folder` is where one lies while a program reads or writes it."""

    def __init__(self, api: Api, namespace: str, records: RecordObjects, folder: Path, files: Files) -> None:
        self._api = api
        self._namespace = namespace
        self._records = records
        self._folder = folder
        self._files = files

    def path(self, volume_id: str) -> Path:
        """The last copy, fetched; a path without a file where there is none. Raises FailedPrecondition."""
        path = self._fetched(volume_id)
        known = self._records.find(volume_id)
        if known is None or known.spec.header is None:
            self._files.remove(path)
            return path
        content = self._fetch(volume_id, known.spec.header)
        self._prepare()
        self._files.write_volatile(path, content)
        return path

    def has(self, volume_id: str) -> bool:
        """Whether there is one."""
        known = self._records.find(volume_id)
        return known is not None and known.spec.header is not None

    def before(self, volume_id: str) -> Path:
        """Where the header is kept that was overwritten by a copy, on this node alone."""
        self._prepare()
        return self._before(volume_id)

    def keep(self, volume_id: str, fill: Fill) -> None:
        """Keep what `fill` writes at the path that it is told. Raises ResourceExhausted, FailedPrecondition."""
        self._prepare()
        fresh = self._folder / f".{volume_id}.luks2.new"
        try:
            fill(str(fresh))
            content = read_file(fresh)
        finally:
            self._files.remove(fresh)
        packed = base64.b64encode(zlib.compress(content, 1)).decode()
        pieces = [packed[at : at + _PIECE] for at in range(0, len(packed), _PIECE)]
        if len(pieces) > _MOST_PIECES:
            raise ResourceExhausted(
                f"the copy of the header of volume {volume_id} takes {len(packed)} bytes and at most "
                f"{_PIECE * _MOST_PIECES} can be kept; take key slots away that nobody needs"
            )
        pointer = HeaderPointer(digest=hashlib.sha256(content).hexdigest(), pieces=len(pieces))
        for number, piece in enumerate(pieces):
            self._write(volume_id, _name(volume_id, pointer, number), piece)
        self._records.change(volume_id, header=pointer)
        self._remove_files(volume_id)

    def _before(self, volume_id: str) -> Path:
        return self._folder / f".{volume_id}.before"

    def _fetched(self, volume_id: str) -> Path:
        return self._folder / f"{volume_id}.luks2"

    def _remove_files(self, volume_id: str) -> None:
        """What this node has of older headers: a key slot that was taken away since may be in them."""
        self._files.remove(self._fetched(volume_id))
        drop_before(self._before(volume_id), self._files)

    def drop(self, volume_id: str) -> None:
        """Remove every piece of the volume's; absent is fine."""
        for piece in self._pieces({LABEL: short(volume_id)}):
            self._api.delete(HEADER_PIECE, name_of(piece), self._namespace)
        self._remove_files(volume_id)

    def drop_unused(self, known: Iterable[Known]) -> None:
        """Remove pieces that no record points to, once nobody can be about to. `known` are the records as they were a
        while ago: each other one is read anew, and of one that cannot be read nobody knows what it points to.
        """
        used = {name for each in known for name in _names(each)}
        before = datetime.now(UTC) - _YOUNG
        for piece in self._pieces({MANAGED_BY: MANAGER}):
            made, name = datetime.fromisoformat(piece["metadata"]["creationTimestamp"]), name_of(piece)
            if name not in used and made < before and not self._may_be_used(name):
                self._api.delete(HEADER_PIECE, name, self._namespace)

    def _may_be_used(self, name: str) -> bool:
        try:
            known = self._records.find(name.rsplit(".", 2)[0])
        except FailedPrecondition:
            return True
        return known is not None and name in _names(known)

    def _pieces(self, labels: Mapping[str, str]) -> list[Json]:
        return self._api.list(HEADER_PIECE, self._namespace, labels=labels)[0]

    def _prepare(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _write(self, volume_id: str, name: str, piece: str) -> None:
        metadata = {"name": name, "labels": {MANAGED_BY: MANAGER, LABEL: short(volume_id)}}
        try:
            self._api.create(HEADER_PIECE, {"metadata": metadata, "spec": {"content": piece}}, self._namespace)
        except AlreadyExists:
            found = self._api.get(HEADER_PIECE, name, self._namespace) or {}
            if found.get("spec", {}).get("content") != piece:
                raise FailedPrecondition(
                    f"the copy of the header of volume {volume_id} cannot be kept: the HeaderPiece "
                    f"{self._namespace}/{name} is there and holds something else; remove it"
                ) from None

    def _fetch(self, volume_id: str, pointer: HeaderPointer) -> bytes:
        names = [_name(volume_id, pointer, number) for number in range(min(pointer.pieces, _MOST_PIECES))]
        found = [self._api.get(HEADER_PIECE, name, self._namespace) for name in names]
        if None not in found:
            packed = "".join(str((each or {}).get("spec", {}).get("content", "")) for each in found)
            try:
                unpacking = zlib.decompressobj()
                content = unpacking.decompress(base64.b64decode(packed, validate=True), _LARGEST)
            except (zlib.error, binascii.Error):
                content = b""
            if hashlib.sha256(content).hexdigest() == pointer.digest:
                return content
        raise FailedPrecondition(
            f"the copy of the header of volume {volume_id} is damaged: the HeaderPieces {', '.join(names)} in "
            f"namespace {self._namespace} are not what its VolumeRecord points to; restore them from a backup"
        )


def _names(known: Known) -> Iterable[str]:
    """The pieces that a record points to."""
    header = known.spec.header
    return [_name(known.volume_id, header, number) for number in range(header.pieces)] if header is not None else []


def _name(volume_id: str, pointer: HeaderPointer, number: int) -> str:
    return f"{volume_id}.{pointer.digest[:16]}.{number}"
