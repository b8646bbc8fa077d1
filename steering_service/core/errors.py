"""The error tree of `steering_service.core` and of the client and adapters built on it.

    SteeringError
    ├── InvalidInput   the caller gave something wrong: fix the input
    ├── NotFound       the thing named does not exist: check the name
    ├── Conflict       somebody else changed it meanwhile: read again, then decide
    ├── Refused        policy, signature or fingerprint says no: do not retry
    ├── Corrupt        bytes differ from what their digest or header promises: fetch again
    └── Unavailable    the other side cannot answer now: retry later

Classes follow what a handler would do. `kind` says which error it is; the set of kinds only grows,
since alerts and clients match on it.
"""

from __future__ import annotations


class SteeringError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: What went wrong, where, what was expected, what was got and what to do.
        kind: A stable snake_case code, such as ``payload_digest``.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.kind))


class InvalidInput(SteeringError):
    """The caller gave something wrong."""


class NotFound(SteeringError):
    """The thing named does not exist."""


class Conflict(SteeringError):
    """Somebody else changed it meanwhile."""


class Refused(SteeringError):
    """Policy, signature or model fingerprint forbids it."""


class Corrupt(SteeringError):
    """Bytes differ from what their digest or header promises."""


class Unavailable(SteeringError):
    """The other side cannot answer now."""


def _rebuild(cls: type[SteeringError], message: str, kind: str) -> SteeringError:
    return cls(message, kind=kind)
