"""What `steerage status` shows of a channel's nodes: a table, lines, or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.text import Text

from pipeline.cli.channels import entry_values, share_text
from pipeline.cli.options import age_text, printable, time_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from steering_service.client.channel import ChannelEntry
    from steering_service.client.nodes import Convergence, NodeStatus

RUNS, REFUSES, PENDING, GONE = "runs", "refuses", "pending", "gone"
_STYLES: Final = {RUNS: "green", REFUSES: "red", PENDING: "yellow", GONE: "dim"}
_MARKS: Final = {RUNS: "━", REFUSES: "×", PENDING: "╌"}
# What somebody has to look at comes first, and is what is left when a screen is too small.
_ORDER: Final = (REFUSES, PENDING, GONE, RUNS)
_SHORT: Final = 8
_BAR: Final = 60
_WIDE: Final = 100


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A channel and its nodes at one moment.

    Attributes:
        channel: Its name.
        time: The moment, in UTC.
        entry: The channel's state; None before its first entry.
        nodes: In ascending order of their ids.
        artifacts: Of the revisions that nodes run, the artifact each points at.
        took_s: Seconds that it took to ask.
        trouble: Why this is not fresh; None when it is.
    """

    channel: str
    time: datetime
    entry: ChannelEntry | None
    nodes: Sequence[NodeStatus]
    convergence: Convergence
    artifacts: Mapping[int, str | None]
    took_s: float = 0.0
    trouble: str | None = None

    @property
    def is_settled(self) -> bool:
        """Every connected node has answered to the present revision."""
        return self.convergence.head_revision > 0 and self.convergence.pending == 0

    def state(self, node: NodeStatus) -> str:
        """One of RUNS, REFUSES, PENDING and GONE."""
        if not node.connected:
            return GONE
        if node.refuses_head:
            return REFUSES
        head = self.convergence.head_revision
        return RUNS if head and node.active_revision == head else PENDING

    def values(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "channel": self.channel,
            "entry": entry_values(self.entry) if self.entry else None,
            "convergence": _plain(asdict(self.convergence)),
            "nodes": [self._node_values(node) for node in self.nodes],
        }

    def _node_values(self, node: NodeStatus) -> dict[str, Any]:
        values: dict[str, Any] = _plain(asdict(replace(node, telemetry={})))
        values["telemetry"] = [
            {"revision": revision, "identity": identity} | asdict(counters)
            for (revision, identity), counters in node.telemetry.items()
        ]
        artifact = self.artifacts.get(node.active_revision)
        return values | {"state": self.state(node), "artifact": artifact}

    def key(self, node: NodeStatus) -> tuple[object, ...]:
        """Of a node, what makes a new line worth printing when it changes."""
        refused = node.nack.revision if node.nack else 0
        return self.state(node), node.active_revision, node.identity, refused

    def head_text(self) -> str:
        """The channel's state, who set it and why."""
        if self.entry is None:
            return f"{self.channel}  no entry yet; `steerage promote` makes one"
        entry = self.entry
        switch = "on" if entry.enabled else "off"
        return (
            f"{entry.channel} r{entry.revision}  {switch}  strength {entry.strength:g}  "
            f"share {share_text(entry.share)}  artifact {(entry.artifact or 'none')[:12]}"
        )

    def summary_text(self) -> str:
        """How far the present revision has come."""
        now = self.convergence
        if not now.connected:
            text = "no node is connected"
        else:
            text = f"{now.converged}/{now.connected} run r{now.head_revision}"
        for number, word in ((now.refusing, "refuse"), (now.pending, "pending"), (now.gone, GONE)):
            if number:
                text += f" · {number} {word}"
        steered = self._num_steered()
        if now.converged and steered < now.converged:
            text += f" · {steered} steered, {now.converged - steered} plain"
        if self.is_settled and now.converged and now.seconds:
            text += f" · settled in {now.seconds:.2f} s"
        return text

    def lines(self, nodes: Sequence[NodeStatus] | None = None) -> list[str]:
        """Nodes as lines of plain text, aligned with each other; of all, when none are named."""
        rows = [self._row(node, _SHORT) for node in (self.nodes if nodes is None else nodes)]
        widths = [max(len(row[column]) for row in rows) for column in range(6)] if rows else []
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
            + f"  {row[6]}".rstrip()
            for row in rows
        ]

    def render(self, width: int, height: int | None) -> RenderableType:
        """The table for a terminal; its rows are cut to the width.

        Args:
            width: Characters in a row.
            height: Rows on the screen; what does not fit is counted. None: all are shown.
        """
        ordered = sorted(self.nodes, key=lambda node: _ORDER.index(self.state(node)))
        header = self._header()
        # The heading of the columns, the count of what is left, and the cursor's line.
        room = len(ordered) if height is None else max(height - len(header) - 3, 1)
        lines = [*header, *self._table(ordered[:room], width)]
        if left := Counter(self.state(node) for node in ordered[room:]):
            counts = ", ".join(f"{number:,} {state}" for state, number in left.items())
            lines.append(Text(f"… and {left.total():,} more: {counts}", style="dim"))
        for text in lines:
            text.no_wrap, text.overflow = True, "ellipsis"
        return Group(*lines)

    def _header(self) -> list[Text]:
        lines = [Text(self.head_text(), style="bold")]
        if self.entry is not None:
            who = self.entry.actor
            if self.entry.approver:
                who += f", approved by {self.entry.approver}"
            why = printable(self.entry.reason)
            lines.append(Text(f"{self._age(self.entry.time)} ago, {who}: {why}"))
        if self.convergence.connected:
            lines.append(self._bar())
        lines.append(Text(self.summary_text()))
        if self.trouble:
            lines.append(Text(printable(self.trouble), style="red"))
        return lines

    def _bar(self) -> Text:
        now = self.convergence
        bar = Text()
        left = _BAR
        # What is rare comes first, so that its one cell is not rounded away.
        for number, state in (
            (now.refusing, REFUSES),
            (now.pending, PENDING),
            (now.converged, RUNS),
        ):
            cells = min(max(round(_BAR * number / now.connected), int(number > 0)), left)
            bar = Text(_MARKS[state] * cells, style=_STYLES[state]) + bar
            left -= cells
        return bar

    def _table(self, nodes: Sequence[NodeStatus], width: int) -> list[Text]:
        is_wide = width >= _WIDE
        rows = []
        for node in nodes:
            name, *middle, replica, refusal = self._row(node, _SHORT if is_wide else 0)
            name = _tail(name, max(width // 4, 12))
            rows.append([name, *middle, *([_tail(replica, 16)] if is_wide else []), refusal])
        names = ["node", "state", "rev", "since", "runs", *(["replica"] if is_wide else [])]
        names.append("last refusal" if any(row[-1] for row in rows) else "")
        table = [names, *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(names) - 1)]
        lines = []
        for row in table:
            state = row[1]
            style = _STYLES.get(state, "dim")
            text = Text(style="dim" if state in (GONE, "state") else "")
            for column, (cell, cells) in enumerate(zip(row, [*widths, 0], strict=True)):
                is_bad = state == REFUSES and column == len(names) - 1
                text.append(f"{cell:<{cells}}  ", style=style if column == 1 or is_bad else "")
            text.rstrip()
            lines.append(text)
        return lines

    def _age(self, time: datetime) -> str:
        return age_text((self.time - time).total_seconds())

    def _row(self, node: NodeStatus, identity_digits: int) -> tuple[str, ...]:
        state = self.state(node)
        since = node.connected_since if state == GONE else node.active_since
        age = self._age(since) if since else "-"
        refusal = ""
        if node.nack:
            ago = f", {self._age(node.nack.time)} ago" if node.nack.time else ""
            refusal = f"{node.nack.kind} r{node.nack.revision}{ago}"
            # Of what is past, the kind is enough; --json has the rest.
            refusal = printable(f"{refusal}: {node.nack.reason}" if state == REFUSES else refusal)
        return (
            node.node_id,
            state,
            f"r{node.active_revision}" if node.active_revision else "-",
            age,
            self._runs(node, identity_digits),
            node.replica or "-",
            refusal,
        )

    def _runs(self, node: NodeStatus, identity_digits: int) -> str:
        if not self._is_steered(node):
            return "plain" if node.active_revision else "-"
        # The log does not tell of a node that is ahead of it, as after a restored backup.
        text = (self.artifacts.get(node.active_revision) or "unknown")[:_SHORT]
        return f"{text}/{node.identity[:identity_digits]}" if identity_digits else text

    def _is_steered(self, node: NodeStatus) -> bool:
        from steering_service.client.active import UNSTEERED

        return node.identity not in ("", UNSTEERED)

    def _num_steered(self) -> int:
        return sum(self.state(node) == RUNS and self._is_steered(node) for node in self.nodes)


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[-width + 1 :]}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value


def heading(snapshot: Snapshot) -> str:
    """Two facts on one line, for logs: the channel's state, and how far it has come."""
    return f"{time_text(snapshot.time)}  {snapshot.head_text()}  {snapshot.summary_text()}"
