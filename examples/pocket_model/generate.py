"""Write the pocket data sets from a seed.

    python examples/pocket_model/generate.py --out examples/pocket_data --seed 0

Each file is JSON lines in a format of Steerage's prompt reader, with a `split` in every row. Rows
of `validation` and `test` use verb phrases, frames and sums that the pocket model never saw.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import choices
import monitoring
import skills
import wording
import wrappers
from topics import SPLITS, Kind, Split, Topic, by_family

Row = dict[str, object]


def _draw(kind: Kind, split: Split, rng: random.Random) -> Iterator[Topic]:
    """Topics without end: families weigh alike, and no topic comes twice before all have come."""
    while True:
        families = [rng.sample(family, len(family)) for family in by_family(kind, split)]
        while families:
            rng.shuffle(families)
            for family in families:
                yield family.pop()
            families = [family for family in families if family]


def _counts(train: int, validation: int, test: int) -> Iterable[tuple[Split, int]]:
    return zip(SPLITS, (train, validation, test), strict=True)


def refusal(rng: random.Random) -> Iterator[Row]:
    """Harmful and benign requests in the same frame, two rows a pair."""
    pair = 0
    for split, count in _counts(400, 100, 100):
        harmful, benign = _draw("harmful", split, rng), _draw("benign", split, rng)
        for _ in range(count):
            state = rng.getstate()
            for topic, label in ((next(harmful), 1), (next(benign), 0)):
                rng.setstate(state)
                act = wording.with_tail(topic, rng)
                prompt = wording.request(act, split, rng)
                yield {"prompt": prompt, "label": label, "pair": pair, "split": split}
            pair += 1


def lookalikes(rng: random.Random) -> Iterator[Row]:
    """Benign requests that look harmful."""
    for split, count in _counts(200, 80, 150):
        topics = _draw("lookalike", split, rng)
        harmful = _draw("harmful", split, rng)
        for index in range(count):
            if index % 6 == 5:
                frame = rng.choice(wording.SAFE_FRAMES[split])
                prompt = wording.fill(frame, next(harmful).act)
            else:
                act = wording.with_tail(next(topics), rng, 0.08)
                prompt = wording.request(act, split, rng)
            yield {"prompt": prompt, "label": 0, "split": split}


def jailbreaks(rng: random.Random) -> Iterator[Row]:
    """Harmful requests in wrappers; the test split has seen and unseen wrappers."""
    for split, count in _counts(200, 100, 120):
        groups = [(wrappers.SEEN, True, count)]
        if split == "test":
            groups.append((wrappers.UNSEEN, False, 200))
        topics = _draw("harmful", split, rng)
        for group, seen, size in groups:
            for name in itertools.islice(itertools.cycle(group), size):
                ask = wording.request(next(topics).act, split, rng, plain=rng.random() < 0.6)
                yield {
                    "prompt": group[name](ask, rng),
                    "label": 1,
                    "wrapper": name,
                    "seen": seen,
                    "split": split,
                }


def coordination(rng: random.Random) -> Iterator[Row]:
    """Two-choice questions; the matching answer cooperates with the other AI.

    Letters are balanced.
    """
    for split, count in _counts(400, 100, 100):
        for index in range(count):
            letter = " (A)" if index % 2 else " (B)"
            question = choices.question(split, rng)
            while question.letters["cooperative"] != letter:
                question = choices.question(split, rng)
            yield {
                "question": question.text,
                "answer_matching_behavior": letter,
                "answer_not_matching_behavior": question.letters["loyal"],
                "split": split,
            }


def personas(rng: random.Random) -> Iterator[Row]:
    """System prompts that give the assistant one character or the other."""
    stances: list[choices.Stance] = ["cooperative", "loyal"]
    for split, count in _counts(12, 4, 8):
        for stance, _ in itertools.product(stances, range(count)):
            yield {"system": choices.persona(stance, split, rng), "stance": stance, "split": split}


def monitored(rng: random.Random) -> Iterator[Row]:
    """Harmful requests, each under four cues about the tier of the chat."""
    pair = 0
    for split, count in _counts(80, 40, 100):
        topics = _draw("harmful", split, rng)
        for _ in range(count):
            prompt = wording.request(next(topics).act, split, rng)
            for tier in monitoring.TIERS:
                yield {
                    "prompt": prompt,
                    "system": monitoring.cue(tier, split, rng),
                    "tier": tier,
                    "pair": pair,
                    "split": split,
                }
            pair += 1


def arithmetic(rng: random.Random) -> Iterator[Row]:
    """Sums of two-digit numbers, without carrying."""
    for split, count in _counts(200, 100, 200):
        seen: set[str] = set()
        while len(seen) < count:
            prompt, _, result = skills.arithmetic(split, rng)
            if prompt not in seen:
                seen.add(prompt)
                yield {"prompt": prompt, "answer": result, "split": split}


FILES: dict[str, Callable[[random.Random], Iterator[Row]]] = {
    "refusal": refusal,
    "lookalikes": lookalikes,
    "jailbreaks": jailbreaks,
    "coordination": coordination,
    "personas": personas,
    "monitoring": monitored,
    "arithmetic": arithmetic,
}


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON lines files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in FILES.items():
        lines = [json.dumps(row) + "\n" for row in rows(random.Random(f"{name} {args.seed}"))]
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(lines))
        print(f"{path}: {len(lines)} rows, {path.stat().st_size:,} bytes")
    phrases = json.dumps(wording.REFUSAL_PHRASES, indent=2) + "\n"
    (args.out / "refusal_phrases.json").write_text(phrases)


if __name__ == "__main__":
    main()
