"""Parameters and multiply-adds of every method at full size, beside MMDetection's.

    python benchmarks/methods.py [--write]

80 classes, ResNet-50, a picture of 800 x 1333 pixels, 1000 proposals, 100 detections. What is
compared with is counted layer by layer from MMDetection 3's configurations, by hand: nothing of
this package takes part. ``--write`` puts the table into docs/methods.md, between its markers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from brefine.files import replacing
from brefine.info import Part, describe

DOCS = Path(__file__).parents[1] / "docs" / "methods.md"
MARKS = "<!-- table of benchmarks/methods.py -->", "<!-- end of the table -->"


def conv(inside: int, out: int, size: int = 1, *, bias: bool = True) -> int:
    """Parameters of a convolution; size 1 is a fully connected layer, too."""
    return inside * out * size * size + out * bias


C, K, HIDDEN = 256, 80, 1024
RESNET50 = 25_557_032 - conv(2048, 1000)  # torchvision's figure, without its classifier
FPN = sum(conv(width, C) for width in (256, 512, 1024, 2048)) + 4 * conv(C, C, 3)
RPN = conv(C, C, 3) + conv(C, 3) + conv(C, 12)
FC = conv(49 * C, HIDDEN) + conv(HIDDEN, HIDDEN)
DETECTOR = RESNET50 + FPN + RPN
BOX = FC + conv(HIDDEN, K + 1) + conv(HIDDEN, 4 * K)
CASCADE_BOX = FC + conv(HIDDEN, K + 1) + conv(HIDDEN, 4)
MASK = 4 * conv(C, C, 3) + conv(C, C, 2) + conv(C, K)
POINT = sum(conv(C + K, width) for width in (C, C, C, K))
COARSE = conv(C, C, 2) + FC + conv(HIDDEN, 49 * K)
IOU = conv(C + 1, C, 3) + 3 * conv(C, C, 3) + FC + conv(HIDDEN, K)
SEMANTIC = 5 * conv(C, C) + 4 * conv(C, C, 3) + conv(C, C) + conv(C, 183)
HTC = DETECTOR + 3 * (CASCADE_BOX + MASK) + 2 * conv(C, C)

WIDE = conv(C, C, 3, bias=False) + 2 * C  # with GroupNorm instead of a bias
GRIDS = (40, 36, 24, 16, 12)
SOLO_CLASSES = 7 * WIDE + conv(C, K, 3)
SOLO = 7 * WIDE + 2 * 9 * C + sum(conv(C, side**2) for side in GRIDS)
DECOUPLED = 2 * (7 * WIDE + 9 * C + sum(conv(C, side, 3) for side in GRIDS))
HIGH_FPN = sum(conv(width, C) for width in (512, 1024, 2048)) + 3 * conv(C, C, 3)
YOLACT_HEAD = conv(C, C, 3) + conv(C, 3 * (K + 1), 3) + conv(C, 3 * 4, 3) + conv(C, 3 * 32, 3)
YOLACT = YOLACT_HEAD + 4 * conv(C, C, 3) + conv(C, 32) + conv(C, K)

#: method, options, MMDetection's parameters (none: it has no such method)
MODELS: list[tuple[str, dict[str, Any], int | None]] = [
    ("mask_rcnn", {}, DETECTOR + BOX + MASK),
    ("brefine", {}, None),
    ("pointrend", {}, DETECTOR + BOX + COARSE + POINT),
    ("mask_scoring", {}, DETECTOR + BOX + MASK + IOU),
    ("cascade", {}, DETECTOR + 3 * (CASCADE_BOX + MASK)),
    ("htc", {}, HTC),
    ("htc", {"semantic_classes": 183}, HTC + SEMANTIC),
    ("solo", {}, RESNET50 + FPN + SOLO_CLASSES + SOLO),
    ("solo", {"decoupled": True}, RESNET50 + FPN + SOLO_CLASSES + DECOUPLED),
    ("bmask", {}, None),
    ("blendmask", {}, None),
    ("yolact", {}, None),
    (
        "yolact",
        {"top_from_c5": True},
        RESNET50 + HIGH_FPN + conv(2048, C, 3) + conv(C, C, 3) + YOLACT,
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    heads = ("parameters", "MMDetection's", "GMAC: trunk to branch", "box head", "mask head", "all")
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for method, options, published in MODELS:
        settings = [f"model.options.{key}={value}" for key, value in options.items()]
        parts, _ = describe(method, settings)
        lines.append(row(method, options, [p for p in parts if p.name[0] != " "], published))
    table = "\n".join(lines)
    print(table)
    if parser.parse_args().write:
        text = DOCS.read_text(encoding="utf-8")
        before, rest = text.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        with replacing(DOCS) as aside:
            aside.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")


def row(method: str, options: dict[str, Any], parts: list[Part], published: int | None) -> str:
    """One line of the table."""
    count = sum(part.parameters for part in parts)
    macs = {part.name: part.macs * part.uses / 1e9 for part in parts}
    heads = [macs.get("box_head") or macs["class_head"], macs["mask_head"]]
    total = sum(macs.values())
    name = " ".join([f"`{method}`", *(f"`{key}: {value}`" for key, value in options.items())])
    beside = "-" if published is None else f"{published / 1e6:.2f} M"
    figures = " | ".join(f"{value:.1f}" for value in (total - sum(heads), *heads, total))
    return f"| {name} | {count / 1e6:.2f} M | {beside} | {figures} |"


if __name__ == "__main__":
    main()
