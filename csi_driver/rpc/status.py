"""Errors as gRPC status: the one table, and the words for what nobody foresaw."""

import errno
import os
from collections.abc import Mapping

import grpc

from csi_driver.model import errors

CODES: Mapping[type[Exception], grpc.StatusCode] = {
    errors.DriverError: grpc.StatusCode.INTERNAL,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.InvalidToken: grpc.StatusCode.ABORTED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.CommandFailed: grpc.StatusCode.INTERNAL,
    # What the generated servicers raise for a call that this driver leaves out.
    NotImplementedError: grpc.StatusCode.UNIMPLEMENTED,
}
"""Of an error's class and its bases the most derived one that is here decides."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_DESCRIPTORS = {
    errno.EMFILE: "the driver has as many files open as it may have (ulimit -n)",
    errno.ENFILE: "this node has as many files open as it may have (fs.file-max)",
}


def code_of(error: Exception) -> grpc.StatusCode:
    """The code of any error; INTERNAL for what is neither in the table nor about room or open files."""
    for base in type(error).__mro__:
        if (code := CODES.get(base)) is not None:
            return code
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, OSError) and error.errno in _NO_DESCRIPTORS:
        return grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INTERNAL


def text_of(error: Exception, method: str, request_id: str) -> str:
    """One sentence for the caller.

    An error that was not raised on purpose may quote what it was given, secrets among it: of those only the kind is
    told, and where to find the place in the log.
    """
    if isinstance(error, errors.DriverError):
        return str(error)
    if isinstance(error, NotImplementedError):
        return f"this driver does not offer {method}"
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"{method} failed: {os.strerror(error.errno)} in the driver's state directory; free space there"
    if isinstance(error, OSError) and error.errno in _NO_DESCRIPTORS:
        return f"{method} failed: {_NO_DESCRIPTORS[error.errno]}; raise that limit, or call again later"
    if isinstance(error, OSError) and error.errno is not None:
        kind = f"a system call ended with {errno.errorcode.get(error.errno, error.errno)}, {os.strerror(error.errno)}"
    else:
        kind = f"{type(error).__name__}, which nobody foresaw"
    return f"{method} failed: {kind}; the driver's log tells where, look for request {request_id}"
