"""The rights of the controller of the backend csi in its namespace are those that it uses, from a volume's life."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from csi_driver.kube.kinds import Json, Kind
from csi_driver.model.errors import Aborted
from tests.operator_fakes import Call
from tests.unit.test_csi_backend import SIZE, Cluster, World, header_copy, no_lock

RBAC = Path(__file__).parents[2] / "deploy/kubernetes/csi-backend/rbac.yaml"
NONE: Mapping[str, str] = {}


class Watched(Cluster):
    """Tells of each call, lists too."""

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] = NONE, fields: Mapping[str, str] = NONE
    ) -> tuple[list[Json], str]:
        self.before(Call("list", kind, ""))
        return super().list(kind, namespace, labels, fields)


def granted() -> set[tuple[str, str]]:
    """Resource and verb, of the controller's own container alone."""
    found = yaml.safe_load_all(RBAC.read_text())
    (role,) = (each for each in found if (each["kind"], each["metadata"]["name"]) == ("Role", "luks-csi-controller"))
    rights = {(what, verb) for rule in role["rules"] for what in rule["resources"] for verb in rule["verbs"]}
    return {each for each in rights if each[0] not in ("leases", "configmaps")}  # the sidecars', and a KMS's


def test_what_is_granted_is_what_is_asked(tmp_path: Path) -> None:
    api = Watched()
    world = World(tmp_path, api=api)
    asked: set[tuple[str, str]] = set()

    def note(call: Call) -> None:
        if call.kind.namespaced:
            asked.add((call.kind.plural, call.verb.removesuffix(" status")))

    def live() -> None:
        world.create()
        world.controller.publish("pvc-1", "one", many_nodes=False)
        world.controller.unpublish("pvc-1", "one")
        with pytest.raises(Aborted, match=r"is being enlarged"):
            world.controller.grow("pvc-1", 2 * SIZE)
        world.controller.mend(no_lock, lambda: False)

    api.before = note
    live()
    api.before = lambda _: None
    header_copy(world, "pvc-1")  # a node's
    api.before = note
    world.controller.delete("pvc-1")
    assert asked == granted()
