"""What the driver knows of a KMS that is down, comes back, or has a key that may not be used."""

from pathlib import Path

import grpc
import pytest

from csi_driver.volumes.kms_health import KmsHealth
from tests.keys import servers
from tests.keys.conftest import Make
from tests.keys.test_types import Lab


@pytest.fixture
def lab(request: pytest.FixtureRequest, sources: Make, tmp_path: Path) -> Lab:
    return Lab(request.getfixturevalue, sources, tmp_path)


def test_a_kms_that_is_down_is_known_to_be_until_it_is_back(plugin: tuple[servers.Plugin, str], sources: Make) -> None:
    kms, endpoint = plugin
    health = KmsHealth(sources(encryptionKMSType="kms-plugin", endpoint=endpoint))
    for failure, up in ((None, 1), (grpc.StatusCode.UNAVAILABLE, 0), (None, 1)):
        kms.fail = failure
        health.look()
        assert health.up() == {"kms": up}
        assert len(health.details()) == 1 - up


def test_a_key_of_aws_that_is_disabled_is_known(lab: Lab, local_kms: str, local_kms_key: str) -> None:
    health = KmsHealth(lab.aws_metadata_of_local_kms().sources)
    with servers.aws_client(local_kms) as client:
        for change, up in ((servers.enable, 1), (servers.disable, 0), (servers.enable, 1)):
            change(client, local_kms_key)
            health.look()
            assert health.up() == {"kms": up}


def test_of_one_that_needs_what_a_claim_brings_nothing_is_known_before_the_first_call(lab: Lab) -> None:
    case = lab.metadata()
    health = KmsHealth(case.sources, first=3600.0)
    health.start()
    health.look()
    assert health.up() == {}
    case.create()
    assert health.up() == {"kms": 1}
    health.ask_to_end()
    health.join()
