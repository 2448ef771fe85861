"""``brefine predict`` as people call it."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from brefine import cli, jobs
from brefine.formats import FORMATS
from brefine.jobs import PLACES
from brefine.predict import Predictor
from test_predict import predictor

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Run:
    """Calls predict in a folder with ``in/0.png`` .. ``in/3.png``; three discs are in each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Predictor, "load", lambda folder, compile=False: predictor())
    random = np.random.default_rng(0)
    Path("in").mkdir()
    for i in range(4):
        pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"in/{i}.png")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        words = ["predict", "model", "--threshold", "0", *map(str, arguments)]
        code = cli.main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def records(out: str = "predictions") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(out, "predictions.json").read_text())
    return found


def test_all_formats_and_what_outlines_lose(run: Run) -> None:
    code, out, err = run("in", "--save", ",".join(FORMATS), "--tolerance", 2, "--batch", 3)
    assert (code, out) == (0, "predictions\n")
    made = {path.name for path in Path("predictions").iterdir()}
    assert made == {*PLACES.values(), "settings.json"}
    assert "4 pictures, 12 objects" in err
    for name in ("polygons", "labelme", "yolo", "geojson"):
        (line,) = [line for line in err.splitlines() if line.startswith(f"{name}: ")]
        assert "masks changed: IoU with those predicted 0.9" in line
    _, _, err = run("in", "--save", "yolo,png", "--out", "exact")
    assert "changed" not in err
    assert {path.name for path in Path("exact").iterdir()} == {"yolo", "idmaps", "settings.json"}


def test_the_loss_said_is_the_loss_of_the_file(run: Run) -> None:
    code, _, err = run("in", "--save", "coco,polygons", "--tolerance", 3)
    assert code == 0
    ious = []
    for file in sorted(Path("predictions/polygons").iterdir()):
        content = json.loads(file.read_text())
        mine = [r for r in records() if r["image_id"] == content["picture"]]
        some = [r for r in mine if coco_mask.area(r["segmentation"])]
        for record, each in zip(some, content["objects"], strict=True):
            size = content["height"], content["width"]
            mask = coco_mask.decode(record["segmentation"]).astype(bool)
            drawn = np.zeros(size, bool)
            for part in each["polygons"]:
                rings = [
                    coco_mask.decode(coco_mask.frPyObjects([np.ravel(r).tolist()], *size)[0])
                    for r in part
                ]
                drawn |= np.bitwise_xor.reduce(rings).astype(bool)
            ious.append((mask & drawn).sum() / (mask | drawn).sum())
    changed = sum(iou < 1 for iou in ious)
    assert changed
    line = next(line for line in err.splitlines() if line.startswith("polygons"))
    assert line == (
        f"polygons: {changed} of {len(ious)} masks changed: IoU with those predicted "
        f"{np.mean(ious):.4f} on average, {min(ious):.4f} at worst"
    )


def test_sources_of_every_kind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("list.txt").write_text("in/3.png\nin/1.png\n")
    assert run("@list.txt", "in/0*.png", "--save", "coco")[0] == 0
    assert list(dict.fromkeys(r["image_id"] for r in records())) == ["3.png", "1.png", "0.png"]
    stdin = io.TextIOWrapper(io.BytesIO(b"in/2.png\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("@-", "--save", "coco")[0] == 0
    assert {r["image_id"] for r in records()} == {"2.png"}
    two = records()
    stdin = io.TextIOWrapper(io.BytesIO(Path("in/2.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("-", "--save", "coco")[0] == 0
    assert records() == [{**record, "image_id": "stdin"} for record in two]
    assert run("in", "--limit", 2, "--save", "coco")[0] == 0
    assert {r["image_id"] for r in records()} == {"0.png", "1.png"}


def test_frames(run: Run) -> None:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 60))
    for i in range(4):
        writer.write(cv2.imread(f"in/{i}.png"))
    writer.release()
    code, _, err = run("clip.avi", "--every", 2, "--save", "coco,overlay")
    assert code == 0, err
    assert {r["image_id"] for r in records()} == {"clip_000000", "clip_000002"}
    assert sorted(path.name for path in Path("predictions/overlays").iterdir()) == [
        "clip_000000.png",
        "clip_000002.png",
    ]


def test_ctrl_c_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("in", "--out", "whole")[0] == 0
    real = jobs.write_idmap

    def stop(folder: Path, picture: Any, *rest: Any) -> None:
        if picture.name == "2.png":
            raise KeyboardInterrupt
        real(folder, picture, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_idmap", stop)
        code, out, err = run("in")
    assert (code, out) == (130, "")
    assert "predictions.part: 2 of 4 pictures are done: the same command with --resume" in err
    assert not Path("predictions").exists()
    code, _, err = run("in", "--resume")
    assert code == 0, err
    assert sorted(path.name for path in Path().iterdir()) == ["in", "predictions", "whole"]
    for path in Path("whole").rglob("*.*"):
        assert path.read_bytes() == Path("predictions", path.relative_to("whole")).read_bytes()


def test_cleaning_and_looking_twice(run: Run) -> None:
    assert run("in/0.png", "--save", "coco")[0] == 0
    plain = records()
    code, _, err = run(
        "in/0.png", "--save", "coco", "--disjoint", "--fill-holes", 20, "--drop-islands", "all"
    )
    assert code == 0, err
    covered = sum(coco_mask.decode(r["segmentation"]).astype(int) for r in records())
    assert covered.max() == 1
    assert sum(coco_mask.decode(r["segmentation"]).astype(int) for r in plain).max() > 1
    code, _, err = run("in/0.png", "--save", "coco", "--tta", "flip,1,1.25")
    assert code == 0, err
    assert records() != plain
    code, _, err = run("in/0.png", "--save", "coco", "--tile", 48, "--overlap", 16)
    assert code == 0, err
    assert len(records()) > len(plain)
    code, _, err = run("in/0.png", "--save", "coco", "--tile", "auto")
    assert code == 0, err
    assert records() == plain


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["in", "--save", "coco,svg"], "--save: 'svg' is none of coco, masks"),
        (["in", "--tile", "big"], "--tile: 'big' is neither auto nor a number"),
        (["in", "--tile", "64", "--overlap", "60"], "overlap by 60"),
        (["in", "--tta", "turn"], "--tta: 'turn'"),
        (["in", "--tta", "9"], "scales 9.0"),
        (["in", "--drop-islands", "some"], "--drop-islands: 'some'"),
        (["http://localhost/a.png"], "nothing is fetched without --allow-urls"),
        (["camera:0"], "give --limit"),
        (["in", "--batch", "0"], "--batch"),
        (["@none"], "none"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: list[str], part: str) -> None:
    if "camera:0" in arguments:
        pytest.importorskip("cv2")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert part in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [path.name for path in Path().iterdir()] == ["in"]
