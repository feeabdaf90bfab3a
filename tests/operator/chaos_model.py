"""What a random run knows: which Images were asked for, what each must hold in the end, which may be lost by then."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from csi_driver.images.base import MIB

SECRETS: Final = tuple(f"key-{number}" for number in range(4))
_MOST_COPIES: Final = 2
_FITTING: Final = {False: ("ignore", "encrypt"), True: ("ignore", "decrypt", "reencrypt")}
_REFUSED: Final = {False: "decrypt", True: "encrypt"}


@dataclass(frozen=True)
class Wanted:
    """An Image. `secret` opens it, None for a plain one; `source` is the image that it is a clone of.

    It is `sure` unless its source was deleted, or a node with its only copy lost, before it was seen to be ready. One
    that is `refused` asks for what cannot be.
    """

    name: str
    content: bytes = field(repr=False)
    secret: str | None = None
    copies: int = 1
    source: str | None = None
    operation: str = ""
    sure: bool = True
    refused: bool = False


class Model:
    """Chooses by `chooser`, and keeps what follows from it."""

    def __init__(self, chooser: random.Random) -> None:
        self.chooser = chooser
        self.images: dict[str, Wanted] = {}
        self.made = 0
        self._gone: list[str] = []

    def name(self) -> str:
        """Of the next image: a new one, or that of an image that was deleted."""
        self.made += 1
        waited_for = {image.source for image in self.images.values()}
        free = [name for name in self._gone if name not in waited_for]
        if free and self.chooser.random() < 0.2:
            name = self.chooser.choice(free)
            self._gone.remove(name)
            return name
        return f"image-{self.made}"

    def brought(self, name: str, content: bytes) -> Wanted:
        """An image that comes from outside."""
        return self._add(Wanted(name, content, copies=self._copies()))

    def content(self) -> bytes:
        """What somebody uploads: no text, and no other's."""
        return self.chooser.randbytes(self.chooser.randint(1, 3) * MIB)

    def cloned(self, name: str) -> Wanted | None:
        """A clone of an image that there is; None without one."""
        sources = [image for image in self.images.values() if not image.refused]
        if not sources:
            return None
        source = self.chooser.choice(sources)
        is_secret = source.secret is not None
        refused = self.chooser.random() < 0.05
        operation = _REFUSED[is_secret] if refused else self.chooser.choice(_FITTING[is_secret])
        secret = {
            "ignore": source.secret,
            "decrypt": None,
            "encrypt": self.chooser.choice(SECRETS),
            "reencrypt": self.chooser.choice(SECRETS),
        }[operation]
        return self._add(
            Wanted(name, source.content, secret, self._copies(), source.name, operation, source.sure, refused)
        )

    def deleted(self, name: str) -> None:
        """Its deletion was asked for; clones that may still need it are sure no more."""
        del self.images[name]
        self._gone.append(name)
        for clone in self.clones(name):
            self.doubt(clone.name)

    def clones(self, name: str) -> list[Wanted]:
        """Those of an image."""
        return [image for image in self.images.values() if image.source == name]

    def is_ready(self, name: str) -> None:
        """It was seen: it needs its source no more."""
        self.images[name] = replace(self.images[name], source=None)

    def doubt(self, name: str) -> None:
        """It may never be there, nor what is made of it."""
        if name in self.images and self.images[name].sure:
            self.images[name] = replace(self.images[name], sure=False)
            for clone in self.clones(name):
                self.doubt(clone.name)

    def changed(self, name: str) -> Wanted:
        """Another number of copies is wanted."""
        image = self.images[name] = replace(self.images[name], copies=self._copies())
        return image

    def sure(self) -> Iterator[Wanted]:
        """Those that must be there in the end."""
        return (image for image in self.images.values() if image.sure and not image.refused)

    def _copies(self) -> int:
        return self.chooser.randint(1, _MOST_COPIES)

    def _add(self, image: Wanted) -> Wanted:
        self.images[image.name] = image
        return image
