"""How long the head of an HTTP request may be.

uvicorn has two parsers. h11 refuses a head that is longer than 64 KiB and not yet at its end.
httptools, which uvicorn takes where it is installed, has no limit: it keeps all the lines, and
appends to an unfinished one in quadratic time, while nobody else is answered.
"""

from __future__ import annotations

import asyncio
from typing import Literal

MAX_BYTES = 65_536
"""As h11 has it in uvicorn. What came with one read is not counted before it was parsed, so a head
may have up to two reads (of at most 256 kB) more."""

HTTP: type[asyncio.Protocol] | Literal["auto"]
"""What `uvicorn.Config` takes as `http`: httptools with that limit, and h11 where httptools is not
installed."""

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:
    HTTP = "auto"
else:

    class BoundedHeads(HttpToolsProtocol):
        """Answers 400 to a head that does not end, and hangs up.

        Counted are the bytes since the parser last told of something else than a header: so body
        bytes never are, and the headers after a chunked body (trailers), which are kept as well,
        always, as are a pipelined request's.
        """

        _unfinished = 0
        _went_on = False

        def data_received(self, data: bytes) -> None:
            self._went_on = False
            super().data_received(data)
            self._unfinished = 0 if self._went_on else self._unfinished + len(data)
            if self._unfinished <= MAX_BYTES or self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response(f"The request's head is longer than {MAX_BYTES} bytes.")
            else:  # the answer to the request before it, or to this one's body, may be on its way
                self.transport.close()

        def on_headers_complete(self) -> None:
            self._went_on = True
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._went_on = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._went_on = True
            super().on_message_complete()

    HTTP = BoundedHeads
