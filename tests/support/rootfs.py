"""A root folder and namespaces of its own: what is left of a container without its engine.

Linux and root only. Programs and libraries are this machine's, /etc is a copy, /var, /home, /tmp
and /data are new, the network is a loopback that nobody else hears. So a service can be started
with the very paths, ports, host names and user of the deployed form, and no trace of it is left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

SYSTEM = ("bin", "lib", "lib32", "lib64", "libx32", "sbin", "usr", "opt")
"""Taken from this machine as they are."""
NEW = ("var/lib/bridge", "var/cache/bridge", "var/lib/postgresql", "data", "home", "tmp", "app")


def why_not() -> str | None:
    """Why none can be made here; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a root folder of its own needs root on Linux"
    missing = [name for name in ("unshare", "nsenter", "setpriv", "ip") if not shutil.which(name)]
    if missing:
        return f"these programs are missing: {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, text=True)
    return tried.stderr.strip() or None


class RootFs:
    """One such root; every process started in it sees the same files and the same network."""

    def __init__(self, path: Path, holder: int) -> None:
        self._path = path
        self._holder = holder

    def inside(self, path: str | PurePosixPath) -> Path:
        """The path as this process reaches it: through the namespace of the one that holds it."""
        seen = Path(f"/proc/{self._holder}/root") / self._path.relative_to("/")
        return seen / PurePosixPath(path).relative_to("/")

    def command(
        self, words: Sequence[str], *, folder: str, user: str = "root", network: bool = True
    ) -> list[str]:
        """The words as a command that runs in there; without `network`, in the machine's."""
        entered = ["nsenter", "--target", str(self._holder), "--mount"]
        entered += ["--net"] if network else []
        # nsenter's own --root and --wd go by the caller's files
        entered += ["chroot", str(self._path)]
        entered += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]
        return [*entered, "env", "-C", folder, *words]

    def run(self, words: Sequence[str], environment: Mapping[str, str], *, folder: str) -> None:
        """Runs to its end as root, with the machine's network; fails with what it printed."""
        command = self.command(words, folder=folder, network=False)
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@contextmanager
def rootfs(hosts: Sequence[str], prefixes: Sequence[str]) -> Iterator[RootFs]:
    """A root in memory, in which each of `hosts` is 127.0.0.1 and the folders `prefixes` are the
    machine's, read only."""
    path = Path(tempfile.mkdtemp(prefix="bridge-root-"))
    unshared = ["unshare", "--mount", "--net", "--propagation", "private", "bash", "-c"]
    holder = subprocess.Popen(
        [*unshared, _script(path, hosts, prefixes)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        yield RootFs(path, holder.pid)
    finally:
        holder.kill()
        holder.wait()
        path.rmdir()  # what was mounted there went with the namespace


def _script(path: Path, hosts: Sequence[str], prefixes: Sequence[str]) -> str:
    lines = ["set -e", f"mount -t tmpfs -o mode=755 tmpfs '{path}'", f"cd '{path}'"]
    lines += [f"mkdir -p {' '.join(NEW)} root/.config dev proc", "chmod 1777 tmp", "cp -a /etc etc"]
    lines += [f"echo '127.0.0.1 localhost {' '.join(hosts)}' > etc/hosts"]
    # how pip reaches its index, where that is kept there
    lines += ["if test -d ~/.config/pip; then cp -a ~/.config/pip root/.config; fi"]
    lines += [f"mount --rbind /{name} {name}" for name in ("dev", "proc")]
    for folder in [*(f"/{name}" for name in SYSTEM if Path("/", name).is_dir()), *prefixes]:
        inside = folder.lstrip("/")
        lines.append(f"mkdir -p '{inside}' && mount --bind -o ro '{folder}' '{inside}'")
    lines += ["ip link set lo up", "echo ready", "exec sleep infinity"]
    return "\n".join(lines)
