"""The namespaces in which a cluster lives, and pytest with it. Interfaces, mounts and processes belong to them and end
with their process 1, and that ends with the process that made them, however that ends.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tests.cluster.settings import BRIDGE, HOST, LOGS, MEMORY, ROOT, SERVICE
from tests.machine.guest_init import mount

_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 1 << 17, 1 << 29, 1 << 30
_PR_SET_PDEATHSIG = 1
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)

_LIMIT_SECONDS = 2 * 3600  # for everything
_GRACE_SECONDS = 60  # for pytest, to end when asked
_KEPT = ROOT / "build" / "cluster-logs"

_NETWORK = f"""
link set lo up
link add {BRIDGE} address 02:00:0a:63:00:01 type bridge
addr add {HOST}/24 dev {BRIDGE}
addr add {SERVICE}/32 dev {BRIDGE}
link set {BRIDGE} up
"""


def _make_place() -> None:
    mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    mount("proc", "/proc", "proc")
    mount("tmpfs", str(MEMORY), "tmpfs", data="size=100%,mode=1777")
    os.environ["TMPDIR"] = str(MEMORY)
    subprocess.run(["ip", "-batch", "-"], input=_NETWORK, text=True, check=True, timeout=120)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _keep_logs() -> None:
    """Copy the logs to the repository and say where."""
    if not LOGS.is_dir():
        return
    folder = _KEPT / time.strftime("%Y%m%d-%H%M%S")
    with contextlib.suppress(shutil.Error):  # files that go away meanwhile
        shutil.copytree(LOGS, folder, symlinks=True, dirs_exist_ok=True)
    print(f"cluster: logs in {folder.relative_to(ROOT)}")


def _wait(pytest: subprocess.Popen[bytes]) -> int:
    """Its exit code. Takes in orphans meanwhile, as process 1 must."""

    def end(number: int, _: FrameType | None) -> None:
        if number == signal.SIGALRM:
            raise TimeoutError
        pytest.send_signal(signal.SIGINT)  # which it takes as an order to tidy up and end
        signal.alarm(_GRACE_SECONDS)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal, it goes to pytest as well
    signal.alarm(_LIMIT_SECONDS)
    try:
        while True:
            pid, status = os.wait()
            if pid == pytest.pid:
                return os.waitstatus_to_exitcode(status)
    except TimeoutError:
        print("cluster: the tests did not end in time", file=sys.stderr)
        return 1


def _main(arguments: Sequence[str]) -> int:
    _make_place()
    options = ["-p", "no:cacheprovider", "-o", "testpaths=tests/cluster"]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pytest needs it, and a background job has it ignored
    pytest = subprocess.Popen([sys.executable, "-m", "pytest", *options, *arguments], cwd=ROOT)
    if code := _wait(pytest):
        _keep_logs()
    return code


def run_pytest(arguments: Sequence[str]) -> int:
    """Run pytest, on tests/cluster if the arguments name nothing else, in namespaces of its own; its exit code. If a
    test fails, the logs of the cluster are kept. OSError or SubprocessError if this process may not do that.
    """
    if _libc.unshare(_CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "The namespaces of the cluster cannot be made")
    if not (child := os.fork()):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return _main(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: os.kill(child, received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it tells pytest, and that ends all
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code
