"""Watchers: one process with many streams, each an inference node as far as the service can tell.

They read, report ACK and note when, on the clock that all processes of the machine share. Lines on
stdin ask: "reached R" is answered when all streams have acknowledged R, "state" at once.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Any

import grpc
import grpc.aio

from service_peers.wire import CHANNEL, WATCH, Job, aio_channel, client_credentials, read_job, tell
from steering_service.client.subscription import BACKOFF_S, MAX_BACKOFF_S
from steering_service.v1 import watch_pb2


class Watchers:
    """All streams of this process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.credentials = client_credentials(job["security"])
        self.revisions = [0] * job["streams"]
        self.back_at = [0.0] * job["streams"]
        """When the present, or last, stream of each got its first message."""
        self.acked_at = 0.0
        self.behind = job["streams"]
        self.target = 0
        self.breaks = 0
        self.changed = asyncio.Event()
        self.all_served = asyncio.Event()
        self.unserved = job["streams"]

    def aim(self, revision: int) -> None:
        """Count the streams that have not acknowledged this revision."""
        self.target = revision
        self.behind = sum(one < revision for one in self.revisions)

    async def follow(self, index: int, channel: grpc.aio.Channel) -> None:
        """One watcher: subscribe again whenever the stream ends."""
        failures = 0
        while True:
            before = self.back_at[index]
            try:
                await self._stream(index, channel.stream_stream(WATCH))
            except grpc.aio.AioRpcError:
                self.breaks += 1
            failures = 0 if self.back_at[index] > before else failures + 1
            if self.job["jitter"]:
                # As the product's client does, which makes a new connection each time.
                longest_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(failures, 10))
                await asyncio.sleep(random.uniform(0.0, longest_s))
                await channel.close()
                channel = aio_channel(self.job, self.credentials)
            elif failures:
                await asyncio.sleep(0.05)

    async def _stream(self, index: int, watch: Any) -> None:
        call = watch()
        subscribe = watch_pb2.Subscribe(
            node_id=f"{self.job['name']}-{index}",
            channel=CHANNEL,
            active_revision=self.revisions[index],
        )
        await call.write(watch_pb2.WatchRequest(subscribe=subscribe).SerializeToString())
        served = False
        while True:
            data = await call.read()
            if data is grpc.aio.EOF:
                await call.code()
                return
            response = watch_pb2.WatchResponse.FromString(data)
            if not served:
                self._served(index)
                served = True
            if response.WhichOneof("message") != "assignment":
                continue
            assignment = response.assignment
            report = watch_pb2.Report(
                channel=CHANNEL,
                revision=assignment.revision,
                nonce=assignment.nonce,
                status=watch_pb2.Report.STATUS_ACK,
                active_revision=assignment.revision,
            )
            await call.write(watch_pb2.WatchRequest(report=report).SerializeToString())
            if self.revisions[index] < self.target <= assignment.revision:
                self.behind -= 1
            self.revisions[index] = assignment.revision
            self.acked_at = time.monotonic()
            if not self.behind:
                self.changed.set()

    def _served(self, index: int) -> None:
        self.unserved -= not self.back_at[index]
        self.back_at[index] = time.monotonic()
        if not self.unserved:
            self.all_served.set()

    async def reached(self, revision: int) -> float:
        """Wait until all have acknowledged; when the last one did."""
        self.aim(revision)
        while self.behind:
            self.changed.clear()
            await self.changed.wait()
        return self.acked_at

    def state(self) -> Job:
        """What the streams have seen."""
        return {
            "revisions": self.revisions,
            "first_back_at": min(self.back_at),
            "last_back_at": max(self.back_at),
            "breaks": self.breaks,
        }


async def main() -> None:
    """Open all streams, then answer questions."""
    job = read_job()
    watchers = Watchers(job)
    channels = [aio_channel(job, watchers.credentials) for _ in range(job["connections"])]
    following = [
        asyncio.create_task(watchers.follow(index, channels[index % len(channels)]))
        for index in range(job["streams"])
    ]
    await watchers.all_served.wait()
    tell(ready=True)
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    async for line in stdin:
        question, _, argument = line.decode().strip().partition(" ")
        if question == "reached":
            tell(acked_at=await watchers.reached(int(argument)))
        elif question == "state":
            tell(**watchers.state())
        else:
            break
    for task in following:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main())
