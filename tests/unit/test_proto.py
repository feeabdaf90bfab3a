"""`protos/csi.proto`, as compiled, is CSI 1.13, and `protos/addons_*.proto` CSI-Addons: the facts in `tests/data`.

The descriptor is written down in the form of the facts, everything that it holds, and the two are compared whole.
Whatever the form has no place for (a default, `optional`, an unknown option) shows up as a difference too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2 as pb
from google.protobuf.message import Message

from csi_driver.rpc import addons_identity_pb2, addons_keyrotation_pb2, csi_pb2

DATA = Path(__file__).parent.parent / "data"
FACTS = DATA / "csi-interface-1.13.json"
ADDONS = DATA / "csi-addons-interface.json"
SHORT_NAMES = {
    "csi.v1.csi_secret": "csi_secret",
    "csi.v1.alpha_field": "alpha",
    "csi.v1.alpha_message": "alpha",
    "csi.v1.alpha_enum_value": "alpha",
    "csi.v1.alpha_method": "alpha",
    "csi.v1.alpha_service": "alpha",
}
Field = pb.FieldDescriptorProto
LABELS = {
    Field.LABEL_OPTIONAL: "",
    Field.LABEL_REPEATED: "repeated ",
    Field.LABEL_REQUIRED: "required ",
}
Tree = dict[str, Any]


def compiled() -> pb.FileDescriptorProto:
    file = pb.FileDescriptorProto()
    csi_pb2.DESCRIPTOR.CopyToProto(file)
    return file


def marks_of(options: Message) -> list[str]:
    """Each option that is set: ours by its short name when true, anything else in full."""
    long_names = {field.full_name: value for field, value in options.ListFields()}
    return [SHORT_NAMES.get(name, name) if value is True else f"{name}={value}" for name, value in long_names.items()]


def leftovers(proto: Message, *known: str) -> Tree:
    """What a descriptor holds beside the `known` fields."""
    return {field.name: str(value) for field, value in proto.ListFields() if field.name not in known}


def type_name(field: Field) -> str:
    if field.type in {field.TYPE_MESSAGE, field.TYPE_ENUM}:
        return field.type_name.removeprefix(".csi.v1.")
    return field.Type.Name(field.type).removeprefix("TYPE_").lower()


def field_line(field: Field, message: pb.DescriptorProto) -> str:
    """A field as the facts write it, such as `5 map<string, string> secrets [csi_secret]`."""
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    kind = LABELS[field.label] + type_name(field)
    if entry := entries.get(kind.rpartition(".")[2]):
        kind = f"map<{', '.join(type_name(part) for part in entry.field)}>"
    line = f"{field.number} {kind} {field.name}"
    if field.HasField("oneof_index"):
        line += f" oneof={message.oneof_decl[field.oneof_index].name}"
    if marks := marks_of(field.options):
        line += f" [{','.join(marks)}]"
    rest = leftovers(field, "name", "number", "label", "type", "type_name", "oneof_index", "options", "json_name")
    return f"{line} {rest}" if rest else line


def enum_tree(enum: pb.EnumDescriptorProto) -> Tree:
    marks = {value.name: marks_of(value.options) for value in enum.value if value.HasField("options")}
    return {
        "values": {value.name: value.number for value in enum.value},
        "alpha": [name for name, found in marks.items() if found == ["alpha"]],
        "reserved": [n for r in enum.reserved_range for n in range(r.start, r.end + 1)],
        **leftovers(enum, "name", "value", "reserved_range"),
        **{f"options of {name}": found for name, found in marks.items() if found != ["alpha"]},
    }


def message_tree(message: pb.DescriptorProto) -> Tree:
    parts: Tree = {
        "reserved": [n for r in message.reserved_range for n in range(r.start, r.end)],
        "options": marks_of(message.options),
        "enums": {enum.name: enum_tree(enum) for enum in message.enum_type},
        "messages": {part.name: message_tree(part) for part in message.nested_type if not part.options.map_entry},
        **leftovers(message, "name", "field", "nested_type", "enum_type", "oneof_decl", "reserved_range", "options"),
    }
    fields = [field_line(field, message) for field in message.field]
    return {"fields": fields, **{name: part for name, part in parts.items() if part}}


def method_tree(method: pb.MethodDescriptorProto) -> Tree:
    tree: Tree = {
        "request": method.input_type.removeprefix(".csi.v1."),
        "response": method.output_type.removeprefix(".csi.v1."),
        **leftovers(method, "name", "input_type", "output_type", "options", "client_streaming", "server_streaming"),
    }
    for name, part in (
        ("client_streaming", method.client_streaming),
        ("server_streaming", method.server_streaming),
        ("options", marks_of(method.options)),
    ):
        if part:
            tree[name] = part
    return tree


def extension_tree(field: Field) -> Tree:
    known = ("name", "number", "extendee", "type", "label", "json_name")
    return {
        "name": field.name,
        "number": field.number,
        "extends": field.extendee,
        "type": LABELS[field.label] + type_name(field),
        **leftovers(field, *known),
    }


def file_tree(file: pb.FileDescriptorProto) -> Tree:
    return {
        "package": file.package,
        "syntax": file.syntax,
        "imports": list(file.dependency),
        "go_package": file.options.go_package,
        "extensions": [extension_tree(field) for field in file.extension],
        "enums": {enum.name: enum_tree(enum) for enum in file.enum_type},
        "messages": {message.name: message_tree(message) for message in file.message_type},
        "services": {
            service.name: {
                "rpcs": {method.name: method_tree(method) for method in service.method},
                "options": marks_of(service.options),
            }
            for service in file.service
        },
    }


def facts() -> Tree:
    tree: Tree = json.loads(FACTS.read_text())
    assert tree.pop("spec") == "CSI 1.13.0"
    return tree


def test_descriptor_is_the_interface() -> None:
    assert file_tree(compiled()) == facts()


def test_the_addons_are_the_interface() -> None:
    told: Tree = json.loads(ADDONS.read_text())
    assert told.pop("spec") == "CSI-Addons, commit 80d74f9"
    assert told.keys() == {"identity", "encryptionkeyrotation"}
    for compiled_file in (addons_identity_pb2.DESCRIPTOR, addons_keyrotation_pb2.DESCRIPTOR):
        file = pb.FileDescriptorProto()
        compiled_file.CopyToProto(file)
        found = file_tree(file)
        del found["imports"]  # files of our own names
        assert found == told[file.package]


def test_volume_condition_stays_gone() -> None:
    """Not even facts brought up to date may bring it back."""
    assert 4 not in csi_pb2.NodeServiceCapability.RPC.Type.values()
    assert 11 not in csi_pb2.ControllerServiceCapability.RPC.Type.values()
    assert "VolumeCondition" not in csi_pb2.DESCRIPTOR.message_types_by_name


def named(items: Any, name: str) -> Any:
    return next(item for item in items if item.name == name)


def capability_enum(file: pb.FileDescriptorProto, message: str) -> pb.EnumDescriptorProto:
    found = named(named(file.message_type, message).nested_type, "RPC").enum_type[0]
    assert isinstance(found, pb.EnumDescriptorProto)
    return found


def volume_request(file: pb.FileDescriptorProto) -> pb.DescriptorProto:
    found = named(file.message_type, "CreateVolumeRequest")
    assert isinstance(found, pb.DescriptorProto)
    return found


def secrets(file: pb.FileDescriptorProto) -> Field:
    found = named(volume_request(file).field, "secrets")
    assert isinstance(found, Field)
    return found


def controller_method(file: pb.FileDescriptorProto, name: str) -> pb.MethodDescriptorProto:
    found = named(named(file.service, "Controller").method, name)
    assert isinstance(found, pb.MethodDescriptorProto)
    return found


DIFFERENCES: dict[str, Callable[[pb.FileDescriptorProto], object]] = {
    "a message is missing": lambda f: f.message_type.pop(),
    "a message is new": lambda f: f.message_type.add(name="VolumeCondition"),
    "a nested message is missing": lambda f: named(f.message_type, "VolumeContentSource").nested_type.pop(),
    "a message lost its mark": lambda f: named(f.message_type, "VolumeHealth").ClearField("options"),
    "a field is missing": lambda f: volume_request(f).field.pop(),
    "a field is new": lambda f: volume_request(f).field.add(name="more", number=9, type="TYPE_STRING"),
    "a field has another number": lambda f: setattr(secrets(f), "number", 9),
    "a field has another type": lambda f: setattr(volume_request(f).field[0], "type", Field.TYPE_BYTES),
    "a field is repeated": lambda f: setattr(volume_request(f).field[0], "label", Field.LABEL_REPEATED),
    "a field is optional": lambda f: setattr(volume_request(f).field[0], "proto3_optional", True),
    "a secret lost its mark": lambda f: secrets(f).ClearField("options"),
    "a field is deprecated": lambda f: setattr(secrets(f).options, "deprecated", True),
    "a map has another value type": lambda f: setattr(
        named(volume_request(f).nested_type, "SecretsEntry").field[1], "type", Field.TYPE_BYTES
    ),
    "a field left its oneof": lambda f: named(f.message_type, "VolumeCapability").field[0].ClearField("oneof_index"),
    "a oneof has another name": lambda f: setattr(
        named(f.message_type, "VolumeCapability").oneof_decl[0], "name", "kind"
    ),
    "a reserved field number is free": lambda f: named(f.message_type, "NodeGetVolumeStatsResponse").ClearField(
        "reserved_range"
    ),
    "a reserved value is free": lambda f: capability_enum(f, "NodeServiceCapability").ClearField("reserved_range"),
    "a reserved value is back": lambda f: capability_enum(f, "NodeServiceCapability").value.add(
        name="VOLUME_CONDITION", number=4
    ),
    "a name is reserved": lambda f: capability_enum(f, "NodeServiceCapability").reserved_name.append("OLD"),
    "an enum value is missing": lambda f: f.enum_type[0].value.pop(),
    "an enum value has another number": lambda f: setattr(f.enum_type[0].value[1], "number", 9),
    "an enum value lost its mark": lambda f: capability_enum(f, "NodeServiceCapability").value[4].ClearField("options"),
    "an enum is missing": lambda f: f.enum_type.pop(),
    "an extension is missing": lambda f: f.extension.pop(),
    "an extension has another number": lambda f: setattr(f.extension[0], "number", 1061),
    "a service is missing": lambda f: f.service.pop(),
    "a service lost its mark": lambda f: named(f.service, "SnapshotMetadata").ClearField("options"),
    "a call is missing": lambda f: named(f.service, "Node").method.pop(),
    "a call takes another message": lambda f: setattr(
        controller_method(f, "GetCapacity"), "input_type", ".csi.v1.ProbeRequest"
    ),
    "a call streams": lambda f: setattr(controller_method(f, "GetCapacity"), "client_streaming", True),
    "a stream ended": lambda f: named(f.service, "SnapshotMetadata").method[0].ClearField("server_streaming"),
    "a call lost its mark": lambda f: controller_method(f, "GetSnapshot").ClearField("options"),
}


@pytest.mark.parametrize("change", DIFFERENCES.values(), ids=DIFFERENCES)
def test_every_difference_shows(change: Callable[[pb.FileDescriptorProto], object]) -> None:
    file = compiled()
    change(file)
    assert file_tree(file) != facts()
