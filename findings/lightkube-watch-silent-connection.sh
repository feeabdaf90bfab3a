#!/bin/sh
# A watch of lightkube waits for ever on a connection that has gone silent, whatever time limits were given.
#
# Version:  lightkube 1.0.1, lightkube-models 1.37.0.8, httpx2 2.16.2.
# Expected: a client with a timeout of one second and a watch with server_timeout=2 ends or tries again seconds after the
#           server should have closed the watch, as with a load balancer or node that went away without a reset.
# Seen:     the client's read timeout is switched off for watches and `server_timeout` is only told to the server, so the
#           loop is still waiting after fifteen seconds; nothing is raised and on_error is not asked. What helps is TCP
#           keepalive, given to the transport by socket_options, or a limit of one's own.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet lightkube==1.0.1 lightkube-models==1.37.0.8 httpx2==2.16.2 || exit 2
cat >try.py <<'PY'
import os
import socket
import threading

import httpx2
from lightkube import Client, KubeConfig
from lightkube.resources.core_v1 import ConfigMap

listening = socket.create_server(("127.0.0.1", 0))
kept = []


def serve():
    """Begins an answer, and says no more."""
    while True:
        connection, _ = listening.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        kept.append(connection)


threading.Thread(target=serve, daemon=True).start()
config = KubeConfig.from_dict({
    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{listening.getsockname()[1]}"}}],
    "users": [{"name": "u", "user": {"token": "t"}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "x",
})
client = Client(config=config, timeout=httpx2.Timeout(1.0))
said = []


def watch():
    try:
        for _ in client.watch(ConfigMap, namespace="default", server_timeout=2):
            said.append("event")
        said.append("ended")
    except Exception as error:
        said.append(type(error).__name__)


watching = threading.Thread(target=watch, daemon=True)
watching.start()
watching.join(15)
print(f"after 15 s: {'waiting' if watching.is_alive() else said}, connections: {len(kept)}", flush=True)
os._exit(0 if watching.is_alive() and not said and len(kept) == 1 else 1)
PY
if venv/bin/python try.py; then
    echo "as seen: a watch on a silent connection waits for ever"
    exit 0
fi
echo "changed" >&2
exit 1
