#!/bin/sh
# One U+0085 (next line) in any text of an object ends a watch of lightkube with an error, each time that it is told of.
#
# Version:  lightkube 1.0.1, lightkube-models 1.37.0.8, httpx2 2.16.2, msgspec as pip resolves it.
# Expected: an event of a watch is a line that ends with a newline, as the API writes it; what JSON need not escape may
#           be in it as it is, and Go's encoder, the API server's, escapes U+2028 and U+2029 but not U+0085. So an
#           annotation with it, which anybody may set who may write one object of the kind, is read like any other.
# Seen:     lightkube takes the lines that httpx2's `iter_lines` makes, which ends one also where `str.splitlines` does:
#           the event is cut in two, neither of them is JSON, and the iterator raises msgspec.DecodeError instead of
#           giving the event. It is no httpx2.HTTPError, so `on_error` is not asked and the watch is over. The same
#           object in an answer to `get` is read. What helps is to split the bytes at the newline oneself.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet lightkube==1.0.1 lightkube-models==1.37.0.8 httpx2==2.16.2 || exit 2
cat >try.py <<'PY'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from lightkube import Client, KubeConfig
from lightkube.resources.core_v1 import ConfigMap

NOTE = "before\u0085behind"
THING = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "a", "namespace": "default", "resourceVersion": "2", "annotations": {"note": NOTE}},
}


class Api(BaseHTTPRequestHandler):
    """Tells of that object, and of another one behind it."""

    def do_GET(self):
        watched = "watch=true" in self.path
        other = {**THING, "metadata": {"name": "b", "namespace": "default", "resourceVersion": "3"}}
        told = [{"type": "ADDED", "object": each} for each in (THING, other)] if watched else [THING]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        for each in told:
            self.wfile.write(json.dumps(each, ensure_ascii=False).encode() + b"\n")

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = Client(config=KubeConfig.from_dict({
    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
    "users": [{"name": "u", "user": {"token": "t"}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "x",
}))
got = client.get(ConfigMap, "a", namespace="default").metadata.annotations["note"]
print(f"get: {got!r}")
asked = []
try:
    event, thing = next(client.watch(ConfigMap, namespace="default", on_error=lambda *_: asked.append(1)))
    said = f"{event} {thing.metadata.name}"
except Exception as error:
    said = type(error).__name__
print(f"watch: {said}, on_error asked {len(asked)} times")
sys.exit(0 if got == NOTE and said == "DecodeError" and not asked else 1)
PY
if venv/bin/python try.py; then
    echo "as seen: an event with U+0085 in it cannot be read"
    exit 0
fi
echo "changed" >&2
exit 1
