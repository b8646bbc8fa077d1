"""From examples to tokens: what the template writes, what fits, and which positions become rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import PromptsSection
from pipeline.errors import InvalidInput
from pipeline.prompts.corpus import Example
from pipeline.prompts.tokens import render, row_spans, tokenize

SELECTIONS = st.one_of(
    st.sampled_from(["last", "mean", "all"]), st.integers(1, 12).map(lambda n: f"-{n}")
)


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
    assert render(item, tokenizer, section(**settings)) == expected
    (prompt,), bad = tokenize([item], tokenizer, section(**settings), 256)
    assert (prompt.text, bad) == (expected, [])
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


@given(selection=SELECTIONS, num_tokens=st.integers(1, 30))
def test_row_spans_lie_within_the_prompt(selection: str, num_tokens: int) -> None:
    spans = row_spans(selection, num_tokens)
    assert all(0 <= start < stop <= num_tokens for start, stop in spans)
    match selection:
        case "all":
            assert spans == [(i, i + 1) for i in range(num_tokens)]
        case "mean":
            assert spans == [(0, num_tokens)]
        case "last":
            assert spans == [(num_tokens - 1, num_tokens)] == row_spans("-1", num_tokens)
        case _:
            positions = list(range(num_tokens))
            expected = positions[int(selection) :][:1] if -int(selection) <= num_tokens else []
            assert [positions[start] for start, _ in spans] == expected


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_closed_turn_ends_with_the_end_of_turn_where_a_template_adds_a_line_break(
    make_tokenizer: Any,
) -> None:
    text = render(example(completion="(A)"), make_tokenizer(CHATML), section(close_turn=True))
    assert text.endswith("(A)<|im_end|>")


def test_a_template_that_writes_the_date_gets_that_of_the_run_file(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }}/{{ date_string }}")
    assert render(example(), tokenizer, section()) == "26 Jul 2024/26 Jul 2024"
    assert render(example(), tokenizer, section(date="2025-01-02")).startswith("02 Jan 2025")


@pytest.mark.parametrize("settings", [{"system": "Be brief."}, {"close_turn": True}])
def test_what_only_a_template_can_do_is_refused_without_one(settings: Any) -> None:
    with pytest.raises(ValueError, match="need template"):
        section(template="none", **settings)
