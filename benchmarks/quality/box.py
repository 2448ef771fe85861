"""Put a trained model into the package, so that its name is enough to use it.

    python benchmarks/quality/box.py runs/nuclei/best nuclei --data VAL.json [--images FOLDER]

Stores matrices in half precision, evaluates that model and the one it was made of, refuses if they
differ by more than 0.1 points or if the file is too large, and writes the figures into the card
between its two marker comments. What else the card says is written by hand.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import cast

import torch
from counts import count
from torch import nn

from brefine import weights
from brefine.data.read import read
from brefine.evaluate import Report, evaluate
from brefine.files import replacing
from brefine.metrics.calibration import IDENTITY
from brefine.predict import Predictor

MOST_BYTES = 16 * 2**20
TOLERANCE = 0.001  # of mask AP
MARKERS = "<!-- figures: begin -->", "<!-- figures: end -->"

#: rows of the card
FIGURES = {
    "mask AP": "mask/AP",
    "mask AP50": "mask/AP50",
    "mask AP75": "mask/AP75",
    "mask AP small": "mask/AP_S",
    "mask AP medium": "mask/AP_M",
    "mask AP large": "mask/AP_L",
    "Boundary AP": "boundary/AP",
    "box AP": "box/AP",
    "mask IoU, true boxes": "given_boxes/mask_iou",
    "boundary IoU, true boxes": "given_boxes/boundary_iou",
    "F1 at the stored threshold": "F1",
    "accuracy there: right / (right + made up + missed)": "accuracy",
    "the same, Data Science Bowl: IoU 0.5 to 0.95, mean of pictures": "bowl",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder of a run")
    parser.add_argument("name")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = read(options.data, options.images)
    loaded = weights.load(options.model)
    target = weights.SHIPPED / options.name
    card = target / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {options.name}\n"
    if text.count(MARKERS[0]) != 1 or text.count(MARKERS[1]) != 1:
        text += f"\n{MARKERS[0]}\n{MARKERS[1]}\n"
    with tempfile.TemporaryDirectory() as place:
        half = Path(place) / options.name
        module = cast(nn.Module, loaded.segmenter)
        # Where the pictures were is nobody's business.
        places = [f"data.{key}=null" for key in ("train", "val", "images", "val_images")]
        recipe = loaded.recipe.with_settings(places)
        weights.save(half, module, recipe, loaded.categories, half=True)
        whole, small = (evaluate(plain(folder), dataset) for folder in (options.model, half))
        size = (half / weights.FILES[0]).stat().st_size
        change = small.values["mask/AP"] - whole.values["mask/AP"]
        print(f"{size / 2**20:.1f} MB; mask AP {whole.values['mask/AP']:.4f} {change:+.4f}")
        if size > MOST_BYTES or abs(change) > TOLERANCE:
            raise SystemExit("too large, or not exact enough: not put into the package")
        learnt = small.scoring()
        weights.store(half, **learnt)
        kept = [r for r in small.records if r["score"] >= small.overall]
        values = small.values | count(kept, dataset)
        table = figures(values, small, len(dataset), size, change)
        start, end = (re.escape(marker) for marker in MARKERS)
        inside = f"{MARKERS[0]}\n{table}\n{MARKERS[1]}"
        text = re.sub(f"{start}.*{end}", lambda _: inside, text, flags=re.DOTALL)
        with replacing(target) as aside:
            aside.mkdir()
            for name in weights.FILES[:2]:
                (aside / name).write_bytes((half / name).read_bytes())
            (aside / "README.md").write_text(text, encoding="utf-8")
    print(target)


def plain(folder: Path) -> Predictor:
    """A predictor that gives scores as the model does: what is stored is learnt from these."""
    predictor = Predictor.load(folder)
    predictor.calibration = IDENTITY
    return predictor


def figures(
    values: dict[str, float], report: Report, pictures: int, size: int, change: float
) -> str:
    """The card's table."""
    lines = [f"| {pictures} pictures not learnt from | % |", "|---|---:|"]
    lines += [f"| {title} | {100 * values[key]:.1f} |" for title, key in FIGURES.items()]
    threshold = report.scoring()["overall"]
    lines += [
        "",
        f"The file has {size / 2**20:.1f} MB: matrices are stored in half precision, which changed "
        f"mask AP by {100 * change:+.2f} points. Objects are reported from a probability of "
        f"{threshold:.2f} on; threshold and calibration were learnt on the same pictures.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
