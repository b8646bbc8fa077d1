"""StateFile: the last good Assignment of a node, on its disk, to start from without the service."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from steering_service.client.channel import Assignment
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
        """Replace the file.

        Raises:
            Unavailable: The disk refused; the old file is as it was.
        """
        data = json.dumps({"schema_version": 1, **dataclasses.asdict(assignment)}, indent=2)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=".")
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(data + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self.path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._disk_error(error) from error

    def _disk_error(self, error: OSError) -> Unavailable:
        return Unavailable(f"channel state {str(self.path)!r}: {error}", kind="cache_disk")
