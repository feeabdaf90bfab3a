"""What happens around every call, one class for each concern.

grpcio asks its interceptors anew for each call. `Chain` is the only one it sees: it puts the concerns around a method
once and keeps the result, so that a call costs one look-up and the concerns themselves.
"""

import itertools
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf import descriptor_pool
from msgspec import Struct

from csi_driver.host import deadline
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.log import Log, request_id
from csi_driver.model.access import Access
from csi_driver.model.errors import DriverError
from csi_driver.model.volume import volume_id_for
from csi_driver.rpc import convert, csi_pb2
from csi_driver.rpc.redaction import shown
from csi_driver.rpc.status import code_of, text_of

Request = TypeVar("Request")
Response = TypeVar("Response")
Behaviour = Callable[[Any, grpc.ServicerContext], Any]


class Method(Struct, frozen=True):
    """A method of a service. `volume_id` finds the volume in a request, "" where it names none."""

    name: str
    service: str
    volume_id: Callable[[Any], str]


class Concern(Protocol):
    """Something that happens around calls."""

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        """`behaviour` with this concern around it; called once per method."""


class Chain(grpc.ServerInterceptor):
    """Puts concerns, the outermost first, around every method that the server serves."""

    def __init__(self, *concerns: Concern) -> None:
        self._concerns = concerns
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Request, Response] | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Request, Response] | None":
        """The handler of the method with all concerns around it; None for a method that nobody serves."""
        path = handler_call_details.method
        handler = self._handlers.get(path)
        if handler is None:
            plain = continuation(handler_call_details)
            if plain is None or plain.unary_unary is None:
                return plain
            behaviour: Behaviour = plain.unary_unary
            method = _method(path)
            for concern in reversed(self._concerns):
                behaviour = concern.around(method, behaviour)
            handler = self._handlers[path] = grpc.unary_unary_rpc_method_handler(
                behaviour, plain.request_deserializer, plain.response_serializer
            )
        return handler


class OwnThreads:
    """Gives one service threads of its own: Probe answers however many calls are at work or wait their turn."""

    def __init__(self, service: str, threads: ThreadPoolExecutor) -> None:
        self._service = service
        self._threads = threads

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        if method.service == self._service:
            vars(behaviour)["experimental_thread_pool"] = self._threads  # where grpcio looks for them
        return behaviour


class Statuses:
    """Ends a call that failed with the status of its error."""

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        def answer(request: object, context: grpc.ServicerContext) -> object:
            try:
                return behaviour(request, context)
            except Exception as error:  # noqa: BLE001 - every error becomes a status, and abort raises
                context.abort(code_of(error), text_of(error, method.name, request_id.get()))

        return answer


class CallLog:
    """Gives each call an id, which all log lines of the call carry, and one line when it has ended.

    Calls that an orchestrator repeats all day long are told at level debug. At that level the request is told as well.
    """

    _ROUTINE = frozenset(
        {
            "ControllerGetCapabilities",
            "GetCapabilities",
            "GetIdentity",
            "GetPluginCapabilities",
            "GetPluginInfo",
            "NodeGetCapabilities",
            "NodeGetInfo",
            "Probe",
        }
    )

    def __init__(self, log: Log) -> None:
        self._log = log
        self._prefix = os.urandom(3).hex()
        self._numbers = itertools.count(1)

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        name, volume_id, numbers, prefix, log = method.name, method.volume_id, self._numbers, self._prefix, self._log
        tells_requests = log.tells(logging.DEBUG)
        level = logging.DEBUG if name in self._ROUTINE else logging.INFO
        tells_success, tell = log.tells(level), log.debug if level == logging.DEBUG else log.info
        clock = time.perf_counter

        def logged(request: Any, context: grpc.ServicerContext) -> object:
            request_id.set(f"{prefix}-{next(numbers)}")
            if tells_requests:
                log.debug("request", method=name, fields=shown(request))
            started = clock()
            try:
                response = behaviour(request, context)
            except Exception as error:
                self._tell_failure(error, name, volume_id(request), clock() - started)
                raise
            if tells_success:
                seconds = round(clock() - started, 6)
                tell("call", method=name, volume_id=volume_id(request), code="OK", seconds=seconds)
            return response

        return logged

    def _tell_failure(self, error: Exception, method: str, volume_id: str, seconds: float) -> None:
        code = code_of(error)
        level = logging.INFO if code is grpc.StatusCode.ABORTED else logging.WARNING
        more: dict[str, object] = {}
        if isinstance(error, DriverError | OSError):
            more["error"] = str(error)
        if not isinstance(error, DriverError | NotImplementedError):
            # Its own text may quote a secret; its class and the way it took cannot.
            more["kind"] = type(error).__name__
            more["where"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
            ]
        self._log.log(
            level, "call", method=method, volume_id=volume_id, code=code.name, seconds=round(seconds, 6), **more
        )


class Timing:
    """Reports the method, code and duration in seconds of each call to `observe`."""

    def __init__(self, observe: Callable[[str, str, float], None]) -> None:
        self._observe = observe

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        name, observe, clock = method.name, self._observe, time.perf_counter

        def timed(request: object, context: grpc.ServicerContext) -> object:
            started = clock()
            try:
                response = behaviour(request, context)
            except Exception as error:
                observe(name, code_of(error).name, clock() - started)
                raise
            observe(name, "OK", clock() - started)
            return response

        return timed


NewId = Callable[[str, Mapping[str, str]], str]
"""The id of the volume that CreateVolume calls so, made with these parameters. Raises InvalidArgument."""


def _readers(new_id: NewId) -> Mapping[str, Callable[[Any], str]]:
    """For each method that changes a volume, which one; a request is read in full, so that it raises what is wrong."""

    def made(request: Any) -> str:
        wanted = convert.create_request(request)
        return new_id(wanted.name, wanted.parameters)

    return {
        "CreateVolume": made,
        "DeleteVolume": lambda request: convert.any_volume_id(request.volume_id),
        "ControllerExpandVolume": lambda request: convert.growth(request)[0],
        "NodeStageVolume": lambda request: convert.stage_request(request).volume_id,
        "NodeUnstageVolume": lambda request: convert.unstaging(request)[0],
        "NodePublishVolume": lambda request: convert.publish_request(request).volume_id,
        "NodeUnpublishVolume": lambda request: convert.unpublishing(request)[0],
        "NodeExpandVolume": lambda request: convert.expand_request(request).volume_id,
        "EncryptionKeyRotate": lambda request: convert.rotation(request)[0],
    }


_ATTACHING: Mapping[str, Callable[[Any], str]] = {
    "ControllerPublishVolume": lambda request: convert.attach_request(request).volume_id,
    "ControllerUnpublishVolume": lambda request: convert.detaching(request)[0],
}


class VolumeLocking:
    """Holds the volume's lock around each call that changes a volume; who comes second gets VolumeBusy.

    Nothing is locked for a request that cannot be right, nor for the methods of attaching where they are not served.
    """

    def __init__(self, locks: VolumeLocks, new_id: NewId, *, attaching: bool) -> None:
        self._locks = locks
        self._locked = {**_readers(new_id), **(_ATTACHING if attaching else {})}

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        volume_of, hold = self._locked.get(method.name), self._locks.hold
        if volume_of is None:
            return behaviour

        def locked(request: object, context: grpc.ServicerContext) -> object:
            with hold(volume_of(request)):
                return behaviour(request, context)

        return locked


class Deadlines:
    """Tells what may take several calls how long the caller of this one waits."""

    _LONG = frozenset({"CreateVolume", "ControllerExpandVolume", "NodeExpandVolume", "NodeStageVolume"})

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        if method.name not in self._LONG:
            return behaviour

        def timed(request: object, context: grpc.ServicerContext) -> object:
            with deadline.within(context.time_remaining()):
                return behaviour(request, context)

        return timed


class StorageAccess:
    """Gives what a call brings to reach storage outside the node to the backend, by `use`, ahead of the call."""

    _BRING_NOTHING = frozenset({"NodeUnstageVolume", "NodeUnpublishVolume"})

    def __init__(self, use: Callable[[str, Access], None], new_id: NewId) -> None:
        self._use = use
        self._readers: dict[str, Callable[[Any], str]] = {
            **_readers(new_id),
            **_ATTACHING,
            "ValidateVolumeCapabilities": lambda request: convert.validation(request)[0],
        }

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        volume_of, use = self._readers.get(method.name), self._use
        if volume_of is None or method.name in self._BRING_NOTHING:
            return behaviour

        def reaching(request: object, context: grpc.ServicerContext) -> object:
            use(volume_of(request), convert.access(request))
            return behaviour(request, context)

        return reaching


def _method(path: str) -> Method:
    """The method of a path, /PACKAGE.SERVICE/METHOD; who serves it has loaded its stubs."""
    found = descriptor_pool.Default().FindMethodByName(path.removeprefix("/").replace("/", "."))
    return Method(found.name, found.containing_service.name, _volume_id_of(found.input_type))


def _volume_id_of(message: Any) -> Callable[[Any], str]:
    if message is csi_pb2.CreateVolumeRequest.DESCRIPTOR:
        return lambda request: volume_id_for(request.name) if request.name else ""
    if "volume_id" in message.fields_by_name:
        found: Callable[[Any], str] = attrgetter("volume_id")
        return found
    return lambda _: ""
