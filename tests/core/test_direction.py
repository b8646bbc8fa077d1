"""Direction algebra: the laws of a vector space at one site, what is still known of a result, and
files that hold nothing else.

Shapes: D width, K directions, N rows.
"""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, given
from hypothesis import strategies as st

from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.direction import Direction, compose
from steering_service.core.errors import Corrupt, InvalidInput, NotFound, SteeringError
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site

SEEDS = st.integers(0, 2**32 - 1)
FACTORS = st.floats(0.01, 100) | st.floats(-100, -0.01)


def direction_of(seed: int, width: int = 16, site: str = "resid_post.3", **fields) -> Direction:
    vector_D = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    known = {
        "sigma": 2.0,
        "activation_norm": 7.0,
        "method": "difference_of_means",
        "scores": {"auroc_test": 0.9},
        "lineage": {"reduction": f"r{seed}"},
    }
    return Direction(site=Site.parse(site), vector_D=vector_D, **known | fields)


def close(a: Direction, b: Direction, scale: float = 1.0) -> bool:
    return bool(np.allclose(a.vector_D, b.vector_D, rtol=1e-5, atol=1e-5 * scale))


@given(SEEDS, FACTORS, FACTORS)
def test_scaling(seed, x, y):
    d = direction_of(seed)
    assert np.array_equal((x * d).vector_D, (d * x).vector_D)
    assert np.array_equal((np.float64(x) * d).vector_D, (d * x).vector_D)
    assert close(d * x * y, d * (x * y), abs(x * y))
    assert np.array_equal((1 * d).vector_D, d.vector_D)
    opposite = -d
    assert np.array_equal((-opposite).vector_D, d.vector_D)
    assert (d * x).norm == pytest.approx(abs(x) * d.norm, rel=1e-6)
    for scaled in (d * x, -d, d.unit()):
        assert (scaled.sigma, scaled.activation_norm) == (2.0, 7.0)
        assert scaled.method == d.method
    assert (d * x).scores == (d.scores if x > 0 else {})
    assert (-d).scores == {}
    assert d.unit().norm == pytest.approx(1, rel=1e-6)
    assert d.unit().scores == d.scores


@given(SEEDS, SEEDS, SEEDS, FACTORS)
def test_sums(a, b, c, x):
    assume(len({a, b, c}) == 3)
    a, b, c = direction_of(a), direction_of(b), direction_of(c)
    assert np.array_equal((a + b).vector_D, (b + a).vector_D)
    assert close((a + b) + c, a + (b + c))
    assert close(x * (a + b), x * a + x * b, abs(x))
    assert close(a - b, a + -b)
    assert close(a + b - b, a)
    np.testing.assert_allclose((a + b).vector_D, a.vector_D + b.vector_D, atol=1e-6)
    assert close(compose([a, b, c], [1, -1, x]), a - b + x * c, abs(x))
    for result in (a + b, a - b, compose([a, b], [1, 2])):
        assert result.sigma is None
        assert result.activation_norm == 7.0
        assert result.scores == {}
        assert result.method == "composed"


@given(SEEDS, st.integers(1, 5), st.booleans())
def test_orthogonal_to_the_span_of_others(seed, num_others, dependent):
    d, *others = [direction_of(seed + number) for number in range(num_others + 1)]
    if dependent:
        others.append(compose(others, np.arange(1, num_others + 1)))
    rest = d.orthogonal_to(*others)
    for item in others:
        assert abs(rest.unit_D @ item.unit_D) < 1e-5
    assert close(rest.orthogonal_to(*others), rest)
    # What was taken away lies in the span, and so the rest is the nearest.
    span_DK = np.stack([item.vector_D for item in others], axis=1).astype(np.float64)
    left_D = d.vector_D - span_DK @ np.linalg.lstsq(span_DK, d.vector_D, rcond=1e-6)[0]
    np.testing.assert_allclose(rest.vector_D, left_D, atol=1e-4)
    assert rest.sigma is None
    assert rest.scores == {}
    assert rest.method == "difference_of_means+orthogonal_to"


def test_activations_of_other_references_are_averaged():
    other = direction_of(1, activation_norm=9.0)
    assert (direction_of(0) + other).activation_norm == 8.0


def test_the_lineage_says_what_was_done_and_of_what():
    a, b = direction_of(0), direction_of(1)
    half = 0.5 * a
    mixed = half - b
    done = mixed.orthogonal_to(b)
    sources = done.lineage["sources"]
    assert sources[a.digest] == {"method": "difference_of_means", "reduction": "r0"}
    assert sources[b.digest] == {"method": "difference_of_means", "reduction": "r1"}
    assert set(sources) == {a.digest, b.digest}
    assert done.lineage["steps"] == [
        {"operation": "scale", "of": [a.digest], "factor": 0.5, "result": half.digest},
        {
            "operation": "compose",
            "of": [half.digest, b.digest],
            "weights": [1.0, -1.0],
            "result": mixed.digest,
        },
        {"operation": "orthogonal_to", "of": [mixed.digest, b.digest], "result": done.digest},
    ]
    # A sum of two that share a history tells it once.
    assert len((done + mixed).lineage["steps"]) == 4
    json.dumps(done.lineage, allow_nan=False)


def test_a_digest_names_what_a_direction_does():
    d = direction_of(0)
    same = direction_of(0, method="other", scores={}, lineage={})
    assert d.digest == same.digest == (2 * (0.5 * d)).digest
    others = [
        direction_of(1),
        direction_of(0, site="resid_post.4"),
        direction_of(0, sigma=2.5),
        direction_of(0, sigma=None),
        direction_of(0, activation_norm=8.0),
        2 * d,
    ]
    assert len({d.digest, *(item.digest for item in others)}) == 1 + len(others)


def test_the_callers_array_stays_the_callers():
    mine_D = np.arange(1, 5, dtype=np.float32)
    direction = Direction(Site.parse("resid_post.3"), mine_D, 1.0, 1.0, "by_hand")
    digest = direction.digest
    mine_D[:] = 7.0
    assert direction.vector_D.tolist() == [1, 2, 3, 4]
    assert direction.digest == digest
    with pytest.raises(ValueError, match="read-only"):
        direction.vector_D[0] = 7.0


def test_a_direction_shows_itself_in_a_line():
    d = direction_of(0)
    assert repr(d) == (
        f"<Direction at resid_post.3, difference_of_means: width 16, norm {d.norm:.4g}, sigma 2, "
        "1 scores>"
    )
    assert "composed: width 16" in repr(d + direction_of(1))
    assert "sigma not measured, 0 scores>" in repr(d + direction_of(1))


def test_what_does_not_fit_together_is_refused():
    d = direction_of(0)
    cases = [
        (lambda: d + direction_of(1, site="resid_post.4"), "direction_site"),
        (lambda: d.orthogonal_to(direction_of(1, site="z.3.1")), "direction_site"),
        (lambda: d - direction_of(1, width=8), "direction_width"),
        (lambda: d - d, "direction_nothing"),
        (lambda: 3 * d - 1.5 * d - 1.5 * d, "direction_nothing"),
        (lambda: d.orthogonal_to(-2 * d), "direction_nothing"),
        (lambda: 0 * d, "direction_factor"),
        (lambda: float("nan") * d, "direction_factor"),
        (lambda: d * 1e39, "direction_vector"),
        (lambda: d.orthogonal_to(), "direction_operands"),
        (lambda: compose([], []), "direction_operands"),
        (lambda: compose([d, d], [1]), "direction_operands"),
        (lambda: compose([d], [float("inf")]), "direction_operands"),
    ]
    for make, kind in cases:
        with pytest.raises(InvalidInput) as caught:
            make()
        assert caught.value.kind == kind
    for make in (lambda: d + 1, lambda: 1 + d, lambda: d * d, lambda: d * "2", lambda: d * True):
        with pytest.raises(TypeError):
            make()


def test_a_sigma_that_was_not_measured_is_never_taken_for_one():
    mixed = direction_of(0) + direction_of(1)
    with pytest.raises(InvalidInput, match="measure it") as caught:
        Intervention(mixed, strength_unit="sigma")
    assert caught.value.kind == "sigma_missing"
    model, policy = (
        ModelReference(name="m", fingerprint="a" * 64),
        Policy(min_strength=0.0, max_strength=1.0),
    )
    with pytest.raises(InvalidInput, match=r"at resid_post\.3 was not measured") as caught:
        build([Intervention(mixed)], name="x", model=model, policy=policy)
    assert caught.value.kind == "sigma_missing"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text("ab/é", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=6,
)


@given(
    seed=SEEDS,
    width=st.integers(1, 40),
    sigma=st.none() | st.floats(0, 1e6),
    scores=st.dictionaries(st.sampled_from(["auroc", "cohens_d"]), st.floats(-1e6, 1e6)),
    lineage=st.dictionaries(st.text("ab", max_size=3), json_values, max_size=3),
)
def test_files_give_back_what_was_saved(tmp_path_factory, seed, width, sigma, scores, lineage):
    path = tmp_path_factory.mktemp("directions") / "d.safetensors"
    saved = direction_of(seed, width, "z.3.1", sigma=sigma, scores=scores, lineage=lineage)
    saved.save(path)
    loaded = Direction.load(str(path))
    assert np.array_equal(loaded.vector_D, saved.vector_D)
    assert loaded.digest == saved.digest
    for name in ("site", "sigma", "activation_norm", "method", "scores", "lineage"):
        assert getattr(loaded, name) == getattr(saved, name)
    before = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == before


def header_of(path) -> dict:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]


def test_files_of_anything_else_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    d = direction_of(0)
    d.save(path)
    whole, metadata = path.read_bytes(), header_of(path)
    record = json.loads(metadata["steerage.direction"])
    vector = {"vector": d.vector_D}

    def rewritten(**changes) -> bytes:
        header = {"steerage.direction": json.dumps(record | changes)}
        return safetensors.numpy.save(vector, metadata=header)

    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    cases = [
        (pickle.dumps(d.vector_D), Corrupt, "direction_format"),
        (b"", Corrupt, "direction_format"),
        (whole[:-3], Corrupt, "direction_format"),
        (flipped, Corrupt, "direction_digest"),
        (rewritten(sigma=3.0), Corrupt, "direction_digest"),
        (safetensors.numpy.save(vector), InvalidInput, "direction_format"),
        (safetensors.numpy.save(vector | {"more": d.vector_D}, metadata), InvalidInput, None),
        (safetensors.numpy.save({"other": d.vector_D}, metadata), InvalidInput, None),
        (
            safetensors.numpy.save({"vector": d.vector_D.astype(float)}, metadata),
            InvalidInput,
            None,
        ),
        (safetensors.numpy.save(vector, {"steerage.direction": "{"}), InvalidInput, None),
        (safetensors.numpy.save(vector, {"steerage.direction": "[" * 10**5}), InvalidInput, None),
        (rewritten(schema_version=2), InvalidInput, "direction_format"),
        (rewritten(extra=1), InvalidInput, "direction_format"),
        (rewritten(site="nowhere.1"), InvalidInput, "site_syntax"),
    ]
    for content, error, kind in cases:
        path.write_bytes(content)
        with pytest.raises(SteeringError) as caught:
            Direction.load(path)
        assert type(caught.value) is error
        assert caught.value.kind == (kind or "direction_format")
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFound) as caught:
            Direction.load(missing)
        assert caught.value.kind == "direction_file"


def test_what_json_cannot_hold_is_not_saved(tmp_path):
    for fields in ({"scores": {"auroc": float("nan")}}, {"lineage": {"n": 2**60}}):
        with pytest.raises(InvalidInput, match="must be JSON values") as caught:
            direction_of(0, **fields).save(tmp_path / "d")
        assert caught.value.kind == "direction_json"
    assert not (tmp_path / "d").exists()
