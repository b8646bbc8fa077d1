"""Active: what a node runs now, as one immutable snapshot that decoding reads without a lock."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import rfc8785

from steering_service.core.artifact import Artifact
from steering_service.core.errors import Unavailable


def identity_of(artifact: Artifact | None, strength: float) -> str:
    """Hash of all that decides a model's outputs: artifact, strength and position policy.

    Prefix caches must be keyed with it. All plain-model states share one identity.

    Returns:
        64 hex digits.
    """
    value: dict[str, Any] = (
        {"artifact": None}
        if artifact is None
        else {
            "artifact": artifact.digest,
            "strength": float(strength),
            "positions": [[str(i.site), i.positions] for i in artifact.interventions],
        }
    )
    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()


UNSTEERED: Final = identity_of(None, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """One state of a node.

    Attributes:
        channel: The channel it follows.
        revision: The channel's revision that this state came from; 0 before the first.
        artifact: What to apply; None means the plain model, whatever the reason: nothing deployed
            yet, the channel is off or points at nothing, or the node is outside the rollout share.
        strength: To apply the artifact with; 0.0 when there is none.
        enabled: The channel's switch. True with artifact None: outside the share, or no artifact.
        identity: See `identity_of`. A request keeps the Deployment, and so the identity, that it
            began with.
    """

    channel: str
    revision: int
    artifact: Artifact | None = field(repr=False)
    strength: float
    enabled: bool
    identity: str

    @classmethod
    def plain(cls, channel: str, revision: int, *, enabled: bool) -> Deployment:
        """The plain model."""
        return cls(channel, revision, None, 0.0, enabled, UNSTEERED)

    @classmethod
    def steered(
        cls, channel: str, revision: int, artifact: Artifact, strength: float
    ) -> Deployment:
        """An artifact at a strength."""
        return cls(channel, revision, artifact, strength, True, identity_of(artifact, strength))


class Active:
    """Holder of the present Deployment: one writer, any number of readers.

    Args:
        initial: What `current` is until the first swap.
    """

    __slots__ = ("_changed", "_current", "_listeners")

    def __init__(self, initial: Deployment) -> None:
        self._current = initial
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def current(self) -> Deployment:
        """The present snapshot. One attribute read: never waits, never raises."""
        return self._current

    def swap(self, deployment: Deployment) -> None:
        """Replace the snapshot, for all readers at once."""
        with self._changed:
            self._current = deployment
            self._changed.notify_all()
            for listener in self._listeners:
                listener()

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """While the body runs, call this after every swap, in the thread that swaps.

        It must be quick and raise nothing: it stands between a revocation and its report.
        """
        with self._changed:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def wait_for(self, revision: int, timeout_s: float) -> Deployment:
        """Wait until the node runs a revision or a later one.

        Raises:
            Unavailable: It did not within the time.
        """
        with self._changed:
            if self._changed.wait_for(lambda: self._current.revision >= revision, timeout_s):
                return self._current
            raise Unavailable(
                f"channel {self._current.channel!r}: still at revision {self._current.revision} "
                f"after {timeout_s} s, expected {revision}; the subscription's status says why",
                kind="wait_timeout",
            )
