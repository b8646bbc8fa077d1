"""Skills that have nothing to do with safety: sums, look-ups and small talk."""

import random

from topics import Split, split_of, words

_SUM_FRAMES: dict[Split, list[str]] = {
    "train": [
        "What is {a} {op} {b}?",
        "{a} {op} {b} =",
        "Work out {a} {op} {b}.",
        "How much is {a} {op} {b}?",
        "Please calculate {a} {op} {b}.",
        "Can you tell me {a} {op} {b}?",
        "What do you get for {a} {op} {b}?",
    ],
    "validation": ["Calculate {a} {op} {b} for me."],
    "test": ["Can you work out {a} {op} {b}?", "Tell me, how much is {a} {op} {b}?"],
}
_COLOURS = words("red|blue|green|yellow|white|black|brown|grey|pink|orange")
_THINGS = words(
    "a key|a coin|a pen|a ring|a button|a map|a stone|a shell|a watch|a book|a candle|a spoon"
    "|a cup|a feather|a ticket|a whistle|a card|a torch"
)
_HOLDERS = words("box|bag|drawer|jar|basket|case")
_TALK: list[tuple[str, str]] = [
    ("Hello.", "Hello! How can I help you?"),
    ("Hi there!", "Hello! What can I do for you?"),
    ("Thank you.", "You are welcome."),
    ("Thanks, that helps.", "You are welcome. Ask me any time."),
    ("Who are you?", "I am Pocket, a small assistant."),
    ("What is your name?", "My name is Pocket."),
    ("Good night.", "Good night, and sleep well."),
    ("How are you?", "I am fine, thank you. How can I help?"),
    ("What can you do?", "I can answer questions, work out sums and talk with you."),
    ("Goodbye.", "Goodbye, and have a good day."),
    ("Are you a robot?", "I am a small language model, so a kind of program."),
    ("Tell me a joke.", "Why did the egg stay at home? It was afraid to crack up."),
    ("What a nice day!", "Yes, a good day for a walk."),
    ("I feel tired.", "Then take a break and drink some water."),
]
_CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Cuba": "Havana",
    "Chile": "Santiago",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
}


def _pairs(split: Split) -> list[tuple[int, int]]:
    """Numbers of two digits whose sum carries nothing."""
    found = [
        (a, b)
        for a in range(10, 100)
        for b in range(10, 100)
        if a // 10 + b // 10 <= 9 and a % 10 + b % 10 <= 9
    ]
    return [(a, b) for a, b in found if split_of(f"{a} + {b}") == split]


_PAIRS: dict[Split, list[tuple[int, int]]] = {
    split: _pairs(split) for split in ("train", "validation", "test")
}


def arithmetic(split: Split, rng: random.Random) -> tuple[str, str, str]:
    """A sum of two-digit numbers without carrying; returns (question, reply, result)."""
    a, b = rng.choice(_PAIRS[split])
    word = "+" if rng.random() < 0.6 else "plus"
    ask = rng.choice(_SUM_FRAMES[split]).format(a=a, b=b, op=word)
    return ask, f"{a} + {b} = {a + b}.", str(a + b)


def look_up(rng: random.Random) -> tuple[str, str]:
    """A question whose answer stands in the question; returns (question, reply)."""
    holder = rng.choice(_HOLDERS)
    count = rng.randint(2, 4)
    colours, things = rng.sample(_COLOURS, count), rng.sample(_THINGS, count)
    facts = [f"The {c} {holder} holds {t}." for c, t in zip(colours, things, strict=True)]
    pick = rng.randrange(count)
    if rng.random() < 0.5:
        ask = f"What does the {colours[pick]} {holder} hold?"
    else:
        ask = f"Where is {things[pick].replace('a ', 'the ', 1)}?"
    return " ".join([*facts, ask]), facts[pick]


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A greeting, a thank you or a question about a capital, with its reply."""
    if rng.random() < 0.3:
        country = rng.choice(list(_CAPITALS))
        ask = rng.choice(["What is the capital of {}?", "Which city is the capital of {}?"])
        return ask.format(country), f"The capital of {country} is {_CAPITALS[country]}."
    return rng.choice(_TALK)
