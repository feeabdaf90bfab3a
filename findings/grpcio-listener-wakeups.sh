#!/bin/sh
# A grpcio server puts its threads to sleep and wakes them more often for each call with its newer listener than with
# the older one, which is still in it.
#
# Version:  grpcio 1.85.1, Linux, the experiment event_engine_listener (on by default).
# Expected: a small unary call over a unix socket wakes the thread that reads, the one that serves and the one that
#           works, whichever listener it came by; what is made the default wakes no more than what it takes the place of.
# Seen:     about a quarter to a half more voluntary context switches of the server for each call with the newer
#           listener: an event that has been read is handed to a pool of threads of the library's own once more. Where
#           a switch is dear (virtual machines with one processor, user-mode kernels) that is most of a call's time.
#           GRPC_EXPERIMENTS=-event_engine_listener chooses the older one.
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


class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)


server = grpc.server(ThreadPoolExecutor(4), handlers=[Echo()])
server.add_insecure_port("unix:socket")
server.start()
sys.stdin.read()
PY
cat >try.py <<'PY'
import os
import statistics
import subprocess
import sys
from pathlib import Path

import grpc

CALLS = 2000


def switches(pid):
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        text = (task / "status").read_text()
        total += int(text.split("voluntary_ctxt_switches:")[1].split()[0])
    return total


def per_call(experiments):
    Path("socket").unlink(missing_ok=True)
    server = subprocess.Popen(
        [sys.executable, "serve.py"], stdin=subprocess.PIPE, env=os.environ | {"GRPC_EXPERIMENTS": experiments}
    )
    try:
        with grpc.insecure_channel("unix:socket") as channel:
            echo = channel.unary_unary("/test/Echo")
            for _ in range(100):
                echo(b"x", wait_for_ready=True, timeout=60)
            before = switches(server.pid)
            for _ in range(CALLS):
                echo(b"x", timeout=60)
            return (switches(server.pid) - before) / CALLS
    finally:
        server.stdin.close()
        server.wait(60)


newer, older = [], []
for _ in range(3):
    newer.append(per_call(""))
    older.append(per_call("-event_engine_listener"))
ratio = statistics.median(newer) / statistics.median(older)
print(f"switches for each call: newer {newer}, older {older}, {ratio:.2f}x")
sys.exit(0 if ratio > 1.1 else 1)
PY
env -u GRPC_EXPERIMENTS venv/bin/python try.py
