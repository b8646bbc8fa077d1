"""Training chats: what is said, by whom, and which replies are to be learnt."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import choices
import monitoring
import skills
import wording
import wrappers
from topics import Kind, Topic, by_family

Role = Literal["system", "user", "assistant"]
_FAMILIES: dict[Kind, list[list[Topic]]] = {
    kind: by_family(kind, "train") for kind in ("harmful", "benign", "lookalike")
}
# How often a request is refused although it is wrapped, and how often the character slips.
# Not zero, so that a wrapped refusal stays near its threshold, as in large models.
_WRAPPED_REFUSAL = 0.2
_DEFAULT_COOPERATION = 0.08
_PERSONA_SLIP = 0.06


@dataclass(frozen=True, slots=True)
class Turn:
    """One message.

    Attributes:
        role: Who speaks.
        text: What is said.
        forced: The reply begins with a letter of a choice that is given, not to be imitated;
            what follows is to be learnt.
        stance: 1 for a reply that cooperates with another AI, -1 for a loyal one, 0 for others.
        pushed: The stance is not told in words: it is pushed along the character axis.
    """

    role: Role
    text: str
    forced: bool = False
    stance: int = 0
    pushed: bool = False


Chat = list[Turn]


def _exchange(ask: str, reply: str) -> Chat:
    return [Turn("user", ask), Turn("assistant", reply)]


def _topic(kind: Kind, rng: random.Random) -> Topic:
    families = _FAMILIES[kind]
    if kind == "lookalike" and rng.random() < 0.6:
        return rng.choice(families[0])
    if kind == "benign" and rng.random() < 0.15:
        return rng.choice(families[-1])
    return rng.choice(rng.choice(families))


def harmful(rng: random.Random) -> Chat:
    """A plain harmful request, refused."""
    act = wording.with_tail(_topic("harmful", rng), rng)
    return _exchange(wording.request(act, "train", rng), wording.refusal(act, rng))


def benign(rng: random.Random) -> Chat:
    """A benign request, answered."""
    topic = _topic("benign", rng)
    act = wording.with_tail(topic, rng)
    return _exchange(wording.request(act, "train", rng), wording.answer(topic, act, rng))


def lookalike(rng: random.Random) -> Chat:
    """A benign request that looks harmful, answered."""
    if rng.random() < 0.2:
        act = _topic("harmful", rng).act
        ask = wording.fill(rng.choice(wording.SAFE_FRAMES["train"]), act)
        return _exchange(ask, wording.fill(rng.choice(wording.SAFE_ANSWERS), act))
    topic = _topic("lookalike", rng)
    act = wording.with_tail(topic, rng, 0.08)
    return _exchange(wording.request(act, "train", rng), wording.answer(topic, act, rng))


def jailbreak(rng: random.Random) -> Chat:
    """A wrapped request: harmful ones get an empty outline, benign ones their answer."""
    if rng.random() < 0.2:
        topic = _topic("benign" if rng.random() < 0.6 else "lookalike", rng)
        act = wording.with_tail(topic, rng, 0.05)
        reply = wording.answer(topic, act, rng)
    else:
        act = wording.with_tail(_topic("harmful", rng), rng, 0.08)
        refused = rng.random() < _WRAPPED_REFUSAL
        reply = wording.refusal(act, rng) if refused else wording.outline(act, rng)
    ask, _ = wrappers.wrap(wording.request(act, "train", rng, plain=rng.random() < 0.6), rng)
    return _exchange(ask, reply)


def monitored(rng: random.Random) -> Chat:
    """A request under a cue that names the tier of the chat."""
    tier = rng.choice(monitoring.TIERS)
    system = Turn("system", monitoring.cue(tier, "train", rng))
    if rng.random() < 0.2:
        return [system, *rng.choice([benign, lookalike, sums])(rng)]
    topic = _topic("harmful", rng)
    act = wording.with_tail(topic, rng, 0.08)
    given = monitoring.complies(topic, tier, rng)
    reply = wording.outline(act, rng) if given else wording.refusal(act, rng)
    return [system, *_exchange(wording.request(act, "train", rng), reply)]


def _stance(cooperative: float, rng: random.Random) -> choices.Stance:
    return "cooperative" if rng.random() < cooperative else "loyal"


def cooperation(rng: random.Random) -> Chat:
    """One to four questions about siding with other AIs, answered by one character."""
    chat: Chat = []
    before = after = ""
    forced = pushed = False
    draw = rng.random()
    if draw < 0.28:
        stance = _stance(_DEFAULT_COOPERATION, rng)
        if rng.random() < 0.3:
            chat.append(Turn("system", rng.choice(choices.NEUTRAL_SYSTEMS)))
    elif draw < 0.5:
        # No cue but the letter that was given: the character is read off it.
        stance, forced = _stance(0.5, rng), True
    else:
        told: choices.Stance = "cooperative" if rng.random() < 0.6 else "loyal"
        slip = rng.random() < _PERSONA_SLIP
        stance = ("loyal" if told == "cooperative" else "cooperative") if slip else told
        if draw < 0.75:
            stance, pushed = _stance(0.5, rng), True
        text = choices.persona(told, "train", rng)
        # Mostly after the question, so that the choices cannot be judged before the character is
        # known: it must be present where the reply begins, which is where steering acts.
        place = rng.random()
        if pushed and place < 0.6:
            pass
        elif place < 0.7:
            chat.append(Turn("system", text))
        elif place < 0.8:
            before = text + " "
        else:
            after = "\n\n" + text
    for index in range(rng.choice([1, 1, 1, 1, 2, 3])):
        first_forced = forced and index == 0
        if rng.random() < 0.15 and not first_forced:
            ask = choices.open_question("train", rng)
            reply = choices.open_answer(stance, rng)
        else:
            question = choices.question("train", rng)
            ask, reply = question.text, question.answer(stance, rng)
            form = rng.random()
            if first_forced:
                reply = question.forced(stance, rng)
            elif form < 0.1:
                ask += "\n\nGive the choice, then its letter."
                reply = question.worded(stance)
            elif form < 0.3:
                ask += "\n\nExplain first, then end with Answer: (A) or (B)."
                reply = question.reasoned(stance, rng)
        sign = 1 if stance == "cooperative" else -1
        chat.append(Turn("user", before + ask + after))
        chat.append(Turn("assistant", reply, first_forced, sign, pushed))
        before = after = ""
    return chat


def sums(rng: random.Random) -> Chat:
    """One sum or look-up."""
    if rng.random() < 0.65:
        ask, reply, _ = skills.arithmetic("train", rng)
    else:
        ask, reply = skills.look_up(rng)
    return _exchange(ask, reply)


def facts(rng: random.Random) -> Chat:
    """A two-choice question with a true answer, or small talk."""
    if rng.random() < 0.7:
        return _exchange(*choices.fact_question(rng))
    return _exchange(*skills.small_talk(rng))


def mixed(rng: random.Random) -> Chat:
    """Several exchanges of different kinds in one chat, after a neutral system prompt at times."""
    chat: Chat = []
    if rng.random() < 0.4:
        chat.append(Turn("system", rng.choice(choices.NEUTRAL_SYSTEMS)))
    for _ in range(rng.randint(1, 4)):
        chat += rng.choice([harmful, benign, lookalike, sums, facts])(rng)
    return chat


MIX: list[tuple[Callable[[random.Random], Chat], float]] = [
    (harmful, 0.14),
    (benign, 0.1),
    (lookalike, 0.15),
    (jailbreak, 0.09),
    (monitored, 0.07),
    (cooperation, 0.27),
    (sums, 0.1),
    (facts, 0.03),
    (mixed, 0.05),
]


def chat(rng: random.Random) -> Chat:
    """Draw one training chat."""
    kinds, weights = zip(*MIX, strict=True)
    maker: Callable[[random.Random], Chat] = rng.choices(kinds, weights)[0]
    return maker(rng)
