"""The command that takes something back for good: revoke."""

from __future__ import annotations

import getpass
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pipeline.cli.app import DELIVERY, app
from pipeline.cli.connecting import Service, connecting
from pipeline.cli.digests import resolve
from pipeline.cli.envelopes import payload_of, signers_of
from pipeline.cli.options import (
    AsJson,
    TrustPaths,
    Yes,
    confirm,
    count_text,
    line,
    print_json,
    stderr,
)
from pipeline.errors import GateRefused, InvalidInput
from steering_service.core.errors import SteeringError

if TYPE_CHECKING:
    from steering_service.client.channel import ChannelEntry
    from steering_service.client.operator import Operator
    from steering_service.core.revocation import Revocations
    from steering_service.core.signing import Signer

_ALL: Final = "(all)"  # no name of a channel


@app.command(rich_help_panel=DELIVERY)
@connecting
def revoke(
    reason: Annotated[str, typer.Option("--reason", help="Why; part of the signed list.")],
    key: Annotated[
        Path, typer.Option("--key", help="Private key that signs the list; nodes must trust it.")
    ],
    service: Service,
    artifact: Annotated[
        list[str] | None,
        typer.Option(
            "--artifact", metavar="DIGEST", help="Artifact no node may run again; repeatable."
        ),
    ] = None,
    key_id: Annotated[
        list[str] | None,
        typer.Option(
            "--key-id",
            metavar="ID",
            help="Publisher's key whose signatures count no more; repeatable.",
        ),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            "--floor",
            metavar="CHANNEL=REVISION",
            help="Revisions of the channel below this one may not run again; repeatable.",
        ),
    ] = None,
    trust: TrustPaths = None,
    actor: Annotated[
        str | None,
        typer.Option("--actor", help="Who; by default the login name.", show_default=False),
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Revoke artifacts, signing keys or old revisions. There is no way back.

    Every node that watches any channel gets the list at once, refuses what it names from then on,
    also with no service in sight, and goes over to the plain model if it runs it. The present list
    is read, added to, signed and sent. It must be signed by --key itself or by a key of --trust,
    so that nobody makes you sign what you have not seen.

    Example: steerage revoke --artifact 3f9a6c12 --reason "leaks prompts, #77" --key security.key
    """
    from steering_service.core.signing import Signer

    if not (artifact or key_id or floor):
        raise typer.BadParameter("nothing to revoke: give --artifact, --key-id or --floor")
    floors = [_floor(text) for text in floor or ()]
    signer = Signer.from_file(key)
    if signer.key_id in (key_id or ()):
        raise InvalidInput(
            f"key {signer.key_id} would sign its own revocation, which nodes ignore; sign with "
            "another key that they trust",
            kind="revokes_itself",
        )
    with service.operator() as operator:
        present = _present(operator, signer, trust or ())
        added = _Added(
            artifacts=tuple(resolve(operator, text) for text in artifact or ()),
            keys=tuple(key_id or ()),
            floors=tuple(floors),
        )
        wanted = added.on_top_of(present, actor=actor or getpass.getuser(), reason=reason)
        if wanted is None:
            stderr.print("all of this is revoked already", highlight=False)
            _show(present, as_json)
            return
        effects = _effects(operator, present, wanted)
        if not as_json:
            line(f"Revocation list {wanted.serial}, signed by {signer.key_id}")
            for text in effects:
                line(f"  {text}")
        confirm("Revoke this for good?", yes)
        operator.revoke(signer.sign_revocations(wanted.to_bytes()))
        _show(wanted, as_json)


@dataclass(frozen=True, slots=True)
class _Added:
    """What the command line names."""

    artifacts: tuple[str, ...]
    keys: tuple[str, ...]
    floors: tuple[tuple[str, int], ...]

    def on_top_of(
        self, present: Revocations | None, *, actor: str, reason: str
    ) -> Revocations | None:
        """The next list; None where it would revoke nothing new."""
        from steering_service.core.revocation import Revocations

        floors = dict(present.floors) if present else {}
        for channel, revision in self.floors:
            floors[channel] = max(revision, floors.get(channel, 0))
        wanted = Revocations(
            serial=present.serial + 1 if present else 1,
            artifacts=tuple(sorted({*self.artifacts, *(present.artifacts if present else ())})),
            keys=tuple(sorted({*self.keys, *(present.keys if present else ())})),
            floors=floors,
            actor=actor,
            time=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
            reason=reason,
        )
        return None if present is not None and present.covers(wanted) else wanted


def _present(operator: Operator, signer: Signer, trust: Sequence[Path]) -> Revocations | None:
    """The present list, verified; None before the first.

    Raises:
        GateRefused: Signed by another key than the signer's, and no trust roots were given.
        Refused: Signed by none of the trust roots.
        InvalidInput: Not a signed revocation list at all.
    """
    from steering_service.core.revocation import parse_revocations
    from steering_service.core.signing import TrustRoots

    serial, envelope = operator.revocations()
    if not serial:
        return None
    payload = payload_of(envelope)
    # Signing is deterministic: an envelope that this key would make, it has made.
    if signer.sign_revocations(payload) == envelope:
        return parse_revocations(payload)
    if not trust:
        raise GateRefused(
            f"revocation list {serial} is signed by another key than {signer.key_id}; add --trust "
            "with the public keys that may sign such lists, so that it can be checked before it is "
            "added to",
            kind="revocations_unverified",
        )
    return TrustRoots.from_paths(trust).verify_revocations(envelope)


def _effects(operator: Operator, present: Revocations | None, wanted: Revocations) -> list[str]:
    """What is new, and what it does to the channels as they are.

    What the service cannot tell is said to be unknown: a damaged artifact, which nobody can read,
    is one to revoke, and a preview must not be in the way of that.
    """
    entries, unknown = _heads(operator)
    before = present or wanted.model_copy(update={"artifacts": (), "keys": (), "floors": {}})
    texts = [f"channel {name}: unknown ({kind})" for name, kind in unknown.items()]
    for digest in sorted({*wanted.artifacts} - {*before.artifacts}):
        try:
            name = operator.manifest(digest).manifest.name
        except SteeringError as error:
            name = f"unknown ({error.kind})"
        texts.append(f"artifact {digest} ({name}): {_users(entries, unknown, digest)}")
    new_keys = {*wanted.keys} - {*before.keys}
    in_use = sorted({entry.artifact for entry in entries if entry.artifact}) if new_keys else []
    hit = []
    for digest in in_use:
        try:
            keys = {*signers_of(operator.manifest(digest).signature)}
        except SteeringError as error:
            hit.append(f"  artifact {digest}: its signers are unknown ({error.kind})")
            continue
        if keys and keys <= {*wanted.keys}:
            hit.append(f"  artifact {digest}: {_users(entries, unknown, digest)}")
    for key_id in sorted(new_keys):
        texts.append(f"key {key_id}: every artifact that no other trusted key has signed")
        texts += hit
    for channel, revision in sorted(wanted.floors.items()):
        if revision == before.floors.get(channel):
            continue
        if channel in unknown or _ALL in unknown:
            texts.append(f"channel {channel} below r{revision}: where it is now is unknown")
            continue
        head = next((entry.revision for entry in entries if entry.channel == channel), 0)
        if not head:
            texts.append(f"channel {channel} below r{revision}: there is no such channel yet")
            continue
        effect = "nodes that lag behind" if head >= revision else f"it is at r{head}: ALL its nodes"
        texts.append(f"channel {channel} below r{revision}: {effect} go over to the plain model")
    return texts


def _heads(operator: Operator) -> tuple[list[ChannelEntry], dict[str, str]]:
    """The channels as they are, and the kinds of the errors of those that cannot be told."""
    try:
        names = list(operator.channels())
    except SteeringError as error:
        return [], {_ALL: error.kind}
    entries, unknown = [], {}
    for name in names:
        try:
            entries.append(operator.channel(name))
        except SteeringError as error:
            unknown[name] = error.kind
    return entries, unknown


def _users(entries: Sequence[ChannelEntry], unknown: Collection[str], digest: str) -> str:
    names = [entry.channel for entry in entries if entry.artifact == digest and entry.enabled]
    if unknown:
        names.append("whatever channel of the unknown ones points at it")
    if not names:
        return "no channel points at it now"
    return f"nodes of {', '.join(names)} go over to the plain model"


def _floor(text: str) -> tuple[str, int]:
    channel, equals, revision = text.rpartition("=")
    if not (equals and channel and revision.isascii() and revision.isdigit() and int(revision)):
        raise typer.BadParameter(f"--floor {text!r}: expected CHANNEL=REVISION, such as prod=12")
    return channel, int(revision)


def _show(revocations: Revocations | None, as_json: bool) -> None:
    values: dict[str, Any] = revocations.model_dump(mode="json") if revocations else {"serial": 0}
    if as_json:
        print_json(values)
    else:
        counts = ", ".join(
            count_text(len(values.get(name, ())), name[:-1])
            for name in ("artifacts", "keys", "floors")
        )
        line(f"revocation list {values['serial']} is in force: {counts}")
