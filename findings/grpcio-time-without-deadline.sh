#!/bin/sh
# What time_remaining() says of a call that has no deadline is not what it promises.
#
# Version:  grpcio 1.85.1, Linux, the synchronous server and the one of grpc.aio.
# Expected: None, as the documentation of RpcContext.time_remaining says: "or None if no deadline was specified".
# Seen:     the synchronous server answers 9.2e18, seconds, some 290,000 million years: "if left is None" never holds, and
#           what is handed on as a time limit fails there (Lock.acquire raises OverflowError). grpc.aio answers None.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet grpcio==1.85.1 || exit 2
cat >try.py <<'PY'
import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio

lock = threading.Lock()


def left(request, context):
    found = context.time_remaining()
    try:
        lock.acquire(timeout=-1 if found is None else found)
        lock.release()
    except OverflowError as error:
        return f"{found!r}, OverflowError: {error}".encode()
    return repr(found).encode()


async def left_async(request, context):
    return repr(context.time_remaining()).encode()


def handlers(method):
    return grpc.method_handlers_generic_handler("a.Service", {"Left": grpc.unary_unary_rpc_method_handler(method)})


def ask(path):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        call = channel.unary_unary("/a.Service/Left")
        limited = call(b"", wait_for_ready=True, timeout=60).decode()
        return call(b"", wait_for_ready=True).decode(), limited


async def ask_async():
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers(left_async),))
    server.add_insecure_port("unix:async")
    await server.start()
    found = await asyncio.to_thread(ask, "async")
    await server.stop(0)
    return found


server = grpc.server(ThreadPoolExecutor(1), handlers=[handlers(left)])
server.add_insecure_port("unix:sync")
server.start()
unlimited, limited = ask("sync")
server.stop(0).wait()
async_unlimited, async_limited = asyncio.run(ask_async())
print(f"synchronous: {unlimited}; with 60 s: {limited}")
print(f"grpc.aio: {async_unlimited}; with 60 s: {async_limited}")
near = all(0 < float(each) <= 60 for each in (limited, async_limited))
raise SystemExit(0 if near and unlimited.startswith("9.22") and "OverflowError" in unlimited and async_unlimited == "None" else 1)
PY
venv/bin/python try.py
