"""What is parsed from bytes that somebody else wrote: a function for each, and bytes to begin with.

A target may raise SteeringError and StoreError and nothing else, and what it accepts it must have
understood: where there are two ways to read the same bytes, both are tried and must agree.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rfc8785
import safetensors
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError
from securesystemslib.signer import SSlibKey

from steering_service.client.channel import Assignment, check_channel
from steering_service.client.credentials import Credentials
from steering_service.client.frames import split
from steering_service.client.revoked import RevocationFile
from steering_service.client.state import StateFile
from steering_service.core.address import check_address
from steering_service.core.artifact import (
    ModelReference,
    Policy,
    build,
    parse,
    parse_manifest,
)
from steering_service.core.canonical import read_canonical
from steering_service.core.controller import Controller
from steering_service.core.direction import Direction
from steering_service.core.errors import SteeringError
from steering_service.core.intervention import Intervention
from steering_service.core.revocation import Revocations, parse_revocations
from steering_service.core.signing import Signer, TrustRoots
from steering_service.core.site import Site
from steering_service.core.tensors import load_tensors
from steering_service.core.wire import check_node_id
from steering_service.server.board import Board, NodeState, dump_board, load_board
from steering_service.server.policy import Patterns, parse_policy
from steering_service.v1 import artifact_pb2
from store.backend import check_key
from store.channels import ChannelEntry, ChannelLog
from store.errors import StoreError
from store.layout import StreamLayout
from store.location import Location
from store.proposals import Proposal, Proposals
from store.records import CommitRecord, CompleteMarker, DamageMark, QuarantineRecord, parse_record
from store.registry import Registry
from store.shard import build_shard, decode_chunks, read_index
from store.uploads import Uploads

EXPECTED = (SteeringError, StoreError)
_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_SIGNER = Signer(_KEY)
_ROOTS = TrustRoots((SSlibKey.from_crypto(_KEY.public_key()),))
_FOLDER = Path(tempfile.mkdtemp(prefix="steerage-fuzz-"))
_TIME = "2026-11-22T11:00:00Z"


def _artifact(*, controller: bool = False) -> Any:
    vector_D = np.arange(1, 9, dtype=np.float32)
    site = Site("resid_post", 3)
    item = Intervention(Direction(site, vector_D, 1.5, 9.0, "difference_of_means"))
    network = None
    if controller:
        network = Controller(
            (Site("resid_post", 1),),
            *(np.ones((8, 2), np.float32), np.ones(2, np.float32)),
            *(np.ones((2, 2), np.float32), np.ones(2, np.float32)),
            threshold=0.5,
            mode="gated",
        )
    return build(
        [item],
        name="seed",
        model=ModelReference(name="pocket", fingerprint="a" * 64),
        policy=Policy(min_strength=-2.0, max_strength=2.0),
        controller=network,
        lineage={"a": [1.5, None, "ü", {}]},
    )


ARTIFACT = _artifact()
CONTROLLED = _artifact(controller=True)
REVOCATIONS = Revocations(
    schema_version=1,
    serial=3,
    artifacts=("0" * 64,),
    keys=("1" * 64,),
    floors={"prod": 7},
    actor="ada",
    time=_TIME,
    reason="a test",
)
ENTRY = ChannelEntry(
    channel="prod",
    revision=1,
    artifact=ARTIFACT.digest,
    strength=1.5,
    enabled=True,
    share=0.5,
    actor="ada",
    time=_TIME,
    reason="a test",
    previous="",
)
_LAYOUT = StreamLayout("z", 40, (1, 2), 4, "float32", rows_per_shard=32, rows_per_chunk=8)
_SHARD = bytes(build_shard(np.ones((32, 2, 4), np.float32), _LAYOUT))


def manifest(data: bytes) -> None:
    """`parse_manifest`; what it takes is canonical, and says no number that is none."""
    found = parse_manifest(data)
    assert rfc8785.dumps(json.loads(data)) == data
    assert math.isfinite(found.policy.min_strength)
    assert math.isfinite(found.policy.max_strength)
    assert found.payload.size >= 0


def payload(data: bytes) -> None:
    """`parse`, with a manifest that names exactly this payload."""
    named = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    for base in (ARTIFACT, CONTROLLED):
        value = json.loads(base.manifest_bytes) | {"payload": named}
        try:
            found = parse(rfc8785.dumps(value), data)
        except EXPECTED:
            continue
        for item in found.interventions:
            assert np.isfinite(item.direction.vector_D).all()


def tensors(data: bytes) -> None:
    """`load_tensors` reads what the safetensors library reads, and nothing else."""
    failures = (safetensors.SafetensorError, ValueError, KeyError, TypeError)
    try:
        expected = safetensors.numpy.load(data)
    except failures:
        expected = None
    try:
        found = load_tensors(data)
    except failures:
        found = None
    assert (found is None) == (expected is None), "one of two readers refuses it"
    if found is not None:
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.dtype == expected[name].dtype
            assert array.shape == expected[name].shape
            assert array.tobytes() == expected[name].tobytes()


def canonical(data: bytes) -> None:
    """`read_canonical` agrees with the reference about what is canonical."""
    failures = (ValueError, RecursionError, rfc8785.CanonicalizationError)
    try:
        value = json.loads(data)
        expected = rfc8785.dumps(value) == data
    except failures:
        expected = None
    try:
        found, is_canonical = read_canonical(data)
    except failures:
        is_canonical = None
    assert bool(is_canonical) == bool(expected), (is_canonical, expected)
    if is_canonical:
        assert rfc8785.dumps(found) == data


def frame(data: bytes) -> None:
    """`split` reads a DownloadResponse as protobuf does."""
    try:
        message = artifact_pb2.DownloadResponse.FromString(data)
    except DecodeError:
        message = None
    try:
        offset, chunk = split(data)
    except SteeringError:
        assert message is None
        return
    assert message is not None, "it took what is no message"
    assert (offset, bytes(chunk)) == (message.offset, message.chunk)


def envelope(data: bytes) -> None:
    """`TrustRoots.verify` and its kin: nothing is accepted but for what was signed."""
    _ROOTS.verify(data, ARTIFACT.manifest_bytes)
    _check_signed(data, _SIGNER.sign(ARTIFACT.manifest_bytes))


def revocation_envelope(data: bytes) -> None:
    """`TrustRoots.verify_revocations`."""
    found = _ROOTS.verify_revocations(data)
    assert found == REVOCATIONS
    _check_signed(data, _SIGNER.sign_revocations(REVOCATIONS.to_bytes()))


def _check_signed(accepted: bytes, signed: bytes) -> None:
    """The signature is one that was made, whatever else the envelope says."""
    found = {base64.b64decode(item["sig"]) for item in json.loads(accepted)["signatures"]}
    made = {base64.b64decode(item["sig"]) for item in json.loads(signed)["signatures"]}
    assert found & made, "a signature that nobody made was accepted"


def revocations(data: bytes) -> None:
    """`parse_revocations`."""
    found = parse_revocations(data)
    assert found.to_bytes() == data
    assert found.covers(found)


def revocation_file(data: bytes) -> None:
    """The list that a node keeps on its disk."""
    path = _written("revocations", data)
    kept = RevocationFile(path, _ROOTS)
    kept.restore()
    assert kept.current in (None, REVOCATIONS)


def channel_entry(data: bytes) -> None:
    """An entry of a channel's log, as the store reads it."""
    entry = ChannelLog(Location.open("memory://")).parse("prod", 1, data)
    assert entry.to_bytes() == data
    assert math.isfinite(entry.strength)
    assert 0 <= entry.share <= 1


def proposal(data: bytes) -> None:
    """A proposal."""
    key = f"proposals/prod/00000001-{hashlib.sha256(data).hexdigest()[:16]}.json"
    found = Proposals(Location.open("memory://")).parse(data, key=key)
    assert found.channel == "prod"


def records(data: bytes) -> None:
    """The other records of the store."""
    for model in (CommitRecord, QuarantineRecord, DamageMark, CompleteMarker, Proposal):
        try:
            found = parse_record(model, data, where="a test", kind="record")
        except EXPECTED:
            continue
        assert model.model_validate_json(found.to_bytes()) == found


def layout(data: bytes) -> None:
    """zarr.json of an activation cache."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(metadata, Mapping):
        StreamLayout.from_metadata(metadata)


def shard_index(data: bytes) -> None:
    """The index of a shard; the right checksum is put behind, or nothing would get further."""
    size = _LAYOUT.index_nbytes
    read_index(data[-size:], _LAYOUT, 0, where="a test")


def shard_chunks(data: bytes) -> None:
    """Chunks of a shard, cut to whole ones."""
    whole = len(data) // _LAYOUT.stored_chunk_nbytes * _LAYOUT.stored_chunk_nbytes
    if whole:
        decode_chunks(data[:whole], _LAYOUT, where="a test", layer=1)


def stored_manifest(data: bytes) -> None:
    """The registry's own look at a manifest, which knows less of it than the core does."""
    Registry(Location.open("memory://")).publish(data, ARTIFACT.payload_bytes, b"")


def policy(data: bytes) -> None:
    """The access policy, and its globs against names that are as odd."""
    found = parse_policy(data)
    for entry in found.identity:
        assert entry.certificate or entry.token_sha256
        for globs in (entry.channels, entry.models, entry.nodes):
            Patterns(globs).match("prod-" + "a" * 100)


def state_file(data: bytes) -> None:
    """A node's last good state on its disk."""
    found = StateFile(_written("state.json", data)).read()
    assert isinstance(found, Assignment)
    assert math.isfinite(found.strength)


def direction_file(data: bytes) -> None:
    """A direction that somebody hands over as a file."""
    found = Direction.load(_written("direction.safetensors", data))
    assert np.isfinite(found.vector_D).all()


def board(data: bytes) -> None:
    """What another replica noted of its nodes."""
    found = load_board(data)
    assert load_board(dump_board(found)) == found


def key_file(data: bytes) -> None:
    """Files of keys and certificates, and of a token."""
    path = _written("key.pem", data)
    for read in (
        lambda: TrustRoots.from_paths([path]),
        lambda: Signer.from_file(path),
        lambda: Credentials(ca=path).channel_credentials(),
        lambda: Credentials(ca=path, certificate=path, key=path).channel_credentials(),
        lambda: Credentials(ca=path, token=path).bearer_token(),
    ):
        try:
            read()
        except EXPECTED:
            continue


def names(data: bytes) -> None:
    """Sites, channels, node ids, addresses, keys of the store, names of pieces."""
    text = data.decode("utf-8", "surrogateescape")
    for read in (
        Site.parse,
        check_channel,
        check_node_id,
        lambda t: check_address(t, secure=True),
        lambda t: check_address(t, secure=False),
    ):
        try:
            read(text)
        except EXPECTED:
            continue
    try:
        key = check_key(text)
    except EXPECTED:
        return
    path = (_FOLDER / key).resolve()
    assert path.is_relative_to(_FOLDER.resolve()), "it leaves the store"
    location = Location.open("memory://")
    location.put_new(f"uploads/{'0' * 64}/{key}", b"x")
    assert Uploads(location).received("0" * 64) in range(2)


def _written(name: str, data: bytes) -> Path:
    path = _FOLDER / name
    path.write_bytes(data)
    return path


def _json(value: object) -> bytes:
    return rfc8785.dumps(value)


def _state() -> bytes:
    fields = dataclasses.asdict(Assignment("prod", 3, "0" * 64, 1.0, True, 0.5))
    return json.dumps({"schema_version": 1, **fields}).encode()


def _direction() -> bytes:
    path = _FOLDER / "seed.safetensors"
    ARTIFACT.interventions[0].direction.save(path)
    return path.read_bytes()


def _commit() -> bytes:
    return CommitRecord(
        capture="0" * 64, stream="z", shard=0, rows=(0, 8), num_bytes=8, sha256="1" * 64
    ).to_bytes()


def _pem() -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return _KEY.public_key().public_bytes(
        form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
    ) + _KEY.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


_POLICY = b"""
[[identity]]
name = "alice"
certificate = "spiffe://prod/alice"
token_sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
roles = ["operator", "reader"]
channels = ["prod-*", "[a-z]?"]
[[channel]]
name = "prod-*"
two_person = true
alone = ["off"]
[limits]
calls_per_s = 100
burst = 200
"""
_NODE = NodeState(node_id="node-1", channel="prod", connected=True, active_revision=3)

Target = Callable[[bytes], None]
TARGETS: dict[str, tuple[Target, list[bytes]]] = {
    "manifest": (
        manifest,
        [ARTIFACT.manifest_bytes, CONTROLLED.manifest_bytes, b"[" * 10_000],
    ),
    "payload": (
        payload,
        [ARTIFACT.payload_bytes, CONTROLLED.payload_bytes],
    ),
    "tensors": (
        tensors,
        [
            *(ARTIFACT.payload_bytes, CONTROLLED.payload_bytes),
            safetensors.numpy.save({"a": np.zeros((2, 0), np.float32)}, metadata={"b": "c"}),
            safetensors.numpy.save({"a": np.zeros(3, np.float16), "b": np.zeros(2, np.float32)}),
        ],
    ),
    "canonical": (
        canonical,
        [
            *(ARTIFACT.manifest_bytes, b"1.0", b"1e-05", b"-0", b"1e21", b"9007199254740993"),
            *(b'{"a":1,"a":2}', b'{"b":1,"a":2}', b'"\\u00fc"', b'"\xc3\xbc"', b"NaN", b"1e999"),
            *(
                b'"\\ud800"',
                b'"\\/"',
                b'"\x7f"',
                b'"\\u2028"',
                b'{"\\ud83d\\ude00":1,"\xef\xac\xb3":2}',
            ),
        ],
    ),
    "frame": (
        frame,
        [
            artifact_pb2.DownloadResponse(offset=o, chunk=b"chunk" * 9).SerializeToString()
            for o in (0, 1, 1 << 20, 2**64 - 1)
        ],
    ),
    "envelope": (envelope, [_SIGNER.sign(ARTIFACT.manifest_bytes), b"[" * 10_000]),
    "revocation_envelope": (
        revocation_envelope,
        [_SIGNER.sign_revocations(REVOCATIONS.to_bytes())],
    ),
    "revocations": (revocations, [REVOCATIONS.to_bytes()]),
    "revocation_file": (
        revocation_file,
        [_SIGNER.sign_revocations(REVOCATIONS.to_bytes())],
    ),
    "channel_entry": (channel_entry, [ENTRY.to_bytes()]),
    "proposal": (proposal, [Proposal(entry=ENTRY).to_bytes()]),
    "records": (records, [_commit(), Proposal(entry=ENTRY).to_bytes()]),
    "layout": (layout, [_json(_LAYOUT.array_metadata())]),
    "shard_index": (shard_index, [_SHARD[-_LAYOUT.index_nbytes :]]),
    "shard_chunks": (shard_chunks, [_SHARD[: -_LAYOUT.index_nbytes]]),
    "stored_manifest": (stored_manifest, [ARTIFACT.manifest_bytes]),
    "policy": (policy, [_POLICY]),
    "state_file": (state_file, [_state()]),
    "direction_file": (direction_file, [_direction()]),
    "board": (board, [dump_board(Board("replica", 1e9, [_NODE] * n)) for n in (1, 2000)]),
    "key_file": (key_file, [_pem(), b"a-token-of-letters\n"]),
    "names": (
        names,
        [
            *(b"resid_post.3", b"prod", b"node-1", b"127.0.0.1:8780", b"[::1]:80", b"a/b/c"),
            *(b"../x", b"/x", b"000000000000-1.part", b"channels/prod/00000001.json"),
        ],
    ),
}


def attempt(name: str, data: bytes) -> None:
    """Run a target; only errors that are meant are swallowed."""
    try:
        TARGETS[name][0](data)
    except EXPECTED:
        return
