"""What tests share: one thread each, fixed seeds, no network, a tiny data set and tiny models."""

import os

# Before torch is imported here or in a process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from brefine import weights
from brefine.data.toy import CATEGORIES, draw
from brefine.methods import create
from brefine.recipe import Recipe

torch.set_num_threads(1)
# Once torch.export has been used, a first backward pass starts threads, and no forked process could
# have one of its own afterwards. Started now, autograd needs none.
torch.ones(1, requires_grad=True).backward()

#: a model that a CPU runs in a moment
TINY: dict[str, Any] = {
    "backbone": "lcnet_035",
    "channels": 16,
    "detector": {"box_hidden": 32, "detections": 10, "norm": "batch", "frozen_stages": 0},
}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Say how a test process ended that should not have: a code, or minus a signal."""
    if error:
        process = node.gateway._io.popen
        with suppress(subprocess.TimeoutExpired):  # it may have lost touch only
            code = process.wait(timeout=10)
            print(f"\n{node.gateway.id} (pid {process.pid}) ended with {code}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images``, ``train.json`` (4 pictures) and ``val.json`` (3)."""
    folder = tmp_path_factory.mktemp("toy") / "set"
    draw(folder, train=4, val=3, size=(96, 128), seed=1, progress=False)
    return folder


def tiny_recipe(method: str = "brefine", **sections: dict[str, Any]) -> Recipe:
    """A recipe of a tiny model; ``sections`` add to model, data and train."""
    return Recipe.parse(
        {
            "model": {"method": method, "options": TINY, **sections.get("model", {})},
            "data": {"short_side": 96, "long_side": 128, "workers": 0, **sections.get("data", {})},
            "train": {"steps": 2, "lr": 0.001, "warmup_steps": 1, **sections.get("train", {})},
        },
        "tiny",
    )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained model folders by method, with the toy set's categories."""
    folders = {}
    for method in ("mask_rcnn", "brefine"):
        torch.manual_seed(0)
        recipe = tiny_recipe(method)
        model = create(method, len(CATEGORIES), **recipe.model.options)
        folders[method] = tmp_path_factory.mktemp("models") / method
        assert isinstance(model, torch.nn.Module)
        weights.save(folders[method], model, recipe, CATEGORIES, thresholds=[0.1, 0.2, 0.3, 0.4])
    return folders


@pytest.fixture(scope="session")
def tiny_model(tiny_models: dict[str, Path]) -> Path:
    """An untrained BRefine model folder."""
    return tiny_models["brefine"]
