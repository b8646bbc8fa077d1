"""The access policy file: TOML that says who is who, and what each may do.

    [[identity]]
    name = "alice"
    certificate = "spiffe://prod/alice"
    roles = ["operator"]
    channels = ["prod-*"]

    [[channel]]
    name = "prod-*"
    two_person = true
    alone = ["off"]

    [limits]
    calls_per_s = 1000
    burst = 4000

Pure: bytes in, a checked policy out. `access` finds callers in it and rereads it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from enum import StrEnum
from fnmatch import translate
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic import model_validator as validator

from steering_service.core.errors import InvalidInput

MAX_POLICY_BYTES: Final = 16 << 20
# Longer texts match no pattern but "*": whoever sends 10 MB as a name must not buy regex time.
_MAX_MATCHED_CHARS: Final = 512


class Role(StrEnum):
    """What an identity may do; an identity may have several."""

    READER = "reader"
    PUBLISHER = "publisher"
    OPERATOR = "operator"
    AUDITOR = "auditor"


Glob = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Globs = Annotated[tuple[Glob, ...], Field(min_length=1)]
# Without control characters: names go to logs and, as actors, into channels for ever.
_VISIBLE: Final = r"[^\s\x00-\x1f\x7f]"
Name = Annotated[
    str, StringConstraints(pattern=rf"^{_VISIBLE}([^\x00-\x1f\x7f]{{0,198}}{_VISIBLE})?$")
]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Table):
    """How fast a caller may be.

    Attributes:
        calls_per_s: Calls a second and identity in the long run. Many nodes may share an identity.
        burst: Calls that may come at once.
        watches: Watch streams an identity may have open on one replica.
    """

    calls_per_s: float = Field(default=1000, gt=0, le=1e9)
    burst: int = Field(default=4000, ge=1, le=1_000_000_000)
    watches: int = Field(default=20_000, ge=0)


class IdentityEntry(_Table):
    """One caller.

    Attributes:
        name: What logs and channels call it.
        certificate: A URI, DNS name or email address that its client certificate is for; or the
            common name, of a certificate that is for none of these.
        token_sha256: sha256 of its bearer token, 64 lowercase hex digits. With a certificate too,
            either is enough. Tokens must be random (`steerage token`), since this is no password
            hash.
        roles: What it may do.
        channels: Globs of the channels that it may do it with.
        models: Globs of the names or fingerprints of models whose artifacts it may see and publish.
        nodes: Globs of the node ids that it may watch as.
        calls_per_s: Instead of the limit for all.
        burst: Instead of the limit for all.
    """

    name: Name
    certificate: Annotated[str, StringConstraints(min_length=1, max_length=500)] | None = None
    token_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    roles: Annotated[frozenset[Role], Field(min_length=1)]
    channels: Globs = ("*",)
    models: Globs = ("*",)
    nodes: Globs = ("*",)
    calls_per_s: float | None = Field(default=None, gt=0, le=1e9)
    burst: int | None = Field(default=None, ge=1, le=1_000_000_000)

    @validator(mode="after")
    def _has_credential(self) -> Self:
        if self.certificate is None and self.token_sha256 is None:
            raise ValueError(f"identity {self.name!r} needs certificate, token_sha256, or both")
        return self


class ChannelEntry(_Table):
    """What changes to some channels need.

    Attributes:
        name: Glob of channel names.
        two_person: Changes become proposals, which somebody else approves.
        alone: Changes that one person may make all the same: "off" (to disabled, nothing else
            changed) and "rollback".
    """

    name: Glob
    two_person: bool = False
    alone: frozenset[Literal["off", "rollback"]] = frozenset()


class PolicyFile(_Table):
    """The whole file."""

    # At least one: an empty file is one that is being written, and would lock everybody out.
    identity: Annotated[tuple[IdentityEntry, ...], Field(min_length=1)]
    channel: tuple[ChannelEntry, ...] = ()
    limits: Limits = Limits()

    @validator(mode="after")
    def _tells_callers_apart(self) -> Self:
        for field in ("name", "certificate", "token_sha256"):
            seen: set[str] = set()
            for entry in self.identity:
                value = getattr(entry, field)
                if value is None:
                    continue
                if value in seen:
                    raise ValueError(f"identity {entry.name!r}: {field} is another one's already")
                seen.add(value)
        return self


def parse_policy(data: bytes) -> PolicyFile:
    """Read a policy file.

    Raises:
        InvalidInput: Not TOML, not a policy, or too large (kind "access_policy").
    """
    if len(data) > MAX_POLICY_BYTES:
        raise InvalidInput(
            f"{len(data)} bytes; at most {MAX_POLICY_BYTES} are read", kind="access_policy"
        )
    try:
        return PolicyFile.model_validate(tomllib.loads(data.decode()))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)[:5]
        )
        raise InvalidInput(problems, kind="access_policy") from error
    except (ValueError, RecursionError) as error:
        # TOMLDecodeError and UnicodeDecodeError are ValueErrors.
        raise InvalidInput(f"not TOML: {error}", kind="access_policy") from error


class Patterns:
    """Globs, compiled. Equal when their globs are.

    Args:
        globs: As `fnmatch` has them, case-sensitive.
    """

    __slots__ = ("_all", "_regex", "globs")

    def __init__(self, globs: Iterable[str]) -> None:
        self.globs = tuple(globs)
        self._all = "*" in self.globs
        self._regex = re.compile("|".join(map(translate, self.globs)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self.globs == other.globs

    def __hash__(self) -> int:
        return hash(self.globs)

    def __str__(self) -> str:
        return ", ".join(self.globs)

    def match(self, text: str) -> bool:
        """Whether one of them matches all of the text."""
        if self._all:
            return True
        return len(text) <= _MAX_MATCHED_CHARS and self._regex.match(text) is not None
