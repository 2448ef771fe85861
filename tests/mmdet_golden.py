"""What MMDetection's own modules gave (``golden/README.md``), and our models with its weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from brefine.methods import create
from brefine.pretrained import from_mmdetection
from brefine.structures import Bitmaps, Images, Instances

FOLDER = Path(__file__).parent / "golden" / "mmdet"
SIZES = [(128, 160), (112, 150)]  # of the pictures inside the padding
ORIGINAL = [(128, 160), (75, 100)]
#: nothing is sampled, so that every loss is determined
DETECTOR = {
    "finest": 14.0,
    "box_hidden": 32,
    "frozen_stages": 0,
    "rpn_samples": None,
    "roi_samples": None,
    "mask_rois": None,
    "add_truth": False,
    "detections": 6,
}
SHALLOW = {"rtol": 1e-4, "atol": 1e-4}
DEEP = {"rtol": 1e-3, "atol": 1e-3}


class Golden(dict[str, Tensor]):
    """The arrays of a method as tensors."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        files = sorted(FOLDER.glob(f"{name}.*.npz"))
        assert files
        for file in files:
            with np.load(file) as arrays:
                self.update({k: torch.from_numpy(v) for k, v in arrays.items() if k != "meta"})

    def features(self) -> list[Tensor]:
        return [self[f"in/feat/s{stride}"] for stride in (4, 8, 16, 32, 64)]

    def masks(self, key: str) -> Tensor:
        """Packed masks: ``out/final/masks_{}_0``, with ``bits`` and ``shape`` in its place."""
        shape = self[key.format("shape")].tolist()
        bits = np.unpackbits(self[key.format("bits")].numpy())[: int(np.prod(shape))]
        return torch.from_numpy(bits.reshape(shape))

    def targets(self) -> list[Instances]:
        found = []
        for i, (height, width) in enumerate(SIZES):
            masks = self.masks(f"in/gt/masks_{{}}_{i}")[:, :height, :width]
            boxes, labels = self[f"in/gt/boxes_{i}"], self[f"in/gt/labels_{i}"]
            found.append(Instances((height, width), boxes, labels, masks=Bitmaps.of(masks)))
        return found

    def images(self) -> Images:
        return Images(torch.zeros(2, 3, 128, 160), torch.tensor(SIZES))

    def pair(self, key: str) -> list[Tensor]:
        """What there is of each picture: ``out/det/labels_{}``."""
        return [self[key.format(i)] for i in range(2)]

    def detections(self) -> list[Instances]:
        """What MMDetection detected, as boxes to ask masks for."""
        pairs = zip(self.pair("out/det/bboxes_{}"), self.pair("out/det/labels_{}"), strict=True)
        return [Instances(size, *pair) for size, pair in zip(SIZES, pairs, strict=True)]


class Fixed(nn.Module):
    """A trunk that gives the features there are."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Images) -> list[Tensor]:
        return self.features


def build(golden: Golden, method: str, **options: Any) -> nn.Module:
    """Our model with the golden weights, on the golden features and proposals."""
    channels = golden["in/feat/s4"].shape[1]
    detector = {**DETECTOR, **options.pop("detector", {})}
    model: Any = create(
        method, 5, backbone="lcnet_035", channels=channels, detector=detector, **options
    )
    theirs = {key[7:]: value for key, value in golden.items() if key.startswith("weight/")}
    missing, unexpected = model.load_state_dict(from_mmdetection(theirs, model), strict=False)
    assert not unexpected
    has_rpn = any(key.startswith("rpn_head.") for key in theirs)
    assert all(key.startswith(("trunk.", "rpn.")[: 1 if has_rpn else 2]) for key in missing)
    model.trunk = Fixed(golden.features())
    if not has_rpn:
        model.rpn.propose = lambda *_, **__: golden.pair("in/proposals_{}")
        model.rpn.loss = lambda *_: ({"rpn": torch.zeros(())}, torch.zeros(()))
    return model.eval()  # type: ignore[no-any-return]


def paste(probability: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks ``[N, H, W]`` as MMDetection pastes them: probabilities, zero outside of the grid."""
    height, width = size
    y = (torch.arange(height) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = (torch.arange(width) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)
    read = functional.grid_sample(probability[:, None], grid, align_corners=False)
    return read[:, 0] >= 0.5


def assert_same_results(
    golden: Golden,
    model: nn.Module,
    *,
    final: str = "out/final",
    order: Callable[[Tensor], Tensor] | None = None,
    flipped: int = 3,
) -> None:
    """Detections, final boxes and final masks of both pictures are MMDetection's."""
    with torch.inference_mode():
        found = model.predict(golden.images())
    for i, (instances, original) in enumerate(zip(found, ORIGINAL, strict=True)):
        scores, place = golden[f"{final}/scores_{i}"], slice(None)
        if order is not None:
            place = order(scores)
        scale = torch.tensor([original[1] / SIZES[i][1], original[0] / SIZES[i][0]]).repeat(2)
        boxes = instances.boxes * scale
        torch.testing.assert_close(instances.scores, scores[place], **DEEP)
        assert torch.equal(instances.labels, golden[f"{final}/labels_{i}"][place])
        torch.testing.assert_close(boxes, golden[f"{final}/bboxes_{i}"][place], **DEEP)
        expected = golden.masks(f"{final}/masks_{{}}_{i}")[place].bool()
        masks = paste(instances.logits.sigmoid(), boxes, original)
        assert 0.01 < expected.float().mean() < 0.5
        assert (masks != expected).sum() <= flipped
