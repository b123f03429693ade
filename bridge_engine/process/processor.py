"""The processor, as Linux tells it."""

from __future__ import annotations

import platform


def processor() -> str:
    """Its name; as Python knows it where there is no Linux, which may be ""."""
    return _told("model name") or platform.processor()


def vendor() -> str:
    """Who made it, as the processor says it of itself: `GenuineIntel`, `AuthenticAMD`; "" where
    nothing tells."""
    return _told("vendor_id")


def _told(field: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = next((line for line in lines if line.startswith(field)), "")
    except OSError:
        return ""
    return named.partition(":")[2].strip()
