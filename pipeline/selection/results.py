"""SiteSelection: the stored outcome of `select`: every figure, what was chosen, and why.

selections/<digest>/selection.json   one object, so its existence is the commit
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pipeline.errors import NotFound
from steering_service.core.site import Site
from store.digest import canonical_json, sha256_hex
from store.location import Location

SELECTION_SCHEMA: Final = 1

By = Literal["score", "sweep", "forward", "refusal"]


def selection_digest(by: By, request: Mapping[str, Any]) -> str:
    """The name of a selection: what it chooses among, and by which rules."""
    return sha256_hex(
        canonical_json({"schema_version": SELECTION_SCHEMA, "by": by, "request": dict(request)})
    )


@dataclass(frozen=True, slots=True, eq=False)
class SiteSelection:
    """Sites that were chosen.

    Attributes:
        digest: See `selection_digest`.
        by: How they were chosen.
        sites: In the order in which they were found best, or added.
        strength: At which they were chosen, in the unit of `publish`; None where none was tried.
        why: In a sentence.
        tried: Figures of everything that was measured, or scored.
        steps: forward: what each step came to; else empty.
        plain: Figures of the plain model.
        publish: Fields of a run file's [publish] section with which the sites act as they did here.
        capture: Fields of its [capture] section that must be changed for that.
        measurements: Digest of the `Journal` that holds them, or None.
        location: Where it is stored.
    """

    digest: str
    by: By
    request: Mapping[str, Any]
    sites: tuple[Site, ...]
    strength: float | None
    why: str
    tried: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    plain: Mapping[str, float | None]
    publish: Mapping[str, Any]
    capture: Mapping[str, Any]
    measurements: str | None
    location: Location

    @classmethod
    def exists(cls, root: Location, digest: str) -> bool:
        """Whether it has been made."""
        return root.exists(f"selections/{digest}/selection.json")

    @classmethod
    def write(
        cls,
        root: Location,
        *,
        by: By,
        request: Mapping[str, Any],
        sites: Sequence[Site],
        strength: float | None,
        why: str,
        tried: Sequence[Mapping[str, Any]],
        publish: Mapping[str, Any],
        steps: Sequence[Mapping[str, Any]] = (),
        plain: Mapping[str, float | None] | None = None,
        capture: Mapping[str, Any] | None = None,
        measurements: str | None = None,
    ) -> SiteSelection:
        """Store an outcome. All numbers are finite, or None."""
        digest = selection_digest(by, request)
        record = {
            "schema_version": SELECTION_SCHEMA,
            "by": by,
            "request": dict(request),
            "sites": [str(site) for site in sites],
            "strength": strength,
            "why": why,
            "tried": [dict(row) for row in tried],
            "steps": [dict(row) for row in steps],
            "plain": dict(plain or {}),
            "publish": dict(publish),
            "capture": dict(capture or {}),
            "measurements": measurements,
        }
        root.child(f"selections/{digest}").put_same("selection.json", canonical_json(record))
        return cls.open(root, digest)

    @classmethod
    def open(cls, root: Location, digest: str) -> SiteSelection:
        """Read a stored outcome.

        Raises:
            NotFound: It has not been made.
        """
        if not cls.exists(root, digest):
            raise NotFound(
                f"selection {digest[:12]} is not in {root.url}; run `steerage select` first",
                kind="selection",
            )
        location = root.child(f"selections/{digest}")
        record = json.loads(location.get("selection.json"))
        return cls(
            digest=digest,
            by=record["by"],
            request=record["request"],
            sites=tuple(Site.parse(text) for text in record["sites"]),
            strength=record["strength"],
            why=record["why"],
            tried=record["tried"],
            steps=record["steps"],
            plain=record["plain"],
            publish=record["publish"],
            capture=record["capture"],
            measurements=record["measurements"],
            location=location,
        )

    @property
    def run_file_lines(self) -> list[str]:
        """Lines for the run file whose artifact acts as the selection did."""
        lines = []
        for section, fields in (("capture", self.capture), ("publish", self.publish)):
            if fields:
                lines.append(f"[{section}]")
                # TOML writes texts, numbers and lists of texts as JSON does.
                lines += [
                    f"{name} = {json.dumps(fields[name])}"
                    for name in sorted(fields, key=lambda name: (name != "sites", name))
                ]
        return lines


def selected_sites(root: Location, digest: str) -> list[Site]:
    """The sites of a stored selection, for an artifact.

    Raises:
        NotFound: It has not been made.
    """
    return list(SiteSelection.open(root, digest).sites)
