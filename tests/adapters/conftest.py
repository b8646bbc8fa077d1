"""Loaded tiny models, and artifacts made for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from steering_service.adapters.hooks import hooked
from steering_service.adapters.sites import ModelSites
from steering_service.core.artifact import Artifact, ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention
from steering_service.core.site import Site, Stream

LoadModel = Callable[..., Any]


@pytest.fixture(scope="session")
def load_model(make_model: Callable[..., Path]) -> LoadModel:
    """A causal language model in evaluation mode, loaded once a session."""
    loaded: dict[str, Any] = {}

    def load(family: str = "llama") -> Any:
        if family not in loaded:
            path = make_model(family)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            loaded[family] = model.eval().requires_grad_(False)
        return loaded[family]

    return load


@pytest.fixture(scope="session")
def model(load_model: LoadModel) -> Any:
    return load_model("llama-wide-heads")


def read_every_layer(model: Any, ids_BT: torch.Tensor, streams: Sequence[Stream]) -> Any:
    """Streams at every layer, by our taps: values by the name of their site."""
    sites = ModelSites.of(model)
    seen: dict[str, torch.Tensor] = {}
    wanted = [Site(stream, layer) for stream in streams for layer in range(sites.num_layers)]
    taps = {site: lambda h, site=site: seen.__setitem__(str(site), h.clone()) for site in wanted}
    with torch.inference_mode(), hooked(sites, taps):
        sites.body(ids_BT, use_cache=False)
    return seen


@pytest.fixture(scope="session")
def read_streams() -> Callable[..., dict[str, torch.Tensor]]:
    """See `read_every_layer`."""
    return read_every_layer


def random_intervention(site: str, width: int, seed: int = 0, **options: Any) -> Intervention:
    """An Intervention along a random vector of length 4."""
    vector = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    direction = Direction(
        site=Site.parse(site),
        vector_D=vector * 4 / np.linalg.norm(vector),
        sigma=1.5,
        activation_norm=10.0,
        method="random",
    )
    return Intervention(direction, **options)


def build_artifact(
    interventions: Sequence[Intervention], limits: tuple[float, float] = (-2.0, 2.0)
) -> Artifact:
    return build(
        interventions,
        name="test",
        model=ModelReference(name="tiny", fingerprint="0" * 64),
        policy=Policy(min_strength=limits[0], max_strength=limits[1]),
    )


MakeIntervention = Callable[..., Intervention]
MakeArtifact = Callable[..., Artifact]


@pytest.fixture(scope="session")
def make_intervention() -> MakeIntervention:
    """See `random_intervention`."""
    return random_intervention


@pytest.fixture(scope="session")
def make_artifact() -> MakeArtifact:
    """See `build_artifact`."""
    return build_artifact
