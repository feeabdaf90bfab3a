"""A server that can be killed at any step: forked, with an injector around every step of its host.

It carries out the use cases that come over a socket pair, each under the volume's lock as the gRPC interceptors do it.
gRPC itself is left out: what is cut here lies below it, and a gRPC server takes 0.7 s to come up in the guest, where a
fork of a process that has everything loaded takes 0.1 s, which is what makes it affordable to kill hundreds of them.
Workers and commands are children of the killed process and survive it, as they do in life.
"""

import os
import pickle
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from csi_driver.cli.logs import configure_logs
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import DriverError
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import LogFormat, Settings
from csi_driver.volumes.attachment import AttachRequest
from csi_driver.volumes.driver import Driver, build_driver
from csi_driver.volumes.expand import ExpandRequest
from csi_driver.volumes.provision import CreateRequest
from csi_driver.volumes.publish import PublishRequest
from csi_driver.volumes.stage import StageRequest
from tests.machine.fault_api import faulty_csi
from tests.machine.fault_points import Begun, Ended, Fault, Fired, Injector, faulty_host

_CALL_SECONDS = 60.0
_MESSAGE_BYTES = 64 * 1024


@dataclass(frozen=True)
class GrowRequest:
    """ControllerExpandVolume."""

    volume_id: str
    required_bytes: int


@dataclass(frozen=True)
class UnpublishRequest:
    """NodeUnpublishVolume."""

    volume_id: str
    target_path: str


@dataclass(frozen=True)
class UnstageRequest:
    """NodeUnstageVolume."""

    volume_id: str
    staging_path: str


@dataclass(frozen=True)
class RotateRequest:
    """`luks-csi keys rotate`; `new` is the new passphrase where the volume opens with one."""

    volume_id: str
    secret: SecretKey
    new: Passphrase | None


@dataclass(frozen=True)
class DetachRequest:
    """ControllerUnpublishVolume."""

    volume_id: str
    node_id: str


@dataclass(frozen=True)
class DeleteRequest:
    """DeleteVolume."""

    volume_id: str


Request = (
    CreateRequest
    | AttachRequest
    | StageRequest
    | PublishRequest
    | GrowRequest
    | ExpandRequest
    | UnpublishRequest
    | UnstageRequest
    | RotateRequest
    | DetachRequest
    | DeleteRequest
)
Build = Callable[[Settings, Injector], Driver]


@dataclass(frozen=True)
class Failure:
    """How a call failed: the names of the error's class and its bases, and its text."""

    classes: tuple[str, ...]
    text: str

    @property
    def passes_by_itself(self) -> bool:
        """Whether the answer was ABORTED: call again."""
        return "Aborted" in self.classes

    @property
    def on_purpose(self) -> bool:
        """Whether the caller gets a status: a driver's error, or an errno that the status table knows."""
        return "DriverError" in self.classes or "OSError" in self.classes

    def __str__(self) -> str:
        return f"{self.classes[0]}: {self.text}"


@dataclass(frozen=True)
class Outcome:
    """What came of a call. `died` is a server that was killed, `hung` one that did not answer in time."""

    steps: tuple[Begun, ...] = ()
    ended: tuple[Ended, ...] = ()
    failure: Failure | None = None
    fired: bool = False
    died: bool = False
    hung: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether the call returned."""
        return not (self.failure or self.died or self.hung)


def faulty_driver(settings: Settings, injector: Injector) -> Driver:
    """The driver as it is, on a host that can fail."""
    host = faulty_host(injector)
    if settings.backend == "csi":
        host = replace(host, backend=faulty_csi(settings, host, injector))
    return build_driver(settings, host)


class FaultServer:
    """A forked server that has started; `log` takes what it logs."""

    def __init__(self, settings: Settings, build: Build, log: Path) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._socket.close()
                _become(log)
                _serve(theirs, settings, build)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        outcome = self._answer()
        if not outcome.succeeded:
            raise RuntimeError(f"no server could be started: {outcome}; see {log}")

    def call(self, request: Request, fault: Fault | None = None) -> Outcome:
        """Have it carry out a call; it is gone when the outcome says `died` or `hung`."""
        self._socket.send(pickle.dumps((request, fault)))
        return self._answer()

    def kill(self) -> None:
        """End it by SIGKILL; repeating is fine."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _answer(self) -> Outcome:
        steps: list[Begun] = []
        ended: list[Ended] = []
        fired = False
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        while poller.poll(_CALL_SECONDS * 1000):
            try:
                message = self._socket.recv(_MESSAGE_BYTES)
            except ConnectionResetError:
                message = b""
            if not message:
                self.kill()
                return Outcome(tuple(steps), tuple(ended), fired=fired, died=True)
            match pickle.loads(message):  # noqa: S301 - from our own child
                case Begun() as step:
                    steps.append(step)
                case Ended() as end:
                    ended.append(end)
                case Fired():
                    fired = True
                case failure:
                    return Outcome(tuple(steps), tuple(ended), failure, fired=fired)
        self.kill()
        return Outcome(tuple(steps), tuple(ended), fired=fired, hung=True)


def _become(log: Path) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    configure_logs(LogFormat.TEXT, "debug", descriptor)


def _serve(socket_: socket.socket, settings: Settings, build: Build) -> None:
    injector = Injector(lambda message: socket_.sendall(pickle.dumps(message)))
    driver = build(settings, injector)
    driver.start()
    socket_.sendall(pickle.dumps(None))
    while message := socket_.recv(_MESSAGE_BYTES):
        request, fault = pickle.loads(message)  # noqa: S301 - from our own parent
        injector.arm(fault)
        answer: Failure | None = None
        try:
            with driver.locks.hold(_volume_id(driver, request)):
                _perform(driver, request)
        except Exception as error:  # noqa: BLE001 - a server answers whatever happens
            answer = Failure(
                tuple(base.__name__ for base in type(error).__mro__),
                str(error) if isinstance(error, DriverError) else repr(error),
            )
        socket_.sendall(pickle.dumps(answer))


def _volume_id(driver: Driver, request: Request) -> str:
    if isinstance(request, CreateRequest):
        return driver.provisioning.new_id(request.name, request.parameters)
    return request.volume_id


def _perform(driver: Driver, request: Request) -> None:
    match request:
        case StageRequest():
            driver.staging.stage(request)
        case PublishRequest():
            driver.publishing.publish(request)
        case ExpandRequest():
            driver.expansion.expand(request)
        case UnpublishRequest():
            driver.publishing.unpublish(request.volume_id, request.target_path)
        case UnstageRequest():
            driver.staging.unstage(request.volume_id, request.staging_path)
        case _:
            _perform_without_a_node(driver, request)


def _perform_without_a_node(driver: Driver, request: Request) -> None:
    match request:
        case CreateRequest():
            driver.provisioning.create(request)
        case AttachRequest():
            assert driver.attachments is not None
            driver.attachments.attach(request)
        case GrowRequest():
            driver.provisioning.expand(request.volume_id, request.required_bytes, 0)
        case RotateRequest():
            driver.rekeying.rotate(request.volume_id, request.secret, request.new)
        case DetachRequest():
            assert driver.attachments is not None
            driver.attachments.detach(request.volume_id, request.node_id)
        case DeleteRequest():
            driver.provisioning.delete(request.volume_id)
