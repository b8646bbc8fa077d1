"""JsonFormatter: log records as lines of JSON, with their fields, for collectors and for jq."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from steering_service.server.access import caller_name

_OWN: Final = ("time", "level", "logger", "event", "exception", "stack")
# What every record has; the rest came with `extra`.
_STANDARD: Final = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, event, then the fields of `extra`.

    Values that JSON lacks appear as their text, exceptions as ``exception``. A field of `extra`
    that is named like one of these gets an underscore behind. Nothing is left out or masked, so
    prompts must not be logged in the first place. Inside a call of a caller that the service knows,
    ``caller`` is its name.

        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
        }
        if caller := caller_name():
            line["caller"] = caller
        for name, value in record.__dict__.items():
            # A leading underscore: put there by a record factory (Ray installs one), not by us.
            if name not in _STANDARD and not name.startswith("_"):
                line[f"{name}_" if name in _OWN else name] = _plain(value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, allow_nan=False)


def _plain(value: object) -> object:
    """The value as JSON can hold it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
