#!/bin/sh
# lightkube's client puts an object's name into the path as it is: a name with ../ in it leads to an object of another kind.
#
# Version:  lightkube 1.0.1, lightkube-models 1.37.0.8, httpx2 2.16.2.
# Expected: a name that holds / or ? is refused or escaped, as by kubectl and client-go. Names often come out of other
#           objects, which anybody may have written.
# Seen:     client.get(ConfigMap, "../secrets/key", namespace="team") asks for the secret `key` of that namespace, and
#           delete deletes it; `a?x` loses what is behind the ?.
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
from lightkube.resources.core_v1 import ConfigMap

asked = []


def answer(request):
    asked.append(f"{request.method} {request.url.path}")
    return httpx2.Response(200, json={"metadata": {"name": "key"}})


config = KubeConfig.from_dict({
    "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
    "users": [{"name": "u", "user": {"token": "t"}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "x",
})
client = Client(config=config.get(), transport=httpx2.MockTransport(answer))
try:
    client.get(ConfigMap, "../secrets/key", namespace="team")
    client.delete(ConfigMap, "../secrets/key", namespace="team")
except Exception as error:  # whatever a later version raises
    asked.append(type(error).__name__)
print(asked)
path = "/api/v1/namespaces/team/secrets/key"
sys.exit(0 if asked == [f"GET {path}", f"DELETE {path}"] else 1)
PY
if venv/bin/python try.py; then
    echo "as seen: a ConfigMap's name led to a secret"
    exit 0
fi
echo "changed" >&2
exit 1
