"""Messages for the log, without the fields that csi.proto marks as secret."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from csi_driver.rpc import csi_pb2

Show = Callable[[Any], object]


def shown(message: Message) -> dict[str, object]:
    """The fields that are set, by name, at every depth without those that carry the option csi_secret.

    Decided by the option, so that a secret field of tomorrow's CSI is left out too; unknown fields are left out.
    """
    plan = _plan(message.DESCRIPTOR)
    return {
        field.name: show(value) for field, value in message.ListFields() if (show := plan.get(field.name)) is not None
    }


@functools.cache  # once per type of message: the options of a field are slow to read
def _plan(descriptor: Descriptor) -> Mapping[str, Show]:
    return {
        field.name: _show(field) for field in descriptor.fields if not field.GetOptions().Extensions[csi_pb2.csi_secret]
    }


def _show(field: FieldDescriptor) -> Show:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        one = _show_one(kind.fields_by_name["value"])
        return lambda entries: {str(key): one(value) for key, value in entries.items()}
    one = _show_one(field)
    if field.is_repeated:
        return lambda values: [one(value) for value in values]
    return one


def _show_one(field: FieldDescriptor) -> Show:
    if field.message_type is not None:
        return shown
    if (kind := field.enum_type) is not None:
        names = {number: value.name for number, value in kind.values_by_number.items()}
        return lambda number: names.get(number, number)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return lambda value: f"{len(value)} bytes"
    return lambda value: value
