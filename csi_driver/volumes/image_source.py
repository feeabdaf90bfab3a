"""What a StorageClass says about the image that its volumes start from, in Longhorn's words, against what is recorded.

Nothing is ever fetched because of it: a class that tells another story than the image's record is refused.
"""

from collections.abc import Mapping
from typing import Final

from csi_driver.images.checkpoint import Operation
from csi_driver.images.store import ImageRecord, check_name
from csi_driver.model.errors import InvalidArgument
from csi_driver.model.reading import decode
from csi_driver.model.volume import VolumeParameters

EXPORTED: Final = "export"
"""The operation in the record of an image that was made of a volume, whose id its source is."""

NAME: Final = "backingImage"
TYPE: Final = "backingImageDataSourceType"
PARAMETERS: Final = "backingImageDataSourceParameters"

_SOURCE, _ENCRYPTION, _SECRET, _NAMESPACE = "backing-image", "encryption", "secret", "secret-namespace"
_VOLUME: Final = "volume-name"
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "clone": (_SOURCE, _ENCRYPTION, _SECRET, _NAMESPACE),
    "download": ("url",),
    "upload": (),
    "export-from-volume": (_VOLUME, "export-type"),
    "restore": ("backup-url", "concurrent-limit"),
}
"""Longhorn's types of a backing image's source, and what the parameters of each may say."""
TYPES: Final = tuple(_KEYS)
_FACTS: Final = {"clone": _SOURCE, "download": "url", "export-from-volume": _VOLUME}
"""Which of them the source in an image's record is."""
_CLONED: Final = frozenset(map(str, Operation))


def read_name(text: str) -> str | None:
    """The value of `backingImage`; an empty one names none. Raises ValueError, which says what it must be."""
    try:
        if text:
            check_name(text)
    except InvalidArgument:
        raise ValueError(
            "an image's name, as luks-csi image list shows them, or in a cluster kubectl get images"
        ) from None
    return text or None


def read_type(text: str) -> str | None:
    """The value of `backingImageDataSourceType`. Raises ValueError, which says what it must be."""
    if text and text not in TYPES:
        raise ValueError(f"one of {', '.join(TYPES)}")
    return text or None


def read_source(text: str) -> dict[str, str]:
    """The value of `backingImageDataSourceParameters`, empty entries left out; a URL loses its query.

    Raises InvalidArgument; the text is not quoted, as a URL's query may be a credential.
    """
    # An HTTP client comes with it, a tenth of the server's start, for those whose class names a URL.
    from csi_driver.images.destinations import parse_url  # noqa: PLC0415

    try:
        said = decode(text, dict[str, str]) if text else {}
        return {key: str(parse_url(value)) if key == "url" else value for key, value in said.items() if value}
    except InvalidArgument as error:
        raise InvalidArgument(f"the parameter {PARAMETERS} is wrong: {error}") from None
    except ValueError:  # msgspec's errors are ValueErrors
        raise InvalidArgument(
            f'the parameter {PARAMETERS} must be a JSON object of texts, such as {{"url": "https://host/path"}}'
        ) from None


def check_together(parameters: VolumeParameters) -> None:
    """Raise InvalidArgument when the parameters about an image do not go together."""
    if parameters.backing_image is None and (parameters.image_source_type or parameters.image_source):
        given = TYPE if parameters.image_source_type else PARAMETERS
        raise InvalidArgument(f"the parameter {given} is about an image and {NAME} names none; add that")
    if parameters.image_source_type is None:
        if parameters.image_source:
            raise InvalidArgument(f"the parameter {PARAMETERS} needs {TYPE} beside it; add that")
        return
    allowed = _KEYS[parameters.image_source_type]
    if unknown := sorted(set(parameters.image_source) - set(allowed)):
        raise InvalidArgument(
            f"the parameter {PARAMETERS} has {', '.join(map(repr, unknown))}, which the type "
            f"{parameters.image_source_type} does not know; it knows {', '.join(allowed) or 'none'}"
        )


def check_source(image: ImageRecord, parameters: VolumeParameters) -> None:
    """Raise InvalidArgument, naming both sides, when the class says something else of the image than its record."""
    kind = parameters.image_source_type
    if kind is None:
        return
    made = image.provenance
    recorded = _recorded_type(image)
    if kind != recorded:
        raise _disagreement(image, TYPE, kind, f"{recorded} ({made.operation} of {made.source})")
    said = parameters.image_source
    facts = {_FACTS[kind]: made.source} if kind in _FACTS else {}
    if kind == "clone" and said:
        said = {_ENCRYPTION: Operation.IGNORE.value} | said  # as Longhorn has it
        facts[_ENCRYPTION] = made.operation
        # A decrypted image has no secret, and the class names the one of its source.
        if made.operation != Operation.DECRYPT and image.secret is not None and _SECRET in said:
            namespace, _, name = image.secret.rpartition("/")
            facts |= {_NAMESPACE: namespace, _SECRET: name}
    for key, fact in facts.items():
        if said.get(key, fact) != fact:
            raise _disagreement(image, f"{PARAMETERS}: {key}", said[key], fact)


def _recorded_type(image: ImageRecord) -> str:
    if image.provenance.operation in _CLONED:
        return "clone"
    if image.provenance.operation == EXPORTED:
        return "export-from-volume"
    return "download" if image.provenance.source.startswith(("http://", "https://")) else "upload"


def _disagreement(image: ImageRecord, what: str, said: str, recorded: str) -> InvalidArgument:
    return InvalidArgument(
        f"the StorageClass says {what} {said!r} of image {image.name} and its record says {recorded!r}; correct the "
        f"StorageClass, or name the image that it means"
    )
