"""The targets of `make fuzz` on their seeds and on mangled ones: fast, without atheris."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS, attempt
from wire import mangled

EVERY = pytest.mark.parametrize("name", TARGETS)


@EVERY
def test_seeds(name):
    for seed in TARGETS[name][1]:
        attempt(name, seed)
    # The first seed is a good one: a target that refuses it tries nothing.
    TARGETS[name][0](TARGETS[name][1][0])


@EVERY
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mangled_seeds(name, data):
    seed = data.draw(st.sampled_from(TARGETS[name][1]))
    attempt(name, data.draw(mangled(seed) | st.binary(max_size=300)))
