"""ArtifactCache: artifacts on a node's disk, fetched with resumption and verified at every use.

    CACHE/<digest>/{manifest.json, payload.safetensors, signature.json}   complete, never changed
    CACHE/.<digest>.partial                                               a payload in progress

What lies on the disk is trusted as little as what comes over the wire: each load checks digests,
signature and model again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from steering_service.client.connection import Connection
from steering_service.core.artifact import Artifact, Manifest, parse, parse_manifest
from steering_service.core.errors import Corrupt, InvalidInput, NotFound, Refused, Unavailable
from steering_service.core.signing import TrustRoots
from steering_service.v1 import artifact_pb2

MAX_PAYLOAD_BYTES: Final = 1 << 30
MANIFEST: Final = "manifest.json"
PAYLOAD: Final = "payload.safetensors"
SIGNATURE: Final = "signature.json"
_DEADLINE_S: Final = 10.0
# A download slower than this is cut off; what arrived is kept, and the next attempt goes on there.
_MIN_BYTES_PER_S: Final = 256 << 10
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class ArtifactCache:
    """Verified artifacts in a folder. Several processes may share it.

    Args:
        root: The folder; made when missing.
        trust_roots: Keys whose signatures count.
        model_fingerprint: Of the model this node runs (`core.fingerprint`); artifacts for any
            other are refused. None skips the check, for tools that look at artifacts but run none.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        trust_roots: TrustRoots,
        model_fingerprint: str | None = None,
    ) -> None:
        self.root = Path(root)
        self._trust_roots = trust_roots
        self._model_fingerprint = model_fingerprint

    def load(self, digest: str) -> Artifact:
        """An artifact from the disk.

        Raises:
            NotFound: Not cached.
            Corrupt, Refused, InvalidInput: Cached, but no longer acceptable.
        """
        folder = self.root / _checked(digest)
        try:
            manifest = (folder / MANIFEST).read_bytes()
            signature = (folder / SIGNATURE).read_bytes()
            payload = (folder / PAYLOAD).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"artifact {digest} is not in {self.root}", kind="not_cached") from error
        except OSError as error:
            raise _disk_error(self.root, error) from error
        self._verify(digest, manifest, signature)
        return parse(manifest, payload)

    def fetch(
        self,
        digest: str,
        connection: Connection,
        *,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Artifact:
        """An artifact from the disk, or else from the service, then kept on the disk.

        Args:
            digest: sha256 of the manifest.
            connection: To the service.
            interrupted: Asked between chunks; when true, the fetch stops and can be resumed.

        Raises:
            Refused: Unsigned, signed by others, or made for another model.
            InvalidInput: Malformed, not finite or too large.
            NotFound: The service does not have it.
            Corrupt: The bytes are not those that the digest names.
            Unavailable: No answer, interrupted (kind ``fetch_interrupted``), or a full disk.
        """
        try:
            return self.load(digest)
        except (NotFound, Corrupt, Refused, InvalidInput):
            # What is on the disk may be damaged and the service's copy good. If that is refused
            # too, the disk's stays, in case a mistake in the trust roots is put right.
            _checked(digest)
        with connection.translated():
            answer = connection.artifacts.GetManifest(
                artifact_pb2.GetManifestRequest(digest=digest), timeout=_DEADLINE_S
            )
        manifest = self._verify(digest, answer.manifest, answer.signature)
        if manifest.payload.size > MAX_PAYLOAD_BYTES:
            raise InvalidInput(
                f"artifact {digest}: payload of {manifest.payload.size} bytes; nodes accept at "
                f"most {MAX_PAYLOAD_BYTES}",
                kind="payload_size",
            )
        try:
            payload = self._payload(digest, manifest, connection, interrupted)
            artifact = parse(answer.manifest, payload)
            self._keep(artifact, answer.signature)
        except OSError as error:
            raise _disk_error(self.root, error) from error
        return artifact

    def _verify(self, digest: str, manifest_bytes: bytes, signature: bytes) -> Manifest:
        got = hashlib.sha256(manifest_bytes).hexdigest()
        if got != digest:
            raise Corrupt(
                f"manifest of artifact {digest} has sha256 {got}; it was altered or mixed up",
                kind="manifest_digest",
            )
        self._trust_roots.verify(signature, manifest_bytes)
        manifest = parse_manifest(manifest_bytes)
        if self._model_fingerprint not in (None, manifest.model.fingerprint):
            raise Refused(
                f"artifact {digest} was made for model {manifest.model.name!r} with fingerprint "
                f"{manifest.model.fingerprint}, this node runs {self._model_fingerprint}; fit the "
                "direction on this model, or point the channel at an artifact for it",
                kind="model_fingerprint",
            )
        return manifest

    def _payload(
        self,
        digest: str,
        manifest: Manifest,
        connection: Connection,
        interrupted: Callable[[], bool],
    ) -> bytes:
        size = manifest.payload.size
        self.root.mkdir(parents=True, exist_ok=True)
        with self._partial(digest) as file:
            offset = file.seek(0, os.SEEK_END)
            resumed = 0 < offset <= size
            if not resumed:
                offset = file.seek(0)
                file.truncate()
            self._download(file, digest, offset, size, connection, interrupted)
            payload = _read_all(file)
            if resumed and hashlib.sha256(payload).hexdigest() != manifest.payload.sha256:
                # The part from before may be what is wrong: once more, from the start.
                file.seek(0)
                file.truncate()
                self._download(file, digest, 0, size, connection, interrupted)
                payload = _read_all(file)
        return payload

    def _download(
        self,
        file: BinaryIO,
        digest: str,
        offset: int,
        size: int,
        connection: Connection,
        interrupted: Callable[[], bool],
    ) -> None:
        if offset == size:
            return
        timeout_s = _DEADLINE_S + (size - offset) / _MIN_BYTES_PER_S
        request = artifact_pb2.DownloadRequest(digest=digest, offset=offset)
        with connection.translated():
            call = connection.artifacts.Download(request, timeout=timeout_s)
            for response in call:
                if response.offset != offset or offset + len(response.chunk) > size:
                    call.cancel()
                    raise Corrupt(
                        f"artifact {digest}: chunk of {len(response.chunk)} bytes at "
                        f"{response.offset}, expected at {offset} of {size}",
                        kind="download_chunk",
                    )
                file.write(response.chunk)
                offset += len(response.chunk)
                if offset < size and interrupted():
                    call.cancel()
                    file.flush()
                    raise Unavailable(
                        f"artifact {digest}: fetch stopped at {offset} of {size} bytes",
                        kind="fetch_interrupted",
                    )
        file.flush()
        if offset != size:
            raise Unavailable(
                f"artifact {digest}: the download ended at {offset} of {size} bytes; it is resumed "
                "at the next attempt",
                kind="download_short",
            )

    @contextmanager
    def _partial(self, digest: str) -> Iterator[BinaryIO]:
        """The file to collect the payload in: the resumable one, unless another process has it.

        It is kept when the body raises, and removed when it ends well.
        """
        path = self.root / f".{digest}.partial"
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with tempfile.TemporaryFile(dir=self.root) as own:
                    yield own
                return
            yield file
            path.unlink(missing_ok=True)

    def _keep(self, artifact: Artifact, signature: bytes) -> None:
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
) -> Artifact:
    """One artifact, checked as a node checks it, for programs that follow no channel.

    Args:
        digest: sha256 of the manifest.
        address: Loopback host:port of the service; not asked where the artifact is cached.
        cache_dir: See `ArtifactCache`; as for the two that follow.

    Raises:
        Refused, InvalidInput, NotFound, Corrupt, Unavailable: See `ArtifactCache.fetch`.
    """
    cache = ArtifactCache(cache_dir, trust_roots=trust_roots, model_fingerprint=model_fingerprint)
    connection = Connection(address)
    try:
        return cache.fetch(digest, connection)
    finally:
        connection.close()


def _read_all(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


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
