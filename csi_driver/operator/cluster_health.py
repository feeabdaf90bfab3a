"""What an administrator finds of luks-csi in a cluster: whose names and kinds these are, and whether it is reached."""

from typing import Final, Protocol

from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    CRD,
    CSI_DRIVER,
    IMAGE,
    IMAGE_COPY,
    MANAGER,
    NAMESPACE,
    NODE,
    POD,
    SECRET,
    VALIDATING,
    Json,
    Kind,
    is_going,
    name_of,
)
from csi_driver.model.errors import AlreadyExists, DriverError, FailedPrecondition, InvalidArgument
from csi_driver.operator.certificates import WEBHOOKS
from csi_driver.operator.compat import check_crds
from csi_driver.operator.images import AGENT_LABELS, is_silent, is_up
from csi_driver.operator.settings import OperatorSettings
from csi_driver.operator.users import named, secrets_of_image
from csi_driver.volumes.finding import Finding, look_at

NAME: Final = "app.kubernetes.io/name"


class Api(Protocol):
    """The calls of `Kube` that are made here, with its errors."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None: ...

    def list(self, kind: Kind, namespace: str = "", labels: dict[str, str] = ...) -> tuple[list[Json], str]: ...

    def create(self, kind: Kind, thing: Json, namespace: str = "", *, dry_run: bool = False) -> Json: ...


class ClusterHealth:
    """Looks at a cluster in which luks-csi is installed in `namespace` under `driver_name`."""

    def __init__(self, api: Api, namespace: str, driver_name: str) -> None:
        self._api = api
        self._namespace = namespace
        self._driver_name = driver_name

    def findings(self) -> list[Finding]:
        """All of it; nothing is changed."""
        return [
            look_at("driver name", self._driver, "install deploy/kubernetes, or name the driver with --driver-name"),
            look_at("kinds", self._kinds, "apply deploy/kubernetes/images/crds.yaml", fatal=False),
            look_at("other projects' kinds", self._foreign_kinds, "look at these definitions", fatal=False),
            look_at("their namespace", self._foreign_namespace, "make it", fatal=False),
            look_at("agents", self._agents, "look at the node pods that have none", fatal=False),
            look_at("secrets of images", self._secrets, "put them back, from a backup of the cluster say", fatal=False),
            look_at("admission", self._admission, "look at the operator's pod and its log"),
        ]

    def _driver(self) -> str:
        found = self._api.get(CSI_DRIVER, self._driver_name)
        if found is None:
            raise FailedPrecondition(f"there is no CSIDriver {self._driver_name}")
        labels = found["metadata"].get("labels") or {}
        if labels.get(NAME) != MANAGER:
            raise FailedPrecondition(
                f"the CSIDriver {self._driver_name} lacks the label {NAME}: {MANAGER}, so it is another driver's; "
                f"install luks-csi under another name (docs/kubernetes.md), or take that driver away first"
            )
        return f"{self._driver_name} is this driver's"

    def _kinds(self) -> str:
        missing = [f"{kind.plural}.{kind.group}" for kind in (IMAGE, IMAGE_COPY) if self._definition(kind) is None]
        if missing:
            raise FailedPrecondition(f"the kinds {' and '.join(missing)} are not there, so there are no Images")
        return "Image and ImageCopy are there"

    def _foreign_kinds(self) -> str:
        ours = [kind.name for kind in sorted(check_crds(self._api), key=str)]
        return f"{' and '.join(ours)} are served" if ours else "none are served"

    def _foreign_namespace(self) -> str:
        if self._definition(BACKING_IMAGE) is None:
            return "none is needed"
        place = OperatorSettings.backing_image_namespace
        found = self._api.get(NAMESPACE, place)
        if found is None or is_going(found):
            raise FailedPrecondition(
                f"the namespace {place}, in which BackingImages lie unless the operator has --backing-image-namespace, "
                f"{'is not there' if found is None else 'is being deleted'}; kubectl create namespace {place}"
            )
        return f"{place} is there"

    def _definition(self, kind: Kind) -> Json | None:
        return self._api.get(CRD, f"{kind.plural}.{kind.group}")

    def _agents(self) -> str:
        pods, _ = self._api.list(POD, self._namespace, AGENT_LABELS)
        listed = self._api.list(NODE)[0]
        nodes = set(map(name_of, listed))
        up = {pod["spec"].get("nodeName") for pod in pods if is_up(pod)} - {*map(name_of, filter(is_silent, listed))}
        if not up:
            raise FailedPrecondition(
                f"no node has an image agent that is ready; install the component deploy/kubernetes/images in "
                f"namespace {self._namespace}"
            )
        without = sorted(nodes - up)
        if without:
            raise FailedPrecondition(f"{len(up)} of {len(nodes)} nodes have an agent, not {', '.join(without[:5])}")
        return f"each of {len(nodes)} nodes has one"

    def _secrets(self) -> str:
        """Nobody keeps one from being deleted while the operator is down, or where its deletion was allowed."""
        if self._definition(IMAGE) is None:
            return "there are no Images"
        images = [image for image in self._api.list(IMAGE)[0] if not is_going(image)]
        wanted = {place: name_of(image) for image in images for place in secrets_of_image(image)}
        gone = [
            f"{'/'.join(place)} of Image {image}"
            for place, image in sorted(wanted.items())
            if self._api.get(SECRET, place[1], place[0]) is None
        ]
        if gone:
            raise FailedPrecondition(f"there is no secret {named(gone)}, which opens it")
        return f"each of {len(wanted)} is there"

    def _admission(self) -> str:
        """Asked as a user would ask, without a trace: the API has its webhooks review a dry run too."""
        if self._api.get(VALIDATING, WEBHOOKS) is None:
            return "not installed: whoever may make an Image can have any secret used for it"
        probe = {"metadata": {"name": "luks-csi-doctor"}, "spec": {"source": {"upload": {}}}}
        try:
            self._api.create(IMAGE, probe, dry_run=True)
        except AlreadyExists:
            pass
        except InvalidArgument as error:
            return f"the API reaches it, and it answers: {error}"
        except DriverError as error:
            raise FailedPrecondition(f"the API cannot have an Image reviewed, so none can be made ({error})") from None
        return "the API reaches it"
