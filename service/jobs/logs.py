"""The end of a text file, without reading its beginning."""

from __future__ import annotations

from pathlib import Path

BLOCK = 65_536
LARGEST = 4_000_000
"""Bytes answered at most, however many lines were asked for."""


def tail(path: Path, lines: int) -> str:
    """The last `lines` lines of the file; empty if there is none yet. Bytes that are not UTF-8 are
    shown as \\xNN."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return ""
    with file:
        position = file.seek(0, 2)
        data = b""
        # One more newline than lines: the one that ends the line before them.
        while position > 0 and data.count(b"\n") <= lines and len(data) < LARGEST:
            start = max(0, position - BLOCK)
            file.seek(start)
            data = file.read(position - start) + data
            position = start
    whole = data.removesuffix(b"\n").split(b"\n")
    end = b"\n" if data.endswith(b"\n") else b""
    return (b"\n".join(whole[-lines:]) + end).decode("utf-8", "backslashreplace")
