"""What makes prediction quicker must not change what is predicted."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given as given_examples
from hypothesis import settings
from hypothesis import strategies as st

from brefine import weights
from brefine.methods import create
from brefine.parts import inference, two_stage, winograd
from brefine.parts.backbone import Backbone
from brefine.predict import Predictor
from brefine.structures import Bitmaps, Images, InputError, Instances

SHAPES = {
    "batch": st.integers(0, 3),
    "dilation": st.integers(1, 3),
    "bias": st.booleans(),
    "group": st.sampled_from([1, 7, 128]),
}
OPTIONS = {"backbone": "lcnet_035", "channels": 64, "detector": {"box_hidden": 32}}


def pictures() -> Images:
    return Images.stack([torch.rand(3, 96, 160) * 255, torch.rand(3, 70, 100) * 255])


def given(counts: tuple[int, int] = (20, 9)) -> list[Instances]:
    """Boxes of all sizes, some of them beyond the picture's edge."""
    found = []
    for count in counts:
        side = 3 + torch.rand(count, 2) ** 2 * 90
        corner = torch.rand(count, 2) * (torch.tensor([100.0, 70]) - side / 2) - 5
        labels = torch.randint(3, (count,))
        found.append(Instances((70, 100), torch.cat([corner, corner + side], 1), labels))
    return found


def disturb(model: torch.nn.Module) -> None:
    """Make logits large and norms other than what they start as."""
    model.mask_head.logits.weight.data *= 30
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)


@pytest.mark.parametrize("method", ["mask_rcnn", "brefine"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_a_prepared_model_predicts_the_same(method, norm):
    options = {**OPTIONS, "channels": 128, "detector": {"box_hidden": 32, "norm": norm}}
    model = create(method, 3, **options).eval()
    disturb(model)
    images, asked = pictures(), given()
    with torch.no_grad():
        plain = model.predict(images, asked)
        features = model.features(images)
        prepared = inference.prepare(model)
        assert sum(isinstance(m, winograd.Winograd) for m in prepared.modules()) > 6
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in prepared.modules())
        exact = prepared.predict(images, asked)
        found = prepared.features(images)
    for a, b in zip(features, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().amax()))
    plain_logits, exact_logits = (torch.cat([e.logits for e in each]) for each in (plain, exact))
    assert plain_logits.abs().amax() > 1
    assert (plain_logits.sigmoid() - exact_logits.sigmoid()).abs().amax() < 1e-4


@given_examples(
    channels=st.sampled_from([(128, 128), (130, 129)]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    **SHAPES,
)
@settings(max_examples=60, deadline=None)
def test_winograds_form_is_the_convolution(channels, size, batch, dilation, bias, group):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(*channels, 3, padding=dilation, dilation=dilation, bias=bias)
    x = torch.randn(batch, channels[0], *size)
    with torch.no_grad(), mock.patch.object(winograd, "GROUP", group):
        found, expected = winograd.Winograd(conv)(x), conv(x)
    # products of 36 terms up to 100 times as large as their sum: a few digits of float32's 7
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tiles_are_worked_on_where_they_fit():
    conv = torch.nn.Conv2d(128, 128, 3, padding=1)
    quick = winograd.Winograd(conv)
    quick.conv = torch.nn.Conv2d(128, 128, 3, padding=1)  # seen only where it is used
    x = torch.randn(1, 128, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(
            quick(x) - quick.conv.bias.view(-1, 1, 1),
            conv(x) - conv.bias.view(-1, 1, 1),
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(quick(x[:, :, :5, :5]), quick.conv(x[:, :, :5, :5]))


@given_examples(
    channels=st.sampled_from([(3, 2), (1, 4)]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    **SHAPES,
    last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_winograds_gradients_are_the_convolutions(
    channels, size, batch, dilation, bias, group, last
):
    random = torch.Generator().manual_seed(0)
    into, out = channels
    shapes = [(batch, into, *size), (out, into, 3, 3), *([(out,)] if bias else [])]
    given = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    if last:
        given[0] = given[0].contiguous(memory_format=torch.channels_last)
    given = [each.requires_grad_() for each in given]
    x, weight, b = given if bias else (*given, None)
    with mock.patch.object(winograd, "GROUP", group):
        found = winograd.Convolution.apply(x, weight, b, dilation)
        expected = torch.nn.functional.conv2d(x, weight, b, padding=dilation, dilation=dilation)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        above = torch.randn(expected.shape, generator=random, dtype=torch.float64)
        gradients = [torch.autograd.grad(each, given, above) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_winograds_form_rounds_no_more_than_other_orders_of_a_sum():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 128, 28, 28, generator=random).relu()
    weight = torch.randn(128, 128, 3, 3, generator=random) * (2 / (9 * 128)) ** 0.5
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    apart = winograd.convolve(x, winograd.transform(weight), None, 1) - expected
    # the points 0, 1, -1, 2, -2 give 2e-6 and 4e-5; PyTorch's kernels up to 6e-7 and 7e-6
    assert apart.std() < 1.3e-6 * expected.std()
    assert apart.abs().max() < 1.5e-5 * expected.std()


def test_gradcheck_of_winograds_form_where_some_are_not_wanted():
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 5, 7), (3, 2, 3, 3), (3,)]
    for wanted in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        given = [
            torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_(bool(one))
            for shape, one in zip(shapes, wanted, strict=True)
        ]
        assert torch.autograd.gradcheck(lambda *each: winograd.Convolution.apply(*each, 1), given)


@pytest.mark.parametrize("method", ["brefine", "mask_rcnn"])
def test_a_model_that_learns_quicker_learns_the_same(method):
    options = {**OPTIONS, "channels": 128, "detector": {"box_hidden": 32, "mask_rois": 8}}
    torch.manual_seed(0)
    plain = create(method, 3, **options).train()
    quick = winograd.quicken(copy.deepcopy(plain))
    assert list(quick.state_dict()) == list(plain.state_dict())
    changed = [m for m in quick.modules() if isinstance(m, winograd.TrainedConv)]
    assert len(changed) == sum(map(winograd.suits, plain.modules())) > 6
    images = Images.stack([torch.rand(3, 96, 128) * 255])
    boxes = torch.tensor([[10.0, 10, 90, 80], [30, 20, 60, 70]])
    masks = torch.zeros(2, 96, 128, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    target = Instances((96, 128), boxes, torch.tensor([0, 2]), masks=Bitmaps.of(masks))
    gradients = []
    for model in (plain, quick):
        torch.manual_seed(1)
        losses = model.loss(images, [target])
        sum(losses.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, ours in gradients[1].items():
        theirs = gradients[0][name]
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            # Another layout alone changes some by 2 %: a ReLU's input is on the other side of 0.
            assert (ours - theirs).norm() <= 0.05 * theirs.norm(), name
    # in evaluation, and in another type, it is the plain convolution
    conv, x = changed[0], torch.rand(1, 128, 16, 16)
    wanted = torch.nn.functional.conv2d(
        x, conv.weight, conv.bias, padding=conv.padding, dilation=conv.dilation
    )
    assert torch.equal(conv.eval()(x), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv.train()(x).dtype == torch.bfloat16
    assert not torch.equal(conv(x), wanted)


def test_what_is_quicker_in_its_own_form_stays():
    plain = [
        torch.nn.Conv2d(64, 128, 3, padding=1),
        torch.nn.Conv2d(128, 128, 1),
        torch.nn.Conv2d(128, 128, 3, padding=1, stride=2),
        torch.nn.Conv2d(128, 128, 3, padding=1, groups=128),
        torch.nn.Conv2d(128, 128, 3, padding=0),
        torch.nn.Conv2d(128, 128, 3, padding=2, dilation=(2, 1)),
        torch.nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
        torch.nn.Conv2d(128, 128, 3, padding="same"),
        torch.nn.Conv2d(128, 128, 3, padding=1, dtype=torch.float64),
        torch.nn.Conv2d(128, 128, 3, padding=1, device="meta"),
        torch.nn.ConvTranspose2d(128, 128, 3, padding=1),
    ]
    assert not any(map(winograd.suits, plain))
    assert winograd.suits(torch.nn.Conv2d(128, 128, 3, padding=2, dilation=2))


@pytest.mark.parametrize("backbone", ["lcnet_035", "resnet18", "efficientnet_lite0", "resnetv2_50"])
def test_folded_norms_change_no_feature(backbone):
    model = create("mask_rcnn", 3, **{**OPTIONS, "backbone": backbone}).eval()
    disturb(model)
    with torch.no_grad():
        images = pictures()
        before = model.features(images)
        body = model.trunk.body
        model.trunk.body = inference.fold(body)
        after = model.features(images)
        model.trunk.body = body
        again = model.features(images)
    norms = [m for m in model.trunk.body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms  # the given body was left as it was
    if backbone != "resnetv2_50":  # norms stand before convolutions there
        folded = inference.fold(body)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    for a, b, c in zip(before, after, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().amax()))
        assert c.equal(a)


def test_a_predictor_that_is_loaded_predicts_what_its_model_does(tiny_model, toy_set):
    model = weights.load(tiny_model)
    loaded = Predictor.load(tiny_model, device="cpu")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in loaded.model.modules())
    images = pictures()
    with torch.no_grad():
        plain, quick = model.segmenter.predict(images), loaded.model.predict(images)
    for a, b in zip(plain, quick, strict=True):
        torch.testing.assert_close(b.scores, a.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.boxes, a.boxes, rtol=1e-4, atol=1e-2)


def test_sizes_of_chunks_change_nothing(monkeypatch):
    model = create("brefine", 3, **OPTIONS).eval()
    disturb(model)
    images, asked = pictures(), given()
    found = []
    with torch.no_grad():
        for chunk in (1, two_stage.CHUNK, 10**9):
            monkeypatch.setattr(two_stage, "CHUNK", chunk)
            found.append(torch.cat([each.logits for each in model.predict(images, asked)]))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-4, atol=1e-4)


def test_the_trunk_is_compiled_on_request(tiny_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: seen.append((type(module), options))
    )
    Predictor.load(tiny_model, "cpu")
    assert not seen
    compiled = Predictor.load(tiny_model, "cpu", compile=True)
    assert seen == [(Backbone, {"dynamic": True})]  # sizes of pictures differ
    assert not any(isinstance(m, winograd.Winograd) for m in compiled.model.modules())

    def no_compiler(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(no_compiler, OSError("no C++ compiler"), None)

    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **_: setattr(module, "_compiled_call_impl", no_compiler),
    )
    with pytest.raises(InputError, match=r"--compile: cannot compile .*: leave out --compile"):
        Predictor.load(tiny_model, "cpu", compile=True)
    exported = tmp_path / "model.onnx"
    exported.touch()
    with pytest.raises(InputError, match="exported already"):
        Predictor.load(exported, compile=True)
