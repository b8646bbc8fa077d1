"""The board of the replicas."""

from __future__ import annotations

import os
import time

import pytest

from store.errors import InvalidInput
from store.location import Location
from store.replicas import ReplicaBoard


def test_each_sees_the_others(root):
    board = ReplicaBoard(root)
    assert board.others("a", 60) == {}
    for replica in ("a", "b", "pod-7.x_Y"):
        board.write(replica, replica.encode())
    board.write("b", b"again")
    assert board.others("a", 60) == {"b": b"again", "pod-7.x_Y": b"pod-7.x_Y"}
    assert board.others("unheard", 60).keys() == {"a", "b", "pod-7.x_Y"}
    board.remove("b")
    board.remove("b")
    assert board.others("a", 60).keys() == {"pod-7.x_Y"}
    root.put_new("replicas/notes.txt", b"stray")
    assert board.others("a", 60).keys() == {"pod-7.x_Y"}


def test_old_words_do_not_count_by_the_stores_clock(tmp_path):
    board = ReplicaBoard(Location.open(tmp_path))
    for age_s, replica in ((0, "fresh"), (50, "own"), (90, "recent"), (150, "gone")):
        board.write(replica, b"")
        when = time.time() - 7200 - age_s  # the store's clock is two hours late
        os.utime(tmp_path / "replicas" / f"{replica}.json", (when, when))
    assert board.others("own", 60).keys() == {"fresh", "recent"}
    assert board.others("unheard", 60) == {}


@pytest.mark.parametrize("replica", ["", ".a", "a/b", "..", "a.", "a" * 129, "é", None])
def test_bad_names(root, replica):
    board = ReplicaBoard(root)
    for call in (
        lambda: board.write(replica, b""),
        lambda: board.others(replica, 1),
        lambda: board.remove(replica),
    ):
        with pytest.raises(InvalidInput) as caught:
            call()
        assert caught.value.kind == "key"
    assert list(root.list()) == []
