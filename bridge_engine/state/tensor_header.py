"""What a safetensors file holds, without loading it: kilobytes are read. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LONGEST = 100_000_000
"""No header is longer than so many bytes."""


def tensor_header(file: Path) -> dict[str, dict[str, Any]]:
    """{"dtype", "shape", "data_offsets"} of each tensor by its name. Raises OSError, and ValueError
    where it is no safetensors file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LONGEST:
            raise ValueError(f"{file} is not a safetensors file")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{file} is not a safetensors file")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}
