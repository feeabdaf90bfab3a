"""The operator's admission in this process, asked by a real Kubernetes API, with what deploy/ has for it."""

import base64
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.kube.client import Kube
from csi_driver.kube.copies import copy_of
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    CLAIM,
    IMAGE,
    IMAGE_COPY,
    ORIGIN,
    STORAGE_CLASS,
    VIRTUAL_MACHINE_IMAGE,
    VOLUME,
    Json,
    Kind,
)
from csi_driver.model.errors import DriverError
from csi_driver.operator.admission.admission import Admission
from csi_driver.operator.admission.lookups import ApiCluster
from csi_driver.operator.settings import OperatorSettings, Profile
from csi_driver.operator.users import claim_kept, secrets_kept
from tests.cluster.pki import Authority
from tests.keys.servers import HOST, free_port
from tests.operator.api import DEPLOY, Api
from tests.operator.lab import documents

_WATCHED = (STORAGE_CLASS, IMAGE, IMAGE_COPY, BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE, VOLUME, CLAIM)
URL = "https://example.org/disk.raw"
_STALE = re.compile(r"failed calling webhook.*(broken pipe|connection reset|EOF)")
_STALE_CONNECTIONS = 20


class Admitted:
    """An API with admission at work, and what tests put there."""

    def __init__(self, api: Api, kube: Kube, operator: Kube, folder: Path) -> None:
        self.api = api
        self.kube = kube
        self.operator = operator
        self._folder = folder
        authority = Authority(folder / "webhooks")
        authority.issue("operator", "operator", names=[f"IP:{HOST}"])
        self._authority = authority
        kept = {VOLUME: secrets_kept, CLAIM: claim_kept}
        self._informers = {kind: Informer(operator, kind, kept=kept.get(kind)) for kind in _WATCHED}
        self._cluster = ApiCluster(operator, {kind: each.all for kind, each in self._informers.items()})
        self._port = free_port()
        self.admission = self._make(Profile.LONGHORN)

    def start(self) -> None:
        for informer in self._informers.values():
            informer.start()
        for informer in self._informers.values():
            assert informer.wait_synced(30), informer.error
        self.admission.start()

    def stop(self) -> None:
        self.admission.ask_to_end()
        for informer in self._informers.values():
            informer.ask_to_end()

    @contextmanager
    def profile(self, profile: Profile) -> Iterator[None]:
        """Other rules as long as the block, at the same address."""
        before = self.admission
        before.ask_to_end()
        self.admission = self._make(profile)
        self.admission.start()
        try:
            yield
        finally:
            self.admission.ask_to_end()
            self.admission = self._make(Profile.LONGHORN)
            self.admission.start()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody answers as long as the block."""
        self.admission.ask_to_end()
        try:
            yield
        finally:
            self.admission = self._make(Profile.LONGHORN)
            self.admission.start()

    def _make(self, profile: Profile) -> Admission:
        return Admission(OperatorSettings(profile=profile), self._cluster, self._context, (HOST, self._port))

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._authority.file("operator.crt"), self._authority.file("operator.key"))
        return context

    def configurations(self) -> str:
        """The webhooks of deploy/, reached by URL instead of a service that nothing leads to here."""
        found = [each for each in documents(DEPLOY / "images/webhooks.yaml") if "webhooks" in each]
        for configuration in found:
            for webhook in configuration["webhooks"]:
                service = webhook["clientConfig"]["service"]
                webhook["clientConfig"] = {
                    "url": f"https://{HOST}:{self._port}{service['path']}",
                    "caBundle": self._ca(),
                }
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": found})

    def _ca(self) -> str:
        return base64.b64encode(Path(self._authority.certificate).read_bytes()).decode()

    # What there is.

    def seen(self, kind: Kind, name: str, namespace: str = "") -> None:
        """Until the operator has seen the object as it is now."""
        now = self.kube.get(kind, name, namespace)
        version = None if now is None else now["metadata"]["resourceVersion"]

        def look() -> bool:
            known = self._informers[kind].get(name, namespace)
            return (None if known is None else known["metadata"]["resourceVersion"]) == version

        until(f"{kind} {name} seen", look)

    def image(
        self, name: str, source: Json | None = None, status: Json | None = None, origin: str = "", **spec: object
    ) -> Json:
        """An Image, with the status that the operator would have written; `origin` says what that made it for."""
        metadata = {"name": name, "annotations": {ORIGIN: origin} if origin else {}}
        thing = {"metadata": metadata, "spec": {"source": source or {"upload": {}}, **spec}}
        made = (self.operator if origin else self.kube).create(IMAGE, thing)
        if status is not None:
            made = self.operator.patch(IMAGE, name, {"status": status}, status=True)
        self.seen(IMAGE, name)
        return made

    def backing(self, name: str, kind: str, parameters: Json, by: Kube | None = None, **spec: object) -> Json:
        thing = {"metadata": {"name": name}, "spec": {"sourceType": kind, "sourceParameters": parameters, **spec}}
        return (by or self.kube).create(BACKING_IMAGE, thing, "longhorn-system")

    def machine(
        self, name: str, kind: str = "download", by: Kube | None = None, class_name: str = "", **spec: object
    ) -> Json:
        notes = {"annotations": {"harvesterhci.io/storageClassName": class_name}} if class_name else {}
        url = {"url": URL} if kind == "download" else {}
        thing = {"metadata": {"name": name, **notes}, "spec": {"displayName": name, "sourceType": kind, **url, **spec}}
        return (by or self.kube).create(VIRTUAL_MACHINE_IMAGE, thing, "team")

    def storage_class(self, name: str, parameters: Json, by: Kube | None = None, **more: object) -> Json:
        thing = {"metadata": {"name": name}, "provisioner": "luks.csi.internal", "parameters": parameters, **more}
        made = (by or self.kube).create(STORAGE_CLASS, thing)
        self.seen(STORAGE_CLASS, name)
        return made

    def copy(self, image: Json, node: str) -> Json:
        made = self.operator.create(IMAGE_COPY, copy_of(image, node, make=True))
        self.seen(IMAGE_COPY, made["metadata"]["name"])
        return made


def refusal(call: Callable[[], object]) -> str:
    """What the API says to a call that it must refuse; not that it kept a connection to a server that is gone."""
    for _ in range(_STALE_CONNECTIONS):
        try:
            call()
        except DriverError as error:
            if not _STALE.search(str(error)):
                return f"{type(error).__name__}: {error}"
        else:
            break
    raise AssertionError("it was not refused")


def until(what: str, look: Callable[[], bool], seconds: float = 30.0) -> None:
    """Until `look` says so; no verdict hangs on the time, only how long a failure takes."""
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"not so after {seconds:g} s: {what}"
        time.sleep(0.02)
