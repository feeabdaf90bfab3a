"""Errors become status codes by the table of docs/architecture.md, "Errors"."""

import errno
import inspect

import grpc
import pytest

from csi_driver.model import errors
from csi_driver.rpc.status import CODES, code_of, text_of

Code = grpc.StatusCode
TABLE = {
    errors.InvalidArgument: Code.INVALID_ARGUMENT,
    errors.OutOfRange: Code.OUT_OF_RANGE,
    errors.NotFound: Code.NOT_FOUND,
    errors.AlreadyExists: Code.ALREADY_EXISTS,
    errors.Unauthenticated: Code.UNAUTHENTICATED,
    errors.FailedPrecondition: Code.FAILED_PRECONDITION,
    errors.PermissionDenied: Code.PERMISSION_DENIED,
    errors.KeyLost: Code.FAILED_PRECONDITION,
    errors.KeyNeeded: Code.FAILED_PRECONDITION,
    errors.DeviceMismatch: Code.FAILED_PRECONDITION,
    errors.DeviceAbsent: Code.FAILED_PRECONDITION,
    errors.DeviceShort: Code.FAILED_PRECONDITION,
    errors.DeviceUnreadable: Code.FAILED_PRECONDITION,
    errors.DeviceBlank: Code.FAILED_PRECONDITION,
    errors.ForeignSignature: Code.FAILED_PRECONDITION,
    errors.InvalidHeader: Code.FAILED_PRECONDITION,
    errors.MappingMismatch: Code.FAILED_PRECONDITION,
    errors.DeviceInUse: Code.FAILED_PRECONDITION,
    errors.Aborted: Code.ABORTED,
    errors.Stopped: Code.ABORTED,
    errors.VolumeBusy: Code.ABORTED,
    errors.Stopped: Code.ABORTED,
    errors.InvalidToken: Code.ABORTED,
    errors.ResourceExhausted: Code.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
    errors.Unavailable: Code.UNAVAILABLE,
    errors.CommandFailed: Code.INTERNAL,
}
SECRET = "correct horse battery staple"


def test_every_error_of_the_driver_has_the_code_of_the_table() -> None:
    found = [one for _, one in inspect.getmembers(errors, inspect.isclass)]
    classes = [one for one in found if issubclass(one, errors.DriverError) and one is not errors.DriverError]
    assert len(classes) == len(found) - 1
    assert {one: code_of(one("")) for one in classes} == TABLE


def test_every_situation_right_below_the_base_is_decided_on_its_own() -> None:
    direct = {one for one in errors.DriverError.__subclasses__() if one.__module__ == errors.__name__}
    assert direct <= set(CODES)


def test_the_most_derived_class_wins() -> None:
    class PassingBusyness(errors.VolumeBusy, errors.NotFound):
        pass

    assert code_of(PassingBusyness("")) is Code.ABORTED


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_resource_exhausted_and_says_so(number: int) -> None:
    error = OSError(number, "full", f"/state/{SECRET}")
    assert code_of(error) is Code.RESOURCE_EXHAUSTED
    assert "free space" in text_of(error, "CreateVolume", "ab-1")
    assert SECRET not in text_of(error, "CreateVolume", "ab-1")


@pytest.mark.parametrize(("number", "limit"), [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max")])
def test_a_limit_of_open_files_is_named(number: int, limit: str) -> None:
    error = OSError(number, "Too many open files", "/a/path")
    assert code_of(error) is Code.UNAVAILABLE
    said = text_of(error, "NodeStageVolume", "ab-1")
    assert limit in said
    assert "raise that limit" in said
    assert "/a/path" not in said


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "bad", SECRET), OSError(SECRET), ValueError(SECRET), KeyError(SECRET)]
)
def test_what_nobody_foresaw_is_internal_and_quotes_nothing(error: Exception) -> None:
    assert code_of(error) is Code.INTERNAL
    text = text_of(error, "NodeStageVolume", "ab-1")
    assert SECRET not in text
    assert "NodeStageVolume" in text
    assert "ab-1" in text


def test_a_call_that_is_left_out_is_unimplemented() -> None:
    assert code_of(NotImplementedError()) is Code.UNIMPLEMENTED
    assert text_of(NotImplementedError(), "CreateSnapshot", "") == "this driver does not offer CreateSnapshot"


def test_the_text_of_our_own_errors_is_theirs_and_fits_a_header() -> None:
    assert text_of(errors.NotFound("volume v does not exist"), "X", "") == "volume v does not exist"
    assert len(text_of(errors.CommandFailed("x" * 100_000), "X", "").encode()) < 8192
