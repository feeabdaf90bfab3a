"""Encryption in place that was cut goes on with the key that it was begun with, and no other."""

import pytest

from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail
from csi_driver.volumes.conversion_begin import refuse_another_key

OF_KMS = KeyTrail(kms_id="x-1", type="exec", name="data.1", wrapped="w")
GENERATED_KEY = KeyTrail(kms_id="", type="kubernetes-secret", name="data.1")
PASSPHRASE, NONE = SecretKey(Passphrase(b"plain oak table")), SecretKey(None)


@pytest.mark.parametrize(
    ("trail", "secret", "kms_id", "generate", "begun"),
    [
        (OF_KMS, NONE, "x-1", False, None),
        (OF_KMS, NONE, None, False, None),
        (OF_KMS, NONE, "x-2", False, "--kms x-1"),
        (OF_KMS, NONE, None, True, "--kms x-1"),
        (OF_KMS, PASSPHRASE, None, False, "--kms x-1"),
        (OF_KMS, PASSPHRASE, "x-1", False, None),  # which a type metadata needs
        (GENERATED_KEY, NONE, None, True, None),
        (GENERATED_KEY, PASSPHRASE, None, False, "--generate-key"),
        (None, PASSPHRASE, None, False, None),
        (None, PASSPHRASE, "x-1", False, "--passphrase-file or --secret-dir"),
    ],
)
def test_what_was_begun_with_one_key_does_not_go_on_with_another(
    trail: KeyTrail | None, secret: SecretKey, kms_id: str | None, begun: str | None, *, generate: bool
) -> None:
    if begun is None:
        return refuse_another_key("data", trail, secret, kms_id, generate=generate)
    with pytest.raises(FailedPrecondition, match=f"of volume data was begun with {begun} and not with --"):
        refuse_another_key("data", trail, secret, kms_id, generate=generate)
    return None
