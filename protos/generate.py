"""Generate the checked-in stubs from the protos: `python protos/generate.py [--check]`.

`--check` writes nothing: it generates into a temporary folder, compares, and exits 1 when a stub is
stale or missing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("steering_service/v1")


def generate(out: Path) -> None:
    """Write the stubs of every proto below `out`."""
    protos = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "protos" / PACKAGE).glob("*.proto"))
    plugins = Path(sys.executable).parent
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-Iprotos",
            # The plugins live beside this interpreter, which need not be on PATH.
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--mypy_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_grpc_out={out}",
            *protos,
        ],
        cwd=ROOT,
        check=True,
        stderr=subprocess.PIPE,
    )


def stale() -> list[str]:
    """Names of stubs that differ from what the protos generate, sorted."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {p.name: p.read_bytes() for p in (Path(folder) / PACKAGE).iterdir()}
    kept = {p.name: p.read_bytes() for p in (ROOT / PACKAGE).glob("*_pb2*.py*")}
    return sorted(n for n in fresh.keys() | kept.keys() if fresh.get(n) != kept.get(n))


def main() -> int:
    """Generate, or check; the exit status."""
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return 0
    names = stale()
    for name in names:
        sys.stderr.write(f"{PACKAGE / name} is stale; run `make protos` and commit the result\n")
    return 1 if names else 0


if __name__ == "__main__":
    raise SystemExit(main())
