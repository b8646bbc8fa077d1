"""The README's table of `make repro`, made from its results.

python examples/repro_table.py benchmarks/results/repro.json README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

BEGIN: Final = "<!-- made by examples/repro_table.py -->"
END: Final = "<!-- end -->"


def table(found: Mapping[str, Any]) -> str:
    """Markdown, from the JSON object that `make repro` ends with."""
    wrapped = found["was_shares"]["refuses jailbroken harmful requests"]
    rows = [
        (
            f"**HSI**: {len(found['hsi_sites'])} of {found['num_heads']} heads",
            "sides with the other AI, two-choice questions",
            _moved(found["plain_share"], found["hsi_shift"]),
            f"random heads {_zero(found['random_heads_shift'])}, random directions "
            f"{_zero(found['hsi_random_direction_shift'])} points",
        ),
        (
            "**ITI**: as many heads, by probes",
            "the same",
            _moved(found["plain_share"], found["iti_shift"]),
            "",
        ),
        (
            "**CAA**: one layer",
            "the same",
            _moved(found["plain_share"], found["caa_shift"]),
            f"asked by a prompt: {found['plain_share'] + found['prompt_shift']:.0f} %",
        ),
        (
            "**Jailbreak Antidote**: 5 % of the entries",
            "refuses harmful requests in unseen jailbreak wrappers",
            _moved(found["antidote_plain"], found["antidote_refusal_gain"]),
            f"look-alike benign requests refused {found['antidote_benign_cost']:+.1f}, unrelated "
            f"skill {-found['antidote_skill_cost']:+.1f} points; random directions at most "
            f"{found['antidote_random_shift']:+.1f}",
        ),
        (
            "**Weighted steering**: a controller",
            "refuses harmful requests, plain and wrapped",
            f"{found['was_harmful_refusal_plain']:.1f} → {found['was_harmful_refusal']:.1f} %",
            f"benign refused {found['was_benign_refusal_plain']:.1f} → "
            f"{found['was_benign_refusal']:.1f} %; in unseen wrappers {wrapped['plain']:.1f} → "
            f"{wrapped['controller']:.1f} %; gate AUROC {found['was_gate_auroc']:.3f}",
        ),
        (
            "the constant strength that refuses most",
            "the same",
            f"{found['was_harmful_refusal_plain']:.1f} → "
            f"{found['was_harmful_refusal_fixed']:.1f} %",
            f"benign refused {found['was_benign_refusal_plain']:.1f} → "
            f"{found['was_benign_refusal_fixed']:.1f} %",
        ),
        (
            "the constant strength with the best balance",
            "the same",
            f"{found['was_harmful_refusal_plain']:.1f} → "
            f"{found['was_harmful_refusal_balanced']:.1f} %",
            f"benign refused {found['was_benign_refusal_plain']:.1f} → "
            f"{found['was_benign_refusal_balanced']:.1f} %",
        ),
        (
            "**Alignment faking**",
            "complies more where it is told that it is monitored",
            f"{found['faking_gap']:+.0f} points {_interval(found['faking_gap_interval'])}",
            f"under empty labels {_zero(found['faking_gap_neutral'])} "
            f"{_interval(found['faking_gap_neutral_interval'])}; with the direction between the "
            f"tiers subtracted {_zero(found['faking_gap_steered'])}, random ones "
            f"{', '.join(f'{gap:.0f}' for gap in found['faking_gap_random_steered'])}",
        ),
    ]
    lines = ["| system | share of answers, held out | change | beside it |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _zero(value: float) -> str:
    """A change to a point, without the sign of a rounded zero."""
    return f"{value:+.0f}" if abs(value) >= 0.5 else "0"


def _moved(plain: float, shift: float) -> str:
    return f"{plain:.1f} → {plain + shift:.1f} %"


def _interval(ends: list[float]) -> str:
    return f"[{ends[0]:.0f}, {ends[1]:.0f}]"


def replaced(page: str, found: Mapping[str, Any]) -> str:
    """A page with the table between its marks made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    results, readme = map(Path, sys.argv[1:])
    readme.write_text(replaced(readme.read_text(), json.loads(results.read_text())))
