"""A node that swaps artifacts in, beside bare downloads of the same bytes, in one process.

The stopwatch of a swap runs from the moment that an Assignment arrives until `active.current` has
its revision; that of a download until all its bytes are joined. Nothing of the artifact is on the
node's disk before.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from service_peers.wire import (
    CHANNEL,
    DOWNLOAD,
    PROMOTE,
    read_job,
    sync_channel,
    tell,
)
from steering_service.client.inbox import Inbox
from steering_service.client.subscription import Subscription
from steering_service.core.signing import TrustRoots
from steering_service.v1 import artifact_pb2, channel_pb2, watch_pb2

PATIENCE_S = 30.0


def main() -> None:
    """Take turns, the job's number of times."""
    job = read_job()
    arrivals = _note_arrivals()
    with tempfile.TemporaryDirectory(dir=job["folder"]) as cache:
        subscription = Subscription(
            job["address"],
            CHANNEL,
            "bench-node",
            cache,
            TrustRoots.from_paths([job["trust"]]),
            job["fingerprint"],
            **_credentials(job),
        )
        with (
            subscription,
            sync_channel(job) as operator,
            sync_channel(job | {"address": job["bare_address"]}) as bare,
        ):
            promote: Any = operator.unary_unary(PROMOTE)
            download: Any = bare.unary_stream(DOWNLOAD)
            for revision in range(1, job["times"] + 2):
                digest = job["digests"][revision % len(job["digests"])]
                shutil.rmtree(Path(cache) / digest, ignore_errors=True)
                request = channel_pb2.PromoteRequest(
                    channel=CHANNEL,
                    expected_revision=revision - 1,
                    artifact=digest,
                    strength=1.0,
                    actor=job["actor"],
                    reason="bench",
                )
                sent = time.monotonic()
                promote(request.SerializeToString())
                subscription.active.wait_for(revision, PATIENCE_S)
                swapped = time.monotonic()
                time.sleep(job["pause_s"])  # whatever the node does after the swap
                wanted = artifact_pb2.DownloadRequest(digest=digest).SerializeToString()
                begun = time.monotonic()
                received = len(b"".join(download(wanted)))
                downloaded = time.monotonic()
                time.sleep(job["pause_s"])
                if revision > 1:  # the first of each is for warming up
                    tell(
                        swap_s=swapped - arrivals[revision],
                        promote_to_active_s=swapped - sent,
                        download_s=downloaded - begun,
                        bytes=received,
                    )


def _credentials(job: dict[str, Any]) -> dict[str, Any]:
    security = job["security"]
    if security is None:
        return {}
    from steering_service.client.credentials import Credentials  # comes with TLS

    return {
        "credentials": Credentials(
            ca=Path(security["authority"]),
            certificate=Path(security["client_certificate"]),
            key=Path(security["client_key"]),
            token=None,
            server_name=None,
        )
    }


def _note_arrivals() -> dict[int, float]:
    """Revision to the time that its Assignment arrived; filled in from now on."""
    arrivals: dict[int, float] = {}
    put = Inbox.put

    def noting(inbox: Inbox, response: watch_pb2.WatchResponse) -> None:
        if response.WhichOneof("message") == "assignment":
            arrivals[response.assignment.revision] = time.monotonic()
        put(inbox, response)

    Inbox.put = noting  # type: ignore[assignment, method-assign]
    return arrivals


if __name__ == "__main__":
    main()
