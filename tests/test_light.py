"""Options that make BRefine's head light."""

import pytest
import torch

from brefine.methods import create
from brefine.structures import Images, InputError, Instances

SMALL = {
    "backbone": "test_efficientnet_gn.r160_in1k",
    "channels": 32,
    "detector": {"fpn_norm": "group", "box_hidden": 32},
}
LIGHT = {"widths": (32, 16, 8), "detail": 8, "detail_convs": 2}


def build(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create("brefine", 3, **SMALL, **options).eval()
    for layer in (model.mask_head.logits, *model.mask_head.exits):
        layer.weight.data *= 30
    return model


def asked(*sides: float) -> tuple[Images, list[Instances]]:
    """A picture and square boxes of these sides in it."""
    boxes = torch.tensor([[3.0, 5.0, 3.0 + side, 5.0 + side * 0.7] for side in sides])
    labels = torch.arange(len(sides)) % 3
    images = Images.stack([torch.rand(3, 96, 160, generator=seeded()) * 255])
    return images, [Instances((96, 160), boxes, labels)]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("options", [{}, LIGHT])
@torch.no_grad()
def test_a_roi_ends_where_its_pixels_fit(options):
    model = build(early_exit=1.5, **options)
    sides = [140.0, 8.0, 21.0, 21.1, 60.0, 42.0, 42.1]  # ends at 14 up to 21, at 28 up to 42
    images, given = asked(*sides)
    features = model.features(images)
    rows = torch.cat([torch.zeros(len(sides), 1), given[0].boxes], 1)
    parts = model.mask_head._stages(features, rows, given[0].labels)
    assert [here.tolist() for here, _ in parts] == [[1, 2], [3, 5], [0, 4, 6]]
    assert [logits.shape[-1] for _, logits in parts] == [14, 28, 56]
    together = model.predict(images, given)[0].logits
    for i in range(len(sides)):  # what others need does not matter
        alone = model.predict(images, [given[0][torch.tensor([i])]])[0].logits[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)
    coarse = torch.nn.functional.avg_pool2d(together[:, None], 4)[:, 0]
    enlarged = torch.nn.functional.interpolate(
        parts[0][1][:, None], (56, 56), mode="bilinear", align_corners=False
    )[:, 0]
    torch.testing.assert_close(coarse[[1, 2]], torch.nn.functional.avg_pool2d(enlarged, 4))


@torch.no_grad()
def test_a_graph_in_which_all_go_all_the_way_gives_the_same(monkeypatch):
    model = build(early_exit=1.5, **LIGHT)
    images, given = asked(140.0, 8.0, 21.0, 60.0, 42.0)
    plain = model.predict(images, given)[0].logits
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    exported = model.predict(images, given)[0].logits
    torch.testing.assert_close(exported, plain, rtol=1e-4, atol=1e-4)


def test_the_last_stage_learns_nothing_of_what_ended_before():
    model = build(early_exit=1.5)
    images, given = asked(8.0, 21.0)
    rows = torch.cat([torch.zeros(2, 1), given[0].boxes], 1)
    loss = model.mask_head.loss(
        model.features(images), rows, given[0].labels, lambda side: torch.ones(2, side, side)
    )["mask"]
    assert loss.shape == (2,)
    loss.sum().backward()
    grad = {name: p.grad for name, p in model.mask_head.named_parameters()}
    assert grad["exits.0.weight"].any()
    assert not grad["exits.1.weight"].any()
    assert not grad["logits.weight"].any()
    assert not grad["context.1.squeeze.weight"].any()


@torch.no_grad()
def test_a_shared_map_is_pooled_by_all_stages():
    model = build(**LIGHT)
    images, given = asked(100.0, 30.0)
    features = model.features(images)
    assert [f.shape[1] for f in features] == [32] * 5 + [8]
    assert features[5].shape[-2:] == features[0].shape[-2:]
    before = model.predict(images, given)[0].logits
    model.branch.conv.conv.weight.data *= 2
    after = model.predict(images, given)[0].logits
    assert not torch.allclose(before, after)


def test_light_is_lighter():
    full, light = (sum(p.numel() for p in build(**o).mask_head.parameters()) for o in ({}, LIGHT))
    assert light < 0.6 * full


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": (32, 16)}, "widths must be 3 even numbers, one a stage, not [32, 16]"),
        ({"widths": (32, 16, 7)}, "widths must be 3 even numbers"),
        ({"widths": (32, 16, 8), "norm": "group"}, "multiples of 16 with norm: group"),
        ({"detail": 8, "detail_convs": 0}, "detail_convs must be 1 or more, not 0"),
    ],
)
def test_wrong_sizes_are_named(options, words):
    with pytest.raises(InputError) as caught:
        create("brefine", 3, **SMALL, **options)
    assert words in str(caught.value)


def test_stages_before_the_last_learn_with_less_weight():
    model = build(deep_supervision=0.25)
    head = model.mask_head
    images, given = asked(8.0, 60.0, 100.0)
    rows = torch.cat([torch.zeros(3, 1), given[0].boxes], 1)
    labels = given[0].labels
    features = [each.detach() for each in model.features(images)]

    def truth(side: int) -> torch.Tensor:
        half = torch.zeros(3, side, side)
        half[:, : side // 2] = 1
        return half

    parts = head._stages(features, rows, labels, deep=True)
    each = [head.criterion(logits, truth(logits.shape[-1])) for _, logits in parts]
    found = head.loss(features, rows, labels, truth)["mask"]
    torch.testing.assert_close(found, (each[2] + 0.25 * (each[0] + each[1])) / 1.5)
    found.sum().backward()
    assert all(p.grad.any() for p in head.exits.parameters())
    # of prediction they are no part
    torch.testing.assert_close(head(features, rows, labels), parts[2][1])


def test_with_early_exits_what_goes_on_learns_with_less_weight_on_its_way():
    model = build(early_exit=1.5, deep_supervision=0.25)
    head = model.mask_head
    images, given = asked(8.0, 100.0)
    rows = torch.cat([torch.zeros(2, 1), given[0].boxes], 1)
    features = [each.detach() for each in model.features(images)]
    parts = head._stages(features, rows, given[0].labels, deep=True)
    assert [here.tolist() for here, _ in parts] == [[0, 1], [1], [1]]
    each = [head.criterion(logits, torch.ones_like(logits)) for _, logits in parts]
    found = head.loss(features, rows, given[0].labels, lambda side: torch.ones(2, side, side))[
        "mask"
    ]
    expected = torch.stack([each[0][0], (0.25 * (each[0][1] + each[1][0]) + each[2][0]) / 1.5])
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_shared_map_may_have_stride_2():
    model = build(**LIGHT, detail_stride=2)
    images, given = asked(100.0, 30.0)
    features = model.features(images)
    assert [f.shape[1] for f in features] == [32] * 5 + [8]
    assert features[5].shape[-2:] == (48, 80)
    before = model.predict(images, given)[0].logits
    model.branch.raw.conv.weight.data *= -1
    assert not torch.allclose(before, model.predict(images, given)[0].logits)
    # the map is read at its own stride: what is left of column 18, pixel 36, is not in the box
    rows, label = torch.tensor([[0.0, 40, 32, 80, 72]]), torch.zeros(1).long()
    there = model.mask_head(features, rows, label)
    for first, same in ((0, True), (24, False)):
        other = features[5].clone()
        other[..., first : first + 18] += 1
        found = model.mask_head([*features[:5], other], rows, label)
        assert torch.allclose(found, there, rtol=1e-4, atol=1e-4) == same


def test_a_stride_of_2_needs_a_map_and_a_backbone_that_has_it():
    with pytest.raises(InputError, match="set detail to its channels"):
        create("brefine", 3, **SMALL, detail_stride=2)
    options = {**SMALL, "backbone": "test_convnext", "detector": {}}
    with pytest.raises(InputError, match=r"features at strides .* \[2\] is missing"):
        create("brefine", 3, **options, detail=8, detail_stride=2)
