"""Commands that look at published artifacts: list, show, gc."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pipeline.cli.app import DELIVERY, app
from pipeline.cli.connecting import Service, connecting
from pipeline.cli.digests import resolve
from pipeline.cli.envelopes import payload_of, signers_of
from pipeline.cli.options import (
    DEFAULT_STORE,
    AsJson,
    StoreUrl,
    TrustPaths,
    Yes,
    confirm,
    count_text,
    line,
    print_json,
    size_text,
    stderr,
    where,
)

if TYPE_CHECKING:
    from steering_service.client.operator import Operator
    from steering_service.core.artifact import Manifest
    from store.collection import Garbage

_PERIOD: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

ArtifactDigest = Annotated[
    str, typer.Argument(metavar="DIGEST", help="Digest, or its first digits (8 or more).")
]


@app.command(name="list", rich_help_panel=DELIVERY)
@connecting
def list_artifacts(
    service: Service,
    name: Annotated[
        str, typer.Option("--name", help="Only names that begin so.", show_default=False)
    ] = "",
    kind: Annotated[
        str, typer.Option("--kind", help="Only 'intervention' or 'controller'.", show_default=False)
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Only for this model: name or fingerprint.", show_default=False
        ),
    ] = "",
    parent: Annotated[
        str,
        typer.Option("--parent", help="Only what was made from this digest.", show_default=False),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the published artifacts that you may see, in the order of their digests.

    Example: steerage list --name refusal --kind controller
    """
    with service.operator() as operator:
        found = operator.list(name_prefix=name, kind=kind, model=model, parent=parent)
        for entry in found:
            if as_json:
                print_json(
                    {
                        "artifact": entry.digest,
                        "name": entry.name,
                        "kind": entry.kind,
                        "model": entry.model_name,
                        "model_fingerprint": entry.model_fingerprint,
                        "bytes": entry.payload_size,
                    }
                )
            else:
                size = size_text(entry.payload_size)
                line(
                    f"{entry.digest}  {entry.kind:<12}  {size:>9}  {entry.name}  {entry.model_name}"
                )


@app.command(rich_help_panel=DELIVERY)
@connecting
def show(
    digest: ArtifactDigest, service: Service, trust: TrustPaths = None, as_json: AsJson = False
) -> None:
    """Show one artifact: what it edits, its limits, scores and lineage, and who points at it.

    Who signed it is what the signature says; with --trust it is verified.

    Example: steerage show 3f9a6c12 --trust publisher.pub
    """
    with service.operator() as operator:
        whole = resolve(operator, digest)
        published = operator.manifest(whole)
        signers = signers_of(published.signature)
        if trust:
            from steering_service.core.signing import TrustRoots

            signers = list(
                TrustRoots.from_paths(trust).signers(published.signature, published.manifest_bytes)
            )
        values: dict[str, Any] = {
            "artifact": whole,
            "bytes": published.payload_size,
            "signed_by": signers,
            "signature_verified": bool(trust),
            "revoked": _revoked(operator, whole, signers),
            "channels": _pointing(operator, whole),
            "children": [entry.digest for entry in operator.list(parent=whole)],
            "manifest": json.loads(published.manifest_bytes),
        }
    if as_json:
        print_json(values)
    else:
        _print_artifact(values, published.manifest)


@app.command(rich_help_panel=DELIVERY)
def gc(
    store: StoreUrl = DEFAULT_STORE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted.")
    ] = False,
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="AGE",
            help="Leave alone what is younger, as in 12h or 30d: it may be a publish in progress.",
        ),
    ] = "7d",
    unreferenced: Annotated[
        bool,
        typer.Option(
            "--unreferenced",
            help="Artifacts too that no entry of any channel ever named and nothing was made from.",
        ),
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete from the store what nothing needs: leavings of publishes, void proposals, old boards.

    Works on --store itself, with or without services running on it. What a channel's log ever named
    is never deleted, so every rollback stays possible. Activation caches are left alone.

    Example: steerage gc --store s3://bucket/steerage --dry-run
    """
    from store.collection import collect, find_garbage
    from store.location import Location

    root = Location.open(store)
    found = find_garbage(root, older_than_s=_seconds(older_than), unreferenced=unreferenced)
    garbage: list[Garbage] = []
    for item in found:
        garbage.append(item)
        if as_json:
            print_json(
                {
                    "key": item.key,
                    "bytes": item.size,
                    "reason": item.reason,
                    "modified": item.modified.isoformat(),
                }
            )
        else:
            line(f"{size_text(item.size):>10}  {item.key}  {item.reason}")
    size = sum(item.size for item in garbage)
    deleted = 0
    if garbage and not dry_run:
        question = (
            f"Delete {count_text(len(garbage), 'object')}, {size_text(size)}, from {where(root)}?"
        )
        confirm(question, yes)
        deleted = collect(root, garbage)
    if as_json:
        print_json({"objects": len(garbage), "bytes": size, "deleted": deleted})
    elif not garbage:
        stderr.print(f"no garbage older than {older_than} in {where(root)}", highlight=False)
    else:
        verb = "would be deleted" if dry_run else "deleted"
        number = len(garbage) if dry_run else deleted
        line(f"{count_text(number, 'object')} {verb}, {size_text(size)}")


def _seconds(text: str) -> float:
    match = _PERIOD.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"--older-than {text!r}: expected a number and s, m, h or d, such as 7d"
        )
    return float(match[1]) * _SECONDS[match[2]]


def _pointing(operator: Operator, digest: str) -> list[dict[str, Any]]:
    """Channels that point at an artifact now."""
    found = []
    for name in operator.channels():
        entry = operator.channel(name)
        if entry.artifact == digest:
            found.append(
                {
                    "channel": name,
                    "revision": entry.revision,
                    "enabled": entry.enabled,
                    "strength": entry.strength,
                    "share": entry.share,
                }
            )
    return found


def _revoked(operator: Operator, digest: str, signers: list[str]) -> str | None:
    """Why the service's revocation list forbids an artifact; None where it does not."""
    from steering_service.core.errors import Refused
    from steering_service.core.revocation import parse_revocations

    serial, envelope = operator.revocations()
    if not serial:
        return None
    try:
        parse_revocations(payload_of(envelope)).check_artifact(digest, signers)
    except Refused as error:
        return str(error)
    return None


def _print_artifact(values: dict[str, Any], manifest: Manifest) -> None:
    line(f"{manifest.name}", style="bold")
    how = "verified" if values["signature_verified"] else "as it says; --trust verifies"
    rows = {
        "artifact": values["artifact"],
        "kind": manifest.kind + (f" ({manifest.controller.mode})" if manifest.controller else ""),
        "model": f"{manifest.model.name}  {manifest.model.fingerprint}",
        "limits": f"strength {manifest.policy.min_strength:g} to {manifest.policy.max_strength:g}",
        "payload": size_text(values["bytes"]),
        "signed by": f"{', '.join(values['signed_by']) or 'nobody'}  ({how})",
        "parents": ", ".join(manifest.parents) or "-",
        "children": ", ".join(values["children"]) or "-",
    }
    if values["revoked"]:
        rows["REVOKED"] = values["revoked"]
    for key, value in rows.items():
        line(f"  {key:<9}  {value}")
    for item in values["channels"]:
        state = "on" if item["enabled"] else "off"
        line(
            f"  channel    {item['channel']} r{item['revision']}, {state}, strength "
            f"{item['strength']:g}, share {item['share']:.0%}"
        )
    if not values["channels"]:
        line("  channel    none points at it")
    line(count_text(len(manifest.interventions), "intervention"), style="bold")
    for record in manifest.interventions:
        scores = ", ".join(f"{key} {value:.3g}" for key, value in sorted(record.scores.items()))
        line(
            f"  {record.site:<16}  {record.operation} at {record.positions}, weight "
            f"{record.weight:g} {record.strength_unit}, {record.method}, sigma {record.sigma:.3g}"
            + (f"; {scores}" if scores else "")
        )
    if manifest.lineage:
        line("lineage", style="bold")
        for text in json.dumps(manifest.lineage, indent=2, sort_keys=True).splitlines()[1:-1]:
            line(text)
