"""What both sides of the wire share stands in one place, and names of files are of files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from steering_service.client import connection
from steering_service.core import wire
from steering_service.core.errors import InvalidInput
from steering_service.server import app, status

ROOT = Path(__file__).resolve().parents[2]


def test_client_and_server_agree():
    assert connection.KIND_METADATA is status.KIND_METADATA is wire.KIND_METADATA
    assert connection.MAX_MESSAGE_BYTES is app.MAX_MESSAGE_BYTES is wire.MAX_MESSAGE_BYTES


@pytest.mark.parametrize("name", ["KIND_METADATA", "MAX_MESSAGE_BYTES", "_NODE_ID"])
def test_each_is_defined_once(name):
    sources = sorted((ROOT / "steering_service").rglob("*.py"))
    definition = re.compile(rf"^{name}\b.* = ", re.MULTILINE)
    found = [p.name for p in sources if definition.search(p.read_text(encoding="utf-8"))]
    assert found == ["wire.py"]


@pytest.mark.parametrize("node_id", ["a", "node-1", "_x", "A.b_c-9", "n" * 128])
def test_node_ids(node_id):
    assert wire.check_node_id(node_id) == node_id


@pytest.mark.parametrize("node_id", ["", ".a", "../x", "a/b", "n" * 129, "ü", "a\n"])
def test_what_is_no_node_id(node_id):
    with pytest.raises(InvalidInput) as caught:
        wire.check_node_id(node_id)
    assert caught.value.kind == "node_id"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("package", ["store", "steering_service", "protos"])
def test_documents_that_are_cited_exist(package):
    for path in sorted((ROOT / package).rglob("*")):
        if path.suffix in (".py", ".pyi", ".proto"):
            for cited in re.findall(r"\bdocs/[\w./-]+\.md\b", path.read_text(encoding="utf-8")):
                assert (ROOT / cited).is_file(), f"{path} cites {cited}"
