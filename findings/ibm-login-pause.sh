#!/bin/sh
# IBM's SDK sleeps for a minute after one failed request for a token, whatever time limit it was given.
#
# Version:  ibm-cloud-sdk-core 3.28.0 (what keyprotect 3.0.1 and IBM's other clients get their tokens by), requests 2.34.2.
# Expected: a call whose login fails, with "timeout": 1 in the HTTP configuration, fails; the next call logs in again at
#           once, and fails or succeeds within its time limit.
# Seen:     the moment of the request for a token is noted before it is sent and forgotten only after it has succeeded.
#           After one that failed (HTTP 503 here; a refused connection is the same) each further call, in any thread,
#           waits in steps of half a second until that moment is 60 s old. Nothing is asked meanwhile, though the server
#           has long been well again.
# Needs:    python3 with venv, PyPI. A local HTTP server that answers 503 once is IAM. Takes a minute.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet ibm-cloud-sdk-core==3.28.0 requests==2.34.2 || exit 2
cat >try.py <<'PY'
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
from ibm_cloud_sdk_core import ApiException
from ibm_cloud_sdk_core.authenticators import IAMAuthenticator

moment = int(time.time())
token = jwt.encode({"iat": moment, "exp": moment + 3600}, "a key of thirty-two bytes, or more", "HS256")
asked = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        asked.append(time.monotonic())
        body = json.dumps({"access_token": token}).encode()
        self.send_response(503 if len(asked) == 1 else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
authenticator = IAMAuthenticator("an API key", url=f"http://127.0.0.1:{server.server_address[1]}")
authenticator.token_manager.http_config = {"timeout": 1}


def seconds():
    """How long one authentication takes, and whether it succeeds."""
    started = time.monotonic()
    try:
        authenticator.authenticate({"headers": {}})
    except ApiException as error:
        return time.monotonic() - started, error.status_code
    return time.monotonic() - started, 200


first, second = seconds(), seconds()
between = asked[1] - asked[0]
print(f"first={first[0]:.1f} s, HTTP {first[1]}; second={second[0]:.1f} s, HTTP {second[1]}; nothing asked for {between:.1f} s")
sys.exit(0 if first[1] == 503 and second[1] == 200 and second[0] > 50 and between > 50 else 1)
PY
if venv/bin/python try.py; then
    echo "as seen: after a failed login the next one waits for a minute"
    exit 0
fi
echo "changed" >&2
exit 1
