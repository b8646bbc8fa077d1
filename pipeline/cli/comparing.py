"""The command that compares: diff."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pipeline.cli.app import DELIVERY, app
from pipeline.cli.channels import entry_values
from pipeline.cli.connecting import Service, connecting
from pipeline.cli.digests import looks_like_digest, resolve
from pipeline.cli.options import AsJson, TrustPaths, line, print_json, stderr
from pipeline.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    import numpy as np

    from steering_service.client.channel import ChannelEntry
    from steering_service.client.operator import Operator
    from steering_service.core.artifact import Artifact, Manifest

_STATE: Final = ("artifact", "strength", "enabled", "share")
_SIDE: Final = "A digest (8 digits or more), CHANNEL as it is now, or CHANNEL@REVISION."


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two things compared.

    Attributes:
        text: As the user named it.
        entry: The channel's state, where a channel was named.
        artifact: Digest; None where the channel points at nothing.
        manifest: Of the artifact.
    """

    text: str
    entry: ChannelEntry | None
    artifact: str | None
    manifest: Manifest | None

    @classmethod
    def read(cls, operator: Operator, text: str) -> _Side:
        entry = None if looks_like_digest(text) else _entry(operator, text)
        artifact = resolve(operator, text) if entry is None else entry.artifact
        manifest = operator.manifest(artifact).manifest if artifact else None
        return cls(text, entry, artifact, manifest)

    def values(self) -> dict[str, Any]:
        entry = entry_values(self.entry) if self.entry else None
        return {"given": self.text, "artifact": self.artifact, "entry": entry}

    def title(self) -> str:
        name = self.manifest.name if self.manifest else "points at nothing"
        if self.entry is None:
            return f"{self.artifact}  {name}"
        return f"{self.entry.channel}@{self.entry.revision}  {self.artifact or ''}  {name}"


@app.command(rich_help_panel=DELIVERY)
@connecting
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, of what A is compared with.")],
    service: Service,
    trust: TrustPaths = None,
    cache: Annotated[
        Path, typer.Option("--cache", help="Where artifacts are kept, as for `steerage steer`.")
    ] = Path("~/.cache/steerage"),
    as_json: AsJson = False,
) -> None:
    """Say what differs between two artifacts, or two states of channels.

    Compares strength, share and switch of channels, then the manifests field by field. With
    --trust the payloads are fetched too, checked as a node checks them, and the vectors compared:
    cosine and ratio of norms (B over A) at each site that both have. What is not signed by a
    trusted key is not opened. What looks like a digest is one; a channel of such a name is
    CHANNEL@REVISION.

    Example: steerage diff prod@11 prod --trust publisher.pub
    """
    with service.operator() as operator:
        sides = _Side.read(operator, a), _Side.read(operator, b)
    state = _state_changes(*sides)
    fields = _field_changes(*sides)
    directions = None
    if trust and all(side.artifact for side in sides):
        directions = _compare(*(_fetch(side, service, trust, cache) for side in sides))
    values = {
        "a": sides[0].values(),
        "b": sides[1].values(),
        "same_artifact": sides[0].artifact == sides[1].artifact,
        "state": state,
        "manifest": fields,
        "directions": directions,
    }
    if as_json:
        print_json(values)
    else:
        _print(sides, state, fields, directions)


def _entry(operator: Operator, text: str) -> ChannelEntry:
    """The entry that CHANNEL or CHANNEL@REVISION names."""
    channel, at, revision = text.partition("@")
    if not at:
        return operator.channel(channel)
    if not (revision.isascii() and revision.isdigit() and int(revision)):
        raise InvalidInput(
            f"{text!r}: expected CHANNEL@REVISION with a revision from 1, such as prod@11",
            kind="channel_revision",
        )
    found = next(operator.history(channel, after=int(revision) - 1), None)
    if found is None:
        head = operator.channel(channel).revision
        raise NotFound(
            f"channel {channel!r} is at revision {head} and has no revision {revision}",
            kind="no_revision",
        )
    return found


def _state_changes(a: _Side, b: _Side) -> dict[str, list[Any]]:
    """What differs of two channel states: field → [in A, in B]."""
    if a.entry is None or b.entry is None:
        return {}
    return {
        name: [before, after]
        for name in _STATE
        if (before := getattr(a.entry, name)) != (after := getattr(b.entry, name))
    }


def _field_changes(a: _Side, b: _Side) -> dict[str, list[Any]]:
    """What differs of two manifests: path of the field → [in A, in B]; None: it is not there."""
    before, after = (_flat(side.manifest) for side in (a, b))
    return {
        path: [before.get(path), after.get(path)]
        for path in [*before, *(path for path in after if path not in before)]
        if before.get(path) != after.get(path)
    }


def _flat(manifest: Manifest | None) -> dict[str, Any]:
    """A manifest as paths and values; an Intervention's path names its site, not its place."""
    if manifest is None:
        return {}
    values = manifest.model_dump()
    for record in values.pop("interventions"):
        values[f"interventions[{record.pop('tensor')}]"] = record
    flat: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                walk(f"{path}.{key}" if path else str(key), item)
        else:
            flat[path] = value

    walk("", values)
    return flat


def _fetch(side: _Side, service: Service, trust: list[Path], cache: Path) -> Artifact:
    from steering_service.client.fetch import fetch_artifact
    from steering_service.core.signing import TrustRoots

    assert side.artifact is not None
    assert side.manifest is not None
    return fetch_artifact(
        side.artifact,
        service.address,
        cache_dir=cache.expanduser(),
        trust_roots=TrustRoots.from_paths(trust),
        # Nothing is run here, so it may be for any model; a signature of ours must say for which.
        model_fingerprint=side.manifest.model.fingerprint,
        credentials=service.credentials,
    )


def _compare(a: Artifact, b: Artifact) -> list[dict[str, Any]]:
    """Of each Intervention of either: whether both have it, and how their vectors compare."""
    before, after = (
        {f"{item.site}.{item.operation}": item for item in artifact.interventions}
        for artifact in (a, b)
    )
    rows = []
    for name in [*before, *(name for name in after if name not in before)]:
        row: dict[str, Any] = {"intervention": name, "cosine": None, "norm_ratio": None}
        if name not in after or name not in before:
            row["change"] = "removed" if name in before else "added"
        else:
            # What a strength of 1 adds, which is what a model feels.
            first, second = (
                side[name].step_D.astype("float64") * side[name].weight for side in (before, after)
            )
            row |= {"change": "kept"} | _similarity(first, second)
        rows.append(row)
    return rows


def _similarity(a_D: np.ndarray[Any, Any], b_D: np.ndarray[Any, Any]) -> dict[str, float | None]:
    # Not at the top: every command would wait for it to be imported.
    from numpy.linalg import norm

    if a_D.shape != b_D.shape:
        return {"cosine": None, "norm_ratio": None}
    norm_a, norm_b = float(norm(a_D)), float(norm(b_D))
    if not (norm_a and norm_b):
        return {"cosine": None, "norm_ratio": norm_b / norm_a if norm_a else None}
    return {"cosine": float(a_D @ b_D / (norm_a * norm_b)), "norm_ratio": norm_b / norm_a}


def _print(
    sides: tuple[_Side, _Side],
    state: Mapping[str, list[Any]],
    fields: Mapping[str, list[Any]],
    directions: list[dict[str, Any]] | None,
) -> None:
    for mark, side in zip("AB", sides, strict=True):
        line(f"{mark}  {side.title()}")
    is_same = sides[0].artifact == sides[1].artifact
    if is_same and not state:
        line("no difference")
        return
    for title, changes in (("channel", state), ("manifest", _folded(sides, fields))):
        if not changes:
            continue
        line(title, style="bold")
        width = min(max(map(len, changes)), 48)
        for path, (before, after) in changes.items():
            line(f"  {path:<{width}}  {_short(before)} → {_short(after)}")
    if directions is not None and not is_same:
        line("directions, at strength 1", style="bold")
        width = max(len(row["intervention"]) for row in directions)
        for row in directions:
            text = row["change"]
            if text == "kept":
                cosine, ratio = row["cosine"], row["norm_ratio"]
                text = "of other widths, or zero" if cosine is None else f"cosine {cosine:+.4f}"
                text += f"  norm × {ratio:.4g}" if ratio is not None else ""
            line(f"  {row['intervention']:<{width}}  {text}")
    elif not is_same and all(side.artifact for side in sides):
        stderr.print("--trust PUBLIC.pub compares the vectors too", highlight=False, markup=False)


def _folded(sides: tuple[_Side, _Side], fields: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The changes as people want them: an Intervention that only one side has is one change."""
    names = [
        {record.tensor for record in side.manifest.interventions} if side.manifest else set()
        for side in sides
    ]
    found: dict[str, list[Any]] = {}
    for path, change in fields.items():
        name = path.partition("[")[2].partition("]")[0]
        if path.startswith("interventions[") and name in names[0] ^ names[1]:
            held = "there" if name in names[0] else None
            found[f"interventions[{name}]"] = [held, None if held else "there"]
        elif not path.startswith("payload."):
            # That the payload differs is what differing vectors are.
            found[path] = change
    return found or {"payload": ["vectors", "other vectors"]} if fields else {}


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 100 else f"{text[:99]}…"
