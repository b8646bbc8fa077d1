"""What a replica lays down in the store about its nodes, as bytes: JSON, compressed if large."""

from __future__ import annotations

import unicodedata
import zlib
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from steering_service.core.errors import Corrupt

MAX_NODES: Final = 20_000
"""Nodes on a board; the ones seen last."""

_PLAIN_BYTES: Final = 64 << 10
# 20,000 nodes with everything that one can hold are less.
_MAX_BYTES: Final = 256 << 20
_MAX_TEXT: Final = 1000

Text = Annotated[str, Field(max_length=_MAX_TEXT)]
Count = Annotated[int, Field(ge=0, lt=1 << 64)]
Time = Annotated[float, Field(ge=0, le=253402300799, allow_inf_nan=False)]


@dataclass(slots=True)
class NodeState:
    """One node on one channel. Times are seconds since 1970; 0: never.

    Attributes:
        since: Since when it is connected, or gone.
        active_revision: What it runs, as it last said, with `identity` and `active_since`.
        acked: It said so in a Report; otherwise in Subscribe, when `active_since` is only the time
            of that.
        nack_revision: The last revision that it refused; 0: none.
        telemetry: Its last counters, a serialised Telemetry in base64.
    """

    node_id: Text
    channel: Text
    replica: Text = ""
    connected: bool = False
    since: Time = 0.0
    active_revision: Count = 0
    identity: Text = ""
    active_since: Time = 0.0
    acked: bool = False
    nack_revision: Count = 0
    nack_kind: Text = ""
    nack_reason: Text = ""
    nack_time: Time = 0.0
    model_fingerprint: Text = ""
    client: Text = ""
    caller: Text = ""
    revocations_serial: Count = 0
    telemetry: Annotated[str, Field(max_length=32 << 10)] = ""


@dataclass(slots=True)
class Board:
    """All nodes of one replica, and when it wrote that down."""

    replica: Text
    time: Time
    nodes: Annotated[list[NodeState], Field(max_length=MAX_NODES)]
    schema_version: Literal[1] = 1


@dataclass(slots=True)
class _Loose:
    """A Board, whatever its nodes are."""

    replica: Text
    time: Time
    nodes: Annotated[list[Any], Field(max_length=MAX_NODES)]
    schema_version: Literal[1] = 1


_BOARD: Final = TypeAdapter(Board)
_LOOSE: Final = TypeAdapter(_Loose)
_NODE: Final = TypeAdapter(NodeState)


def dump_board(board: Board) -> bytes:
    """The board as bytes, for `load_board`.

    Raises:
        Corrupt: kind "board", a text holds what JSON cannot.
    """
    try:
        data = _BOARD.dump_json(board, exclude_defaults=True)
    except PydanticSerializationError as error:
        raise Corrupt(f"the nodes of {board.replica!r}: {error}", kind="board") from error
    return data if len(data) <= _PLAIN_BYTES else zlib.compress(data, 1)


def load_board(data: bytes) -> Board:
    """What `dump_board` wrote.

    Raises:
        Corrupt: kind "board", it is something else.
    """
    try:
        return _BOARD.validate_json(_unpacked(data))
    except (ValueError, zlib.error) as error:  # ValidationError is a ValueError
        raise _corrupt(error) from error


def load_sound(data: bytes) -> tuple[Board, Corrupt | None]:
    """The board as far as it can be read, and what is wrong with the first node left out, if any:
    one entry that another version wrote, or a bug, should not hide the other nodes.

    Raises:
        Corrupt: kind "board", it is no board.
    """
    try:
        return load_board(data), None
    except Corrupt:
        pass
    try:
        loose = _LOOSE.validate_json(_unpacked(data))
    except (ValueError, zlib.error) as error:
        raise _corrupt(error) from error
    nodes: list[NodeState] = []
    first: Corrupt | None = None
    for node in loose.nodes:
        try:
            nodes.append(_NODE.validate_python(node))
        except ValidationError as error:
            if first is None:
                name = plain(str(node.get("node_id") if isinstance(node, dict) else node), 200)
                first = Corrupt(f"node {name!r} left out: {_first(error)}", kind="board_node")
    return Board(loose.replica, loose.time, nodes), first


def plain(text: str, limit: int = _MAX_TEXT) -> str:
    """A text from outside, fit for logs and terminals: cut off, no control characters."""
    text = text[:limit]
    if text.isprintable():
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if _controls(c) else c for c in text)


def _unpacked(data: bytes) -> bytes:
    if data.startswith(b"{"):
        return data
    return zlib.decompressobj().decompress(data, _MAX_BYTES)  # what is cut off is no JSON


def _corrupt(error: Exception) -> Corrupt:
    return Corrupt(f"not a replica's list of nodes: {_first(error)}", kind="board")


def _controls(character: str) -> bool:
    # Controls, directions and surrogates; white space becomes visible as well.
    return unicodedata.category(character)[0] in "CZ" and character != " "


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
