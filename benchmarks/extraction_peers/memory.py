"""Peak memory of a process and all that it starts, from Linux's /proc.

Counted is the proportional set size: a page that several processes share is counted once in all,
so that Ray's many processes are not charged for the same libraries over and over.
"""

from __future__ import annotations

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
    parents = dict(filter(None, map(_parent, Path("/proc").glob("[0-9]*"))))
    tree = {root}
    # Until no process is added: a child may have a lower number than its parent.
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(map(_pss_bytes, tree))


def _parent(process: Path) -> tuple[int, int] | None:
    try:
        # The name, in parentheses, may hold anything.
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        # It has ended since it was listed.
        return None
    return int(process.name), int(fields[1])


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
