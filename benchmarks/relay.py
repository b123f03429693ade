"""Hands bytes on to a server and back, and does nothing else: what any process costs that stands in
between. `python -m benchmarks.relay PORT SERVERS_PORT`, both on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import uvloop


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while content := await reader.read(65_536):
            writer.write(content)
    writer.close()


async def _relay(port: int, servers_port: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asked = await asyncio.open_connection("127.0.0.1", servers_port)
        await asyncio.gather(_hand_on(reader, asked), _hand_on(answers, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_relay(int(sys.argv[1]), int(sys.argv[2])))
