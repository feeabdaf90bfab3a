#!/bin/sh
# A grpcio server takes the socket of a server that is at work, and that one's end then takes the socket away from it.
#
# Version:  grpcio 1.85.1, Linux, unix sockets.
# Expected: "address in use" for the second server on a path at which another process listens, as bind(2) says and as a
#           TCP port with grpc.so_reuseport=0 does; and a server that stops removes the socket that it made, if any.
# Seen:     add_insecure_port("unix:PATH") answers the second server as it does the first one: the live socket is unlinked
#           and another one made. Nobody tells the first one, which goes on without new callers. When it is stopped it
#           unlinks the path, whosever socket is there by then: the second server runs on and cannot be reached. An update
#           that starts the new server before it ends the old one comes to that.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet grpcio==1.85.1 || exit 2
cat >serve.py <<'PY'
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

name = sys.argv[1].encode()
method = grpc.unary_unary_rpc_method_handler(lambda request, context: name)
server = grpc.server(
    ThreadPoolExecutor(1),
    handlers=[grpc.method_handlers_generic_handler("a.Service", {"Name": method})],
    options=[("grpc.so_reuseport", 0)],
)
server.add_insecure_port("unix:socket")
server.start()
print("ready", flush=True)
sys.stdin.read()
server.stop(0).wait()
PY
cat >try.py <<'PY'
import os
import subprocess
import sys

import grpc


def start(name):
    server = subprocess.Popen(
        [sys.executable, "serve.py", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return server, server.stdout.readline().strip() == "ready"


def answer():
    with grpc.insecure_channel("unix:socket", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            return channel.unary_unary("/a.Service/Name")(b"", timeout=30).decode()
        except grpc.RpcError as error:
            return error.code().name


first, _ = start("first")
before = answer()
second, taken = start("second")
between = answer()
first.stdin.close()
first.wait(60)
running, there, after = second.poll() is None, os.path.exists("socket"), answer()
second.stdin.close()
second.wait(60)
print(f"one server: {before}; a second one, which {'listens' if taken else 'is refused'}: {between}")
print(f"the first one ended: the second {'runs' if running else 'ended'}, socket={there}, a call: {after}")
as_seen = (before, taken, between, running, there, after) == ("first", True, "second", True, False, "UNAVAILABLE")
raise SystemExit(0 if as_seen else 1)
PY
venv/bin/python try.py
