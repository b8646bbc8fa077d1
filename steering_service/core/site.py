"""Site: where in a model activations are read or edited. Model-independent; adapters resolve it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from steering_service.core.errors import InvalidInput

Stream = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]
STREAMS: Final[tuple[Stream, ...]] = get_args(Stream)

_PATTERN: Final = re.compile(r"([a-z_]+)\.(0|[1-9]\d{0,5})(?:\.(0|[1-9]\d{0,5}))?")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A stream at a layer, or one head of it.

    ``Site.parse("resid_post.12")`` is the output of block 12 itself (layers count from 0), never
    Hugging Face's ``hidden_states[-1]``, which is after the final norm. ``Site.parse("z.13.18")``
    is query head 18 of layer 13 at the input of the attention output projection: where ITI and HSI
    read and write.

    Args:
        stream: One of `STREAMS`.
        layer: Block number, from 0.
        head: Query head number, from 0; only the stream ``z`` has heads.

    Raises:
        InvalidInput: Unknown stream, negative number, or a head on a stream without heads.
    """

    stream: Stream
    layer: int
    head: int | None = None

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise InvalidInput(
                f"unknown stream {self.stream!r} in a site; expected one of {', '.join(STREAMS)}",
                kind="site_stream",
            )
        if self.layer < 0 or (self.head is not None and self.head < 0):
            raise InvalidInput(f"layers and heads count from 0, got {self!r}", kind="site_number")
        if self.head is not None and self.stream != "z":
            raise InvalidInput(
                f"only the stream 'z' has heads, got head {self.head} at {self.stream!r}",
                kind="site_head",
            )

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read the canonical name, ``stream.layer`` or ``z.layer.head``.

        Raises:
            InvalidInput: The text is not a site.
        """
        match = _PATTERN.fullmatch(text)
        if match is None or match[1] not in STREAMS:
            raise InvalidInput(
                f"{text!r} is not a site; expected stream.layer or z.layer.head, such as "
                f"'resid_post.12' or 'z.13.18', with a stream of {', '.join(STREAMS)}",
                kind="site_syntax",
            )
        stream: Stream = next(s for s in STREAMS if s == match[1])
        return cls(stream, int(match[2]), None if match[3] is None else int(match[3]))

    def __str__(self) -> str:
        base = f"{self.stream}.{self.layer}"
        return base if self.head is None else f"{base}.{self.head}"
