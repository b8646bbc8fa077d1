"""Artifacts that lie: about their payload, their header, their model, their size, their JSON."""

from __future__ import annotations

import hashlib
import json
import struct

import grpc
import numpy as np
import pytest
import rfc8785
import safetensors.numpy
from attack import DOCUMENTED, MIB
from delivery import make_artifact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import mangled

from steering_service.core.artifact import parse
from steering_service.v1 import artifact_pb2

PUBLISH = "/steering_service.v1.ArtifactService/Publish"
FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def publish(target, manifest, payload, signature=None, *, chunk_bytes=MIB, offset=0):
    """Send an artifact; a signature by the trusted key unless another one is given."""
    if signature is None:
        signature = target.publisher.signer.sign(manifest)
    header = artifact_pb2.PublishHeader(manifest=manifest, signature=signature, offset=offset)
    chunks = [payload[i : i + chunk_bytes] for i in range(0, len(payload), chunk_bytes)]
    messages = [
        artifact_pb2.PublishRequest(header=header),
        *[artifact_pb2.PublishRequest(chunk=chunk) for chunk in chunks],
    ]
    return target.send(PUBLISH, *[message.SerializeToString() for message in messages])


def with_payload(manifest, payload):
    """The manifest's value, made to name this payload."""
    value = json.loads(manifest)
    value["payload"] = {"sha256": hashlib.sha256(payload).hexdigest(), "size": len(payload)}
    return value


def canonical(value):
    return rfc8785.dumps(value)


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


NAME = "resid_post.3.add"
LYING_HEADERS = {
    "empty": b"",
    "cut off": b"\x10\0\0\0",
    "length beyond the file": struct.pack("<Q", 1 << 40) + b"{}",
    "length beyond 64 bits": b"\xff" * 8 + b"{}",
    "no header": struct.pack("<Q", 0),
    "not JSON": packed(b"\xff\xfe{"),
    "ten thousand deep": packed(b"[" * 10_000),
    "a hundred thousand deep": packed(b'{"a":' * 100_000),
    "a list": packed([]),
    "offsets beyond the file": packed(
        {NAME: {"dtype": "F32", "shape": [64], "data_offsets": [0, 1 << 40]}}, b"\0" * 256
    ),
    "negative offsets": packed(
        {NAME: {"dtype": "F32", "shape": [64], "data_offsets": [-256, 0]}}, b"\0" * 256
    ),
    "backward offsets": packed(
        {NAME: {"dtype": "F32", "shape": [64], "data_offsets": [256, 0]}}, b"\0" * 256
    ),
    "overlapping tensors": packed(
        {
            NAME: {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]},
            "b": {"dtype": "F32", "shape": [64], "data_offsets": [128, 384]},
        },
        b"\0" * 384,
    ),
    "a shape that overflows": packed(
        {NAME: {"dtype": "F32", "shape": [1 << 32, 1 << 32, 64], "data_offsets": [0, 256]}},
        b"\0" * 256,
    ),
    "a shape of other size": packed(
        {NAME: {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 256]}}, b"\0" * 256
    ),
    "unknown dtype": packed(
        {NAME: {"dtype": "PICKLE", "shape": [64], "data_offsets": [0, 256]}}, b"\0" * 256
    ),
    "a dtype numpy lacks": packed(
        {NAME: {"dtype": "F8_E4M3", "shape": [256], "data_offsets": [0, 256]}}, b"\0" * 256
    ),
    "bfloat16": packed(
        {NAME: {"dtype": "BF16", "shape": [128], "data_offsets": [0, 256]}}, b"\0" * 256
    ),
    "the name twice": packed(
        b'{"%s":{"dtype":"F32","shape":[64],"data_offsets":[0,256]},'
        b'"%s":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}' % ((NAME.encode(),) * 2),
        b"\0" * 256,
    ),
    "rubbish behind": packed(
        {NAME: {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}, b"\0" * 300
    ),
    "a hole": packed(
        {NAME: {"dtype": "F32", "shape": [64], "data_offsets": [44, 300]}}, b"\0" * 300
    ),
    "no tensors": packed({}),
    "only metadata": packed({"__metadata__": {"a": "b"}}),
    "metadata that is no text": packed({"__metadata__": {"a": [1]}}),
}


@pytest.mark.parametrize("lie", LYING_HEADERS)
def test_a_safetensors_header_that_lies(target, lie):
    payload = LYING_HEADERS[lie]
    manifest = canonical(with_payload(target.artifact.manifest_bytes, payload))
    with target.unharmed():
        code, kind, details = publish(target, manifest, payload)
        assert code in {grpc.StatusCode.DATA_LOSS, grpc.StatusCode.INVALID_ARGUMENT}, details
        assert kind.startswith(("payload_", "direction", "artifact", "publish")), kind


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite(target, value):
    vector = np.zeros(64, np.float32)
    vector[7] = value
    payload = safetensors.numpy.save({NAME: vector})
    manifest = canonical(with_payload(target.artifact.manifest_bytes, payload))
    with target.unharmed():
        code, _, details = publish(target, manifest, payload)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, details


@pytest.mark.parametrize(
    "vector",
    [np.zeros((8, 8), np.float32), np.zeros((), np.float32), np.zeros(0, np.float32)],
    ids=["two axes", "none", "no entries"],
)
def test_vectors_of_other_shapes(target, vector):
    payload = safetensors.numpy.save({NAME: vector})
    manifest = canonical(with_payload(target.artifact.manifest_bytes, payload))
    with target.unharmed():
        code, _, details = publish(target, manifest, payload)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, details


DEEP = {
    "lists": b"[" * 10_000 + b"]" * 10_000,
    "objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "left open": b"[" * 10_000,
    "a million": b"[" * 1_000_000,
}


@pytest.mark.parametrize("depth", DEEP)
def test_json_of_ten_thousand_levels(target, depth):
    deep, good = DEEP[depth], target.artifact.manifest_bytes
    inside = good.replace(b'"lineage":{}', b'"lineage":{"a":' + deep + b"}")
    assert inside != good
    with target.unharmed():
        for manifest in (deep, inside):
            code, kind, details = publish(target, manifest, b"", b"x")
            assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "manifest_syntax"), details
        # As the envelope, too.
        code, kind, details = publish(target, good, b"", deep)
        assert (code, kind) == (grpc.StatusCode.INVALID_ARGUMENT, "signature_format"), details


ODD_MANIFESTS = {
    "empty": b"",
    "null": b"null",
    "a number": b"1e999",
    "NaN": b"NaN",
    "a huge integer": b"1" * 5000,
    "not UTF-8": b"\xff\xfe",
    "a lone surrogate": b'{"a":"\\ud800"}',
    "NUL": b'{"a":"\0"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "keys twice": b'{"a":1,"a":2}',
}


@pytest.mark.parametrize("manifest", ODD_MANIFESTS.values(), ids=ODD_MANIFESTS)
def test_manifests_that_are_none(target, manifest):
    with target.unharmed():
        code, kind, details = publish(target, manifest, b"")
        assert code is grpc.StatusCode.INVALID_ARGUMENT, details
        assert kind.startswith("manifest_")


CHANGES = {
    "a size that lies": lambda m: m["payload"].update(size=1 << 62),
    "a size of more than JSON": lambda m: m["payload"].update(size=2**53),
    "a negative size": lambda m: m["payload"].update(size=-1),
    "a size of true": lambda m: m["payload"].update(size=True),
    "another digest": lambda m: m["payload"].update(sha256="0" * 64),
    "a digest that is a path": lambda m: m["payload"].update(sha256="../../../../etc/passwd"),
    "parents that are paths": lambda m: m.update(parents=["../" * 20]),
    "a schema to come": lambda m: m.update(schema_version=2),
    "a schema of 1.0": lambda m: m.update(schema_version="1"),
    "an unknown field": lambda m: m.update(extra=1),
    "a name of 4 MB": lambda m: m.update(name="x" * (4 * MIB - 2000)),
    "an empty name": lambda m: m.update(name=""),
    "a NUL in the site": lambda m: m["interventions"][0].update(site="resid_post.3\0"),
    "a site far away": lambda m: m["interventions"][0].update(site="resid_post.99999999999999999"),
    "a site of another script": lambda m: m["interventions"][0].update(site="resid_post.٣"),
    "no interventions": lambda m: m.update(interventions=[]),
    "a tensor that is not there": lambda m: m["interventions"][0].update(tensor="other"),
    "a policy upside down": lambda m: m["policy"].update(min_strength=2, max_strength=1),
    "a controller that is none": lambda m: m.update(kind="controller"),
    "a fingerprint that is none": lambda m: m["model"].update(fingerprint="A" * 64),
    "a weight of 1e308": lambda m: m["interventions"][0].update(weight=1e308, sigma=-1e308),
    "a million interventions": lambda m: m.update(interventions=m["interventions"] * 20_000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_manifests_that_lie(target, change):
    value = json.loads(target.artifact.manifest_bytes)
    CHANGES[change](value)
    with target.unharmed(grown_bytes=128 * MIB):
        try:
            manifest = canonical(value)
        except rfc8785.IntegerDomainError:
            manifest = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        code, kind, details = publish(target, manifest, target.artifact.payload_bytes)
        assert code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS}, details
        assert kind


def test_more_less_and_other_bytes_than_the_manifest_names(target):
    item = make_artifact(5, width=1000)
    payload = item.payload_bytes
    flipped = payload[:-1] + bytes([payload[-1] ^ 1])
    with target.unharmed():
        for wrong in (payload[:-1], payload + b"\0", flipped, b"", payload * 1000):
            for chunk_bytes in (17, MIB):
                if chunk_bytes < 100 and len(wrong) > 100_000:
                    continue
                code, kind, details = publish(
                    target, item.manifest_bytes, wrong, chunk_bytes=chunk_bytes
                )
                assert (code, kind) in {
                    (grpc.StatusCode.DATA_LOSS, "payload_digest"),
                    (grpc.StatusCode.INVALID_ARGUMENT, "publish_size"),
                }, details


@pytest.mark.parametrize("offset", [1, 100, 1 << 20, 1 << 40, 2**64 - 1])
def test_an_offset_that_nobody_kept(target, offset):
    item = make_artifact(6, width=1000)
    with target.unharmed():
        code, kind, details = publish(
            target, item.manifest_bytes, item.payload_bytes[offset:], offset=offset
        )
        assert code in {grpc.StatusCode.ABORTED, grpc.StatusCode.INVALID_ARGUMENT}, details
        assert kind in {"upload_incomplete", "publish_offset"}


@settings(max_examples=60, **FUZZ)
@given(data=st.data())
def test_mangled_artifacts_with_good_signatures(target, data):
    """Signed as they are, so that only the parsers stand between them and the store."""
    item = target.artifact
    payload = item.payload_bytes
    if data.draw(st.booleans()):
        payload = data.draw(mangled(payload))
    manifest = canonical(with_payload(item.manifest_bytes, payload))
    if data.draw(st.booleans()):
        manifest = data.draw(mangled(manifest))
    whole = True
    try:
        parse(manifest, payload)
    except Exception:
        whole = False
    with target.unharmed(written=whole):
        code, kind, details = publish(target, manifest, payload)
        assert code in DOCUMENTED, details
        assert (code is grpc.StatusCode.OK) == whole, (kind, details)


@settings(max_examples=40, **FUZZ)
@given(data=st.data())
def test_mangled_envelopes(target, data):
    good = target.publisher.sign(target.artifact)
    bad = data.draw(mangled(good) | st.binary(max_size=200))
    with target.unharmed():
        code, kind, details = publish(
            target, target.artifact.manifest_bytes, target.artifact.payload_bytes, bad
        )
        if bad == good:
            return
        # ABORTED: it verifies, as one with another key id, and the first one stays.
        assert code in {
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
            grpc.StatusCode.ABORTED,
        }, details
        assert kind
