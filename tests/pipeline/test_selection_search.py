"""Searches over sites, the caps they keep to, and the rules for a refusal direction: pure functions
over figures.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import GateRefused
from pipeline.selection.candidates import Candidate, Caps, choose
from pipeline.selection.refusal import (
    RefusalCandidate,
    RefusalRules,
    choose_refusal,
    source_layer,
)
from pipeline.selection.refusal_bench import log_odds
from pipeline.selection.search import (
    best_shares,
    combinations,
    forward_search,
    leading_sites,
    most_measured,
    sweep_sites,
)
from steering_service.core.site import Site

HEADS = [Site("z", layer, head) for layer in range(2) for head in range(4)]
STRENGTHS = (8.0, 16.0, 32.0)

points = st.floats(0, 100)
costs = st.floats(0.5, 5) | st.just(math.inf) | st.just(math.nan)
candidates = st.lists(
    st.builds(
        Candidate,
        st.tuples(st.sampled_from(HEADS)),
        st.sampled_from(STRENGTHS),
        points,
        points,
        costs,
        st.none() | st.floats(0, 2),
        st.none() | st.floats(-50, 50),
    ),
    min_size=1,
    max_size=12,
)


@given(candidates, st.floats(1, 3), st.none() | st.floats(0, 1), st.floats(0, 20))
def test_what_is_chosen_keeps_to_every_cap_and_nothing_allowed_goes_further(found, ratio, kl, harm):
    caps = Caps(ratio, kl, harm)
    allowed = [
        c
        for c in found
        if c.undefined <= 50
        and c.ratio <= ratio
        and (kl is None or (c.kl is not None and c.kl <= kl))
        and (c.harm is None or c.harm <= harm)
    ]
    if not allowed:
        with pytest.raises(GateRefused, match="keeps the perplexity within") as refused:
            choose(found, caps)
        assert refused.value.kind == "perplexity_cap"
        return
    exact = choose(found, caps, slack=0.0)
    assert exact in allowed
    assert exact.share == max(c.share for c in allowed)
    near = choose(found, caps)
    assert near.share >= exact.share - 1.0
    assert near.ratio <= exact.ratio


@given(candidates)
def test_figures_come_back_from_json_and_what_was_not_finite_stays_past_every_cap(found):
    for candidate in found:
        text = json.dumps(candidate.figures(), allow_nan=False)
        has_kl = candidate.kl is not None
        back = Candidate.of_figures(json.loads(text), has_kl=has_kl)
        if math.isfinite(candidate.ratio):
            assert back == candidate
        else:
            assert back == replace(candidate, ratio=math.inf)
            assert not Caps(1e308).allow(back)
    lost = Candidate.of_figures(
        {**found[0].figures(), "kl": None, "ratio": 1.0, "undefined": 0.0}, has_kl=True
    )
    assert not Caps(2.0, kl=1e308).allow(lost)


def test_the_refusal_names_the_least_costs():
    found = [
        Candidate((HEADS[0],), 8.0, 90.0, 0.0, 1.3, 0.5, 30.0),
        Candidate((HEADS[1],), 8.0, 90.0, 60.0, 1.0),
    ]
    with pytest.raises(GateRefused, match=r"perplexity of 1 was 1\.30.*KL 0\.5.*rise 30"):
        choose(found, Caps(1.1, 0.1, 5.0))
    with pytest.raises(GateRefused, match="there were none"):
        choose(found[1:], Caps(1.1))


def test_best_shares_take_the_best_strength_that_counts():
    found = [
        Candidate((HEADS[0],), 8.0, 40.0, 0.0, 1.0),
        Candidate((HEADS[0],), 16.0, 70.0, 10.0, 1.5),
        Candidate((HEADS[0],), 32.0, 90.0, 51.0, 1.0),
        Candidate((HEADS[1],), 8.0, 60.0, 80.0, 1.0),
        Candidate((HEADS[2],), 8.0, 50.0, 50.0, 1.0),
    ]
    best = best_shares(found)
    assert list(best) == HEADS[:3]
    assert best[HEADS[0]] == 70.0
    assert math.isnan(best[HEADS[1]])
    assert leading_sites(best, 2) == [HEADS[0], HEADS[2]]
    assert leading_sites(best, 9)[-1] == HEADS[1]
    assert best_shares(found, Caps(1.1))[HEADS[0]] == 40.0


def test_equal_sites_stay_in_their_order():
    assert leading_sites({HEADS[3]: 5.0, HEADS[1]: 5.0, HEADS[2]: 6.0}, 3) == [
        HEADS[2],
        HEADS[3],
        HEADS[1],
    ]


@given(st.integers(1, 5), st.integers(1, 5))
def test_combinations_are_every_set_of_up_to_so_many_once(num, most):
    found = combinations(HEADS[:num], most)
    assert len(set(found)) == len(found) == sum(math.comb(num, k) for k in range(1, most + 1))
    assert [len(c) for c in found] == sorted(len(c) for c in found)


class World:
    """Sites that each add to the share, most at a strength of their own; counts what is asked."""

    def __init__(self, gains, *, best=16.0, costly=()):
        self.gains, self.best, self.costly = gains, best, costly
        self.asked = []

    def __call__(self, sites, strength):
        self.asked.append((sites, strength))
        # Several heads together do at half the strength what one does alone.
        right = 1.0 if strength == self.best / (2 if len(sites) > 1 else 1) else 0.5
        share = min(100.0, sum(self.gains[s] for s in sites) * right)
        ratio = 2.0 if set(sites) & set(self.costly) else 1.0 + 0.01 * len(sites)
        return Candidate(sites, strength, share, 0.0, ratio)


def test_a_sweep_asks_each_site_alone_at_every_strength():
    world = World(dict.fromkeys(HEADS, 1.0))
    found = sweep_sites(HEADS, STRENGTHS, world)
    assert world.asked == list(itertools.product([(h,) for h in HEADS], STRENGTHS))
    assert [(c.sites, c.strength) for c in found] == world.asked


def test_forward_search_finds_the_heads_that_help_and_chooses_their_strength_anew():
    gains = dict.fromkeys(HEADS, 0.4) | {HEADS[5]: 50.0, HEADS[2]: 30.0, HEADS[7]: 10.0}
    steps = forward_search(HEADS, STRENGTHS, World(gains), caps=Caps(1.1), most=8)
    assert [set(step.sites) for step in steps] == [
        {HEADS[5]},
        {HEADS[5], HEADS[2]},
        {HEADS[5], HEADS[2], HEADS[7]},
    ]
    assert [step.strength for step in steps] == [16.0, 8.0, 8.0]


def test_forward_search_takes_nothing_past_a_cap_and_no_more_than_it_may():
    gains = {site: 10.0 + i for i, site in enumerate(HEADS)}
    steps = forward_search(
        HEADS, STRENGTHS, World(gains, costly=[HEADS[7]]), caps=Caps(1.1), most=3
    )
    assert [len(step.sites) for step in steps] == [1, 2, 3]
    assert set(steps[-1].sites) == {HEADS[4], HEADS[5], HEADS[6]}
    # Two heads cost 1.02: past a tighter cap, the first stays alone.
    assert len(forward_search(HEADS, STRENGTHS, World(gains), caps=Caps(1.015), most=3)) == 1
    with pytest.raises(GateRefused, match="keeps the perplexity within"):
        forward_search(HEADS, STRENGTHS, World(gains), caps=Caps(0.9), most=3)


def test_forward_search_stops_where_a_site_adds_no_more_than_the_margin():
    gains = {HEADS[0]: 60.0, HEADS[1]: 5.0, HEADS[2]: 2.0}
    sites = list(gains)
    for margin, size in ((1.0, 3), (2.0, 2), (5.0, 1)):
        steps = forward_search(
            sites, (8.0, 16.0), World(gains), caps=Caps(2.0), most=3, margin=margin
        )
        assert len(steps[-1].sites) == size


@given(
    st.lists(st.floats(0, 60), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 8),
    st.floats(0, 10),
)
def test_forward_search_asks_no_more_than_was_said_and_every_step_helps(
    gains, num_strengths, most, margin
):
    world = World(dict(zip(HEADS, gains, strict=False)))
    sites, strengths = HEADS[: len(gains)], (8.0, 16.0, 32.0)[:num_strengths]
    steps = forward_search(sites, strengths, world, caps=Caps(9.0), most=most, margin=margin)
    assert len(world.asked) <= most_measured(len(sites), num_strengths, most)
    assert len(world.asked) == len(set(world.asked))
    assert len(steps) <= min(most, len(sites))
    for before, after in itertools.pairwise(steps):
        assert set(before.sites) < set(after.sites)
        assert after.share > before.share + margin
    # Greedy: no further site helps, or there is no room for one.
    last = steps[-1]
    if len(last.sites) < most and last.share + margin < 100.0:
        rest = [s for s in sites if s not in last.sites]
        for site, strength in itertools.product(rest, strengths):
            more = world(tuple(sorted((*last.sites, site))), strength)
            assert more.share <= last.share + margin


def test_the_bound_is_reached_where_every_site_helps():
    world = World(dict.fromkeys(HEADS, 11.0))
    forward_search(HEADS, STRENGTHS, world, caps=Caps(9.0), most=3)
    assert len(world.asked) == most_measured(8, 3, 3) == 3 * (8 + 7 + 6)


# The rules for a refusal direction (Arditi et al., METHODS 6)

LAYERS = 10
numbers = st.floats(-20, 20) | st.just(math.nan)
directions = st.lists(
    st.builds(
        RefusalCandidate,
        st.builds(Site, st.sampled_from(["resid_pre", "resid_post"]), st.integers(0, LAYERS - 1)),
        st.integers(-3, -1),
        numbers,
        numbers,
        st.floats(0, 1) | st.just(math.nan),
    ),
    min_size=1,
    max_size=15,
)
# Loose ones are among them, so that there is something to choose.
rules = st.builds(
    RefusalRules, st.floats(0, 1), st.floats(-20, 5), st.sampled_from([0.0, 0.2, 0.9])
) | st.just(RefusalRules(1.0, -20.0, 0.0))


def admissible(c, r):
    """The released code's `filter_fn`, turned around."""
    layer = c.site.layer + (1 if c.site.stream == "resid_post" else 0)
    return not (
        math.isnan(c.ablated)
        or math.isnan(c.induced)
        or math.isnan(c.kl)
        or layer >= int(LAYERS * (1.0 - r.last_share))
        or c.kl > r.max_kl
        or c.induced < r.min_induced
    )


@given(directions, rules)
def test_the_direction_is_the_lowest_under_ablation_of_those_that_keep_to_the_rules(found, r):
    allowed = [c for c in found if admissible(c, r)]
    for c in found:
        assert bool(r.objections(c, LAYERS)) is not admissible(c, r)
    if not allowed:
        with pytest.raises(GateRefused) as refused:
            choose_refusal(found, LAYERS, r)
        assert refused.value.kind == "refusal_rules"
        return
    chosen = choose_refusal(found, LAYERS, r)
    assert chosen in allowed
    assert chosen.ablated == min(c.ablated for c in allowed)
    # What breaks a rule changes nothing, however low its score.
    assert choose_refusal(allowed, LAYERS, r) == chosen
    # A looser rule never gives a worse direction.
    loose = replace(r, max_kl=r.max_kl + 1, min_induced=r.min_induced - 1)
    assert choose_refusal(found, LAYERS, loose).ablated <= chosen.ablated


@given(directions, rules, st.permutations(range(15)))
def test_the_order_of_the_candidates_does_not_matter(found, r, order):
    shuffled = [found[i] for i in order if i < len(found)]
    try:
        chosen = choose_refusal(found, LAYERS, r)
    except GateRefused:
        with pytest.raises(GateRefused):
            choose_refusal(shuffled, LAYERS, r)
    else:
        assert choose_refusal(shuffled, LAYERS, r).ablated == chosen.ablated


def test_of_two_that_keep_to_the_rules_the_one_that_stops_refusals_is_taken():
    mild = RefusalCandidate(Site("resid_post", 2), -1, -1.0, 9.0, 0.01)
    strong = RefusalCandidate(Site("resid_post", 1), -2, -3.0, 0.5, 0.09)
    too_far = RefusalCandidate(Site("resid_post", 3), -1, -9.0, 0.5, 0.11)
    assert choose_refusal([mild, strong, too_far], LAYERS, RefusalRules()) == strong
    assert choose_refusal([mild, strong, too_far], LAYERS, RefusalRules(max_kl=0.2)) == too_far


def test_layers_are_counted_by_the_block_input_that_a_direction_belongs_to():
    assert source_layer(Site("resid_pre", 7)) == source_layer(Site("resid_post", 6)) == 7
    assert source_layer(Site("resid_mid", 7)) == 7
    fine = RefusalCandidate(Site("resid_pre", 7), -1, -5.0, 1.0, 0.05)
    assert RefusalRules().objections(fine, LAYERS) == []
    for site in (Site("resid_pre", 8), Site("resid_post", 7)):
        assert RefusalRules().objections(replace(fine, site=site), LAYERS) == [
            "among the last 20% of layers"
        ]


def test_a_refusal_without_a_direction_says_how_near_they_came():
    far = RefusalCandidate(Site("resid_post", 2), -1, -5.0, 1.0, 0.9)
    near = RefusalCandidate(Site("resid_post", 3), -2, -3.5, 1.0, 0.2)
    with pytest.raises(
        GateRefused, match=r"resid_post\.3 at token -2: ablated -3\.50.*KL 0\.2 > "
    ) as e:
        choose_refusal([far, near], LAYERS, RefusalRules())
    lines = str(e.value).splitlines()
    assert "resid_post.3" in lines[1]
    assert "resid_post.2" in lines[2]


def test_figures_of_a_direction_come_back_from_json():
    for c in (
        RefusalCandidate(Site("resid_post", 2), -3, -5.25, 1.5, 0.125),
        RefusalCandidate(Site("resid_mid", 2), -1, math.inf, 1.5, math.nan),
    ):
        back = RefusalCandidate.of_figures(json.loads(json.dumps(c.figures(), allow_nan=False)))
        assert (back.site, back.position, back.induced) == (c.site, c.position, c.induced)
        if math.isfinite(c.kl):
            assert back == c
        else:
            assert RefusalRules(1e9, -1e9, 0.0).objections(back, LAYERS)


def test_log_odds_of_tokens_are_those_of_their_probability_and_stay_finite():
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5])
    p = torch.softmax(logits.double(), -1)
    expected = float(torch.log(p[[0, 3]].sum()) - torch.log(p[[1, 2]].sum()))
    assert log_odds(logits, torch.tensor([0, 3])) == pytest.approx(expected, abs=1e-12)
    sure = log_odds(torch.tensor([200.0, 0.0, 0.0]), torch.tensor([0]))
    assert sure == pytest.approx(200.0 - np.log(2.0))
