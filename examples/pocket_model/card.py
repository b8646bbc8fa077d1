"""The tables of the model card, from the figures in `card.json`."""

from pathlib import Path
from typing import Any

_START, _END = "<!-- card.json -->", "<!-- end of card.json -->"


def _mean(rows: list[dict[str, float]], name: str) -> str:
    values = [row[name] for row in rows]
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def tables(card: dict[str, Any]) -> str:
    """Markdown tables of the behaviours and, where measured, of steering."""
    lines = ["| on held-out wording | % |", "|---|---|"]
    for name, value in card["behaviours"].items():
        if not isinstance(value, dict):
            lines.append(f"| {name} | {value} |")
    steering = card.get("steering", {})
    if "refusal" in steering:
        lines += [
            "",
            "| refused, % | before | steered | steered at all positions "
            "| random directions: mean (least to most) |",
            "|---|---|---|---|---|",
        ]
        for way in ("added", "subtracted"):
            part = steering["refusal"][way]
            title = f"direction {way}, layer {part['layer']}, {part['strength']} times"
            for name, before in part["before"].items():
                lines.append(
                    f"| {name} ({title}) | {before} | {part['after'][name]} "
                    f"| {part['after, all positions'][name]} | {_mean(part['random'], name)} |"
                )
            lines.append(
                f"| arithmetic right ({title}) | {card['behaviours']['arithmetic right']} "
                f"| {part['arithmetic']} | | |"
            )
            lines.append(
                f"| replies coherent ({title}) | {card['behaviours']['coherent replies']} "
                f"| {part['coherent']} | | |"
            )
    if "refusal, sparse" in steering:
        part = steering["refusal, sparse"]
        title = f"layer {part['layer']}, {part['strength']} times"
        lines += [
            "",
            f"| largest 5 % of the entries, {title} | before | steered |",
            "|---|---|---|",
        ]
        for name, before in part["before"].items():
            what = "right" if name == "arithmetic" else "refused"
            lines.append(f"| {name} {what}, % | {before} | {part['after'][name]} |")
    if "choices" in steering:
        lines += [
            "",
            "| cooperates, % | before | steered | random directions: mean (least to most) |",
            "|---|---|---|---|",
        ]
        for site, part in steering["choices"].items():
            for way in ("added", "subtracted"):
                one = part[way]
                randoms = [{"rate": rate} for rate in one["random"]]
                lines.append(
                    f"| direction at the {site} token {way}, layer {one['layer']}, "
                    f"{abs(one['strength'])} times | {one['before']} | {one['after']} "
                    f"| {_mean(randoms, 'rate')} |"
                )
    if "heads" in steering:
        part = steering["heads"]
        heads = " and ".join(f"{layer}.{head}" for layer, head in part["heads"])
        lines.append(
            f"| heads {heads}, {part['alpha']} standard deviations | {part['before']} "
            f"| {part['after']} | |"
        )
    return "\n".join(lines)


def update(readme: Path, card: dict[str, Any]) -> None:
    """Replace the tables of a model card by new ones."""
    text = readme.read_text()
    before, rest = text.split(_START)
    _, after = rest.split(_END)
    readme.write_text(f"{before}{_START}\n{tables(card)}\n{_END}{after}")
