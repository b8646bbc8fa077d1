"""The command of an inference node: steer."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from pipeline.cli.app import DELIVERY, app
from pipeline.cli.connecting import Service, connecting
from pipeline.cli.options import AsJson, print_json, stderr, stdout
from pipeline.errors import GateRefused, NotFound


@app.command(rich_help_panel=DELIVERY)
@connecting
def steer(
    channel: Annotated[str, typer.Argument(help="Channel to follow.")],
    model: Annotated[Path, typer.Option("--model", help="Model folder.")],
    trust: Annotated[
        list[Path],
        typer.Option("--trust", help="Public key, or folder of them, that is trusted; repeatable."),
    ],
    service: Service,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Prompt to answer; repeatable. Without it: a chat."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    cache: Annotated[
        Path, typer.Option("--cache", help="Where artifacts are kept, to start from next time.")
    ] = Path("~/.cache/steerage"),
    node: Annotated[
        str | None, typer.Option("--node", help="Name of this node; by default the host's.")
    ] = None,
    wait_s: Annotated[
        float, typer.Option("--wait", help="Seconds to wait for the channel's first artifact.")
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Run a model that follows a channel, and answer prompts with it.

    Signature, model fingerprint and strength limits are checked here, on the node. The channel may
    change at any time: the next answer follows it. With no service, the last good artifact is used.
    """
    from pipeline.evaluation.generate import ChatPrompt, generate
    from pipeline.extraction.models import ModelInfo, load_model, load_tokenizer
    from steering_service.adapters.transformers import fits, steered
    from steering_service.client.active import Deployment
    from steering_service.client.subscription import Subscription
    from steering_service.core.signing import TrustRoots

    info = ModelInfo.read(model)
    with stderr.status("loading the model"):
        tokenizer = load_tokenizer(model)
        loaded = load_model(model, info.dtype)
    subscription = Subscription(
        service.address,
        channel=channel,
        node_id=node or socket.gethostname(),
        cache_dir=cache.expanduser(),
        trust_roots=TrustRoots.from_paths(trust),
        model_fingerprint=info.fingerprint,
        check=fits(loaded),
        credentials=service.credentials,
    )

    def answer(text: str) -> None:
        with steered(loaded, subscription.active) as steering:
            [reply] = generate(
                loaded,
                tokenizer,
                [ChatPrompt(text, system)],
                max_new_tokens=max_new_tokens,
            )
            deployed = steering.deployed
            if isinstance(deployed, Deployment):
                steered_too = int(deployed.artifact is not None)
                subscription.telemetry.count(deployed, requests=1, steered_requests=steered_too)
            _print_answer(text, reply, deployed, as_json)

    with subscription:
        with stderr.status(f"waiting for channel {channel!r} at {service.address}"):
            _settle(subscription, wait_s)
        if prompt:
            for text in prompt:
                answer(text)
            return
        stderr.print("Ask away; an empty line or Ctrl-D ends.", highlight=False)
        while text := _ask():
            answer(text)


def _settle(subscription: Any, wait_s: float) -> None:
    """Wait until the node runs what its channel asks for, or has its last good artifact."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        status, current = subscription.status, subscription.active.current
        if status.connected and current.revision >= max(status.head_revision, 1):
            return
        if status.refused_revision is not None and status.refused_revision == status.head_revision:
            break
        time.sleep(0.02)
    status, current = subscription.status, subscription.active.current
    if current.revision == 0 and status.refused_revision is not None:
        raise GateRefused(
            f"channel {subscription.channel!r}: this node refuses revision "
            f"{status.refused_revision}: {status.last_error}",
            kind="assignment_refused",
        )
    problem = status.last_error or "the channel has no entry yet; `steerage promote` makes one"
    if current.revision == 0:
        raise NotFound(
            f"channel {subscription.channel!r}: nothing to run after {wait_s:g} s: {problem}",
            kind="channel_silent",
        )
    stderr.print(
        f"[yellow]running the last good revision {current.revision}[/]: {escape(problem)}",
        highlight=False,
    )


def _ask() -> str:
    # Not input(), which would write its prompt to stdout, where the answers go.
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _print_answer(prompt: str, reply: str, deployed: Any, as_json: bool) -> None:
    artifact = deployed.artifact.digest if deployed.artifact else None
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "answer": reply,
                "artifact": artifact,
                "strength": deployed.strength,
                "revision": deployed.revision,
            }
        )
        return
    how = f"{artifact[:12]} at {deployed.strength:+g}" if artifact else "unsteered"
    stdout.print(f"[dim]r{deployed.revision} {how}[/]  {escape(reply)}", highlight=False)
