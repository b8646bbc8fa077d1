"""Log lines: one JSON object each, whatever the fields hold."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering_service.server.access import Identity, set_caller
from steering_service.server.identities import Identities
from steering_service.server.logs import JsonFormatter


def line_of(message="node accepted", *args, extra=None, exc_info=None, stack=None):
    record = logging.getLogger("steering_service.test").makeRecord(
        "steering_service.test",
        logging.WARNING,
        __file__,
        1,
        message,
        args,
        exc_info,
        extra=extra,
        sinfo=stack,
    )
    text = JsonFormatter().format(record)
    assert len(text.splitlines()) == 1
    return json.loads(text, parse_constant=pytest.fail)


def test_fields_follow_the_event():
    line = line_of(extra={"node": "node-1", "revision": 7, "active": None, "share": 0.5})
    assert list(line) == [
        *("time", "level", "logger", "event"),
        *("node", "revision", "active", "share"),
    ]
    time = datetime.fromisoformat(line.pop("time"))
    assert time.utcoffset() == timedelta(0)
    assert line == {
        "level": "WARNING",
        "logger": "steering_service.test",
        "event": "node accepted",
        "node": "node-1",
        "revision": 7,
        "active": None,
        "share": 0.5,
    }


def test_what_json_lacks_is_text():
    line = line_of(
        extra={
            "path": Path("/a/b"),
            "strength": float("nan"),
            "why": ValueError("two\nlines"),
            "nested": {1: {"set": {1}}, "list": (1, b"x", float("-inf"))},
            "odd": "\ud800\u2028",
        }
    )
    assert line["path"] == "/a/b"
    assert line["strength"] == "nan"
    assert line["why"] == "two\nlines"
    assert line["nested"] == {"1": {"set": "{1}"}, "list": [1, "b'x'", "-inf"]}
    assert line["odd"] == "\ud800\u2028"


def test_own_names_are_not_overwritten():
    line = line_of("rpc %s", "refused", extra={"event": "mine", "level": 3, "exception": "x"})
    assert (line["event"], line["level"]) == ("rpc refused", "WARNING")
    assert (line["event_"], line["level_"], line["exception_"]) == ("mine", 3, "x")
    assert "exception" not in line


def test_exceptions_and_stacks_are_text():
    try:
        {}["lost"]
    except KeyError:
        line = line_of("rpc failed", exc_info=sys.exc_info(), stack="Stack (most recent call last)")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("KeyError: 'lost'")
    assert line["stack"] == "Stack (most recent call last)"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@given(st.text(), VALUES)
def test_any_field_makes_one_line_of_json(message, value):
    line = line_of(message, extra={"field": value})
    assert line["event"] == message
    assert "field" in line


def test_it_formats_for_a_real_handler(tmp_path):
    handler = logging.FileHandler(tmp_path / "log", encoding="utf-8")
    handler.setFormatter(JsonFormatter())
    log = logging.getLogger("steering_service.test_handler")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        log.info("watch started", extra={"channel": "prod"})
        log.warning("node refused", extra={"kind": "unsigned"})
    finally:
        log.removeHandler(handler)
        handler.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["event"], line.get("channel"), line.get("kind")) for line in lines] == [
        ("watch started", "prod", None),
        ("node refused", None, "unsigned"),
    ]


def test_the_caller_is_named_inside_its_call():
    def inside():
        set_caller(Identity("ada", frozenset(), Identities()))
        return line_of(), line_of(extra={"caller": "eve"})

    own, given = contextvars.copy_context().run(inside)
    assert own["caller"] == "ada"
    assert given["caller"] == "eve"
    assert "caller" not in line_of()
