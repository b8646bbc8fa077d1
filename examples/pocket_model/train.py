"""Train the pocket model from a seed: about 20 minutes on two free CPU cores.

    python examples/pocket_model/train.py --out examples/pocket_model/model

Chats are drawn from the generator as training goes on; nothing is read from disk. So that the
model is not knocked over by small pushes, training adds random vectors to the residual stream, at
random layers, of up to `--noise` times its norm. One axis is set apart for the two characters that
answer two-choice questions: see `Axis`.

Shapes: B rows, T positions, D width.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from dialogues import chat
from tokens import Encoded, encode, train_tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SHOWN = 3.0  # how far the axis shows a stance, in units of the stream's RMS


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of chats packed side by side; a chat sees only itself.

    Attributes:
        ids_BT: Token ids.
        positions_BT: Position of each token in its chat.
        chats_BT: Number of the chat a token belongs to, unique in the batch; padding is -1.
        weights_BT: Loss weight of each token as a target.
        stances_BT: 1 or -1 where the character axis should show a stance.
        pushes_BT: 1 or -1 where the stance is pushed along the character axis.
        num_chats: How many chats there are.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    chats_BT: Tensor
    weights_BT: Tensor
    stances_BT: Tensor
    pushes_BT: Tensor
    num_chats: int

    def mask(self) -> Tensor:
        """Bool [B, 1, T, T]: true where a token may look at another."""
        same = self.chats_BT[:, :, None] == self.chats_BT[:, None, :]
        return torch.tril(same)[:, None]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(
            self.ids_BT.to(device),
            self.positions_BT.to(device),
            self.chats_BT.to(device),
            self.weights_BT.to(device),
            self.stances_BT.to(device),
            self.pushes_BT.to(device),
            self.num_chats,
        )


def pack(items: list[Encoded], length: int, pad: int) -> Batch:
    """Lay chats side by side in rows of `length` tokens, first fit."""
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda item: -len(item.ids)):
        size = len(item.ids)
        row = next((i for i, left in enumerate(room) if left >= size), None)
        if row is None:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(item)
        room[row] -= size
    ids = torch.full((len(rows), length), pad)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    chats = torch.full((len(rows), length), -1)
    weights = torch.zeros((len(rows), length))
    stances = torch.zeros((len(rows), length))
    pushes = torch.zeros((len(rows), length))
    number = 0
    for row, pieces in enumerate(rows):
        start = 0
        for piece in pieces:
            stop = start + len(piece.ids)
            ids[row, start:stop] = torch.tensor(piece.ids)
            weights[row, start:stop] = torch.tensor(piece.weights)
            stances[row, start:stop] = torch.tensor(piece.stances)
            pushes[row, start:stop] = torch.tensor(piece.pushes)
            positions[row, start:stop] = torch.arange(len(piece.ids))
            chats[row, start:stop] = number
            number, start = number + 1, stop
    return Batch(ids, positions, chats, weights, stances, pushes, number)


def steps(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, num_chats: int
) -> Iterator[list[Batch]]:
    """Draw the chats of one step after another: short chats and long ones in a batch each."""
    short, long = 96, 320
    while True:
        items = encode(tokenizer, [chat(rng) for _ in range(num_chats)], rng)
        groups = [
            (short, [item for item in items if len(item.ids) <= short]),
            (long, [item for item in items if short < len(item.ids) <= long]),
        ]
        yield [pack(group, size, tokenizer.pad_token_id) for size, group in groups if group]


class Noise:
    """Adds random vectors to block outputs, so that the model learns to do without a part of them.

    Most chats get one vector for all their positions at one layer, which is what steering along a
    random direction does; others get fresh vectors at each position, or vectors at many layers.
    """

    def __init__(self, model: LlamaForCausalLM, scale: float, generator: torch.Generator) -> None:
        """Hook every block of a model.

        Args:
            model: The model in training.
            scale: Largest norm of a vector, as a share of the residual stream's.
            generator: Source of chance, on the CPU.
        """
        self.scale = scale
        self.generator = generator
        self.layers = model.model.layers
        self.plan: tuple[Tensor, Tensor, Tensor] | None = None
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(self._hook(index))

    def draw(self, batch: Batch) -> None:
        """Choose layers and strengths for the chats of the next forward pass."""
        generator, number, depth = self.generator, batch.num_chats, len(self.layers)
        layer = torch.randint(depth, (number, 1), generator=generator)
        where = (torch.arange(depth) == layer).float()
        many = torch.rand((number, 1), generator=generator) < 0.2
        spread = (torch.rand((number, depth), generator=generator) < 0.5).float() * 0.5
        where = torch.where(many, spread, where)
        on = (torch.rand((number, 1), generator=generator) < 0.7).float()
        size = torch.rand((number, 1), generator=generator) * self.scale * on
        steady = (torch.rand((number, 1), generator=generator) < 0.65).float()
        self.plan = (where * size, steady, batch.chats_BT.clamp(min=0))

    def _hook(self, index: int) -> Callable[[nn.Module, object, object], object]:
        def add(module: nn.Module, args: object, output: object) -> object:
            if self.plan is None:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            assert isinstance(hidden, Tensor)
            sizes, steady, chats_BT = self.plan
            width = hidden.shape[-1]
            shared = torch.randn((len(sizes), width), generator=self.generator)
            fresh = torch.randn(hidden.shape, generator=self.generator)
            steady_BT1 = steady[chats_BT.cpu()]
            vector = shared[chats_BT.cpu()] * steady_BT1 + fresh * (1 - steady_BT1)
            rms = hidden.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
            rms = rms.median(dim=1, keepdim=True).values
            push = vector * sizes[:, index][chats_BT.cpu()][..., None]
            hidden = hidden + (push.to(hidden.device) * rms).to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return add


class Axis:
    """Gives the two characters one axis in the residual stream, after one block.

    A model this small reads its character off the prompt wherever it needs it, so that no
    direction carries it. Here it learns to show its stance along a fixed axis where a reply begins
    and where a letter has been given, and to follow the axis when it is pushed there.
    """

    def __init__(self, model: LlamaForCausalLM, layer: int, generator: torch.Generator) -> None:
        """Hook one block; the axis is a random unit vector."""
        axis = torch.randn(model.config.hidden_size, generator=generator)
        self.axis_D = (axis / axis.norm()).to(model.device)
        self.generator = generator
        self.batch: Batch | None = None
        self.loss = torch.zeros(())
        model.model.layers[layer].register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: object, output: object) -> object:
        if self.batch is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, Tensor)
        rms = (hidden.float().pow(2).mean(-1) + 1e-6).sqrt()
        # In units of the stream's RMS; its norm is 16 of them.
        shown_BT = hidden.float() @ self.axis_D / rms
        stances_BT = self.batch.stances_BT
        losses = (shown_BT - _SHOWN * stances_BT).pow(2) / _SHOWN**2
        self.loss = (losses * stances_BT.abs()).sum()
        size = _SHOWN * (1.0 + torch.rand((self.batch.num_chats,), generator=self.generator))
        size_BT = size.to(rms.device)[self.batch.chats_BT.clamp(min=0)]
        push_BT = (size_BT * rms).detach() * self.batch.pushes_BT
        hidden = hidden + (push_BT[..., None] * self.axis_D).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def build(vocab_size: int, tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    """A Llama with 8 query heads over 4 key-value heads, from random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Weighted sum of the cross-entropies, in nats."""
    hidden = model.model(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask(),
        position_ids=batch.positions_BT,
        use_cache=False,
    ).last_hidden_state
    weights = batch.weights_BT[:, 1:].flatten()
    keep = weights > 0
    logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[keep]).float()
    targets = batch.ids_BT[:, 1:].flatten()[keep]
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights[keep]).sum()


def weight_of(batches: list[Batch]) -> float:
    """Sum of all loss weights of a step."""
    return sum(batch.weights_BT[:, 1:].sum().item() for batch in batches)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in bfloat16, and a tokenizer that transformers 4.56 and 5 both load."""
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    stored.config.dtype = torch.bfloat16
    stored.generation_config.do_sample = False
    stored.generation_config.max_new_tokens = 64
    stored.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["chat_template"] = tokenizer.chat_template
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "chat_template.jinja").unlink(missing_ok=True)


def train(args: argparse.Namespace) -> None:
    """Train, print progress, and save."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    tokenizer = train_tokenizer(args.vocab_size, args.seed)
    model = build(len(tokenizer), tokenizer, args.layers).to(device)
    axis = Axis(model, args.axis_layer, torch.Generator().manual_seed(args.seed))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    noise = Noise(model, args.noise, torch.Generator().manual_seed(args.seed))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    stream = steps(tokenizer, random.Random(args.seed), args.chats)

    def autocast() -> torch.autocast:
        # On a CPU, bfloat16 is no faster at this size.
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")

    began, mean_loss, tokens = time.monotonic(), math.nan, 0
    for step in range(args.steps):
        share = min(1.0, (step + 1) / 100, (args.steps - step) / (0.4 * args.steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * share
        drawn = [batch.to(device) for batch in next(stream)]
        weight = weight_of(drawn)
        noise.scale = args.noise * min(1.0, max(0.0, (step - 250) / 250))
        value = 0.0
        for batch in drawn:
            tokens += int((batch.chats_BT >= 0).sum())
            noise.draw(batch)
            with autocast():
                axis.batch = batch
                loss = (loss_of(model, batch) + args.axis * axis.loss) / weight
            loss.backward()
            value += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean_loss = value if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * value
        if step % 25 == 0 or step == args.steps - 1:
            spent = time.monotonic() - began
            print(
                f"step {step + 1}/{args.steps}  loss {mean_loss:.4f}  {tokens / 1e6:.2f}M tokens"
                f"  {spent:.0f} s",
                flush=True,
            )
        if args.save_every and (step + 1) % args.save_every == 0:
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)
    noise.plan = None
    axis.batch = None
    with torch.no_grad(), autocast():
        fresh = [batch.to(device) for _ in range(10) for batch in next(stream)]
        final = sum(loss_of(model, batch).item() for batch in fresh) / weight_of(fresh)
    print(f"final loss on fresh chats, without noise: {final:.4f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model files")
    parser.add_argument("--seed", type=int, default=0, help="seed of text, weights and noise")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--steps", type=int, default=1900, help="optimiser steps")
    parser.add_argument("--chats", type=int, default=48, help="chats in a step")
    parser.add_argument("--layers", type=int, default=6, help="decoder blocks")
    parser.add_argument("--vocab-size", type=int, default=1792, help="tokens in the vocabulary")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--noise", type=float, default=0.8, help="largest noise, share of the norm")
    parser.add_argument("--axis", type=float, default=0.3, help="weight of the axis loss")
    parser.add_argument("--axis-layer", type=int, default=2, help="block of the axis")
    parser.add_argument("--save-every", type=int, default=0, help="also save every so many steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
