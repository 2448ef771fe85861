"""Full-size models are as large as those of the code base they are compared with."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from brefine import info
from brefine.methods import create


def load() -> ModuleType:
    """benchmarks/methods.py, where the figures stand."""
    file = Path(__file__).parents[1] / "benchmarks" / "methods.py"
    spec = spec_from_file_location("benchmark_methods", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = load()
MODELS = [model for model in BENCHMARK.MODELS if model[2] is not None]


@pytest.mark.parametrize(("method", "options", "published"), MODELS)
def test_parameters(method: str, options: dict[str, int], published: int) -> None:
    with torch.device("meta"):
        model = create(method, 80, **options)
    assert isinstance(model, nn.Module)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(published, rel=1e-4)


def test_torchvision_publishes_as_many() -> None:
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    published = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["num_params"]
    assert published == pytest.approx({m: n for m, _, n in MODELS}["mask_rcnn"], rel=0.01)


def test_a_mask_head_that_judges_its_masks_pays_for_it() -> None:
    """Multiply-adds of the MaskIoU head, by hand: 257 channels in, 14 x 14 cells, then 7 x 7."""
    parts, _ = info.describe("mask_scoring", size=(64, 64))
    (found,) = [part for part in parts if part.name == "  iou"]
    c, cells = 256, 14**2
    convs = 9 * c * (cells * (c + 1) + 2 * cells * c + cells // 4 * c)
    assert found.macs == convs + 49 * c * 1024 + 1024**2 + 1024 * 80
