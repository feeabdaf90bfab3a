"""A copy of an image from an agent that has it: over TLS, checked by its SHA-256, resumed where it was cut."""

import contextlib
import http.client
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.agent.work import Pull
from csi_driver.images.bring import Meter
from csi_driver.images.checksum import Algorithm, Checksum
from csi_driver.images.destinations import Connector, Destination, SocketAddress, parse_url
from csi_driver.images.fetch import fetch
from csi_driver.images.store import ImageRecord
from csi_driver.kube.copies import AGENTS
from csi_driver.model.errors import DriverError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from csi_driver.model.reading import decode

_LARGEST_RECORD: Final = 1 << 20
_WAIT_SECONDS: Final = 3.0
_OF_A_PEER: Final = (Unavailable, InvalidArgument, NotFound, FailedPrecondition)


class Offer(msgspec.Struct, frozen=True):
    """What an agent says of a copy that it has."""

    record: ImageRecord
    checksum: str


def pull(name: str, work: Pull, folder: Path, meter: Meter) -> tuple[Path, ImageRecord]:
    """The file, durable in `folder`, and what its node has recorded of it.

    What one of the peers has, or answers, keeps nobody from asking the next one. Raises Unavailable, telling what each
    said, and of this node ResourceExhausted, VolumeBusy, CommandFailed and what `meter` raises.
    """
    said: list[str] = []
    for peer in work.peers:
        try:
            return _from(name, peer, work, folder, meter)
        except _OF_A_PEER as error:
            said.append(f"{peer}: {str(error).partition(';')[0]}")  # without what to do about a download
    raise Unavailable(f"image {name} could be pulled from no node: {'; '.join(said) or 'none has it'}")


def _from(name: str, peer: str, work: Pull, folder: Path, meter: Meter) -> tuple[Path, ImageRecord]:
    host, _, port = peer.rpartition(":")
    address = host.strip("[]")

    def there(_host: str, number: int) -> list[SocketAddress]:
        return [(address, number)]

    try:
        connector = Connector(resolve=there, allow_local=True, cacert=Path(work.ca))
    except InvalidArgument as error:  # kubelet mounts them within minutes of when the operator has made them
        raise Unavailable(f"nobody can be trusted yet: {error}") from None
    url = f"https://{AGENTS}:{port}/v1/copies/{name}"
    headers = {"Authorization": f"Bearer {work.token}"}
    offer = _offer(parse_url(f"{url}/record"), connector, headers)
    if work.checksum is not None and offer.checksum != work.checksum:
        raise Unavailable(f"it has another file under that name, of SHA-256 {offer.checksum}")
    path = folder / "pulled"
    if not path.exists():
        with meter("pulling", offer.record.file_size) as progress:
            fetch(
                f"{url}/file", path, offer.record.file_size, connector,
                expected=Checksum(Algorithm.SHA256, offer.checksum), headers=headers,
                progress=lambda done, _total: progress(done), retries=1, backoff_seconds=_WAIT_SECONDS,
            )  # fmt: skip
    return path, offer.record


def _offer(to: Destination, connector: Connector, headers: dict[str, str]) -> Offer:
    try:
        with contextlib.closing(connector.connect(to)) as connection:
            response = connection.get(to, headers, _LARGEST_RECORD)
            content = response.read(_LARGEST_RECORD)
        if response.status == 200:
            return decode(content, Offer)
        why = f"status {response.status}: {content[:200].decode(errors='replace').strip()}"
    except (OSError, http.client.HTTPException) as error:
        why = str(error) or type(error).__name__
    except (msgspec.DecodeError, msgspec.ValidationError):
        why = "an answer that is not understood"
    except DriverError as error:
        why = str(error)
    raise Unavailable(f"it offers no copy: {why}")
