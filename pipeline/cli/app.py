"""The command line: commands, exit codes, and what a user sees of an error.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
3 a gate refused.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.logging import RichHandler

from pipeline.errors import OUR_ERRORS, GateRefused
from steering_service.core.errors import Refused

app = typer.Typer(
    name="steerage",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Extract activations of language models, turn them into steering directions, and deliver
    those to inference nodes.

    A run file (TOML) says what is computed; flags say where and how. The usual order is
    plan, extract, reduce, report, select (or train), publish, serve, promote, steer, evaluate;
    each step finds what the one before has left in the store, and can be run again at any time.
    `steerage repro` does all of it for a published method.""",
)


DELIVERY: Final = "Delivery"
"""Heading of the commands that publish, roll out and look on, in `steerage --help`."""


class _WithReason(logging.Formatter):
    """An event for people, with why it happened, which a record has beside it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        reasons = [str(getattr(record, name)) for name in ("kind", "why") if hasattr(record, name)]
        return ": ".join([text, *reasons])


@app.callback()
def _configure(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens, and show tracebacks.")
    ] = False,
) -> None:
    # The only place that configures logging; never the root of an application that imports us.
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    handler.setFormatter(_WithReason("%(message)s"))
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        handlers=[handler],
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        os.environ["STEERAGE_TRACEBACK"] = "1"


def commands() -> typer.Typer:
    """The command line with all of its commands."""
    # Imported here so that `app` exists when they register their commands.
    from pipeline.cli import (  # noqa: F401
        batch,
        channels,
        comparing,
        evaluate,
        node,
        operate,
        registry,
        report,
        repro,
        revoking,
        select,
        status,
        train,
        verify,
    )

    return app


def main() -> None:
    """Run the command line; the process's exit code says how it went."""
    try:
        commands()()
    except OUR_ERRORS as error:
        if os.environ.get("STEERAGE_TRACEBACK"):
            raise
        print(f"steerage: {error}\n({error.kind}; -v shows more)", file=sys.stderr)
        sys.exit(3 if isinstance(error, (GateRefused, Refused)) else 1)
    except SystemExit as ending:
        # typer turns Ctrl-C into this, and says nothing.
        if ending.code == 130:
            print(
                "steerage: interrupted; what is finished is kept, run it again to go on",
                file=sys.stderr,
            )
        raise
    except Exception as error:
        if os.environ.get("STEERAGE_TRACEBACK"):
            raise
        print(
            f"steerage: unexpected {type(error).__name__}: {error}\n"
            "This is a bug: please report it with the output of the same command with -v",
            file=sys.stderr,
        )
        sys.exit(1)
