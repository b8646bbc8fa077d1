"""Requests of every RPC, made from the descriptors: so a new RPC or field is attacked by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

import steering_service.v1

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for module in pkgutil.iter_modules(steering_service.v1.__path__)
    if module.name.endswith("_pb2")
    for service in importlib.import_module(
        f"steering_service.v1.{module.name}"
    ).DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
ODD_NAMES = (
    *("", " ", ".", "..", "../prod", "../../etc/passwd", "/etc/passwd", "prod/../prod", "a/b"),
    *("prod/", "C:\\prod", "..\\prod", "%2e%2e%2fprod", "~", "-", "prod.", ".prod", "prod\n"),
    *("a\0b", "\0", "PROD", "prød", "проd", "\u202eprod", "p\u0301rod", "\U0001f600", "\ufeff"),
    *("x" * 64, "x" * 256, "x" * 5000, "0" * 63, "0" * 64, "g" * 64, "A" * 64, "con", "nul"),
    *("'; drop table", "${jndi:ldap://x}", "{}", "%s%n", "__class__", "prod\r\nx: y"),
)
ODD_NUMBERS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
)
_INTEGERS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
}


def new(descriptor: Descriptor, **fields: Any) -> Message:
    return message_factory.GetMessageClass(descriptor)(**fields)


def messages(
    descriptor: Descriptor,
    names: st.SearchStrategy[str],
    blobs: st.SearchStrategy[bytes],
    depth: int = 4,
) -> st.SearchStrategy[Message]:
    """Messages of a type with any of its fields set; what the values are, two strategies say."""

    def scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                return names
            case FieldDescriptor.TYPE_BYTES:
                return blobs
            case FieldDescriptor.TYPE_BOOL:
                return st.booleans()
            case FieldDescriptor.TYPE_DOUBLE:
                return st.sampled_from(ODD_NUMBERS) | st.floats()
            case FieldDescriptor.TYPE_ENUM:
                # Open enums: a reader meets numbers that it does not know.
                return st.sampled_from([0, 1, 2, 3, 99, 2**31 - 1, -1])
            case FieldDescriptor.TYPE_MESSAGE:
                return messages(field.message_type, names, blobs, depth - 1)
        low, high = _INTEGERS[field.type]
        few = st.sampled_from([0, 1, 2, 3, 500, 501, 1000, high, high - 1, low])
        return few | st.integers(low, high)

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        message = new(descriptor)
        for field in descriptor.fields:
            if field.message_type is not None and depth == 0:
                continue
            if not draw(st.booleans()):
                continue
            value = scalar(field)
            if field.is_repeated:
                values = draw(st.lists(value, max_size=3))
                getattr(message, field.name).extend(values)
            elif field.message_type is not None:
                getattr(message, field.name).CopyFrom(draw(value))
            else:
                setattr(message, field.name, draw(value))
        return message

    return build()


def places(descriptor: Descriptor, kinds: set[int]) -> Iterator[tuple[str, ...]]:
    """Paths of all fields of some types within a message, through messages within it."""
    for field in descriptor.fields:
        if field.type in kinds:
            yield (field.name,)
        elif field.message_type is not None and not field.message_type.full_name.startswith(
            "google."
        ):
            yield from ((field.name, *rest) for rest in places(field.message_type, kinds))


def filled(descriptor: Descriptor, place: tuple[str, ...], value: Any) -> Message:
    """A message in which only one field is set."""
    message = new(descriptor)
    inner = message
    for name in place[:-1]:
        holder = getattr(inner, name)
        inner = holder.add() if hasattr(holder, "add") else holder
    name = place[-1]
    if hasattr(getattr(inner, name), "append"):
        getattr(inner, name).append(value)
    else:
        setattr(inner, name, value)
    return message


@st.composite
def mangled(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with some flipped, cut off, repeated, or with a length that lies."""
    mutable = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, max(0, len(mutable) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "huge"])):
            case "flip" if mutable:
                mutable[where] ^= draw(st.integers(1, 255))
            case "cut":
                del mutable[where:]
            case "insert":
                mutable[where:where] = draw(st.binary(max_size=8))
            case "repeat":
                mutable += mutable[where : where + 64]
            case "huge":
                mutable[where : where + 1] = b"\xff\xff\xff\xff\x7f"
    return bytes(mutable)
