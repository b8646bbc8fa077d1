"""Fuzz the targets with atheris, which steers by coverage; see `make fuzz`.

python tests/fuzz/fuzz.py --all 30              # each for 30 s; fails if one does
python tests/fuzz/fuzz.py manifest -runs=1000   # one, with flags of libFuzzer
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def fuzz_one(name: str, flags: list[str]) -> None:
    """Fuzz one target until libFuzzer's limits are reached; what fails ends the process."""
    import atheris

    with atheris.instrument_imports(
        include=["steering_service", "store", "rfc8785", "securesystemslib", "json", "tomllib"]
    ):
        import targets

    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(targets.TARGETS[name][1]):
            Path(folder, str(number)).write_bytes(seed)
        atheris.Setup(
            [sys.argv[0], "-max_len=65536", *flags, folder],
            lambda data: targets.attempt(name, data),
        )
        atheris.Fuzz()


def fuzz_all(seconds: int) -> int:
    """Each target in a process of its own, as many at once as there are processors."""
    import targets

    folder = Path(tempfile.mkdtemp(prefix="steerage-fuzz-failures-"))

    def run(name: str) -> int:
        flags = [f"-max_total_time={seconds}", f"-artifact_prefix={folder}/{name}-", "-timeout=20"]
        done = subprocess.run(
            [sys.executable, __file__, name, *flags], text=True, capture_output=True
        )
        lines = done.stderr.strip().splitlines()
        counts = [line.split()[1] for line in lines if line.startswith("Done ")]
        print(f"{name:20} {counts[0] + ' runs' if counts else 'FAILED'}", flush=True)
        if done.returncode:
            print(done.stdout[-4000:], "\n".join(lines[-40:]), sep="\n", flush=True)
        return done.returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = sum(code != 0 for code in pool.map(run, targets.TARGETS))
    if failed:
        print(f"{failed} targets failed; the inputs are in {folder}")
    return failed


if __name__ == "__main__":
    if sys.argv[1] == "--all":
        sys.exit(min(fuzz_all(int(sys.argv[2])), 1))
    fuzz_one(sys.argv[1], sys.argv[2:])
