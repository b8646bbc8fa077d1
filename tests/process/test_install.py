"""What an inference node installs: the base distribution, in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import steering_service.client.subscription, steering_service.core.signing
from importlib.util import find_spec
present = [name for name in ("ray", "zarr", "torch", "transformers", "pyarrow") if find_spec(name)]
assert not present, present
"""


@pytest.mark.faults
def test_a_node_gets_the_client_without_ray_zarr_or_torch(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "node"], check=True)
    binaries = tmp_path / "node" / "bin"
    pins = ("--constraint", str(ROOT / "constraints.txt"))
    subprocess.run([binaries / "pip", "install", "--quiet", *pins, ROOT], check=True)
    subprocess.run([binaries / "python", "-c", CODE], check=True, cwd=tmp_path)
    command = subprocess.run([binaries / "steerage", "plan"], capture_output=True, text=True)
    assert command.returncode == 1
    assert "pip install 'steerage[pipeline]'" in command.stderr
