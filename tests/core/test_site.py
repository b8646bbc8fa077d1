"""Site: one name for one place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering_service.core.errors import InvalidInput
from steering_service.core.site import STREAMS, Site

NUMBERS = st.integers(0, 999_999)
SITES = st.builds(Site, st.sampled_from(STREAMS), NUMBERS) | st.builds(
    Site, st.just("z"), NUMBERS, NUMBERS
)


@given(SITES)
def test_names_round_trip(site):
    assert Site.parse(str(site)) == site


@given(SITES, SITES)
def test_names_are_unique(one, other):
    assert (str(one) == str(other)) == (one == other)


@given(st.text(alphabet="resid_potz.0123456789- \n", max_size=20))
def test_text_is_a_canonical_name_or_refused(text):
    try:
        site = Site.parse(text)
    except InvalidInput:
        return
    assert str(site) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resid_post",
        "resid_post.-1",
        "resid_post.01",
        "resid_post.1.2",
        "z.1.2.3",
        "Z.1",
        "z.1 ",
    ],
)
def test_not_a_site(text):
    with pytest.raises(InvalidInput):
        Site.parse(text)


@pytest.mark.parametrize("fields", [("nowhere", 1), ("z", -1), ("z", 1, -1), ("mlp_out", 1, 2)])
def test_not_built(fields):
    with pytest.raises(InvalidInput):
        Site(*fields)
