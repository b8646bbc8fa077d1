"""`steerage serve` in a process of its own, for commands that bring their own service."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import GateRefused


@contextmanager
def running_service(store: str, public_key: Path, log: Path) -> Iterator[str]:
    """Serve a store on a free loopback port inside the block.

    Args:
        store: As `--store`.
        public_key: What publishers have to be signed by.
        log: Where its log goes, anew.

    Yields:
        HOST:PORT.

    Raises:
        GateRefused: The service did not start; its message is in its log.
    """
    command = [
        *(sys.executable, "-c", "from pipeline.main import run; run()"),
        *("serve", "--store", store, "--address", "127.0.0.1:0"),
        *("--trust", str(public_key), "--json"),
    ]
    with ExitStack() as stack:
        stderr = stack.enter_context(log.open("w"))
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        )
        stack.callback(process.terminate)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise GateRefused(
                f"the steering service did not start:\n{log.read_text().strip()}",
                kind="service_start",
            )
        yield json.loads(line)["address"]
