"""The service: wiring, listening, health, reflection, signals, drain.

`serve` is for command lines such as `steerage serve`, `running_server` for other asyncio programs.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, cast

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import start_http_server

from steering_service.core.address import check_address, loopback
from steering_service.core.errors import InvalidInput, Refused, Unavailable
from steering_service.core.signing import TrustRoots
from steering_service.core.wire import MAX_MESSAGE_BYTES
from steering_service.server import metrics
from steering_service.server.artifact_rpc import ArtifactRpc
from steering_service.server.artifacts import CACHE_BYTES, Artifacts
from steering_service.server.callers import Callers
from steering_service.server.calls import IDLE_S, UNARY_S, Calls
from steering_service.server.channel_rpc import ChannelRpc
from steering_service.server.health import SERVICE as HEALTH
from steering_service.server.health import Health
from steering_service.server.hub import POLL_S, Hub
from steering_service.server.identities import Identities
from steering_service.server.limits import Meter
from steering_service.server.node_rpc import NodeRpc
from steering_service.server.nodes import BOARD_S, Nodes
from steering_service.server.revocations import RevocationList
from steering_service.server.store_calls import PATIENCE_S
from steering_service.server.tls import ServerTls
from steering_service.server.tracing import Tracing
from steering_service.server.watch_rpc import HEARTBEAT_S, WatchRpc
from steering_service.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    channel_pb2,
    channel_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)
from store.channels import ChannelLog
from store.location import Location
from store.proposals import Proposals
from store.registry import Registry
from store.replicas import ReplicaBoard
from store.revocations import RevocationLog
from store.uploads import Uploads

log = logging.getLogger(__name__)

DEFAULT_ADDRESS: Final = "127.0.0.1:0"
MAX_PAYLOAD_BYTES: Final = 256 << 20
DRAIN_S: Final = 5.0
SERVICES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (artifact_pb2, "ArtifactService"),
        (channel_pb2, "ChannelService"),
        (node_pb2, "NodeService"),
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
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Two services on one port would each get half of the calls: a second one must fail instead.
    ("grpc.so_reuseport", 0),
    # What one connection may hold: calls and streams at once, and bytes of a call's metadata.
    ("grpc.max_concurrent_streams", 1024),
    # A fleet that comes back opens its streams at once. Of more than this many that are not yet
    # accepted gRPC cancels some at random (its own limit is 1,000).
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
)


@asynccontextmanager
async def running_server(
    store_url: str,
    address: str = DEFAULT_ADDRESS,
    *,
    trust_roots: TrustRoots | None = None,
    tls_certificate: Path | str | None = None,
    tls_key: Path | str | None = None,
    client_ca: Path | str | None = None,
    access_policy: Path | str | None = None,
    metrics_address: str | None = None,
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    unary_s: float = UNARY_S,
    idle_s: float = IDLE_S,
    poll_s: float = POLL_S,
    heartbeat_s: float = HEARTBEAT_S,
    board_s: float = BOARD_S,
    cache_bytes: int = CACHE_BYTES,
    drain_s: float = DRAIN_S,
) -> AsyncIterator[str]:
    """Serve while the body runs; drain on the way out.

    Args:
        store_url: Where artifacts and channels are kept; see `store.location.Location.open`.
        address: host:port; port 0 takes a free one. Anything but loopback needs TLS and an access
            policy.
        trust_roots: Keys accepted on publish; None accepts any signature (nodes still check).
        tls_certificate: PEM file of the service's certificate, with intermediate ones; reread when
            it changes, as are the next two.
        tls_key: PEM file of its key.
        client_ca: PEM file of the authorities of client certificates. With it every client needs
            one; without it callers need bearer tokens.
        access_policy: TOML file that says who may do what; see `policy`. Reread when it changes.
            None: everybody on this machine may do everything.
        metrics_address: Loopback host:port where Prometheus finds the metrics; None for nowhere.
        max_payload_bytes: Largest artifact payload accepted.
        unary_s: Seconds that a unary call gets, if its own deadline is not sooner.
        idle_s: Seconds that a Publish waits for its next message.
        poll_s: Seconds between two looks for changes by other replicas.
        heartbeat_s: Seconds between two heartbeats of a watch stream.
        board_s: Seconds between two times that what is known of the nodes is laid down.
        cache_bytes: Memory for artifacts that were asked for lately.
        drain_s: Seconds that calls in progress get to finish.

    Yields:
        The bound address, host:port.

    Raises:
        InvalidInput: An address is malformed; the TLS files or the policy cannot be used.
        Refused: An address is not loopback, and what it needs then is missing.
        Unavailable: An address cannot be bound.
        StoreError: The store cannot be opened.
    """
    tls = _tls(tls_certificate, tls_key, client_ca)
    wanted = _allowed(address, tls=tls is not None, policy=access_policy is not None)
    metrics_at = loopback(metrics_address) if metrics_address is not None else None
    identities = Identities(Path(access_policy) if access_policy is not None else None)
    location = await asyncio.to_thread(Location.open, store_url, patience_s=PATIENCE_S)
    artifacts = Artifacts(Registry(location), cache_bytes=cache_bytes)
    channels = ChannelLog(location)
    revocations = RevocationList(RevocationLog(location), trust_roots)
    hub = Hub(channels, revocations, poll_s=poll_s)
    nodes = Nodes(ReplicaBoard(location), board_s=board_s)
    meter = Meter()
    callers = Callers(identities, meter, tls=tls is not None)
    calls = Calls(callers, meter, Tracing(), unary_s=unary_s, idle_s=idle_s)
    # It has what generated code asks of a server.
    door = cast("grpc.aio.Server", calls)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(
        ArtifactRpc(
            artifacts,
            Uploads(location),
            revocations,
            trust_roots=trust_roots,
            max_payload_bytes=max_payload_bytes,
        ),
        door,
    )
    channel_pb2_grpc.add_ChannelServiceServicer_to_server(
        ChannelRpc(channels, Proposals(location), artifacts, hub), door
    )
    watch_pb2_grpc.add_WatchServiceServicer_to_server(
        WatchRpc(hub, nodes, heartbeat_s=heartbeat_s), door
    )
    node_pb2_grpc.add_NodeServiceServicer_to_server(NodeRpc(nodes, channels), door)
    health = Health(SERVICES)
    calls.add_registered_method_handlers(HEALTH, health.handlers())
    names = (*SERVICES, HEALTH, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
        reflection.aio.ReflectionServicer(names), door
    )
    server = grpc.aio.server(handlers=[calls], options=_OPTIONS)
    bound = _bind(server, wanted, tls)
    await server.start()
    health.serve()
    background = [asyncio.create_task(work) for work in (hub.poll(), nodes.run())]
    for task in background:
        task.add_done_callback(_log_failure)
    if trust_roots is None:
        log.warning("no trust roots", extra={"effect": "publish accepts any signature"})
    extra: dict[str, object] = {"address": bound, "store": store_url, "tls": tls is not None}
    extra |= {"client_certificates": bool(client_ca), "access_policy": identities.known}
    log.info("service started", extra=extra)
    try:
        with _metrics(metrics_at):
            yield bound
    finally:
        # First say so, then end the watches (their nodes go elsewhere), then let calls finish.
        health.drain()
        hub.close()
        for task in background:
            task.cancel()
        await server.stop(drain_s)
        await nodes.close()
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
        address: host:port.
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
            _collect_seldom()
            (ready or _print_ready)(bound)
            await stop.wait()

    asyncio.run(run())


def _collect_seldom() -> None:
    """Keep garbage collection from stopping the loop for long.

    A full pass over what the imports made and a thousand streams keep takes a tenth of a second on
    an idle machine and half of one on a busy one, and a change to many nodes waits for it. What is
    there for good is left out from now on. What a call makes is freed without the collector, so the
    full passes, for what may have come about in cycles, can be few.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)


def _tls(
    certificate: Path | str | None, key: Path | str | None, client_ca: Path | str | None
) -> ServerTls | None:
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise InvalidInput(
            "TLS needs the service's certificate and its key; give both (and client_ca, for "
            "clients with certificates), or none",
            kind="tls_files",
        )
    return ServerTls(Path(certificate), Path(key), Path(client_ca) if client_ca else None)


def _allowed(address: str, *, tls: bool, policy: bool) -> str:
    """The address to listen on, if that is safe."""
    wanted = check_address(address, secure=tls)
    if tls and not policy and not _is_loopback(wanted):
        raise Refused(
            f"address {address!r} is not loopback, and without an access policy everybody could "
            "publish and promote there; give an access policy, or listen on 127.0.0.1",
            kind="address_insecure",
        )
    return wanted


def _is_loopback(address: str) -> bool:
    try:
        loopback(address)
    except Refused:
        return False
    return True


def _bind(server: grpc.aio.Server, address: str, tls: ServerTls | None) -> str:
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise _in_use(address, error) from error
    return f"{address.rpartition(':')[0]}:{port}"


@contextmanager
def _metrics(address: str | None) -> Iterator[None]:
    """Answer Prometheus while the body runs."""
    if address is None:
        yield
        return
    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), metrics.REGISTRY)
    except OSError as error:
        raise _in_use(address, error) from error
    log.info("metrics served", extra={"address": f"{host}:{server.server_port}"})
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _in_use(address: str, error: Exception) -> Unavailable:
    return Unavailable(
        f"cannot listen on {address}: {error}; is another service using the port?",
        kind="address_in_use",
    )


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("background work ended by a bug", exc_info=task.exception())


def _print_ready(address: str) -> None:
    sys.stdout.write(json.dumps({"address": address}) + "\n")
    sys.stdout.flush()
