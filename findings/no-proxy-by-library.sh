#!/bin/sh
# One no_proxy, four libraries of one Python process: a form that one of them goes by is another one's no match, and its
# requests go to the proxy.
#
# Version:  requests 2.34.2, botocore 1.44.8, httpx2 2.16.2, grpcio 1.85.1, CPython's urllib.request, Linux.
# Expected: no_proxy means the same to all: an address, a block of addresses as Kubernetes distributions write it
#           (10.96.0.0/12), an address with its port, and * for everything are reached directly.
# Seen:     an address alone is understood by all five. The block is not by urllib.request and botocore, the address with
#           its port not by requests and grpcio, * not by grpcio. No one says a word of it. For a server at an address in a
#           cluster only the plain address works for all.
# Needs:    python3 with venv, PyPI; 127.0.0.2 is an address of the loopback interface.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet requests==2.34.2 botocore==1.44.8 httpx2==2.16.2 grpcio==1.85.1 || exit 2
cat >client.py <<'PY'
"""One request to a server, by one library, which takes the proxy from the environment."""

import sys

library, address = sys.argv[1:]
url = f"http://{address}/"
if library == "requests":
    import requests

    requests.get(url, timeout=60)
elif library == "urllib":
    import urllib.request

    urllib.request.urlopen(url, timeout=60).read()
elif library == "httpx2":
    import httpx2

    httpx2.get(url, timeout=60)
elif library == "botocore":
    from botocore.awsrequest import AWSRequest
    from botocore.httpsession import URLLib3Session
    from botocore.utils import get_environ_proxies

    URLLib3Session(proxies=get_environ_proxies(url)).send(AWSRequest(method="GET", url=url).prepare())
else:
    import grpc

    try:
        grpc.insecure_channel(address).unary_unary("/a.Service/Call")(b"", timeout=10)
    except grpc.RpcError:
        pass  # neither end talks gRPC: where it went is what counts
PY
cat >try.py <<'PY'
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

reached = []


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def serve(name, host):
    class Here(Answer):
        def setup(self):
            reached.append(name)
            super().setup()

    server = ThreadingHTTPServer((host, 0), Here)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


proxy, port = serve("proxy", "127.0.0.1"), serve("direct", "127.0.0.2")
plain = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
LIBRARIES = ("requests", "urllib", "botocore", "httpx2", "grpcio")
FORMS = {
    "an address": ("127.0.0.2", {}),
    "a block": ("127.0.0.0/8", {"urllib", "botocore"}),
    "with its port": (f"127.0.0.2:{port}", {"requests", "grpcio"}),
    "*": ("*", {"grpcio"}),
    "something else": ("192.0.2.1", set(LIBRARIES)),
}
as_seen = True
for form, (value, expected) in FORMS.items():
    by_proxy = set()
    for library in LIBRARIES:
        reached.clear()
        environment = plain | {"http_proxy": f"http://127.0.0.1:{proxy}", "no_proxy": value}
        done = subprocess.run(
            [sys.executable, "client.py", library, f"127.0.0.2:{port}"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120,
        )
        if done.returncode or not reached:
            sys.stderr.write(done.stderr.decode())
            raise SystemExit(2)
        if reached[0] == "proxy":
            by_proxy.add(library)
    print(f"{form}: by the proxy {', '.join(sorted(by_proxy)) or 'none'}")
    as_seen &= by_proxy == set(expected)
raise SystemExit(0 if as_seen else 1)
PY
venv/bin/python try.py
