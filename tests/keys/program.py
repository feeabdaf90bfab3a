"""A program for KMS type exec, with a key of its own beside it."""

import os
import sys
from pathlib import Path

_PROGRAM = """#!{python} -IS
import base64, hashlib, hmac, json, os, sys
key = open({key!r}, "rb").read()
asked = json.load(sys.stdin)
def stream(nonce, length):
    return hashlib.shake_256(key + nonce).digest(length)
def tag(*parts):
    return hmac.new(key, b"".join(parts), "sha256").digest()
if asked["operation"] == "wrap":
    nonce, inside = os.urandom(16), base64.b64decode(asked["key"])
    sealed = bytes(a ^ b for a, b in zip(inside, stream(nonce, len(inside))))
    whole = nonce + tag(nonce, sealed, asked["name"].encode()) + sealed
    print(json.dumps({{"wrapped": base64.b64encode(whole).decode(), "key_id": "key"}}))
elif asked["operation"] == "unwrap":
    whole = base64.b64decode(asked["wrapped"])
    nonce, found, sealed = whole[:16], whole[16:48], whole[48:]
    if found != tag(nonce, sealed, asked["name"].encode()):
        print("it was wrapped for another volume, or not by me", file=sys.stderr)
        sys.exit(3)
    inside = bytes(a ^ b for a, b in zip(sealed, stream(nonce, len(sealed))))
    print(json.dumps({{"key": base64.b64encode(inside).decode()}}))
else:
    print("{{}}")
"""


def program(folder: Path, name: str = "wrap-key", secret: bytes = b"") -> Path:
    """Make the program in `folder`; it needs nothing but Python's own library, and starts fast.

    Its key is `secret`, by default a random one.
    """
    key = folder / f"{name}.key"
    key.write_bytes(secret or os.urandom(32))
    path = folder / name
    path.write_text(_PROGRAM.format(python=sys.executable, key=str(key)))
    path.chmod(0o755)
    return path
