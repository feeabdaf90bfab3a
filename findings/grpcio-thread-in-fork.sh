#!/bin/sh
# A process that has used grpcio gets a thread of the library's own in each child that it forks, before the child runs
# what it was forked for.
#
# Version:  grpcio 1.85.1, Linux, CPython.
# Expected: between fork and exec a child has one thread, the one that called fork(2); who sets no environment for it has
#           asked for no fork support.
# Seen:     two, as soon as one call was made, its server and its channel closed since. The library's handlers of
#           pthread_atfork(3) start it. What subprocess does before exec (it closes all other descriptors) takes that
#           thread's descriptors away, and on a busy machine the library was seen to abort the child for it, which then
#           looks like a program that was ended by signal 6. GRPC_ENABLE_FORK_SUPPORT=0 leaves the child with one thread.
#           subprocess without preexec_fn uses vfork(2), which runs no such handlers.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet grpcio==1.85.1 || exit 2
cat >fork.py <<'PY'
import os
import subprocess
import time
from concurrent import futures

import grpc

echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
server = grpc.server(futures.ThreadPoolExecutor(1))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Service", {"Echo": echo}),))
server.add_insecure_port("unix:socket")
server.start()
with grpc.insecure_channel("unix:socket") as channel:
    assert channel.unary_unary("/a.Service/Echo")(b"x") == b"x"
server.stop(0).wait()


def count():
    time.sleep(0.5)
    with open("threads", "w") as file:
        file.write(str(len(os.listdir("/proc/self/task"))))


subprocess.run(["true"], preexec_fn=count)
print(open("threads").read())
PY
usual=$(venv/bin/python fork.py 2>/dev/null) || exit 2
off=$(GRPC_ENABLE_FORK_SUPPORT=0 venv/bin/python fork.py 2>/dev/null) || exit 2
echo "threads of a child between fork and exec: $usual, without fork support: $off"
[ "$usual" -gt 1 ] && [ "$off" -eq 1 ]
