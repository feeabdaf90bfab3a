#!/bin/sh
# A client of boto3 that has met a long outage tries once from then on, however long it has been left alone since.
#
# Version:  boto3 1.44.8, botocore 1.44.8, retries {"mode": "standard", "total_max_attempts": 3}.
# Expected: "total_max_attempts": 3 is three attempts for each call; a bound on retries, where there is one, is a rate:
#           it fills up again while nothing is asked.
# Seen:     each client has a quota of retries that failed calls use up and that only calls which succeed give back.
#           After eighteen failed calls each further one is tried once. A pause of 30 s changes nothing, and one call
#           that succeeds is not enough either. A new client has the full quota again.
# Needs:    python3 with venv, PyPI. A local HTTP server that answers 500 or 200 is the KMS.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet boto3==1.44.8 botocore==1.44.8 || exit 2
cat >try.py <<'PY'
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import botocore.exceptions
from botocore.config import Config

asked, healthy = 0, False


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        global asked
        asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"Keys": []}' if healthy else b"{}"
        self.send_response(200 if healthy else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()


def client():
    return boto3.client(
        "kms",
        region_name="eu-central-1",
        endpoint_url=f"http://127.0.0.1:{server.server_address[1]}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(retries={"mode": "standard", "total_max_attempts": 3}),
    )


def attempts(kms):
    """How often the server was asked by one call."""
    before = asked
    try:
        kms.list_keys()
    except botocore.exceptions.ClientError:
        pass
    return asked - before


# botocore pauses between attempts; the pauses are not what this is about.
pause, time.sleep = time.sleep, lambda _: None

kms = client()
first = attempts(kms)
calls = 1
while attempts(kms) > 1 and calls < 500:
    calls += 1
pause(30)
after_pause = attempts(kms)
healthy = True
attempts(kms)
healthy = False
after_success = attempts(kms)
fresh = attempts(client())
print(f"first={first} calls_until_one={calls} after_30_s={after_pause} after_a_success={after_success} new_client={fresh}")
sys.exit(0 if (first, after_pause, fresh) == (3, 1, 3) and after_success <= 2 and calls < 200 else 1)
PY
if venv/bin/python try.py; then
    echo "as seen: the client does not try again after an outage, and time does not change that"
    exit 0
fi
echo "changed" >&2
exit 1
