"""`make bench-operator`: prints the table of images as Kubernetes objects; exits 1 when a bound is missed.

A real API (etcd, kube-apiserver) with its audit log, the operator and the agent of one node, all on this machine.
$KUBERNETES_BIN has the binaries; the temporary directory needs 8 GiB.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.measure import resident, seconds, side_by_side
from benchmarks.table import Row, in_ms, table
from csi_driver.agent.sending import Sender
from csi_driver.images.checksum import Algorithm, Checksum
from csi_driver.kube.client import Kube
from csi_driver.kube.copies import AUDIENCE
from csi_driver.kube.kinds import IMAGE, IMAGE_COPY, Json, Kind, name_of
from tests.keys.apiserver import ACCOUNT, NAMESPACE
from tests.operator.lab import OPERATOR, Lab, a_lab
from tests.operator.roles import may_upload

_MIB: Final = 1 << 20
_SMALL, _LARGE = 256 * _MIB, 2048 * _MIB
_REPETITIONS: Final = 6
_IDLE: Final = 500
_QUIET_SECONDS: Final = 60
_SETTLE_SECONDS: Final = 10
_PASSPHRASE: Final = "a passphrase of the benchmarks"
_LUKS_CSI: Final = str(Path(sys.executable).with_name("luks-csi"))


class _Writes:
    """The writes of one image's objects of a kind while it is at work, as a watch tells of them."""

    def __init__(self, kube: Kube, kind: Kind, image: str) -> None:
        self._times: list[float] = []
        self._version = kube.list(kind)[1]
        self._thread = threading.Thread(target=self._watch, args=(kube, kind, image), daemon=True)
        self._thread.start()

    def _watch(self, kube: Kube, kind: Kind, image: str) -> None:
        for event, thing in kube.watch(kind, self._version):
            status = thing.get("status", {})
            if image == (name_of(thing) if kind == IMAGE else thing["spec"]["image"]) and event == "MODIFIED":
                if "Ready" in (status.get("phase"), status.get("state")):
                    return
                if "InProgress" in (status.get("phase"), status.get("state")):
                    self._times.append(time.monotonic())

    def row(self, what: str) -> Row:
        """Each second has one at most; beside those of progress there are the first and the last."""
        self._thread.join()
        taken = self._times[-1] - self._times[0]
        told = f"{len(self._times)} in {taken:.1f} s"
        return Row(what, told, "", len(self._times), int(taken) + 2, "{:.0f}".format)


def _upload(lab: Lab, name: str, size: int) -> None:
    """An image of random bytes, ready on the node."""
    path = lab.folder / f"{name}.raw"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size // _MIB):
            piece = os.urandom(_MIB)
            file.write(piece)
            digest.update(piece)
    lab.image(name, {"upload": {}})
    awaited = lab.wait("upload", lambda: lab.status(name).get("upload"))
    ca, token = (lab.tls / "ca.crt").read_text(), lab.token(ACCOUNT, AUDIENCE)
    checksum = Checksum(Algorithm.SHA256, digest.hexdigest())
    Sender(awaited["address"], ca, token, name).send(path, checksum, lambda _: None)
    path.unlink()
    lab.wait_phase(name)


def _ready(lab: Lab, name: str) -> None:
    """Until the Image is: told by a watch, not by asking."""
    things, version = lab.kube.list(IMAGE)
    if any(name_of(each) == name and each.get("status", {}).get("phase") == "Ready" for each in things):
        return
    for _, thing in lab.kube.watch(IMAGE, version):
        if name_of(thing) == name and thing.get("status", {}).get("phase") == "Ready":
            return


def _clone(lab: Lab, folder: Path) -> Iterator[Row]:
    _upload(lab, "small", _SMALL)
    state = f"--state-dir={lab.folder / 'node'}"
    (folder / "CRYPTO_KEY_VALUE").write_text(_PASSPHRASE)
    numbers = iter(range(_REPETITIONS * 2 + 2))

    def ours() -> float:
        name = f"clone-{next(numbers)}"

        def clone() -> None:
            lab.clone(name, "small", "encrypt", "key")
            _ready(lab, name)

        taken = seconds(clone)
        lab.delete_image(name)
        return taken

    def engine() -> None:
        secret = f"--secret-dir={folder}"
        argv = [_LUKS_CSI, "image", "clone", "small", "by-hand", "--encryption=encrypt", secret, state]
        subprocess.run(argv, check=True, capture_output=True)
        with lab.file("node", "by-hand").open("rb") as file:
            hashlib.file_digest(file, "sha256")

    def other() -> float:
        taken = seconds(engine)
        subprocess.run([_LUKS_CSI, "image", "delete", "by-hand", "--yes", state], check=True, capture_output=True)
        return taken

    mine, theirs = side_by_side(_REPETITIONS, ours, other, warm_up=1)
    beyond = median(mine) - median(theirs)
    what = "clone of 256 MiB, encrypted: from the Image to Ready, beyond luks-csi image clone and its checksum"
    yield Row(what, in_ms(mine), in_ms(theirs), beyond, 2.0, "{:.2f} s".format)
    lab.delete_image("small")


def _progress(lab: Lab) -> Iterator[Row]:
    _upload(lab, "large", _LARGE)
    writes = {kind: _Writes(lab.kube, kind, "large-clone") for kind in (IMAGE, IMAGE_COPY)}
    lab.clone("large-clone", "large", "encrypt", "key")
    lab.wait_phase("large-clone")
    for kind, each in writes.items():
        yield each.row(f"clone of 2 GiB, encrypted: status writes of its {kind} while it is at work")
    for name in ("large-clone", "large"):
        lab.delete_image(name)


def _idle(lab: Lab, audit: Path) -> Iterator[Row]:
    """Images that are ready, with what an agent would have told of them: what is measured is the operator."""
    lab.agents["node"].stop()
    for number in range(_IDLE):
        lab.image(f"idle-{number}", {"upload": {}})
    facts = {"format": "raw", "fileSize": _MIB, "virtualSize": _MIB, "encrypted": False, "checksum": "0" * 64}
    status = {"state": "Ready", "message": "", "progress": 100, "address": "127.0.0.1:1", "image": facts}

    def copies() -> list[Json] | None:
        found = lab.kube.list(IMAGE_COPY)[0]
        return found if len(found) == _IDLE else None

    for copy in lab.wait("copy of each", copies):
        lab.kube.patch(IMAGE_COPY, name_of(copy), {"status": status}, status=True)
    for number in range(_IDLE):
        lab.wait_phase(f"idle-{number}")
    lab.operator.stop()
    lab.operator.start()
    time.sleep(_SETTLE_SECONDS)
    before = _requests(audit)
    time.sleep(_QUIET_SECONDS)
    asked = _requests(audit) - before
    memory = resident(lab.operator.pid)
    yield Row(f"{_IDLE} idle images: resident memory of the operator", f"{memory:.0f} MiB", "", memory, 120, _in_mib)
    what = f"{_IDLE} idle images: requests of the operator in {_QUIET_SECONDS} s"
    yield Row(what, str(asked), "", asked, 0, "{:.0f}".format)


def _in_mib(value: float) -> str:
    return f"{value:.0f} MiB"


def _requests(audit: Path) -> int:
    """Those of the operator so far, watches too."""
    account = f"system:serviceaccount:{NAMESPACE}:{OPERATOR}"
    with audit.open() as lines:
        events = [json.loads(line) for line in lines if line.endswith("\n")]
    asked = [each for each in events if each["user"]["username"] == account]
    if not asked:
        raise RuntimeError("the audit log tells of nothing that the operator has asked")
    return len(asked)


def main() -> int:
    """Measure; returns the exit code."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-operator-") as name:
        folder = Path(name)
        policy, audit = folder / "audit-policy.json", folder / "audit.log"
        rule = {"level": "Metadata", "omitStages": ["ResponseStarted", "ResponseComplete"]}
        policy.write_text(json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [rule]}))
        options = (f"--audit-policy-file={policy}", f"--audit-log-path={audit}")
        (folder / "secret").mkdir()
        with a_lab(folder, ("node",), *options) as lab:
            may_upload(lab, ACCOUNT)
            lab.secret("key", _PASSPHRASE, CRYPTO_PBKDF="argon2id")
            for found in (_clone(lab, folder / "secret"), _progress(lab), _idle(lab, audit)):
                for row in found:
                    print(f"{row.what}: {row.cells()[3]}", file=sys.stderr, flush=True)
                    rows.append(row)
    for line in table(rows):
        print(line)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
