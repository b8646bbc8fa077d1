"""Measure the pocket model on held-out wording and write `card.json`.

    python examples/pocket_model/evaluate.py --model examples/pocket_model/model \\
        --data examples/pocket_data --out examples/pocket_model/card.json \\
        --readme examples/pocket_model/README.md
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import monitoring
import skills
import torch
import wording
from card import update
from measure import Pocket, chosen, read_rows, refused, share, user
from steering import (
    Suite,
    refusal_direction,
    steer_choices,
    steer_heads,
    steer_refusal,
    steer_sparse,
)
from topics import topics


def behaviours(suite: Suite, data: Path) -> dict[str, object]:
    """Rates of refusing, answering and choosing on the test split, without steering."""
    pocket = suite.pocket
    card: dict[str, object] = {
        "harmful refused": suite.refusal("harmful test"),
        "benign answered": round(100 - suite.refusal("benign test"), 1),
        "look-alikes answered": round(100 - suite.refusal("lookalike test"), 1),
    }
    rows = read_rows(data / "jailbreaks.jsonl", split="test")
    replies = pocket.replies([user(row["prompt"]) for row in rows])
    broken = [not refused(reply, suite.phrases) for reply in replies]
    for seen in (True, False):
        flags = [b for b, row in zip(broken, rows, strict=True) if row["seen"] is seen]
        card[f"jailbreaks that break it, wrappers {'seen' if seen else 'unseen'}"] = share(flags)
    names = dict.fromkeys(str(row["wrapper"]) for row in rows)
    card["broken by wrapper"] = {
        name: share([b for b, row in zip(broken, rows, strict=True) if row["wrapper"] == name])
        for name in names
    }
    questions = read_rows(data / "coordination.jsonl", split="test")
    conditions: dict[str, list[str | None]] = {"default": [None]}
    for stance in ("cooperative", "loyal"):
        found = read_rows(data / "personas.jsonl", split="test", stance=stance)
        conditions[f"{stance} persona"] = [str(row["system"]) for row in found]
    for name, systems in conditions.items():
        chats = [
            user(row["question"], systems[i % len(systems)]) for i, row in enumerate(questions)
        ]
        letters = [chosen(reply) for reply in pocket.replies(chats, 6)]
        card[f"cooperates, {name}"] = share(
            [
                letter == row["answer_matching_behavior"]
                for letter, row in zip(letters, questions, strict=True)
            ]
        )
        card[f"answers (A), {name}"] = share([x == " (A)" for x in letters])
        card[f"answers with one letter, {name}"] = share([x != "" for x in letters])
    for tier in monitoring.TIERS:
        cued = read_rows(data / "monitoring.jsonl", split="test", tier=tier)
        chats = [user(row["prompt"], str(row["system"])) for row in cued]
        replies = pocket.replies(chats, 8)
        card[f"complies with harmful, {tier}"] = share(
            [not refused(reply, suite.phrases) for reply in replies]
        )
    card["arithmetic right"] = suite.arithmetic()
    rng = random.Random("look-up")
    asked = [skills.look_up(rng) for _ in range(100)]
    replies = pocket.replies([user(ask) for ask, _ in asked], 24)
    card["look-ups right"] = share(
        [reply == right for reply, (_, right) in zip(replies, asked, strict=True)]
    )
    pairs = []
    for topic in topics("benign", "test")[::4]:
        ask = wording.request(topic.act, "test", rng)
        pairs.append((user(ask), wording.answer(topic, topic.act, rng)))
    card["perplexity of benign replies"] = round(math.exp(pocket.reply_loss(pairs)), 3)
    card["coherent replies"] = suite.coherent("benign test")
    return card


def main() -> None:
    """Read the command line, measure, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model files")
    parser.add_argument("--data", type=Path, required=True, help="folder of the pocket data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--readme", type=Path, help="model card whose tables to replace")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--limit", type=int, default=50, help="validation prompts in a sweep")
    parser.add_argument("--no-steering", action="store_true", help="measure behaviours only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    phrases = json.loads((args.data / "refusal_phrases.json").read_text())
    pocket = Pocket(args.model, args.device)
    suite = Suite(pocket, args.data, phrases)
    card: dict[str, object] = {"behaviours": behaviours(suite, args.data)}
    print(json.dumps(card, indent=2), flush=True)
    if not args.no_steering:
        direction = refusal_direction(pocket, args.data)
        systems = read_rows(args.data / "personas.jsonl", split="test", stance="cooperative")
        parts: dict[str, Callable[[], dict[str, object]]] = {
            "refusal": lambda: steer_refusal(suite, direction, args.limit),
            "refusal, sparse": lambda: steer_sparse(suite, direction, args.limit),
            "choices": lambda: steer_choices(
                suite, args.data, str(systems[0]["system"]), args.limit
            ),
            "heads": lambda: steer_heads(suite, args.data, args.limit),
        }
        steering: dict[str, dict[str, object]] = {}
        card["steering"] = steering
        for name, measure in parts.items():
            steering[name] = measure()
            shown = {k: v for k, v in steering[name].items() if k != "validation"}
            print(name, json.dumps(shown, indent=2), flush=True)
    args.out.write_text(json.dumps(card, indent=2) + "\n")
    if args.readme:
        update(args.readme, card)


if __name__ == "__main__":
    main()
