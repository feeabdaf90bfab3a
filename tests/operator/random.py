"""`python -m tests.operator.random`: $COUNT images made, cloned, copied and deleted at random, the choices by $SEED.

Operator and agents are killed meanwhile, a node goes for good and another one comes. In the end everything works and is
left alone: what is there then is compared with a model, on the API, on each node's disk, and byte by byte.
"""

import contextlib
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from csi_driver.agent.sending import Sender
from csi_driver.images.cluster import ClusterImages
from csi_driver.kube.copies import AUDIENCE, AUTHORITY, State, state_of
from csi_driver.kube.kinds import CONFIG_MAP, IMAGE, IMAGE_COPY, Json, is_going, name_of, uid_of
from csi_driver.model.errors import DriverError
from csi_driver.model.secret import Passphrase
from tests.image_clones import decrypted, digest_of, nothing, sha256
from tests.image_server import ImageServer, serving
from tests.keys.apiserver import ACCOUNT, NAMESPACE
from tests.operator.chaos_model import SECRETS, Model, Wanted
from tests.operator.lab import Lab, Process, a_lab
from tests.operator.roles import may_upload

_FOLDERS: Final = ("ready", "new", "trash", "uploads", "cluster", "wanted")
_NODES: Final = ("node-1", "node-2", "node-3")
_DOWNLOADS: Final = 5
_STEPS: Final = {"image": 10, "copies": 3, "delete": 4, "kill": 4, "revive": 5, "want": 1, "pause": 4}
_PATIENCE: Final = float(os.environ.get("PATIENCE", "900"))
_USUAL: Final[Mapping[str, Sequence[str]]] = {}


@dataclass
class Verdict:
    """What was found in the end, each in words."""

    images: int = 0
    ready: int = 0
    kills: int = 0
    lost: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether all is as the model says; of nothing that was tried nothing is good."""
        return not (self.lost or self.left or self.wrong) and self.ready > 0 and self.kills > 0

    def __str__(self) -> str:
        counts = f"images={self.images} ready={self.ready} kills={self.kills}"
        return f"{counts} lost={len(self.lost)} left={len(self.left)} wrong={len(self.wrong)}"


class Run:
    """One run on a lab of its own."""

    def __init__(self, lab: Lab, seed: int, servers: Sequence[ImageServer], patience: float) -> None:
        self._lab = lab
        self._model = Model(random.Random(seed))
        self._servers = servers
        self._patience = patience
        self._verdict = Verdict()
        self._dead: list[Process] = []
        self._uploads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._token = lab.token(ACCOUNT, AUDIENCE)
        self._passphrases = {name: f"passphrase of {name}" for name in SECRETS}
        for name, passphrase in self._passphrases.items():
            lab.secret(name, passphrase, CRYPTO_PBKDF="pbkdf2")

    def run(self, count: int) -> Verdict:
        """Make so many images, and see what comes of it."""
        chooser = self._model.chooser
        lose_at = chooser.randint(count // 3, max(count // 3, 2 * count // 3))
        steps: Mapping[str, Callable[[], None]] = {
            "image": self._image, "copies": self._copies, "delete": self._delete, "kill": self._kill,
            "revive": self._revive, "want": self._want, "pause": lambda: time.sleep(chooser.random()),
        }  # fmt: skip
        while self._model.made < count:
            steps[chooser.choices([*_STEPS], [*_STEPS.values()])[0]]()
            if self._model.made >= lose_at and "node-4" not in self._lab.agents:
                self._lose()
        self._kill()
        try:
            self._judge()
        finally:
            self._ended.set()
            for upload in self._uploads:
                upload.join()
        return self._verdict

    # What happens.

    def _image(self) -> None:
        name, chooser = self._model.name(), self._model.chooser
        if name != f"image-{self._model.made}":
            self._all_up()
            self._until(f"end of {name}", lambda: self._lab.kube.get(IMAGE, name) is None)
        what = chooser.choices(["download", "upload", "clone"], [2, 1, 7])[0]
        image = self._model.cloned(name) if what == "clone" else None
        if image is not None:
            spec = self._clone_spec(image)
        elif what == "upload":
            image = self._model.brought(name, self._model.content())
            spec = {"source": {"upload": {}}}
        else:
            server = chooser.choice(self._servers)
            image = self._model.brought(name, server.content)
            spec = {"source": {"download": {"url": server.url(f"/{name}")}}}
        made = self._lab.kube.create(IMAGE, {"metadata": {"name": name}, "spec": spec | {"copies": image.copies}})
        self._verdict.images += 1
        if "upload" in spec["source"]:
            thread = threading.Thread(target=self._upload, args=(name, uid_of(made), image.content))
            self._uploads.append(thread)
            thread.start()

    def _clone_spec(self, image: Wanted) -> Json:
        spec: Json = {"source": {"clone": {"image": image.source, "encryption": image.operation}}}
        source = self._model.images[image.source or ""]
        opened, made = ({"name": each, "namespace": NAMESPACE} for each in (source.secret, image.secret))
        if image.operation == "reencrypt":
            return spec | {"secretRef": opened, "newSecretRef": made}
        if image.operation == "decrypt":
            return spec | {"secretRef": opened if source.secret else {"name": SECRETS[0], "namespace": NAMESPACE}}
        return spec | ({"secretRef": made} if image.operation == "encrypt" else {})

    def _upload(self, name: str, uid: str, content: bytes) -> None:
        """As somebody would who tries again until it is there."""
        path = self._lab.folder / f"upload-{uid}"
        path.write_bytes(content)
        while not self._ended.wait(0.3):
            with contextlib.suppress(DriverError):
                image = self._lab.kube.get(IMAGE, name)
                if image is None or uid_of(image) != uid or is_going(image):
                    break
                if image.get("status", {}).get("phase") == "Ready":
                    break
                if (awaited := image.get("status", {}).get("upload")) is not None:
                    authority = self._lab.kube.get(CONFIG_MAP, AUTHORITY, NAMESPACE)
                    assert authority is not None
                    sender = Sender(awaited["address"], authority["data"]["ca.crt"], self._token, name)
                    sender.send(path, sha256(content), nothing)
        path.unlink()

    def _copies(self) -> None:
        if (name := self._any()) is not None:
            self._lab.kube.patch(IMAGE, name, {"spec": {"copies": self._model.changed(name).copies}})

    def _delete(self) -> None:
        if (name := self._any()) is None:
            return
        if self._model.chooser.random() < 0.5:  # what is made of it is made first
            self._all_up()
            for clone in self._model.clones(name):
                if clone.sure and not clone.refused:
                    self._until(f"{clone.name} to be ready", partial(self._is_ready, clone.name))
                    self._model.is_ready(clone.name)
        self._lab.kube.delete(IMAGE, name)
        self._model.deleted(name)

    def _kill(self) -> None:
        up = [each for each in (self._lab.operator, *self._lab.agents.values()) if each not in self._dead]
        if up:
            process = self._model.chooser.choice(up)
            process.kill()
            self._dead.append(process)
            self._verdict.kills += 1

    def _revive(self) -> None:
        if self._dead:
            self._dead.pop(0).start()

    def _all_up(self) -> None:
        while self._dead:
            self._revive()

    def _want(self) -> None:
        """As the driver of a node that makes a volume."""
        if (name := self._any()) is not None:
            node = self._model.chooser.choice(sorted(self._lab.agents))
            ClusterImages(self._lab.images_of(node)).want(name)

    def _lose(self) -> None:
        """A node goes for good, another one comes."""
        node = self._model.chooser.choice(sorted(self._lab.agents))
        agent = self._lab.agents[node]
        agent.kill()
        if agent in self._dead:
            self._dead.remove(agent)
        copies = self._lab.kube.list(IMAGE_COPY)[0]
        for name in [*self._model.images]:
            of = [copy for copy in copies if copy["spec"]["image"] == name and not is_going(copy)]
            elsewhere = [copy for copy in of if copy["spec"]["node"] != node]
            if len(of) != len(elsewhere) and not any(state_of(copy) is State.READY for copy in elsewhere):
                self._model.doubt(name)
        self._verdict.kills += 1
        self._lab.forget_node(node)
        self._lab.node("node-4")

    # What comes of it.

    def _judge(self) -> None:
        self._all_up()
        lost = self._waited(self._missing)
        self._verdict.lost += lost
        self._compare()
        unsure = [name for name, image in self._model.images.items() if not image.sure and not self._is_ready(name)]
        for name in unsure:
            self._lab.kube.delete(IMAGE, name)
            self._model.deleted(name)
        self._verdict.left += self._waited(self._left)
        for name in [*self._model.images]:
            self._lab.kube.delete(IMAGE, name)
            self._model.deleted(name)
        self._verdict.left += self._waited(self._left)

    def _missing(self) -> list[str]:
        """Images that are not as they are wanted, in words."""
        self._collect_garbage()
        there = {name_of(image): image.get("status", {}) for image in self._lab.kube.list(IMAGE)[0]}
        found = []
        for image in self._model.sure():
            status = there.get(image.name, {})
            ready, _, _ = status.get("copies", "0/").partition("/")
            if status.get("phase") != "Ready" or int(ready) < image.copies:
                told = f"{status.get('phase')}, {ready} of {image.copies} copies: {status.get('message')}"
                found.append(f"image {image.name} is {told}")
        for image in self._model.images.values():
            status = there.get(image.name, {})
            if image.refused and image.sure and status.get("phase") != "Failed":
                found.append(f"image {image.name} was to be refused and is {status.get('phase')}")
            if not image.sure and status.get("phase") != "Ready" and not status.get("message"):
                found.append(f"image {image.name} is {status.get('phase')} and nobody says why")
        return found

    def _compare(self) -> None:
        """Each copy's bytes, with those of the model."""
        for copy in self._lab.kube.list(IMAGE_COPY)[0]:
            image = self._model.images.get(copy["spec"]["image"])
            if image is None or state_of(copy) is not State.READY:
                continue
            self._verdict.ready += 1
            file = self._lab.file(copy["spec"]["node"], image.name)
            try:
                told = copy["status"]["image"]
                assert told["checksum"] == digest_of(file), "its checksum is another one"
                assert told["encrypted"] == (image.secret is not None), f"encrypted: {told['encrypted']}"
                assert self._plain(image, file) == image.content, "its content is another one"
            except (AssertionError, DriverError, OSError) as error:
                self._verdict.wrong.append(f"image {image.name} on {copy['spec']['node']}: {error}")

    def _plain(self, image: Wanted, file: Path) -> bytes:
        """The content of a file, or the model's where the digests are the same."""
        if image.secret is None:
            return file.read_bytes()
        with tempfile.TemporaryDirectory(dir=self._lab.folder) as folder:
            plain = Path(folder) / "plain"
            plain.write_bytes(image.content)
            passphrase = Passphrase(self._passphrases[image.secret].encode())
            found = decrypted(file, Path(folder) / "target", passphrase)
            return image.content if found == digest_of(plain) else b""

    def _left(self) -> list[str]:
        """What there is and nobody wants, in words."""
        self._collect_garbage()
        images = {name_of(image) for image in self._lab.kube.list(IMAGE)[0]}
        copies = self._lab.kube.list(IMAGE_COPY)[0]
        found = [f"Image {name}" for name in sorted(images - {*self._model.images})]
        found += [
            f"ImageCopy {name_of(copy)} of node {copy['spec']['node']}"
            for copy in copies
            if copy["spec"]["image"] not in self._model.images or copy["spec"]["node"] not in self._lab.agents
        ]
        for node in self._lab.agents:
            here = {copy["spec"]["image"] for copy in copies if copy["spec"]["node"] == node}
            # The lock of one that was killed at its very end stays with the image, and goes with it.
            locks = {f".{name}.lock" for name in here}
            wanted = {"ready": here, "new": locks, "cluster": {f"{name}.json" for name in images}}
            for folder in _FOLDERS:
                there = {path.name for path in (self._lab.images_of(node) / folder).glob("*")}
                found += [f"{node}: {folder}/{name}" for name in sorted(there - wanted.get(folder, set()))]
        return found

    def _collect_garbage(self) -> None:
        """What the controller manager does, which is not here: delete copies whose Image is gone."""
        uids = {uid_of(image) for image in self._lab.kube.list(IMAGE)[0]}
        for copy in self._lab.kube.list(IMAGE_COPY)[0]:
            if copy["spec"]["imageUID"] not in uids and not is_going(copy):
                self._lab.kube.delete(IMAGE_COPY, name_of(copy))

    def _waited(self, look: Callable[[], list[str]]) -> list[str]:
        """Until nothing is found twice in a row, or patience ends; what is found then."""
        deadline, quiet = time.monotonic() + self._patience, 0
        while (found := look()) or quiet < 2:
            quiet = 0 if found else quiet + 1
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        return found

    def _until(self, what: str, look: Callable[[], bool]) -> None:
        if self._waited(lambda: [] if look() else [what]):
            self._verdict.lost.append(f"no {what}")

    def _is_ready(self, name: str) -> bool:
        image = self._lab.kube.get(IMAGE, name)
        return image is not None and bool(image.get("status", {}).get("phase") == "Ready")

    def _any(self) -> str | None:
        return self._model.chooser.choice(sorted(self._model.images)) if self._model.images else None


def run(
    folder: Path, seed: int, count: int, programs: Mapping[str, Sequence[str]] = _USUAL, patience: float = _PATIENCE
) -> Verdict:
    """One run, with its files below `folder`."""
    contents = [random.Random(f"{seed} {number}").randbytes((1 + number % 3) << 20) for number in range(_DOWNLOADS)]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving(content)) for content in contents]
        lab = stack.enter_context(a_lab(folder, _NODES, programs=programs))
        may_upload(lab, ACCOUNT)
        return Run(lab, seed, servers, patience).run(count)


def main() -> int:
    """The exit code is 0 when everything is as the model says."""
    seed = int(os.environ.get("SEED") or random.randrange(1 << 32))
    folder = Path(tempfile.mkdtemp(prefix="operator-random-"))
    verdict = run(folder, seed, int(os.environ.get("COUNT") or 50))
    for line in (*verdict.lost, *verdict.left, *verdict.wrong):
        print(line)
    print(f"operator-random seed={seed} {verdict}{'' if verdict.is_good else f'; logs in {folder}'}", flush=True)
    if verdict.is_good:
        shutil.rmtree(folder)
    return int(not verdict.is_good)


if __name__ == "__main__":
    sys.exit(main())
