"""The error tree of `pipeline`.

    PipelineError
    ├── InvalidInput   a run file, a prompt file or a flag is wrong: fix it        (exit code 1)
    ├── NotFound       a step that comes before has not been run, or a path is wrong (exit code 1)
    └── GateRefused    the step ran, and its result may not be used                 (exit code 3)

`kind` says which error it is; the set of kinds only grows.
"""

from __future__ import annotations

from typing import Final

from steering_service.core.errors import SteeringError
from store.errors import StoreError


class PipelineError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: What went wrong, where, what was expected, what was got and what to do.
        kind: A stable snake_case code, such as ``run_file``.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        # Ray carries errors between processes; the default would lose the keyword.
        return (_rebuild, (type(self), str(self), self.kind))


class InvalidInput(PipelineError):
    """A run file, a prompt file or a flag is wrong."""


class NotFound(PipelineError):
    """Something that should be there is not."""


class GateRefused(PipelineError):
    """A check that guards the result failed."""


def _rebuild(cls: type[PipelineError], message: str, kind: str) -> PipelineError:
    return cls(message, kind=kind)


OUR_ERRORS: Final = (PipelineError, SteeringError, StoreError)
"""What is raised on purpose, in any package: an explanation for a user, not a bug."""
