"""The roles of operator and agents: each verb that is taken away is missed by somebody who says so, so none is spare.

One API; for each verb a new operator and two new agents, and everything that they may have to do.
"""

import contextlib
import http.client
import itertools
import json
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from csi_driver.agent.sending import Sender
from csi_driver.images.cluster import ClusterImages
from csi_driver.kube.copies import AUDIENCE, AUTHORITY, copy_of
from csi_driver.kube.kinds import (
    ACCESS_REVIEW,
    CLAIM,
    CONFIG_MAP,
    IMAGE,
    IMAGE_COPY,
    MANAGED_BY,
    MANAGER,
    MUTATING,
    SECRET,
    VALIDATING,
    VIRTUAL_MACHINE_IMAGE,
    VOLUME,
    Json,
    Kind,
    has_finalizer,
    name_of,
    uid_of,
)
from csi_driver.model.errors import AlreadyExists, DriverError, NotFound, PermissionDenied
from csi_driver.operator.certificates import AGENT_SECRET, OPERATOR_SECRET, WEBHOOKS
from tests.cluster.pki import Authority
from tests.image_clones import make_source, nothing, sha256
from tests.image_server import ImageServer
from tests.keys.apiserver import ACCOUNT, NAMESPACE, api_server
from tests.keys.servers import HOST, free_port
from tests.operator.lab import DEPLOY, DRIVER, OPERATOR, Lab, documents
from tests.operator.roles import BINDING, ROLE, may_upload

_NAMESPACED_ROLE: Final = Kind(ROLE.group, "v1", "Role", "roles", namespaced=True)
_ACCOUNTS: Final = {"luks-csi-operator": OPERATOR, "luks-csi-image-agent": ACCOUNT}
_ROLES: Final = [
    role for role in documents(DEPLOY / "images/rbac.yaml")
    if role["kind"] in ("Role", "ClusterRole") and name_of(role) in _ACCOUNTS
]  # fmt: skip
_OURS: Final = "images.luks.csi.internal"
_UPLOADER: Final = "uploader"
_WEBHOOK_PORT: Final = free_port()
_NUMBERS: Final = itertools.count()


@dataclass(frozen=True)
class Right:
    """One verb of a rule, for one resource."""

    role: int
    rule: int
    resource: str
    verb: str

    @property
    def account(self) -> str:
        return _ACCOUNTS[name_of(_ROLES[self.role])]

    @property
    def spec(self) -> Json:
        """As a SubjectAccessReview asks for it."""
        rule = _ROLES[self.role]["rules"][self.rule]
        resource, _, part = self.resource.partition("/")
        attributes = {"group": rule["apiGroups"][0], "resource": resource, "subresource": part, "verb": self.verb}
        attributes["namespace"] = NAMESPACE if _ROLES[self.role]["kind"] == "Role" else ""
        attributes["name"] = rule.get("resourceNames", [""])[0]
        groups = ["system:authenticated", "system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}"]
        user = f"system:serviceaccount:{NAMESPACE}:{self.account}"
        return {"user": user, "groups": groups, "resourceAttributes": attributes}

    @property
    def complaint(self) -> str:
        """What the API says to who misses it."""
        return f'{NAMESPACE}:{self.account}" cannot {self.verb} resource "{self.resource}"'

    def rules(self) -> list[Json]:
        """Those of the role, without it."""
        rules: list[Json] = []
        for number, rule in enumerate(_ROLES[self.role]["rules"]):
            for resource in rule["resources"]:
                verbs = [
                    verb for verb in rule["verbs"]
                    if (number, resource, verb) != (self.rule, self.resource, self.verb)
                ]  # fmt: skip
                if verbs:
                    rules.append({**rule, "resources": [resource], "verbs": verbs})
        return rules

    def __str__(self) -> str:
        return f"{name_of(_ROLES[self.role])}-{self.rule}-{self.verb}-{self.resource}"


def rights() -> list[Right]:
    """All that operator and agents may do."""
    return [
        Right(role, number, resource, verb)
        for role, document in enumerate(_ROLES)
        for number, rule in enumerate(document["rules"])
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab with two nodes where nothing runs, and the agents' account may no more than its role says."""
    folder = tmp_path_factory.mktemp("roles")
    authority = Authority(folder / "pki")
    with api_server(folder, authority) as api:
        lab = Lab(api, authority, folder)
        try:
            lab.kube.delete(BINDING, f"{NAMESPACE}-{ACCOUNT}")
            webhooks = f"--webhook-listen={HOST}:{_WEBHOOK_PORT}"
            lab.operator = lab.planted([str(Path(sys.executable).with_name("luks-csi")), "operator", webhooks])
            api.account(NAMESPACE, _UPLOADER)
            may_upload(lab, _UPLOADER)
            lab.operator.start()
            lab.mount_certificates()
            for name in ("one", "two"):
                lab.node(name)
            _let_end(lab)
            yield lab
        finally:
            lab.close()


def _let_end(lab: Lab) -> None:
    for process in (lab.operator, *lab.agents.values()):
        process.kill()


class Occasions:
    """Everything that operator and agents may have to do once; `look` goes on with it as far as it can."""

    def __init__(self, lab: Lab, web: ImageServer, right: Right, folder: Path) -> None:
        self._lab = lab
        self._right = right
        self._number = next(_NUMBERS)
        self._said: list[str] = []
        self._file = make_source(folder / "uploaded", 1 << 20)
        lab.secret(f"key-{self._number}")
        download = {"download": {"url": web.url()}}
        lab.image(self._name("kept"), download)
        lab.image(self._name("both"), download, copies=2)
        lab.image(self._name("goes"), download)
        lab.clone(self._name("sealed"), self._name("kept"), "encrypt", f"key-{self._number}")
        lab.kube.create(CONFIG_MAP, {"metadata": {"name": self._name("ca")}, "data": {}}, NAMESPACE)
        trusting = {"url": web.url(), "caConfigMapRef": {"name": self._name("ca"), "namespace": NAMESPACE}}
        lab.image(self._name("trusting"), {"download": trusting})
        lab.image(self._name("uploaded"), {"upload": {}})
        self._claim()
        lab.image(self._name("exported"), {"claim": {"name": self._name("claim"), "namespace": "default"}})
        self._certificates()

    def _name(self, what: str) -> str:
        return f"{what}-{self._number}"

    def _claim(self) -> None:
        resources = {"resources": {"requests": {"storage": "1Mi"}}, "accessModes": ["ReadWriteOnce"]}
        claim = {"metadata": {"name": self._name("claim")}, "spec": {"volumeName": self._name("volume"), **resources}}
        made = self._lab.kube.create(CLAIM, claim, "default")
        lies_on = {"key": f"topology.{DRIVER}/node", "operator": "In", "values": [min(self._lab.agents)]}
        spec = {
            "claimRef": {"name": name_of(made), "namespace": "default", "uid": uid_of(made)},
            "capacity": {"storage": "1Mi"},
            "accessModes": ["ReadWriteOnce"],
            "csi": {"driver": DRIVER, "volumeHandle": self._name("volume")},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [lies_on]}]}},
        }
        self._lab.kube.create(VOLUME, {"metadata": {"name": self._name("volume")}, "spec": spec})

    def _certificates(self) -> None:
        """None is there, or none is as it must be."""
        kube = self._lab.kube
        for kind in (MUTATING, VALIDATING):
            kube.delete(kind, WEBHOOKS)
            service = {"service": {"name": OPERATOR_SECRET, "namespace": NAMESPACE}}
            webhook = {
                "name": "never.luks.csi.internal", "clientConfig": service, "sideEffects": "None",
                "admissionReviewVersions": ["v1"], "failurePolicy": "Ignore",
            }  # fmt: skip
            kube.create(kind, {"metadata": {"name": WEBHOOKS}, "webhooks": [webhook]})
        for name in (AGENT_SECRET, OPERATOR_SECRET, AUTHORITY):
            kube.delete(SECRET, name, NAMESPACE)
        kube.delete(CONFIG_MAP, AUTHORITY, NAMESPACE)
        if self._right.verb == "create":
            return
        old: Json = {"labels": {MANAGED_BY: MANAGER}}
        for name in (AGENT_SECRET, OPERATOR_SECRET):
            kube.create(SECRET, {"metadata": old | {"name": name}, "data": {"ca.crt": "b2xk"}}, NAMESPACE)
        kube.create(CONFIG_MAP, {"metadata": old | {"name": AUTHORITY}, "data": {"ca.crt": "old"}}, NAMESPACE)

    def look(self) -> bool:
        """Whether somebody has said that he misses the right."""
        with contextlib.suppress(DriverError):
            self._go_on()
        texts = [*self._said]
        texts += [process.log.read_text() for process in (self._lab.operator, *self._lab.agents.values())]
        for kind in (IMAGE, IMAGE_COPY):
            texts += [each.get("status", {}).get("message", "") for each in self._lab.kube.list(kind)[0]]
        return any(self._right.complaint in text.replace('\\"', '"') for text in texts)

    def _go_on(self) -> None:
        lab, kube = self._lab, self._lab.kube
        kept = kube.get(IMAGE, self._name("kept"))
        if kept is not None and has_finalizer(kept):
            with contextlib.suppress(AlreadyExists):
                kube.create(IMAGE_COPY, copy_of(kept, "gone"))
            for node in lab.agents:
                ClusterImages(lab.images_of(node)).want(name_of(kept))
        if lab.status(self._name("uploaded")).get("upload"):
            address = lab.status(self._name("uploaded"))["upload"]["address"]
            token = lab.token(_UPLOADER, AUDIENCE)
            try:
                sender = Sender(address, (lab.tls / "ca.crt").read_text(), token, self._name("uploaded"))
                sender.send(self._file, sha256(self._file.read_bytes()), nothing)
            except PermissionDenied as error:
                self._said.append(str(error))
        self._review()
        goes = kube.get(IMAGE, self._name("goes"))
        if goes is not None and goes.get("status", {}).get("phase") == "Ready":
            kube.delete(IMAGE, name_of(goes))

    def _review(self) -> None:
        """What the API would ask the webhooks."""
        secret = {"name": f"key-{self._number}", "namespace": NAMESPACE}
        clone = {"source": {"clone": {"image": self._name("kept"), "encryption": "encrypt"}}, "secretRef": secret}
        self._ask("images", "CREATE", IMAGE, "new", "", {"spec": clone})
        self._ask("secrets", "DELETE", SECRET, secret["name"], NAMESPACE, {"data": {}})
        annotations = {"harvesterhci.io/storageClassName": "none"}
        self._ask("parameters", "CREATE", VIRTUAL_MACHINE_IMAGE, "new", "default", {"spec": {}}, **annotations)

    def _ask(
        self, path: str, operation: str, kind: Kind, name: str, namespace: str, thing: Json, **annotations: str
    ) -> None:
        thing = {**thing, "metadata": {"name": name, "namespace": namespace, "annotations": annotations}}
        request = {
            "uid": "1", "operation": operation, "resource": {"group": kind.group, "resource": kind.plural},
            "name": name, "namespace": namespace, "userInfo": {"username": "admin", "groups": ["system:masters"]},
            ("oldObject" if operation == "DELETE" else "object"): thing,
        }  # fmt: skip
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the API is not who asks
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(
                http.client.HTTPSConnection(HOST, _WEBHOOK_PORT, timeout=20, context=context)
            ) as connection,
        ):
            connection.request("POST", f"/{path}", json.dumps(review), {"Content-Type": "application/json"})
            self._said.append(connection.getresponse().read().decode())

    def clear(self) -> None:
        """Nothing of it is left in the API."""
        kube = self._lab.kube
        for kind in (IMAGE_COPY, IMAGE):
            for each in kube.list(kind)[0]:
                with contextlib.suppress(NotFound):
                    kube.patch(kind, name_of(each), {"metadata": {"finalizers": None}})
                kube.delete(kind, name_of(each))
        for node in self._lab.agents:
            ClusterImages(self._lab.images_of(node)).brought(self._name("kept"))


def _give(lab: Lab, right: Right, rules: list[Json], *, allowed: bool) -> None:
    """Have a role with these rules; until the API knows."""
    role = _ROLES[right.role]
    kind, namespace = (_NAMESPACED_ROLE, NAMESPACE) if role["kind"] == "Role" else (ROLE, "")
    lab.kube.patch(kind, name_of(role), {"rules": rules}, namespace)

    def known() -> bool:
        answer: Any = lab.kube.create(ACCESS_REVIEW, {"spec": right.spec})["status"]["allowed"]
        return bool(answer) == allowed

    lab.wait(f"knowledge of {right}", known)


@pytest.mark.parametrize("right", rights(), ids=str)
def test_a_right_that_is_taken_away_is_missed(bare: Lab, web: ImageServer, right: Right, tmp_path: Path) -> None:
    for process in (bare.operator, *bare.agents.values()):
        process.log.unlink(missing_ok=True)
    _give(bare, right, right.rules(), allowed=False)
    occasions = Occasions(bare, web, right, tmp_path)
    try:
        for process in (bare.operator, *bare.agents.values()):
            process.start()
        bare.wait(f'"{right.complaint}"', occasions.look)
    finally:
        _let_end(bare)
        _give(bare, right, _ROLES[right.role]["rules"], allowed=True)
        occasions.clear()


def test_everybody_may_read_whom_to_trust(bare: Lab) -> None:
    someone = bare.user("someone")
    try:
        found = someone.get(CONFIG_MAP, AUTHORITY, NAMESPACE)
        assert found is None or "ca.crt" in found["data"]
        with pytest.raises(PermissionDenied):
            someone.get(CONFIG_MAP, "another", NAMESPACE)
        with pytest.raises(PermissionDenied):
            someone.get(SECRET, AUTHORITY, NAMESPACE)
    finally:
        someone.close()
