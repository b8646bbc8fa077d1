"""Artifact: bytes and back, the same name for the same thing, and nothing doubtful parsed."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import rfc8785
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from steering_service.core.artifact import ModelReference, Policy, build, parse, parse_manifest
from steering_service.core.direction import Direction
from steering_service.core.errors import Corrupt, InvalidInput, Refused, SteeringError
from steering_service.core.intervention import (
    OPERATIONS,
    POSITIONS,
    STRENGTH_UNITS,
    Intervention,
)
from steering_service.core.site import STREAMS, Site

MODEL = ModelReference(name="pocket", fingerprint="a" * 64)
POLICY = Policy(min_strength=-2.0, max_strength=2.0)

finite = st.floats(-1e6, 1e6)
positive = st.floats(0, 1e6)
sites = st.builds(Site, st.sampled_from(STREAMS), st.integers(0, 99)) | st.builds(
    Site, st.just("z"), st.integers(0, 99), st.integers(0, 99)
)
vectors = arrays(np.float32, st.integers(1, 9), elements=st.floats(-1e6, 1e6, width=32)).filter(
    lambda v: bool(v.any())
)
directions = st.builds(
    Direction,
    sites,
    vectors,
    positive,
    positive,
    st.text(max_size=20).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t)),
    st.dictionaries(st.sampled_from(["auroc", "cosine"]), finite),
)
interventions = st.lists(
    st.builds(
        Intervention,
        directions,
        st.sampled_from(OPERATIONS),
        st.sampled_from(STRENGTH_UNITS),
        st.sampled_from(POSITIONS),
        finite,
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda i: (i.site, i.operation),
)


def one(seed=0):
    vector_D = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
    direction = Direction(Site("resid_post", 1), vector_D, 1.0, 2.0, "difference_of_means")
    return build([Intervention(direction)], name="one", model=MODEL, policy=POLICY)


@given(interventions)
def test_artifacts_round_trip(items):
    made = build(items, name="x", model=MODEL, policy=POLICY)
    again = parse(made.manifest_bytes, made.payload_bytes)
    assert again.digest == made.digest == hashlib.sha256(made.manifest_bytes).hexdigest()
    assert again.manifest == made.manifest
    for before, after in zip(items, again.interventions, strict=True):
        np.testing.assert_array_equal(after.direction.vector_D, before.direction.vector_D)
        assert after.site == before.site
        for name in ("operation", "strength_unit", "positions", "weight"):
            assert getattr(after, name) == getattr(before, name)
        for name in ("sigma", "activation_norm", "method"):
            assert getattr(after.direction, name) == getattr(before.direction, name)
        assert dict(after.direction.scores) == dict(before.direction.scores)


@given(interventions)
def test_the_same_input_has_the_same_digest(items):
    made = [build(items, name="x", model=MODEL, policy=POLICY) for _ in range(2)]
    assert made[0].digest == made[1].digest
    assert made[0].payload_bytes == made[1].payload_bytes


@given(st.integers(0, 10_000), st.integers(1, 255), st.booleans())
def test_no_flipped_byte_keeps_the_digest(position, flip, in_manifest):
    artifact = one()
    parts = [bytearray(artifact.manifest_bytes), bytearray(artifact.payload_bytes)]
    part = parts[0 if in_manifest else 1]
    part[position % len(part)] ^= flip
    try:
        parsed = parse(bytes(parts[0]), bytes(parts[1]))
    except SteeringError:
        return
    assert in_manifest
    assert parsed.digest != artifact.digest


@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    with pytest.raises(InvalidInput):
        parse_manifest(noise)
    with pytest.raises(Corrupt):
        parse(one().manifest_bytes, noise)


def altered(artifact, **changes):
    return rfc8785.dumps(json.loads(artifact.manifest_bytes) | changes)


@pytest.mark.parametrize(
    "manifest",
    [
        b"[" * 100_000,
        b"{}",
        b" " + one().manifest_bytes,
        altered(one(), schema_version=2),
        altered(one(), kind="pickle"),
        altered(one(), extra="field"),
        altered(one(), interventions=[]),
        altered(one(), policy={"min_strength": 1, "max_strength": 0}),
        one().manifest_bytes.replace(b'"sigma":1', b'"sigma":NaN'),
        one().manifest_bytes.replace(b'"sigma":1', b'"sigma":1e999'),
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b" " * (5 << 20),
    ],
)
def test_manifests_that_are_refused(manifest):
    with pytest.raises(InvalidInput):
        parse_manifest(manifest)


def with_payload(tensors):
    payload = safetensors.numpy.save(tensors)
    digest = {"sha256": hashlib.sha256(payload).hexdigest(), "size": len(payload)}
    return altered(one(), payload=digest), payload


@pytest.mark.parametrize(
    "vector",
    [
        np.full(8, np.nan, np.float32),
        np.full(8, np.inf, np.float32),
        np.zeros(8, np.float32),
        np.ones((2, 4), np.float32),
        np.ones(8, np.float64),
        np.ones(8, np.float16),
        np.ones(0, np.float32),
    ],
)
def test_vectors_that_are_refused(vector):
    with pytest.raises(InvalidInput):
        parse(*with_payload({"resid_post.1.add": vector}))


def test_tensors_must_be_those_of_the_manifest():
    good = np.ones(8, np.float32)
    for tensors in ({"other": good}, {"resid_post.1.add": good, "more": good}):
        with pytest.raises(InvalidInput):
            parse(*with_payload(tensors))


@pytest.mark.parametrize("strength", [2.1, -2.1, float("nan"), float("inf")])
def test_policy_refuses(strength):
    with pytest.raises(Refused):
        POLICY.check(strength)


@given(st.floats(-2, 2))
def test_policy_allows(strength):
    POLICY.check(strength)


# As version 0.1 wrote it before artifacts could hold controllers.
OLD_MANIFEST = (
    '{"interventions":[{"activation_norm":2.5,"method":"difference_of_means","operation":"add'
    '","positions":"generated","scores":{"auroc":0.875},"sigma":1.5,"site":"resid_post.1","st'
    'rength_unit":"direction","tensor":"resid_post.1.add","weight":1}],"kind":"intervention",'
    '"lineage":{"rows":{"train":3}},"model":{"fingerprint":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
    'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","name":"pocket"},"name":"old","parents":[],"payload":{"'
    'sha256":"7cca51466ec6894bac720813d2ede61a6d6ccfed340b033cd94939fa10c6e32e","size":96},"p'
    'olicy":{"max_strength":1,"min_strength":-1},"schema_version":1}'
)
OLD_PAYLOAD = bytes.fromhex(
    "48000000000000007b2272657369645f706f73742e312e616464223a7b226474797065223a22463332222c22"
    "7368617065223a5b345d2c22646174615f6f666673657473223a5b302c31365d7d7d20200000803f00000040"
    "0000404000008040"
)


def test_an_artifact_from_before_controllers_still_loads():
    artifact = parse(OLD_MANIFEST.encode(), OLD_PAYLOAD)
    assert artifact.digest == "5dd71393b184bf5544d2f05d7d31f0df8fee09b71e8ec94b2a0d6afe0eccd396"
    assert artifact.controller is None
    assert artifact.interventions[0].direction.vector_D.tolist() == [1.0, 2.0, 3.0, 4.0]
    # And is still written alike: what is published keeps its name.
    again = build(
        artifact.interventions,
        name="old",
        model=artifact.manifest.model,
        policy=artifact.manifest.policy,
        lineage=artifact.manifest.lineage,
    )
    assert again.digest == artifact.digest
