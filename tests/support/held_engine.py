"""The engine's command line, for whoever wants to meet a run in its middle and cannot hurry.

HOLD: `STEP:FILE`; after that step it waits until there is the file, or until it is told to stop.
"""

import os
import time
from pathlib import Path


def hold() -> None:
    """From now on this process heeds HOLD."""
    from bridge_engine.trainer import Trainer

    at, _, file = os.environ.get("HOLD", "").partition(":")
    if not at:
        return
    advance = Trainer._advance

    def held(self, progress):
        while progress.step >= int(at) and not self.stop_requested() and not Path(file).exists():
            time.sleep(0.02)
        return advance(self, progress)

    Trainer._advance = held


if __name__ == "__main__":
    import sys

    from bridge_engine.distributed.ranks import leave
    from bridge_engine.run import main

    hold()
    leave(main(sys.argv[1:]))
