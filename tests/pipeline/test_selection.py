"""Selections: every form finds the tokens it names, whatever the tokenizer merged them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.config import CaptureSection, PromptsSection
from pipeline.errors import InvalidInput
from pipeline.prompts.corpus import Example
from pipeline.prompts.selection import Selection
from pipeline.prompts.tokens import TokenizedPrompt, tokenize

SETTINGS: list[dict[str, Any]] = [{"template": "none"}, {}, {"close_turn": True}]
TOKENIZERS = ["bytes", "trimmed", "(A", " A)"]
# Letters, spaces, brackets and characters of several bytes, also what the tokenizers merge.
TEXTS = st.text("nortéh (AB)\n€", min_size=1, max_size=30).filter(str.strip)
FORMS = [
    "last", "-2", "last_3", "mean", "mean_prompt", "mean_completion", "answer_letter", "all",
    "completion", "text:A", r"regex:(\w)\W*$",
]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers(make_tokenizer: Any) -> dict[str, Any]:
    """The byte-level one, with spans trimmed of spaces, and such as merge the letter with more."""
    import tokenizers as library
    import transformers

    def merging(*pieces: str) -> Any:
        alphabet = ["Ġ", *(chr(i) for i in range(33, 127)), *"éĊâĤ¬Ã©"]
        steps: list[tuple[str, str]] = []
        for piece in pieces:
            for i in range(1, len(piece)):
                steps.append((piece[:i], piece[i]))
        vocabulary = [*alphabet, *dict.fromkeys(a + b for a, b in steps)]
        numbered = {token: i for i, token in enumerate(vocabulary)}
        backend = library.Tokenizer(library.models.BPE(vocab=numbered, merges=steps))
        # The whole text is one word, so that merges may cross from spaces into brackets.
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        backend.decoder = library.decoders.ByteLevel()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=make_tokenizer().chat_template
        )

    trimmed = make_tokenizer()
    trimmed.backend_tokenizer.post_processor = library.processors.ByteLevel(trim_offsets=True)
    return {
        "bytes": make_tokenizer(),
        "trimmed": trimmed,
        "(A": merging("Ġ(A", "Ġ(B"),
        " A)": merging("ĠA)", "A)", "B)"),
    }


def tokenized(
    tokenizer: Any, prompt: str, completion: str | None = None, **settings: Any
) -> TokenizedPrompt:
    example = Example("a.jsonl:1+", "p", True, "train", prompt, completion, None)
    (found,), bad = tokenize(
        [example], tokenizer, PromptsSection(files=[Path("a.jsonl")], **settings), 10_000
    )
    assert not bad
    return found


def text_of(prompt: TokenizedPrompt, span: tuple[int, int]) -> str:
    """The characters of a span of tokens."""
    return prompt.text[prompt.offsets[span[0], 0] : prompt.offsets[span[1] - 1, 1]]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("settings", SETTINGS)
@given(form=st.sampled_from(FORMS), text=TEXTS, completion=st.none() | TEXTS)
def test_spans_are_ordered_and_lie_in_the_prompt_or_there_is_a_reason(
    tokenizers: Any, name: str, settings: Any, form: str, text: str, completion: str | None
) -> None:
    prompt = tokenized(tokenizers[name], text, completion, **settings)
    selection = Selection.parse(form)
    spans = selection.spans(prompt)
    assert (selection.reason(prompt) is None) == bool(spans)
    assert all(type(bound) is int for span in spans for bound in span)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    assert all(0 <= start < stop <= len(prompt.token_ids) for start, stop in spans)


@given(text=TEXTS, count=st.integers(1, 12))
def test_positions_from_the_end_agree(tokenizers: Any, text: str, count: int) -> None:
    prompt = tokenized(tokenizers["bytes"], text, template="none")
    num_tokens = len(prompt.token_ids)

    def spans(form: str) -> list[tuple[int, int]]:
        return Selection.parse(form).spans(prompt)

    every = spans("all")
    assert every == [(i, i + 1) for i in range(num_tokens)]
    assert spans("mean") == [(0, num_tokens)]
    assert spans("last") == spans("-1") == spans("last_1") == every[-1:]
    if count <= num_tokens:
        assert spans(f"last_{count}") == every[-count:]
        assert spans(f"-{count}") == every[-count:][:1]
        return
    for form in (f"last_{count}", f"-{count}"):
        assert spans(form) == []
        assert Selection.parse(form).reason(prompt) == (
            f"{num_tokens} tokens, too few for tokens = {form!r}"
        )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("settings", SETTINGS)
@given(text=TEXTS, completion=TEXTS)
def test_the_completion_is_every_token_that_overlaps_it(
    tokenizers: Any, name: str, settings: Any, text: str, completion: str
) -> None:
    prompt = tokenized(tokenizers[name], text, completion, **settings)
    assert prompt.completion is not None
    first, last = prompt.completion
    assert prompt.text[first:last] == completion
    spans = Selection.parse("completion").spans(prompt)
    chosen = {start for start, _ in spans}
    for position, (start, stop) in enumerate(prompt.offsets.tolist()):
        if start < stop:
            assert (position in chosen) == (start < last and stop > first)
    # Only spaces, whose spans a tokenizer may trim away, are outside of what is chosen.
    covered = {i for p in chosen for i in range(*prompt.offsets[p].tolist())}
    assert all(prompt.text[i] == " " for i in range(first, last) if i not in covered)
    assert Selection.parse("mean_completion").spans(prompt) == [(spans[0][0], spans[-1][1])]
    before = Selection.parse("mean_prompt")
    if spans[0][0]:
        assert before.spans(prompt) == [(0, spans[0][0])]
    else:
        assert before.reason(prompt) == "no token lies before the completion"


def test_spaces_at_the_ends_of_a_completion_are_its_tokens_where_their_spans_are_trimmed(
    tokenizers: Any,
) -> None:
    prompt = tokenized(tokenizers["trimmed"], "to ", "  (A)  ", close_turn=True)
    assert prompt.offsets[-2].tolist() == [prompt.completion[1]] * 2
    spans = Selection.parse("completion").spans(prompt)
    chosen = prompt.token_ids[spans[0][0] : spans[-1][1]]
    assert tokenizers["trimmed"].decode(chosen) == "  (A)  "
    plain = tokenized(tokenizers["trimmed"], "to ", "(A)", template="none")
    assert len(Selection.parse("completion").spans(plain)) == 3


@given(text=TEXTS, settings=st.sampled_from(SETTINGS))
def test_a_text_without_a_completion_is_all_prompt(
    tokenizers: Any, text: str, settings: Any
) -> None:
    prompt = tokenized(tokenizers["bytes"], text, **settings)
    assert Selection.parse("mean_prompt").spans(prompt) == [(0, len(prompt.token_ids))]
    for form in ("completion", "mean_completion", "answer_letter"):
        selection = Selection.parse(form)
        assert selection.spans(prompt) == []
        assert selection.reason(prompt) == (
            f"tokens = {form!r} reads the completion, and there is none"
        )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("settings", SETTINGS)
@given(
    letter=st.sampled_from("AB"),
    shape=st.sampled_from(
        [" ({})", "({})", "( {})", " {}", "{}", "{}.", "{}) north", "no: ({}), (n)"]
    ),
    question=st.sampled_from(["Or (A)?\n (B) A", "é€ (A) (B)\n\nAnswer:"]),
)
def test_the_answer_letter_is_in_the_token_that_is_read(
    tokenizers: Any, name: str, settings: Any, letter: str, shape: str, question: str
) -> None:
    completion = shape.format(letter)
    prompt = tokenized(tokenizers[name], question, completion, **settings)
    ((start, stop),) = Selection.parse("answer_letter").spans(prompt)
    assert stop == start + 1
    assert letter in tokenizers[name].decode([prompt.token_ids[start]])
    first, last = prompt.offsets[start].tolist()
    at = prompt.completion[0] + completion.index(letter)
    assert first <= at < last


def test_the_tokenizers_do_merge_the_letter(tokenizers: Any) -> None:
    read = Selection.parse("answer_letter")
    tokens = {}
    for name, completion in (("bytes", " (A)"), ("(A", " (A)"), (" A)", " ( A)"), (" A)", "(A)")):
        prompt = tokenized(tokenizers[name], "?", completion)
        tokens[name, completion] = text_of(prompt, read.spans(prompt)[0])
    assert list(tokens.values()) == ["A", " (A", " A)", "A)"]


@pytest.mark.parametrize("completion", ["I think so", "A dog.", "neither", "(AB)", "(7)", "no A"])
def test_a_word_is_no_answer_letter(tokenizers: Any, completion: str) -> None:
    prompt = tokenized(tokenizers["bytes"], "Or (A)?", completion)
    selection = Selection.parse("answer_letter")
    assert selection.spans(prompt) == []
    assert f"the completion {completion!r} has no answer letter" in selection.reason(prompt)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), text=TEXTS, completion=st.none() | TEXTS)
def test_a_text_is_covered_by_the_tokens_of_its_last_occurrence(
    tokenizers: Any, name: str, data: Any, text: str, completion: str | None
) -> None:
    prompt = tokenized(tokenizers[name], text, completion, close_turn=True)
    first = data.draw(st.integers(0, len(prompt.text) - 1))
    last = data.draw(st.integers(first + 1, len(prompt.text)))
    literal = prompt.text[first:last]
    assume(literal.strip(" "))
    at = prompt.text.rindex(literal)
    ((start, stop),) = Selection.parse(f"text:{literal}").spans(prompt)
    begins, ends = prompt.offsets[start:stop, 0], prompt.offsets[start:stop, 1]
    covered = {i for a, b in zip(begins, ends, strict=True) for i in range(a, b)}
    assert all(i in covered or prompt.text[i] == " " for i in range(at, at + len(literal)))
    # No token at either side without a part in it.
    assert ends[0] > at
    assert begins[-1] < at + len(literal) or begins[-1] == ends[-1]
    if start:
        assert prompt.offsets[start - 1, 1] <= at


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text:captain", "captain"),
        ("text:o", "o"),
        (r"regex:the \w+", "the captain"),
        (r"regex:the (\w+) n", "ship"),
        # A group that takes no part in the last match: all of the match.
        (r"regex:the (ship)|captain", "captain"),
        # An empty match names nothing; the one before it does.
        (r"regex:n*", "n"),
        (r"regex:(?i)THE", "the"),
        (r"regex:ship.*\n(?s:.)*crew", "ship now\nthe crew"),
    ],
)
def test_texts_and_patterns(tokenizers: Any, form: str, expected: str) -> None:
    prompt = tokenized(
        tokenizers[" A)"], "the ship now\nthe crew or the captain: go", template="none"
    )
    ((start, stop),) = Selection.parse(form).spans(prompt)
    assert text_of(prompt, (start, stop)) == expected
    if form == "text:o":
        assert stop == len(prompt.token_ids)


def test_of_several_matches_the_last_one_is_read(tokenizers: Any) -> None:
    prompt = tokenized(tokenizers[" A)"], "ship, ship", template="none")
    for form in ("text:ship", "regex:ship", "regex:(sh)ip"):
        ((start, _),) = Selection.parse(form).spans(prompt)
        assert prompt.offsets[start, 0] == 6


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("text:south", "the text has no 'south'"),
        ("regex:sou+th", "nothing in the text matches 'sou+th'"),
        ("regex:z*", "nothing in the text matches 'z*'"),
    ],
)
def test_a_text_that_is_not_there_is_named(tokenizers: Any, form: str, reason: str) -> None:
    prompt = tokenized(tokenizers["bytes"], "to the north", template="none")
    assert Selection.parse(form).spans(prompt) == []
    assert Selection.parse(form).reason(prompt) == reason


def test_a_completion_that_the_template_drops_has_a_reason(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}<|end|>{% endfor %}"
    )
    prompt = tokenized(tokenizer, "Or (A)?", "(A)", close_turn=True)
    for form in ("completion", "mean_completion", "mean_prompt", "answer_letter"):
        assert "cannot be found" in Selection.parse(form).reason(prompt)
    # The others need no completion.
    for form in ("last", "mean", "all", "text:(A)", "regex:A"):
        assert Selection.parse(form).spans(prompt)


def test_text_that_no_token_covers_has_a_reason(tokenizers: Any) -> None:
    whole = tokenized(tokenizers["bytes"], "north", template="none")
    # As a normaliser that deletes characters leaves it.
    prompt = TokenizedPrompt(
        whole.example, "n-", whole.token_ids[:1], np.array([[0, 1]], np.int32), None
    )
    assert Selection.parse("text:-").reason(prompt) == "no token covers '-' of the text"


@pytest.mark.parametrize(
    "text",
    [
        *("", "first", "-0", "0", "1", "-1.5", "--1", "-9999999999", "-٣"),
        *("last_0", "last_", "last_-1", "last 3", "LAST", " last", "mean\n", "completions"),
        *("text", "text:", "regex", "regex:", "Text:a"),
    ],
)
def test_what_is_no_selection_is_refused_with_every_form_named(text: str) -> None:
    with pytest.raises(InvalidInput, match="selects nothing; expected one of") as caught:
        Selection.parse(text)
    assert caught.value.kind == "selection"
    for form in FORMS[3:9]:
        assert form in str(caught.value)
    for form in ("last", "-2", "last_3", "text:", "regex:"):
        assert form in str(caught.value)


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[z-a]", "a{99999999999}", "(?P<x"])
def test_a_pattern_that_is_none_is_refused_when_the_run_file_is_read(pattern: str) -> None:
    with pytest.raises(InvalidInput, match="is not a regular expression of Python"):
        Selection.parse(f"regex:{pattern}")
    with pytest.raises(ValueError, match="is not a regular expression of Python"):
        CaptureSection(tokens=f"regex:{pattern}")


@pytest.mark.parametrize("form", FORMS)
def test_a_run_file_may_name_every_form(form: str) -> None:
    assert CaptureSection(tokens=form).tokens == form == str(Selection.parse(form))


@pytest.mark.parametrize("form", FORMS)
def test_labelled_prompts_are_refused_where_a_completion_is_needed(form: str) -> None:
    selection = Selection.parse(form)
    selection.check_format("pairs")
    selection.check_format("caa")
    if form in ("completion", "mean_completion", "answer_letter"):
        with pytest.raises(InvalidInput, match="labelled prompts have none"):
            selection.check_format("labelled")
    else:
        selection.check_format("labelled")
