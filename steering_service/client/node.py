"""Node: what one inference node holds of its channel, and what it accepts. No network in here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from steering_service.client.active import Active, Deployment
from steering_service.client.channel import Assignment
from steering_service.client.fetch import ArtifactCache, Verified
from steering_service.client.state import StateFile
from steering_service.core.artifact import Artifact
from steering_service.core.errors import Refused, SteeringError, Unavailable

log = logging.getLogger(__name__)

_NOT_RESTORED: Final = Refused("not restored from the disk", kind="not_restored")


class Node:
    """The present deployment, the Assignment it came from, and the revocations that it obeys.

    One thread at a time changes it; `active` may be read by any.

    Args:
        channel: Its channel.
        node_id: Its id.
        cache: Its artifacts and revocation list.
        check: See `Subscription`.

    Attributes:
        active: The present deployment.
        revocations: The list that counts.
    """

    def __init__(
        self,
        channel: str,
        node_id: str,
        cache: ArtifactCache,
        check: Callable[[Artifact], None] | None,
    ) -> None:
        self.channel = channel
        self.node_id = node_id
        self.active = Active(Deployment.plain(channel, 0, enabled=False))
        self.revocations = cache.revocations
        self._cache = cache
        self._check = check
        self._state = StateFile(cache.root / "state" / node_id / f"{channel}.json")
        # The last one accepted, and, where it could not be applied or may not be any more, why.
        self._assignment: Assignment | None = None
        self._unapplied: SteeringError | None = None
        self._key_ids: tuple[str, ...] = ()  # of the active artifact
        self._unkept: tuple[Assignment, Verified | None] | None = None

    @property
    def reported_revision(self) -> int:
        """What it says it runs: 0 for a revision that it took and does not apply (any more), so
        that the service assigns it again, and gets a NACK for it.
        """
        return 0 if self._unapplied is not None else self.active.current.revision

    def claim(self) -> None:
        """Warn if another process is this node too, until `release`."""
        try:
            if not self._state.claim():
                why = "another process follows this channel under this id; give each its own"
                log.warning("node id in use", extra=self._extra(0) | {"why": why})
        except Unavailable as error:
            log.warning("node id not claimed", extra=self._extra(0) | {"why": str(error)})

    def release(self) -> None:
        """End a claim."""
        self._state.release()

    def restore(self) -> None:
        """Start from the disk. Whatever is wrong there, the service will send again.

        Without a revocation list that can be believed nothing is steered.
        """
        for event, step in (
            ("revocations not restored", self.revocations.restore),
            ("deployment not restored", self._restore_deployment),
        ):
            try:
                step()
            except Exception as error:
                kind = error.kind if isinstance(error, SteeringError) else type(error).__name__
                log.warning(
                    event,
                    extra=self._extra(0) | {"kind": kind, "why": str(error)},
                    exc_info=None if isinstance(error, SteeringError) else error,
                )

    def _restore_deployment(self) -> None:
        assignment = self._state.read()
        if assignment is None:
            return
        # Even where it cannot be applied, nothing older may be any more.
        self._assignment, self._unapplied = assignment, _NOT_RESTORED
        self._swap(assignment, *self._deployment(assignment, self._cache.read))
        log.info("deployment restored", extra=self._extra(assignment.revision))

    def apply(self, assignment: Assignment, get: Callable[[str], Verified]) -> None:
        """Check an Assignment, get its artifact, check that, and swap it in. See `keep`.

        Args:
            assignment: From the service; nothing in it is trusted.
            get: Gives a verified artifact.

        Raises:
            SteeringError: It was refused, or could not be had; what was active is active still.
        """
        self._check_order(assignment)
        if assignment == self._assignment and self._unapplied is None:
            return
        deployment, verified = self._deployment(assignment, get)
        self._swap(assignment, deployment, verified)
        self._unkept = assignment, verified

    def keep(self) -> bool:
        """Put on the disk what is new, so that the next start begins with it.

        Returns:
            Whether anything was.

        Raises:
            Unavailable: The disk refused. It counts all the same, and the next call tries again.
            Refused: Another process had put a later revocation list there, which forbids what ran
                here; it made way for the plain model.
        """
        kept = self.revocations.keep()
        if kept and (refusal := self.obey()) is not None:
            raise refusal
        if self._unkept is None:
            return kept
        assignment, verified = self._unkept
        # The artifact first: a state on the disk names only what is there.
        if verified is not None:
            self._cache.keep(verified)
        self._state.write(assignment)
        self._unkept = None
        return True

    def obey(self) -> Refused | None:
        """Fall back to the plain model, if what runs now is revoked.

        Returns:
            Why; None if nothing changed.
        """
        current = self.active.current
        if current.artifact is None:
            return None
        try:
            self.revocations.check_revision(self.channel, current.revision)
            self.revocations.check_artifact(current.artifact.digest, self._key_ids)
        except Refused as error:
            self._unapplied = error
            self.active.swap(Deployment.plain(self.channel, current.revision, enabled=True))
            return error
        return None

    def _check_order(self, assignment: Assignment) -> None:
        last = self._assignment
        revision = last.revision if last is not None else 0
        replayed = assignment.revision < revision
        forked = last is not None and assignment.revision == revision and assignment != last
        if assignment.channel != self.channel or replayed or forked:
            raise Refused(
                f"assigned channel {assignment.channel!r} revision {assignment.revision}, while "
                f"this node took {self.channel!r} revision {revision}; revisions only grow and "
                "never change. If the store was replaced on purpose, delete "
                f"{str(self._state.path)!r} and restart the node",
                kind="revision_order",
            )

    def _deployment(
        self, assignment: Assignment, get: Callable[[str], Verified]
    ) -> tuple[Deployment, Verified | None]:
        """What an Assignment means for this node. Off comes first: it must work in any case."""
        revision = assignment.revision
        if not assignment.enabled:
            return Deployment.plain(self.channel, revision, enabled=False), None
        assignment.check_strength()
        if not assignment.includes(self.node_id) or assignment.artifact is None:
            return Deployment.plain(self.channel, revision, enabled=True), None
        # Also raises where the disk's revocation list cannot be believed: then nothing is steered.
        self.revocations.check_revision(self.channel, revision)
        verified = get(assignment.artifact)
        artifact = verified.artifact
        artifact.manifest.policy.check(assignment.strength)
        if self._check is not None:
            self._check(artifact)
        return Deployment.steered(self.channel, revision, artifact, assignment.strength), verified

    def _swap(
        self, assignment: Assignment, deployment: Deployment, verified: Verified | None
    ) -> None:
        self._assignment, self._unapplied = assignment, None
        self._key_ids = verified.key_ids if verified is not None else ()
        self.active.swap(deployment)

    def _extra(self, revision: int) -> dict[str, object]:
        return {"channel": self.channel, "node": self.node_id, "revision": revision}
