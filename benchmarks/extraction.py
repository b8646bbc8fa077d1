"""Extraction beside its peers: the same prompts, model, machine and threads, in one run.

    make bench-extraction    # installs the peers, then all cases
    python benchmarks/extraction.py --questions FILE --limit 40 --rounds 1 --cases pairs  # a look

Every contestant runs in its own process with two threads in all (ours: two workers of one thread;
a peer: torch.set_num_threads(2)). Contestants take turns within a round; figures are medians over
rounds. Before a peer's time counts, its rows are compared with plain transformers run on one text
at a time. All give every layer's resid_post at the last token; those that can, z as well.

Three times are taken of each run, and every ratio below is given for all three:

    NAME               processes up and models loaded, ours as the peers': from the prompts' texts
                       to the finished result. A peer ends with arrays in memory. Ours reads,
                       renders, tokenises, plans, passes the parity gate, computes through Ray Data,
                       writes to disk and seals; Ray has been started, and the time from the plan
                       until the first worker begins (it starts and loads the model) is left out.
    NAME_with_start    the same with that time in ours, and a peer's still without its own.
    NAME_cold          the whole command: from the process's start to the finished result; ours
                       until `steerage extract` has ended and Ray is down.

Headlines (a ratio of times: how many times faster we are, if not said otherwise):

    pairs_vs_best_peer               questions with both answers: the fastest of all peers
    pairs_vs_typical_peer            the fastest of unsorted transformers, TransformerLens, nnsight
                                     and steering-vectors
    long_system_prompt_vs_best_peer  the same under one system prompt of 800 tokens, on the first
                                     --long-questions questions, for us as for the peers
    unshared_vs_forward              distinct prompts of 64 to 256 tokens: our prompts/s over those
                                     of the decoder body alone on perfectly packed tokens
    rss_growth_10x                   peak memory (PSS of the process tree) of `steerage extract` at
                                     ten times the prompts over once
    ray_two_workers                  speed of two workers over one, one thread each
    streamed_vs_resident             speed of the streamed engine over the resident one
    pairs_vs_best_peer_gpu           on --device cuda: pairs, one worker, an 8B shape in bf16
    mfu_resident, mfu_streamed       on --device cuda: model FLOPs of unique tokens (blocks and
                                     attention) over the measured peak of a large bf16 product,
                                     `unshared` prompts; mfu_streamed_fitting is its name
                                     if the model would fit the card (--layers makes it deeper)

A peer that fails, or whose rows are wrong, is shown as failed with the reason and has no time; if
ours does, the exit code is 1. `warm_cpu_s` in the JSON is the CPU time of all of a contestant's
processes: on a machine with other work it says more than the clock, but no headline uses it.

A table goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch
from extraction_peers import inputs, tables
from extraction_peers.contest import (
    VARIANTS,
    Bout,
    Result,
    contest,
    median,
    ours_two_ways,
    ratio,
    running,
    say,
    vs_peers,
)
from extraction_peers.contestants import PEERS, TYPICAL
from extraction_peers.gpu import flops, peak_flops
from extraction_peers.processes import OURS, Bench, ContestantFailed, python_of
from extraction_peers.reference import unique_tokens

from pipeline.extraction.workers import extract
from pipeline.report.environment import environment

CPU_CASES: Final = (
    "pairs",
    "long_system_prompt",
    "unshared",
    "rss",
    "ray_two_workers",
    "streamed_vs_resident",
)
GPU_CASES: Final = ("pairs", "mfu")


def main() -> None:
    """Run the chosen cases."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="steerage-bench-") as name:
        folder = Path(name)
        on_gpu = arguments.device == "cuda"
        shape: inputs.Shape = "8B" if on_gpu else "60M"
        model = inputs.build_model(folder / "model", shape, arguments.questions, arguments.layers)
        bout = Bout(
            bench=Bench(
                work=folder,
                model=model,
                dtype="bfloat16" if on_gpu else "float32",
                device=arguments.device,
                threads=(os.cpu_count() or 1) if on_gpu else 2,
            ),
            folder=folder,
            questions=arguments.questions,
            peers=tuple(arguments.contestants),
            rounds=arguments.rounds,
            limit=arguments.limit,
            long_questions=arguments.long_questions,
            workers=1 if on_gpu else 2,
        )
        result: Result = {
            "benchmark": "extraction",
            "environment": environment(),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "model": {"shape": shape, "dtype": bout.bench.dtype, "layers": arguments.layers},
            "rounds": bout.rounds,
            "limit": bout.limit,
            "cases": {},
        }
        for case in arguments.cases:
            try:
                outcome = CASES[case](bout)
            except ContestantFailed as error:
                # The other cases are worth having all the same; the exit code tells.
                outcome = {"failed": str(error), "headlines": {}}
            result["cases"][case] = outcome
            result |= outcome.pop("headlines")
            tables.show(case, outcome)
    tables.show_headlines(result)
    line = json.dumps(result, sort_keys=True, allow_nan=False)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, sort_keys=True, indent=1) + "\n")
    print(line)
    outcomes = result["cases"].values()
    if any("failed" in o or "failed" in o.get("contestants", {}).get(OURS, {}) for o in outcomes):
        sys.exit(1)


def pairs(bout: Bout) -> Result:
    """Contrastive pairs as they stand."""
    case = inputs.build_pairs(bout.folder, bout.bench.model, bout.questions, bout.limit)
    outcome = contest(bout, case, bout.peers)
    suffix = "_gpu" if bout.bench.device == "cuda" else ""
    headlines = vs_peers(f"pairs_vs_best_peer{suffix}", outcome, PEERS)
    headlines |= vs_peers(f"pairs_vs_typical_peer{suffix}", outcome, TYPICAL)
    return outcome | {"headlines": headlines}


def long_system_prompt(bout: Bout) -> Result:
    """The same under a system prompt that is ten times as long as the questions."""
    count = bout.long_questions if bout.limit is None else min(bout.long_questions, bout.limit)
    case = inputs.build_long_system_prompt(bout.folder, bout.bench.model, bout.questions, count)
    outcome = contest(bout, case, bout.peers)
    headlines = vs_peers("long_system_prompt_vs_best_peer", outcome, PEERS)
    return outcome | {"headlines": headlines}


def unshared(bout: Bout) -> Result:
    """Prompts with nothing to share, beside the bare forward."""
    case = inputs.build_unshared(
        bout.folder, bout.bench.model, bout.scaled(inputs.UNSHARED_PROMPTS)
    )
    outcome = contest(bout, case, ["bare_forward"])
    headlines = {
        f"unshared_vs_forward{variant}": ratio(
            median(outcome, "bare_forward", peer), median(outcome, OURS, ours)
        )
        for variant, ours, peer in VARIANTS
    }
    return outcome | {"headlines": headlines}


def rss(bout: Bout) -> Result:
    """Memory at once and at ten times the prompts."""
    peaks = {}
    for times in (1, 10):
        case = inputs.repeat_with_changes(
            bout.folder, bout.bench.model, bout.questions, bout.limit, times
        )
        say(f"rss: {len(case.texts)} prompts")
        run = bout.bench.run_command(case, bout.workers, watch_memory=True)
        peaks[times] = run.peak_bytes
    return {
        "peak_bytes": {f"{times}x": peak for times, peak in peaks.items()},
        "headlines": {"rss_growth_10x": ratio(peaks[10], peaks[1])},
    }


def ray_two_workers(bout: Bout) -> Result:
    """One worker and two."""
    case = inputs.build_unshared(bout.folder, bout.bench.model, bout.scaled(1000), "ray")
    return ours_two_ways(
        bout,
        case,
        "ray_two_workers",
        {
            "one_worker": partial(bout.bench.run_ours, case, 1),
            "two_workers": partial(bout.bench.run_ours, case, 2),
        },
    )


def streamed_vs_resident(bout: Bout) -> Result:
    """The streamed engine on a model that would fit."""
    if "engine" not in inspect.signature(extract).parameters:
        reason = "pipeline.extraction.workers.extract has no parameter 'engine'"
        return {"not_run": reason, "headlines": {"streamed_vs_resident": None}}
    case = inputs.build_unshared(bout.folder, bout.bench.model, bout.scaled(1000), "streamed")
    return ours_two_ways(
        bout,
        case,
        "streamed_vs_resident",
        {
            engine: partial(bout.bench.run_ours, case, bout.workers, engine)
            for engine in ("resident", "streamed")
        },
    )


def mfu(bout: Bout) -> Result:
    """How much of the card's arithmetic is used for tokens that had to be computed."""
    case = inputs.build_unshared(
        bout.folder, bout.bench.model, bout.scaled(inputs.UNSHARED_PROMPTS)
    )
    peak = peak_flops(bout.bench.dtype)
    _, nodes, attended = unique_tokens(case, bout.bench.model)
    work = flops(bout.bench.model, nodes, attended)
    engines: list[str | None] = [None]
    if "engine" in inspect.signature(extract).parameters:
        engines = ["resident", "streamed"]
    weights = sum(file.stat().st_size for file in bout.bench.model.glob("*.safetensors"))
    fits = weights < torch.cuda.get_device_properties(0).total_memory
    seconds: dict[str, list[float]] = {engine or "resident": [] for engine in engines}
    for _ in range(bout.rounds):
        for engine in engines:
            run = bout.bench.run_ours(case, bout.workers, engine)
            seconds[engine or "resident"].append(running(run))
    used = {
        engine: ratio(work, statistics.median(taken) * peak) for engine, taken in seconds.items()
    }
    streamed = "mfu_streamed_fitting" if fits else "mfu_streamed"
    headlines = {"mfu_resident": used["resident"], streamed: used.get("streamed")}
    return {
        "peak_flops": peak,
        "model_flops": work,
        "running_s_rounds": seconds,
        "headlines": headlines,
    }


CASES: Final[dict[str, Callable[[Bout], Result]]] = {
    "pairs": pairs,
    "long_system_prompt": long_system_prompt,
    "unshared": unshared,
    "rss": rss,
    "ray_two_workers": ray_two_workers,
    "streamed_vs_resident": streamed_vs_resident,
    "mfu": mfu,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--questions",
        type=Path,
        required=True,
        help="JSONL of question, answer_matching_behavior, answer_not_matching_behavior, such as "
        "coordinate-other-ais.jsonl",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--cases", nargs="+", choices=sorted(CASES), help="default: all of the device's"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default 3; medians are over these")
    parser.add_argument("--limit", type=int, help="a quick look: the first N questions only")
    parser.add_argument(
        "--long-questions",
        type=int,
        default=40,
        help="questions of long_system_prompt, default 40: peers take 900 tokens for each prompt",
    )
    parser.add_argument(
        "--contestants", nargs="*", choices=PEERS, default=PEERS, help="default: all peers"
    )
    parser.add_argument("--layers", type=int, help="another depth of the model than its shape's")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    if not arguments.questions.is_file():
        parser.error(f"--questions {arguments.questions}: no such file")
    if arguments.cases is None:
        arguments.cases = GPU_CASES if arguments.device == "cuda" else CPU_CASES
    missing = sorted(
        {str(python_of(p)) for p in arguments.contestants if not python_of(p).exists()}
    )
    if missing:
        parser.error(
            f"environments of peers are not there: {', '.join(missing)}; `make bench-peers` "
            "installs them, --contestants chooses others"
        )
    return arguments


if __name__ == "__main__":
    main()
