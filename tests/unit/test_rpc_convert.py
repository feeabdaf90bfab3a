"""Requests are read whole, and refused before anything is looked up."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from csi_driver.model.errors import FailedPrecondition, InvalidArgument, NotFound
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import is_volume_id
from csi_driver.rpc import convert
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.usage import Usage

Mode = csi.VolumeCapability.AccessMode
BLOCK = csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER))
MOUNT = csi.VolumeCapability(
    mount=csi.VolumeCapability.MountVolume(fs_type="xfs", mount_flags=["noatime"]),
    access_mode=Mode(mode=Mode.SINGLE_NODE_SINGLE_WRITER),
)
SECRETS = {"CRYPTO_KEY_VALUE": "correct horse"}

CREATE = csi.CreateVolumeRequest(
    name="pvc-1",
    capacity_range=csi.CapacityRange(required_bytes=5, limit_bytes=7),
    volume_capabilities=[MOUNT, BLOCK],
    parameters={"encrypted": "true"},
    secrets=SECRETS,
    accessibility_requirements=csi.TopologyRequirement(preferred=[csi.Topology(segments={"a": "b"})]),
)
STAGE = csi.NodeStageVolumeRequest(
    volume_id="v", staging_target_path="/s", volume_capability=BLOCK, secrets=SECRETS, volume_context={"k": "c"}
)
PUBLISH = csi.NodePublishVolumeRequest(
    volume_id="v", staging_target_path="/s", target_path="/t", volume_capability=MOUNT, readonly=True
)
EXPAND = csi.NodeExpandVolumeRequest(
    volume_id="v", volume_path="/t", capacity_range=csi.CapacityRange(required_bytes=9)
)
GROW = csi.ControllerExpandVolumeRequest(volume_id="v", capacity_range=csi.CapacityRange(required_bytes=9))
UNSTAGE = csi.NodeUnstageVolumeRequest(volume_id="v", staging_target_path="/s")
UNPUBLISH = csi.NodeUnpublishVolumeRequest(volume_id="v", target_path="/t")
STATS = csi.NodeGetVolumeStatsRequest(volume_id="v", volume_path="/t")
VALIDATE = csi.ValidateVolumeCapabilitiesRequest(volume_id="v", volume_capabilities=[BLOCK], parameters={"p": "1"})

READERS: dict[str, tuple[Callable[[Any], object], Message, tuple[str, ...]]] = {
    "create": (convert.create_request, CREATE, ("name", "volume_capabilities")),
    "stage": (convert.stage_request, STAGE, ("volume_id", "staging_target_path", "volume_capability")),
    "unstage": (convert.unstaging, UNSTAGE, ("volume_id", "staging_target_path")),
    "publish": (convert.publish_request, PUBLISH, ("volume_id", "target_path", "volume_capability")),
    "unpublish": (convert.unpublishing, UNPUBLISH, ("volume_id", "target_path")),
    "expand": (convert.expand_request, EXPAND, ("volume_id", "volume_path")),
    "grow": (convert.growth, GROW, ("volume_id", "capacity_range")),
    "stats": (convert.usage_question, STATS, ("volume_id", "volume_path")),
    "validate": (convert.validation, VALIDATE, ("volume_id", "volume_capabilities")),
}
MISSING = [(name, field) for name, (_, _, fields) in READERS.items() for field in fields]


def changed(message: Message, *cleared: str, **values: object) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    for field in cleared:
        copy.ClearField(field)
    for field, value in values.items():
        setattr(copy, field, value)
    return copy


@pytest.mark.parametrize("name", READERS)
def test_a_whole_request_is_read(name: str) -> None:
    read, message, _ = READERS[name]
    assert read(message)


@pytest.mark.parametrize(("name", "field"), MISSING)
def test_what_is_missing_is_refused_and_named(name: str, field: str) -> None:
    read, message, _ = READERS[name]
    with pytest.raises(InvalidArgument, match=field):
        read(changed(message, field))


@pytest.mark.parametrize("name", ["stage", "publish", "expand", "grow", "stats", "validate"])
@pytest.mark.parametrize("volume_id", ["../../etc", "A", "a/b", "x" * 67, "-a", "\0", "é"])
def test_a_foreign_id_is_not_found_where_the_volume_has_to_exist(name: str, volume_id: str) -> None:
    read, message, _ = READERS[name]
    with pytest.raises(NotFound):
        read(changed(message, volume_id=volume_id))


@pytest.mark.parametrize("volume_id", ["../../etc", "A", "a/b", "x" * 67])
def test_a_foreign_id_becomes_a_safe_one_where_things_are_undone(volume_id: str) -> None:
    found, target = convert.unpublishing(changed(UNPUBLISH, volume_id=volume_id))
    assert target == "/t"
    assert is_volume_id(found)
    assert found != volume_id
    assert found == convert.any_volume_id(volume_id)
    assert convert.any_volume_id("pvc-1") == "pvc-1"


def test_what_is_missing_counts_before_a_foreign_id() -> None:
    with pytest.raises(InvalidArgument):
        convert.stage_request(changed(STAGE, "volume_capability", volume_id="A"))


@pytest.mark.parametrize(
    ("given", "read"),
    [("/a/b", "/a/b"), ("/a//b/", "/a/b"), ("//a/./b", "/a/b"), ("/a/.b/..c", "/a/.b/..c"), ("/a\nb", "/a\nb")],
)
def test_paths_are_read_as_mountinfo_shows_them(given: str, read: str) -> None:
    assert convert.path("target_path", given) == read


@pytest.mark.parametrize("given", ["a", "./a", "/", "//", "/a/../b", "/..", "/a\0", "/./"])
def test_paths_that_are_not_absolute_are_refused(given: str) -> None:
    with pytest.raises(InvalidArgument, match="target_path"):
        convert.path("target_path", given)


def test_a_volume_at_a_relative_path_is_not_found() -> None:
    with pytest.raises(NotFound):
        convert.usage_question(changed(STATS, volume_path="some/path"))


def test_capabilities() -> None:
    assert convert.capability(BLOCK) == Capability(mode=AccessMode.SINGLE_NODE_WRITER, block=True)
    assert convert.capability(MOUNT) == Capability(
        mode=AccessMode.SINGLE_NODE_SINGLE_WRITER, block=False, fs_type="xfs", mount_flags=("noatime",)
    )


def test_a_multi_node_mode_is_read_and_left_to_the_use_case() -> None:
    wanted = csi.VolumeCapability(
        block=csi.VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.MULTI_NODE_MULTI_WRITER)
    )
    assert convert.capability(wanted).mode is AccessMode.MULTI_NODE_MULTI_WRITER


@pytest.mark.parametrize("mode", [0, 99])
def test_a_capability_without_a_known_access_mode_is_refused(mode: int) -> None:
    wanted = csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume())
    wanted.access_mode.ParseFromString(bytes([8, mode]))
    with pytest.raises(InvalidArgument, match="access mode"):
        convert.capability(wanted)


def test_a_capability_without_an_access_type_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="access type"):
        convert.capability(csi.VolumeCapability(access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER)))


def test_a_volume_mount_group_is_refused() -> None:
    wanted = csi.VolumeCapability(
        mount=csi.VolumeCapability.MountVolume(volume_mount_group="1000"),
        access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER),
    )
    with pytest.raises(InvalidArgument, match="volume_mount_group"):
        convert.stage_request(
            csi.NodeStageVolumeRequest(volume_id="v", staging_target_path="/s", volume_capability=wanted)
        )


def test_create_request() -> None:
    read = convert.create_request(CREATE)
    assert (read.name, read.required_bytes, read.limit_bytes) == ("pvc-1", 5, 7)
    assert [capability.block for capability in read.capabilities] == [False, True]
    assert read.parameters == {"encrypted": "true"}
    assert read.key.passphrase == Passphrase(b"correct horse")
    assert read.topologies == ({"a": "b"},)


def test_requisite_topologies_count_before_preferred_ones() -> None:
    request = changed(CREATE)
    request.accessibility_requirements.requisite.add().segments["a"] = "c"
    assert convert.create_request(request).topologies == ({"a": "c"},)


@pytest.mark.parametrize(
    "source",
    [
        csi.VolumeContentSource(snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id="s")),
        csi.VolumeContentSource(volume=csi.VolumeContentSource.VolumeSource(volume_id="v")),
        csi.VolumeContentSource(),
    ],
)
def test_a_content_source_is_refused(source: csi.VolumeContentSource) -> None:
    request = changed(CREATE)
    request.volume_content_source.CopyFrom(source)
    with pytest.raises(InvalidArgument, match="does not offer"):
        convert.create_request(request)


@pytest.mark.parametrize("name", ["create", "validate"])
def test_mutable_parameters_are_refused(name: str) -> None:
    read, message, _ = READERS[name]
    request = changed(message)
    request.mutable_parameters["iops"] = "1"
    with pytest.raises(InvalidArgument, match="VolumeAttributesClass"):
        read(request)


@pytest.mark.parametrize("name", ["create", "stage", "expand"])
def test_a_secret_that_disagrees_with_itself_is_refused(name: str) -> None:
    read, message, _ = READERS[name]
    request = changed(message)
    request.secrets.update({"CRYPTO_KEY_VALUE": "a", "encryptionPassphrase": "b"})
    with pytest.raises(FailedPrecondition, match="disagree"):
        read(request)


def test_stage_request() -> None:
    read = convert.stage_request(STAGE)
    assert (read.volume_id, read.staging_path, read.capability.block) == ("v", "/s", True)
    assert read.key.passphrase == Passphrase(b"correct horse")
    assert read.context == {"k": "c"}


def test_publish_request() -> None:
    read = convert.publish_request(PUBLISH)
    assert (read.volume_id, read.staging_path, read.target_path, read.read_only) == ("v", "/s", "/t", True)


def test_publish_without_a_staging_path_is_a_failed_precondition() -> None:
    with pytest.raises(FailedPrecondition, match="staging_target_path"):
        convert.publish_request(changed(PUBLISH, "staging_target_path"))


def test_expand_request_needs_little_and_takes_more() -> None:
    least = convert.expand_request(csi.NodeExpandVolumeRequest(volume_id="v", volume_path="/t"))
    assert (least.required_bytes, least.limit_bytes, least.staging_path, least.capability) == (0, 0, "", None)
    assert least.key.passphrase is None
    more = changed(EXPAND, staging_target_path="/s/")
    more.volume_capability.CopyFrom(BLOCK)
    read = convert.expand_request(more)
    assert (read.required_bytes, read.staging_path, read.capability) == (9, "/s", convert.capability(BLOCK))


def test_what_is_not_known_of_a_usage_is_zero() -> None:
    assert convert.usage(Usage("bytes", 10)) == csi.VolumeUsage(unit=csi.VolumeUsage.BYTES, total=10)
    assert convert.usage(Usage("inodes", 10, 4, 6)) == csi.VolumeUsage(
        unit=csi.VolumeUsage.INODES, total=10, used=4, available=6
    )
