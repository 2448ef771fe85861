"""Draw the pictures of docs/losses.md: python docs/draw_losses.py."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from brefine.losses import boundary_region

OUT = Path(__file__).parent / "images"
ZOOM = 2  # drawn twice as large, then reduced: smooth edges
INK, GREY, PALE, PAPER = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#2f6fb4", "#e8833a", "#2a9d6f", "#c8403a"


class Canvas:
    """A drawing whose coordinates are pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * ZOOM, height * ZOOM), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, *points: tuple[float, float], fill: str = INK, width: float = 1.5) -> None:
        """A line through points."""
        scaled = [(x * ZOOM, y * ZOOM) for x, y in points]
        self.draw.line(scaled, fill=fill, width=round(width * ZOOM), joint="curve")

    def box(self, x1: float, y1: float, x2: float, y2: float, fill: str) -> None:
        """A filled rectangle; x2 and y2 are exclusive."""
        self.draw.rectangle([x1 * ZOOM, y1 * ZOOM, x2 * ZOOM - 1, y2 * ZOOM - 1], fill=fill)

    def dot(self, x: float, y: float, radius: float, fill: str, outline: str = PAPER) -> None:
        """A filled circle."""
        corners = [(x - radius) * ZOOM, (y - radius) * ZOOM, (x + radius) * ZOOM]
        self.draw.ellipse([*corners, (y + radius) * ZOOM], fill=fill, outline=outline, width=ZOOM)

    def arrow(self, x1: float, x2: float, y: float, fill: str) -> None:
        """A horizontal arrow from x1 to x2."""
        head = 6 if x2 > x1 else -6
        self.line((x1, y), (x2 - head, y), fill=fill, width=2.5)
        tip = [(x2, y), (x2 - head * 1.4, y - 5), (x2 - head * 1.4, y + 5)]
        self.draw.polygon([(a * ZOOM, b * ZOOM) for a, b in tip], fill=fill)

    def text(
        self, x: float, y: float, text: str, size: int = 15, fill: str = INK, anchor: str = "mm"
    ) -> None:
        """Text anchored as Pillow does it: "mm" is centred."""
        font = ImageFont.load_default(size * ZOOM)
        self.draw.text((x * ZOOM, y * ZOOM), text, font=font, fill=fill, anchor=anchor)

    def save(self, name: str) -> None:
        """Write the picture into docs/images."""
        width, height = self.image.size
        image = self.image.resize((width // ZOOM, height // ZOOM), Image.Resampling.LANCZOS)
        image.quantize(128, dither=Image.Dither.NONE).save(OUT / name, optimize=True)


# (score, IoU) of the positives; the second is the one that looks around
POSITIVES = [(-0.9, 0.95), (0.3, 0.7), (0.55, 0.5), (1.5, 0.85), (2.1, 0.4)]
NEGATIVES = [-2.2, -1.7, -1.25, -0.45, 0.05, 0.42, 1.15]
LOOKING, DELTA = 1, 0.5


def ramp(score: float) -> float:
    """H of a sample as seen from the one that looks."""
    return min(max((score - POSITIVES[LOOKING][0]) / (2 * DELTA) + 0.5, 0), 1)


def draw_ranking() -> None:
    """Whom one positive is compared with by the ranking and by the sorting loss."""
    canvas = Canvas(900, 640)
    centre, iou = POSITIVES[LOOKING]
    steps = [ramp(score) for score, _ in POSITIVES]
    false = sum(ramp(score) for score in NEGATIVES)
    ranking = false / (sum(steps) + false)
    loss = [1 - other for _, other in POSITIVES]
    right = [h * (other >= iou) for h, (_, other) in zip(steps, POSITIVES, strict=True)]
    current = sum(h * e for h, e in zip(steps, loss, strict=True)) / sum(steps)
    target = sum(h * e for h, e in zip(right, loss, strict=True)) / sum(right)
    sorting = current - target
    wrong = sum(steps) - sum(right)

    def x(score: float) -> float:
        return 450 + (score - 0.2) * 155

    def panel(top: float, title: str, formula: str) -> float:
        floor = top + 190
        canvas.text(40, top, title, 19, anchor="lm")
        canvas.text(860, top, formula, 16, anchor="rm")
        canvas.box(x(centre - DELTA), top + 40, x(centre + DELTA), floor, "#f3f5f7")
        canvas.line((x(-2.55), floor), (x(2.75), floor), fill=GREY)
        curve = [(-2.55, 0), (centre - DELTA, 0), (centre + DELTA, 1), (2.75, 1)]
        canvas.line(*[(x(a), floor - 130 * b) for a, b in curve], fill=GREY, width=2)
        canvas.text(x(2.6), floor - 144, "H = 1", 14, GREY)
        canvas.text(x(-2.4), floor - 14, "H = 0", 14, GREY)
        canvas.text(x(centre), top + 52, "2 delta", 13, GREY)
        canvas.text(x(2.75), floor + 20, "score", 14, GREY, "rm")
        return floor

    def sample(score: float, floor: float, colour: str, label: str = "") -> None:
        height = floor - 130 * ramp(score)
        canvas.line((x(score), floor), (x(score), height), fill=colour, width=2)
        canvas.dot(x(score), floor, 8, colour)
        if ramp(score):
            canvas.dot(x(score), height, 4, colour)
            canvas.text(x(score) - 7, height - 11, f"{ramp(score):.2f}", 13, colour, "rm")
        canvas.text(x(score), floor + 20, label, 13, colour)

    floor = panel(
        40,
        "Ranking: which negatives stand above it?",
        f"ranking error = {false:.2f} / ({false:.2f} + {sum(steps):.2f}) = {ranking:.2f}",
    )
    for score in NEGATIVES:
        sample(score, floor, RED if ramp(score) else GREY)
    canvas.dot(x(centre), floor, 11, GREEN)
    for score in NEGATIVES:
        if ramp(score):
            canvas.arrow(x(score), x(score) - 70 * ramp(score), floor + 36, RED)
    canvas.arrow(x(centre), x(centre) + 110, floor + 52, GREEN)
    canvas.text(40, floor + 44, "gradient step", 14, INK, "lm")

    floor = panel(
        350,
        "Sorting: which positives with a smaller IoU stand above it?",
        f"sorting error = {current:.2f} - {target:.2f} = {sorting:.2f}",
    )
    for (score, other), h in zip(POSITIVES, steps, strict=True):
        if score != centre:
            colour = GREY if h == 0 else RED if other < iou else BLUE
            sample(score, floor, colour, f"IoU {other}")
    canvas.dot(x(centre), floor, 11, GREEN)
    canvas.text(x(centre) - 6, floor + 20, f"IoU {iou}", 13, GREEN, "rm")
    for (score, other), h in zip(POSITIVES, steps, strict=True):
        if h and other < iou:
            canvas.arrow(x(score), x(score) - 110 * h / wrong, floor + 40, RED)
    canvas.arrow(x(centre), x(centre) + 110, floor + 56, GREEN)
    canvas.text(40, floor + 48, "gradient step", 14, INK, "lm")

    legend = [
        (GREEN, "the positive that looks"),
        (RED, "wrongly above: pushed down"),
        (BLUE, "rightly above: left alone"),
        (GREY, "below: does not count"),
    ]
    for place, (colour, text) in zip((40, 245, 475, 690), legend, strict=True):
        canvas.dot(place + 8, 622, 7, colour)
        canvas.text(place + 22, 622, text, 14, anchor="lm")
    canvas.save("loss_ranking.png")


def outline(size: int) -> torch.Tensor:
    """An object with a hole that the left edge of the box cuts off, ``[size, size]``."""
    ys, xs = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    across, down = (xs - 0.32) / 1.45, ys - 0.5
    angle = torch.atan2(down, across)
    body = torch.hypot(across, down) < 0.36 + 0.05 * torch.cos(3 * angle + 0.5)
    hole = torch.hypot(xs - 0.5, ys - 0.45) < 0.09
    return (body & ~hole).float()


def draw_boundary() -> None:
    """The band of eq. 1 at the three sizes."""
    side, gap, top = 252, 36, 56
    canvas = Canvas(3 * side + 4 * gap, top + side + 60)
    for column, (size, width) in enumerate([(14, 1), (28, 1), (56, 2)]):
        mask = outline(size)
        band = boundary_region(mask[None])[0]
        left, cell = gap + column * (side + gap), side / size
        cells = "1 cell" if width == 1 else f"{width} cells"
        canvas.text(left + side / 2, 30, f"{size} x {size}: band of {cells}", 18)
        for row in range(size):
            for col in range(size):
                inside, edge = mask[row, col] > 0, band[row, col] > 0
                fill = ORANGE if edge else "#a9c6e8" if inside else "#f3f5f7"
                x, y = left + col * cell, top + row * cell
                canvas.box(x, y, x + cell, y + cell, fill)
        for k in range(size + 1):
            thin = 0.5 if size > 14 else 1
            for line in (
                [(left + k * cell, top), (left + k * cell, top + side)],
                [(left, top + k * cell), (left + side, top + k * cell)],
            ):
                canvas.line(*line, fill=PAPER, width=thin)
        cut = mask[:, 0].nonzero()[:, 0]
        low, high = top + cut.min().item() * cell, top + (cut.max().item() + 1) * cell
        canvas.line((left - 4, low), (left - 4, high), fill=INK, width=3)
    legend = [
        (ORANGE, "boundary region B"),
        ("#a9c6e8", "rest of the object"),
        (INK, "cut off by the box: no boundary here"),
    ]
    for place, (colour, text) in zip((gap, 265, 475), legend, strict=True):
        y = top + side + 32
        canvas.box(place, y - 8, place + 16, y + 8, colour)
        canvas.text(place + 24, y, text, 15, anchor="lm")
    canvas.save("loss_boundary.png")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    draw_ranking()
    draw_boundary()
