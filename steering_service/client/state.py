"""StateFile: the last good Assignment of a node, on its disk, to start from without the service."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from steering_service.client.channel import Assignment
from steering_service.client.disk import locked, replace_file, try_lock
from steering_service.core.errors import Corrupt, Unavailable

_MAX_BYTES: Final = 1 << 16


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1]
    channel: str
    revision: int
    artifact: str | None
    strength: float
    enabled: bool
    share: float


class StateFile:
    """One JSON file, replaced as a whole at every write.

    Args:
        path: The file; its folder is made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: int | None = None

    def read(self) -> Assignment | None:
        """What was written last; None if nothing was.

        Raises:
            Corrupt: The file is not what `write` writes.
            Unavailable: The disk refused.
        """
        try:
            with self.path.open("rb") as file:
                data = file.read(_MAX_BYTES)
            record = _Record.model_validate(json.loads(data))
        except FileNotFoundError:
            return None
        except (ValidationError, ValueError, RecursionError) as error:
            raise Corrupt(
                f"{str(self.path)!r} is not a channel state: {error}; it is replaced when the "
                "service answers",
                kind="state_format",
            ) from error
        except OSError as error:
            raise self._disk_error(error) from error
        fields = record.model_dump(exclude={"schema_version"})
        return Assignment(**fields)

    def write(self, assignment: Assignment) -> None:
        """Replace the file, unless a later state is in it.

        Raises:
            Unavailable: The disk refused; the old file is as it was.
        """
        data = json.dumps({"schema_version": 1, **dataclasses.asdict(assignment)}, indent=2)
        try:
            with locked(self.path.with_suffix(".lock")):
                if not self._holds_later(assignment.revision):
                    replace_file(self.path, f"{data}\n".encode())
        except OSError as error:
            raise self._disk_error(error) from error

    def claim(self) -> bool:
        """Whether this is the only process that follows the channel under this node id.

        It stays claimed until `release`, or the end of the process.

        Raises:
            Unavailable: The disk refused.
        """
        try:
            self._claim = try_lock(self.path.with_suffix(".claim"))
        except OSError as error:
            raise self._disk_error(error) from error
        return self._claim is not None

    def release(self) -> None:
        """Take back a claim; without one nothing happens."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _holds_later(self, revision: int) -> bool:
        """Two processes under one node id may write in any order."""
        try:
            present = self.read()
        except Corrupt:
            return False
        return present is not None and present.revision > revision

    def _disk_error(self, error: OSError) -> Unavailable:
        return Unavailable(f"channel state {str(self.path)!r}: {error}", kind="cache_disk")
