"""Proposals: changes of channels that wait for somebody else's approval.

    proposals/NAME/00000043-0123456789abcdef.json

The number is the revision that the change would make: once that revision exists, whatever it is,
the proposal can no more be approved. The id is the beginning of the sha256 of the object's bytes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import takewhile
from typing import Literal

from store.channels import ChannelEntry, check_channel, is_channel
from store.digest import sha256_hex
from store.errors import Corrupt, InvalidInput, NotFound
from store.location import Location
from store.records import Record, parse_record

_ID_DIGITS = 16
_OBJECT = re.compile(r"([0-9]{8})-([0-9a-f]{16})\.json")


class Proposal(Record):
    """The stored object.

    Attributes:
        entry: What would be appended, without an approver.
    """

    schema_version: Literal[1] = 1
    entry: ChannelEntry


class Proposals:
    """Keeps proposals; safe to share between threads and processes. They are created and read,
    never changed; `store.collection` removes those that are past.

    Args:
        root: Where `proposals` lies.
    """

    def __init__(self, root: Location) -> None:
        self.location = root

    def add(self, entry: ChannelEntry) -> tuple[str, ChannelEntry]:
        """Keep an entry, as `ChannelLog.draft` gives it; its id. The same one may be added again.

        Raises:
            InvalidInput: kind "channel_entry", it is approved already; "channel_name".
        """
        if entry.approver is not None:
            message = (
                f"proposal for channel {entry.channel!r}: it names {entry.approver!r} as its "
                "approver, who is not known before it is approved; leave the approver out"
            )
            raise InvalidInput(message, kind="channel_entry")
        data = Proposal(entry=entry).to_bytes()
        proposal_id = sha256_hex(data)[:_ID_DIGITS]
        self.location.put_same(_key(entry.channel, entry.revision, proposal_id), data)
        return proposal_id, entry

    def get(self, channel: str, proposal_id: str) -> ChannelEntry:
        """What was proposed.

        Raises:
            InvalidInput: kind "channel_name".
            NotFound: kind "no_proposal".
            Corrupt: kind "proposal", it was altered.
        """
        for key in self.keys(channel):
            if _id_of(key) == proposal_id:
                with contextlib.suppress(NotFound):  # collected since the listing
                    return self.parse(self.location.get(key), key=key)
        message = (
            f"channel {channel!r} has no proposal {proposal_id!r} in {self.location.url}; look at "
            "those that are open"
        )
        raise NotFound(message, kind="no_proposal")

    def open(self, channel: str, revision: int) -> list[tuple[str, ChannelEntry]]:
        """Ids and entries of the proposals that would make `revision`, oldest first.

        Raises:
            InvalidInput: kind "channel_name".
            Corrupt: kind "proposal", one was altered.
        """
        found = []
        prefix = f"proposals/{channel}/{revision:08d}-"
        keys = self.keys(channel, after=revision - 1)
        for key in takewhile(lambda key: key.startswith(prefix), keys):
            with contextlib.suppress(NotFound):  # collected since the listing
                found.append((_id_of(key), self.parse(self.location.get(key), key=key)))
        return sorted(found, key=lambda item: (datetime.fromisoformat(item[1].time), item[0]))

    def channels(self) -> list[str]:
        """Names of the channels for which there may be proposals, sorted."""
        return [name for name in self.location.folders("proposals") if is_channel(name)]

    def keys(self, channel: str, *, after: int = 0) -> Iterator[str]:
        """Keys of a channel's proposals for revisions above `after`, ascending; other files do not
        count.

        Raises:
            InvalidInput: kind "channel_name".
        """
        prefix = f"proposals/{check_channel(channel)}"
        for info in self.location.list(prefix, after=f"{prefix}/{after + 1:08d}"):
            if _OBJECT.fullmatch(info.key.removeprefix(f"{prefix}/")):
                yield info.key

    def parse(self, data: bytes, *, key: str) -> ChannelEntry:
        """The entry in a proposal's bytes.

        Raises:
            Corrupt: kind "proposal", it is unreadable, was altered, or lies under a wrong name.
        """
        where = f"{self.location.url}/{key}"
        way_on = "remove it, and propose the change again"
        entry = parse_record(Proposal, data, where=where, kind="proposal", way_on=way_on).entry
        own_key = _key(entry.channel, entry.revision, sha256_hex(data)[:_ID_DIGITS])
        if own_key != key or entry.approver is not None or Proposal(entry=entry).to_bytes() != data:
            message = f"{where} was altered: its content belongs under {own_key}; {way_on}"
            raise Corrupt(message, kind="proposal")
        return entry


def _id_of(key: str) -> str:
    return key.removesuffix(".json")[-_ID_DIGITS:]


def _key(channel: str, revision: int, proposal_id: str) -> str:
    return f"proposals/{check_channel(channel)}/{revision:08d}-{proposal_id}.json"
