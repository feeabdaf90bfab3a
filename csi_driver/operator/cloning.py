"""What may not be cloned, or not so."""

from collections.abc import Callable, Iterable

from csi_driver.kube.kinds import BACKING_IMAGE, Json, name_of
from csi_driver.operator.standing import Origin


def refusal(name: str, encryption: str, *, encrypted: bool) -> str | None:
    """Why an image that is, as was verified, encrypted or not cannot be cloned so; None where it can."""
    if encryption == "encrypt" and encrypted:
        return f"image {name} is encrypted already and is not encrypted again; use reencrypt for another key, or ignore"
    if encryption in ("decrypt", "reencrypt") and not encrypted:
        return f"image {name} is not encrypted, so it cannot be cloned with {encryption}; use encrypt, or ignore"
    return None


def not_its_to_clone(origin: Origin | None, source: Json) -> str | None:
    """Why an image that was made for `origin` cannot be a clone of the Image `source`; None where it can.

    Who makes a BackingImage is asked for his right to the BackingImage that he names. That is none to an Image which
    has that name, or gets it later.
    """
    if origin is None or origin.kind != BACKING_IMAGE.name:
        return None
    if Origin(BACKING_IMAGE.name, origin.namespace, name_of(source), "").is_place_of(Origin.of(source)):
        return None
    return (
        f"the Image {name_of(source)} stands for no BackingImage of namespace {origin.namespace}, and a BackingImage "
        f"clones BackingImages alone; make an Image that clones it"
    )


def circle(
    place: str, source: str, images: Iterable[Json], place_of: Callable[[Json], str], source_of: Callable[[Json], str]
) -> str | None:
    """Why an image is not made of `source`: that one is to be made of it, by others maybe; None where it is not.

    `images` are those there are. One that has been made needs its source no more.
    """
    if place == source:
        return f"image {place} is no clone of itself; name another source"
    sources = {place_of(each): source_of(each) for each in images if "virtualSize" not in each.get("status", {})}
    at, passed = source, set[str]()
    while at and at not in passed:
        passed.add(at)
        at = sources.get(at, "")
        if at == place:
            return (
                f"image {source} is itself to be cloned from {place}, directly or by way of others, so neither would "
                f"ever be made; name another source"
            )
    return None
