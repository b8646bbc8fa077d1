"""Probes beside scikit-learn: 1,024 heads of 128 dims and 2,000 rows, as ITI fits them.

    python benchmarks/reduction_peers/probes_sklearn.py [--peer .venv-bench-reduce/bin/python]

The peer is scikit-learn as people use it: a loop over heads of LogisticRegression(max_iter=1000,
C=1) behind a StandardScaler, once in one process with as many threads as there are cores, once with
joblib over as many processes, which read the features from a mapped file and have started before
the clock does. Ours has as many threads. Every contestant is a process of its own with the features
in memory; rounds alternate; seconds are medians of fitting alone. The last line of stdout is one
JSON object; `probes_vs_sklearn` is against the faster of the peer's two ways.

Features: a head's spectrum falls as a power of the rank, between 1.4 and 2.2 as it does in `z` of
stories260K (64 dims of standardised head outputs, 1,000 prompts), each head in a basis of its own,
with unequal scales, three dims of 50 times the rest, and means away from 0. One head in eight tells
the classes apart (up to 3 standard deviations), the others barely. `--flat` has spectra of exponent
0 in place of these: what scikit-learn's solver likes best.

Shapes: S heads, N rows, D dims.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))
CONTESTANTS = ("ours", "sklearn", "sklearn_joblib")
NUM_HELD_OUT = 500
EXPONENTS = (1.4, 2.2)


def measure(
    peer: Path,
    *,
    num_heads: int = 1024,
    num_rows: int = 2000,
    width: int = 128,
    rounds: int = 3,
    flat: bool = False,
) -> dict[str, Any]:
    """Ours and the peer's, in turn.

    Args:
        peer: The interpreter that has scikit-learn.
        rounds: Of each; medians are reported.
        flat: Whether spectra are flat.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder), num_heads, num_rows, width, flat=flat)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
        for _ in range(rounds):
            for name in CONTESTANTS:
                runs[name].append(_run(name, peer if name != "ours" else None, Path(folder)))
    seconds = {
        name: statistics.median(run["seconds"] for run in several) for name, several in runs.items()
    }
    accuracy = {name: np.array(several[0]["accuracy"]) for name, several in runs.items()}
    faster = min(CONTESTANTS[1:], key=seconds.__getitem__)
    gap_S = accuracy["ours"] - accuracy["sklearn"]
    return {
        "probes_vs_sklearn": round(seconds[faster] / seconds["ours"], 2),
        "against": faster,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "all_seconds": {
            name: [round(run["seconds"], 3) for run in several] for name, several in runs.items()
        },
        "threads": {name: several[0]["threads"] for name, several in runs.items()},
        "accuracy": {name: round(float(value.mean()), 5) for name, value in accuracy.items()},
        "accuracy_gap_points": round(100 * abs(float(gap_S.mean())), 4),
        "accuracy_gap_worst_head_points": round(100 * float(np.abs(gap_S).max()), 3),
        "accuracy_best_head": round(float(accuracy["ours"].max()), 4),
        "heads": num_heads,
        "rows": num_rows,
        "width": width,
        "held_out_rows": NUM_HELD_OUT,
        "spectrum_exponents": [0.0, 0.0] if flat else list(EXPONENTS),
        "versions": {name: several[0]["versions"] for name, several in runs.items()},
    }


def write_features(folder: Path, num_heads: int, num_rows: int, width: int, *, flat: bool) -> None:
    """Write features of training and held-out rows, and their labels."""
    random = np.random.default_rng(0)
    total = num_rows + NUM_HELD_OUT
    label_N = random.random(total) < 0.5
    side_N1 = (label_N[:, None] - 0.5).astype(np.float32)
    shape = (num_heads, num_rows, width)
    train_SND = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float32, shape)
    shape = (num_heads, NUM_HELD_OUT, width)
    held_out_SND = np.lib.format.open_memmap(folder / "held_out.npy", "w+", np.float32, shape)
    rank_D = np.arange(1, width + 1)
    for head in range(num_heads):
        exponent = 0.0 if flat else random.uniform(*EXPONENTS)
        basis_DD = np.linalg.qr(random.standard_normal((width, width)))[0]
        root_DD = rank_D[:, None] ** (-exponent / 2) * basis_DD
        scale_D = np.exp(0.5 * random.standard_normal(width))
        scale_D[random.integers(0, width, 3)] *= 50
        apart_D = random.standard_normal(width)
        apart_D *= random.random() * (3.0 if head % 8 == 0 else 0.3) / np.linalg.norm(apart_D)
        white_ND = random.standard_normal((total, width), np.float32)
        white_ND += side_N1 * apart_D.astype(np.float32)
        rows_ND = white_ND @ (root_DD * scale_D).astype(np.float32)
        rows_ND += (0.3 * scale_D * random.standard_normal(width)).astype(np.float32)
        train_SND[head], held_out_SND[head] = rows_ND[:num_rows], rows_ND[num_rows:]
    train_SND.flush()
    held_out_SND.flush()
    np.save(folder / "label.npy", label_N)


def _run(name: str, peer: Path | None, folder: Path) -> dict[str, Any]:
    """A contestant in its own process."""
    # Ours and joblib's processes are what runs side by side, each of one thread.
    threads = CORES if name == "sklearn" else 1
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    if peer is None:
        env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [str(peer or sys.executable), __file__, "--contestant", name, "--folder", str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _contestant(name: str, folder: Path) -> dict[str, Any]:
    """Fit, and say how long that took and how often each head is right."""
    train_SND = np.load(folder / "train.npy")
    held_out_SND = np.load(folder / "held_out.npy")
    label_N = np.load(folder / "label.npy")
    num_rows = train_SND.shape[1]
    fit = {"ours": _ours, "sklearn": _sklearn, "sklearn_joblib": _sklearn_joblib}[name]
    seconds, weights_SD, intercept_S, versions = fit(folder, train_SND, label_N[:num_rows])
    logits_SN = np.matmul(held_out_SND, weights_SD[:, :, None])[:, :, 0] + intercept_S[:, None]
    return {
        "seconds": seconds,
        "accuracy": ((logits_SN > 0) == label_N[num_rows:]).mean(axis=1).tolist(),
        "threads": CORES,
        "versions": versions,
    }


Fitted = tuple[float, Any, Any, dict[str, str]]


def _ours(folder: Path, features_SND: Any, label_N: Any) -> Fitted:
    from pipeline.reduction.probes import fit_probes

    # Imports and pools are started before the clock, as joblib's are.
    fit_probes(features_SND[:2], label_N, l2=1.0, num_threads=CORES)
    seconds, probes = _timed(lambda: fit_probes(features_SND, label_N, l2=1.0, num_threads=CORES))
    return seconds, probes.weights_SD, probes.intercept_S, {"numpy": np.__version__}


def _sklearn(folder: Path, features_SND: Any, label_N: Any) -> Fitted:
    _fit_head(features_SND[0], label_N)
    seconds, models = _timed(lambda: [_fit_head(x_ND, label_N) for x_ND in features_SND])
    return seconds, *_in_activation_space(models)


def _sklearn_joblib(folder: Path, features_SND: Any, label_N: Any) -> Fitted:
    joblib: Any = import_module("joblib")
    mapped_SND = np.load(folder / "train.npy", mmap_mode="r")
    pool = joblib.Parallel(n_jobs=CORES)
    pool(joblib.delayed(_fit_head)(x_ND, label_N) for x_ND in mapped_SND[: 4 * CORES])
    seconds, models = _timed(
        lambda: pool(joblib.delayed(_fit_head)(x_ND, label_N) for x_ND in mapped_SND)
    )
    return seconds, *_in_activation_space(models)


def _fit_head(x_ND: Any, label_N: Any) -> Any:
    # Not to be had where this file is type-checked.
    scale: Any = import_module("sklearn.preprocessing").StandardScaler()
    model: Any = import_module("sklearn.linear_model").LogisticRegression(max_iter=1000, C=1)
    return import_module("sklearn.pipeline").make_pipeline(scale, model).fit(x_ND, label_N)


def _in_activation_space(models: list[Any]) -> tuple[Any, Any, dict[str, str]]:
    version: str = import_module("sklearn").__version__
    weights_SD = np.stack([model[1].coef_[0] / model[0].scale_ for model in models])
    mean_SD = np.stack([model[0].mean_ for model in models])
    intercept_S = np.array([model[1].intercept_[0] for model in models])
    intercept_S = intercept_S - (weights_SD * mean_SD).sum(axis=1)
    return weights_SD, intercept_S, {"scikit-learn": version, "numpy": np.__version__}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Measure, or be one contestant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peer", type=Path, default=ROOT / ".venv-bench-reduce/bin/python", help="its interpreter"
    )
    parser.add_argument("--heads", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flat", action="store_true", help="spectra that do not fall")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        result = _contestant(args.contestant, args.folder)
    else:
        result = measure(
            args.peer,
            num_heads=args.heads,
            num_rows=args.rows,
            rounds=args.rounds,
            flat=args.flat,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
