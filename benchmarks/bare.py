"""The peer of `benchmarks/service.py`: a FastAPI application that does as little as can be done.

BARE_DATABASE=postgresql://… python benchmarks/bare.py PORT
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from typing import Any

# The folder of this file has a page with the name of a package, and would come first.
sys.path.pop(0)

import psycopg
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event


def serve(port: int) -> None:
    """Serves it until it is told to end."""
    app = FastAPI()
    local = threading.local()
    queues: set[asyncio.Queue[bytes]] = set()
    count = {"seq": 0}

    @app.post("/insert", status_code=201)
    def insert(body: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(local, "connection"):
            local.connection = psycopg.connect(os.environ["BARE_DATABASE"], autocommit=True)
        local.connection.execute("INSERT INTO bare (body) VALUES (%s)", (json.dumps(body),))
        return body

    @app.post("/push", status_code=201)
    async def push(body: dict[str, Any]) -> None:
        count["seq"] += 1
        frame = format_sse_event(id=str(count["seq"]), data_str=json.dumps(body))
        for queue in queues:
            queue.put_nowait(frame)

    @app.get("/sse")
    async def events() -> StreamingResponse:
        async def stream() -> Any:
            queue: asyncio.Queue[bytes] = asyncio.Queue()
            if not queues:
                count["seq"] = 0
            queues.add(queue)
            try:
                yield b": connected\n\n"
                while True:
                    yield await queue.get()
            finally:
                queues.discard(queue)

        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.get("/healthz")
    def healthz() -> None: ...

    with psycopg.connect(os.environ["BARE_DATABASE"], autocommit=True) as connection:
        connection.execute("CREATE TABLE bare (id bigserial PRIMARY KEY, body json)")
        connection.execute(
            "CREATE TABLE bare_points (job text, key text, step integer, value double precision, "
            "PRIMARY KEY (job, key, step))"
        )
    uvicorn.run(app, port=port, log_level="warning", timeout_keep_alive=600)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
