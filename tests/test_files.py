"""Files: whole or not at all. Progress: says where it is, with and without a terminal."""

import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from brefine import progress
from brefine.files import replacing
from brefine.progress import Progress, clock, track
from brefine.structures import InputError


def test_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    with replacing(path) as aside:
        aside.write_text("new")
        assert not path.exists()
        assert aside.parent == path.parent  # the same file system, so that moving is one step
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_folder_replaces_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").touch()
    with replacing(tmp_path / "m") as aside:
        aside.mkdir()
        (aside / "new").touch()
        assert (tmp_path / "m" / "old").exists()
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
@pytest.mark.parametrize("folder", [False, True])
def test_failure_keeps_the_old(tmp_path: Path, error: type[BaseException], folder: bool) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as aside:
            if folder:
                aside.mkdir()
                (aside / "half").touch()
            else:
                aside.write_text("half")
            raise error("broken")

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for text in ("first", "second"):
        with replacing(tmp_path / "link") as aside:
            aside.write_text(text)
        assert (tmp_path / "there/file").read_text() == text
    assert (tmp_path / "link").is_symlink()


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(InputError, match="cannot write"), replacing(path):
        pass
    assert path.read_text() == "old"


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught, replacing(tmp_path / "file" / "x") as aside:
        aside.write_text("new")
    assert str(tmp_path / "file" / "x") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with (
        pytest.raises(InputError, match="Permission denied"),
        replacing(tmp_path / "locked" / "x") as aside,
    ):
        aside.write_text("new")


# --- progress


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    out = io.StringIO()
    fake = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    monkeypatch.setattr(progress, "console", fake)
    return out


def test_log_lines_have_count_figures_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(monkeypatch, terminal=False)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("train", 10, every=4) as bar:
        for step in range(10):
            now[0] += 1
            bar.advance(figures=f"loss {step}")
    lines = out.getvalue().splitlines()
    # every 4 seconds, and at the end
    assert [re.match(r"train (\d+)/10", line)[1] for line in lines] == ["4", "8", "10"]  # type: ignore[index]
    assert "loss 3" in lines[0]
    assert "0:04 elapsed, ETA 0:06" in lines[0]
    assert lines[-1].endswith("ETA 0:00")


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(monkeypatch, terminal=True)
    with Progress("train", 3) as bar:
        bar.advance(2, "loss 1.0")
        bar.advance(1)
    text = out.getvalue()
    assert "train" in text
    assert "3/3" in text
    assert "ETA" in text


def test_track_gives_every_item_and_survives_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(monkeypatch, terminal=False)
    assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    assert "letters 3/3" in out.getvalue()
    letters = track("abc", "letters", 3)
    next(letters)
    with pytest.raises(RuntimeError, match="inside"):
        letters.throw(RuntimeError("inside"))  # type: ignore[attr-defined]


def test_titles_are_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(monkeypatch, terminal=False)
    list(track("a", "set[red]", 1))
    assert "set[red] 1/1" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.6, "0:01"),
        (59.4, "0:59"),
        (61, "1:01"),
        (3600, "1:00:00"),
        (36061, "10:01:01"),
    ],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
