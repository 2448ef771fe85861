"""Every method on a device that is not the CPU, as on a GPU: `second_device`."""

import pytest
import torch

from brefine import views
from brefine.data.coco import CocoSet
from brefine.data.toy import CATEGORIES
from brefine.evaluate import evaluate
from brefine.methods import METHODS, create
from brefine.predict import Predictor
from second_device import second_device
from test_methods import batch, build, scene, small

CASES = [
    ("mask_rcnn", {}),
    ("brefine", {}),
    ("brefine", {"widths": (32, 16, 8), "detail": 8, "early_exit": 1.0, "ranking": False}),
    ("pointrend", {"sampling": "grid", "hidden": 64, "point_channels": 16}),
    ("mask_scoring", {"iou_hidden": 64, "ranking": True}),
    ("cascade", {"classify": "own"}),
    ("htc", {}),
    ("bmask", {}),
    ("solo", {"ranking": True}),
    ("yolact", {}),
    ("blendmask", {}),
]
NAMES = ["-".join([name, *options]) for name, options in CASES]


def test_every_method_is_among_the_cases():
    assert {name for name, _ in CASES} == set(METHODS)


class TestDevice:
    def test_what_fails_on_a_gpu_fails(self):
        with second_device():
            here, there = torch.ones(3), torch.ones(3, device="meta")
            with pytest.raises(RuntimeError, match="two devices"):
                here + there
            with pytest.raises(RuntimeError, match="two devices"):
                here[torch.tensor([0], device="meta")]
            with pytest.raises(RuntimeError, match="two devices"), torch.inference_mode():
                torch.minimum(there, here)
            with pytest.raises(RuntimeError, match="generator"):
                torch.rand(3, device="meta", generator=torch.Generator())

    def test_what_works_on_a_gpu_works_and_waits_where_it_does(self):
        with second_device() as waits:
            there = torch.tensor([1.0, 2, 3], device="meta") * torch.tensor(2.0)
            there[there > 4] = 0.0
            assert (there.device.type, there.sum().device.type) == ("meta", "meta")
            assert waits.total() == 1  # made from a list
            assert there.tolist() == [2, 4, 0]
            assert there.cpu().tolist() == [2, 4, 0]
            assert there.sum().item() == 6
            assert there[there > 2].tolist() == [4]
            assert waits.total() == 6  # and two of them for the last


@pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
class TestMethods:
    def test_losses_gradients_and_predictions_are_those_of_the_cpu(self, name, options):
        results = []
        for device in ("cpu", "meta"):
            with second_device():
                model = build(name, **options).to(device)
                images, targets = batch(scene(5), scene(0), scene(3, 1))
                images, targets = images.to(device), [target.to(device) for target in targets]
                torch.manual_seed(1)
                named = model.loss(images, targets)
                sum(value for key, value in named.items() if key[:4] != "raw_").backward()
                with torch.inference_mode():
                    free = model.eval().predict(images)
                    given = model.predict(images, targets)
                assert {found.boxes.device.type for found in (*free, *given)} == {device}
                results.append(
                    {key: value.cpu() for key, value in named.items()}
                    | {key: p.grad.cpu() for key, p in model.named_parameters() if p.requires_grad}
                    | {f"free {i}": found.to("cpu").boxes for i, found in enumerate(free)}
                    | {f"given {i}": found.to("cpu").logits for i, found in enumerate(given)}
                )
        # The same kernels, but for sums whose order follows the number of elements.
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)

    def test_a_step_does_not_wait_for_each_object(self, name, options):
        counts = []
        for objects in (8, 80):
            with second_device() as waits:
                model = build(name, **options).to("meta")
                images, targets = batch(scene(objects), scene(objects // 2, 1))
                waits.clear()
                named = model.loss(images.to("meta"), [target.to("meta") for target in targets])
                sum(value for key, value in named.items() if key[:4] != "raw_").backward()
            counts.append(waits.total())
        # 108 more objects; ranking looks once a block of positives
        assert counts[1] <= counts[0] + 10, waits.most_common(5)
        assert counts[1] <= 180


@pytest.mark.parametrize("method", ["brefine", "yolact"])
def test_pictures_are_predicted_and_evaluated_as_on_the_cpu(method, toy_set):
    data = CocoSet(toy_set / "val.json")
    files = [picture.file for picture in data.pictures]
    results = []
    for device in ("cpu", "meta"):
        with second_device():
            torch.manual_seed(0)
            options = small(method)
            options["detector"] = options["detector"] | {"detections": 10}
            predictor = Predictor(
                create(method, len(CATEGORIES), **options),
                CATEGORIES,
                short_side=96,
                long_side=128,
                thresholds=0.0,
                device=device,
            )
            found = [
                predictor(files[0]),
                predictor(files[0], views=views.combine(flip=True, scales=(1.0, 1.5))),
                predictor(files[0], tile=64, overlap=16),
                *predictor.several(files[:2]),
            ]
            report = evaluate(predictor, data, progress=False, limit=1)
        results.append(
            {f"{i}": torch.as_tensor(one.boxes) for i, one in enumerate(found)}
            | {key: torch.tensor(value) for key, value in report.values.items()}
        )
    assert all(len(one.boxes) for one in found)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-3, equal_nan=True)
