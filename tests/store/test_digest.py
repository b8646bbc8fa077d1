"""Canonical JSON and digests."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.digest import canonical_json, check_digest, sha256_hex
from store.errors import InvalidInput

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.text()
    | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values)
def test_canonical_json_is_json_and_stable(value):
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


@given(st.dictionaries(st.text(), st.integers(0, 9)))
def test_order_of_keys_does_not_matter(mapping):
    backwards = dict(reversed(list(mapping.items())))
    assert canonical_json(mapping) == canonical_json(backwards)


def test_known_bytes():
    assert (
        canonical_json({"b": 1.0, "a": [True, None, "é"]}) == '{"a":[true,null,"é"],"b":1}'.encode()
    )
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**53, {1: 2}, object(), b"x", "\ud800", {"a": {1}}]
)
def test_not_json(value):
    with pytest.raises(InvalidInput) as caught:
        canonical_json(value)
    assert caught.value.kind == "json"


@pytest.mark.parametrize(
    "text", ["", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n", "../" + "a" * 61, None]
)
def test_check_digest_refuses(text):
    with pytest.raises(InvalidInput):
        check_digest(text)


def test_check_digest_returns_it():
    assert check_digest("0" * 64) == "0" * 64
