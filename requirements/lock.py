"""Turns pip's resolution report into `lock.txt`; `make lock` calls it.

    pip install --dry-run --ignore-installed --report - '.[dev,smollm]' | python lock.py > lock.txt

The file is used as constraints (`pip install -c requirements/lock.txt …`): it fixes versions and
installs nothing by itself. Local version labels are dropped, so that `torch==2.13.0` may be the
CPU build on one machine and the CUDA build on another.
"""

import json
import re
import sys

HEADER = """\
# The versions Bridge is tested with: constraints, not requirements. Written by `make lock`.
"""


def pins(report: dict) -> list[str]:
    """One `name==version` for each distribution that came from an index, sorted by name."""
    found = {}
    for item in report["install"]:
        if "dir_info" in item["download_info"]:  # the project itself
            continue
        metadata = item["metadata"]
        name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
        if name == "pip":  # the installer is the environment's own matter
            continue
        found[name] = metadata["version"].partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    print(HEADER + "\n".join(pins(json.load(sys.stdin))))
