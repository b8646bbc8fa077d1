"""The service: wiring, health, reflection, signals, drain.

`serve` is for command lines such as `steerage serve`, `running_server` for other asyncio programs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from steering_service.core.address import loopback
from steering_service.core.errors import Unavailable
from steering_service.core.signing import TrustRoots
from steering_service.core.wire import MAX_MESSAGE_BYTES
from steering_service.server.artifact_rpc import ArtifactRpc
from steering_service.server.channel_rpc import ChannelRpc
from steering_service.server.hub import POLL_S, Hub
from steering_service.server.status import StatusInterceptor
from steering_service.server.watch_rpc import HEARTBEAT_S, WatchRpc
from steering_service.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    channel_pb2,
    channel_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)
from store.channels import ChannelLog
from store.location import Location
from store.registry import Registry

log = logging.getLogger(__name__)

DEFAULT_ADDRESS: Final = "127.0.0.1:0"
MAX_PAYLOAD_BYTES: Final = 256 << 20
DRAIN_S: Final = 5.0
SERVICES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (artifact_pb2, "ArtifactService"),
        (channel_pb2, "ChannelService"),
        (watch_pb2, "WatchService"),
    )
)
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A dead peer is noticed within 30 s; nodes may ping every 10 s, also between calls.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # Two services on one port would each get half of the calls: a second one must fail instead.
    ("grpc.so_reuseport", 0),
)


@asynccontextmanager
async def running_server(
    store_url: str,
    address: str = DEFAULT_ADDRESS,
    *,
    trust_roots: TrustRoots | None = None,
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    poll_s: float = POLL_S,
    heartbeat_s: float = HEARTBEAT_S,
    drain_s: float = DRAIN_S,
) -> AsyncIterator[str]:
    """Serve while the body runs; drain on the way out.

    Args:
        store_url: Where artifacts and channels are kept; see `store.location.Location.open`.
        address: Loopback host:port; port 0 takes a free one.
        trust_roots: Keys accepted on publish; None accepts any signature (nodes still check).
        max_payload_bytes: Largest artifact payload accepted.
        poll_s: Seconds between two looks for changes by other replicas.
        heartbeat_s: Seconds between two heartbeats of a watch stream.
        drain_s: Seconds that calls in progress get to finish.

    Yields:
        The bound address, host:port.

    Raises:
        InvalidInput, Refused: The address is malformed or not loopback.
        Unavailable: The address cannot be bound.
        StoreError: The store cannot be opened.
    """
    wanted = loopback(address)
    location = await asyncio.to_thread(Location.open, store_url)
    registry, channels = Registry(location), ChannelLog(location)
    hub = Hub(channels, poll_s=poll_s)
    server = grpc.aio.server(interceptors=[StatusInterceptor()], options=_OPTIONS)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(
        ArtifactRpc(registry, trust_roots=trust_roots, max_payload_bytes=max_payload_bytes), server
    )
    channel_pb2_grpc.add_ChannelServiceServicer_to_server(
        ChannelRpc(channels, registry, hub), server
    )
    watch_pb2_grpc.add_WatchServiceServicer_to_server(
        WatchRpc(hub, heartbeat_s=heartbeat_s), server
    )
    healthiness = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthiness, server)
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    bound = _bind(server, wanted)
    await server.start()
    for name in ("", *SERVICES):
        await healthiness.set(name, health_pb2.HealthCheckResponse.SERVING)
    poll = asyncio.create_task(hub.poll())
    poll.add_done_callback(_log_failure)
    if trust_roots is None:
        log.warning("no trust roots", extra={"effect": "publish accepts any signature"})
    log.info("service started", extra={"address": bound, "store": store_url})
    try:
        yield bound
    finally:
        # First say so, then end the watches (their nodes go elsewhere), then let calls finish.
        await healthiness.enter_graceful_shutdown()
        hub.close()
        poll.cancel()
        await server.stop(drain_s)
        log.info("service stopped", extra={"address": bound})


def serve(
    store_url: str,
    address: str = DEFAULT_ADDRESS,
    *,
    trust_roots: TrustRoots | None = None,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. To be called in the main thread.

    Args:
        store_url: See `running_server`, as for the rest.
        address: Loopback host:port.
        trust_roots: Keys accepted on publish.
        ready: Called with the bound address once calls are answered; by default it prints one
            line of JSON, ``{"address": "127.0.0.1:41234"}``.
        options: Others of `running_server`.
    """

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with running_server(store_url, address, trust_roots=trust_roots, **options) as bound:
            (ready or _print_ready)(bound)
            await stop.wait()

    asyncio.run(run())


def _bind(server: grpc.aio.Server, address: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise Unavailable(
            f"cannot listen on {address}: {error}; is another service using the port?",
            kind="address_in_use",
        ) from error
    return f"{address.rpartition(':')[0]}:{port}"


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("store poll ended by a bug", exc_info=task.exception())


def _print_ready(address: str) -> None:
    sys.stdout.write(json.dumps({"address": address}) + "\n")
    sys.stdout.flush()
