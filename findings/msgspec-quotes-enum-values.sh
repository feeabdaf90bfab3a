#!/bin/sh
# An error of msgspec tells types and never the value, but for an enum or a Literal: of those it quotes what it was given,
# whole.
#
# Version:  msgspec 0.22.0.
# Expected: what is of the wrong type, too long or of no match is told by the place and what was expected ("Expected `int`,
#           got `str` - at `$.size`"), so that an error may be logged although a document holds secrets.
# Seen:     so it is for numbers, patterns, lengths, UUIDs, dates, base64 and structs. "Invalid enum value '<the text>'" has
#           the whole text, however long, whether an Enum or a Literal was wanted; and so has what is said of an unknown
#           tag of a union and, with forbid_unknown_fields, of an unknown field. A key that slipped into the wrong line of
#           a document is in the log then.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet msgspec==0.22.0 || exit 2
cat >try.py <<'PY'
import datetime
import enum
import uuid
from typing import Annotated, Literal

import msgspec

VALUE = "a-passphrase-that-is-in-the-wrong-line" + "-" * 200


class Colour(enum.Enum):
    RED = "red"


class Base(msgspec.Struct, tag_field="kind"):
    pass


class One(Base, tag="one"):
    pass


class Two(Base, tag="two"):
    pass


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    known: int = 0


QUIET = {
    "int": int,
    "bool": bool,
    "pattern": Annotated[str, msgspec.Meta(pattern="^x$")],
    "length": Annotated[str, msgspec.Meta(max_length=3)],
    "uuid": uuid.UUID,
    "datetime": datetime.datetime,
    "bytes": bytes,
    "struct": Strict,
}
TELLING = {"Enum": Colour, "Literal": Literal["red", "green"]}


def said(content, kind):
    try:
        msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        return str(error)
    raise SystemExit(2)


text = msgspec.json.encode(VALUE)
quiet = {name: VALUE not in said(text, kind) for name, kind in QUIET.items()}
telling = {name: VALUE in said(text, kind) for name, kind in TELLING.items()}
telling["tag"] = VALUE in said(msgspec.json.encode({"kind": VALUE}), One | Two)
telling["unknown field"] = VALUE in said(msgspec.json.encode({VALUE: 1}), Strict)
print("without the value:", *(name for name, held in quiet.items() if held))
print("with the value:", *(name for name, held in telling.items() if held))
raise SystemExit(0 if all(quiet.values()) and all(telling.values()) else 1)
PY
venv/bin/python try.py
