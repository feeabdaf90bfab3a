#!/bin/sh
# kopf tells its handlers nothing of an object that was deleted while the watch was interrupted.
#
# Version:  kopf 1.45.2.
# Expected: when the API answers a watch with 410 Gone, as after a compaction of etcd or a long pause, the objects are listed
#           anew, and what is in that list no more is told as a deletion. Its guide speaks of level-triggered handling,
#           and kopf does list anew.
# Seen:     the objects that are in the list are told again; for the one that went there is no event, neither now nor
#           after the next listing. An on.event handler that keeps what it has seen keeps that object for ever.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet kopf==1.45.2 || exit 2
cat >try.py <<'PY'
"""A small API of one kind: two things, a watch that is told Gone, then a list with one of them."""

import asyncio
import json
import logging
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import kopf

lists, told = [], []
GROUP = {"name": "example.org", "versions": [{"groupVersion": "example.org/v1", "version": "v1"}],
         "preferredVersion": {"groupVersion": "example.org/v1", "version": "v1"}}
THINGS = {"name": "things", "singularName": "thing", "namespaced": True, "kind": "Thing",
          "verbs": ["get", "list", "watch", "patch"], "shortNames": [], "categories": []}
NAMESPACES = {"name": "namespaces", "singularName": "namespace", "namespaced": False, "kind": "Namespace",
              "verbs": ["get", "list", "watch"], "shortNames": [], "categories": []}
STATIC = {
    "/api": {"versions": ["v1"]},
    "/apis": {"groups": [GROUP]},
    "/api/v1": {"groupVersion": "v1", "resources": [NAMESPACES]},
    "/apis/example.org/v1": {"groupVersion": "example.org/v1", "resources": [THINGS]},
}


def thing(name):
    return {"apiVersion": "example.org/v1", "kind": "Thing",
            "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", "resourceVersion": "1"}}


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        at = urlsplit(self.path)
        if at.path in STATIC:
            return self.say(STATIC[at.path])
        if not at.path.endswith("/things"):
            return self.say({}, 404)
        if "watch" not in parse_qs(at.query):
            lists.append(None)
            names = ("stays", "goes") if len(lists) == 1 else ("stays",)
            return self.say({"kind": "ThingList", "apiVersion": "example.org/v1", "items": [*map(thing, names)],
                             "metadata": {"resourceVersion": str(10 * len(lists))}})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        time.sleep(1.5)
        if len(lists) < 3:
            gone = {"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410, "message": "too old"}
            self.wfile.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
        else:
            time.sleep(30)
        self.close_connection = True

    def say(self, document, status=200):
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
registry = kopf.OperatorRegistry()


@kopf.on.login(registry=registry)
def login(**_):
    return kopf.ConnectionInfo(server=f"http://127.0.0.1:{server.server_address[1]}")


@kopf.on.startup(registry=registry)
def configure(settings, **_):
    settings.posting.enabled = False
    settings.scanning.disabled = True


@kopf.on.event("example.org", "v1", "things", registry=registry)
def seen(type, name, **_):
    told.append((type, name))


async def main():
    running = asyncio.ensure_future(kopf.operator(registry=registry, standalone=True, namespaces=["default"]))
    for _ in range(200):
        await asyncio.sleep(0.1)
        if len(lists) >= 3:
            break
    await asyncio.sleep(3)
    print(f"listed {len(lists)} times, told: {told}", flush=True)
    if len(lists) < 3 or (None, "goes") not in told or running.done():
        os._exit(2)
    os._exit(0 if ("DELETED", "goes") not in told else 1)


logging.disable(logging.CRITICAL)
asyncio.run(main())
PY
code=0
timeout 60 venv/bin/python try.py || code=$?
case $code in
0) echo "as seen: nobody is told of the object that went" ;;
1) echo "changed" >&2 ;;
*) exit 2 ;;
esac
exit "$code"
