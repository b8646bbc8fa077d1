"""Journal: measurements that are stored one by one, so that a search which stops can go on.

measurements/<digest>/request.json   what all of them depend on; its sha256 is the digest
measurements/<digest>/<key>.json     one measurement; <key> is the sha256 of what was measured

Objects are only ever created: of two searches that measure the same at a time, the first one's
figures stay, and both go on with them. Different searches over one request share its measurements:
a forward search finds those of the sweep.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from pipeline.errors import InvalidInput
from store.digest import canonical_json, sha256_hex
from store.errors import Conflict
from store.location import Location

log = logging.getLogger(__name__)

_NUM_READERS: Final = 16
_REQUEST: Final = "request.json"


class Journal:
    """The measurements of one request.

    Args:
        root: The store.
        request: Everything that a measurement depends on beside what is measured: directions,
            prompts, settings. JSON values.
    """

    def __init__(self, root: Location, request: Mapping[str, Any]) -> None:
        data = canonical_json(dict(request))
        self.digest = sha256_hex(data)
        self._location = root.child(f"measurements/{self.digest}")
        self._location.put_same(_REQUEST, data)
        names = [info.key for info in self._location.list() if info.key != _REQUEST]
        # A bucket answers each in tens of milliseconds, and there may be thousands.
        with ThreadPoolExecutor(_NUM_READERS) as executor:
            self._found = dict(zip(names, executor.map(self._read, names), strict=True))
        if names:
            log.info("measurements found", extra={"digest": self.digest, "num": len(names)})

    def __len__(self) -> int:
        return len(self._found)

    def measured(
        self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """The figures of a key: those stored, or else those measured now, which are then stored.

        Args:
            key: What is measured; JSON values.
            measure: Gives its figures; JSON values.
        """
        name = _name(key)
        if name not in self._found:
            figures = dict(measure())
            try:
                self._location.put_new(name, canonical_json({"key": dict(key), "figures": figures}))
            except Conflict:
                figures = self._read(name)
            self._found[name] = figures
        return self._found[name]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            figures: dict[str, Any] = json.loads(self._location.get(name))["figures"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"{self._location.url}/{name} is no measurement: {error}; remove it, and it is "
                "measured again",
                kind="measurement",
            ) from error
        return figures


def _name(key: Mapping[str, Any]) -> str:
    return f"{sha256_hex(canonical_json(dict(key)))}.json"
