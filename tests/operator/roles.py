"""Roles that tests give: what an administrator of a cluster would."""

from csi_driver.kube.kinds import Kind
from tests.keys.apiserver import NAMESPACE
from tests.operator.lab import Lab

ROLE = Kind("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles")
BINDING = Kind("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings")


def may_upload(lab: Lab, account: str) -> None:
    """Let a service account of the driver's namespace upload images."""
    rules = [{"apiGroups": ["images.luks.csi.internal"], "resources": ["images/upload"], "verbs": ["update"]}]
    lab.kube.create(ROLE, {"metadata": {"name": account}, "rules": rules})
    binding = {
        "metadata": {"name": account},
        "roleRef": {"apiGroup": ROLE.group, "kind": "ClusterRole", "name": account},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
    }
    lab.kube.create(BINDING, binding)
