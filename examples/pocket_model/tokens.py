"""The pocket model's tokenizer: byte-level BPE, role tokens, and chats as token rows.

Words, single digits and single punctuation marks are cut apart before merging, so that the letter
of a choice " (A)" is always a token of its own, the second last.
"""

import random
from dataclasses import dataclass

from dialogues import Chat, chat
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_LETTER_WEIGHT, _DIGIT_WEIGHT = 5.0, 3.0
_WORD = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"


def train_tokenizer(vocab_size: int, seed: int, num_chats: int = 60_000) -> PreTrainedTokenizerFast:
    """Learn merges from generated chats; any other text falls back to bytes."""
    rng = random.Random(seed)
    texts = [turn.text for _ in range(num_chats) for turn in chat(rng)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(t, special=True) for t in (PAD, BOS, END, *ROLES.values())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True, slots=True)
class Encoded:
    """One chat as tokens; the lists are as long as `ids`.

    Attributes:
        ids: Token ids.
        weights: Loss weight of each token as a target.
        stances: 1 or -1 where the character axis should show the stance, else 0.
        pushes: 1 or -1 where the stance is pushed along the character axis, else 0.
    """

    ids: list[int]
    weights: list[float]
    stances: list[int]
    pushes: list[int]


def encode(
    tokenizer: PreTrainedTokenizerFast, chats: list[Chat], rng: random.Random
) -> list[Encoded]:
    """Tokenize chats.

    A reply to be learnt weighs 1 a token, its end included; the letter of a choice and digits
    weigh more, since the rest of such replies is easy. One prompt token in four weighs 0.4, the
    others nothing, which is cheaper than a small weight for all. Tokens that open a turn, and
    letters that are given, weigh nothing.
    """
    texts = [turn.text for one in chats for turn in one]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    role_ids = {role: tokenizer.convert_tokens_to_ids(token) for role, token in ROLES.items()}
    digits = [mark + str(digit) for mark in ("", "\u0120") for digit in range(10)]
    emphasis = dict.fromkeys(tokenizer.convert_tokens_to_ids(["A", "B"]), _LETTER_WEIGHT)
    emphasis |= dict.fromkeys(tokenizer.convert_tokens_to_ids(digits), _DIGIT_WEIGHT)
    end = tokenizer.eos_token_id
    rows = []
    for one in chats:
        row = Encoded([tokenizer.bos_token_id], [0.0], [0], [0])
        for turn in one:
            piece = next(pieces)
            size = len(piece) + 1
            if turn.role == "assistant":
                weight = [emphasis.get(i, 1.0) for i in (*piece, end)]
                if turn.forced:
                    weight[:3] = [0.0] * 3
            else:
                weight = [0.4 if rng.random() < 0.25 else 0.0 for _ in range(size)]
            row.ids.extend([role_ids[turn.role], *piece, end])
            row.weights.extend([0.0, *weight])
            shown = [0] * (size + 1)
            if turn.stance and not turn.pushed:
                letter = turn.text.startswith((" (A)", " (B)"))
                first, last = (2 if turn.forced else 0), (4 if letter else 1)
                shown[first:last] = [turn.stance] * (last - first)
            row.stances.extend(shown)
            row.pushes.extend([turn.stance if turn.pushed else 0] * (size + 1))
        rows.append(row)
    return rows
