"""What the drivers and the bare server share: methods, options, credentials, raw bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from steering_service.client import connection
from steering_service.server import app

MANIFEST: Final = "/steering_service.v1.ArtifactService/GetManifest"
DOWNLOAD: Final = "/steering_service.v1.ArtifactService/Download"
PROMOTE: Final = "/steering_service.v1.ChannelService/Promote"
WATCH: Final = "/steering_service.v1.WatchService/Watch"
CHANNEL: Final = "bench"
# What the product's service and client set; the bare ones get the same.
SERVER_OPTIONS: Final = app._OPTIONS
CLIENT_OPTIONS: Final = connection._OPTIONS
# Channels of one process would share one TCP connection.
OWN_CONNECTION: Final = (*CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1))

Job = dict[str, Any]


def read_job() -> Job:
    """The job of this process: the JSON file that its first argument names."""
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    return job


def tell(**values: Any) -> None:
    """A line of JSON on stdout, now."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def client_credentials(security: Job | None) -> grpc.ChannelCredentials | None:
    """Mutual TLS, or None."""
    if security is None:
        return None
    return grpc.ssl_channel_credentials(
        Path(security["authority"]).read_bytes(),
        Path(security["client_key"]).read_bytes(),
        Path(security["client_certificate"]).read_bytes(),
    )


def server_credentials(security: Job) -> grpc.ServerCredentials:
    """Mutual TLS."""
    pair = (
        Path(security["server_key"]).read_bytes(),
        Path(security["server_certificate"]).read_bytes(),
    )
    return grpc.ssl_server_credentials(
        [pair], Path(security["authority"]).read_bytes(), require_client_auth=True
    )


def sync_channel(job: Job) -> grpc.Channel:
    """A blocking channel to the job's address."""
    credentials = client_credentials(job["security"])
    if credentials is None:
        return grpc.insecure_channel(job["address"], options=OWN_CONNECTION)
    return grpc.secure_channel(job["address"], credentials, options=OWN_CONNECTION)


def aio_channel(job: Job, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """An asyncio channel to the job's address with a TCP connection of its own."""
    if credentials is None:
        return grpc.aio.insecure_channel(job["address"], options=OWN_CONNECTION)
    return grpc.aio.secure_channel(job["address"], credentials, options=OWN_CONNECTION)
