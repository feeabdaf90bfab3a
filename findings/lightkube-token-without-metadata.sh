#!/bin/sh
# lightkube's client cannot ask for a service account's token: an AttributeError, before anything is sent.
#
# Version:  lightkube 1.0.1, lightkube-models 1.37.0.8, httpx2 2.16.2.
# Expected: `client.create(ServiceAccountToken(spec=...), name, namespace=...)` sends a TokenRequest. Of its fields only
#           `spec` is required in Kubernetes' API, `metadata` is optional in lightkube's own model too, and the account
#           is named by the path.
# Seen:     AttributeError, 'NoneType' object has no attribute 'namespace': where a namespace could come from, the object's
#           metadata is looked into without asking whether there is any. With an empty ObjectMeta the request is sent.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet lightkube==1.0.1 lightkube-models==1.37.0.8 httpx2==2.16.2 || exit 2
cat >try.py <<'PY'
import sys

import httpx2
from lightkube import Client, KubeConfig
from lightkube.models.authentication_v1 import TokenRequestSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import ServiceAccountToken

asked = []


def answer(request):
    asked.append(f"{request.method} {request.url.path}")
    status = {"token": "t", "expirationTimestamp": "2026-11-28T00:00:00Z"}
    return httpx2.Response(201, json={"kind": "TokenRequest", "status": status})


config = KubeConfig.from_dict({
    "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
    "users": [{"name": "u", "user": {"token": "t"}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "x",
})
client = Client(config=config, transport=httpx2.MockTransport(answer))
spec = TokenRequestSpec(audiences=["a"])
try:
    client.create(ServiceAccountToken(spec=spec), "account", namespace="default")
    without = "sent"
except AttributeError as error:
    without = str(error)
client.create(ServiceAccountToken(metadata=ObjectMeta(), spec=spec), "account", namespace="default")
print(f"without metadata: {without}; with an empty one: {asked}")
path = "POST /api/v1/namespaces/default/serviceaccounts/account/token"
sys.exit(0 if "'namespace'" in without and asked == [path] else 1)
PY
if venv/bin/python try.py; then
    echo "as seen: a TokenRequest without metadata is not sent"
    exit 0
fi
echo "changed" >&2
exit 1
