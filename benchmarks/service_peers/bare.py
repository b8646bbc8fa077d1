"""The bare server: grpc.aio and nothing else. It hands out bytes that were made beforehand.

No protobuf, no interceptor, no store, no log, no look at who calls. Watch streams are served with
`read` and `write`, which is less work for grpc.aio than generators, and a change is one message
for all of them, made once; it keeps no queue and does not look at what is reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from service_peers.wire import CHANNEL, SERVER_OPTIONS, Job, read_job, server_credentials, tell
from steering_service.v1 import artifact_pb2, channel_pb2, watch_pb2

CHUNK_BYTES = 1 << 20


class Bare(grpc.GenericRpcHandler):
    """All calls of the benchmark."""

    def __init__(self, manifest: bytes, payload: bytes, artifact: str) -> None:
        self._manifest = manifest
        self._chunks = [
            artifact_pb2.DownloadResponse(
                offset=start, chunk=payload[start : start + CHUNK_BYTES]
            ).SerializeToString()
            for start in range(0, len(payload), CHUNK_BYTES)
        ]
        self._artifact = artifact
        self._revision = 0
        self._watchers: set[Any] = set()
        self._handlers: dict[str, Any] = {
            "GetManifest": grpc.unary_unary_rpc_method_handler(self.get_manifest),
            "Download": grpc.unary_stream_rpc_method_handler(self.download),
            "Promote": grpc.unary_unary_rpc_method_handler(self.promote),
            "Watch": grpc.stream_stream_rpc_method_handler(self.watch),
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method."""
        return self._handlers.get(str(handler_call_details.method).rpartition("/")[2])

    async def get_manifest(self, request: bytes, context: Any) -> bytes:
        """Always the same."""
        return self._manifest

    async def download(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Always from the start."""
        for chunk in self._chunks:
            yield chunk

    async def promote(self, request: bytes, context: Any) -> bytes:
        """Send the next revision to every stream."""
        self._revision += 1
        response = watch_pb2.WatchResponse(
            assignment=watch_pb2.Assignment(
                channel=CHANNEL,
                revision=self._revision,
                nonce=self._revision,
                artifact=self._artifact,
                strength=1.0,
                enabled=True,
                share=1.0,
            )
        ).SerializeToString()
        await asyncio.gather(*(watcher.write(response) for watcher in self._watchers))
        entry = channel_pb2.ChannelEntry(channel=CHANNEL, revision=self._revision)
        return channel_pb2.PromoteResponse(entry=entry).SerializeToString()

    async def watch(self, requests: object, context: Any) -> None:
        """A heartbeat, then whatever `promote` sends."""
        await context.read()
        heartbeat = watch_pb2.Heartbeat(head_revision=self._revision, interval_ms=3_600_000)
        await context.write(watch_pb2.WatchResponse(heartbeat=heartbeat).SerializeToString())
        self._watchers.add(context)
        try:
            while await context.read() is not grpc.aio.EOF:
                pass
        finally:
            self._watchers.discard(context)


async def serve(bare: Bare, job: Job) -> None:
    """Serve until killed."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((bare,))
    if job["security"] is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", server_credentials(job["security"]))
    await server.start()
    tell(address=f"127.0.0.1:{port}")
    await server.wait_for_termination()


def main() -> None:
    """Read what is to be sent, and serve it."""
    job = read_job()
    manifest, payload = Path(job["manifest"]).read_bytes(), Path(job["payload"]).read_bytes()
    asyncio.run(serve(Bare(manifest, payload, job["artifact"]), job))


if __name__ == "__main__":
    main()
