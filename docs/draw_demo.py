"""Draw docs/images/demo.png from a finished demo: label, Mask R-CNN and BRefine side by side.

brefine demo --out demo --seed 2
python docs/draw_demo.py demo 1 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from brefine import draw
from brefine.data.coco import CocoSet
from brefine.data.loader import read_picture
from brefine.demo import METHODS
from brefine.evaluate import Report

TARGET = Path(__file__).parent / "images" / "demo.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("pictures", type=int, nargs="+", help="places in the validation set")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    dataset = CocoSet(options.demo / "toy/val.json")
    categories = dataset.categories
    label = {category.id: i for i, category in enumerate(categories)}
    rows = []
    for index in options.pictures:
        picture = dataset.pictures[index]
        pixels = read_picture(picture.file)
        drawn = [draw.overlay(pixels, dataset.target(index), categories, names=False)]
        for method in METHODS:
            report = Report.load(options.demo / method)
            found = [
                record
                for record in report.records
                if record["image_id"] == picture.id
                and record["score"] >= report.thresholds[label[record["category_id"]]]
            ]
            drawn.append(draw.overlay(pixels, found, categories, names=False))
        rows.append(draw.side_by_side(drawn, ["label", *METHODS.values()]))
    page = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    page.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
