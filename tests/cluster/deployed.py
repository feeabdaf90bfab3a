"""A Deployment of one pod with claims of a class, in a namespace of its own, wherever its volumes lie."""

import secrets

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.driver import BUSYBOX, claim, secret, volume_id, volume_of

SECONDS = 300


class Deployed:
    """A claim and a Deployment of one pod that uses it; the claim's secret is beside it.

    The pod goes to `node`, or with "" where the scheduler wants it.
    """

    def __init__(self, cluster: Cluster, namespace: str, storage_class: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._class = storage_class
        cluster.apply([secret()], namespace)

    def create(self, *claims: str, node: str = "", size: str = "32Mi") -> None:
        """Claims and a Deployment whose pod has each of them at /CLAIM; without waiting."""
        names = claims or ("data",)
        template: Json = {
            "terminationGracePeriodSeconds": 0,
            "nodeSelector": {"kubernetes.io/hostname": node} if node else {},
            "containers": [
                {
                    "name": "main",
                    "image": BUSYBOX,
                    "command": ["sleep", "infinity"],
                    "volumeMounts": [{"name": name, "mountPath": f"/{name}"} for name in names],
                }
            ],
            "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in names],
        }
        labels = {"app": "data"}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "data"},
            "spec": {
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": template},
            },
        }
        self.cluster.apply([*(claim(name, size, self._class) for name in names), deployment], self.namespace)

    def pod(self, timeout: float = SECONDS) -> Json:
        """The one pod that is not going, up."""

        def there() -> Json:
            pods = self.cluster.items("Pod", self.namespace)
            found = [one for one in pods if "deletionTimestamp" not in one["metadata"]]
            assert len(found) == 1, [one["metadata"]["name"] for one in found]
            return self.cluster.check_running(found[0])

        return self.cluster.wait("running pod of the Deployment", there, timeout)

    def sh(self, script: str) -> str:
        """What a script says in the pod."""
        name = self.pod()["metadata"]["name"]
        return self.cluster.pod_exec(name, ["sh", "-ec", script], self.namespace).decode().strip()

    def write(self, claim: str = "data") -> str:
        """Have the pod write something that nobody knows, fsynced; that text."""
        text = secrets.token_hex(32)
        self.sh(f"echo {text} | dd of=/{claim}/text conv=fsync 2>/dev/null")
        return text

    def reads(self, claim: str = "data") -> str:
        """What the pod reads of it."""
        return self.sh(f"cat /{claim}/text")

    def scale(self, replicas: int) -> None:
        """To 0: until the pod is gone."""
        self.cluster.api.patch("Deployment", "data", self.namespace, {"spec": {"replicas": replicas}})
        if not replicas:
            self.cluster.wait("end of the pod", lambda: not self.cluster.items("Pod", self.namespace), SECONDS)

    def ask_for_pod(self) -> str:
        """Scale to 1 without waiting until it runs; the new pod's name."""
        self.cluster.api.patch("Deployment", "data", self.namespace, {"spec": {"replicas": 1}})
        (pod,) = self.cluster.wait("new pod", lambda: self.cluster.items("Pod", self.namespace), SECONDS)
        return str(pod["metadata"]["name"])

    def check_restarts(self, drivers: str) -> None:
        """The drivers of that namespace start anew, nodes and controller, and what the pod wrote is read all along."""
        text = self.write()
        for component in ("node", "controller"):
            labels = f"app.kubernetes.io/name=luks-csi,app.kubernetes.io/component={component}"
            self.cluster.kubectl("delete", "pod", "-n", drivers, "-l", labels, "--wait=true", timeout=120)
            assert self.reads() == text
        self.cluster.wait_rolled_out("DaemonSet", "luks-csi-node", drivers)
        self.cluster.wait_rolled_out("Deployment", "luks-csi-controller", drivers)
        assert self.reads() == text
        self.scale(0)
        self.scale(1)
        assert self.reads() == text

    def grow(self, size: str) -> None:
        """Until the claim has that size, and nothing of a resize is pending or has failed."""
        wish = {"spec": {"resources": {"requests": {"storage": size}}}}
        self.cluster.api.patch("PersistentVolumeClaim", "data", self.namespace, wish)

        def grown() -> bool:
            status = self.cluster.api.get("PersistentVolumeClaim", "data", self.namespace)["status"]
            assert status["capacity"]["storage"] == size, status
            assert not status.get("conditions"), status
            return True

        self.cluster.wait(f"claim of {size}", grown, SECONDS)

    def id(self, claim: str = "data") -> str:
        """The id of its volume."""
        return volume_id(volume_of(self.cluster, claim, self.namespace, SECONDS))

    def volumes(self) -> list[Json]:
        """The PersistentVolumes of its claims."""
        found = self.cluster.items("PersistentVolume")
        return [each for each in found if each["spec"].get("claimRef", {}).get("namespace") == self.namespace]
