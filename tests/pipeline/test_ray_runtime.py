"""Starting Ray."""

from __future__ import annotations

import os
import subprocess
import sys

CONNECTED = """
from pipeline.ray_runtime import ray_session
from concurrent import futures
import grpc, ray

server = grpc.server(futures.ThreadPoolExecutor(1))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
channels = [grpc.insecure_channel(f"127.0.0.1:{port}") for _ in range(5)]
for channel in channels:
    grpc.channel_ready_future(channel).result(10)
# A daemon is lost in two starts of three, or so.
for _ in range(3):
    with ray_session(None, 1):
        pass
"""


def test_open_channels_do_not_end_rays_daemons() -> None:
    own = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run(
        [sys.executable, "-c", CONNECTED], capture_output=True, text=True, timeout=200, env=own
    )
    assert done.returncode == 0, done.stderr[-2000:]
