"""Audit: one damaged object of every kind is found, under its key; a sound store has none."""

from __future__ import annotations

import itertools

import pytest

from store.audit import audit
from store.channels import ChannelLog
from store.digest import canonical_json, sha256_hex
from store.errors import Unavailable
from store.location import Location
from store.proposals import Proposals
from store.registry import Registry
from store.revocations import RevocationLog


class Untrusted(Exception):
    kind = "signature_untrusted"


def verify_signature(envelope, manifest):
    if envelope != sign(manifest):
        raise Untrusted("no trusted key signed this")


def verify_revocations(serial, envelope):
    if envelope != sign(b"%d" % serial):
        raise Untrusted("no trusted key signed this")


def sign(data):
    return b"signed " + sha256_hex(data).encode()


def manifest_of(payload, **more):
    named = {"sha256": sha256_hex(payload), "size": len(payload)}
    return canonical_json({"payload": named, **more})


def publish(root, payload, **more):
    manifest = manifest_of(payload, **more)
    return Registry(root).publish(manifest, payload, sign(manifest))


def fill(root):
    """A store with some of everything; the digest of an artifact that is in use."""
    publish(root, b"unused")
    publish(root, b"")
    digest = publish(root, b"payload")
    change = {"artifact": digest, "strength": 1.0, "enabled": True, "share": 1.0}
    change |= {"actor": "alice", "reason": "test"}
    log = ChannelLog(root)
    for revision in range(4):
        log.append("prod", expected_revision=revision, **change)
    log.append("dev", expected_revision=0, **change | {"artifact": None})
    for number in range(2):
        time = f"2026-11-21T18:40:0{number}Z"
        Proposals(root).add(log.draft("prod", expected_revision=4, time=time, **change))
    for serial in (1, 2, 3):
        RevocationLog(root).append(serial, sign(b"%d" % serial))
    return digest


def check(root, **options):
    given = {"verify_signature": verify_signature, "verify_revocations": verify_revocations}
    findings = list(audit(root, **given | options))
    assert all(finding.detail for finding in findings)
    return [(finding.key, finding.kind) for finding in findings]


def flip(root, key, at=-1, bit=1):
    data = bytearray(root.get(key))
    data[at] ^= bit
    root.replace(key, data)


BLOB = f"blobs/sha256/{sha256_hex(b'payload')}"


def test_a_sound_store(root):
    assert check(root) == []
    fill(root)
    num_bytes = []
    assert check(root, on_checked=num_bytes.append) == []
    assert sum(num_bytes) == sum(info.size for info in root.list())
    assert list(audit(root)) == []  # without keys, signatures are not looked at


def test_strays_are_not_ours(root):
    fill(root)
    for key in ("blobs/sha256/notes.txt", "blobs/x", "channels/prod/notes", "proposals/x/y", "z"):
        root.put_new(key, b"stray")
    assert check(root) == []


def test_a_flipped_byte_in_a_payload(root):
    fill(root)
    flip(root, BLOB)
    assert check(root) == [(BLOB, "blob_checksum")]


def test_a_payload_cut_off(root):
    fill(root)
    root.replace(BLOB, b"pay")
    assert check(root)[0] == (BLOB, "blob_checksum")


def test_a_missing_payload(root):
    fill(root)
    root.delete(BLOB)
    assert check(root) == [(BLOB, "artifact_incomplete")]


def test_a_manifest_that_lies_about_the_size(root):
    fill(root)
    lie = canonical_json({"payload": {"sha256": sha256_hex(b"payload"), "size": 8}})
    root.put_new(f"artifacts/{sha256_hex(lie)}/signature.json", sign(lie))
    root.put_new(f"artifacts/{sha256_hex(lie)}/manifest.json", lie)
    assert check(root) == [(BLOB, "payload")]


def test_a_flipped_byte_in_a_manifest(root):
    digest = fill(root)
    flip(root, f"artifacts/{digest}/manifest.json")
    assert check(root) == [(f"artifacts/{digest}/manifest.json", "manifest_digest")]
    root.delete(f"artifacts/{digest}/signature.json")
    assert check(root) == [
        (f"artifacts/{digest}/manifest.json", "manifest_digest"),
        (f"artifacts/{digest}/signature.json", "artifact_incomplete"),
    ]


@pytest.mark.parametrize("manifest", [b"{}", b"[", b'{"payload": 1}'])
def test_what_is_no_manifest(root, manifest):
    fill(root)
    digest = sha256_hex(manifest)
    root.put_new(f"artifacts/{digest}/signature.json", sign(manifest))
    root.put_new(f"artifacts/{digest}/manifest.json", manifest)
    assert check(root) == [(f"artifacts/{digest}/manifest.json", "manifest")]


def test_a_missing_manifest_that_a_channel_names(root):
    digest = fill(root)
    root.delete(f"artifacts/{digest}/manifest.json")
    wanted = [(f"channels/prod/0000000{revision}.json", "no_artifact") for revision in range(1, 5)]
    assert check(root) == wanted


def test_a_flipped_byte_in_a_signature(root):
    digest = fill(root)
    flip(root, f"artifacts/{digest}/signature.json")
    assert check(root) == [(f"artifacts/{digest}/signature.json", "signature_untrusted")]


def test_a_missing_signature(root):
    digest = fill(root)
    root.delete(f"artifacts/{digest}/signature.json")
    assert check(root) == [(f"artifacts/{digest}/signature.json", "artifact_incomplete")]


def test_every_flipped_byte_of_a_channel_entry():
    """Its bytes are named by the entry after it, so that whatever it still says, it shows."""
    root = Location.open("memory://")
    fill(root)
    key = "channels/prod/00000002.json"
    whole = root.get(key)
    for at, bit in itertools.product(range(len(whole)), (1, 0x80)):
        flip(root, key, at, bit)
        assert check(root)[0] in [
            (key, "channel_chain"),
            (key, "no_artifact"),
            ("channels/prod/00000003.json", "channel_chain"),
        ]
        root.replace(key, whole)


def test_a_flipped_byte_in_the_middle_of_a_chain(root):
    fill(root)
    key = "channels/prod/00000002.json"
    root.replace(key, root.get(key).replace(b"alice", b"bobby"))
    assert check(root) == [("channels/prod/00000003.json", "channel_chain")]
    flip(root, key, at=0)
    assert check(root) == [(key, "channel_chain")]


def test_gaps_in_a_chain(root):
    fill(root)
    root.delete("channels/prod/00000001.json")
    root.delete("channels/prod/00000003.json")
    assert check(root) == [
        ("channels/prod/00000001.json", "channel_gap"),
        ("channels/prod/00000003.json", "channel_gap"),
    ]


def test_a_flipped_byte_in_a_proposal(root):
    fill(root)
    key = next(info.key for info in root.list("proposals"))
    for at in (0, 40, -1):
        whole = root.get(key)
        flip(root, key, at)
        assert check(root) == [(key, "proposal")]
        root.replace(key, whole)


def test_a_flipped_byte_in_a_revocation_list(root):
    fill(root)
    flip(root, "revocations/00000002.json")
    assert check(root) == [("revocations/00000002.json", "signature_untrusted")]


def test_a_missing_revocation_list(root):
    fill(root)
    root.delete("revocations/00000001.json")
    assert check(root) == [("revocations/00000001.json", "revocation_gap")]


def test_damage_in_many_places_is_found_in_one_walk(root):
    digest = fill(root)
    wanted = [
        (BLOB, "blob_checksum"),
        (f"artifacts/{digest}/signature.json", "signature_untrusted"),
        ("channels/prod/00000002.json", "channel_chain"),
        ("revocations/00000003.json", "signature_untrusted"),
    ]
    for key, _ in wanted:
        flip(root, key, at=0)
    assert check(root) == wanted


def test_bugs_and_outages_are_no_findings(root):
    fill(root)

    def buggy(envelope, manifest):
        raise ZeroDivisionError

    def cut_off(serial, envelope):
        raise Unavailable("the network is down", kind="object_store")

    with pytest.raises(ZeroDivisionError):
        check(root, verify_signature=buggy)
    with pytest.raises(Unavailable):
        check(root, verify_revocations=cut_off)
