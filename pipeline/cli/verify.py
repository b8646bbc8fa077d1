"""The command that checks what lies in the store."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pipeline.cli.app import app
from pipeline.cli.auditing import audit_registry, print_audit
from pipeline.cli.batch import planning
from pipeline.cli.options import (
    DEFAULT_STORE,
    AsJson,
    StoreUrl,
    TrustPaths,
    print_json,
    progress,
    stdout,
    where,
)

if TYPE_CHECKING:
    from store.activations import ActivationCache
    from store.errors import Corrupt
    from store.location import Location
    from store.verification import Problem

_DIGEST = re.compile(r"[0-9a-f]{6,64}")


@app.command()
def verify(
    caches: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIGEST|RUN.toml]...",
            help="Caches to check, by digest (its first digits are enough) or run file. All of the "
            "store, registry and channels too, when none is named.",
        ),
    ] = None,
    store: StoreUrl = DEFAULT_STORE,
    trust: TrustPaths = None,
    as_json: AsJson = False,
) -> None:
    """Read all that lies in a store and compare every byte with what was recorded.

    Activation caches: names each damaged shard and leaves a mark of it, so that `steerage extract`
    on the cache's run file computes exactly those again. Registry and channels: digests and sizes
    of artifacts and payloads, the hash chain of every channel's log, proposals, revocation lists;
    with --trust also that trusted keys have signed them. Exits with 1 where something is damaged.
    Safe while services and other commands work on the store.

    Example: steerage verify --store s3://bucket/steerage --trust publisher.pub
    """
    from store.location import Location

    root = Location.open(store)
    digests = _digests(root, caches or [], store)
    start = time.perf_counter()
    reports = [_check(root, digest) for digest in digests]
    # A cache that is named is asked about; nothing named is everything.
    registry = None if caches else audit_registry(root, trust or ())
    walked = [*reports, *([registry] if registry else [])]
    is_sound = not any(report["problems"] for report in walked)
    summary = {
        "sound": is_sound,
        "caches": reports,
        "registry": registry,
        "bytes": sum(report["bytes"] for report in walked),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if as_json:
        print_json(summary)
    else:
        _print(summary, where(root))
    if not is_sound:
        raise typer.Exit(1)


def _digests(root: Location, named: Sequence[str], store: str) -> list[str]:
    from pipeline.errors import InvalidInput, NotFound
    from store.activations import ActivationCache

    known = ActivationCache.list_digests(root)
    if not named:
        return known
    chosen = []
    for name in named:
        if Path(name).suffix == ".toml" or not _DIGEST.fullmatch(name):
            chosen.append(planning(Path(name), store)[2].cache.digest)
            continue
        found = [digest for digest in known if digest.startswith(name)]
        if not found:
            raise NotFound(
                f"no cache {name} in {where(root)}, which has {len(known)}; `steerage verify` "
                "without a name checks and lists all of them",
                kind="no_cache",
            )
        if len(found) > 1:
            raise InvalidInput(
                f"{len(found)} caches in {where(root)} begin with {name}: {', '.join(found)}; "
                "give more digits",
                kind="ambiguous_digest",
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def _check(root: Location, digest: str) -> dict[str, Any]:
    """The report of one cache; one that cannot be opened is reported as damaged."""
    from store.activations import ActivationCache
    from store.errors import Corrupt, StoreError
    from store.repair import find_and_mark

    report: dict[str, Any] = {
        "capture": digest,
        "cache": where(root.child(f"caches/{digest}")),
        "complete": False,
        "shards": 0,
        "shards_missing": 0,
        "bytes": 0,
        "problems": [],
        "unmarked": None,
        "kept_rows_of": None,
        "no_cache": False,
    }
    try:
        cache = ActivationCache.open(root, digest)
    except Corrupt as error:
        report["problems"].append(_whole(error))
        return report
    # Of a cache that `extract --no-cache` has written, the capture that it is of.
    report["kept_rows_of"] = cache.capture.get("kept", {}).get("of")
    with progress(f"verify {digest[:12]}", cache.num_shards * len(cache.streams)) as (bar, task):

        def on_checked(num_bytes: int) -> None:
            report["bytes"] += num_bytes
            speed = report["bytes"] / 2**20 / (bar.tasks[task].elapsed or 1e-9)
            damaged = f" · {num} damaged" if (num := len(report["problems"])) else ""
            bar.update(task, advance=1, note=f"shards · {speed:,.0f} MiB/s{damaged}")

        def on_unmarked(error: StoreError) -> None:
            report["unmarked"] = str(error)

        for problem in find_and_mark(cache, on_checked, on_unmarked):
            report["problems"].append(_described(cache, problem))
    num_missing = 0 if cache.is_complete else len(cache.missing())
    if num_missing == cache.num_shards and root.folders("moments"):
        from pipeline.reduction.kept import find_record

        try:
            report["no_cache"] = find_record(root, digest) is not None
        except Corrupt as error:
            report["problems"].append(_whole(error))
    return report | {
        "complete": cache.is_complete,
        "shards": cache.num_shards,
        "shards_missing": num_missing,
    }


def _whole(error: Corrupt) -> dict[str, Any]:
    """A problem of the cache as a whole."""
    whole = {"stream": None, "shard": None, "rows": None}
    return whole | {"kind": error.kind, "detail": str(error)}


def _described(cache: ActivationCache, problem: Problem) -> dict[str, Any]:
    from store.errors import REPAIR

    shard = rows = None
    if problem.stream:
        shard = problem.shard
        range_of_rows = cache.layout(problem.stream).shard_rows(shard)
        rows = [range_of_rows.start, range_of_rows.stop]
    return {
        "stream": problem.stream or None,
        "shard": shard,
        "rows": rows,
        "kind": problem.kind,
        # What to do is said once, at the end.
        "detail": problem.detail.removesuffix(f"{REPAIR}").rstrip(";, "),
    }


def _print(summary: dict[str, Any], store: str) -> None:
    for report in summary["caches"]:
        num_problems = len(report["problems"])
        state = f"[red]{num_problems} damaged[/]" if num_problems else "[green]sound[/]"
        missing = f", {report['shards_missing']} not written yet" * bool(report["shards_missing"])
        if report["no_cache"]:
            missing = ", none written: extracted with --no-cache"
        elif report["kept_rows_of"]:
            missing += f", kept rows of {report['kept_rows_of'][:12]}"
        _line(f"[bold]{report['capture']}[/]  {state}, {report['shards']} shards{missing}")
        for problem in report["problems"]:
            name = "the cache as a whole"
            if problem["stream"]:
                first, stop = problem["rows"]
                name = f"{problem['stream']} shard {problem['shard']}, rows {first} to {stop - 1}"
            _line(f"  [red]{name}[/]: {escape(problem['detail'])} ({problem['kind']})")
        if report["unmarked"]:
            _line(
                "  [yellow]not marked for repair[/], so `steerage extract` will repair only what "
                f"is gone or cut off: {escape(report['unmarked'])}"
            )
    if summary["registry"]:
        print_audit(summary["registry"])
    _line(
        f"{len(summary['caches'])} caches in {escape(store)}, {summary['bytes']:,} bytes read in "
        f"{summary['seconds']:.1f} s"
    )
    damaged = [
        report
        for report in summary["caches"]
        if any(problem["stream"] for problem in report["problems"])
    ]
    if any(not report["kept_rows_of"] for report in damaged):
        _line(
            "run `steerage extract RUN.toml` on the cache's run file: it computes only these again"
        )
    if any(report["kept_rows_of"] for report in damaged):
        _line(
            "run `steerage extract RUN.toml --no-cache` on the run file of the kept rows: it "
            "computes all of it again, and puts only these right"
        )


def _line(text: str) -> None:
    # Never wrapped or coloured by its words: a digest or a path that is cut cannot be copied.
    stdout.print(text, soft_wrap=True, highlight=False)
