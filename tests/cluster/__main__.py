"""A real Kubernetes cluster for tests: `python -m tests.cluster [PYTEST-ARGUMENTS]`.

etcd and the control plane run on this machine, each node in a guest (tests/machine), all in network, mount and process
namespaces of their own: nothing of it can be left behind, and several clusters can be up at once. Wants root, and the
folder of the Kubernetes binaries in $KUBERNETES_BIN. The nodes' disk is made first, unless $CLUSTER_DISK names one.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.images import cache_folder, prepared_disk
from tests.cluster.namespaces import run_pytest
from tests.cluster.settings import DISK, KUBERNETES_BIN, MEMORY, ROOT, binaries
from tests.machine.guest_uml import missing as missing_for_guest
from tests.machine.guest_uml import system_path

_PROGRAMS = {
    "buildah": "buildah",
    "busybox": "busybox-static",
    "containerd": "containerd",
    "ctr": "containerd",
    "gcc": "gcc",
    "ip": "iproute2",
    "mmdebstrap": "mmdebstrap",
    "openssl": "openssl",
    "runc": "runc",
    "unshare": "util-linux",
}
_BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kubelet")


def _missing_here() -> str | None:
    if os.geteuid() != 0:
        return "The cluster tests need root, for namespaces and guests: run this as root."
    if reason := missing_for_guest():
        return reason
    if not os.path.exists("/dev/net/tun"):
        return (
            "The cluster's nodes have no network, /dev/net/tun is absent: load tun, or give the container the device."
        )
    for program, package in _PROGRAMS.items():
        if not shutil.which(program, path=system_path()):
            return f"The cluster needs {program}: install the package {package}."
    if not os.path.exists("/usr/lib/cni/ptp"):
        return "The cluster's pods have no network, /usr/lib/cni is absent: install containernetworking-plugins."
    return None


def _missing_binaries() -> str | None:
    if not os.environ.get(KUBERNETES_BIN):
        return f"${KUBERNETES_BIN} does not say where the Kubernetes binaries are: make cluster-test builds them."
    for binary in _BINARIES:
        if not os.access(binaries() / binary, os.X_OK):
            return f"There is no {binary} in {binaries()}: make cluster-test builds it."
    for path in (ROOT, binaries(), Path(sys.prefix)):
        if path.is_relative_to(MEMORY):
            return f"{path} lies below {MEMORY}, which the cluster covers with its own: move it."
    return None


def main(arguments: Sequence[str]) -> int:
    if reason := _missing_here() or _missing_binaries():
        print(reason, file=sys.stderr)
        return 1
    os.environ["PATH"] = system_path()
    os.chdir(ROOT)
    try:
        if DISK not in os.environ:
            os.environ[DISK] = str(prepared_disk(binaries(), cache_folder()))
        return run_pytest(arguments)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"The cluster cannot be prepared: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
