"""ArtifactCache: artifacts on a node's disk, fetched with resumption and verified at every use.

    CACHE/<digest>/{manifest.json, payload.safetensors, signature.json}   complete, never changed
    CACHE/.<digest>.partial                                               a payload in progress
    CACHE/revocations.json                                                what must not run any more

What lies on the disk is trusted as little as what comes over the wire: each load checks digests,
signature, revocations and model again. A cache belongs to one service (and its replicas).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from steering_service.client.connection import Connection
from steering_service.client.credentials import Credentials
from steering_service.client.disk import sync_folder
from steering_service.client.download import (
    DEADLINE_S,
    MAX_PAYLOAD_BYTES,
    Download,
    Interruption,
    Never,
    Partial,
)
from steering_service.client.revoked import RevocationFile
from steering_service.core.artifact import Artifact, Manifest, assemble, parse_manifest
from steering_service.core.errors import (
    Corrupt,
    InvalidInput,
    NotFound,
    Refused,
    SteeringError,
    Unavailable,
)
from steering_service.core.signing import TrustRoots
from steering_service.v1 import artifact_pb2

log = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
PAYLOAD: Final = "payload.safetensors"
SIGNATURE: Final = "signature.json"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """An artifact that this node may use.

    Attributes:
        signature: DSSE envelope.
        key_ids: All trusted keys that signed it.
        kept: Whether it is on the disk.
    """

    artifact: Artifact
    signature: bytes = field(repr=False)
    key_ids: tuple[str, ...]
    kept: bool


class ArtifactCache:
    """Verified artifacts in a folder. Several processes may share it.

    Args:
        root: The folder; made when missing.
        trust_roots: Keys whose signatures count.
        model_fingerprint: Of the model this node runs (`core.fingerprint`); artifacts for any
            other are refused. None skips the check, for tools that look at artifacts but run none.

    Attributes:
        root: The folder.
        revocations: The list that artifacts are checked against.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        trust_roots: TrustRoots,
        model_fingerprint: str | None = None,
    ) -> None:
        self.root = Path(root)
        self.revocations = RevocationFile(self.root / "revocations.json", trust_roots)
        self._trust_roots = trust_roots
        self._model_fingerprint = model_fingerprint

    def load(self, digest: str) -> Artifact:
        """An artifact from the disk.

        Raises:
            NotFound: Not cached.
            Corrupt, Refused, InvalidInput: Cached, but no longer acceptable; or the revocation
                list is damaged.
            Unavailable: The disk refused.
        """
        return self.read(digest).artifact

    def fetch(self, digest: str, connection: Connection) -> Artifact:
        """An artifact from the disk, or else from the service, then kept on the disk.

        Raises:
            SteeringError: See `get` and `keep`.
        """
        verified = self.get(digest, connection)
        self.keep(verified)
        return verified.artifact

    def read(self, digest: str) -> Verified:
        """As `load`."""
        folder = self.root / _checked(digest)
        self.revocations.restore()
        try:
            manifest = (folder / MANIFEST).read_bytes()
            signature = (folder / SIGNATURE).read_bytes()
            payload = (folder / PAYLOAD).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"artifact {digest} is not in {self.root}", kind="not_cached") from error
        except OSError as error:
            raise _disk_error(self.root, error) from error
        parsed, key_ids = self._verify(digest, manifest, signature)
        artifact = assemble(parsed, manifest, payload, hashlib.sha256(payload).hexdigest())
        return Verified(artifact, signature, key_ids, kept=True)

    def get(
        self,
        digest: str,
        connection: Connection,
        interruption: Interruption | None = None,
    ) -> Verified:
        """An artifact from the disk, or else from the service; not yet on the disk then.

        Args:
            digest: sha256 of the manifest.
            connection: To the service.
            interruption: Stops it at once; what came is kept, and the next attempt goes on there.

        Raises:
            Refused: Unsigned, signed by others, revoked, or made for another model; or the
                revocation list on the disk cannot be believed (see `RevocationFile`).
            InvalidInput: Malformed, not finite or too large.
            NotFound: The service does not have it.
            Corrupt: The bytes are not those that the digest names; or as for Refused.
            Unavailable: No answer, or none to this caller (see `Connection.fetching`), or
                interrupted (kind ``fetch_interrupted``).
        """
        # Before anything is asked for: without it nothing that comes could be used.
        self.revocations.restore()
        try:
            return self.read(digest)
        except (NotFound, Corrupt, Refused, InvalidInput):
            # What is on the disk may be damaged and the service's copy good. If that is refused
            # too, the disk's stays, in case a mistake in the trust roots is put right.
            _checked(digest)
        except Unavailable as error:
            # A broken disk must not keep a node from what its channel asks for.
            log.warning("artifact cache not read", extra={"digest": digest, "why": str(error)})
        interruption = interruption or Never()
        asked = _ask_manifest(digest, connection)
        with Partial(self._partial(digest)) as partial:
            download = Download(digest, connection, partial)
            try:
                answer = _take_manifest(digest, asked, connection, interruption)
                manifest, key_ids = self._verify(digest, answer.manifest, answer.signature)
                payload = manifest.payload
                _check_size(digest, payload.size)
                data, sha256 = download.receive(payload.size, payload.sha256, interruption)
            except BaseException:
                download.cancel()
                raise
            try:
                artifact = assemble(manifest, answer.manifest, data, sha256)
            except SteeringError:
                partial.remove()
                raise
        return Verified(artifact, answer.signature, key_ids, kept=False)

    def keep(self, verified: Verified) -> None:
        """Put an artifact on the disk, unless it is there. It is complete or absent, always.

        Raises:
            Unavailable: The disk refused (kind ``cache_disk``).
        """
        if verified.kept:
            return
        artifact = verified.artifact
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._keep(artifact, verified.signature)
            self._partial(artifact.digest).unlink(missing_ok=True)
        except OSError as error:
            raise _disk_error(self.root, error) from error

    def _partial(self, digest: str) -> Path:
        return self.root / f".{digest}.partial"

    def _verify(
        self, digest: str, manifest_bytes: bytes, signature: bytes
    ) -> tuple[Manifest, tuple[str, ...]]:
        got = hashlib.sha256(manifest_bytes).hexdigest()
        if got != digest:
            raise Corrupt(
                f"manifest of artifact {digest} has sha256 {got}; it was altered or mixed up",
                kind="manifest_digest",
            )
        key_ids = self._trust_roots.signers(signature, manifest_bytes)
        self.revocations.check_artifact(digest, key_ids)
        manifest = parse_manifest(manifest_bytes)
        if self._model_fingerprint not in (None, manifest.model.fingerprint):
            raise Refused(
                f"artifact {digest} was made for model {manifest.model.name!r} with fingerprint "
                f"{manifest.model.fingerprint}, this node runs {self._model_fingerprint}; fit the "
                "direction on this model, or point the channel at an artifact for it",
                kind="model_fingerprint",
            )
        return manifest, key_ids

    def _keep(self, artifact: Artifact, signature: bytes) -> None:
        # Named so that no artifact, no partial file and no state has such a name.
        folder = Path(tempfile.mkdtemp(dir=self.root, prefix=f".{artifact.digest}."))
        try:
            for name, data in (
                (MANIFEST, artifact.manifest_bytes),
                (PAYLOAD, artifact.payload_bytes),
                (SIGNATURE, signature),
            ):
                with (folder / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(folder)
            target = self.root / artifact.digest
            with suppress(FileNotFoundError):
                # Here only if it failed its checks; a folder is not replaced in one step.
                target.rename(folder / "replaced")
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
                # Another process of this node was first, with the same bytes.
            sync_folder(self.root)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(self.root / artifact.digest / "replaced", ignore_errors=True)


def fetch_artifact(
    digest: str,
    address: str,
    *,
    cache_dir: str | os.PathLike[str],
    trust_roots: TrustRoots,
    model_fingerprint: str,
    credentials: Credentials | None = None,
) -> Artifact:
    """One artifact, checked as a node checks it, for programs that follow no channel.

    Args:
        digest: sha256 of the manifest.
        address: host:port of the service; not asked where the artifact is cached.
        cache_dir: See `ArtifactCache`; as for the two that follow.
        credentials: See `Connection`.

    Raises:
        Refused, InvalidInput, NotFound, Corrupt, Unavailable: See `ArtifactCache.fetch`.
    """
    cache = ArtifactCache(cache_dir, trust_roots=trust_roots, model_fingerprint=model_fingerprint)
    with suppress(NotFound, Corrupt, Refused, InvalidInput):
        # As in `ArtifactCache.get`: the service's copy may be good.
        return cache.load(digest)
    with Connection(address, credentials) as connection:
        with connection.translated():
            answer = connection.artifacts.GetRevocations(
                artifact_pb2.GetRevocationsRequest(), timeout=DEADLINE_S
            )
        if answer.envelope:
            try:
                cache.revocations.offer(answer.envelope)
                cache.revocations.keep()
            except (Refused, InvalidInput, Unavailable) as error:
                # What this disk has refuses at least as much.
                log.warning("revocations refused", extra={"kind": error.kind, "why": str(error)})
        return cache.fetch(digest, connection)


def _ask_manifest(digest: str, connection: Connection) -> Any:
    request = artifact_pb2.GetManifestRequest(digest=digest)
    return connection.artifacts.GetManifest.future(request, timeout=DEADLINE_S)


def _take_manifest(
    digest: str, call: Any, connection: Connection, interruption: Interruption
) -> artifact_pb2.GetManifestResponse:
    try:
        with connection.fetching(), interruption.cancelling(call.cancel):
            answer: artifact_pb2.GetManifestResponse = call.result()
            return answer
    except (grpc.FutureCancelledError, Unavailable) as error:
        if interruption.pending:
            raise Unavailable(
                f"artifact {digest}: fetch stopped before it began", kind="fetch_interrupted"
            ) from None
        if isinstance(error, Unavailable):
            raise
        raise Unavailable(f"artifact {digest}: the call was cancelled", kind="rpc") from error


def _check_size(digest: str, size: int) -> None:
    if size > MAX_PAYLOAD_BYTES:
        raise InvalidInput(
            f"artifact {digest}: payload of {size} bytes; nodes accept at most {MAX_PAYLOAD_BYTES}",
            kind="payload_size",
        )


def _checked(digest: str) -> str:
    if _DIGEST.fullmatch(digest) is None:
        raise InvalidInput(
            f"artifact digest {digest[:100]!r}: expected 64 lowercase hex digits", kind="digest"
        )
    return digest


def _disk_error(root: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"artifact cache {str(root)!r}: {error}; check its permissions and free space",
        kind="cache_disk",
    )
