import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss

from brefine import losses
from brefine.losses import rank_sort
from brefine.structures import InputError
from rank_sort_loop import Result, rank_sort_loop

GOLDEN = Path(__file__).parent / "golden" / "rank_sort.npz"
CASES = sorted({key.split("/")[0] for key in np.load(GOLDEN).files} - {"commit"})


def run(logits: Tensor, targets: Tensor, delta: float = 0.5) -> Result:
    """Values, and the gradient of each of the two losses on its own."""
    x = logits.detach().clone().requires_grad_()
    ranking, sorting = rank_sort(x, targets, delta=delta)
    (ranking_grad,) = torch.autograd.grad(ranking, x, retain_graph=True)
    (sorting_grad,) = torch.autograd.grad(sorting, x)
    return Result(ranking.detach(), sorting.detach(), ranking_grad, sorting_grad)


def assert_same(ours: Result, loop: Result, atol: float = 1e-10) -> None:
    for name, a, b in zip(Result._fields, ours, loop, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def draw(positives: int, negatives: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(positives + negatives, generator=rng, dtype=torch.float64)
    y = torch.zeros(positives + negatives, dtype=torch.float64)
    y[:positives] = 0.4 + 0.6 * torch.rand(positives, generator=rng, dtype=torch.float64)
    mixed = torch.randperm(len(x), generator=rng)
    return x[mixed].to(dtype), y[mixed].to(dtype)


# Rank & Sort: the authors' own figures


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors_code(case, dtype, atol):
    golden = np.load(GOLDEN)
    x = torch.tensor(golden[f"{case}/logits"], dtype=dtype, requires_grad=True)
    y = torch.tensor(golden[f"{case}/targets"], dtype=dtype)
    ranking, sorting = rank_sort(x, y, delta=float(golden[f"{case}/delta"]))
    (ranking + sorting).backward()
    assert ranking.dtype == sorting.dtype == x.grad.dtype == dtype
    assert ranking.item() == pytest.approx(float(golden[f"{case}/ranking"]), rel=0, abs=atol)
    assert sorting.item() == pytest.approx(float(golden[f"{case}/sorting"]), rel=0, abs=atol)
    expected = torch.tensor(golden[f"{case}/grad"])
    torch.testing.assert_close(x.grad.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_the_loop_of_these_tests_equals_the_authors_code(case):
    golden = np.load(GOLDEN)
    x, y = (torch.tensor(golden[f"{case}/{name}"]).double() for name in ("logits", "targets"))
    loop = rank_sort_loop(x, y, float(golden[f"{case}/delta"]))
    grad = loop.ranking_grad + loop.sorting_grad
    assert loop.ranking.item() == pytest.approx(float(golden[f"{case}/ranking"]), rel=0, abs=1e-12)
    assert loop.sorting.item() == pytest.approx(float(golden[f"{case}/sorting"]), rel=0, abs=1e-12)
    torch.testing.assert_close(grad, torch.tensor(golden[f"{case}/grad"]), rtol=0, atol=1e-12)


# Rank & Sort: against the plain loop

DELTAS = (0.0, 1e-3, 0.01, 0.1, 0.5, 1.0, 30.0)
# Eighths collide with each other and with the ends of ramps of width 0.5 and 1.
SCORES = st.one_of(
    st.integers(-24, 24).map(lambda k: k / 8),
    st.floats(-6, 6, width=32),
    st.sampled_from([-1000.0, 1000.0, -999.5, 999.75, 0.0]),
)
TARGETS = st.one_of(
    st.just(0.0),
    st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    st.floats(1e-6, 1.0),
    st.just(-1.0),
)


@settings(deadline=None, max_examples=400)
@given(
    samples=st.lists(st.tuples(SCORES, TARGETS), min_size=0, max_size=40),
    delta=st.sampled_from(DELTAS),
)
@example(samples=[], delta=0.5)
@example(samples=[(1.0, -1.0)], delta=0.5)
@example(samples=[(1.0, 0.5)], delta=0.5)
@example(samples=[(0.0, 0.5), (-0.5, 0.0), (0.5, 0.0), (0.0, 0.0)], delta=0.5)
@example(samples=[(0.0, 0.5), (0.0, 0.0)], delta=0.0)
@example(samples=[(1000.0, 0.5), (-1000.0, 0.7), (1000.0, 0.0), (-1000.5, 0.0)], delta=0.5)
def test_equals_the_loop_on_anything(samples, delta):
    x = torch.tensor([score for score, _ in samples], dtype=torch.float64)
    y = torch.tensor([target for _, target in samples], dtype=torch.float64)
    assert_same(run(x, y, delta), rank_sort_loop(x, y, delta))


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 1000.0])
def test_equals_the_loop_on_many_samples(spread, delta):
    x, y = draw(60, 20_000)
    y[::7] = -1
    x = x * spread
    assert_same(run(x, y, delta), rank_sort_loop(x, y, delta))


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_scores_far_apart_do_not_blur_each_other(delta):
    # sums over 150,000 negatives around -1000 and 0 must not cost the few around +1000 digits
    rng = torch.Generator().manual_seed(0)

    def some(count: int, centre: int, width: int) -> Tensor:
        return centre + width * torch.randn(count, generator=rng, dtype=torch.float64)

    x = torch.cat([some(200, -1000, 100), some(5, 1000, 1)])
    y = torch.rand(205, generator=rng, dtype=torch.float64) * 0.5 + 0.5
    x = torch.cat([x, some(50_000, -1000, 100), some(100_000, 0, 100), some(20, 1000, 1)])
    y = torch.cat([y, torch.zeros(150_020)])
    assert_same(run(x, y, delta), rank_sort_loop(x, y, delta), atol=3e-14)


@pytest.mark.parametrize("positives", [1, 2, 400])
@pytest.mark.parametrize("negatives", [0, 1, 300])
def test_equals_the_loop_at_the_edges(positives, negatives):
    x, y = draw(positives, negatives)
    assert_same(run(x, y), rank_sort_loop(x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_is_exact_inside(dtype):
    x, y = draw(40, 3000, dtype=dtype)
    y[(y > 0) & (y < 0.5)] = 0.5
    ours, loop = run(x, y), rank_sort_loop(x.double(), y.double())
    wide = torch.promote_types(dtype, torch.float32)
    kinds = [wide, wide, dtype, dtype]  # two losses, and their gradients
    assert [value.dtype for value in ours] == kinds
    for a, b, kind in zip(ours, loop, kinds, strict=True):  # rounded once, at the end
        torch.testing.assert_close(a, b.to(kind), rtol=torch.finfo(kind).eps, atol=1e-12)


def test_half_precision_bears_what_a_loss_scaler_multiplies_by():
    x, y = draw(40, 3000, dtype=torch.float16)
    ranking, sorting = rank_sort(x.requires_grad_(), y)
    ((ranking + sorting) * 2.0**16).backward()  # where torch's begins; float16 ends below
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_half_precision_counts_past_its_range():
    x, y = draw(10, 200_000, dtype=torch.float16)  # more negatives than float16 can count
    ranking, sorting = rank_sort(x.requires_grad_(), y)
    (ranking + sorting).backward()
    assert ranking.isfinite()
    assert 0.99 < ranking <= 1
    assert x.grad.isfinite().all()


def test_extreme_but_finite_logits():
    for dtype in (torch.float32, torch.float64):
        top = torch.finfo(dtype).max
        x = torch.tensor([top, -top, 0.0, 1e17, 1e17, top], dtype=dtype)
        y = torch.tensor([0.5, 0.6, 0.7, 0.8, 0, 0], dtype=dtype)
        for value in run(x, y):
            assert value.isfinite().all()


def test_two_dimensional_and_non_contiguous_input():
    x, y = draw(50, 950)
    flat = run(x, y)
    grid = run(x.reshape(20, 50), y.reshape(20, 50))
    assert grid.ranking_grad.shape == (20, 50)
    assert_same(Result(*(value.reshape(value.numel()).squeeze() for value in grid)), flat, 0)
    turned, labels = x.reshape(20, 50).T, y.reshape(20, 50).T  # another order in memory
    assert not turned.is_contiguous()
    x_leaf = turned.requires_grad_()
    ranking, sorting = rank_sort(x_leaf, labels)
    (grad,) = torch.autograd.grad(ranking + sorting, x_leaf)
    torch.testing.assert_close(grad.T.reshape(-1), flat.ranking_grad + flat.sorting_grad)
    every = torch.zeros(2000, dtype=torch.float64)
    every[::2] = x
    assert_same(run(every[::2], y), flat, 0)


def test_gradients_flow_separately():
    x, y = draw(30, 500)
    one = run(x, y)
    leaf = x.clone().requires_grad_()
    ranking, sorting = rank_sort(leaf, y)
    (2 * ranking + 3 * sorting).backward()
    torch.testing.assert_close(leaf.grad, 2 * one.ranking_grad + 3 * one.sorting_grad)
    assert one.ranking_grad.abs().max() > 1e-3
    assert one.sorting_grad.abs().max() > 1e-4
    for grad in (one.ranking_grad, one.sorting_grad):  # what is pushed up is pushed down
        assert grad.sum().abs() < 1e-12
    assert (one.sorting_grad[y == 0] == 0).all()


def test_permuting_samples_permutes_gradients():
    x, y = draw(30, 500)
    x = (x * 4).round() / 4
    shuffle = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    before, after = run(x, y), run(x[shuffle], y[shuffle])
    assert_same(
        after,
        before._replace(
            ranking_grad=before.ranking_grad[shuffle], sorting_grad=before.sorting_grad[shuffle]
        ),
        atol=1e-14,
    )


def test_without_positives_everything_is_zero():
    for y in (torch.zeros(5), torch.full((5,), -1.0), torch.tensor([0.0, -1, 0, -1, 0])):
        result = run(torch.randn(5), y)
        assert all((value == 0).all() for value in result)
    assert all(value.numel() in (0, 1) for value in run(torch.zeros(0), torch.zeros(0)))


def test_perfect_order_costs_nothing():
    y = torch.tensor([0.9, 0.7, 0.5, 0, 0, 0])
    result = run(torch.tensor([8.0, 6, 4, -2, -2, -9]), y)
    assert all((value == 0).all() for value in result)


def test_ignored_samples_change_nothing():
    x, y = draw(20, 100)
    plain = run(x, y)
    for odd in (0.0, 99.0, math.nan, math.inf):
        result = run(torch.cat([x, x.new_tensor([odd])]), torch.cat([y, y.new_tensor([-1])]))
        assert result.ranking == plain.ranking
        assert result.sorting == plain.sorting
        torch.testing.assert_close(result.ranking_grad[:-1], plain.ranking_grad)
        assert result.ranking_grad[-1] == result.sorting_grad[-1] == 0


def test_autocast_does_not_touch_the_inside():
    x, y = draw(50, 2000, dtype=torch.float32)
    plain = run(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(x, y), plain, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", [0.5, 0.0])
def test_non_finite_logits_are_an_error(value, target):
    x, y = torch.tensor([0.0, value, 1.0]), torch.tensor([0.5, target, 0.0])
    with pytest.raises(InputError, match="1 of 3 logits are NaN or infinite"):
        rank_sort(x, y)


def test_wrong_arguments_are_an_error():
    with pytest.raises(InputError, match=r"logits are \(3,\) and targets \(4,\)"):
        rank_sort(torch.zeros(3), torch.zeros(4))
    for delta in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="delta is"):
            rank_sort(torch.zeros(3), torch.zeros(3), delta=delta)
    for target in (1.5, math.nan):
        with pytest.raises(InputError, match="a target is"):
            rank_sort(torch.zeros(2), torch.tensor([0.5, target]))


MEMORY = """
import resource, torch
from brefine.losses import rank_sort
torch.set_num_threads(1)
def step(positives, negatives):
    x = torch.randn(positives + negatives, requires_grad=True)
    y = torch.zeros(positives + negatives)
    y[:positives] = torch.rand(positives) * 0.5 + 0.5
    ranking, sorting = rank_sort(x, y)
    (ranking + sorting).backward()
step(500, 500)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(10_000, 10_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_memory_stays_bounded_with_many_positives():
    # 10,000 x 10,000 float64 are 800 MB; bools alone would be 100
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40_000


# Boundary region


def erode(mask: np.ndarray) -> np.ndarray:
    """One erosion by 3x3, pixel by pixel; outside of the grid is what is at its border."""
    side = np.pad(mask, 1, mode="edge")
    height, width = mask.shape
    return np.array(
        [[side[i : i + 3, j : j + 3].min() for j in range(width)] for i in range(height)]
    )


def shapes(size: int) -> np.ndarray:
    """A disk, a ring, one cut off by the border, one pixel, lines, noise, blobs, empty, full."""
    ys, xs = np.mgrid[:size, :size] + 0.5
    radius = np.hypot(ys - size / 2, xs - size / 2)
    one, line, cross = (np.zeros((size, size)) for _ in range(3))
    one[size // 2, 3] = line[:, 5] = cross[4:7] = cross[:, -1] = 1
    rng = np.random.default_rng(0)
    return np.stack(
        [
            radius < size * 0.4,
            (radius < size * 0.45) & (radius > size * 0.2),
            np.hypot(ys - 1, xs - size / 2) < size * 0.4,
            one,
            line,
            cross,
            rng.random((size, size)) < 0.7,
            np.kron(rng.random((7, 7)) < 0.6, np.ones((size // 7, size // 7))),
            np.zeros((size, size)),
            np.ones((size, size)),
        ]
    ).astype(np.float32)


@pytest.mark.parametrize(("size", "width"), [(14, 1), (28, 1), (56, 2)])
def test_boundary_region_is_mask_minus_erosions(size, width):
    masks = shapes(size)
    expected = masks.copy()
    for mask in expected:
        for _ in range(width):
            mask[:] = erode(mask)
    expected = masks - expected
    for dtype in (torch.float32, torch.bool, torch.uint8, torch.float16, torch.float64):
        band = losses.boundary_region(torch.from_numpy(masks).to(dtype))
        assert band.dtype == dtype
        np.testing.assert_array_equal(band.double().numpy(), expected)
    assert expected[0].any()
    assert not expected[-2:].any()


def test_boundary_region_by_hand():
    mask = torch.zeros(1, 14, 14)
    mask[:, :6, 3:10] = 1  # cut off at the top: no band along the cut
    expected = torch.zeros(1, 14, 14)
    expected[:, :6, 3] = expected[:, :6, 9] = expected[:, 5, 3:10] = 1
    assert torch.equal(losses.boundary_region(mask), expected)


def test_boundary_width_follows_the_diagonal():
    half = torch.zeros(1, 40, 60)
    half[:, :, :30] = 1
    for ratio, width in ((0.0, 1), (0.02, 1), (0.05, 4), (0.1, 7)):  # the diagonal is 72.1
        assert losses.boundary_region(half, ratio)[0, 0].sum() == width
    assert losses.boundary_region(torch.zeros(0, 28, 28)).shape == (0, 28, 28)
    with pytest.raises(InputError, match=r"boundary_region: masks are \(28, 28\)"):
        losses.boundary_region(torch.zeros(28, 28))
    with pytest.raises(InputError, match="ratio -1"):
        losses.boundary_region(torch.zeros(1, 28, 28), -1)


# Mask losses


def random_masks(count: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(count, size, size, generator=rng, dtype=torch.float64) * 3
    masks = (torch.rand(count, size, size, generator=rng) < 0.4).double()
    return logits.requires_grad_(), masks


@pytest.mark.parametrize("name", losses.MASK_LOSSES)
def test_mask_losses_have_true_gradients(name):
    logits, masks = random_masks()
    assert gradcheck(lambda x: losses.MASK_LOSSES[name](x, masks), (logits,))


@pytest.mark.parametrize("name", losses.MASK_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mask_losses_contract(name, dtype):
    loss = losses.MASK_LOSSES[name]
    logits, masks = random_masks(4)
    x = (logits.detach() * 1e4 / 3).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    for truth in (masks, masks.bool(), masks.to(torch.uint8), torch.zeros_like(masks)):
        value = loss(x, truth)
        assert value.shape == (4,)
        (grad,) = torch.autograd.grad(value.float().sum(), x)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert (value >= 0).all()
    right = torch.where(masks > 0, 50.0, -50.0).to(dtype)
    assert (loss(right, masks) <= 1e-3).all()
    assert (loss(-right, masks) > 0.9).all()
    assert loss(x[:0], masks[:0]).shape == (0,)
    with pytest.raises(InputError, match="mask loss: logits are"):
        loss(x, masks[:3])
    with pytest.raises(InputError, match="mask loss: logits are"):
        loss(x[0], masks[0])


def test_mask_losses_equal_their_equations():
    logits, masks = random_masks()
    p = 1 / (1 + (-logits).exp())
    cross = -(masks * p.log() + (1 - masks) * (1 - p).log())
    torch.testing.assert_close(losses.bce(logits, masks), cross.mean((1, 2)))
    for i in range(3):  # RoI by RoI: nothing leaks between them
        x, g = p[i].flatten(), masks[i].flatten()
        dice = 1 - (2 * x @ g + 1) / (x @ x + g @ g + 1)
        torch.testing.assert_close(losses.dice(logits, masks)[i], dice)
    true = torch.where(masks > 0, p, 1 - p)
    focal = torch.where(masks > 0, 0.25, 0.75) * (1 - true) ** 2 * cross
    torch.testing.assert_close(losses.focal(logits, masks), focal.mean((1, 2)))
    flat = losses.focal(logits, masks, gamma=0, alpha=0.5)
    torch.testing.assert_close(flat, 0.5 * losses.bce(logits, masks))
    both = losses.bce(logits, masks) + losses.dice(logits, masks)
    torch.testing.assert_close(losses.bce_dice(logits, masks), both)


def test_boundary_bce_counts_the_band_more():
    logits = torch.randn(
        10, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    masks = torch.from_numpy(shapes(28)).double()
    band = losses.boundary_region(masks)
    cross = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    for weight in (0.0, 1.0, 2.5):
        expected = torch.stack(
            [((1 + weight * band[i]) * cross[i]).sum() / 28**2 for i in range(10)]
        )
        torch.testing.assert_close(losses.boundary_bce(logits, masks, weight=weight), expected)
    torch.testing.assert_close(
        losses.boundary_bce(logits, masks, weight=0), losses.bce(logits, masks)
    )


def test_large_masks_do_not_overflow_half_precision():
    logits, masks = torch.full((1, 400, 400), 20.0).half(), torch.ones(1, 400, 400)
    for name, loss in losses.MASK_LOSSES.items():  # a plain sum of 160,000 ones is inf
        assert loss(logits, masks).item() == pytest.approx(0, abs=1e-2), name


# GIoU

BOXES = st.tuples(*[st.floats(0, 50, width=32)] * 2, *[st.floats(1, 50, width=32)] * 2)


@settings(deadline=None, max_examples=100)
@given(pairs=st.lists(st.tuples(BOXES, BOXES), min_size=1, max_size=8))
def test_giou_equals_torchvision(pairs):
    a, b = (torch.tensor([pair[k] for pair in pairs], dtype=torch.float64) for k in (0, 1))
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    ours = losses.giou(a, b)
    torch.testing.assert_close(ours, generalized_box_iou_loss(a, b), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, 1 - generalized_box_iou(a, b).diagonal(), rtol=0, atol=1e-9)


def test_giou_gradients():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(6, 4, generator=rng, dtype=torch.float64) * 9 for _ in range(2))
    a[:, 2:] += a[:, :2] + 1
    b[:, 2:] += b[:, :2] + 1
    b[0] += 100  # no overlap: GIoU still pulls
    assert gradcheck(losses.giou, (a.requires_grad_(), b.requires_grad_()))
    (grad,) = torch.autograd.grad(losses.giou(a, b)[0], a)
    assert (grad[0, 2:] < 0).all()  # towards the target, far to the right and below


def test_giou_edges():
    box = torch.tensor([[1.0, 2, 5, 9]])
    assert losses.giou(box, box).item() == pytest.approx(0)
    far = losses.giou(box, box + 1e5).item()
    assert 1.99 < far <= 2
    empty = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 9], [5, 5, 2, 2], [0, 0, 0, 0]])
    x = empty.clone().requires_grad_()
    for target in (box.expand(4, 4), empty):
        value = losses.giou(x, target)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert ((value >= 0) & (value <= 2)).all()
    assert losses.giou(empty[:1], empty[:1]).item() == 1
    assert losses.giou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    big = torch.tensor([[0.0, 0, 1300, 800]]).half()  # its area is beyond float16
    assert losses.giou(big, big * 0.5).item() == pytest.approx(0.75, abs=1e-3)
    for a, b in ((box, box[0]), (box[0], box[0]), (box, torch.zeros(2, 4))):
        with pytest.raises(InputError, match="giou: boxes and targets are"):
            losses.giou(a, b)


# Weighted mean and balance


def test_weighted_mean():
    values = torch.tensor([1.0, 2, 4], requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 0.25], requires_grad=True)
    mean = losses.weighted_mean(values, weights)
    assert mean.item() == pytest.approx((0.5 * 1 + 0.25 * 4) / 0.75)
    mean.backward()
    torch.testing.assert_close(values.grad, torch.tensor([2 / 3, 0, 1 / 3]))
    assert weights.grad is None
    for count in (0, 3):  # no samples, or weights that are all 0
        x = torch.ones(count, requires_grad=True)
        zero = losses.weighted_mean(x, torch.zeros(count))
        zero.backward()
        assert zero.item() == 0
        assert (x.grad == 0).all()
    with pytest.raises(InputError, match="weighted_mean: losses and weights"):
        losses.weighted_mean(torch.ones(3), torch.ones(2))
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(5, generator=rng, dtype=torch.float64, requires_grad=True)
    w = torch.rand(5, generator=rng, dtype=torch.float64)
    assert gradcheck(lambda x: losses.weighted_mean(x, w), (x,))


def test_weighted_mean_of_many_halves():
    x = torch.full((200_000,), 0.5, dtype=torch.float16)  # the weights' sum is beyond float16
    assert losses.weighted_mean(x, torch.ones_like(x)).item() == pytest.approx(0.5, abs=1e-3)


def test_balance():
    ranking = torch.tensor(0.6, requires_grad=True)
    raw = torch.tensor(0.2, requires_grad=True)
    balanced = losses.balance(ranking, raw)
    assert balanced.item() == pytest.approx(0.6)  # reads the ranking loss ...
    balanced.backward()
    assert raw.grad.item() == pytest.approx(0.6 / 0.2)  # ... lambda is a constant ...
    assert ranking.grad is None  # ... and nothing flows into the ranking


def test_balance_floor_and_guard():
    raw = torch.tensor(0.5, requires_grad=True)
    losses.balance(torch.tensor(0.0), raw).backward()
    assert raw.grad == 0
    raw.grad = None
    losses.balance(torch.tensor(0.01), raw, floor=0.25).backward()
    assert raw.grad.item() == pytest.approx(0.25 / 0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        zero = torch.zeros((), dtype=dtype, requires_grad=True)
        value = losses.balance(torch.tensor(0.9, dtype=dtype), zero)
        value.backward()
        assert value == 0
        assert zero.grad.isfinite() or dtype == torch.float16  # 9e5 is beyond float16
    tiny = losses.balance(torch.tensor(0.9), torch.tensor(1e-9))
    assert tiny.item() == pytest.approx(0.9e-3)
