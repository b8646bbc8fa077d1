"""The part of `steerage verify` that walks registry and channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.options import count_text, line, progress, size_text

if TYPE_CHECKING:
    from steering_service.core.revocation import Revocations
    from store.location import Location


def audit_registry(root: Location, trust: Sequence[Path]) -> dict[str, Any]:
    """Read everything that delivery keeps, and compare it with its digests, sizes and chains.

    Args:
        root: Of the store.
        trust: Public keys; with them signatures are checked too.

    Returns:
        What `steerage verify --json` has under "registry".
    """
    from store.audit import audit

    objects = num_bytes = 0
    problems: list[dict[str, Any]] = []
    with progress("verify registry", None) as (bar, task):

        def on_checked(size: int) -> None:
            nonlocal objects, num_bytes
            objects += 1
            num_bytes += size
            damaged = f" · {len(problems)} damaged" if problems else ""
            bar.update(task, advance=1, note=f"objects · {size_text(num_bytes)}{damaged}")

        signatures, revocations = _verifiers(trust)
        findings = audit(
            root,
            verify_signature=signatures,
            verify_revocations=revocations,
            on_checked=on_checked,
        )
        for finding in findings:
            problems.append({"key": finding.key, "kind": finding.kind, "detail": finding.detail})
    return {
        "objects": objects,
        "bytes": num_bytes,
        "signatures_checked": bool(trust),
        "problems": problems,
    }


def _verifiers(
    trust: Sequence[Path],
) -> tuple[Callable[[bytes, bytes], object] | None, Callable[[int, bytes], object] | None]:
    """Checks of signatures: of artifacts, and of revocation lists in the order of serials."""
    if not trust:
        return None, None
    from steering_service.core.errors import Refused
    from steering_service.core.signing import TrustRoots

    roots = TrustRoots.from_paths(trust)
    before: Revocations | None = None

    def verify_revocations(serial: int, envelope: bytes) -> None:
        nonlocal before
        # As nodes take them: a key that was revoked signs no further list.
        found = roots.verify_revocations(envelope, revoked=before.keys if before else ())
        if found.serial != serial or (before is not None and not found.covers(before)):
            raise Refused(
                f"revocation list {serial} says serial {found.serial}, or lacks what an earlier "
                "one revokes; restore the store from its backup",
                kind="revocations_order",
            )
        before = found

    return roots.verify, verify_revocations


def print_audit(report: dict[str, Any]) -> None:
    """The report for people; nothing where there is neither registry nor channel."""
    problems = report["problems"]
    if not report["objects"] and not problems:
        return
    checked = "signatures checked" if report["signatures_checked"] else "signatures not checked"
    state = f"{len(problems)} damaged" if problems else "sound"
    line(
        f"registry and channels  {state}, {count_text(report['objects'], 'object')}, {checked}",
        style="red" if problems else None,
    )
    for problem in problems:
        line(f"  {problem['key']}: {problem['detail']} ({problem['kind']})")
    if not report["signatures_checked"]:
        line("  --trust PUBLIC.pub checks the signatures too")
