"""Downloads of images by http(s): checked on the way, resumed where they were cut, visible when they are whole."""

import contextlib
import email.utils
import http.client
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from csi_driver.images.base import MIB
from csi_driver.images.checksum import Algorithm, Checksum
from csi_driver.images.destinations import Connector, Destination, parse_url
from csi_driver.images.part import Part
from csi_driver.model.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

FetchProgress = Callable[[int, int | None], None]
"""Called with the bytes that are here and the bytes there are, if the server says. May raise to end the download."""

_NONE: Final[Mapping[str, str]] = {}
_MOST_REDIRECTS = 5
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_TRY_AGAIN: Final = (408, 425, 429)
_PIECE = MIB
_STRONG_ETAG: Final = re.compile(r'"[\x21\x23-\x7e\x80-\xff]{0,1000}"')
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(?:([0-9]{1,18})|\*)")


@dataclass(frozen=True)
class Fetched:
    """What a download brought: bytes, and their checksum (SHA-512 where none was expected)."""

    size: int
    checksum: Checksum


def fetch(
    url: str,
    path: Path,
    most_bytes: int,
    connector: Connector,
    *,
    expected: Checksum | None = None,
    headers: Mapping[str, str] = _NONE,
    progress: FetchProgress = lambda _done, _total: None,
    warn: Callable[[str], None] = lambda _: None,
    retries: int = 3,
    backoff_seconds: float = 10.0,
) -> Fetched:
    """Download `url` to `path`, which is replaced when all of it is here, fits `expected`, and is fsynced.

    After a failure that may pass, it goes on after `backoff_seconds`, `retries` times, then raises Unavailable; what is
    here stays for the next call with this URL and path. It goes on by Range only if the server proves that the file is
    still the same (strong ETag, else Last-Modified), else it starts anew. Waiting is bounded by the connector.
    Each failure that is followed by another try is told to `warn`. `headers` go to the server that `url` names, behind
    a redirect to another one no more: they may be credentials.

    Raises InvalidArgument (URL or address refused, larger than `most_bytes`, empty, wrong checksum) and
    ResourceExhausted, after which nothing is left; NotFound, FailedPrecondition (other refusals of the server),
    VolumeBusy (another download to this path), CommandFailed (the disk), and what `progress` raises.
    """
    first = parse_url(url)
    with Part.open(path, first, expected.algorithm if expected else Algorithm.SHA512) as part:
        download = _Download(first, part, most_bytes, connector, progress, headers, close_is_end=expected is not None)
        for attempt in range(retries + 1):
            try:
                download.run()
                break
            except _Passing as error:
                part.make_durable()
                if attempt == retries:
                    kept = f"{part.received} bytes are kept" if part.resumable else "nothing is kept"
                    raise Unavailable(
                        f"the download of {first} failed {attempt + 1} times, the last time as {error}; {kept}: "
                        f"try again when the server works"
                    ) from error
                warn(f"the download of {first} failed as {error}; it is tried again in {backoff_seconds:g} s")
            time.sleep(backoff_seconds)
        found = part.checksum()
        if expected:
            expected.require(found, str(first))
        part.finish()
        return Fetched(part.received, found)


class _Passing(Exception):
    """A failure that may pass by itself: a clause that goes after "as"."""


class _Download:
    """Attempts at one download; each goes on where the part ends."""

    def __init__(
        self,
        first: Destination,
        part: Part,
        most_bytes: int,
        connector: Connector,
        progress: FetchProgress,
        headers: Mapping[str, str],
        *,
        close_is_end: bool,
    ) -> None:
        self._first = first
        self._part = part
        self._most_bytes = most_bytes
        self._connector = connector
        self._progress = progress
        self._headers = headers
        self._close_is_end = close_is_end

    def run(self) -> None:
        """Receive what is missing. Raises _Passing and what `fetch` names."""
        part = self._part
        if part.received > self._most_bytes:  # an earlier call was allowed more
            raise self._too_large(f"has {part.received} bytes and more")
        if part.received and part.received == part.total:  # cut between the last byte and the rename
            return
        with self._response() as response:
            follow = self._agree(response)
            self._progress(part.received, part.total)
            start = part.received
            for piece in self._pieces(response, follow):
                if part.received + len(piece) > self._most_bytes:
                    raise self._too_large("goes on beyond the limit")
                part.add(piece)
                self._progress(part.received, part.total)
        if follow is not None and part.received - start != follow:
            raise _Passing(f"the connection ended after {part.received - start} of {follow} bytes")
        if part.total is not None and part.received != part.total:
            raise _Passing(f"the server sent the bytes up to {part.received} of {part.total}")
        if not part.received:
            raise InvalidArgument(f"the image at {self._first} is empty; give the URL of an image")

    @contextlib.contextmanager
    def _response(self) -> Iterator[http.client.HTTPResponse]:
        """The response behind the redirects, its connection open for the length of the block."""
        ours = self._part.range_headers()
        to = self._first
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                connection = self._connector.connect(to)
            except OSError as error:
                raise _Passing(f"{to.host} could not be connected to ({_told(error)})") from error
            with contextlib.closing(connection):
                headers = {**self._headers, **ours} if to.origin == self._first.origin else ours
                try:
                    response = connection.get(to, headers, self._most_bytes)
                except (OSError, http.client.HTTPException) as error:
                    raise _Passing(f"{to.host} gave no valid answer ({_told(error)})") from error
                if response.status not in _REDIRECTS:
                    yield response
                    return
                if not (location := response.headers.get("Location")):
                    raise InvalidArgument(
                        f"{self._first} is redirected with status {response.status} to nowhere; give the final URL"
                    )
                to = to.redirected(location)
        raise InvalidArgument(f"{self._first} leads to more than {_MOST_REDIRECTS} redirects; give the final URL")

    def _agree(self, response: http.client.HTTPResponse) -> int | None:
        """Make the part fit the response; how many bytes follow, None if only the end of the transfer tells."""
        status = response.status
        if status in (404, 410):
            raise NotFound(f"there is no image at {self._first} (status {status}); check the URL")
        if status >= 500 or status in _TRY_AGAIN:
            raise _Passing(f"the server answered with status {status}")
        if len({*response.headers.get_all("Content-Length", [])}) > 1:  # RFC 9112, 6.3: none of them is to be believed
            raise _Passing("the server contradicts itself about the length of its answer")
        if status == 416 and self._part.resumable:
            self._part.restart(None, "")
            raise _Passing("the server has fewer bytes than were received of it")
        if status == 206 and self._part.resumable:
            return self._continue(response)
        if status != 200:
            raise self._refused(status)
        if response.length is None and not response.chunked and not self._close_is_end:
            raise InvalidArgument(
                f"the server does not say how large {self._first} is, so a cut download would pass for the image; "
                f"give its checksum"
            )
        if response.length is not None:
            self._require_room(response.length, response.length)
        self._part.restart(response.length, _validator(response.headers))
        return response.length

    def _refused(self, status: int) -> FailedPrecondition:
        if status == 407:
            return FailedPrecondition(
                f"a proxy in front of {self._first} wants to know who asks (status 407), and none is used; download it "
                f"where the proxy is not in the way, and import the file"
            )
        advice = "check the URL and who may read it"
        if status in (401, 403):
            advice = "give credentials (--header-file, --netrc-file or --credentials-dir), or a URL that is signed anew"
        return FailedPrecondition(f"the server refused {self._first} with status {status}; {advice}")

    def _continue(self, response: http.client.HTTPResponse) -> int:
        part = self._part
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        validator = _validator(response.headers)
        # A date may be left out of such an answer, an ETag may not (RFC 9110, 15.3.7).
        same = validator == part.validator or (not validator and not part.validator.startswith('"'))
        if not found or int(found[1]) != part.received or not same:
            part.restart(None, "")
            raise _Passing("the server went on with another file or at another place")
        follow = int(found[2]) + 1 - part.received
        total = int(found[3]) if found[3] else part.total
        if total != (part.total or total) or follow <= 0 or response.length not in (None, follow):
            part.restart(None, "")
            raise _Passing("the server contradicts itself about the size of the file")
        self._require_room(total or 0, follow)
        part.total = total
        return follow

    def _require_room(self, size: int, follow: int) -> None:
        if size > self._most_bytes:
            raise self._too_large(f"has {size} bytes")
        spare = self._part.spare_bytes()
        if follow > spare:
            raise ResourceExhausted(
                f"the download of {self._first} needs {follow} bytes on the disk, which has {spare} free above what is "
                f"kept for what else is there; make room"
            )

    def _too_large(self, how: str) -> InvalidArgument:
        return InvalidArgument(
            f"the image at {self._first} {how}; at most {self._most_bytes} bytes are allowed: take a smaller image or "
            f"raise the limit"
        )

    @staticmethod
    def _pieces(response: http.client.HTTPResponse, follow: int | None) -> Iterator[bytes]:
        left = follow
        while left is None or left > 0:
            try:
                # Bounded here too: Python before 3.11.8 reads beyond the announced length.
                piece = response.read1(_PIECE if left is None else min(left, _PIECE))
            except (OSError, http.client.HTTPException) as error:
                raise _Passing(f"the transfer broke ({_told(error)})") from error
            if not piece:
                return
            left = None if left is None else left - len(piece)
            yield piece


def _validator(headers: http.client.HTTPMessage) -> str:
    """What proves with If-Range that a file is the same: a strong ETag, else a strong date (RFC 9110, 8.8), else ""."""
    if _STRONG_ETAG.fullmatch(etag := headers.get("ETag", "")):
        return etag
    try:
        modified = email.utils.parsedate_to_datetime(headers.get("Last-Modified", ""))
        sent = email.utils.parsedate_to_datetime(headers.get("Date", ""))
        # Within one second a file can change twice: such a date proves nothing.
        return email.utils.format_datetime(modified, usegmt=True) if sent - modified >= timedelta(seconds=1) else ""
    except (TypeError, ValueError):
        return ""


def _told(error: Exception) -> str:
    """An exception of a transfer in a few words: some carry only their name, some what the server sent."""
    return (str(error) or type(error).__name__).encode("unicode_escape").decode()[:200]
