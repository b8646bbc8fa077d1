"""Memory and CPU time of a process and all that it has started, from Linux's /proc.

Memory is the proportional set size: a page that several processes share is counted once in all,
so that Ray's many processes are not charged for the same libraries over and over.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

_INTERVAL_S: Final = 0.25


class PeakMemory:
    """Sample a process tree until the block ends; afterwards `peak_bytes` says how high it was."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))


def tree_bytes(root: int) -> int:
    """Proportional set size of a process and its descendants, in bytes."""
    return sum(map(_pss_bytes, _tree(root)))


def tree_cpu_s(root: int) -> float:
    """CPU time that a process and its descendants have taken so far, in seconds.

    Unlike the time on the clock it says how much work was done on a machine with other work, too.
    """
    # User and system time, its own and that of its children that have ended.
    ticks = sum(sum(map(int, stat[11:15])) for stat in _tree(root).values())
    return ticks / os.sysconf("SC_CLK_TCK")


def _tree(root: int) -> dict[int, list[str]]:
    """The fields of /proc/PID/stat behind the name, of a process and its descendants."""
    stats = dict(filter(None, map(_stat, Path("/proc").glob("[0-9]*"))))
    tree = {root}
    # Until no process is added: a child may have a lower number than its parent.
    while more := {pid for pid, stat in stats.items() if int(stat[1]) in tree} - tree:
        tree |= more
    return {pid: stat for pid, stat in stats.items() if pid in tree}


def _stat(process: Path) -> tuple[int, list[str]] | None:
    try:
        # The name, in parentheses, may hold anything.
        return int(process.name), (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        # It has ended since it was listed.
        return None


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
