"""The error tree is a contract: kinds are append-only, and errors survive pickling."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from store.errors import (
    KINDS,
    Conflict,
    Corrupt,
    InvalidInput,
    NotFound,
    StoreError,
    Unavailable,
)

RELEASED = set(
    """
    no_object no_cache no_stream no_layer no_shard not_committed no_artifact no_channel
    no_revision exists differs not_deterministic cache_differs signature_differs
    revision_taken incomplete url key out_of_range not_a_directory permission_denied
    memory_location digest json layout values rows index file_name manifest payload
    channel_name channel_entry shard_checksum shard_index shard_size shard_missing
    array_metadata capture_digest record complete_marker blob_checksum manifest_digest
    artifact_incomplete channel_chain channel_gap no_space no_hard_links io object_store
    """.split()  # noqa: SIM905  (a column of quotes would hide the names)
)


def test_no_released_kind_is_lost():
    assert RELEASED <= KINDS


def test_every_kind_is_raised_somewhere():
    folder = Path(__file__).parents[2] / "store"
    text = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "errors.py")
    assert set(re.findall(r'kind="(\w+)"', text)) == KINDS


@pytest.mark.parametrize("cls", [NotFound, Conflict, InvalidInput, Corrupt, Unavailable])
def test_errors_survive_pickling(cls):
    error = pickle.loads(pickle.dumps(cls("what, where", kind="io")))
    assert type(error) is cls
    assert isinstance(error, StoreError)
    assert (str(error), error.kind) == ("what, where", "io")
