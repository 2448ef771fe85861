"""Points: where they are read, where training puts them, and the truth there."""

import pytest
import torch
from torch.nn import functional

from brefine.methods.pointrend import PointHead, read
from brefine.parts.boxes import CONVENTIONS
from brefine.parts.two_stage import Truth
from brefine.structures import Bitmaps, Instances

ROWS = torch.tensor(
    [[0.0, 3, 5, 40, 44], [1, -20, 10, 30, 90], [0, 50, 0, 64.5, 12], [1, 7, 7, 7, 9]]
)


def on_the_map(points: torch.Tensor) -> torch.Tensor:
    """Pixels ``[R, P, 2]`` of points in RoIs."""
    corner, size = ROWS[:, None, 1:3], ROWS[:, None, 3:] - ROWS[:, None, 1:3]
    return corner + points * size


def test_features_are_read_as_grid_sample_does():
    feature = torch.randn(2, 3, 12, 16, requires_grad=True)
    points = torch.rand(len(ROWS), 50, 2) * 1.4 - 0.2  # beyond RoIs and the map, too
    grid = on_the_map(points) / torch.tensor([64.0, 48]) * 2 - 1
    expected = functional.grid_sample(
        feature[ROWS[:, 0].long()], grid[:, None], align_corners=False
    )[:, :, 0].transpose(1, 2)
    found = read(feature, ROWS, points, 4)
    torch.testing.assert_close(found, expected)
    assert (found == 0).all(2).any()
    weights = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), feature) for x in (found, expected))
    torch.testing.assert_close(mine, theirs)


def test_truth_at_points_is_read_as_from_dense_masks():
    masks = torch.rand(5, 48, 64) > 0.5
    masks[2] = False  # an object without a pixel
    masks[3, :, :40] = masks[3, 20:] = False  # a small window
    targets = [Instances((48, 64), torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64),
                         masks=Bitmaps.of(masks))] * 2  # fmt: skip
    index = torch.tensor([0, 4, 2, 3])
    points = torch.rand(len(ROWS), 60, 2) * 1.2 - 0.1
    grid = on_the_map(points) / torch.tensor([64.0, 48]) * 2 - 1
    expected = functional.grid_sample(
        masks[index, None].float(), grid[:, None], align_corners=False
    )[:, 0, 0]
    found = Truth(ROWS, index, targets, CONVENTIONS["detectron"]).at(points)
    torch.testing.assert_close(found, expected)
    assert found.std() > 0.1
    assert not found[2].any()


@pytest.mark.parametrize("sampling", ["biased", "uniform", "grid"])
def test_training_points(sampling):
    head = PointHead(8, 2, hidden=8, train_points=100, sampling=sampling)
    ramp = torch.linspace(-3, 3, 7).expand(20, 7, 7)  # 0 in the middle column
    points = head.sample(ramp)
    assert points.shape == (20, 100, 2)
    assert ((points >= 0) & (points <= 1)).all()
    near = ((points[..., 0] - 0.5).abs() < 0.2).float().mean()
    # Three quarters are the surest third of random ones to lie near, one quarter is uniform.
    assert near == pytest.approx({"biased": 0.85, "uniform": 0.4, "grid": 0.4}[sampling], abs=0.06)


def test_only_the_least_certain_cells_are_decided_anew():
    head = PointHead(8, 3, hidden=8, point_channels=8, subdivisions=1, points=60)
    features, labels = [torch.randn(2, 8, 24, 24)], torch.tensor([0, 1, 2, 1])
    head.logits.bias.data.fill_(9.0)  # what the point head decides is seen
    with torch.no_grad():
        coarse = head.predict_coarse(features, ROWS)[torch.arange(4), labels]
        plain = functional.interpolate(coarse[:, None], scale_factor=2, mode="bilinear")[:, 0]
        refined = head(features, ROWS, labels)
    changed = refined != plain
    assert (changed.sum((1, 2)) == 60).all()
    assert (refined[changed] > 5).all()
    for sure, mask in zip(plain.abs(), changed, strict=True):
        assert sure[mask].max() <= sure[~mask].min()
