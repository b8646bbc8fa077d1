"""The command that shows who runs what."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from pipeline.cli.app import DELIVERY, app
from pipeline.cli.connecting import Service, connecting
from pipeline.cli.node_table import Snapshot, heading
from pipeline.cli.options import AsJson, Channel, line, print_json, stderr, stdout

if TYPE_CHECKING:
    from steering_service.client.operator import Operator


@app.command(rich_help_panel=DELIVERY)
@connecting
def status(
    channel: Channel,
    service: Service,
    watch: Annotated[
        bool | None,
        typer.Option(
            "--watch/--once",
            help="Go on until Ctrl-C, or look once; by default --watch on a terminal.",
            show_default=False,
        ),
    ] = None,
    every_s: Annotated[
        float, typer.Option("--every", min=0.1, help="Seconds between two looks.")
    ] = 1.0,
    wait_s: Annotated[
        float | None,
        typer.Option(
            "--wait",
            min=0,
            help="Look until every connected node has answered to the present revision, at most "
            "so many seconds. Exits with 0 if all run it, 3 if some refuse, 1 if time is over.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a channel's nodes: who runs what, since when, and what each refused last, and why.

    On a terminal a live table; elsewhere lines, and with --watch one for each change. Any replica
    answers for all, a few seconds late about the nodes of the others.

    Example, in a script that rolls out: steerage status prod --wait 60
    """
    if watch is None:
        watch = stdout.is_terminal and not as_json
    with service.operator() as operator:
        look = _looker(operator, channel)
        snapshot = look()
        if wait_s is not None:
            _wait(snapshot, look, every_s, wait_s, as_json)
        elif not watch:
            _print(snapshot, as_json)
        elif stdout.is_terminal and not as_json:
            _live(snapshot, look, every_s)
        else:
            _follow(snapshot, look, every_s, as_json)


def _looker(operator: Operator, channel: str) -> Callable[[], Snapshot]:
    from steering_service.core.errors import NotFound

    artifacts: dict[int, str | None] = {}

    def look() -> Snapshot:
        started = time.monotonic()
        try:
            entry = operator.channel(channel)
        except NotFound:
            entry = None  # nodes may wait for it already
        nodes, convergence = operator.nodes(channel)
        if entry is not None:
            artifacts[entry.revision] = entry.artifact
            others = {
                node.active_revision for node in nodes if node.active_revision < entry.revision
            }
            for revision in others - artifacts.keys() - {0}:
                # Entries never change, so each is read once.
                found = next(operator.history(channel, after=revision - 1), None)
                if found is not None and found.revision == revision:
                    artifacts[revision] = found.artifact
        took_s = time.monotonic() - started
        now = datetime.now(UTC)
        return Snapshot(channel, now, entry, nodes, convergence, artifacts, took_s)

    return look


def _again(snapshot: Snapshot, look: Callable[[], Snapshot], every_s: float) -> Snapshot:
    """The next look; what was seen last, with what is wrong, where the service does not answer."""
    from steering_service.core.errors import Unavailable

    # Ten thousand nodes cost a replica half a second a look: never more than a fifth of its time.
    time.sleep(max(every_s, 4 * snapshot.took_s))
    try:
        return look()
    except Unavailable as error:
        return replace(snapshot, trouble=f"as of {snapshot.time:%H:%M:%S}Z: {error}")


def _live(snapshot: Snapshot, look: Callable[[], Snapshot], every_s: float) -> None:
    with Live(console=stdout, auto_refresh=False) as live:
        while True:
            live.update(snapshot.render(stdout.width, stdout.height), refresh=True)
            snapshot = _again(snapshot, look, every_s)


def _follow(
    snapshot: Snapshot, look: Callable[[], Snapshot], every_s: float, as_json: bool
) -> None:
    """Print what changes."""
    shown: dict[str, tuple[object, ...]] = {}
    said: object = None
    while True:
        changed = [node for node in snapshot.nodes if shown.get(node.node_id) != snapshot.key(node)]
        now = snapshot.head_text(), snapshot.summary_text(), bool(snapshot.trouble)
        if changed or now != said:
            if as_json:
                print_json(snapshot.values() | {"trouble": snapshot.trouble})
            else:
                line(heading(snapshot) + (f"  ({snapshot.trouble})" if snapshot.trouble else ""))
                for text in snapshot.lines(changed):
                    line(f"  {text}")
        shown = {node.node_id: snapshot.key(node) for node in snapshot.nodes}
        said = now
        snapshot = _again(snapshot, look, every_s)


def _wait(
    snapshot: Snapshot,
    look: Callable[[], Snapshot],
    every_s: float,
    wait_s: float,
    as_json: bool,
) -> None:
    end = time.monotonic() + wait_s
    with stderr.status(snapshot.summary_text()) as spinner:
        while not snapshot.is_settled and time.monotonic() < end:
            snapshot = _again(snapshot, look, min(every_s, max(end - time.monotonic(), 0.01)))
            spinner.update(snapshot.summary_text())
    _print(snapshot, as_json)
    if not snapshot.is_settled:
        stderr.print(f"not settled after {wait_s:g} s", highlight=False)
        raise typer.Exit(1)
    if snapshot.convergence.refusing:
        raise typer.Exit(3)


def _print(snapshot: Snapshot, as_json: bool) -> None:
    if as_json:
        print_json(snapshot.values())
    elif stdout.is_terminal:
        stdout.print(snapshot.render(stdout.width, None))
    else:
        line(snapshot.head_text())
        line(snapshot.summary_text())
        for text in snapshot.lines():
            line(text)
