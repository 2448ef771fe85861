"""Many pictures: what is written, what happens when a run stops, what memory holds."""

import io
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import brefine
from brefine import jobs
from brefine.data.coco import CocoSet
from brefine.data.read import read
from brefine.formats import FORMATS
from brefine.jobs import PLACES, predict_files
from brefine.predict import Predictor
from brefine.rle import decode
from brefine.structures import InputError
from brefine.views import combine
from test_predict import predictor
from test_sources import huge

COMMON: dict[str, Any] = {"threshold": 0, "workers": 0}


def write_pictures(folder: Path, *names: str, size: tuple[int, int] = (40, 30)) -> None:
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def records_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "predictions.json").read_text())
    return found


def test_outputs(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "deep/b.jpg")
    out = tmp_path / "out"
    summary = predict_files(predictor(), [tmp_path / "in"], out)
    assert (summary.pictures, summary.objects, summary.broken) == (2, 4, {})
    assert [r["image_id"] for r in records_of(out)] == [
        "a.png",
        "a.png",
        "deep/b.jpg",
        "deep/b.jpg",
    ]
    assert sorted(files(out)) == [
        "idmaps/a.csv", "idmaps/a.png", "idmaps/deep/b.csv", "idmaps/deep/b.png",
        "overlays/a.png", "overlays/deep/b.png", "predictions.json", "settings.json",
    ]  # fmt: skip
    assert Image.open(out / "overlays" / "deep" / "b.png").size == (40, 30)
    # An older result is replaced as a whole; nothing is left beside it.
    predict_files(predictor(), [tmp_path / "in" / "a.png"], out, save=["coco"])
    assert sorted(path.name for path in out.iterdir()) == ["predictions.json", "settings.json"]
    assert json.loads((out / "settings.json").read_text())["save"] == ["coco"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_every_format_has_its_place(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png")
    for threshold in (0, 1):  # three objects and none
        predict_files(
            predictor(), [tmp_path / "in"], tmp_path / "out", save=FORMATS, threshold=threshold
        )
        made = {path.name for path in (tmp_path / "out").iterdir()}
        assert made == {*PLACES.values(), "settings.json"}
    assert set(PLACES) == set(FORMATS)


def test_pictures_without_a_file_have_results_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    Image.new("RGB", (40, 30)).save(content, "PNG")

    class Stdin:
        buffer = io.BytesIO(content.getvalue())

    monkeypatch.setattr("sys.stdin", Stdin)
    predict_files(predictor(), ["-"], tmp_path / "out", save=FORMATS)
    assert {record["image_id"] for record in records_of(tmp_path / "out")} == {"stdin"}
    assert (tmp_path / "out" / "overlays" / "stdin.png").is_file()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    with pytest.raises(InputError, match="holds something else"):
        predict_files(predictor(), [tmp_path / "a.png"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    (tmp_path / "mine/masks").mkdir(parents=True)  # a name of ours makes no folder of ours
    (tmp_path / "mine/masks/a.png").touch()
    with pytest.raises(InputError, match="mine: holds something else"):
        predict_files(predictor(), [tmp_path / "a.png"], tmp_path / "mine")
    assert (tmp_path / "mine/masks/a.png").is_file()
    made = tmp_path / "made"
    predict_files(predictor(), [tmp_path / "a.png"], made)
    with pytest.raises(InputError, match=r"made: holds pictures to predict \(.*overlays\)"):
        predict_files(predictor(), [made / "overlays"], made)
    assert (made / "overlays/a.png").is_file()
    for mine in ("overlays/note.txt", "yolo/images"):
        predict_files(predictor(), [tmp_path / "a.png"], made, save=["yolo", "overlay"])
        if mine == "yolo/images":  # where YOLO wants the pictures
            (made / mine).mkdir()
            shutil.copy(tmp_path / "a.png", made / mine)
        else:
            (made / mine).touch()
        with pytest.raises(InputError, match=rf"{mine}.*: is no prediction, and would be removed"):
            predict_files(predictor(), [tmp_path / "a.png"], made)
        assert (made / mine).exists()
        shutil.rmtree(made)
    predict_files(predictor(), [tmp_path / "a.png"], made)
    shutil.rmtree(tmp_path / "mine")
    shutil.rmtree(made)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").touch()
    (tmp_path / "two.part").touch()
    for name in ("out", "two"):
        with pytest.raises(InputError, match=rf"{name}\.part: is in the way"):
            predict_files(predictor(), [tmp_path / "a.png"], tmp_path / name)
    assert (tmp_path / "out.part" / "mine").exists()
    with pytest.raises(InputError, match="save: 'cocoa' is none of coco, masks"):
        predict_files(predictor(), [tmp_path / "a.png"], tmp_path / "new", save=["cocoa"])


def test_ids_of_a_data_set(tmp_path: Path, toy_set: Path, tiny_model: Path) -> None:
    dataset = CocoSet(toy_set / "val.json")
    found = [picture.file for picture in dataset.pictures]
    p = brefine.load(tiny_model, device="cpu")
    (tmp_path / "link").symlink_to(toy_set / "images")
    behind = [tmp_path / "link" / file.relative_to(toy_set / "images") for file in found]
    for sources in (found, behind):
        predict_files(p, sources, tmp_path / "out", save=["coco"], data=dataset.path, **COMMON)
        ids = [record["image_id"] for record in records_of(tmp_path / "out")]
        assert list(dict.fromkeys(ids)) == [picture.id for picture in dataset.pictures]
    shutil.copy(found[0], tmp_path / "stranger.png")
    with pytest.raises(InputError, match=r"stranger\.png: .*does not list"):
        predict_files(p, [tmp_path / "stranger.png"], tmp_path / "out", data=dataset.path)


def test_what_is_written_is_a_set_that_can_be_read(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "deep/b.jpg", size=(160, 120))
    out = tmp_path / "far" / "away" / "out"
    predict_files(predictor(), [tmp_path / "in"], out, save=FORMATS, **COMMON)
    for name in ("yolo", "masks"):
        folder = out / name if name == "yolo" else out
        shutil.copytree(tmp_path / "in", folder / "images")
    for place in (out / "yolo" / "data.yaml", out, out / "labelme"):
        dataset = read(place)
        assert [picture.file.name for picture in dataset.pictures] == ["a.png", "b.jpg"]
        assert [category.name for category in dataset.categories] == ["a", "b"]
        for index, picture in enumerate(dataset.pictures):
            mine = [r for r in records_of(out) if Path(r["image_id"]).name == picture.file.name]
            theirs = dataset.annotations(index)
            masks = [
                sorted(decode(r["segmentation"], (120, 160)).encode()["counts"] for r in found)
                for found in (mine, theirs)
            ]
            assert masks[0] == masks[1]
            assert len(masks[0]) == 3


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    strange = tmp_path / "in" / "a\udcff.png"
    try:
        write_pictures(tmp_path / "in", strange.name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has none")
    predict_files(predictor(), [tmp_path / "in"], tmp_path / "out", save=FORMATS)
    assert "a\\udcff.png" in (tmp_path / "out" / "predictions.csv").read_text()
    assert "a\\udcff.png" in (tmp_path / "out" / "annotations.xml").read_text()
    assert {record["image_id"] for record in records_of(tmp_path / "out")} == {strange.name}


# --- broken pictures


def test_broken_picture_stops_and_keeps_the_old(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "b.png", "c.png")
    out = tmp_path / "out"
    predict_files(predictor(), [tmp_path / "in"], out)
    before = files(out)
    (tmp_path / "in" / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"a\.png: no picture"):
        predict_files(predictor(), [tmp_path / "in"], out, threshold=0)
    assert files(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]  # nothing was done


def test_broken_pictures_are_skipped_on_request_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "in", "a.png", "c.png")
    (tmp_path / "in" / "b.png").write_text("no picture")
    (tmp_path / "in" / "d.png").touch()
    for batch in (1, 3):
        out = tmp_path / f"out{batch}"
        summary = predict_files(predictor(), [tmp_path / "in"], out, skip_broken=True, batch=batch)
        assert summary.pictures == 2
        assert list(summary.broken) == ["b.png", "d.png"]
        jobs.print_summary(summary)
        said = " ".join(capsys.readouterr().err.split())
        assert "2 pictures are broken and were skipped" in said
        for name in ("b.png: no picture", "d.png: no picture"):
            assert said.count(name) == 2  # at once, and in the end
        assert {record["image_id"] for record in records_of(out)} == {"a.png", "c.png"}


def test_a_fixed_picture_lets_the_run_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "in", "a.png", "c.png")
    (tmp_path / "in" / "b.png").write_text("no picture")
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"b\.png: no picture"):
        predict_files(predictor(), [tmp_path / "in"], out)
    said = " ".join(capsys.readouterr().err.split())
    assert "out.part: 1 of 3 pictures are done: the same command with --resume goes on" in said
    write_pictures(tmp_path / "in", "b.png")
    with pytest.raises(InputError, match=r"unfinished run with 1 pictures done: go on with --re"):
        predict_files(predictor(), [tmp_path / "in"], out)
    p = predictor()
    assert predict_files(p, [tmp_path / "in"], out, resume=True).pictures == 3
    assert len(p.model.seen) == 2  # type: ignore[attr-defined]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_link_stays_one_and_its_folder_is_written(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    (tmp_path / "link").symlink_to("real")  # that is not there yet
    for _ in range(2):
        predict_files(predictor(), [tmp_path / "a.png"], tmp_path / "link", save=["coco"])
        assert (tmp_path / "link").is_symlink()
        assert len(records_of(tmp_path / "real")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "link", "real"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, "a.png")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs, "write_idmap", full)
    with pytest.raises(InputError, match=r"out\.part: cannot write: No space left on device"):
        predict_files(predictor(), [tmp_path / "a.png"], tmp_path / "out")


# --- stopped runs


def stop_after(monkeypatch: pytest.MonkeyPatch, pictures: int) -> None:
    """Ctrl-C while picture ``pictures`` (from 0) is being written."""
    real: Callable[..., Any] = jobs.write_idmap
    written: list[object] = []

    def write(*arguments: Any) -> None:
        if len(written) == pictures:
            raise KeyboardInterrupt
        written.append(None)
        real(*arguments)

    monkeypatch.setattr(jobs, "write_idmap", write)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_resumed_run_writes_the_same_bytes(
    tmp_path: Path, tiny_model: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.png" for i in range(8)]
    write_pictures(tmp_path / "in", *names)
    write_pictures(tmp_path / "in", "wide.png", size=(70, 20))
    (tmp_path / "in" / "3.png").write_text("no picture")
    p = brefine.load(tiny_model, device="cpu")
    options = {**COMMON, "save": FORMATS, "batch": batch, "skip_broken": True, "tolerance": 0.7}
    whole = predict_files(p, [tmp_path / "in"], tmp_path / "whole" / "out", **options)
    expected = files(tmp_path / "whole" / "out")
    assert whole.objects > 8
    assert len(expected) > 8 * 7

    out = tmp_path / "stop" / "out"  # as deep, so that paths in the files are the same
    finished = 0
    for stop in (1, 2, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                predict_files(p, [tmp_path / "in"], out, resume=True, **options)
        assert not out.exists()
        journal = out.with_name("out.part") / jobs.JOURNAL
        if journal.exists():
            lines = journal.read_text().splitlines()
            assert len(lines) >= finished
            finished = len(lines)
            with journal.open("a") as file:  # as if the machine had gone down
                file.write('[{"name": "2.png", "rec')
    assert finished
    summary = predict_files(p, [tmp_path / "in"], out, resume=True, **options)
    assert summary == whole
    assert files(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_is_done_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "in", *(f"{i}.png" for i in range(6)))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            predict_files(predictor(), [tmp_path / "in"], tmp_path / "out", batch=2)
    for name in ("0.png", "1.png", "2.png", "3.png"):
        (tmp_path / "in" / name).write_text("gone")
    p = predictor()
    summary = predict_files(p, [tmp_path / "in"], tmp_path / "out", batch=2, resume=True)
    assert summary.pictures == 6
    assert [len(images) for images in p.model.seen] == [2]  # type: ignore[attr-defined]


def interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str = "out"
) -> tuple[Any, ...]:
    """A run over two pictures that ended after the first; the arguments to go on with."""
    write_pictures(tmp_path / "in", "a.png", "b.png")
    arguments = (predictor(), [tmp_path / "in"], tmp_path / out)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            predict_files(*arguments)
    return arguments


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"threshold": 0.3}, "threshold"),
        ({"save": ["coco", "idmap", "csv"]}, "save"),
        ({"batch": 2}, "batch"),
        ({"disjoint": True}, "disjoint"),
        ({"tile": 20}, "tile"),
        ({"views": combine(flip=True)}, "views"),
    ],
)
def test_a_run_is_resumed_as_it_was_begun(
    tmp_path: Path, change: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = interrupted(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=f"unfinished run with another {key} "):
        predict_files(*arguments, resume=True, **change)
    assert predict_files(*arguments, resume=True, workers=3).pictures == 2


def test_a_run_is_resumed_with_its_own_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, _, out = interrupted(tmp_path, monkeypatch)
    write_pictures(tmp_path / "other", "a.png", "b.png")
    for others in (tmp_path / "other", tmp_path / "in/b.png"):
        with pytest.raises(
            InputError, match=r"unfinished run of other pictures \(a\.png was .*in/a"
        ):
            predict_files(p, [others], out, resume=True)
    monkeypatch.chdir(tmp_path / "in")
    assert predict_files(p, ["."], out, resume=True).pictures == 2


def test_a_run_does_not_predict_what_it_has_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = interrupted(tmp_path, monkeypatch, "in/out")
    assert predict_files(*arguments, resume=True).pictures == 2
    assert {record["image_id"] for record in records_of(arguments[2])} == {"a.png", "b.png"}


@pytest.mark.parametrize("file", [jobs.JOURNAL, jobs.SETTINGS])
def test_a_damaged_run_is_not_resumed(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = interrupted(tmp_path, monkeypatch)
    with (tmp_path / "out.part" / file).open("a") as journal:
        journal.write('{"garbage\n')
    with pytest.raises(InputError, match=rf"{file}: is damaged: remove .*out\.part"):
        predict_files(*arguments, resume=True)


def test_a_run_is_resumed_with_its_own_model(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png")
    p = brefine.load(tiny_models["mask_rcnn"], device="cpu")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            predict_files(p, [tmp_path / "in"], tmp_path / "out")
    weight = next(p.model.parameters())  # type: ignore[attr-defined]
    with torch.no_grad():
        weight[(0,) * weight.ndim] += 1e-6
    with pytest.raises(InputError, match="another weights"):
        predict_files(p, [tmp_path / "in"], tmp_path / "out", resume=True)


# --- batches, tiles, views


def test_batches_change_nothing(tmp_path: Path, tiny_model: Path) -> None:
    write_pictures(tmp_path / "in", *(f"{i}.png" for i in range(4)), size=(64, 48))
    write_pictures(tmp_path / "in", "tall.png", size=(48, 64))
    write_pictures(tmp_path / "in", "large.png", size=(128, 96))
    p = brefine.load(tiny_model, device="cpu")
    found = []
    for batch, workers in ((1, 0), (4, 2), (6, 1)):
        options = {**COMMON, "batch": batch, "workers": workers, "save": ["coco"]}
        predict_files(p, [tmp_path / "in"], tmp_path / "out", **options)
        found.append(records_of(tmp_path / "out"))
    assert len(found[0]) == 60
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert (one["image_id"], one["category_id"]) == (two["image_id"], two["category_id"])
            assert one["score"] == pytest.approx(two["score"], abs=1e-5)
            assert one["bbox"] == pytest.approx(two["bbox"], abs=1e-3)
            areas = [coco_mask.area(record["segmentation"]) for record in (one, two)]
            assert areas[0] == pytest.approx(areas[1], abs=2)


def test_tiles_views_and_cleaning_are_those_of_the_predictor(
    tmp_path: Path, tiny_model: Path
) -> None:
    write_pictures(tmp_path / "in", "a.png", size=(200, 150))
    p = brefine.load(tiny_model, device="cpu")
    asked: dict[str, Any] = {"tile": 96, "overlap": 16, "views": combine(flip=True)}
    predict_files(p, [tmp_path / "in"], tmp_path / "out", save=["coco"], **COMMON, **asked)
    assert records_of(tmp_path / "out") == p.records(
        tmp_path / "in" / "a.png", "a.png", threshold=0, **asked
    )
    predict_files(p, [tmp_path / "in"], tmp_path / "out", disjoint=True, save=["coco"], **COMMON)
    covered = sum(
        coco_mask.decode(r["segmentation"]).astype(int) for r in records_of(tmp_path / "out")
    )
    assert covered.max() == 1


# --- memory


class Counted:
    """A predictor that counts how many decoded pictures are alive while it looks at some."""

    def __init__(self, inner: Predictor) -> None:
        self.inner, self.most = inner, 0
        self.alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def records_of(self, pictures: list[Any], ids: list[Any], **options: Any) -> Any:
        self.most = max(self.most, len(self.alive))
        return self.inner.records_of(pictures, ids, **options)


@pytest.mark.parametrize(("workers", "batch"), [(0, 1), (2, 1), (2, 8), (5, 2)])
def test_few_pictures_are_decoded_at_a_time(
    tmp_path: Path, workers: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "in", *(f"{i:03}.png" for i in range(40)), size=(8, 6))
    counted = Counted(predictor())
    real = jobs._read

    def read(item: Any) -> Any:
        pixels = real(item)
        counted.alive[id(pixels)] = pixels
        return pixels

    monkeypatch.setattr(jobs, "_read", read)
    options: dict[str, Any] = {"workers": workers, "batch": batch, "save": ["coco", "csv"]}
    summary = predict_files(counted, [tmp_path / "in"], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert summary.pictures == 40
    # A batch, what waits for the next one, and the last picture of the batch before.
    assert batch <= counted.most <= batch + max(workers, batch) + 2


# --- pictures that break others


def exif(path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (40, 20)).save(path, exif=tags)


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue", "green")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def palette(path: Path) -> None:
    image = Image.new("P", (40, 20))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(path, transparency=0)


STRANGE: dict[str, tuple[Callable[[Path], Any], tuple[int, int]]] = {
    "dot.png": (lambda path: Image.new("RGB", (1, 1)).save(path), (1, 1)),
    "line.png": (lambda path: Image.new("RGB", (5000, 1)).save(path), (1, 5000)),
    "column.png": (lambda path: Image.new("RGB", (1, 5000)).save(path), (5000, 1)),
    "deep.png": (lambda path: Image.fromarray(np.full((20, 40), 999, "u2")).save(path), (20, 40)),
    "deep.tif": (lambda path: Image.fromarray(np.full((20, 40), 999, "u2")).save(path), (20, 40)),
    "cmyk.jpg": (lambda path: Image.new("CMYK", (40, 20)).save(path), (20, 40)),
    "bits.png": (lambda path: Image.new("1", (40, 20)).save(path), (20, 40)),
    "palette.png": (palette, (20, 40)),
    "turned.jpg": (exif, (40, 20)),
    "moving.gif": (animated, (20, 40)),
    "moving.png": (animated, (20, 40)),
    "moving.webp": (animated, (20, 40)),
}
BROKEN: dict[str, bytes] = {
    "empty.png": b"",
    "text.jpg": b"this is a text",
    "bomb.png": huge(60_000),
    "half.jpg": b"\xff\xd8\xff\xe0",
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_pictures(name: str, tmp_path: Path, tiny_model: Path) -> None:
    make, size = STRANGE[name]
    make(tmp_path / name)
    p = brefine.load(tiny_model, device="cpu")
    out = tmp_path / "out"
    summary = predict_files(p, [tmp_path / name], out, save=FORMATS, **COMMON)
    assert (summary.pictures, summary.broken) == (1, {})
    assert summary.objects == len(records_of(out))
    assert {tuple(record["segmentation"]["size"]) for record in records_of(out)} <= {size}
    stem = Path(name).with_suffix(".png")
    for folder in ("overlays", "idmaps"):
        assert Image.open(out / folder / stem).size == size[::-1]


def test_the_first_frame_and_the_shown_side_up(tmp_path: Path, tiny_model: Path) -> None:
    p = brefine.load(tiny_model, device="cpu")
    animated(tmp_path / "a.gif")
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # left as stored, above as shown
    tags = Image.Exif()
    tags[0x0112] = 6
    image.save(tmp_path / "b.png", exif=tags)
    predict_files(
        p, [tmp_path / "a.gif", tmp_path / "b.png"], tmp_path / "out", save=["overlay"], threshold=1
    )
    first, turned = (
        np.array(Image.open(tmp_path / "out/overlays" / n)) for n in ("a.png", "b.png")
    )
    assert (first == (255, 0, 0)).all()
    assert (turned[:20] == (0, 0, 255)).all()
    assert (turned[20:] == (255, 0, 0)).all()


def test_broken_ones_are_refused_by_name(tmp_path: Path) -> None:
    for name, content in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    summary = predict_files(predictor(), [tmp_path], tmp_path / "out", skip_broken=True)
    assert summary.pictures == 0
    assert set(summary.broken) == set(BROKEN)
    assert all(f"{name}: " in line for name, line in summary.broken.items())
    assert "larger than 178 million pixels" in summary.broken["bomb.png"]
    assert records_of(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("sources", "options", "said"),
    [
        ([], {}, "no pictures to predict"),
        (["a.png"], {"batch": 0}, "batch: 0 is less than 1"),
        (["a.png"], {"limit": 0}, "limit: 0 is less than 1"),
        (["a.png"], {"every": 0}, "every: 0 is less than 1"),
        (["a.png"], {"workers": -1}, "workers: -1 is less than 0"),
    ],
)
def test_what_asks_for_nothing_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], options: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("a.png")
    predict_files(predictor(), "a.png", "out", save=["coco"])
    before = Path("out/predictions.json").read_bytes()
    with pytest.raises(InputError, match=said):
        predict_files(predictor(), sources, "out", save=["coco"], **options)
    assert Path("out/predictions.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "out"]
