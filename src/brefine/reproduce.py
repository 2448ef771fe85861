"""The paper's tables, run: rows are recipes, trained and evaluated one after the other.

A row's result is one json: its figures, what it was trained with and how long it took. A row that
has one is not run again, and one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from brefine.evaluate import Report
from brefine.files import replacing
from brefine.recipe import Recipe
from brefine.structures import InputError
from brefine.train import train

Result = dict[str, Any]

#: a trunk, heads and schedule for a machine without a GPU; the same for every method
SMALL: dict[str, dict[str, Any]] = {
    "options": {"backbone": "tf_efficientnet_lite0", "channels": 64},
    "detector": {
        "frozen_stages": 2,
        "fpn_norm": "group",
        "box_hidden": 256,
        "candidates": (500, 300),
        "proposals": (200, 100),
        "mask_rois": 24,
        # Ranking losses go to 0 on small data, and the paper's balance takes the masks along.
        "balance_floor": 0.2,
    },
    "data": {"short_side": (224, 288, 256), "long_side": 384, "workers": 0},
    "train": {
        "epochs": None,
        "steps": 600,
        "batch_size": 4,
        "optimizer": "adamw",
        "lr": 1e-3,
        "lr_reference_batch": None,
        "weight_decay": 0.01,
        "warmup_steps": 50,
        "schedule": "cosine",
        "clip_norm": 5.0,
        "validate_every": None,
    },
}


def shrink(recipe: Recipe, data: Mapping[str, Any]) -> Recipe:
    """A recipe as it is with a small trunk, few steps and other data.

    Args:
        recipe: its method and the options that ``SMALL`` does not name stay.
        data: paths, and values of the data section that differ from ``SMALL``.
    """
    values = recipe.model_dump()
    options = values["model"]["options"]
    detector = {**dict(options.get("detector", {})), **SMALL["detector"]}
    options.update(SMALL["options"], detector=detector)
    paths = dict.fromkeys(("train", "val", "images", "val_images"))
    values["data"].update({**paths, **SMALL["data"], **data})
    values["train"].update(SMALL["train"])
    return Recipe.parse(values, "small scale")


def run(
    name: str, recipe: Recipe, *, runs: Path, results: Path, commit: str | None = None
) -> Result:
    """Train and evaluate a row, or read the result that it has.

    Args:
        name: of the row.
        recipe: data included; ``data.val`` is what it is evaluated on.
        runs: the run folder is made in here, or gone on with.
        results: folder of the ``NAME.json`` with ``values`` (fractions, see ``Report``),
            ``recipe``, ``versions``, ``seconds`` and so on.
        commit: of the code, to be written down.

    Raises:
        InputError: the result is there, but of another recipe; or as ``train``.
    """
    file, folder = results / f"{name}.json", runs / name
    settings = _settings(recipe)
    if file.is_file():
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if result["recipe"] != settings:
            raise InputError(f"{file}: of other settings: remove it, or choose another folder")
        return result
    resume = (folder / "checkpoint.ckpt").is_file()
    resume = resume and Recipe.load(folder / "recipe.yaml") == recipe
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    wall, cpu = time.monotonic(), time.process_time()
    train(recipe, folder, resume=resume)
    values = Report.load(folder).values
    result = {
        "name": name,
        "values": {key: None if math.isnan(value) else value for key, value in values.items()},
        "recipe": settings,
        "versions": json.loads((folder / "versions.json").read_text(encoding="utf-8")),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "resumed": resume,  # then the seconds are those since
    }
    with replacing(file) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, without paths: those are of one machine."""
    values: dict[str, Any] = recipe.model_dump(mode="json")
    for key in ("train", "val", "images", "val_images"):
        path = values["data"].pop(key)
        if path is not None and key in ("train", "val"):
            values["data"][key] = "/".join(Path(path).parts[-2:])
    if recipe.model.weights not in ("none", "imagenet"):
        values["model"]["weights"] = "/".join(Path(recipe.model.weights).parts[-2:])
    return values
