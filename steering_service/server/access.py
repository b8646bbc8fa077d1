"""Who calls, and what they may do: identities, roles, and the policy that names both.

The interceptor finds the identity of every call and checks its role for the method; the RPC
handlers check what the call is about:

    who = access.caller()
    who.check_channel(request.channel)
    entry = append(..., actor=access.actor(who, request.actor))

A caller shows a bearer token, a client certificate, or both. A token, where there is one, decides:
a wrong one is refused even if the certificate would do.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from steering_service.core.errors import InvalidInput, Refused
from steering_service.server.policy import Limits, Patterns, Role

if TYPE_CHECKING:
    from steering_service.server.identities import Identities

MAX_ACTOR_CHARS: Final = 200

_READ: Final = frozenset({Role.READER, Role.PUBLISHER, Role.OPERATOR})
_LOOK: Final = _READ | {Role.AUDITOR}
_OVERSEE: Final = frozenset({Role.OPERATOR, Role.AUDITOR})
_OPERATE: Final = frozenset({Role.OPERATOR})
_PUBLISH: Final = frozenset({Role.PUBLISHER})

ROLES: Final[Mapping[str, frozenset[Role]]] = {
    "/steering_service.v1.ArtifactService/Publish": _PUBLISH,
    "/steering_service.v1.ArtifactService/GetUpload": _PUBLISH,
    "/steering_service.v1.ArtifactService/GetManifest": _LOOK,
    "/steering_service.v1.ArtifactService/Download": _READ,
    "/steering_service.v1.ArtifactService/List": _LOOK,
    "/steering_service.v1.ArtifactService/Revoke": _OPERATE,
    "/steering_service.v1.ArtifactService/GetRevocations": _LOOK,
    "/steering_service.v1.ChannelService/Promote": _OPERATE,
    "/steering_service.v1.ChannelService/Rollback": _OPERATE,
    "/steering_service.v1.ChannelService/Approve": _OPERATE,
    "/steering_service.v1.ChannelService/ListProposals": _OVERSEE,
    "/steering_service.v1.ChannelService/GetChannel": _LOOK,
    "/steering_service.v1.ChannelService/History": _OVERSEE,
    "/steering_service.v1.ChannelService/ListChannels": _LOOK,
    # An auditor only as an observer; see Identity.check_node.
    "/steering_service.v1.WatchService/Watch": frozenset(
        {Role.READER, Role.OPERATOR, Role.AUDITOR}
    ),
    "/steering_service.v1.NodeService/ListNodes": _OVERSEE,
    # Whoever is known at all.
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": frozenset(Role),
}
"""The roles of every method, any of which is enough. A method that is missing is denied to all."""

OPEN: Final = "/grpc.health.v1.Health/"
"""Methods that begin like this are for everybody, known or not."""


class Denied(Refused):
    """The caller is known, and not allowed to do this."""


class Unauthenticated(Refused):
    """No certificate or token that the service knows."""


@dataclass(frozen=True, slots=True)
class ChannelRule:
    """What the policy asks of changes to a channel.

    Attributes:
        two_person: A change has to be approved by somebody else.
        alone: Changes that one person may still make: "off", "rollback".
    """

    two_person: bool = False
    alone: frozenset[str] = frozenset()


_ANY: Final = Patterns(["*"])


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller.

    Attributes:
        name: As the policy calls it; "" for everybody on loopback without a policy.
        roles: What it may do.
        channels: The channels that it may do it with.
        models: The models, by name or fingerprint, whose artifacts it may see and publish.
        nodes: The node ids that it may watch as.
        limits: How fast it may be.
        credential: What it showed: the sha256 of a token, or a name in a certificate.
        expires: When its certificate expires, in seconds since 1970.
        source: The policy that knows it.
    """

    name: str
    roles: frozenset[Role]
    source: Identities = field(compare=False, repr=False)
    channels: Patterns = _ANY
    models: Patterns = _ANY
    nodes: Patterns = _ANY
    limits: Limits | None = field(default=None, compare=False)
    credential: str = field(default="", compare=False, repr=False)
    expires: float = field(default=float("inf"), compare=False)

    def allows_channel(self, channel: str) -> bool:
        """Whether the caller may see and change this channel, as far as its roles go."""
        return self.channels.match(channel)

    def allows_model(self, name: str, fingerprint: str) -> bool:
        """Whether the caller may see and publish artifacts of this model."""
        return self.models.match(name) or self.models.match(fingerprint)

    def check_method(self, method: str) -> None:
        """Raise Denied (kind "access_role") unless the caller has a role for this method."""
        roles = ROLES.get(method, frozenset())
        if self.roles.isdisjoint(roles):
            raise Denied(
                f"{self.name!r} has {listed(self.roles)}, and {method} needs {listed(roles)}; "
                "ask whoever keeps the access policy",
                kind="access_role",
            )

    def check_expiry(self) -> None:
        """Raise Unauthenticated (kind "certificate_expired") once its certificate has expired."""
        if time.time() >= self.expires:
            raise Unauthenticated(
                f"the client certificate of {self.name!r} has expired since the connection was "
                "made; connect again with a renewed one",
                kind="certificate_expired",
            )

    def check_channel(self, channel: str) -> None:
        """Raise Denied (kind "access_channel") unless the caller may use this channel."""
        if not self.allows_channel(channel):
            raise Denied(
                f"channel {channel[:200]!r} is not among those of {self.name!r}, which are "
                f"{self.channels}; ask whoever keeps the access policy",
                kind="access_channel",
            )

    def check_model(self, name: str, fingerprint: str) -> None:
        """Raise Denied (kind "access_model") unless the caller may use this model."""
        if not self.allows_model(name, fingerprint):
            raise Denied(
                f"model {name[:200]!r} ({fingerprint[:64]}) is not among those of {self.name!r}, "
                f"which are {self.models}; ask whoever keeps the access policy",
                kind="access_model",
            )

    def check_node(self, node_id: str, *, observer: bool = False) -> None:
        """Raise Denied unless the caller may watch as this node.

        An observer counts as no node, so it may have any id. An auditor may only observe.

        Raises:
            Denied: Kind "access_node" for the id, "access_observer" for the role.
        """
        if observer:
            return
        if self.roles.isdisjoint({Role.READER, Role.OPERATOR}):
            raise Denied(
                f"{self.name!r} may watch as an observer only; set observer in Subscribe",
                kind="access_observer",
            )
        if not self.nodes.match(node_id):
            raise Denied(
                f"node {node_id[:200]!r} is not among those of {self.name!r}, which are "
                f"{self.nodes}; ask whoever keeps the access policy",
                kind="access_node",
            )


_CALLER: ContextVar[Identity] = ContextVar("steerage_caller")


def caller() -> Identity:
    """Who makes the present call; in a thread of `asyncio.to_thread` too.

    Raises:
        LookupError: Outside a call. There is no default, so that a mistake permits nothing.
    """
    return _CALLER.get()


def set_caller(identity: Identity) -> None:
    """Say who makes the present call; for the interceptor."""
    _CALLER.set(identity)


def caller_name() -> str:
    """The caller's name, for logs; "" where there is none."""
    identity = _CALLER.get(None)
    return identity.name if identity else ""


def still_valid(identity: Identity) -> bool:
    """Whether the policy still says of a caller what it said when the call began.

    To be asked at every heartbeat of a Watch stream (it costs a microsecond). On False end the
    stream with ``Unavailable(..., kind="access_changed")``: the node subscribes again and is judged
    anew. It is False too once the caller's certificate has expired.
    """
    return identity.source.still_valid(identity)


def actor(who: Identity, given: str) -> str:
    """The name to keep in a channel's log.

    Args:
        who: The caller.
        given: What the request says.

    Raises:
        Denied: It names somebody else.
        InvalidInput: The service does not know its callers, and none is given or it is too long.
    """
    if who.name:
        if given not in ("", who.name):
            raise Denied(
                f"the request says it comes from {given[:MAX_ACTOR_CHARS]!r}, and the caller is "
                f"{who.name!r}; leave actor empty, or name yourself",
                kind="actor_mismatch",
            )
        return who.name
    if not given.strip() or len(given) > MAX_ACTOR_CHARS:
        raise InvalidInput(
            f"actor: expected 1 to {MAX_ACTOR_CHARS} characters, got {len(given)}; every change "
            "says who made it and why",
            kind="promote_actor",
        )
    return given


def two_person(channel: str) -> ChannelRule:
    """What the policy asks of changes to a channel; nothing where there is no policy.

    Raises:
        LookupError: Outside a call.
    """
    return caller().source.rule(channel)


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(sorted(names)) or "none"
