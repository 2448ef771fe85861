"""Draw the figures of docs/methods.md: python docs/draw_methods.py."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).parent / "images"
INK, GREY, PALE = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2f6fb4", "#e8833a", "#2a9d6f", "#c8403a"


class Figure:
    """Blocks and arrows in a frame; coordinates are pixels.

    Args:
        width: of the frame.
        height: of the frame.
    """

    def __init__(self, width: int, height: int) -> None:
        self.size, self.parts = (width, height), []
        self.places: dict[str, tuple[float, float, float, float]] = {}

    def block(
        self, name: str, text: str, x: float, y: float, w: float, h: float, colour: str = PALE
    ) -> None:
        """A box with lines of text, known as ``name`` to arrows."""
        ink = INK if colour == PALE else "white"
        self.places[name] = x, y, w, h
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{colour}"/>'
        )
        lines = text.split("\n")
        for i, line in enumerate(lines):
            at = y + h / 2 + 4.5 + (i - (len(lines) - 1) / 2) * 15
            self.text(line, x + w / 2, at, ink)

    def text(self, text: str, x: float, y: float, colour: str = INK, size: int = 12) -> None:
        """A line of text around x."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle" '
            f'fill="{colour}">{escape(text)}</text>'
        )

    def arrow(self, start: str, end: str, colour: str = GREY, *, down: bool = False) -> None:
        """From the right edge of a block to the left edge of another; or from below to above."""
        x, y, w, h = self.places[start]
        u, v, wide, _ = self.places[end]
        if down:
            path = f"M{x + w / 2},{y + h} L{u + wide / 2},{v - 2}"
        else:
            high = v + self.places[end][3] / 2
            middle = (x + w + u) / 2
            path = f"M{x + w},{y + h / 2} C{middle},{y + h / 2} {middle},{high} {u - 2},{high}"
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" '
            'marker-end="url(#tip)"/>'
        )

    def save(self, name: str) -> None:
        """Write ``images/NAME.svg``."""
        width, height = self.size
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
            f'markerHeight="6" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{GREY}"/></marker>'
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif">',
            f"<defs>{tip}</defs>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *self.parts,
            "</svg>",
        ]
        (OUT / f"{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pointrend() -> None:
    """Coarse mask, and points decided anew at each doubling."""
    figure = Figure(760, 250)
    figure.block("p2", "P2", 15, 100, 50, 50)
    figure.block("pool", "14 x 14\npoints", 100, 20, 80, 44)
    figure.block("fc", "2x2 conv,\n2 fc layers", 215, 20, 95, 44, BLUE)
    figure.block("coarse", "7 x 7, K masks", 345, 20, 110, 44, GREEN)
    figure.block("up", "double the side", 345, 104, 110, 34)
    figure.block("pick", "784 cells\nnearest to 0", 490, 99, 95, 44, ORANGE)
    figure.block("points", "point head:\n1x1 layers", 490, 186, 95, 44, BLUE)
    figure.block("mask", "224 x 224", 630, 104, 110, 34, GREEN)
    figure.arrow("p2", "pool")
    figure.arrow("pool", "fc")
    figure.arrow("fc", "coarse")
    figure.arrow("coarse", "up", down=True)
    figure.arrow("up", "pick")
    figure.arrow("pick", "points", down=True)
    figure.arrow("pick", "mask")
    figure.arrow("p2", "points")
    figure.text("five times; the 14 x 14 step needs no points", 415, 160, GREY, 11)
    figure.text("features at the points", 250, 205, GREY, 11)
    figure.text("new logits", 628, 195, GREY, 11)
    figure.save("method_pointrend")


def mask_scoring() -> None:
    """Mask R-CNN's head and the MaskIoU head that looks at its mask."""
    figure = Figure(760, 210)
    figure.block("roi", "RoIAlign\n14 x 14", 15, 80, 80, 44)
    figure.block("convs", "4 convs,\ndeconv", 135, 20, 90, 44, BLUE)
    figure.block("mask", "mask 28 x 28", 265, 20, 105, 44, GREEN)
    figure.block("small", "max-pool\n14 x 14", 265, 78, 105, 36)
    figure.block("cat", "257\nchannels", 410, 130, 80, 44, ORANGE)
    figure.block("head", "4 convs,\n2 fc layers", 525, 130, 90, 44, BLUE)
    figure.block("iou", "IoU of\nits class", 650, 130, 90, 44, GREEN)
    figure.arrow("roi", "convs")
    figure.arrow("convs", "mask")
    figure.arrow("mask", "small", down=True)
    figure.arrow("small", "cat")
    figure.arrow("roi", "cat")
    figure.arrow("cat", "head")
    figure.arrow("head", "iou")
    figure.text("score = class score x IoU", 640, 198, RED)
    figure.save("method_mask_scoring")


def cascade() -> None:
    """Three stages in turn, each with a mask head beside it."""
    figure = Figure(760, 220)
    figure.block("rpn", "proposals", 10, 30, 85, 36)
    ious = ("0.5", "0.6", "0.7")
    before = "rpn"
    for i, iou in enumerate(ious):
        x = 130 + 215 * i
        figure.block(f"box{i}", f"box head {i + 1}\nIoU {iou}", x, 24, 100, 48, BLUE)
        figure.block(f"boxes{i}", "boxes", x + 125, 30, 62, 36, GREEN)
        figure.block(f"mask{i}", f"mask head {i + 1}", x, 130, 100, 36, ORANGE)
        figure.arrow(before, f"box{i}")
        figure.arrow(f"box{i}", f"boxes{i}")
        figure.parts.append(
            f'<path d="M{x - 16},48 C{x - 12},110 {x - 22},148 {x - 2},148" fill="none" '
            f'stroke="{GREY}" stroke-width="1.6" stroke-dasharray="4 3" marker-end="url(#tip)"/>'
        )
        before = f"boxes{i}"
    figure.text(
        "training: the boxes that a stage gets teach its mask head, too", 380, 195, GREY, 11
    )
    figure.text("prediction: all mask heads look at the last boxes; averaged", 380, 212, GREY, 11)
    figure.save("method_cascade")


def htc() -> None:
    """The cascade interleaved, chained, and with semantic context."""
    figure = Figure(760, 290)
    figure.block("rpn", "proposals", 10, 96, 85, 36)
    figure.block("pyramid", "P2 ... P6", 10, 20, 85, 36)
    text = "semantic branch, stride 8: classes of pixels, context"
    figure.block("semantic", text, 130, 20, 530, 36, RED)
    figure.arrow("pyramid", "semantic")
    before = "rpn"
    for i in range(3):
        x = 130 + 215 * i
        figure.block(f"box{i}", f"box head {i + 1}", x, 96, 100, 36, BLUE)
        figure.block(f"boxes{i}", "boxes", x + 125, 96, 62, 36, GREEN)
        figure.block(f"mask{i}", f"mask head {i + 1}", x + 62, 190, 125, 36, ORANGE)
        figure.arrow(before, f"box{i}")
        figure.arrow(f"box{i}", f"boxes{i}")
        figure.arrow(f"boxes{i}", f"mask{i}", down=True)
        if i:
            figure.arrow(f"mask{i - 1}", f"mask{i}", RED)
        figure.parts.append(
            f'<path d="M{x + 50},56 L{x + 50},94" fill="none" stroke="{GREY}" '
            'stroke-width="1.6" marker-end="url(#tip)"/>'
        )
        before = f"boxes{i}"
    text = "masks learn from the boxes that their stage hands on, and get the context, too"
    figure.text(text, 400, 252, GREY, 11)
    text = "red: what one mask head made of a RoI goes into the next (1x1 conv, added)"
    figure.text(text, 400, 270, GREY, 11)
    figure.save("method_htc")


def solo() -> None:
    """A class and a whole mask for each cell of a grid; below, the product of two maps."""
    figure = Figure(760, 330)
    figure.block("level", "one level\nof the pyramid", 10, 133, 95, 44)
    figure.block("shrunk", "shrunk to\nS x S cells", 140, 40, 90, 44)
    figure.block("classes", "7 x 3x3, GN,\nclasses", 265, 40, 105, 44, BLUE)
    figure.block("place", "+ x and y\nof each pixel", 140, 228, 90, 44)
    figure.block("masks", "7 x 3x3, GN,\nmasks", 265, 228, 105, 44, BLUE)
    figure.arrow("level", "shrunk")
    figure.arrow("shrunk", "classes")
    figure.arrow("level", "place")
    figure.arrow("place", "masks")
    grid = "".join(f"M{410 + 18 * i},17 v90 M410,{17 + 18 * i} h90 " for i in range(6))
    blob = "M505,236 c16,-4 30,8 26,24 s-10,30 -22,26 s-16,-12 -14,-24 s-2,-24 10,-26 z"
    figure.places |= {"grid": (410, 17, 90, 90), "stack": (405, 205, 90, 90)}
    figure.parts += [
        f'<rect x="410" y="17" width="90" height="90" fill="{PALE}"/>',
        f'<rect x="464" y="53" width="18" height="18" fill="{ORANGE}"/>',
        f'<path d="{grid}" stroke="white" fill="none"/>',
        *(
            f'<rect x="{405 + 13 * i}" y="{205 + 9 * i}" width="95" height="72" fill="{PALE}" '
            f'stroke="{ORANGE if i == 3 else "white"}" stroke-width="2"/>'
            for i in range(4)
        ),
        f'<path d="{blob}" fill="{ORANGE}"/>',
        f'<path d="M484,62 C570,70 580,170 545,228" fill="none" stroke="{ORANGE}" '
        'stroke-width="1.6" stroke-dasharray="5 4" marker-end="url(#tip)"/>',
        f'<rect x="610" y="230" width="50" height="60" fill="{PALE}"/>',
        f'<rect x="620" y="230" width="26" height="60" fill="{BLUE}"/>',
        f'<rect x="690" y="230" width="50" height="60" fill="{PALE}"/>',
        f'<rect x="690" y="244" width="50" height="28" fill="{GREEN}"/>',
    ]
    figure.arrow("classes", "grid")
    figure.arrow("masks", "stack")
    figure.text("the class of each cell", 455, 124, GREY, 11)
    figure.text("S x S masks of the picture", 475, 325, GREY, 11)
    figure.text("its cell names the mask", 645, 150, ORANGE, 11)
    figure.text("x", 675, 264, INK, 16)
    figure.text("decoupled: a map for each", 675, 205, GREY, 11)
    figure.text("column, and one for each row", 675, 219, GREY, 11)
    figure.save("method_solo")


def yolact() -> None:
    """Prototypes of the picture, shares of them for each anchor, their sum, cut at the box."""
    figure = Figure(760, 250)
    figure.block("pyramid", "P3 ... P7", 10, 103, 75, 44)
    figure.block("head", "3x3 for each\nanchor", 125, 30, 100, 44, BLUE)
    figure.block("box", "class, box", 265, 15, 90, 30, GREEN)
    figure.block("share", "shares -1 ... 1", 265, 58, 100, 30, GREEN)
    figure.block("net", "P3: 3 convs, x 2,\n2 convs", 125, 176, 120, 44, BLUE)
    figure.block("fast", "Fast NMS", 405, 15, 80, 30)
    figure.block("sum", "weighted sum,\nsigmoid", 460, 103, 100, 44, ORANGE)
    figure.block("cut", "cut at\nthe box", 610, 103, 70, 44)
    figure.places["drawn"] = (285, 165, 108, 66)
    for i, shape in enumerate(("h80 v28 h-80 z", "h40 v56 h-40 z", "l40,56 l40,-56 z")):
        x, y = 285 + 14 * i, 165 + 9 * i
        figure.parts.append(
            f'<rect x="{x}" y="{y}" width="80" height="56" fill="{PALE}" stroke="white"/>'
            f'<path d="M{x},{y} {shape}" fill="{GREY}" opacity="0.5"/>'
        )
    figure.arrow("pyramid", "head")
    figure.arrow("pyramid", "net")
    figure.arrow("head", "box")
    figure.arrow("head", "share")
    figure.arrow("net", "drawn")
    figure.arrow("box", "fast")
    figure.arrow("share", "sum")
    figure.arrow("drawn", "sum")
    figure.arrow("fast", "cut")
    figure.arrow("sum", "cut")
    figure.text("32 prototypes, stride 4", 465, 230, GREY, 11)
    figure.save("method_yolact")


def bmask() -> None:
    """The two branches, and what passes between them."""
    figure = Figure(760, 230)
    figure.block("levels", "P2 ... P5\n14 x 14", 10, 30, 90, 44)
    figure.block("p2", "P2\n28 x 28", 10, 150, 90, 44)
    figure.block("convs", "4 x 3x3", 140, 30, 80, 44, BLUE)
    figure.block("shrink", "3x3,\nstride 2", 140, 150, 80, 44, BLUE)
    figure.block("edge", "+, 2 x 3x3", 300, 150, 95, 44, BLUE)
    figure.block("mask", "+, 3x3", 440, 30, 85, 44, BLUE)
    figure.block("out", "deconv: mask\n28 x 28", 590, 30, 110, 44, GREEN)
    figure.block("line", "deconv: edge\n28 x 28", 590, 150, 110, 44, ORANGE)
    figure.arrow("levels", "convs")
    figure.arrow("p2", "shrink")
    figure.arrow("convs", "mask")
    figure.arrow("convs", "edge", RED)
    figure.arrow("shrink", "edge")
    figure.arrow("edge", "mask", RED)
    figure.arrow("edge", "line")
    figure.arrow("mask", "out")
    figure.text("red: 1x1 convolutions", 330, 118, GREY, 11)
    figure.text("cross-entropy and Dice, in training alone", 630, 214, GREY, 11)
    figure.save("method_bmask")


def blendmask() -> None:
    """Bases of the picture, pooled in a box, times attention."""
    figure = Figure(760, 270)
    figure.block("pyramid", "P3 ... P7", 10, 113, 75, 44)
    figure.block("tower", "FCOS towers", 125, 30, 95, 44, BLUE)
    figure.block("box", "class, box,\ncenterness", 260, 8, 95, 40, GREEN)
    figure.block("maps", "attention:\n4 x 14 x 14", 260, 62, 95, 40, GREEN)
    figure.block("net", "P3 + P4 + P5,\nconvs, x 2", 125, 196, 95, 44, BLUE)
    figure.block("bases", "4 bases,\nstride 4", 260, 196, 95, 44, GREEN)
    figure.block("nms", "NMS", 395, 13, 60, 30)
    figure.block("pool", "RoIAlign\n56 x 56", 430, 196, 85, 44)
    figure.block("soft", "enlarged, softmax\nover the bases", 430, 90, 120, 44)
    figure.block("sum", "weighted sum:\nmask 56 x 56", 610, 143, 105, 44, ORANGE)
    figure.arrow("pyramid", "tower")
    figure.arrow("pyramid", "net")
    figure.arrow("tower", "box")
    figure.arrow("tower", "maps")
    figure.arrow("net", "bases")
    figure.arrow("box", "nms")
    figure.arrow("bases", "pool")
    figure.arrow("maps", "soft")
    figure.arrow("soft", "sum")
    figure.arrow("pool", "sum")
    figure.parts.append(
        f'<path d="M425,43 C425,120 400,150 428,200" fill="none" stroke="{GREY}" '
        'stroke-width="1.6" marker-end="url(#tip)"/>'
    )
    figure.text("boxes", 392, 150, GREY, 11)
    figure.save("method_blendmask")


if __name__ == "__main__":
    for draw in (pointrend, mask_scoring, cascade, htc, solo, yolact, bmask, blendmask):
        draw()
