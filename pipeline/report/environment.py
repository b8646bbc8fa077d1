"""What a result was measured with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("steerage", "torch", "transformers", "ray", "zarr", "grpcio", "numpy")


def environment() -> dict[str, str]:
    """Device and versions, for a report or beside a benchmark's figures."""
    versions = {name: version(name) for name in _PACKAGES}
    return {
        "device": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        # Not Linux.
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
