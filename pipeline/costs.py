"""Costs: what each step of a run asks of the store, of its workers and of Ray, told from layouts.

Bytes, objects and tasks are counted, as the code that reads and writes has them. Requests are those
of a run in which nothing fails; memory is what the largest arrays take.

Shapes: A array rows, N samples, P pairs, L layers, W width, H heads, D width of a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow.compute as pc

from pipeline.extraction.preflight import duration, size
from pipeline.ray_runtime import LOCAL_STORE_NBYTES
from pipeline.reduction.counting import num_tasks
from pipeline.reduction.fits import num_layer_tasks
from pipeline.reduction.held_out import MOST_SCORED
from pipeline.reduction.methods import OF_MOMENTS
from pipeline.reduction.moment_store import NUM_MOMENTS
from pipeline.reduction.passes import layer_blocks, shard_groups
from store.activations import ActivationCache
from store.ahead import NUM_READERS
from store.layout import StreamLayout

_VERIFIED_AT_A_TIME: Final = 8 << 20
_PLANNED_OBJECTS: Final = 5
"""capture.json, the group's zarr.json, the index, the work list, and what was quarantined."""
_HESSIANS: Final = 3
"""Of a probe, about: one where the classes can hardly be told apart, seven where they can be."""
_BANDWIDTHS: Final = (1e9, 10e9)


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """How many samples a run has.

    Attributes:
        samples: Entries of the index.
        train: Samples of the split ``train``.
        train_pairs: Their pairs.
        held_out: Samples of the larger held-out split.
        index_nbytes: Of the index in memory.
    """

    samples: int
    train: int
    train_pairs: int
    held_out: int
    index_nbytes: int

    @classmethod
    def of(cls, cache: ActivationCache) -> SampleCounts:
        """Those of a planned cache."""
        index = cache.index()
        in_split = {
            split: index.filter(pc.equal(index["split"], split))
            for split in ("train", "validation", "test")
        }
        return cls(
            len(index),
            len(in_split["train"]),
            pc.count_distinct(in_split["train"]["pair"]).as_py(),
            max(len(in_split["validation"]), len(in_split["test"])),
            index.nbytes,
        )

    def times(self, factor: float) -> SampleCounts:
        """As many of each as in a corpus so many times as large."""
        return SampleCounts(*(round(factor * value) for value in asdict(self).values()))


@dataclass(frozen=True, slots=True)
class Step:
    """What one step asks for.

    Attributes:
        name: The command, or a pass of ``reduce``.
        read_bytes: Of activations.
        write_bytes: Of all objects but small JSON ones.
        gets: Requests that read, about.
        puts: Objects that are made.
        tasks: Units of work, of which a worker that is lost loses one.
        task_bytes: What the largest arrays of a task take, at most.
        ray_bytes: The largest object that goes through Ray's object store.
        tflop: Of matrices; a step without is bound by what it reads and writes.
    """

    name: str
    read_bytes: int
    write_bytes: int
    gets: int
    puts: int
    tasks: int
    task_bytes: int
    ray_bytes: int
    tflop: float = 0.0

    def readable(self) -> str:
        """For people."""
        parts = []
        if self.read_bytes:
            parts.append(f"reads {size(self.read_bytes)}")
        if self.write_bytes:
            parts.append(f"writes {size(self.write_bytes)}")
        parts.append(f"{self.gets:,} GETs and {self.puts:,} PUTs")
        if self.tasks:
            parts.append(f"{self.tasks:,} tasks of up to about {size(self.task_bytes)}")
        if self.ray_bytes:
            parts.append(f"largest object in Ray {size(self.ray_bytes)}")
        if self.tflop:
            parts.append(f"about {self.tflop:,.3g} TFLOP")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class RunCosts:
    """What a run asks for.

    Attributes:
        steps: In their order.
        driver_bytes: What the largest arrays of the process take that runs ``reduce``.
        warnings: What will not go well, and what to do about it.
    """

    steps: tuple[Step, ...]
    driver_bytes: int
    warnings: tuple[str, ...]

    @property
    def reduce_bytes(self) -> int:
        """Bytes that ``reduce`` reads."""
        return sum(step.read_bytes for step in self.steps if step.name.startswith("reduce"))

    def summary(self) -> dict[str, Any]:
        """What `steerage plan --explain --json` adds."""
        return {
            "steps": [asdict(step) for step in self.steps],
            "reduce_bytes": self.reduce_bytes,
            "reduce_driver_bytes": self.driver_bytes,
            "warnings": list(self.warnings),
        }

    def readable(self) -> dict[str, str]:
        """The same for people, with units."""
        hours = ", ".join(
            f"{duration(self.reduce_bytes / rate / 3600)} at {rate / 1e9:.0f} GB/s"
            for rate in _BANDWIDTHS
        )
        lines = {step.name: step.readable() for step in self.steps}
        lines["reduce, reading"] = f"{size(self.reduce_bytes)}: {hours}, all workers together"
        lines["reduce, driver"] = f"about {size(self.driver_bytes)}"
        return lines | {
            f"warning {number}": text for number, text in enumerate(self.warnings, start=1)
        }


def run_costs(
    streams: Mapping[str, StreamLayout],
    counts: SampleCounts,
    methods: Mapping[str, Mapping[str, int | float]],
) -> RunCosts:
    """Count what a run asks for.

    Args:
        streams: Layouts of its cache.
        counts: Its samples.
        methods: Parameters by name of what ``reduce`` computes.
    """
    layouts = list(streams.values())
    num_shards = layouts[0].num_shards
    stored = sum(_stored_nbytes(layout) for layout in layouts)
    moments = sum(_moments_nbytes(layout, len(layout.layers)) for layout in layouts)
    # A Moments file, and directions, controls and scores of each method.
    vectors = sum(len(layout.layers) * layout.width * 4 for layout in layouts)
    steps = [
        Step("plan", 0, 0, 0, len(layouts) + _PLANNED_OBJECTS, 0, 0, 0),
        Step(
            "extract",
            0,
            stored,
            # Of a shard: is it there, its prompts, its quarantine; and each stream's record, twice,
            # before it is written, and when the cache is closed.
            num_shards * (6 + 3 * len(layouts)),
            2 * num_shards * len(layouts) + 1,
            num_shards,
            2 * sum(layout.shard_nbytes(0) for layout in layouts),
            0,
        ),
        Step(
            "verify",
            stored,
            0,
            sum(
                layout.num_shards * (3 + -(-layout.shard_nbytes(0) // _VERIFIED_AT_A_TIME))
                for layout in layouts
            ),
            0,
            0,
            0,
            0,
        ),
        Step(
            "reduce: count",
            stored,
            moments,
            sum(_count_gets(layout, len(layouts)) for layout in layouts),
            2,
            num_tasks(streams, NUM_MOMENTS),
            max(map(_count_nbytes, layouts)),
            max(_moments_nbytes(layout, _block_layers(layout)) for layout in layouts),
        ),
    ]
    reading = {name: given for name, given in methods.items() if name not in OF_MOMENTS}
    layer_gets = sum(len(layout.layers) * (3 * num_shards + 2 + len(layouts)) for layout in layouts)
    if reading:
        steps.append(
            Step(
                "reduce: fit",
                stored,
                0,
                layer_gets,
                0,
                num_layer_tasks(streams),
                max(_fit_nbytes(layout, counts, reading) for layout in layouts),
                _training_rows_nbytes(layouts[0].num_rows, counts),
                sum(_fit_flop(layout, counts, reading) for layout in layouts) / 1e12,
            )
        )
    steps.append(
        Step(
            "reduce: score",
            stored,
            2 * vectors * len(methods),
            layer_gets,
            3 * len(methods),
            sum(len(layout.layers) for layout in layouts),
            max(_score_nbytes(layout, counts, methods) for layout in layouts),
            _scored_rows_nbytes(layouts[0].num_rows, counts),
        )
    )
    # The index, what is counted of each row, and all Moments, once more as they are stored.
    driver = counts.index_nbytes + 4 * 8 * layouts[0].num_rows
    driver += _training_rows_nbytes(layouts[0].num_rows, counts) + 2 * moments
    return RunCosts(tuple(steps), driver, tuple(_warnings(steps, reading)))


def _warnings(steps: list[Step], reading: Mapping[str, Any]) -> list[str]:
    found = [
        f"{step.name}: an object of {size(step.ray_bytes)} does not go well through the object "
        f"store of a local Ray, {size(LOCAL_STORE_NBYTES)}: it is spilled to disk; use a cluster"
        for step in steps
        if step.ray_bytes > LOCAL_STORE_NBYTES // 2
    ]
    found += [
        f"{step.name}: a task takes about {size(step.task_bytes)}; run no more of them on a "
        f"machine than its memory holds, or leave out one of {', '.join(reading)}"
        for step in steps
        if step.task_bytes > 4 << 30
    ]
    return found


def _stored_nbytes(layout: StreamLayout) -> int:
    last = layout.num_shards - 1
    return last * layout.shard_nbytes(0) + layout.shard_nbytes(last)


def _moments_nbytes(layout: StreamLayout, num_layers: int) -> int:
    """Mean and second moment, float64."""
    return NUM_MOMENTS * num_layers * layout.width * 16


def _block_layers(layout: StreamLayout) -> int:
    return len(layer_blocks(layout, NUM_MOMENTS)[0])


def _read_ahead_nbytes(layout: StreamLayout) -> int:
    """A layer of some shards, as stored, and one as float32."""
    rows = min(layout.rows_per_shard, layout.num_rows)
    return rows * layout.width * (NUM_READERS * layout.itemsize + 4)


def _count_gets(layout: StreamLayout, num_streams: int) -> int:
    # Each task opens the cache; of a shard it reads the record and the end, and then each layer.
    blocks = layer_blocks(layout, NUM_MOMENTS)
    opened = len(blocks) * len(shard_groups(layout)) * (2 + num_streams)
    return opened + layout.num_shards * (2 * len(blocks) + len(layout.layers))


def _count_nbytes(layout: StreamLayout) -> int:
    # Sums, and the Moments that are made of them.
    return 2 * _moments_nbytes(layout, _block_layers(layout)) + _read_ahead_nbytes(layout)


def _fit_nbytes(
    layout: StreamLayout, counts: SampleCounts, methods: Mapping[str, Mapping[str, int | float]]
) -> int:
    """A layer's fitters side by side, and what the one that needs most takes when it ends."""
    num_heads = layout.num_heads or 1
    matrices = num_heads * (layout.width // num_heads) ** 2 * 8
    held: dict[str, int] = {}
    ending: dict[str, int] = {}
    if "pca" in methods:
        # A matrix a half; then their Moments, both merged, and LAPACK's copy. Where the sides of
        # pairs lie far apart, half of the rows wait for the others.
        waiting = _drawn(counts, methods, "pca") // 2 * layout.width * 4
        held["pca"], ending["pca"] = 2 * matrices + waiting, 4 * matrices
    if "lda" in methods:
        # Measured: 15.4 matrices at the peak.
        held["lda"], ending["lda"] = 4 * matrices, 12 * matrices
    if "probe" in methods:
        rows = _drawn(counts, methods, "probe")
        # The rows; joined; and then those of a half, and a site's copy.
        held["probe"] = rows * layout.width * 4
        width = layout.width // num_heads + 1
        ending["probe"] = rows * (layout.width + width) * 4 + 3 * width**2 * 4
    return sum(held.values()) + max(ending.values()) + _read_ahead_nbytes(layout)


def _fit_flop(
    layout: StreamLayout, counts: SampleCounts, methods: Mapping[str, Mapping[str, int | float]]
) -> float:
    """Covariances and what is solved with them, in float64; probes' Hessians, in float32."""
    num_heads = layout.num_heads or 1
    width = layout.width // num_heads
    flop = 0.0
    # Of all rows, and of each half.
    if "pca" in methods:
        pairs = min(counts.train_pairs, _drawn(counts, methods, "pca") // 2)
        flop += 2 * pairs * width**2 + 3 * 4 / 3 * width**3
    if "lda" in methods:
        flop += 2 * _drawn(counts, methods, "lda") * width**2 + 3 * 1 / 3 * width**3
    if "probe" in methods:
        rows = _drawn(counts, methods, "probe")
        # BLAS computes half of a product that is symmetric.
        flop += _HESSIANS * (2 * rows * width**2 + 3 * 1 / 3 * width**3)
    return flop * num_heads * len(layout.layers)


def _drawn(
    counts: SampleCounts, methods: Mapping[str, Mapping[str, int | float]], method: str
) -> int:
    return min(counts.train, int(methods[method]["max_rows"]))


def _score_nbytes(layout: StreamLayout, counts: SampleCounts, methods: Mapping[str, Any]) -> int:
    sites = layout.num_heads or 1
    # Both held-out splits on all methods' directions and two controls, and pairs on the component.
    held = 2 * min(counts.held_out, MOST_SCORED) * sites * (len(methods) + 2) * 4
    pairs = 2 * counts.train_pairs * sites * 4 if "pca" in methods else 0
    return held + pairs + _read_ahead_nbytes(layout)


def _training_rows_nbytes(num_rows: int, counts: SampleCounts) -> int:
    """Of `sources.TrainingRows`: int32 counts, and the pairs, of which fewer may be drawn."""
    return 4 * 4 * num_rows + (3 * 8 + 1) * counts.train_pairs


def _scored_rows_nbytes(num_rows: int, counts: SampleCounts) -> int:
    """Of `held_out.ScoredRows`."""
    held = 2 * min(counts.held_out, MOST_SCORED) * (8 + 1 + 8 + 8)
    return 2 * 4 * num_rows + 16 * counts.train_pairs + held
