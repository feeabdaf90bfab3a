"""The shortest proof that the cluster is one, and that nothing of it can be left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.cluster.commands import run
from tests.cluster.settings import ROOT, SERVICE

_START_SECONDS = 60
_END_SECONDS = 10

# The pod calls the apiserver by its service address, kubelet and the apiserver call the pod.
_POD = f"""
apiVersion: v1
kind: Pod
metadata:
  name: writer
spec:
  containers:
    - name: main
      image: busybox:1
      command:
        - sh
        - -c
        - |
          nc -w 10 {SERVICE} 443 </dev/null && echo reached | tee /data/file
          exec httpd -f -p 8080 -h /data
      readinessProbe:
        httpGet: {{path: /file, port: 8080}}
        periodSeconds: 1
      volumeMounts:
        - {{name: data, mountPath: /data}}
  volumes:
    - {{name: data, emptyDir: {{}}}}
"""


def _processes() -> dict[int, str]:
    """Those of other process namespaces below this one."""
    found = {}
    mine = os.readlink("/proc/self/ns/pid")
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/pid") != mine:
                found[int(entry)] = Path("/proc", entry, "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def _places() -> tuple[str, str, list[str]]:
    """Interfaces, mounts, and the files where temporary ones go."""
    links = run(["ip", "-o", "link"], timeout=10).text
    return links, Path("/proc/mounts").read_text(), sorted(os.listdir(os.environ["TMPDIR"]))


def test_a_pod_reaches_the_apiserver_and_is_reached(cluster: Cluster, namespace: str) -> None:
    cluster.apply(_POD, namespace)
    cluster.pod_running("writer", namespace)
    assert cluster.logs("writer", "main", namespace) == "reached\n"
    assert cluster.pod_exec("writer", ["cat", "/data/file"], namespace) == b"reached\n"
    proxy = cluster.api.path("Pod", "writer:8080", namespace) + "/proxy/file"
    assert cluster.api.raw("GET", proxy) == b"reached\n"
    assert "Container started" in cluster.events("Pod", "writer", namespace)


def test_kill_9_of_the_runner_ends_all_that_it_has_begun() -> None:
    before = _places()
    test = f"{os.path.relpath(__file__, ROOT)}::{test_a_pod_reaches_the_apiserver_and_is_reached.__name__}"
    command = [sys.executable, "-m", "tests.cluster", test]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as runner:
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not all(any(name in line for line in _processes().values()) for name in ("/etcd ", "linux.uml ")):
                assert time.monotonic() < deadline, _processes()
                assert runner.poll() is None
                time.sleep(0.05)
        finally:
            runner.kill()
    deadline = time.monotonic() + _END_SECONDS
    while left := _processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert _places() == before
