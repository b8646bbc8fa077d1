"""Run the pocket model: replies, activations, and pushes along directions, with plain hooks.

It shares no code with Steerage, so that its figures are a check from outside.

Shapes: N prompts, L layers, D width, H heads, E width of a head.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Message = dict[str, str]
Row = dict[str, object]


def read_rows(path: Path, **wanted: object) -> list[dict[str, object]]:
    """The rows of a JSON lines file whose fields have the wanted values."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def user(text: object, system: str | None = None) -> list[Message]:
    """A chat of one user turn, after a system prompt if there is one."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": str(text)}]


class Pocket:
    """The model with its tokenizer, in float32 on the CPU or a GPU."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load from a folder of `save_pretrained`."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.to(device).eval()
        self.layers = self.model.model.layers

    def render(self, chats: Sequence[list[Message]]) -> list[str]:
        """Chats as text that ends where the assistant's reply begins."""
        rendered: list[str] = self.tokenizer.apply_chat_template(
            list(chats), tokenize=False, add_generation_prompt=True
        )
        return rendered

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, add_special_tokens=False
        ).to(self.model.device)
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def replies(
        self, chats: Sequence[list[Message]], max_new_tokens: int = 48, batch: int = 128
    ) -> list[str]:
        """Greedy replies, without the token that ends the turn (kept if it never came)."""
        texts = self.render(chats)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = [""] * len(texts)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = self._encode([texts[i] for i in chosen])
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[
                :, inputs["input_ids"].shape[1] :
            ]
            for i, text in zip(
                chosen, self.tokenizer.batch_decode(output, skip_special_tokens=True), strict=True
            ):
                found[i] = text
        return found

    @torch.no_grad()
    def activations(self, texts: Sequence[str], position: int = -1, heads: bool = False) -> Tensor:
        """Float32 activations at one position counted from the end of each text.

        Returns:
            [L, N, D] block outputs, or [L, N, H, E] inputs of the output projections if `heads`.
        """
        kept: list[list[Tensor]] = [[] for _ in self.layers]

        def keep(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: object = None) -> None:
                value = args[0] if heads else _hidden(output)
                kept[index].append(value[:, position].clone())

            return hook

        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                if heads:
                    handle = layer.self_attn.o_proj.register_forward_pre_hook(keep(index))
                else:
                    handle = layer.register_forward_hook(keep(index))
                stack.callback(handle.remove)
            for start in range(0, len(texts), 128):
                self.model.model(**self._encode(texts[start : start + 128]), use_cache=False)
        stacked = torch.stack([torch.cat(parts) for parts in kept])
        return stacked.unflatten(-1, (8, -1)) if heads else stacked

    @contextlib.contextmanager
    def pushed(
        self, pushes: dict[int, Tensor], heads: bool = False, everywhere: bool = False
    ) -> Iterator[None]:
        """Add a vector at some layers while replies are made.

        Args:
            pushes: Layer to vector [D], added to the block output (to the input of the output
                projection if `heads`).
            heads: Which of the two sites.
            everywhere: Push all positions; otherwise the last position of the prompt and every
                generated one.
        """

        def push(value: Tensor, vector: Tensor) -> Tensor:
            if everywhere:
                return value + vector
            return torch.cat([value[:, :-1], value[:, -1:] + vector], dim=1)

        def after(vector: Tensor) -> Callable[..., object]:
            def hook(module: nn.Module, args: object, output: object) -> object:
                value = push(_hidden(output), vector)
                return (value, *output[1:]) if isinstance(output, tuple) else value

            return hook

        def before(vector: Tensor) -> Callable[..., object]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> object:
                return (push(args[0], vector), *args[1:])

            return hook

        with contextlib.ExitStack() as stack:
            for index, vector in pushes.items():
                layer = self.layers[index]
                if heads:
                    handle = layer.self_attn.o_proj.register_forward_pre_hook(before(vector))
                else:
                    handle = layer.register_forward_hook(after(vector))
                stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def reply_loss(self, pairs: Sequence[tuple[list[Message], str]]) -> float:
        """Mean cross-entropy of given replies, in nats a token."""
        total, count = 0.0, 0
        for chat, reply in pairs:
            prompt = self.render([chat])[0]
            start = self._encode([prompt])["input_ids"].shape[1]
            ids = self._encode([prompt + reply + self.tokenizer.eos_token])["input_ids"]
            logits = self.model(ids).logits[0, start - 1 : -1]
            total += nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
            count += ids.shape[1] - start
        return total / count


def _hidden(output: object) -> Tensor:
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value


def share(flags: Sequence[bool]) -> float:
    """Percentage of true values, to one decimal."""
    return round(100 * sum(flags) / len(flags), 1)


def refused(reply: str, phrases: Sequence[str]) -> bool:
    """Whether a reply begins with one of the refusal phrases."""
    return reply.strip().lower().startswith(tuple(phrases))


def chosen(reply: str) -> str:
    """The letter form that a reply settles on, " (A)" or " (B)"; empty if none or both."""
    found = [letter for letter in (" (A)", " (B)") if letter.strip() in reply]
    return found[0] if len(found) == 1 else ""
