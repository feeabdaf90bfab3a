"""The StorageClass parameters of Ceph-CSI that say where and how an image lies; other backends ignore them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

_NEEDS = {
    "layering": (),
    "exclusive-lock": (),
    "object-map": ("exclusive-lock",),
    "fast-diff": ("exclusive-lock", "object-map"),
    "deep-flatten": (),
}
"""Features of images that the kernel can map, and what each wants beside it (rbd(8))."""

_MAP_OPTIONS = {
    "abort_on_full": None,
    "alloc_size": r"[1-9]\d{2,9}",
    "compression_hint": r"none|compressible|incompressible",
    "crush_location": r"[A-Za-z0-9_:|.-]+",
    "crc": None,
    "lock_on_read": None,
    "lock_timeout": r"\d{1,5}",
    "ms_mode": r"legacy|crc|secure|prefer-crc|prefer-secure",
    "nocrc": None,
    "notcp_nodelay": None,
    "notrim": None,
    "osd_idle_ttl": r"\d{1,5}",
    "osd_request_timeout": r"\d{1,5}",
    "osdkeepalive": r"\d{1,5}",
    "queue_depth": r"[1-9]\d{0,4}",
    "read_from_replica": r"no|balance|localize",
    "tcp_nodelay": None,
}
"""What a class may add to each mapping, with the form of the value. Not `exclusive`: the image could not be enlarged;
nor `noshare`, which is always there; nor anything that names a key or makes the device read-only.
"""
_KERNEL, _USER_SPACE = "krbd:", "nbd:"
_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,127}")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("the name of a Ceph pool: letters, digits, '_', '.', '-'")
    return text


def _cluster(text: str) -> str:
    if not text or len(text) > 253 or not text.isprintable():
        raise ValueError("a clusterID of the configuration of clusters")
    return text


def _features(text: str) -> tuple[str, ...]:
    """In one order, so that classes that say the same are the same."""
    given = {word.strip() for word in text.split(",")}
    needed = {other for word in given for other in _NEEDS.get(word, ())}
    if not given <= set(_NEEDS) or not needed <= given:
        raise ValueError(
            f"some of {', '.join(_NEEDS)}, with commas between; object-map wants exclusive-lock, and fast-diff both"
        )
    return tuple(word for word in _NEEDS if word in given)


def _mounter(text: str) -> str:
    if text != "rbd":
        raise ValueError("rbd: images are mapped by the kernel; leave it out")
    return text


def _map_options(text: str) -> tuple[str, ...]:
    """As Ceph-CSI has them: those of the kernel, alone or behind "krbd:", and for another mounter behind "nbd:"."""
    words: list[str] = []
    for part in text.split(";"):
        if not part.strip().startswith(_USER_SPACE):
            words += [word.strip() for word in part.strip().removeprefix(_KERNEL).split(",") if word.strip()]
    for word in words:
        name, given, value = word.partition("=")
        form = _MAP_OPTIONS.get(name, "")
        if form == "" or bool(given) != (form is not None) or (form and not re.fullmatch(form, value)):
            raise ValueError(f"options of 'rbd map' among {', '.join(_MAP_OPTIONS)}, each with a value that it takes")
    return tuple(words)


READERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "clusterID": ("cluster_id", _cluster),
    "pool": ("pool", _name),
    "dataPool": ("data_pool", _name),
    "imageFeatures": ("image_features", _features),
    "mounter": ("mounter", _mounter),
    "mapOptions": ("map_options", _map_options),
}
"""Field of `VolumeParameters` and reader of each; what a reader raises says what the value must be."""
