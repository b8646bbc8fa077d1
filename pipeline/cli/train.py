"""The command that trains a controller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.cli.app import app
from pipeline.cli.options import (
    DEFAULT_STORE,
    AsJson,
    Device,
    RayAddress,
    RunPath,
    StoreUrl,
    progress,
    show,
    where,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.config import RunFile
    from pipeline.control.results import TrainedController
    from pipeline.control.train import Progress
    from pipeline.prompts.plan import Plan
    from pipeline.reduction.results import Reduction
    from store.location import Location


@app.command()
def train(
    run_file: RunPath,
    store: StoreUrl = DEFAULT_STORE,
    device: Device = "cpu",
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Train a controller from a finished cache: it decides, request by request, what is steered.

    Settings are under [train] in the run file; examples/controller.toml is one to start from. It
    needs `extract` of the same run file, and `reduce` of the one that train.directions names.
    `steerage publish` publishes the controller with the directions that it weighs.
    """
    from pipeline.cli.batch import planning

    run, root, planned = planning(run_file, store)
    trained = training(run, run_file, root, planned, store, device, ray)
    show(
        {
            "controller": trained.digest,
            "mode": trained.controller.mode,
            "reads": [str(site) for site in trained.controller.reads],
            "edits": [str(direction.site) for direction in trained.directions],
            "scores": dict(trained.scores),
            "path": where(trained.location),
        },
        as_json,
        "Controller",
    )


def training(
    run: RunFile,
    run_file: Path,
    root: Location,
    planned: Plan,
    store: str,
    device: str = "cpu",
    ray: str | None = None,
) -> TrainedController:
    """Train with a progress bar, or find the controller that was trained before.

    Raises:
        InvalidInput: The run file has no [train] section.
        NotFound: The directions have not been reduced.
    """
    from pipeline.control.train import train as run_training

    section = controller_section(run, run_file)
    reduction = directions_of(run, planned, store)
    with progress("train", None) as (bar, task):

        def on_progress(now: Progress) -> None:
            bar.update(task, completed=now.step, total=now.num_steps, note=now.note)

        return run_training(
            planned.cache,
            reduction,
            root,
            section,
            model_path=run.model.path,
            device=device,
            address=ray,
            on_progress=on_progress,
        )


def controller_section(run: RunFile, run_file: Path) -> Any:
    """The [train] section, or an error that says where to write one."""
    from pipeline.errors import InvalidInput

    if run.train is None:
        raise InvalidInput(
            f"run file {str(run_file)!r} has no [train] section; "
            "examples/controller.toml shows one",
            kind="train_section",
        )
    return run.train


def directions_of(run: RunFile, planned: Plan, store: str) -> Reduction:
    """The reduction that a controller steers along: its own run's, or train.directions'."""
    from pipeline.cli.batch import planning, reduction_of

    assert run.train is not None
    if run.train.directions is not None:
        run, _, planned = planning(run.train.directions, store)
    return reduction_of(run, planned, store)
