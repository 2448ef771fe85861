"""What there is to predict: every kind of source, and every form a picture is held in."""

import functools
import http.server
import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from brefine import sources
from brefine.data import pictures
from brefine.data.loader import read_picture
from brefine.sources import as_array, as_pixels, count, find_pictures, walk
from brefine.structures import InputError


def write_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(folder / name)


def test_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, "in/b.png", "in/a.JPG", "in/deep/a.png", "other/c.png", "odd[1].png")
    Path("in/notes.txt").touch()
    Path("in/folder.png").mkdir()
    assert list(find_pictures(["in"])) == ["a.JPG", "b.png", "deep/a.png"]
    assert list(find_pictures(["other/c.png", "in"])) == ["c.png", "a.JPG", "b.png", "deep/a.png"]
    Path("in/folder.png").rmdir()
    assert list(find_pictures(["in/*.png"])) == ["b.png"]
    assert list(find_pictures(["oth*/*.png"])) == ["c.png"]
    assert list(find_pictures(["odd[1].png"])) == ["odd[1].png"]  # a name, not a pattern
    assert list(find_pictures(["in/b.png", "in/*.png", Path("./in/b.png")])) == ["b.png"]
    for given, part in [
        (["nope.png"], "nope.png: no such picture"),
        (["no*pe.png"], "no*pe.png: no pictures there"),
        (["in", "in/deep/a.png"], "into two folders"),
        ([Path("in/deep"), "in/a.JPG"], "into two folders"),
    ]:
        with pytest.raises(InputError) as caught:
            find_pictures(given)  # type: ignore[arg-type]
        assert part in str(caught.value)


def test_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, "a.png", "sub/b.png", "sub/[x] c.png")
    # From here, or from where the list is; other lines count as they are.
    (tmp_path / "sub" / "list.txt").write_text("a.png\n\nb.png\r\n[x] c.png\n")
    monkeypatch.chdir(tmp_path)
    expected = {"a.png": "a.png", "b.png": "sub/b.png", "[x] c.png": "sub/[x] c.png"}
    assert find_pictures(["sub/list.txt"]) == find_pictures(["@sub/list.txt"]) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("sub/b.png\na.png\n"))
    assert list(find_pictures(["@-"])) == ["b.png", "a.png"]
    Path("list").write_text("a.png\ngone.png\n")
    with pytest.raises(InputError, match=r"list: line 2: gone\.png: no such picture"):
        find_pictures(["@list"])
    a, gone = walk(find_pictures(["@list"], missing=True))
    assert a.read().shape == (30, 40, 3)
    with pytest.raises(InputError, match=r"gone\.png: no such picture"):
        gone.read()
    Path("empty.txt").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.txt: lists no picture"):
        find_pictures(["empty.txt"])
    with pytest.raises(InputError, match=r"none\.txt"):
        find_pictures(["@none.txt"])


def test_the_first_picture_that_gets_dark_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = np.linspace(0, 4095, 1200).astype(np.uint16).reshape(30, 40)
    for number, values in enumerate((ramp + 1, 0 * ramp, ramp, ramp)):
        Image.fromarray(values).save(tmp_path / f"{number}.tif")
    monkeypatch.setattr(pictures, "_told", False)
    read = [item.read() for item in walk(find_pictures([tmp_path]))]
    assert read[2].max() == 16  # what is read stays as it is
    line = f"{tmp_path / '2.tif'}: 16 bits, but no value above 4095, which is nearly black: "
    assert [said[: len(line)] for said in capsys.readouterr().err.splitlines()] == [line]
    for held in (ramp, Image.fromarray(ramp), (tmp_path / "2.tif").read_bytes()):
        monkeypatch.setattr(pictures, "_told", False)
        as_array(held)
        assert capsys.readouterr().err.startswith("picture: 16 bits, but no value above 4095")
    monkeypatch.setattr(pictures, "_told", False)
    read_picture(tmp_path / "2.tif")
    assert capsys.readouterr().err.startswith(line)
    as_array(ramp.astype(np.uint8))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("missing", [False, True])
def test_comments_in_lists(tmp_path: Path, missing: bool) -> None:
    write_pictures(tmp_path, "a.png", "#1.png", "b.png")
    (tmp_path / "list.txt").write_text("# first\na.png\n  # a.png\n#b.png\n \n#1.png\n#\n")
    found = find_pictures([tmp_path / "list.txt"], missing=missing)
    assert list(found) == ["a.png", "#1.png"]  # a file that is there is none
    (tmp_path / "list.txt").write_text("# nothing yet\n#\n")
    with pytest.raises(InputError, match=r"list\.txt: lists no picture"):
        find_pictures([tmp_path / "list.txt"], missing=missing)


def test_no_file_of_a_folder_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, *(f"in/{i}.png" for i in range(30)))
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path}/in/{i}.png\n" for i in range(30)))
    looked: list[str] = []
    for name in ("stat", "lstat"):
        real = getattr(os, name)

        def spy(path: Any, *rest: Any, real: Any = real, **options: Any) -> os.stat_result:
            looked.append(str(path))
            result: os.stat_result = real(path, *rest, **options)
            return result

        monkeypatch.setattr(os, name, spy)
    found = find_pictures([str(tmp_path / "in")])
    assert len(found) == 30
    assert not [path for path in looked if path.endswith(".png")]
    looked.clear()
    assert count(find_pictures([str(tmp_path / "list.txt")])) == 30
    assert len([path for path in looked if path.endswith(".png")]) == 30


def test_a_closed_stdin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    (item,) = walk(find_pictures(["-"]))
    with pytest.raises(InputError, match="standard input: is closed"):
        item.read()
    with pytest.raises(InputError, match="standard input: is closed"):
        find_pictures(["@-"])


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_pictures(tmp_path, "in/a.png", "more/deep/b.png")
    (tmp_path / "in/more").symlink_to(tmp_path / "more")
    (tmp_path / "more/deep/back").symlink_to("..")  # without an end
    (tmp_path / "in/itself").symlink_to(".")
    assert list(find_pictures([tmp_path / "in"])) == ["a.png", "more/deep/b.png"]
    for one, other in ("xy", "yx"):  # each leads to the other
        (tmp_path / "two" / one).mkdir(parents=True)
        (tmp_path / "two" / one / "link").symlink_to(f"../{other}")
    write_pictures(tmp_path, "two/x/c.png")
    found = list(find_pictures([tmp_path / "two"]))
    assert found == ["x/c.png", "x/link/link/c.png", "y/link/c.png"]


def test_stdin_is_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    Image.new("RGB", (7, 5), "blue").save(content, "PNG")

    class Stdin:
        buffer = io.BytesIO(content.getvalue())

    monkeypatch.setattr(sys, "stdin", Stdin)
    (item,) = walk(find_pictures(["-"]))
    assert item.name == "stdin"
    assert item.read()[0, 0].tolist() == [0, 0, 255]
    monkeypatch.setattr(sources, "MOST_BYTES", 10)
    Stdin.buffer = io.BytesIO(content.getvalue())
    with pytest.raises(InputError, match="standard input: more than"):
        item.read()


# --- URLs


class Handler(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        if self.path.startswith("/gone"):
            self.send_error(404)
            return
        to = {"/file": "file:///etc/hostname", "/ftp": "ftp://x/y", "/moved": "/new/a%20b.png"}
        if self.path in to:
            self.send_response(302)
            self.send_header("Location", to[self.path])
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    content = io.BytesIO()
    Image.new("RGB", (7, 5), "blue").save(content, "PNG")
    monkeypatch.setattr(Handler, "content", content.getvalue())
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_urls_on_request_only(server: str) -> None:
    with pytest.raises(InputError, match="nothing is fetched without --allow-urls"):
        find_pictures([f"{server}/a.png"])
    find = functools.partial(find_pictures, allow_urls=True)
    assert list(find([f"{server}/x/a%20b.png?size=3"])) == ["a b.png"]
    assert list(find([f"{server}/x/..%2F..%2Fa.png"])) == ["a.png"]
    assert list(find([f"{server}/"])) == ["picture"]
    for path in ("x/a.png", "moved"):
        (item,) = walk(find([f"{server}/{path}"]))
        assert item.read().shape == (5, 7, 3)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/gone.png", "404"),
        ("/file", "not allowed"),
        ("/ftp", "unknown url type: ftp"),
        ("/", "no picture"),
        ("0/", "cannot fetch it"),
    ],
)
def test_what_a_url_must_not_give(
    server: str, path: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "/":
        monkeypatch.setattr(Handler, "content", b"text")
    (item,) = walk(find_pictures([server + path], allow_urls=True))
    with pytest.raises(InputError) as caught:
        item.read()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_url_has_limits(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = walk(find_pictures([f"{server}/a.png"], allow_urls=True))
    monkeypatch.setattr(sources, "DEADLINE", -1.0)
    with pytest.raises(InputError, match="not here after"):
        item.read()
    monkeypatch.setattr(sources, "MOST_BYTES", 10)
    with pytest.raises(InputError, match="more than 0 MB"):
        item.read()


# --- videos


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven frames, frame k of grey 30 k."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path_factory.mktemp("film") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for k in range(7):
        writer.write(np.full((48, 64, 3), (30 * k, 0, 0), np.uint8))  # blue, in OpenCV's order
    writer.release()
    return path


def test_frames_of_a_video(film: Path) -> None:
    found = find_pictures([film])
    assert count(found) == 7
    items = list(walk(found))
    assert [item.name for item in items] == [f"clip_{k:06}" for k in range(7)]
    for k, item in enumerate(items):
        pixels = item.read()
        assert pixels.shape == (48, 64, 3)
        np.testing.assert_allclose(pixels.mean((0, 1)), [0, 0, 30 * k], atol=12)  # JPEG's colours
    assert count(found, every=3) == 3
    assert [i.name for i in walk(found, every=3)] == ["clip_000000", "clip_000003", "clip_000006"]
    assert count(found, every=3, limit=2) == 2
    done = {"clip_000000", "clip_000002"}
    rest = list(walk(found, every=2, limit=3, done=done))
    assert [item.name for item in rest] == ["clip_000004"]
    assert rest[0].read()[:, :, 2].mean() == pytest.approx(120, abs=12)


def test_a_dot_in_a_video_s_name_is_not_a_suffix(film: Path, tmp_path: Path) -> None:
    for name in ("v1.2.avi", "v1.3.avi"):
        (tmp_path / name).write_bytes(film.read_bytes())
    names = [item.name for item in walk(find_pictures([str(tmp_path / "*.avi")]), every=6)]
    assert names == ["v1_2_000000", "v1_2_000006", "v1_3_000000", "v1_3_000006"]


def test_broken_videos_and_clashes(film: Path, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    found = find_pictures([tmp_path / "x.mp4", film])
    assert count(found) == 8
    item = next(walk(found))
    with pytest.raises(InputError, match=r"x\.mp4: no video"):
        item.read()
    assert len(list(walk(found))) == 8
    write_pictures(tmp_path, "clip_000005.png")
    with pytest.raises(InputError, match="into two folders"):
        find_pictures([film, tmp_path / "clip_000005.png"])


def test_a_camera_needs_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")

    class Camera:
        def __init__(self, index: int) -> None:
            assert index == 1
            self.number = 0

        def isOpened(self) -> bool:
            return True

        def grab(self) -> bool:
            self.number += 1
            return True

        def retrieve(self) -> tuple[bool, Any]:
            return True, np.full((4, 6, 3), self.number, np.uint8)

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    found = find_pictures(["camera:1"])
    with pytest.raises(InputError, match="would go on for ever"):
        count(found)
    assert count(found, limit=3) == 3
    items = list(walk(found, every=2, limit=3))
    assert [item.name for item in items] == [f"camera1_00000{k}" for k in (0, 2, 4)]
    assert [int(item.read().max()) for item in items] == [1, 3, 5]


def test_without_opencv_there_is_one_line(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"frames need OpenCV: pip install 'brefine\[video\]'"):
        count(find_pictures([film]))


# --- forms of a picture


def test_every_form_gives_the_same(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1)
    image = Image.fromarray(array)
    image.save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    for form in (array, image, tmp_path / "x.png", str(tmp_path / "x.png"), content, expected):
        assert torch.equal(as_pixels(form), expected)
        if not isinstance(form, torch.Tensor):
            assert np.array_equal(as_array(form), array)
    assert torch.equal(as_pixels(array[:, :, ::-1], "BGR"), expected)
    assert torch.equal(as_pixels(expected.flip(0), "BGR"), expected)
    grey = array[:, :, 0]
    for form in (grey, torch.from_numpy(grey.copy())):
        assert torch.equal(as_pixels(form), expected[:1].expand(3, -1, -1))
    deep = grey.astype(np.uint16) * 257
    assert torch.equal(as_pixels(deep), expected[:1].expand(3, -1, -1))
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert torch.equal(as_pixels(tmp_path / "deep.png"), as_pixels(deep))


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (np.zeros((4, 5, 3), np.float32), "float32: scale it to 0..255"),
        (torch.zeros(3, 4, 5), "float32: scale it to 0..255"),
        (np.zeros((4, 5, 4), np.uint8), r"expected RGB \[H, W, 3\] uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"not array \[3, 4, 5\] uint8"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"expected RGB \[3, H, W\]"),
        (np.zeros((0, 5), np.uint8), r"not array \[0, 5\]"),
        (np.zeros((4, 5), np.int64), "int64"),
        (b"", "picture: no picture"),
        (7, "not int"),
    ],
)
def test_other_arrays_are_refused_with_advice(wrong: Any, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        as_pixels(wrong)
    if not isinstance(wrong, torch.Tensor):
        with pytest.raises(InputError, match=advice):
            as_array(wrong)


def test_the_order_of_channels_is_one_of_two() -> None:
    with pytest.raises(InputError, match="'bgr' is none of RGB, BGR"):
        as_pixels(np.zeros((4, 5, 3), np.uint8), "bgr")


# --- files that break others


def huge(side: int) -> bytes:
    """A PNG that claims to be a square of this side, in RGB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10**6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_claim_of_billions_of_pixels_takes_no_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "x.png").write_bytes(huge(60_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"x\.png: larger than 178 million pixels"):
        as_pixels(tmp_path / "x.png")
    with pytest.raises(InputError, match="picture: larger than 178 million pixels"):
        as_pixels(huge(60_000))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50 * 1024  # KiB; the picture would take 10 GiB


def test_threads_that_read_leave_warnings_as_they_were(tmp_path: Path) -> None:
    for i in range(40):
        write_pictures(tmp_path, f"{i}.png")
    (tmp_path / "x.png").write_text("no picture")
    before = list(warnings.filters)

    def read(item: sources.Item) -> bool:
        try:
            return bool(item.read().size)
        except InputError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(read, walk(find_pictures([str(tmp_path)])))) == 40
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_a_video_that_ends_early_is_told(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(list(walk(find_pictures([film])))) == 7
    assert len(list(walk(find_pictures([film]), limit=2))) == 2
    assert "should have" not in capsys.readouterr().err
    content = film.read_bytes()
    chunks = [i for i in range(len(content)) if content[i : i + 4] == b"00dc"][:7]
    damaged = content[: chunks[3] + 8] + bytes(chunks[4] - chunks[3] - 8) + content[chunks[4] :]
    (tmp_path / "half.avi").write_bytes(damaged)
    seen = list(walk(find_pictures([tmp_path / "half.avi"])))
    assert 0 < len(seen) < 6
    said = " ".join(capsys.readouterr().err.split())
    assert f"half.avi: ends after {len(seen)} of 7 frames" in said


def test_a_pil_picture_that_is_read_late(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:4000])
    with Image.open(tmp_path / "cut.png") as picture, pytest.raises(InputError, match="picture: "):
        as_array(picture)
    picture = Image.open(whole)
    picture.close()
    with pytest.raises(InputError, match="picture: cannot read the picture"):
        as_array(picture)


@pytest.mark.parametrize("content", [b"caf\xe9.png\n", b"\xef\xbb\xbfa.png\n"])
def test_lists_on_standard_input_are_read_like_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    given = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    if content.startswith(b"caf"):
        with pytest.raises(InputError, match="standard input: no text in UTF-8"):
            find_pictures(["@-"])
    else:
        assert list(find_pictures(["@-"])) == ["a.png"]
