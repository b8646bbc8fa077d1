"""A health checker that asks every 100 ms, each time on a new connection, as a kubelet does."""

from __future__ import annotations

import asyncio
import sys
import time

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service_peers.wire import aio_channel, client_credentials, read_job, tell

INTERVAL_S = 0.1
DEADLINE_S = 5.0


async def main() -> None:
    """Ask until a line comes on stdin, then tell (begun at, seconds, complaint) of each answer."""
    job = read_job()
    credentials = client_credentials(job["security"])
    answers: list[tuple[float, float, str]] = []

    async def ask() -> None:
        begun = time.monotonic()
        async with aio_channel(job, credentials) as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=DEADLINE_S
                )
                serving = answer.status == health_pb2.HealthCheckResponse.SERVING
                wrong = "" if serving else f"status {answer.status}"
            except grpc.aio.AioRpcError as error:
                wrong = f"{error.code().name}: {error.details()}"
        answers.append((begun, time.monotonic() - begun, wrong))

    loop = asyncio.get_running_loop()
    over = loop.run_in_executor(None, sys.stdin.readline)
    asking: set[asyncio.Task[None]] = set()
    tell(ready=True)
    while not over.done():
        task = asyncio.create_task(ask())
        asking.add(task)
        task.add_done_callback(asking.discard)
        await asyncio.sleep(INTERVAL_S)
    await asyncio.gather(*asking)
    tell(answers=answers)


if __name__ == "__main__":
    asyncio.run(main())
