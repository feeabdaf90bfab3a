"""What tests of a running server share."""

import threading
from collections.abc import Callable

import pytest

from csi_driver.rpc.client import RemoteError, RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from tests.fakes import FakeUseCases

MOUNT = Capability(mode=AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4", mount_flags=("noatime",))
BLOCK = Capability(mode=AccessMode.SINGLE_NODE_MULTI_WRITER, block=True)
VOLUME = RemoteVolume("pvc-1", 1 << 20, {"encrypted": "true"})
SECRETS = {"CRYPTO_KEY_VALUE": "correct horse"}
SECONDS = 20.0

Run = Callable[..., FakeUseCases]


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(RemoteError) as raised:
        call()
    return raised.value.code


class Gate:
    """Keeps calls at work until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self, _: object) -> None:
        self.entered.release()
        assert self.opened.wait(SECONDS)


def in_background(call: Callable[[], object]) -> Callable[[], object]:
    """Start `call` in a thread; the result waits for it and returns or raises what it did."""
    outcome: list[object] = []

    def keep() -> None:
        try:
            outcome.append(call())
        except RemoteError as error:
            outcome.append(error)

    thread = threading.Thread(target=keep)
    thread.start()

    def result() -> object:
        thread.join(SECONDS)
        assert outcome, "the call does not end"
        return outcome[0]

    return result
