"""How a selection is shown: its table, and the lines for the run file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pipeline.cli.options import print_json, stdout, where

if TYPE_CHECKING:
    from pipeline.selection.results import SiteSelection


def show_selection(found: SiteSelection, top: int, as_json: bool) -> None:
    """Print a selection, for people or for machines."""
    if as_json:
        print_json(
            {
                "selection": found.digest,
                "by": found.by,
                "sites": [str(site) for site in found.sites],
                "strength": found.strength,
                "why": found.why,
                "plain": dict(found.plain),
                "tried": list(found.tried),
                "steps": list(found.steps),
                "publish": dict(found.publish),
                "capture": dict(found.capture),
                "path": where(found.location),
            }
        )
        return
    _TABLES[found.by](found, top)
    sites = " ".join(map(str, found.sites))
    at = "" if found.strength is None else f" at strength {found.strength:g}"
    stdout.print(f"[bold]{sites}[/]{at}: {found.why}", highlight=False)
    stdout.print("for the run file:", style="bold")
    for line in found.run_file_lines:
        stdout.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    stdout.print(f"written to {where(found.location)}", highlight=False, soft_wrap=True)


def _score_table(found: SiteSelection, top: int) -> None:
    chosen = {str(site) for site in found.sites}
    _print_table(
        f"Sites by {found.request['score']} on validation rows",
        ["", "site", "AUROC", "accuracy", "pairs", "d"],
        [
            [
                "→" if row["site"] in chosen else "",
                row["site"],
                *(
                    _number(row.get(f"{name}_validation"), ".3f")
                    for name in ("auroc", "accuracy", "pair_accuracy", "cohens_d")
                ),
            ]
            for row in found.tried[: max(top, len(chosen))]
        ],
    )


def _candidate_table(found: SiteSelection, top: int) -> None:
    from pipeline.selection.candidates import Candidate, Caps

    caps = found.request["caps"]
    harm = math.inf if caps["harm"] is None else caps["harm"]
    has_kl = caps["kl"] is not None
    limits = Caps(caps["perplexity"], caps["kl"], harm)
    tried = [Candidate.of_figures(row, has_kl=has_kl) for row in found.tried]
    kept = [c for c in tried if limits.allow(c)]
    title = f"Candidates within the caps, {len(kept)} of {len(tried)}"
    shown = sorted(kept, key=lambda c: (-c.share, c.ratio))[:top]
    if found.steps:
        title = "Steps of the forward search"
        shown = [Candidate.of_figures(row, has_kl=has_kl) for row in found.steps]
    plain = found.plain["share"]
    _print_table(
        f"{title} (target without steering: {_number(plain, '.1f')} %)",
        ["", "sites", "strength", "target, %", "undefined, %", "perplexity", "KL", "harm, +points"],
        [
            [
                "→" if (c.sites, c.strength) == (found.sites, found.strength) else "",
                " ".join(map(str, c.sites)),
                f"{c.strength:g}",
                f"{c.share:.1f}",
                f"{c.undefined:.0f}",
                _number(c.ratio, ".3f"),
                _number(c.kl, ".3f"),
                _number(c.harm, "+.1f"),
            ]
            for c in shown
        ],
    )


def _refusal_table(found: SiteSelection, top: int) -> None:
    site, tokens = str(found.sites[0]), found.capture.get("tokens")
    plain = found.plain
    _print_table(
        "Refusal directions (log-odds of a refusal; without steering: harmful "
        f"{_number(plain['harmful'], '+.2f')}, harmless {_number(plain['harmless'], '+.2f')})",
        ["", "site", "token", "ablated", "induced", "KL", "not taken, as"],
        [
            [
                "→" if row["site"] == site and tokens in (None, str(row["position"])) else "",
                row["site"],
                str(row["position"]),
                _number(row["ablated"], "+.2f"),
                _number(row["induced"], "+.2f"),
                _number(row["kl"], ".3f"),
                "; ".join(row["objections"]),
            ]
            for row in found.tried
        ],
    )


_TABLES: Final[dict[str, Callable[[SiteSelection, int], None]]] = {
    "score": _score_table,
    "sweep": _candidate_table,
    "forward": _candidate_table,
    "refusal": _refusal_table,
}


def _print_table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        is_text = heading in ("", "site", "sites", "not taken, as")
        # A name that is cut off cannot be copied into a run file.
        table.add_column(
            heading,
            justify="left" if is_text else "right",
            no_wrap=heading in ("site", "sites"),
            overflow="ignore" if heading in ("site", "sites") else "fold",
        )
    for row in rows:
        table.add_row(*row)
    stdout.print(table)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:{form}}"
