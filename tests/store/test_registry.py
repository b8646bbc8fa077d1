"""Artifacts: published whole or not at all, verified on the way out."""

from __future__ import annotations

import json

import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.digest import canonical_json, sha256_hex
from store.errors import Conflict, Corrupt, InvalidInput, NotFound
from store.location import Location
from store.registry import Registry


def manifest_of(payload, **more):
    named = {"sha256": sha256_hex(payload), "size": len(payload)}
    return canonical_json({"payload": named, "kind": "direction", **more})


@pytest.fixture(params=["local", "memory"])
def registry(request, tmp_path):
    return Registry(Location.open(tmp_path if request.param == "local" else "memory://"))


def test_publish_and_read(registry):
    payload = bytes(range(256))
    digest = registry.publish(manifest_of(payload), payload, b"signed")
    assert digest == sha256_hex(manifest_of(payload))
    assert registry.manifest(digest) == manifest_of(payload)
    assert registry.signature(digest) == b"signed"
    assert registry.payload(digest) == payload
    assert registry.payload_size(digest) == 256
    assert registry.read_payload(digest, 10, 3) == payload[10:13]
    assert registry.read_payload(digest, 250, 100) == payload[250:]
    assert registry.read_payload(digest, 256, 1) == b""
    assert registry.list() == [digest]


def test_stray_files_are_no_artifacts(registry):
    digest = registry.publish(manifest_of(b"p"), b"p", b"s")
    for key in ("notes.txt", "README/manifest.json", f"{digest}/old/manifest.json"):
        registry.location.put_new(f"artifacts/{key}", b"stray")
    bucket = registry.location.obstore_and_prefix()
    if bucket is not None:  # a disk hides these anyway
        obstore.put(bucket[0], "artifacts/.DS_Store", b"stray")
    assert registry.list() == [digest]
    assert registry.list(after=digest) == []


def test_publish_again(registry):
    digest = registry.publish(manifest_of(b"p"), b"p", b"s")
    assert registry.publish(manifest_of(b"p"), b"p", b"s") == digest
    with pytest.raises(Conflict) as caught:
        registry.publish(manifest_of(b"p"), b"p", b"other")
    assert caught.value.kind == "signature_differs"
    assert registry.signature(digest) == b"s"


def test_artifacts_share_payloads(registry):
    one = registry.publish(manifest_of(b"p", version=1), b"p", b"s")
    two = registry.publish(manifest_of(b"p", version=2), b"p", b"s")
    assert one != two
    assert len(list(registry.location.list("blobs"))) == 1
    assert registry.list() == sorted([one, two])


@pytest.mark.parametrize(
    ("manifest", "payload", "kind"),
    [
        (b"{", b"p", "manifest"),
        (b"\xff", b"p", "manifest"),
        (b"[" * 100_000, b"p", "manifest"),
        (b"[]", b"p", "manifest"),
        (b"{}", b"p", "manifest"),
        (b'{"payload":1}', b"p", "manifest"),
        (b'{"payload":{"sha256":1,"size":1}}', b"p", "manifest"),
        (canonical_json({"payload": {"sha256": "../x", "size": 1}}), b"p", "digest"),
        (canonical_json({"payload": {"sha256": sha256_hex(b"p"), "size": True}}), b"p", "manifest"),
        (canonical_json({"payload": {"sha256": sha256_hex(b"p"), "size": -1}}), b"p", "manifest"),
        (canonical_json({"payload": {"sha256": sha256_hex(b"p")}}), b"p", "manifest"),
        (
            json.dumps({"payload": {"size": 1, "sha256": sha256_hex(b"p")}}).encode(),
            b"p",
            "manifest",
        ),
        (manifest_of(b"p") + b"\n", b"p", "manifest"),
        (b'{"a":NaN}', b"p", "manifest"),
        (manifest_of(b"p"), b"q", "payload"),
        (manifest_of(b"p"), b"pp", "payload"),
    ],
)
def test_bad_input_publishes_nothing(registry, manifest, payload, kind):
    with pytest.raises(InvalidInput) as caught:
        registry.publish(manifest, payload, b"s")
    assert caught.value.kind == kind
    assert list(registry.location.list()) == []


def test_absent(registry):
    for call in (
        registry.manifest,
        registry.signature,
        registry.payload,
        registry.payload_size,
        lambda digest: registry.read_payload(digest, 0, 1),
    ):
        with pytest.raises(NotFound) as caught:
            call("0" * 64)
        assert caught.value.kind == "no_artifact"
        with pytest.raises(InvalidInput):
            call("../../etc/passwd")


@pytest.mark.parametrize("span", [(-1, 1), (0, -1), (2, 1)])
def test_bad_ranges(registry, span):
    digest = registry.publish(manifest_of(b"p"), b"p", b"s")
    with pytest.raises(InvalidInput) as caught:
        registry.read_payload(digest, *span)
    assert caught.value.kind == "out_of_range"


@pytest.mark.parametrize("num_done", [1, 2])
def test_a_killed_publisher_leaves_nothing_visible(registry, num_done):
    """Stop after the blob, and after the signature: nothing is visible, and it can be published."""
    manifest, payload = manifest_of(b"p"), b"p"
    digest = sha256_hex(manifest)
    registry.location.put_new(f"blobs/sha256/{sha256_hex(payload)}", payload)
    if num_done == 2:
        registry.location.put_new(f"artifacts/{digest}/signature.json", b"from a rotated key")
    assert registry.list() == []
    with pytest.raises(NotFound):
        registry.manifest(digest)
    assert registry.publish(manifest, payload, b"s") == digest
    assert registry.signature(digest) == b"s"


def test_damage_is_found(registry):
    payload = b"payload"
    digest = registry.publish(manifest_of(payload), payload, b"s")
    location = registry.location
    blob = f"blobs/sha256/{sha256_hex(payload)}"
    location.replace(blob, b"PAYLOAD")
    with pytest.raises(Corrupt) as caught:
        registry.payload(digest)
    assert caught.value.kind == "blob_checksum"
    with pytest.raises(Corrupt):
        registry.publish(manifest_of(payload), payload, b"s")
    location.replace(blob, b"pay")
    with pytest.raises(Corrupt):
        registry.read_payload(digest, 0, 7)
    location.delete(blob)
    for call in (registry.payload, lambda d: registry.read_payload(d, 0, 1)):
        with pytest.raises(Corrupt) as caught:
            call(digest)
        assert caught.value.kind == "artifact_incomplete"
    location.delete(f"artifacts/{digest}/signature.json")
    with pytest.raises(Corrupt) as caught:
        registry.signature(digest)
    assert caught.value.kind == "artifact_incomplete"
    location.replace(f"artifacts/{digest}/manifest.json", manifest_of(b"other"))
    with pytest.raises(Corrupt) as caught:
        registry.manifest(digest)
    assert caught.value.kind == "manifest_digest"


@given(st.lists(st.binary(max_size=20), max_size=12), st.integers(1, 5))
def test_pages_cover_everything_once(payloads, limit):
    registry = Registry(Location.open("memory://"))
    wanted = sorted({registry.publish(manifest_of(p), p, b"s") for p in payloads})
    found: list[str] = []
    while page := registry.list(after=found[-1] if found else None, limit=limit):
        assert len(page) <= limit
        found += page
    assert found == wanted


def test_bad_limits(registry):
    for limit in (0, 1001):
        with pytest.raises(InvalidInput):
            registry.list(limit=limit)
    with pytest.raises(InvalidInput):
        registry.list(after="x")
