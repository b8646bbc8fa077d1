"""Commands of channels: promote, rollback, approve, proposals, log, watch."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.app import DELIVERY, app
from pipeline.cli.connecting import Service, connecting
from pipeline.cli.digests import resolve
from pipeline.cli.options import (
    AsJson,
    Channel,
    age_text,
    line,
    print_json,
    show,
    stderr,
    time_text,
)

if TYPE_CHECKING:
    from steering_service.client.channel import Assignment, ChannelEntry, Proposal

Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the channel's log for ever.")]
Actor = Annotated[
    str | None,
    typer.Option(
        "--actor",
        help="Who; by default the login name, or whom the service takes you for.",
        show_default=False,
    ),
]
Expect = Annotated[
    int | None,
    typer.Option(
        "--expect",
        min=0,
        help="Fail unless the channel is at this revision (0: new).",
        show_default=False,
    ),
]


@app.command(rich_help_panel=DELIVERY)
@connecting
def promote(
    channel: Channel,
    reason: Reason,
    service: Service,
    artifact: Annotated[
        str | None,
        typer.Argument(
            help="Digest, or its first digits (8 or more); without it the channel keeps its own.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="Within the artifact's signed limits.", show_default=False),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            "--share",
            min=0,
            max=1,
            help="Part of the nodes that take part, 0 to 1; raising it only adds nodes.",
            show_default=False,
        ),
    ] = None,
    on: Annotated[
        bool | None,
        typer.Option(
            "--on/--off", help="Off: every node runs the plain model.", show_default=False
        ),
    ] = None,
    actor: Actor = None,
    expect: Expect = None,
    as_json: AsJson = False,
) -> None:
    """Point a channel at an artifact, or change its strength, share or switch.

    Every node that watches the channel follows within a second. What is not named stays. Where the
    access policy asks for two people, this only proposes, and prints the command that approves.

    Example: steerage promote prod 3f9a6c12 --strength 0.5 --share 0.05 --reason "canary, #812"
    """
    if (artifact, strength, share, on) == (None, None, None, None):
        raise typer.BadParameter(
            "nothing to change: name an artifact, --strength, --share or --off"
        )
    with service.operator() as operator:
        answer = operator.promote(
            channel,
            # Empty: point at nothing.
            artifact=resolve(operator, artifact) if artifact else artifact,
            strength=strength,
            enabled=on,
            share=share,
            reason=reason,
            actor=service.actor(actor),
            expected_revision=expect,
        )
    _show_answer(answer, as_json, service)


@app.command(rich_help_panel=DELIVERY)
@connecting
def rollback(
    channel: Channel,
    reason: Reason,
    service: Service,
    to: Annotated[
        int | None,
        typer.Option(
            "--to",
            min=1,
            help="Revision whose state comes back; by default the one before the present.",
            show_default=False,
        ),
    ] = None,
    actor: Actor = None,
    expect: Expect = None,
    as_json: AsJson = False,
) -> None:
    """Give a channel the state of an earlier revision: artifact, strength, share and switch.

    The log only grows: this appends an entry that says what it restores. One rollback after the
    other walks back.

    Example: steerage rollback prod --reason "refuses too much, incident 41"
    """
    with service.operator() as operator:
        answer = operator.rollback(
            channel,
            actor=service.actor(actor),
            reason=reason,
            to_revision=to,
            expected_revision=expect,
        )
    _show_answer(answer, as_json, service)


@app.command(rich_help_panel=DELIVERY)
@connecting
def approve(
    channel: Channel,
    proposal: Annotated[
        str, typer.Argument(metavar="ID", help="16 hex digits; `steerage proposals` shows them.")
    ],
    service: Service,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Put into effect what somebody else has proposed, on a channel that asks for two people.

    It must still fit: once the channel has changed otherwise, the proposal is void.

    Example: steerage approve prod 6b1c0de2a4f35780
    """
    with service.operator() as operator:
        answer = operator.approve(channel, proposal, actor=service.actor(actor))
    _show_answer(answer, as_json, service)


@app.command(rich_help_panel=DELIVERY)
@connecting
def proposals(channel: Channel, service: Service, as_json: AsJson = False) -> None:
    """List what waits for approval on a channel, and what each would change.

    Example: steerage proposals prod
    """
    from steering_service.core.errors import NotFound

    with service.operator() as operator:
        waiting = operator.proposals(channel)
        present: ChannelEntry | None = None
        if waiting and not as_json:
            try:
                present = operator.channel(channel)
            except NotFound:
                present = None  # its first entry is what is proposed
    for proposal in waiting:
        if as_json:
            print_json(_proposal_values(proposal))
            continue
        entry = proposal.entry
        age = age_text((datetime.now(UTC) - entry.time).total_seconds())
        line(
            f"{proposal.id}  {channel} r{entry.revision}  {age} ago  {entry.actor}: {entry.reason}"
        )
        line(f"  {_changes(present, entry)}")
        line(f"  steerage approve {channel} {proposal.id}{service.flags}")
    if not waiting and not as_json:
        stderr.print(f"nothing waits for approval on {channel!r}", highlight=False, markup=False)


@app.command(rich_help_panel=DELIVERY)
@connecting
def log(
    channel: Channel,
    service: Service,
    after: Annotated[
        int, typer.Option("--after", min=0, help="Only revisions above this one.")
    ] = 0,
    last: Annotated[
        int | None,
        typer.Option("--last", min=1, help="Only the last N entries.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print who changed a channel, when, how and why, oldest first.

    Example: steerage log prod --last 20
    """
    with service.operator() as operator:
        if last is not None:
            after = max(after, operator.channel(channel).revision - last)
        for entry in operator.history(channel, after=after):
            _print_state(entry, as_json)


@app.command(rich_help_panel=DELIVERY)
@connecting
def watch(channel: Channel, service: Service, as_json: AsJson = False) -> None:
    """Print a channel's state now and at every change, until Ctrl-C or the service ends.

    Example: steerage watch prod --json | jq .revision
    """
    with service.operator() as operator:
        for assignment in operator.watch(channel):
            _print_state(assignment, as_json)


def entry_values(entry: ChannelEntry) -> dict[str, Any]:
    """An entry as `--json` prints it."""
    return asdict(entry) | {"time": entry.time.isoformat()}


def state_text(state: ChannelEntry | Assignment) -> str:
    """What a channel asks of its nodes, on one line."""
    switch = "on " if state.enabled else "off"
    return (
        f"{state.channel} r{state.revision}  {switch}  artifact {(state.artifact or 'none')[:12]}  "
        f"strength {state.strength:g}  share {share_text(state.share)}"
    )


def share_text(share: float) -> str:
    """A share as per cent, with digits only where they say something: 5 %, 0.5 %, 33.33 %."""
    return f"{round(share * 100, 2):g}%"


def _show_answer(answer: ChannelEntry | Proposal, as_json: bool, service: Service) -> None:
    from steering_service.client.channel import Proposal

    if not isinstance(answer, Proposal):
        values = entry_values(answer)
        show(values if as_json else _said(values), as_json, f"Channel {answer.channel}")
        return
    if as_json:
        print_json(_proposal_values(answer))
        return
    entry = answer.entry
    show(_said(entry_values(entry)) | {"proposal": answer.id}, False, "Proposed")
    line(f"not in effect yet: {entry.channel!r} asks for two people. Somebody else runs")
    line(f"  steerage approve {entry.channel} {answer.id}{service.flags}")


def _said(values: dict[str, Any]) -> dict[str, Any]:
    """What people want to read: not what is empty, nor the chain's digest."""
    return {k: v for k, v in values.items() if v not in (None, "") and k != "previous"} | {
        "artifact": values["artifact"] or "none"
    }


def _proposal_values(proposal: Proposal) -> dict[str, Any]:
    return {"proposal": proposal.id, "entry": entry_values(proposal.entry)}


def _changes(present: ChannelEntry | None, proposed: ChannelEntry) -> str:
    """What an entry would change, as `strength 0.5 → 0.8`."""

    def values(entry: ChannelEntry) -> dict[str, str]:
        return {
            "artifact": (entry.artifact or "none")[:12],
            "strength": f"{entry.strength:g}",
            "share": share_text(entry.share),
            "switch": "on" if entry.enabled else "off",
        }

    after = values(proposed)
    if present is None:
        return "new: " + ", ".join(f"{key} {value}" for key, value in after.items())
    before = values(present)
    changed = [f"{key} {before[key]} → {after[key]}" for key in after if before[key] != after[key]]
    restored = f"as at r{proposed.restores}: " if proposed.restores else ""
    return restored + (", ".join(changed) or "nothing changes")


def _print_state(state: ChannelEntry | Assignment, as_json: bool) -> None:
    from steering_service.client.channel import ChannelEntry

    if as_json:
        print_json(entry_values(state) if isinstance(state, ChannelEntry) else asdict(state))
        return
    text = state_text(state)
    if isinstance(state, ChannelEntry):
        who = state.actor + (f", approved by {state.approver}" if state.approver else "")
        back = f" (back to r{state.restores})" if state.restores else ""
        text += f"  {time_text(state.time)}  {who}{back}: {state.reason or '(no reason)'}"
    line(text)
