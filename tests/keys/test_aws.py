"""Keys of AWS KMS that may not be used, at local-kms: moto wraps and unwraps by them all the same."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from csi_driver.keys.aws import Account, AwsWrapper
from csi_driver.keys.base import Wrapping
from csi_driver.model.errors import DriverError, KeyLost
from csi_driver.rpc.status import code_of
from tests.keys import servers
from tests.keys.given import GivenSources
from tests.keys.test_types import NAME, REQUEST, Case

STATES = {
    "disabled": (servers.disable, servers.enable, "DisabledException", "Disabled"),
    "about to be deleted": (
        servers.begin_deletion,
        servers.cancel_deletion,
        "KMSInvalidStateException",
        "PendingDeletion",
    ),
}


Made = Callable[..., Case]


@pytest.fixture
def of_key(local_kms: str) -> Iterator[Made]:
    """Makes a source that wraps by that key."""
    with ExitStack() as stack:

        def make(key: str, region: str = servers.REGION) -> Case:
            account = Account(region, key, servers.AWS_CREDENTIALS, local_kms)
            source = Wrapping(AwsWrapper("KMS kms (aws-metadata)", lambda: account))
            stack.callback(source.close)
            return Case(GivenSources(kms=source), "given")

        yield make


@pytest.fixture
def case(of_key: Made, local_kms_key: str) -> Case:
    return of_key(local_kms_key)


@pytest.mark.parametrize("state", STATES)
def test_a_key_that_may_not_be_used_refuses_until_it_may(
    state: str, local_kms: str, local_kms_key: str, case: Case
) -> None:
    take_away, give_back, said, shown = STATES[state]
    trail = case.create()
    key = case.fetch(trail)
    with servers.aws_client(local_kms) as client:
        take_away(client, local_kms_key)
        asked: list[Callable[[], Any]] = [
            lambda: case.create(f"{NAME}.other"),
            lambda: case.fetch(trail),
            lambda: case.sources.rewrap(trail, REQUEST),
        ]
        for ask in asked:
            with pytest.raises(DriverError) as caught:
                ask()
            assert type(caught.value) is KeyLost
            assert code_of(caught.value).name == "FAILED_PRECONDITION"
            assert str(caught.value) == (
                f"the key of KMS kms (aws-metadata) cannot be used ({said}); enable it, or restore it before it is "
                f"deleted (AWS KMS keeps deleted keys for a while)"
            )
        with pytest.raises(KeyLost, match=f"the key of KMS kms .aws-metadata. is {shown}; enable it, or restore it"):
            case.check()
        give_back(client, local_kms_key)
    assert case.fetch(trail) == key
    case.check()


def test_a_key_that_never_was_is_told(of_key: Made, local_kms_key: str, case: Case) -> None:
    gone = local_kms_key.replace(local_kms_key[-4:], "0000")
    trail = case.create()
    with pytest.raises(KeyLost, match="NotFoundException"):
        of_key(gone).create()
    with pytest.raises(KeyLost, match="NotFoundException"):
        case.fetch(msgspec.structs.replace(trail, key_id=gone))


def test_the_key_of_an_earlier_entry_unwraps_what_it_wrapped(local_kms: str, of_key: Made, case: Case) -> None:
    trail = case.create()
    later = of_key(servers.aws_key(local_kms))
    assert later.fetch(trail) == case.fetch(trail)
    fresh = later.sources.rewrap(trail, REQUEST)
    assert fresh.key_id != trail.key_id
    assert later.fetch(fresh) == case.fetch(trail)


def test_a_trail_whose_key_has_another_arn_here_is_unwrapped_by_what_it_says_itself(
    of_key: Made, local_kms_key: str, case: Case
) -> None:
    trail = case.create()
    elsewhere = of_key(local_kms_key, "eu-west-1")
    assert elsewhere.fetch(trail) == case.fetch(trail)
    unnamed = msgspec.structs.replace(trail, key_id="")
    assert case.fetch(unnamed) == case.fetch(trail)


def test_what_is_of_another_volume_or_damaged_does_not_unwrap(case: Case) -> None:
    trail = case.create()
    for spoilt in (
        msgspec.structs.replace(trail, name="pvc-2"),
        msgspec.structs.replace(trail, wrapped=trail.wrapped[:-8]),
    ):
        with pytest.raises(KeyLost, match=r"does not unwrap the volume's key .InvalidCiphertextException"):
            case.fetch(spoilt)
        with pytest.raises(KeyLost, match=r"does not unwrap the volume's key .InvalidCiphertextException"):
            case.sources.rewrap(spoilt, REQUEST)
