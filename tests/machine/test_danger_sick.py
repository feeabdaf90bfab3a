"""File systems that were aborted, shut down or frozen or carry their error flag: well again for the next pod.

The next pod got them as they were (nbs#2936, velero#2113), and after an enlargement no pod came up any more
(democratic-csi#392). With nobody else on it such a file system is mounted anew; with another pod on it the new one is
refused, told why and what to do.
"""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.model.errors import DeviceInUse, FailedPrecondition
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine.node import CHEAP, EXT4, MIB, SIZE, VOLUME, Node
from tests.machine.processes import run, sleeping_in, wait_for

READ_ONLY_ON_ERROR = Capability(
    AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4", mount_flags=("errors=remount-ro",)
)
XFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="xfs")
CURES = r"(unpublish|end|e2fsck|volume check)"


def kernel_name(node: Node) -> str:
    """The block device of the mounted file system, as /sys names it."""
    mount = node.mounts.at(str(node.staging_path()))
    assert mount is not None
    major, minor = mount.device
    return Path(f"/sys/dev/block/{major}:{minor}").resolve().name


def abort(node: Node) -> None:
    run("mount", "-o", "remount,abort", node.staging_path())


def raise_flag(node: Node) -> None:
    """As ext4 does when it finds itself damaged; with errors=remount-ro it goes read-only too."""
    told = Path("/sys/fs/ext4", kernel_name(node))
    (told / "trigger_fs_error").write_text("a test")
    wait_for(lambda: int((told / "errors_count").read_text()) > 0, "the kernel to count the error, which it does later")


def shut_down(node: Node) -> None:
    run("xfs_io", "-x", "-c", "shutdown", node.staging_path())


def freeze(node: Node) -> None:
    run("fsfreeze", "--freeze", node.staging_path())


def thaw(node: Node) -> None:
    """After a test that failed: whoever writes to what is frozen waits for good, mounted or not."""
    path, mapping = node.staging_path(), node.mapping()
    again = mapping is not None and mapping.open_count > 0 and not node.is_mounted()
    if again and mapping is not None:
        run("mount", mapping.path, path)
    subprocess.run(["fsfreeze", "--unfreeze", path], check=False, capture_output=True, timeout=120)
    if again:
        run("umount", path)


@dataclass(frozen=True)
class Sickness:
    """What befalls a file system, and on which kind of stage."""

    befall: Callable[[Node], None]
    capability: Capability = EXT4
    size: int = SIZE


SICKNESSES = {
    "aborted": Sickness(abort),
    "error-flag": Sickness(raise_flag),
    "read-only-by-error": Sickness(raise_flag, READ_ONLY_ON_ERROR),
    "xfs-shut-down": Sickness(shut_down, XFS, 304 * MIB),
    "frozen": Sickness(freeze),
    "xfs-frozen": Sickness(freeze, XFS, 304 * MIB),
}
FROZEN = [name for name in SICKNESSES if name.endswith("frozen")]
# Whether a file system is frozen the kernel tells only to who thaws it.
TOLD = [name for name in SICKNESSES if name not in FROZEN]

encrypted_or_plain = pytest.mark.parametrize("parameters", [CHEAP, {}], ids=["encrypted", "plain"])


@contextlib.contextmanager
def falling_sick(node: Node, sickness: Sickness, parameters: dict[str, str]) -> Iterator[None]:
    """A volume that held a file when it fell sick below its first pod; in the end it is put down."""
    node.create(size=sickness.size, parameters=parameters, capability=sickness.capability)
    node.stage(capability=sickness.capability)
    node.publish(capability=sickness.capability)
    node.write()
    try:
        sickness.befall(node)
        yield
    finally:
        thaw(node)


def is_well(node: Node, pod: Path) -> None:
    """The pod reads what was written before and writes, within a time; no error is noted on the file system."""
    assert (pod / "file").read_text() == "precious"
    pool = ThreadPoolExecutor(1)
    try:
        pool.submit((pod / "new").write_text, "written").result(10)
    finally:
        pool.shutdown(wait=False)
    assert (pod / "new").read_text() == "written"
    if (state := Path("/sys/fs/ext4", kernel_name(node))).exists():
        assert (state / "errors_count").read_text().strip() == "0"


@pytest.mark.parametrize("name", SICKNESSES)
@encrypted_or_plain
def test_nbs2936_the_next_pod_gets_a_well_file_system(node: Node, name: str, parameters: dict[str, str]) -> None:
    """Noticed by NodePublish after the last unpublish: kubelet does not unstage when the next pod is there already."""
    capability = SICKNESSES[name].capability
    with falling_sick(node, SICKNESSES[name], parameters):
        node.unpublish()
        pod = node.publish(capability=capability, target=node.target_path("pod-2"))
        is_well(node, pod)
    node.unpublish(target=pod)
    node.unstage()
    node.stage(capability=capability)
    assert (node.staging_path() / "new").read_text() == "written"
    node.unstage()


@pytest.mark.parametrize("name", SICKNESSES)
@encrypted_or_plain
def test_nbs2936_a_repeated_stage_makes_it_well(node: Node, name: str, parameters: dict[str, str]) -> None:
    capability = SICKNESSES[name].capability
    with falling_sick(node, SICKNESSES[name], parameters):
        node.unpublish()
        node.stage(capability=capability)
        is_well(node, node.staging_path())
    node.unstage()


@pytest.mark.parametrize("name", TOLD)
def test_nbs2936_while_another_pod_is_on_it_the_next_one_is_refused(node: Node, name: str) -> None:
    """Mounting anew would take it from under the first; both would see it broken otherwise."""
    capability, second = SICKNESSES[name].capability, node.target_path("pod-2")
    with falling_sick(node, SICKNESSES[name], dict(CHEAP)):
        for _ in range(2):
            with pytest.raises(FailedPrecondition, match=rf"volume {VOLUME}.*(error|shut down|read-only).*{CURES}"):
                node.publish(capability=capability, target=second)
            assert not second.exists()
        assert node.mounts.at(str(node.target_path()))
        node.unpublish()
        node.publish(capability=capability, target=second)
        is_well(node, second)
    node.unpublish(target=second)
    node.unstage()


def test_nbs2936_a_process_on_it_is_another_user(node: Node) -> None:
    """It cannot be unmounted; who keeps it is named, and what was there stays."""
    second = node.target_path("pod-2")
    with falling_sick(node, SICKNESSES["aborted"], dict(CHEAP)):
        node.unpublish()
        with (
            sleeping_in(node.staging_path()) as holder,
            pytest.raises(FailedPrecondition, match=rf"volume {VOLUME}.*process {holder} \("),
        ):
            node.publish(target=second)
        assert node.is_mounted()
        node.publish(target=second)
        is_well(node, second)
    node.unpublish(target=second)
    node.unstage()


@pytest.mark.parametrize("name", ["error-flag", "xfs-shut-down"])
def test_nbs2936_a_mount_in_another_namespace_is_another_user(node: Node, name: str) -> None:
    """Unmounted here it goes on there: no check may touch it, and to mount it anew changes nothing."""
    capability, second = SICKNESSES[name].capability, node.target_path("pod-2")
    with falling_sick(node, SICKNESSES[name], dict(CHEAP)):
        node.unpublish()
        with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "300"]) as holder:
            try:
                wait_for(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", "the other namespace")
                for _ in range(2):
                    with pytest.raises(DeviceInUse, match=rf"volume {VOLUME}.*process {holder.pid} \(sleep\)"):
                        node.publish(capability=capability, target=second)
            finally:
                holder.kill()
        node.publish(capability=capability, target=second)
        is_well(node, second)
    node.unpublish(target=second)
    node.unstage()


@pytest.mark.parametrize("name", FROZEN)
def test_velero2113_a_frozen_volume_can_be_put_down(node: Node, name: str) -> None:
    """The backup that froze it died: its device stayed busy for ever, kept by nobody that could be named."""
    capability = SICKNESSES[name].capability
    with falling_sick(node, SICKNESSES[name], dict(CHEAP)):
        node.unpublish()
        node.unstage()
        assert node.closed()
    node.stage(capability=capability)
    is_well(node, node.staging_path())
    node.unstage()


@pytest.mark.parametrize("name", FROZEN)
def test_velero2113_unpublish_of_the_last_mount_thaws_it(node: Node, name: str) -> None:
    """Where somebody has unmounted the staging path, it is unpublish that ends the file system."""
    with falling_sick(node, SICKNESSES[name], dict(CHEAP)):
        run("umount", node.staging_path())
        node.unpublish()
        node.unstage()
        assert node.closed()


@pytest.mark.parametrize("published", [True, False], ids=["published", "staged"])
def test_democratic_csi392_a_volume_with_its_error_flag_is_not_enlarged_and_kubelet_goes_on(
    node: Node, *, published: bool
) -> None:
    """Any code but FAILED_PRECONDITION keeps every pod away; the cure is told, and then it grows."""
    with falling_sick(node, SICKNESSES["error-flag"], dict(CHEAP)):
        if not published:
            node.unpublish()
        for _ in range(2):
            with pytest.raises(FailedPrecondition, match=rf"volume {VOLUME}.*error.*{CURES}"):
                node.expand(2 * SIZE)
        assert node.read() == "precious"
        if published:
            node.unpublish()
    node.unstage()
    node.stage()
    assert node.expand(2 * SIZE) == 2 * SIZE
    is_well(node, node.staging_path())
    node.unstage()
