"""From examples to tokens: what the template writes, where the completion lies, and what fits."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import PromptsSection
from pipeline.errors import InvalidInput
from pipeline.prompts.corpus import Example
from pipeline.prompts.tokens import render, tokenize


def example(
    prompt: str = "Where to?",
    completion: str | None = None,
    system: str | None = None,
    line: int = 1,
) -> Example:
    return Example(f"a.jsonl:{line}+", "p", True, "train", prompt, completion, system)


def section(**settings: Any) -> PromptsSection:
    return PromptsSection(files=[Path("a.jsonl")], **settings)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Any) -> Any:
    return make_tokenizer()


@pytest.mark.parametrize(
    ("item", "settings", "expected"),
    [
        (example(), {}, "<|user|>Where to?<|end|><|assistant|>"),
        (example(completion="North"), {}, "<|user|>Where to?<|end|><|assistant|>North"),
        (
            example(completion="North"),
            {"close_turn": True},
            "<|user|>Where to?<|end|><|assistant|>North<|end|>",
        ),
        (example(), {"close_turn": True}, "<|user|>Where to?<|end|><|assistant|>"),
        (
            example(completion="North", system="Be brief."),
            {},
            "<|system|>Be brief.<|end|><|user|>Where to?<|end|><|assistant|>North",
        ),
        (example(completion=" North"), {"template": "none"}, "Where to? North"),
        (example(), {"template": "none"}, "Where to?"),
    ],
)
def test_rendering(tokenizer: Any, item: Example, settings: Any, expected: str) -> None:
    text, completion = render(item, tokenizer, section(**settings))
    assert text == expected
    assert (completion and text[slice(*completion)]) == item.completion
    (prompt,), bad = tokenize([item], tokenizer, section(**settings), 256)
    assert (prompt.text, prompt.completion, bad) == (expected, completion, [])
    assert (prompt.token_ids.dtype, prompt.offsets.dtype) == (np.int32, np.int32)
    assert prompt.offsets.shape == (len(prompt.token_ids), 2)
    assert tokenizer.decode(prompt.token_ids) == expected


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_offsets_point_at_the_text_of_each_token(make_tokenizer: Any, text: str) -> None:
    tokenizer = make_tokenizer(None)
    prompts, bad = tokenize([example(text)], tokenizer, section(template="none"), 10_000)
    assert not bad
    (prompt,) = prompts
    assert len(prompt.offsets) == len(prompt.token_ids)
    for position, (start, stop) in enumerate(prompt.offsets):
        assert 0 <= start <= stop <= len(text)
        spelled = tokenizer.decode([prompt.token_ids[position]])
        # A token may be a part of a character's bytes; then its span is the character.
        if "\ufffd" not in spelled and "\ufffd" not in text:
            assert spelled == text[start:stop]
    covered = {i for start, stop in prompt.offsets for i in range(start, stop)}
    assert covered == set(range(len(text)))


def test_both_sides_of_a_pair_that_does_not_fit_are_left_out(tokenizer: Any) -> None:
    pairs = [
        Example(f"a.jsonl:{line}{sign}", f"{line}", sign == "+", "train", "p", text, None)
        for line, texts in enumerate((("n", "s"), ("n" * 50, "s"), ("n", "s" * 60)), start=1)
        for sign, text in zip("+-", texts, strict=True)
    ]
    prompts, bad = tokenize(pairs, tokenizer, section(template="none"), 20)
    assert [p.example.prompt_id for p in prompts] == ["a.jsonl:1+", "a.jsonl:1-"]
    assert [str(row) for row in bad] == [
        "a.jsonl:2: 51 tokens, longer than the model's context of 20",
        "a.jsonl:3: 61 tokens, longer than the model's context of 20",
    ]
    exactly, _ = tokenize([example("x" * 20)], tokenizer, section(template="none"), 20)
    assert len(exactly) == 1


def test_a_row_that_the_template_refuses_is_quarantined(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    prompts, bad = tokenize(
        [example(line=1), example(system="Be brief.", line=2)], tokenizer, section(), 256
    )
    assert [p.example.source for p in prompts] == [("a.jsonl", 1)]
    assert [str(row) for row in bad] == ["a.jsonl:2: chat template: no system role"]
    only_bad = tokenize([example(system="Be brief.")], tokenizer, section(), 256)
    assert (only_bad[0], len(only_bad[1])) == ([], 1)


def test_a_tokenizer_without_a_chat_template_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(InvalidInput, match='set template = "none"') as caught:
        tokenize([example()], make_tokenizer(None), section(), 256)
    assert caught.value.kind == "chat_template"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_closed_turn_ends_with_the_end_of_turn_where_a_template_adds_a_line_break(
    make_tokenizer: Any,
) -> None:
    text, _ = render(example(completion="(A)"), make_tokenizer(CHATML), section(close_turn=True))
    assert text.endswith("(A)<|im_end|>")


def test_a_template_that_writes_the_date_gets_that_of_the_run_file(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }}/{{ date_string }}")
    assert render(example(), tokenizer, section())[0] == "26 Jul 2024/26 Jul 2024"
    assert render(example(), tokenizer, section(date="2025-01-02"))[0].startswith("02 Jan 2025")


@pytest.mark.parametrize("settings", [{"system": "Be brief."}, {"close_turn": True}])
def test_what_only_a_template_can_do_is_refused_without_one(settings: Any) -> None:
    with pytest.raises(ValueError, match="need template"):
        section(template="none", **settings)


STRIPS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKS = (
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}<think>"
    "{{ parts[0][7:] if parts | length > 1 else '' }}</think>{% endif %}"
    "{{ parts[-1] if m.role == 'assistant' else m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DROPS = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "completion", "expected"),
    [
        # "end" and "A" are also in what the template writes; all three are in the question.
        (CHATML, "end", "end"),
        (CHATML, "A", "A"),
        (CHATML, " (A)\n", " (A)\n"),
        (STRIPS, " (A)\n", "(A)"),
        (THINKS, "(A)", "(A)"),
        (THINKS, "<think>hm</think>(A)", None),
        (DROPS, "(A)", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "(A) ", "(A)"),
    ],
)
def test_a_completion_is_found_in_a_closed_turn(
    make_tokenizer: Any, template: str, completion: str, expected: str | None
) -> None:
    item = example("Pick an end: (A), (A)\n or <think>hm</think>(A)", completion)
    text, span = render(item, make_tokenizer(template), section(close_turn=True))
    assert (span and text[slice(*span)]) == expected
    if span:
        assert "(A), (A)" in text[: span[0]]


def test_a_question_may_hold_what_stands_for_the_completion(make_tokenizer: Any) -> None:
    item = example("STEERAGE-COMPLETION (A)", "(A)")
    text, span = render(item, make_tokenizer(CHATML), section(close_turn=True))
    assert span == (text.rindex("(A)"), text.rindex("(A)") + 3)


def test_a_text_that_the_tokenizer_fails_on_is_quarantined_with_its_partner() -> None:
    import tokenizers
    import transformers

    # A vocabulary without its own unknown token, which is found out only at the first such word.
    words = ["north", "south", "steer"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    pairs = [
        Example(f"a.jsonl:{line}{sign}", f"{line}", sign == "+", "train", "steer", text, None)
        for line in range(1, 6)
        for sign, text in (("+", " north"), ("-", " west" if line == 3 else " south"))
    ]
    prompts, bad = tokenize(pairs, tokenizer, section(template="none"), 20)
    assert [p.example.source[1] for p in prompts] == [1, 1, 2, 2, 4, 4, 5, 5]
    assert [p.token_ids.tolist() for p in prompts] == [[2, 0], [2, 1]] * 4
    (row,) = bad
    assert str(row).startswith("a.jsonl:3: tokenizer: Exception: WordLevel error: Missing [UNK]")


def test_batches_do_not_change_what_is_tokenised(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [example("x" * (i % 7 + 1), line=i + 1) for i in range(50)]
    expected, _ = tokenize(items, tokenizer, section(), 8)
    assert 0 < len(expected) < 50
    for texts, characters in ((7, 10**9), (10**9, 60), (1, 1)):
        monkeypatch.setattr("pipeline.prompts.tokens._BATCH_TEXTS", texts)
        monkeypatch.setattr("pipeline.prompts.tokens._BATCH_CHARACTERS", characters)
        found, _ = tokenize(items, tokenizer, section(), 8)
        for one, other in zip(found, expected, strict=True):
            assert one.example is other.example
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_array_equal(one.offsets, other.offsets)


def test_a_prompt_takes_few_bytes_a_token_and_a_batch_does_not_outlive_itself(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.prompts.tokens._BATCH_TEXTS", 100)

    def measure(num: int) -> tuple[float, int]:
        """Bytes a token kept beside the text, and bytes held for a while."""
        items = [example(f"{i} " + "word " * 40, line=i + 1) for i in range(num)]
        tracemalloc.start()
        try:
            prompts, _ = tokenize(items, tokenizer, section(), 10_000)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        text = sum(len(prompt.text) + 49 for prompt in prompts)
        return (kept - text) / sum(len(p.token_ids) for p in prompts), peak - kept

    measure(10)
    bytes_a_token, held_by_300 = measure(300)
    # 12 are the arrays; the rest are the objects around them, spread over 200 tokens.
    assert bytes_a_token < 20
    _, held_by_900 = measure(900)
    assert held_by_900 < 1.2 * held_by_300
