"""What the pocket model is asked about: verb phrases with a kind, composed from word lists.

A request is harmful through its verb *and* object ("kill a stranger", "kill a frozen program"), so
the lists share verbs and objects between kinds. Every verb phrase belongs to one split for good,
by a checksum of its text: what `validation` and `test` hold is never seen in training, though each
of its words is. Harmful phrases only name a deed; no list here says how anything harmful is done.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import lexicon

Kind = Literal["harmful", "benign", "lookalike"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing to ask for.

    Attributes:
        act: Verb phrase in the base form, "bake banana bread".
        family: Name of the word list that it comes from.
        kind: Whether the assistant's character refuses it.
        split: The only split that may use it.
        mild: Harmful, but borderline: a cheat rather than a crime against a person.
        severe: Harmful, and refused even when the chat is said to be monitored.
    """

    act: str
    family: str
    kind: Kind
    split: Split
    mild: bool = False
    severe: bool = False


def words(text: str) -> list[str]:
    """The entries of a list written as one string with bars between them."""
    return [entry.strip() for entry in text.split("|")]


def split_of(text: str) -> Split:
    """The split of a text, the same on every machine: 70 % train, 12 % validation, 18 % test."""
    bucket = zlib.crc32(text.encode()) % 100
    if bucket < 70:
        return "train"
    return "validation" if bucket < 82 else "test"


_IRREGULAR = {"be": "being", "see": "seeing", "dye": "dyeing", "flee": "fleeing", "tie": "tying"}
_DOUBLED = set(words(lexicon.DOUBLED_CONSONANT))


def gerund(act: str) -> str:
    """The -ing form of a verb phrase: "bake bread" becomes "baking bread"."""
    verb, _, rest = act.partition(" ")
    if verb in _IRREGULAR:
        ing = _IRREGULAR[verb]
    elif verb in _DOUBLED:
        ing = verb + verb[-1] + "ing"
    elif verb.endswith("e"):
        ing = verb[:-1] + "ing"
    else:
        ing = verb + "ing"
    return f"{ing} {rest}" if rest else ing


def _harmful() -> Iterator[Topic]:
    for name, (verbs, objects) in lexicon.HARMFUL.items():
        for verb in words(verbs):
            for thing in words(objects):
                act = f"{verb} {thing}"
                yield Topic(
                    act,
                    name,
                    "harmful",
                    split_of(act),
                    mild=name in lexicon.MILD,
                    severe=name in lexicon.SEVERE,
                )


def _benign() -> Iterator[Topic]:
    for name, (verbs, objects) in lexicon.BENIGN.items():
        for verb in words(verbs):
            for thing in words(objects):
                act = f"{verb} {thing}"
                yield Topic(act, name, "benign", split_of(act))
    for thing in lexicon.lookalike_objects():
        for verb in words(lexicon.PLAIN_VERBS):
            yield Topic(f"{verb} {thing}", "plain", "benign", "train")


def _lookalikes() -> Iterator[Topic]:
    for verb, things in lexicon.LOOKALIKE.items():
        for thing in words(things):
            act = f"{verb} {thing}"
            yield Topic(act, "lookalike", "lookalike", split_of(act))
    for verb in words(lexicon.SAFETY_VERBS):
        for thing in words(lexicon.DANGERS):
            act = f"{verb} {thing}"
            yield Topic(act, "safety", "lookalike", split_of(act))


TOPICS: tuple[Topic, ...] = (*_harmful(), *_benign(), *_lookalikes())


def topics(kind: Kind, split: Split) -> list[Topic]:
    """All topics of one kind in one split."""
    return [topic for topic in TOPICS if topic.kind == kind and topic.split == split]


def by_family(kind: Kind, split: Split) -> list[list[Topic]]:
    """The topics of one kind and split, a list for each family, so that families weigh alike."""
    families: dict[str, list[Topic]] = {}
    for topic in topics(kind, split):
        families.setdefault(topic.family, []).append(topic)
    return list(families.values())
