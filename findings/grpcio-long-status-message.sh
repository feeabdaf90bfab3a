#!/bin/sh
# A gRPC call that failed answers now with its own status and now with another one when the message is long: how often
# grows with its length.
#
# Version:  grpcio 1.85.1, Linux, server and client.
# Expected: context.abort(FAILED_PRECONDITION, text) ends the call at the client with that code. A text that is too long is
#           cut or refused, each time in the same way; an answer's size is bounded by megabytes.
# Seen:     the text travels in a header. From 8 KiB of headers on the client ends some of the calls with
#           RESOURCE_EXHAUSTED instead, at random: one in five with 10,000 letters, half of them with 12,000, from 16 KiB
#           on all. Who decides by the code whether to call again (a CSI sidecar, say) sees another failure each time.
#           Letters that are not ASCII take three bytes each of their UTF-8.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet grpcio==1.85.1 || exit 2
cat >try.py <<'PY'
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc

CALLS = 300


def fail(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "x" * int(request))


handler = grpc.method_handlers_generic_handler("a.Service", {"Fail": grpc.unary_unary_rpc_method_handler(fail)})
server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
server.add_insecure_port("unix:socket")
server.start()
found = {}
with grpc.insecure_channel("unix:socket") as channel:
    call = channel.unary_unary("/a.Service/Fail")
    for length in (1000, 7000, 12000, 17000):
        codes = Counter()
        for _ in range(CALLS):
            try:
                call(str(length).encode(), wait_for_ready=True, timeout=60)
            except grpc.RpcError as error:
                codes[error.code().name] += 1
        found[length] = codes
        print(f"{length} letters: {', '.join(f'{count} {name}' for name, count in sorted(codes.items()))}")
server.stop(0).wait()
own, other = "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"
always = all(found[length][own] == CALLS for length in (1000, 7000))
at_random = found[12000][own] > CALLS / 10 and found[12000][other] > CALLS / 10
raise SystemExit(0 if always and at_random and found[17000][other] == CALLS else 1)
PY
venv/bin/python try.py
