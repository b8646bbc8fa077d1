"""Flags that several commands share, and how results are shown."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from store.location import Location

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN.toml", help="Run file; see examples/ for some to start from.")
]
StoreUrl = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="STEERAGE_STORE",
        help="A directory, or s3://bucket/prefix, gs://…, az://…",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, one object a line, for machines.")
]
Device = Annotated[
    Literal["cpu", "cuda"],
    typer.Option("--device", help="What workers compute on."),
]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Most worker processes at a time.")]
MinWorkers = Annotated[
    int,
    typer.Option("--min-workers", min=1, help="Workers that are kept when there is less to do."),
]
CpusPerWorker = Annotated[
    float,
    typer.Option("--cpus-per-worker", min=0.1, help="CPUs that Ray reserves for each worker."),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        min=0,
        help="GPUs that Ray reserves for each worker, such as 0.5 or 2; by default 1 on cuda.",
        show_default=False,
    ),
]
EngineFlag = Annotated[
    Literal["auto", "resident", "streamed", "sharded"],
    typer.Option(
        "--engine",
        help="resident: the model lies on a worker's device whole; sharded: on all GPUs of a "
        "worker together; streamed: its blocks are loaded one by one, for models larger than the "
        "memory; auto: what the memory allows. The activations are the same.",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Write no activations: the Moments of the training rows, and some rows for the "
        "methods and scores that need rows.",
    ),
]
KeepRows = Annotated[
    int | None,
    typer.Option(
        "--keep-rows",
        min=1,
        help="With --no-cache: rows that are kept, in whole pairs; 8192 unless said otherwise.",
        show_default=False,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray", help="A Ray cluster, such as 'auto'. Without it, a local Ray is started."
    ),
]
TrustPaths = Annotated[
    list[Path] | None,
    typer.Option("--trust", help="Public key, or folder of them, that is trusted; repeatable."),
]
Channel = Annotated[str, typer.Argument(help="Name of the channel, such as 'refusal'.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

DEFAULT_STORE = "steerage-store"

stderr = Console(stderr=True)
stdout = Console()


def show(summary: Mapping[str, Any], as_json: bool, title: str) -> None:
    """Print a result: lines for people or one JSON object for machines."""
    if as_json:
        print_json(summary)
        return
    # Not a table: a digest or a path that is cut or wrapped cannot be copied.
    width = max(map(len, summary))
    stdout.print(title, style="bold")
    for key, value in summary.items():
        stdout.print(f"  {key:<{width}}  {_text(value)}", soft_wrap=True, markup=False)


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout; a number that JSON lacks (NaN) becomes null."""
    print(json.dumps(_finite(values), sort_keys=True, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        # Numbers are the shape of an array; all else is an enumeration.
        between = " × " if all(isinstance(v, int) for v in value) else ", "
        return between.join(str(v) for v in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def line(text: str, *, style: str | None = None) -> None:
    """One line of stdout as it is: never wrapped, cut or coloured by its words.

    A digest or a path that is cut cannot be copied, and what others wrote is no markup.
    """
    stdout.print(printable(text), style=style, soft_wrap=True, markup=False, highlight=False)


def printable(text: str) -> str:
    """Text on one line, without what could move a terminal's cursor: others have written it."""
    return "".join(char if char.isprintable() else " " for char in text)


def count_text(number: int, noun: str) -> str:
    """`1 object`, `2 objects`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size_text(num_bytes: float) -> str:
    """Bytes for people, such as `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


def age_text(seconds: float) -> str:
    """How long ago, in one unit: `4s`, `12m`, `3h`, `5d`."""
    seconds = max(seconds, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def time_text(time: datetime) -> str:
    """A time in UTC to the second, as RFC 3339 has it."""
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def confirm(question: str, yes: bool) -> None:
    """Ask on the terminal before something that cannot be taken back; without one, demand `--yes`.

    Raises:
        Exit: The answer was no.
        BadParameter: There is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask on; give --yes")
    # Not on stdout, where results go.
    if not typer.confirm(question, err=True):
        stderr.print("nothing was changed", highlight=False)
        raise typer.Exit(1)


def where(location: Location) -> str:
    """A location as a user would name it: a path on this machine, or a URL."""
    return str(location.local_path() or location.url)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[tuple[Progress, Any]]:
    """A progress bar on stderr; nothing where stderr is no terminal."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=False,
        disable=not stderr.is_terminal,
    ) as bar:
        yield bar, bar.add_task(label, total=total, note="")


@contextmanager
def transfer(label: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr of bytes that travel; nothing where stderr is no terminal.

    Yields:
        To be called with the number of bytes that have arrived so far, all together.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=num_bytes)
        yield lambda done: bar.update(task, completed=done)


def present(device: str) -> str:
    """A device of this process, for commands that load the model themselves.

    Raises:
        InvalidInput: ``cuda``, and PyTorch sees no GPU here.
    """
    import torch

    from pipeline.errors import InvalidInput

    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("torch sees no GPU on this machine; use --device cpu", kind="device")
    return device
