#!/usr/bin/env -S python3 -IS
"""A program for KMS type `exec`: it wraps by an AES key that never leaves a PKCS#11 token. See docs/kms.md.

Called as `pkcs11.py TOKEN KEY`, two labels. The file `pkcs11.json` beside it says by the token's label which module
leads to it and which file holds the PIN: what the KMS configuration names is a token that the node knows, and no code.

The token is asked by ctypes, as PKCS #11 v2.40 defines it, so that Python's own library is all that this needs. A
wrapped key is base64 of nonce, ciphertext and tag of AES-GCM, with the key's name as additional authenticated data.
"""

import base64
import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

# Exit codes that the driver knows.
WRONG: Final = 1
KEY_LOST: Final = 3
REFUSED: Final = 4
PASSING: Final = 5

# Names and numbers of PKCS #11, without CKA_, CKF_, CKR_ and the like.
_SECRET_KEY: Final = 4
_AES: Final = 0x1F
_AES_GCM: Final = 0x1087
_CLASS, _LABEL, _KEY_TYPE, _ID = 0, 3, 0x100, 0x102
_LOGIN_REQUIRED, _PIN_FINAL_TRY, _PIN_LOCKED = 0x4, 0x20000, 0x40000
_SERIAL_SESSION: Final = 4
_USER: Final = 1
_ALREADY_LOGGED_IN: Final = 0x100
_PIN_ERRORS: Final = {
    0xA0: "it is not the token's",
    0xA1: "it has characters that the token does not take",
    0xA2: "it is too short or too long",
    0xA3: "it has expired",
    0xA4: "it is locked",
    0x102: "the token has none yet",
}
_PASSING_ERRORS: Final = {
    0x2: "no memory",
    0x30: "an error of the device",
    0x31: "no memory in the token",
    0x32: "the token was taken away",
    0xB1: "too many sessions",
    0xE0: "the token is not there",
}
_FUNCTIONS: Final = {  # places in CK_FUNCTION_LIST
    "C_Initialize": 0, "C_Finalize": 1, "C_GetSlotList": 4, "C_GetTokenInfo": 6, "C_OpenSession": 12, "C_Login": 18,
    "C_GetAttributeValue": 24, "C_FindObjectsInit": 26, "C_FindObjects": 27, "C_FindObjectsFinal": 28,
    "C_EncryptInit": 29, "C_Encrypt": 30, "C_DecryptInit": 33, "C_Decrypt": 34,
}  # fmt: skip
_NONCE, _TAG = 12, 16
_MOST_TOKENS: Final = 256
_LONGEST_KEY: Final = 4096

_ULONG = ctypes.c_ulong


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        ("label", ctypes.c_char * 32),
        ("maker_model_serial", ctypes.c_char * 64),
        ("flags", _ULONG),
        ("counts_and_sizes", _ULONG * 10),
        ("versions", ctypes.c_ubyte * 4),
        ("time", ctypes.c_char * 16),
    )


class _Attribute(ctypes.Structure):
    _fields_ = (("type", _ULONG), ("value", ctypes.c_void_p), ("length", _ULONG))


class _Mechanism(ctypes.Structure):
    _fields_ = (("type", _ULONG), ("parameter", ctypes.c_void_p), ("length", _ULONG))


class _GcmParameters(ctypes.Structure):
    _fields_ = (
        ("nonce", ctypes.c_char_p), ("nonce_length", _ULONG), ("nonce_bits", _ULONG),
        ("additional", ctypes.c_char_p), ("additional_length", _ULONG), ("tag_bits", _ULONG),
    )  # fmt: skip


class Refusal(Exception):
    """Why it cannot be done, in a short sentence without any secret, and the exit code that tells the kind."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code = code


class Module:
    """A PKCS#11 module, from its file."""

    def __init__(self, path: str) -> None:
        try:
            get_list = ctypes.CDLL(path).C_GetFunctionList
        except (OSError, AttributeError):
            raise Refusal(WRONG, f"{path} is no PKCS#11 module that can be loaded; install it, or correct it") from None
        table = ctypes.POINTER(ctypes.c_void_p)()
        if get_list(ctypes.byref(table)):
            raise Refusal(WRONG, f"the PKCS#11 module {path} tells no functions; install another one")
        # CK_FUNCTION_LIST: a version, padded to the size of a pointer, then the functions.
        kind = ctypes.CFUNCTYPE(_ULONG)
        self._functions = {name: kind(table[1 + place] or 0) for name, place in _FUNCTIONS.items()}

    def ask(self, name: str, *arguments: Any) -> int:
        """Call a function; its CK_RV. Integers go as CK_ULONG."""
        return int(self._functions[name](*(_ULONG(each) if isinstance(each, int) else each for each in arguments)))

    def do(self, name: str, *arguments: Any) -> None:
        """Call a function that must succeed. Raises Refusal."""
        if code := self.ask(name, *arguments):
            raise _failure(name, code)


class Token:
    """A token with a session in which keys can be used."""

    def __init__(self, module: Module, label: str, session: int) -> None:
        self._module = module
        self._label = label
        self._session = session

    def key(self, label: str, key_id: str = "") -> tuple[int, str]:
        """The one AES key of that label (and id, where one is given, in hexadecimal): its handle and id."""
        wanted = [_attribute(_CLASS, _SECRET_KEY), _attribute(_KEY_TYPE, _AES), _attribute(_LABEL, label.encode())]
        if key_id:
            wanted.append(_attribute(_ID, bytes.fromhex(key_id)))
        found = self._found(wanted)
        if len(found) > 1:
            raise Refusal(WRONG, f"the token {self._label} has {len(found)} AES keys {label}; give each its own label")
        if not found:
            which = f"{label} with the id {key_id}" if key_id else label
            raise Refusal(
                KEY_LOST, f"the token {self._label} has no AES key {which}; put it back, or correct the label"
            )
        return found[0], self._id(found[0])

    def encrypt(self, key: int, name: str, plain: bytes) -> bytes:
        """Nonce, ciphertext and tag."""
        nonce = os.urandom(_NONCE)
        self._begin("C_EncryptInit", key, nonce, name)
        return nonce + self._run("C_Encrypt", plain, len(plain) + _TAG)

    def decrypt(self, key: int, name: str, sealed: bytes) -> bytes:
        """What `encrypt` was given. Raises Refusal when it was not for `name`, or not by this key."""
        self._begin("C_DecryptInit", key, sealed[:_NONCE], name)
        return self._run("C_Decrypt", sealed[_NONCE:], len(sealed))

    def _found(self, wanted: list[_Attribute]) -> list[int]:
        self._module.do("C_FindObjectsInit", self._session, (_Attribute * len(wanted))(*wanted), len(wanted))
        handles, count = (_ULONG * 16)(), _ULONG()
        self._module.do("C_FindObjects", self._session, handles, len(handles), ctypes.byref(count))
        self._module.do("C_FindObjectsFinal", self._session)
        return list(handles[: count.value])

    def _id(self, key: int) -> str:
        value = ctypes.create_string_buffer(256)
        asked = _Attribute(_ID, ctypes.addressof(value), len(value))
        self._module.do("C_GetAttributeValue", self._session, key, ctypes.byref(asked), 1)
        return value.raw[: asked.length].hex()

    def _begin(self, name: str, key: int, nonce: bytes, additional: str) -> None:
        data = additional.encode()
        parameters = _GcmParameters(nonce, len(nonce), 8 * len(nonce), data, len(data), 8 * _TAG)
        mechanism = _Mechanism(_AES_GCM, ctypes.addressof(parameters), ctypes.sizeof(parameters))
        self._module.do(name, self._session, ctypes.byref(mechanism), key)

    def _run(self, name: str, content: bytes, room: int) -> bytes:
        result, length = ctypes.create_string_buffer(room), _ULONG(room)
        code = self._module.ask(name, self._session, content, len(content), result, ctypes.byref(length))
        if code and name == "C_Decrypt" and code not in _PASSING_ERRORS:
            # Which code says that the tag is wrong, each maker decides.
            raise Refusal(
                KEY_LOST,
                f"the token {self._label} does not unwrap the key (0x{code:x}): it is damaged, or another volume's or "
                f"key's; restore the record from a backup",
            )
        if code:
            raise _failure(name, code)
        return result.raw[: length.value]


@contextmanager
def opened(module: Module, label: str, pin_file: str) -> Iterator[Token]:
    """The token of that label, logged in. Raises Refusal."""
    module.do("C_Initialize", None)
    try:
        slot, flags = _slot(module, label)
        session = _ULONG()
        module.do("C_OpenSession", slot, _SERIAL_SESSION, None, None, ctypes.byref(session))
        if flags & _LOGIN_REQUIRED:
            _log_in(module, label, session.value, flags, pin_file)
        yield Token(module, label, session.value)
    finally:
        module.ask("C_Finalize", None)  # which logs out


def _slot(module: Module, label: str) -> tuple[int, int]:
    slots, count = (_ULONG * _MOST_TOKENS)(), _ULONG(_MOST_TOKENS)
    module.do("C_GetSlotList", ctypes.c_ubyte(1), slots, ctypes.byref(count))
    found = []
    for slot in slots[: count.value]:
        info = _TokenInfo()
        code = module.ask("C_GetTokenInfo", slot, ctypes.byref(info))
        if not code and info.label.rstrip(b" ") == label.encode():
            found.append((slot, info.flags))
    if len(found) > 1:
        raise Refusal(WRONG, f"there are {len(found)} tokens {label}; give each its own label")
    if not found:
        raise Refusal(PASSING, f"no token {label} is there; plug it in or start what leads to it, or correct the label")
    return found[0]


def _log_in(module: Module, label: str, session: int, flags: int, pin_file: str) -> None:
    # Kubernetes repeats what fails, and so a wrong PIN would be tried until the token is locked.
    if flags & _PIN_FINAL_TRY and not flags & _PIN_LOCKED:
        raise Refusal(
            REFUSED,
            f"one more wrong PIN would lock the token {label}, so none was tried; correct {pin_file}, then log in once "
            f"by hand (pkcs11-tool --login)",
        )
    pin = _content(pin_file, "the PIN file").rstrip(b"\r\n")
    code = module.ask("C_Login", session, _USER, pin, len(pin))
    if code in _PIN_ERRORS:
        raise Refusal(
            REFUSED, f"the token {label} refuses the PIN in {pin_file}: {_PIN_ERRORS[code]}; correct it there"
        )
    if code and code != _ALREADY_LOGGED_IN:
        raise _failure("C_Login", code)


def _attribute(kind: int, value: int | bytes) -> _Attribute:
    if isinstance(value, int):
        number = _ULONG(value)
        made = _Attribute(kind, ctypes.addressof(number), ctypes.sizeof(number))
        made.kept = number  # what it points to lives as long as it does
        return made
    text = ctypes.create_string_buffer(value, len(value))
    made = _Attribute(kind, ctypes.addressof(text), len(value))
    made.kept = text
    return made


def _failure(name: str, code: int) -> Refusal:
    if code in _PASSING_ERRORS:
        return Refusal(PASSING, f"{name} failed with 0x{code:x}, {_PASSING_ERRORS[code]}; look at the token")
    return Refusal(WRONG, f"{name} failed with 0x{code:x}; the token and its key must do AES-GCM (CKM_AES_GCM)")


def _content(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 16)
    except OSError as error:
        raise Refusal(WRONG, f"{what} {path} cannot be read ({os.strerror(error.errno or 0)}); put it there") from None


def _settings(path: str, token: str) -> tuple[str, str]:
    """Module and PIN file of a token; what the module wants in its environment is put there."""
    try:
        entry = json.loads(_content(path, "the settings"))[token]
        module, pin_file, environment = entry["module"], entry["pinFile"], entry.get("environment", {})
        os.environ.update(environment)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refusal(WRONG, f"{path} must say module and pinFile of the token {token}, in JSON; add them") from None
    return module, pin_file


def _wrap(token: Token, label: str, asked: Mapping[str, str]) -> dict[str, str]:
    key, key_id = token.key(label)
    sealed = token.encrypt(key, asked["name"], base64.b64decode(asked["key"]))
    return {"wrapped": base64.b64encode(sealed).decode(), "key_id": label, "key_version": key_id}


def _unwrap(token: Token, _label: str, asked: Mapping[str, str]) -> dict[str, str]:
    try:
        sealed = base64.b64decode(asked["wrapped"], validate=True)
    except ValueError:
        sealed = b""
    if not _NONCE + _TAG < len(sealed) <= _LONGEST_KEY:
        raise Refusal(KEY_LOST, "the wrapped key is none of this program, or was cut; restore the record from a backup")
    # The one that it was wrapped with, which a change of the entry's label leaves as it is.
    key, _ = token.key(asked["key_id"], asked["key_version"])
    return {"key": base64.b64encode(token.decrypt(key, asked["name"], sealed)).decode()}


def _check(token: Token, label: str, _asked: Mapping[str, str]) -> dict[str, str]:
    key, _ = token.key(label)
    token.decrypt(key, "check", token.encrypt(key, "check", bytes(32)))
    return {}


_OPERATIONS: Final[Mapping[str, Callable[[Token, str, Mapping[str, str]], dict[str, str]]]] = {
    "wrap": _wrap, "unwrap": _unwrap, "check": _check,
}  # fmt: skip


def main() -> int:
    """Answer the question on standard input; the exit code tells how it went."""
    try:
        if len(sys.argv) != 3:
            raise Refusal(WRONG, 'the KMS entry must have "arguments": [TOKEN, KEY], two labels')
        token_label, key_label = sys.argv[1:]
        asked = json.load(sys.stdin)
        here = os.path.dirname(os.path.abspath(__file__))
        module, pin_file = _settings(os.path.join(here, "pkcs11.json"), token_label)
        with opened(Module(module), token_label, pin_file) as token:
            answer = _OPERATIONS[asked["operation"]](token, key_label, asked)
    except Refusal as refusal:
        sys.stderr.write(f"{refusal}\n")
        return refusal.code
    except (ValueError, KeyError, TypeError):
        sys.stderr.write("the question is none of the driver's: look which version of it asks\n")
        return WRONG
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
