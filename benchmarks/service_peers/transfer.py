"""Downloads of raw bytes by a blocking gRPC client, timed."""

from __future__ import annotations

import sys
import time
from typing import Any

from service_peers.wire import DOWNLOAD, read_job, sync_channel, tell


def main() -> None:
    """Warm up; then each line on stdin is one download."""
    job = read_job()
    request = bytes.fromhex(job["request"])
    with sync_channel(job) as channel:
        download: Any = channel.unary_stream(DOWNLOAD)
        sum(map(len, download(request)))
        tell(ready=True)
        for _ in sys.stdin:
            begun = time.perf_counter()
            received = sum(map(len, download(request)))
            tell(bytes=received, seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
