"""What the log shows of a message: all but what csi.proto marks as secret."""

from google.protobuf import descriptor_pb2 as pb
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.redaction import shown

SECRET = "correct horse battery staple"


def test_fields_by_name_with_nested_messages_maps_and_enums() -> None:
    request = csi.NodeStageVolumeRequest(
        volume_id="v",
        volume_context={"encrypted": "true"},
        volume_capability=csi.VolumeCapability(
            mount=csi.VolumeCapability.MountVolume(fs_type="ext4", mount_flags=["noatime", "nodev"]),
            access_mode=csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
        ),
        secrets={"CRYPTO_KEY_VALUE": SECRET},
    )
    assert shown(request) == {
        "volume_id": "v",
        "volume_context": {"encrypted": "true"},
        "volume_capability": {
            "mount": {"fs_type": "ext4", "mount_flags": ["noatime", "nodev"]},
            "access_mode": {"mode": "SINGLE_NODE_WRITER"},
        },
    }


def test_repeated_messages_and_what_is_not_set() -> None:
    request = csi.CreateVolumeRequest(
        accessibility_requirements=csi.TopologyRequirement(
            requisite=[csi.Topology(segments={"a": "1"}), csi.Topology(segments={"a": "2"})]
        )
    )
    assert shown(request) == {
        "accessibility_requirements": {"requisite": [{"segments": {"a": "1"}}, {"segments": {"a": "2"}}]}
    }


def test_no_secret_of_any_request_of_csi_is_shown() -> None:
    seen = 0
    for descriptor in csi.DESCRIPTOR.message_types_by_name.values():
        for field in descriptor.fields:
            if field.GetOptions().Extensions[csi.csi_secret]:
                message = message_factory.GetMessageClass(descriptor)()
                getattr(message, field.name)["anything"] = SECRET
                assert shown(message) == {}
                seen += 1
    assert seen >= 15


def test_the_mark_decides_at_every_depth_and_not_the_name() -> None:
    """A message of tomorrow: a marked field of an innocent name, below a repeated field and in the values of a map."""
    message = tomorrows_message()
    for inner in (message.many.add(), message.by_name["x"]):  # type: ignore[attr-defined]  # made at run time
        inner.harmless, inner.secrets, inner.blob = SECRET, "told", b"1234"
    inner_shown = {"secrets": "told", "blob": "4 bytes"}
    assert shown(message) == {"many": [inner_shown], "by_name": {"x": inner_shown}}
    assert SECRET not in repr(shown(message))


def tomorrows_message() -> Message:
    field = pb.FieldDescriptorProto
    file = pb.FileDescriptorProto(
        name="tests/tomorrow.proto", package="tests", syntax="proto3", dependency=[csi.DESCRIPTOR.name]
    )
    inner = file.message_type.add(name="Inner")
    marked = inner.field.add(name="harmless", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    marked.options.Extensions[csi.csi_secret] = True
    inner.field.add(name="secrets", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    inner.field.add(name="blob", number=3, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    outer = file.message_type.add(name="Outer")
    outer.field.add(
        name="many", number=1, type=field.TYPE_MESSAGE, type_name=".tests.Inner", label=field.LABEL_REPEATED
    )
    entry = outer.nested_type.add(name="ByNameEntry", options=pb.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, type_name=".tests.Inner", label=field.LABEL_OPTIONAL
    )
    outer.field.add(
        name="by_name",
        number=2,
        type=field.TYPE_MESSAGE,
        type_name=".tests.Outer.ByNameEntry",
        label=field.LABEL_REPEATED,
    )
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tests.Outer"))()
