"""Whether bytes are canonical JSON: as the reference says, always."""

from __future__ import annotations

import json

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from steering_service.core.canonical import read_canonical

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(-(2.0**53) + 1, 2.0**53 - 1)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
STYLES = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "sort_keys": st.booleans(),
        "separators": st.sampled_from([(",", ":"), (", ", ": ")]),
    }
)


def by_reference(data: bytes) -> bool:
    return rfc8785.dumps(json.loads(data)) == data


@given(VALUES)
def test_the_canonical_form_is_canonical(value):
    data = rfc8785.dumps(value)
    read, canonical = read_canonical(data)
    assert canonical
    assert rfc8785.dumps(read) == data


@given(VALUES, STYLES)
def test_other_forms_are_judged_as_by_the_reference(value, style):
    data = json.dumps(value, **style).encode("utf-8", "surrogatepass")
    try:
        expected = by_reference(data)
    except (ValueError, rfc8785.CanonicalizationError):
        return
    assert read_canonical(data)[1] == expected


@pytest.mark.parametrize(
    "text",
    [
        "1.0",
        "-0",
        "-0.0",
        "1e-05",
        "0.00001",
        "1e-7",
        "1E2",
        "100000000000000000000",
        "1e21",
        "0.1000",
        "9007199254740993.5",
        r'"\u00e9"',
        r'"\u007f"',
        '"\x7f"',
        r'"\u001F"',
        r'"\u001f"',
        r'"\/"',
        '{"b":1,"a":2}',
        '{"a":1,"a":1}',
        " 1",
        "[1,]",
        "[1, 2]",
        "NaN",
        "Infinity",
        "9007199254740993",
    ],
)
def test_corner_cases_are_judged_as_by_the_reference(text):
    data = text.encode()
    try:
        expected = by_reference(data)
    except (ValueError, rfc8785.CanonicalizationError) as error:
        with pytest.raises(type(error)):
            read_canonical(data)
    else:
        assert read_canonical(data)[1] == expected
