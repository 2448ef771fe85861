"""Labelled sets in memory and detections to score, for the tests of evaluation and output."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask

from brefine.data.lvis import Federated
from brefine.structures import Bitmaps, Category, Instances


@dataclass(frozen=True)
class FakePicture:
    id: int | str
    file: Path
    size: tuple[int, int]


@dataclass
class FakeSet:
    """A labelled set in memory; objects are (picture, label, dense mask, crowd)."""

    categories: list[Category]
    pictures: list[FakePicture]
    objects: list[tuple[int, int, np.ndarray, bool]] = field(default_factory=list)
    path: Path = Path("labels.json")
    federated: Federated | None = None

    def __len__(self):
        return len(self.pictures)

    def target(self, index):
        mine = [(label, mask) for i, label, mask, crowd in self.objects if i == index and not crowd]
        size = self.pictures[index].size
        masks = np.stack([m for _, m in mine]) if mine else np.zeros((0, *size))
        bitmaps = Bitmaps.of(torch.as_tensor(masks))
        labels = torch.tensor([label for label, _ in mine], dtype=torch.int64)
        return Instances(size, bitmaps.boxes(), labels, masks=bitmaps)

    def annotations(self, index):
        name = self.pictures[index].id
        return [e for e in self.ground_truth()["annotations"] if e["image_id"] == name]

    def ground_truth(self):
        annotations = []
        for index, label, mask, crowd in self.objects:
            rle = dense_rle(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": self.pictures[index].id,
                    "category_id": self.categories[label].id,
                    "segmentation": rle,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                }
            )
        return {
            "images": [
                {"id": p.id, "height": p.size[0], "width": p.size[1]} for p in self.pictures
            ],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


def dense_rle(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return rle | {"counts": rle["counts"].decode()}


def detect(dataset, mask, score, label=0, picture=0):
    rle = dense_rle(mask)
    return {
        "image_id": dataset.pictures[picture].id,
        "category_id": dataset.categories[label].id,
        "score": score,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "segmentation": rle,
    }


def disc(x, y, radius, size=(90, 120)):
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.hypot(rows - y, columns - x) < radius


def blob(random, size):
    """One curved mask, from a few pixels to most of the picture, some cut by the border."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    cy, cx = random.uniform(0, height), random.uniform(0, width)
    radius = np.exp(random.uniform(math.log(2), math.log(max(size) * 0.6)))
    angle = np.arctan2(y - cy, x - cx)
    wave = 1 + random.uniform(0, 0.5) * np.sin(random.integers(2, 7) * angle + random.uniform(0, 6))
    mask = np.hypot(y - cy, (x - cx) * random.uniform(0.6, 1.5)) < radius * wave
    return mask if mask.any() else np.eye(height, width, dtype=bool)


def random_set(seed, *, pictures=8, objects=6, ids="int", crowds=True, classes=3):
    random = np.random.default_rng(seed)
    categories = [Category(3 + 7 * (i * 5 % 11), f"class {i}") for i in range(classes)]
    names = [10 * (i * 7 % 23) + 1 if ids == "int" else f"p{i * 7 % 23}" for i in range(pictures)]
    sizes = [tuple(random.integers(20, 150, 2).tolist()) for _ in names]
    dataset = FakeSet(
        categories, [FakePicture(n, Path(str(n)), s) for n, s in zip(names, sizes, strict=True)]
    )
    for index in range(1, pictures):  # the first one stays without objects
        for i in range(random.integers(0, objects + 1)):
            mask = blob(random, sizes[index])
            crowd = crowds and i > 0 and random.random() < 0.2
            dataset.objects.append((index, int(random.integers(classes)), mask, crowd))
    return dataset


def random_records(dataset, seed, *, copies=3, stray=4):
    """Jittered labels and stray blobs, with many equal scores."""
    random = np.random.default_rng(seed)
    drawn = []
    for index, label, mask, _ in dataset.objects:
        for _ in range(random.integers(0, copies + 1)):
            moved = np.roll(mask, random.integers(-2, 3, 2), (0, 1))
            other = label if random.random() < 0.8 else random.integers(len(dataset.categories))
            drawn.append((index, int(other), moved))
    for _ in range(stray * len(dataset)):
        index = int(random.integers(len(dataset)))
        size = dataset.pictures[index].size
        label = int(random.integers(len(dataset.categories)))
        mask = blob(random, size) if random.random() < 0.9 else np.zeros(size, bool)
        drawn.append((index, label, mask))
    records = []
    for i in random.permutation(len(drawn)):
        index, label, mask = drawn[i]
        rle = dense_rle(mask)
        box = coco_mask.toBbox(rle) + random.uniform(-1, 1, 4)
        records.append(
            {
                "image_id": dataset.pictures[index].id,
                "category_id": dataset.categories[label].id,
                "score": round(float(random.random()), 1),
                "bbox": [*box[:2].tolist(), *np.maximum(box[2:], 0.1).tolist()],
                "segmentation": rle,
            }
        )
    return records
