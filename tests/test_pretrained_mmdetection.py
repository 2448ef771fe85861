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

from brefine import pretrained
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
    renamed = pretrained.from_mmdetection(state, model)
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
    report = pretrained.start(model, path, categories=[Category(7, "Tree"), Category(8, "car")])
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
    pretrained.start(model, tmp_path / "coco.pth", categories=[Category(1, "toothbrush")])
    expected = source.state_dict()["mask_head.logits.weight"][79:]
    assert torch.equal(model.state_dict()["mask_head.logits.weight"], expected)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("bomb-went-off"),))


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": theirs(build()), "message_hub": Bomb()}, "bomb.pth")
    with pytest.raises(InputError, match="never loaded"):
        pretrained.start(build(), "bomb.pth")
    assert not Path("bomb-went-off").exists()


def test_other_state_dicts_are_told_apart(tmp_path: Path) -> None:
    state = theirs(build())
    del state["roi_head.bbox_head.fc_cls.bias"]
    torch.save(state, tmp_path / "headless.pth")
    with pytest.raises(InputError, match=r"headless.pth: nothing in it for box_head.classes"):
        pretrained.start(build(), tmp_path / "headless.pth")


def caffe_model(**detector: Any) -> nn.Module:
    options = {**TINY["detector"], "box_hidden": 16, **detector}
    return build(3, backbone="resnet26", detector=options)


def test_a_resnet_of_caffe_s_sees_what_it_saw_there(tmp_path: Path) -> None:
    source: Any = caffe_model(stride_in_1x1=True)
    state = theirs(source)
    meta = {"cfg": "backbone=dict(depth=50, norm_eval=True,\n style='caffe', type='ResNet')"}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "model.pth")
    model: Any = caffe_model(stride_in_1x1=True)
    pretrained.start(model, tmp_path / "model.pth")
    pixels = torch.rand(1, 3, 64, 64) * 255
    # BGR, the mean taken away, not scaled
    mean = torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    with torch.no_grad():
        kernel = state["backbone.conv1.weight"]
        stem = source.trunk.body.conv1
        expected = nn.functional.conv2d(pixels.flip(1) - mean, kernel, stem.bias, stem.stride,
                                        stem.padding)  # fmt: skip
        ours = (pixels - model.trunk.mean) / model.trunk.std
        torch.testing.assert_close(model.trunk.body.conv1(ours), expected, rtol=1e-4, atol=1e-2)


def test_a_resnet_of_caffe_s_needs_its_strides(tmp_path: Path) -> None:
    torch.save(theirs(caffe_model()), tmp_path / "point-rend_r50-caffe_fpn.pth")
    with pytest.raises(InputError, match=r"stride_in_1x1=true"):
        pretrained.start(caffe_model(), tmp_path / "point-rend_r50-caffe_fpn.pth")
    with pytest.raises(InputError, match="no bottlenecks with strides"):
        build(detector={**TINY["detector"], "stride_in_1x1": True})


def test_strides_move_and_sizes_stay() -> None:
    plain: Any = build(backbone="resnet26", detector={})
    moved: Any = build(backbone="resnet26", detector={"stride_in_1x1": True})
    moved.load_state_dict(plain.state_dict())
    for stage in (2, 3, 4):
        block = moved.trunk.body[f"layer{stage}"][0]
        assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    picture = torch.randn(1, 3, 64, 64)
    for model in (plain, moved):  # timm starts each block as nothing but its shortcut
        for name, parameter in model.trunk.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.data.fill_(1.0)
    with torch.no_grad():
        pairs = list(zip(plain.trunk.body(picture), moved.trunk.body(picture), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    assert torch.equal(*pairs[0])
    assert not torch.allclose(*pairs[1])
