"""Python's wall clock, moved by the seconds that the file BRIDGE_TEST_CLOCK says.

Python imports this by itself in every process that has the folder on its path. The monotonic clock
is left alone, as it is when a machine's clock is set.
"""

import datetime
import os
import time

_FILE = os.environ.get("BRIDGE_TEST_CLOCK")
_time = time.time


def _moved():
    try:
        with open(_FILE) as file:
            return _time() + float(file.read() or 0)
    except (OSError, ValueError):
        return _time()


if _FILE:

    class _Datetime(datetime.datetime):
        __slots__ = ()  # extensions written in C look that it is as large as it was

        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(_moved(), tz)

    _Datetime.__name__ = _Datetime.__qualname__ = "datetime"
    time.time = _moved
    datetime.datetime = _Datetime
