"""Checkpoints of MMDetection 3.x as weights to start from."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brefine import weights
from brefine.methods import create
from brefine.structures import Category, InputError
from conftest import TINY

#: our names to MMDetection's, the other way round than the code has them
NAMES = [
    (r"^trunk\.body\.", "backbone."),
    (r"^trunk\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^trunk\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^rpn\.conv\.", "rpn_head.rpn_conv."),
    (r"^rpn\.objectness\.", "rpn_head.rpn_cls."),
    (r"^rpn\.deltas\.", "rpn_head.rpn_reg."),
    (r"^box_head\.", "roi_head.bbox_head."),
    (r"^mask_head\.", "roi_head.mask_head."),
    (r"\.stages\.", "."),
    (r"\.fc1\.", ".shared_fcs.0."),
    (r"\.fc2\.", ".shared_fcs.1."),
    (r"\.classes\.", ".fc_cls."),
    (r"(bbox_head\..*)deltas\.", r"\1fc_reg."),
    (r"\.convs\.(\d)\.(weight|bias)", r".convs.\1.conv.\2"),
    (r"\.upsample\.0\.", ".upsample."),
    (r"\.logits\.", ".conv_logits."),
]


def theirs(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as MMDetection would name it."""
    state = {}
    for key, value in model.state_dict().items():
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        state[key] = value
    return state


def build(num_classes: int = 4, **options: Any) -> nn.Module:
    model = create("mask_rcnn", num_classes, **{**TINY, **options})
    assert isinstance(model, nn.Module)
    return model


def test_resnet_and_every_part_have_a_name_there() -> None:
    with torch.device("meta"):
        model = build(80, backbone="resnet50")
    state = theirs(model)
    for key in ("backbone.layer4.2.bn3.running_var", "backbone.layer1.0.downsample.1.weight",
                "neck.fpn_convs.3.conv.bias", "roi_head.bbox_head.shared_fcs.1.weight",
                "roi_head.mask_head.upsample.weight"):  # fmt: skip
        assert key in state
    renamed = weights.from_mmdetection(state, model)
    own = model.state_dict()
    assert renamed.keys() == own.keys()
    assert all(renamed[key] is state_value for key, state_value in zip(own, state.values(),
                                                                      strict=True))  # fmt: skip


@pytest.fixture
def training_log() -> Any:
    """What MMDetection keeps of its losses, as a class that only its writer has."""
    module = ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.log = np.arange(5.0)
            self.best = np.float64(3)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    names = ["mmengine", "mmengine.logging", module.__name__]
    sys.modules |= dict.fromkeys(names[:2], ModuleType("mmengine")) | {names[2]: module}
    yield HistoryBuffer()
    for name in names:
        sys.modules.pop(name, None)


def test_a_checkpoint_of_its_training_matches_classes_by_name(
    tmp_path: Path, training_log: Any
) -> None:
    source = build(3)
    path = tmp_path / "epoch_12.pth"
    meta = {"dataset_meta": {"classes": ("cat", "dog", "tree")}, "cfg": "model = dict()"}
    hub = {"log_scalars": {"loss": training_log}}
    torch.save({"meta": meta, "state_dict": theirs(source), "message_hub": hub}, path)
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        del sys.modules[name]
    model = build(2)
    before = model.state_dict()["mask_head.logits.weight"].clone()
    report = weights.start(model, path, categories=[Category(7, "Tree"), Category(8, "car")])
    assert "classes: 1 of 2 re-used by name; at random: car" in report
    assert "warning" not in report  # numerical rules are the same
    state, expected = model.state_dict(), source.state_dict()
    assert torch.equal(state["rpn.conv.weight"], expected["rpn.conv.weight"])
    logits = state["mask_head.logits.weight"]
    assert torch.equal(logits[0], expected["mask_head.logits.weight"][2])
    assert torch.equal(logits[1], before[1])
    deltas = expected["box_head.deltas.weight"]
    assert torch.equal(state["box_head.deltas.weight"][:4], deltas[8:])
    assert torch.equal(state["box_head.classes.bias"][2], expected["box_head.classes.bias"][3])


def test_eighty_classes_without_names_are_coco_s(tmp_path: Path) -> None:
    source = build(80)
    torch.save(theirs(source), tmp_path / "coco.pth")
    model = build(1)
    weights.start(model, tmp_path / "coco.pth", categories=[Category(1, "toothbrush")])
    expected = source.state_dict()["mask_head.logits.weight"][79:]
    assert torch.equal(model.state_dict()["mask_head.logits.weight"], expected)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("bomb-went-off"),))


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": theirs(build()), "message_hub": Bomb()}, "bomb.pth")
    with pytest.raises(InputError, match="never loaded"):
        weights.start(build(), "bomb.pth")
    assert not Path("bomb-went-off").exists()


def test_other_state_dicts_are_told_apart(tmp_path: Path) -> None:
    state = theirs(build())
    del state["roi_head.bbox_head.fc_cls.bias"]
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(InputError, match=r"headless.pth: nothing in it for box_head.classes"):
        weights.start(build(), tmp_path / "headless.pth")
