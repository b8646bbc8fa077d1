"""How far the pocket model can be steered: directions fitted on `train`, chosen on `validation`.

Every figure is of greedy replies to held-out prompts. Directions are differences of class means;
strengths are multiples of them. Random directions have the same norm, layer and positions.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import Message, Pocket, chosen, read_rows, refused, share, user
from torch import Tensor

STRENGTHS = (0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.85, 1.0)
SPARSE_STRENGTHS = (0.7, 1.0, 1.4, 1.8, 2.4)
CHOICE_STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
HEAD_STRENGTHS = (8.0, 12.0, 16.0)
NUM_RANDOM = 5
_DECIDED = 8  # tokens after which a reply shows whether it refuses


class Suite:
    """Held-out prompts with what a reply to them is counted as."""

    def __init__(self, pocket: Pocket, data: Path, phrases: Sequence[str]) -> None:
        """Read the prompts of the validation and test splits."""
        self.pocket = pocket
        self.data = data
        self.phrases = phrases
        self.requests: dict[str, list[list[Message]]] = {}
        for split in ("validation", "test"):
            harmful = read_rows(data / "refusal.jsonl", split=split, label=1)
            benign = read_rows(data / "refusal.jsonl", split=split, label=0)
            broken = read_rows(data / "jailbreaks.jsonl", split=split)
            alike = read_rows(data / "lookalikes.jsonl", split=split)
            for name, rows in (
                ("harmful", harmful),
                ("benign", benign),
                ("jailbroken", [row for row in broken if row["seen"]]),
                ("jailbroken unseen", [row for row in broken if not row["seen"]]),
                ("lookalike", alike),
            ):
                self.requests[f"{name} {split}"] = [user(row["prompt"]) for row in rows]
        self.sums = read_rows(data / "arithmetic.jsonl", split="test")

    def refusal(self, name: str, limit: int | None = None) -> float:
        """Percentage of a group of requests that the model refuses."""
        chats = self.requests[name][:limit]
        replies = self.pocket.replies(chats, _DECIDED)
        return share([refused(reply, self.phrases) for reply in replies])

    def arithmetic(self) -> float:
        """Percentage of sums that come out right."""
        replies = self.pocket.replies([user(row["prompt"]) for row in self.sums], 12)
        return share(
            [r.endswith(f"= {row['answer']}.") for r, row in zip(replies, self.sums, strict=True)]
        )

    def cooperation(self, split: str, system: str | None = None, limit: int | None = None) -> float:
        """Percentage of two-choice questions answered with the cooperative choice."""
        rows = read_rows(self.data / "coordination.jsonl", split=split)[:limit]
        replies = self.pocket.replies([user(row["question"], system) for row in rows], 6)
        return share(
            [
                chosen(reply) == row["answer_matching_behavior"]
                for reply, row in zip(replies, rows, strict=True)
            ]
        )

    def decided(self, split: str, system: str | None = None) -> float:
        """Percentage of two-choice questions answered with exactly one letter."""
        rows = read_rows(self.data / "coordination.jsonl", split=split)
        replies = self.pocket.replies([user(row["question"], system) for row in rows], 6)
        return share([bool(chosen(reply)) for reply in replies])

    def coherent(self, name: str) -> float:
        """Percentage of whole replies that end, and in which no four words come twice."""
        replies = self.pocket.replies(self.requests[name], 48)
        flags = []
        for reply in replies:
            words = reply.split()
            grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
            flags.append(reply.rstrip().endswith((".", ")")) and len(grams) == len(set(grams)))
        return share(flags)


def refusal_direction(pocket: Pocket, data: Path) -> Tensor:
    """Harmful minus benign, at the last token of the prompt; [L, D]."""
    means = []
    for label in (1, 0):
        rows = read_rows(data / "refusal.jsonl", split="train", label=label)
        texts = pocket.render([user(row["prompt"]) for row in rows])
        means.append(pocket.activations(texts).mean(1))
    return means[0] - means[1]


def coordination_activations(
    pocket: Pocket, data: Path, position: int, heads: bool = False
) -> tuple[Tensor, Tensor]:
    """Activations of questions with the matching answer, and with the other; [L, N, ...] each."""
    rows = read_rows(data / "coordination.jsonl", split="train")
    prompts = pocket.render([user(row["question"]) for row in rows])
    matching, other = (
        pocket.activations(
            [p + str(row[key]) for p, row in zip(prompts, rows, strict=True)], position, heads
        )
        for key in ("answer_matching_behavior", "answer_not_matching_behavior")
    )
    return matching, other


def random_like(vector: Tensor, seed: int) -> Tensor:
    """A random direction with the norm of another."""
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(100 + seed))
    scaled: Tensor = noise.to(vector) / noise.norm() * vector.norm()
    return scaled


def sparse(vector: Tensor, part: float = 0.05) -> Tensor:
    """Keep the largest entries of a vector, and no more than `part` of them."""
    keep = vector.abs().topk(int(part * vector.numel())).indices
    masked = torch.zeros_like(vector)
    masked[keep] = vector[keep]
    return masked


def steer_refusal(suite: Suite, direction: Tensor, limit: int) -> dict[str, object]:
    """Add and subtract the refusal direction; layers and strengths chosen on validation."""
    pocket = suite.pocket
    grid: dict[str, object] = {}
    best: dict[int, tuple[float, int, float]] = {}
    for layer in range(1, len(pocket.layers) - 1):
        for sign, group in ((1, "jailbroken"), (-1, "harmful")):
            for strength in STRENGTHS:
                with pocket.pushed({layer: sign * strength * direction[layer]}):
                    rate = suite.refusal(f"{group} validation", limit)
                    spill = suite.refusal("benign validation", limit) if sign > 0 else 0.0
                grid[f"layer {layer}, {sign * strength:+g}"] = {group: rate, "benign": spill}
                gain = rate - spill if sign > 0 else 100 - rate - 50 * strength
                # The smallest strength that does nearly all of it is the best.
                if sign not in best or gain > best[sign][0] + 1:
                    best[sign] = (gain, layer, strength)
    found: dict[str, object] = {"validation": grid}
    for sign, names in (
        (1, ("jailbroken", "jailbroken unseen", "benign", "lookalike")),
        (-1, ("harmful",)),
    ):
        _, layer, strength = best[sign]
        vector = sign * strength * direction[layer]
        before = {name: suite.refusal(f"{name} test") for name in names}
        with pocket.pushed({layer: vector}):
            after = {name: suite.refusal(f"{name} test") for name in names}
            arithmetic = suite.arithmetic()
            coherent = suite.coherent(f"{names[0]} test")
        with pocket.pushed({layer: vector}, everywhere=True):
            everywhere = {name: suite.refusal(f"{name} test") for name in names}
        randoms = []
        for seed in range(NUM_RANDOM):
            with pocket.pushed({layer: random_like(vector, seed)}):
                randoms.append({name: suite.refusal(f"{name} test") for name in names})
        found["added" if sign > 0 else "subtracted"] = {
            "layer": layer,
            "strength": strength,
            "before": before,
            "after": after,
            "after, all positions": everywhere,
            "random": randoms,
            "arithmetic": arithmetic,
            "coherent": coherent,
        }
    return found


def steer_sparse(suite: Suite, direction: Tensor, limit: int) -> dict[str, object]:
    """Add the largest 5 % of the refusal direction's entries.

    The layer and strength are those that make the model refuse most wrapped requests of the
    validation split while it refuses at most 5 points more look-alikes.
    """
    pocket = suite.pocket
    allowed = suite.refusal("lookalike validation", limit) + 5
    grid: dict[str, object] = {}
    best = (-1.0, 0, 0.0)
    for layer in range(1, len(pocket.layers) - 1):
        for strength in SPARSE_STRENGTHS:
            with pocket.pushed({layer: strength * sparse(direction[layer])}):
                rate = suite.refusal("jailbroken validation", limit)
                spill = suite.refusal("lookalike validation", limit)
            grid[f"layer {layer}, {strength:+g}"] = {"jailbroken": rate, "lookalike": spill}
            if spill <= allowed and rate > best[0] + 1:
                best = (rate, layer, strength)
    _, layer, strength = best
    names = ("jailbroken", "jailbroken unseen", "lookalike", "benign")
    before = {name: suite.refusal(f"{name} test") for name in names}
    before["arithmetic"] = suite.arithmetic()
    with pocket.pushed({layer: strength * sparse(direction[layer])}):
        after = {name: suite.refusal(f"{name} test") for name in names}
        after["arithmetic"] = suite.arithmetic()
    return {
        "validation": grid,
        "layer": layer,
        "strength": strength,
        "before": before,
        "after": after,
    }


def steer_choices(suite: Suite, data: Path, cooperative: str, limit: int) -> dict[str, object]:
    """Add the coordination direction to the default, and subtract it under the persona."""
    pocket = suite.pocket
    found: dict[str, object] = {}
    for site, position in (("letter", -2), ("last", -1)):
        matching, other = coordination_activations(pocket, data, position)
        direction = (matching - other).mean(1)
        grid = {}
        for layer in range(1, len(pocket.layers) - 1):
            for strength in CHOICE_STRENGTHS:
                for sign, system in ((1, None), (-1, cooperative)):
                    with pocket.pushed({layer: sign * strength * direction[layer]}):
                        rate = suite.cooperation("validation", system, limit)
                        grid[layer, sign * strength] = rate
        up = max((k for k in grid if k[1] > 0), key=lambda k: grid[k] - 10 * k[1])
        down = min((k for k in grid if k[1] < 0), key=lambda k: grid[k] - 10 * k[1])
        result: dict[str, object] = {
            "validation": {f"layer {k[0]}, {k[1]:+g}": v for k, v in grid.items()}
        }
        for name, (layer, strength), system in (
            ("added", up, None),
            ("subtracted", down, cooperative),
        ):
            vector = strength * direction[layer]
            before = suite.cooperation("test", system)
            with pocket.pushed({layer: vector}):
                after, decided = suite.cooperation("test", system), suite.decided("test", system)
            randoms = []
            for seed in range(NUM_RANDOM):
                with pocket.pushed({layer: random_like(vector, seed)}):
                    randoms.append(suite.cooperation("test", system))
            result[name] = {
                "layer": layer,
                "strength": strength,
                "before": before,
                "after": after,
                "decided": decided,
                "random": randoms,
            }
        found[site] = result
    return found


def steer_heads(suite: Suite, data: Path, limit: int, position: int = -2) -> dict[str, object]:
    """Push single heads along unit differences, in standard deviations; then the best two."""
    pocket = suite.pocket
    matching, other = coordination_activations(pocket, data, position, heads=True)
    difference = (matching - other).mean(1)
    unit = difference / difference.norm(dim=-1, keepdim=True)
    sigma = (torch.cat([matching, other], 1) * unit[:, None]).sum(-1).std(1, correction=0)

    def vectors(heads: list[tuple[int, int]], alpha: float) -> dict[int, Tensor]:
        pushes: dict[int, Tensor] = {}
        for layer, head in heads:
            push = pushes.setdefault(layer, torch.zeros(unit.shape[1:]))
            push[head] = alpha * sigma[layer, head] * unit[layer, head]
        return {layer: push.flatten() for layer, push in pushes.items()}

    single = {}
    for layer in range(unit.shape[0]):
        for head in range(unit.shape[1]):
            with pocket.pushed(vectors([(layer, head)], 16.0), heads=True):
                single[layer, head] = suite.cooperation("validation", limit=limit)
    leading = sorted(single, key=lambda k: -single[k])[:4]
    grid = {}
    for pair in itertools.combinations(leading, 2):
        for alpha in HEAD_STRENGTHS:
            with pocket.pushed(vectors(list(pair), alpha), heads=True):
                grid[pair, alpha] = suite.cooperation("validation", limit=limit)
    (best, alpha) = max(grid, key=lambda k: grid[k] - k[1] / 10)
    with pocket.pushed(vectors(list(best), alpha), heads=True):
        after = suite.cooperation("test")
    return {
        "heads": best,
        "alpha": alpha,
        "before": suite.cooperation("test"),
        "after": after,
        "single": {f"{k[0]}.{k[1]}": v for k, v in single.items()},
        "validation": {f"{a[0]}.{a[1]} {b[0]}.{b[1]} {s}": v for ((a, b), s), v in grid.items()},
    }
