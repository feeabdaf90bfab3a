#!/bin/sh
# moto's server answers HTTP 500 where a key of KMS is to be disabled, enabled or deleted and is named by its ARN.
#
# Version:  moto 5.2.5 (server), boto3 1.44.8.
# Expected: the key's state changes. AWS documents for KeyId of DisableKey, EnableKey, ScheduleKeyDeletion and
#           CancelKeyDeletion: "Specify the key ID or key ARN of the KMS key".
# Seen:     by id they work, by ARN each is a KeyError within the server, told as an internal server error. Encrypt and
#           DescribeKey of the same key take either.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet 'moto[kms]==5.2.5' flask flask-cors boto3==1.44.8 botocore==1.44.8 || exit 2
cat >try.py <<'PY'
import sys

import boto3
import botocore.config
import botocore.exceptions
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
host, port = server.get_host_and_port()
kms = boto3.client(
    "kms",
    region_name="eu-central-1",
    endpoint_url=f"http://{host}:{port}",
    aws_access_key_id="key",
    aws_secret_access_key="secret",
    config=botocore.config.Config(retries={"total_max_attempts": 1}),
)


def told(name, key):
    more = {"Plaintext": b"x"} if name == "encrypt" else {}
    try:
        getattr(kms, name)(KeyId=key, **more)
    except botocore.exceptions.ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"]
    return 200


calls = ("describe_key", "encrypt", "disable_key", "enable_key", "schedule_key_deletion", "cancel_key_deletion")
seen = {}
for how in ("KeyId", "Arn"):
    key = kms.create_key()["KeyMetadata"][how]
    seen[how] = [told(name, key) for name in calls]
    print(how, *(f"{name}={status}" for name, status in zip(calls, seen[how])))
server.stop()
sys.exit(0 if seen == {"KeyId": [200] * 6, "Arn": [200, 200, 500, 500, 500, 500]} else 1)
PY
if venv/bin/python try.py 2>/dev/null; then
    echo "as seen: by its ARN no key changes its state"
    exit 0
fi
echo "changed" >&2
exit 1
