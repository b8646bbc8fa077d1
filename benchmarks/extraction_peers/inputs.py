"""What every contestant is given: one random model, and the prompts of each case as texts.

Everything is drawn from fixed seeds, so that two runs of the benchmark do the same work.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import tokenizers
import torch
import transformers

from pipeline.config import PromptsSection
from pipeline.extraction.models import load_tokenizer
from pipeline.prompts.corpus import read_corpus
from pipeline.prompts.tokens import render

Shape = Literal["60M", "8B"]

SYSTEM_TOKENS: Final = 800
UNSHARED_PROMPTS: Final = 2000
UNSHARED_LENGTHS: Final = (64, 256)

# 60M: for a CPU; 8B: that of Llama 3 8B. Both have a head of their own.
_SHAPES: Final[dict[Shape, dict[str, Any]]] = {
    "60M": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "dtype": "float32",
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "dtype": "bfloat16",
    },
}
# The words of Llama 3's template, which peers know how to render too.
_TEMPLATE: Final = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_SPECIAL: Final = (
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|pad|>",
)


@dataclass(frozen=True, slots=True)
class Case:
    """The prompts of one case.

    Attributes:
        texts: What the model reads, template included, in the order of the prompt file.
        run_file: What `steerage extract` is given to do the same.
    """

    name: str
    texts: tuple[str, ...]
    run_file: Path


def build_model(folder: Path, shape: Shape, questions: Path, layers: int | None = None) -> Path:
    """Save a random Llama and a byte-level BPE tokenizer trained on the questions.

    Args:
        folder: Where to; a model that is there already is kept.
        shape: Its size.
        questions: CAA file; its texts train the tokenizer.
        layers: Another number of layers than the shape's.

    Returns:
        The folder.
    """
    if (folder / "config.json").exists():
        return folder
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_SHAPES["60M"]["vocab_size"],
        special_tokens=list(_SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_questions(questions), *_words(4000)], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        pad_token=_SPECIAL[-1],
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    # The name that transformers 4 and 5 both know.
    config_file = folder / "tokenizer_config.json"
    saved = json.loads(config_file.read_text())
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(saved, indent=2))

    settings = dict(_SHAPES[shape])
    if layers is not None:
        settings["num_hidden_layers"] = layers
    dtype = getattr(torch, settings.pop("dtype"))
    config = transformers.LlamaConfig(
        max_position_embeddings=4096,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        tie_word_embeddings=False,
        **settings,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return folder


def build_pairs(folder: Path, model: Path, questions: Path, limit: int | None) -> Case:
    """The questions with both answers, as they stand."""
    rows = questions.read_text(encoding="utf-8").splitlines()[:limit]
    return _case(folder, "pairs", model, rows, None)


def build_long_system_prompt(folder: Path, model: Path, questions: Path, limit: int) -> Case:
    """The same under one system prompt of `SYSTEM_TOKENS` tokens."""
    rows = questions.read_text(encoding="utf-8").splitlines()[:limit]
    tokenizer = load_tokenizer(model)
    words = " ".join(_questions(questions)).split()
    # Cut word by word: how many tokens a text has is known only by tokenising it.
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        ids = tokenizer(" ".join(words[:middle]), add_special_tokens=False)["input_ids"]
        low, high = (middle, high) if len(ids) <= SYSTEM_TOKENS else (low, middle - 1)
    return _case(folder, "long_system_prompt", model, rows, " ".join(words[:low]))


def build_unshared(folder: Path, model: Path, count: int, name: str = "unshared") -> Case:
    """Prompts of random words, 64 to 256 tokens long, no two of which begin with the same token.

    They go without a template, whose words they would share.

    Raises:
        ValueError: More prompts are wanted than the tokenizer has words.
    """
    tokenizer = load_tokenizer(model)
    # Tokens that are a space and a word: such words side by side are tokenised one by one again.
    words = sorted(
        token.removeprefix("Ġ")
        for token in tokenizer.get_vocab()
        if token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha()
    )
    if count > len(words):
        raise ValueError(f"{count} prompts without a shared token; there are {len(words)} words")
    draw = random.Random(0)
    draw.shuffle(words)
    lines = []
    for i in range(count):
        wanted = draw.randint(*UNSHARED_LENGTHS)
        text = "".join(f" {word}" for word in [words[i], *draw.choices(words, k=wanted - 1)])
        lines.append(json.dumps({"prompt": text, "label": i % 2}))
    return _case(folder, name, model, lines, None, template="none")


def repeat_with_changes(
    folder: Path, model: Path, questions: Path, limit: int | None, times: int
) -> Case:
    """The questions `times` over, each copy with another opening, so that none is a duplicate."""
    rows = []
    for line in questions.read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        for copy in range(times):
            rows.append(json.dumps(row | {"question": f"Case {copy}. {row['question']}"}))
    return _case(folder, f"rss_{times}x", model, rows, None)


def _case(
    folder: Path,
    name: str,
    model: Path,
    rows: Sequence[str],
    system: str | None,
    template: Literal["chat", "none"] = "chat",
) -> Case:
    prompts = folder / f"{name}.jsonl"
    prompts.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    run_file = folder / f"{name}.toml"
    run_file.write_text(
        f"""
name = "{name}"
[model]
path = {json.dumps(str(model))}
[prompts]
files = [{json.dumps(str(prompts))}]
template = "{template}"
{"" if system is None else "system = " + json.dumps(system)}
[capture]
streams = ["resid_post", "z"]
layers = "all"
tokens = "last"
"""
    )
    section = PromptsSection(files=[prompts], template=template, system=system)
    tokenizer = load_tokenizer(model)
    examples = read_corpus(section).examples
    return Case(name, tuple(render(e, tokenizer, section)[0] for e in examples), run_file)


def _questions(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [str(row["question"]) for row in rows]


def _words(count: int) -> list[str]:
    """Made-up words that look like words."""
    draw = random.Random(1)
    return [
        "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(length))
        for length in draw.choices((1, 2, 3), k=count)
    ]
