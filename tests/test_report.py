import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from brefine import report as page
from brefine.cli import main
from brefine.data.coco import CocoSet
from brefine.data.lvis import Federated
from brefine.evaluate import evaluate_records
from brefine.metrics.errors import ERRORS
from brefine.metrics.findings import gather
from brefine.parts.masks import to_records
from brefine.structures import Category, InputError
from samples import FakePicture, FakeSet, blob, random_records, random_set

SECTIONS = (
    "Summary",
    "What AP is lost to",
    "Curves",
    "Boundaries",
    "Classes",
    "Best and worst pictures",
    "Examples of errors",
)
NASTY = [
    '<script>alert("1")</script>',
    "a & b' onload=\"x",
    "</title></svg>",
    "名前 {body} {title}",
]


class Page(HTMLParser):
    """Checks that tags are balanced; keeps tags, tables, text and what a browser would fetch."""

    VOID = frozenset(("meta", "br"))

    def __init__(self, text):
        super().__init__()
        self.source, self.open, self.links, self.tags, self.text = text, [], [], [], []
        self.rows = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert all(not name.startswith("on") for name, _ in attributes)
        self.links += [v for k, v in attributes if k in ("href", "src", "data", "action", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name):
        """The cells beside a head."""
        return next(row[1:] for row in self.rows if row and row[0] == name)


def check(path):
    """A page that fetches nothing, balanced, with every section, not too large."""
    assert path.stat().st_size < 5e6
    found = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "img", "object", "form"} & set(found.tags)
    assert all(re.match(r"data:image/(png|jpeg);base64,|#[\w-]+$", link) for link in found.links)
    plain = re.sub(r"base64,[^\"]*", "", found.source)
    assert "http" not in plain
    assert "url(" not in plain
    assert "@import" not in plain
    assert [text for text in found.text if text in SECTIONS] == [*SECTIONS, *SECTIONS]
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(found.text))
    assert not re.search(r'="[^"]*\bnan\b', plain)
    anchors = {link[1:] for link in found.links if link.startswith("#")}
    assert anchors == set(re.findall(r'<section id="([\w-]+)"', plain))
    return found


def with_pictures(dataset, folder, seed=0):
    """The set with noise on disk."""
    random = np.random.default_rng(seed)
    for i, picture in enumerate(dataset.pictures):
        file = folder / f"{i}.png"
        Image.fromarray(random.integers(0, 256, (*picture.size, 3), dtype=np.uint8)).save(file)
        dataset.pictures[i] = FakePicture(picture.id, file, picture.size)
    return dataset


def write(path, dataset, records, **options):
    report = evaluate_records(records, dataset)
    page.write(path, "a model", report, dataset, progress=False, **options)
    return report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A set with hostile names, its detections, their report and the page."""
    folder = tmp_path_factory.mktemp("report")
    dataset = with_pictures(random_set(3, pictures=10, classes=4), folder)
    dataset.categories = [
        Category(c.id, name) for c, name in zip(dataset.categories, NASTY, strict=True)
    ]
    records = random_records(dataset, 3)
    report = write(folder / "page.html", dataset, records)
    return folder / "page.html", dataset, records, report


def test_page_is_whole_and_escaped(written):
    path, dataset, _, _ = written
    found = check(path)
    text = " ".join(found.text)
    assert "alert" in text
    assert all(category.name in text for category in dataset.categories)
    assert "{body}" in text
    assert text.count("Numbers") == 8
    assert found.source.count('role="img"') >= 8 + 3 * 6  # charts, and three columns a picture
    assert [p.name for p in path.parent.iterdir() if not re.match(r"\d+\.png", p.name)] == [
        path.name
    ]


def test_figures_are_those_of_the_evaluation(written):
    path, dataset, records, report = written
    found = check(path)
    for key in ("AP", "AP50", "AP75", "AP_S", "AP_L", "AR100"):
        cells = found.row(key)[:3]
        values = [report.values[f"{kind}/{key}"] for kind in ("mask", "boundary", "box")]
        assert cells == ["-" if math.isnan(v) else f"{100 * v:.1f}" for v in values]
    for name, values in report.per_class.items():
        objects, ap, _, ap50, boundary, box, threshold, *_ = found.row(name)
        assert int(objects) == values["objects"]
        expected = [values[k] for k in ("mask/AP", "mask/AP50", "boundary/AP", "box/AP")]
        assert [ap, ap50, boundary, box] == [f"{100 * v:.1f}" for v in expected]
        assert threshold == f"{values['threshold']:.2f}"
    findings = gather(records, report.thresholds, dataset)
    for i, (kind, cost) in enumerate(findings.errors.costs().items()):
        kept, _, every, lost, *_ = found.row(kind)
        assert [int(kept), int(every)] == findings.errors.counts[::-1, i].tolist()
        assert lost == f"{100 * cost:.1f}"
    assert "boundary" in found.row("figure")


def test_classes_come_from_best_to_worst(written):
    found = check(written[0])
    names = set(written[3].per_class)
    values = [float(row[2]) for row in found.rows if row[0] in names and len(row) == 10]
    assert len(values) == 4
    assert values == sorted(values, reverse=True)


def test_findings_against_counting(written):
    _, dataset, records, report = written
    findings = gather(records, report.thresholds, dataset)
    ids = [category.id for category in dataset.categories]
    kept = [r for r in records if r["score"] >= report.thresholds[ids.index(r["category_id"])]]
    # Without crowd regions nothing is ignored: what is kept is counted.
    assert findings.hits[:, 0].sum() <= len(kept)
    for label, values in enumerate(report.per_class.values()):
        count, right = findings.hits[label].tolist()
        assert right / count == pytest.approx(values["threshold/precision"])
        assert right / values["objects"] == pytest.approx(values["threshold/recall"])
    assert len(findings.profile.areas) == findings.hits[:, 1].sum()
    assert min(findings.profile.mask_ious) >= 0.5
    assert np.all(np.array(findings.profile.boundary_ious) <= findings.profile.mask_ious)
    assert len(findings.scores) == len(findings.right) > findings.hits[:, 0].sum()
    for rating in findings.ratings:
        f1 = 2 * rating.found / (rating.objects + rating.kept)
        assert rating.quality == pytest.approx(f1 * rating.iou)
    assert sum(rating.found for rating in findings.ratings) == findings.hits[:, 1].sum()
    for kind in ("mask", "boundary"):
        ap = np.nanmean(findings.curves[kind].precision[..., 0])
        assert ap == pytest.approx(report.values[f"{kind}/AP"])


def test_crowds_are_not_shown_as_objects(tmp_path):
    dataset = random_set(5, pictures=6, objects=5)
    true = [o for o in dataset.objects if not o[3]]
    assert len(true) < len(dataset.objects)
    write(tmp_path / "page.html", dataset, random_records(dataset, 5))
    found = check(tmp_path / "page.html")
    assert f"6 pictures, {len(true)} objects" in " ".join(found.text)


def one_of(classes, pictures, objects, seed=0):
    return random_set(seed, pictures=pictures, objects=objects, classes=classes, crowds=False)


@pytest.mark.parametrize(
    "case", ["no detections", "no objects", "nothing", "no pictures", "one class", "80 classes"]
)
def test_any_set_has_a_page(tmp_path, case):
    dataset = {
        "no detections": lambda: one_of(3, 4, 4),
        "no objects": lambda: one_of(3, 4, 0),
        "nothing": lambda: one_of(1, 2, 0),
        "no pictures": lambda: one_of(2, 0, 0),
        "one class": lambda: one_of(1, 4, 4),
        "80 classes": lambda: FakeSet(
            [Category(i, f"class {i}") for i in range(80)],
            [FakePicture(i, tmp_path / f"{i}.png", (60, 70)) for i in range(20)],
            [(i % 20, i, blob(np.random.default_rng(i), (60, 70)), False) for i in range(79)],
        ),
    }[case]()
    records = [] if case in ("no detections", "nothing") else random_records(dataset, 0)
    write(tmp_path / "page.html", dataset, records)
    found = check(tmp_path / "page.html")
    text = " ".join(found.text)
    assert ("nothing to show" in text) == (
        case in ("no detections", "no objects", "nothing", "no pictures")
    )
    assert ("all others" in text) == (case == "80 classes")
    if case == "no detections":
        assert found.row("AP")[:3] == ["0.0"] * 3
        assert found.row("missed")[3] == "100.0"
    if case == "no objects":
        assert found.row("AP")[:3] == ["-"] * 3
        assert found.row("background")[3] == "-"
    if case == "80 classes":
        assert sum(row[0].startswith("class ") and len(row) == 10 for row in found.rows) == 80


def test_lvis_has_a_page(tmp_path):
    dataset = one_of(3, 5, 5, seed=1)
    dataset.federated = Federated(("r", "c", "f"), ((0, 1, 2),) * 5, ((1,),) * 5)
    report = write(tmp_path / "page.html", dataset, random_records(dataset, 1))
    found = check(tmp_path / "page.html")
    for letter in "rcf":
        assert found.row(f"AP_{letter}")[0] == f"{100 * report.values[f'mask/AP_{letter}']:.1f}"
    assert found.row("AR300")
    # Class 1 is nowhere labelled exhaustively: nothing of it can be invented.
    name, other = (dataset.categories[i].name for i in (1, 0))
    listed = {tuple(row[:2]) for row in found.rows if len(row) == 3}
    assert ("(nothing there)", name) not in listed
    assert ("(nothing there)", other) in listed


def test_matrix_of_many_classes_loses_nothing():
    random = np.random.default_rng(0)
    counts = random.integers(0, 3, (51, 51))
    counts[-1, -1] = 0
    text = page._confusion(counts, [f"c{i}" for i in range(50)])
    cells = re.findall(r"<title>([^<>]+) → ([^<>]+): (\d+)</title>", text)
    assert len(cells) == 32 * 32
    assert sum(int(n) for *_, n in cells) == counts.sum()
    shown = {(a, b): int(n) for a, b, n in cells}
    mistakes = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    names = sorted(
        {a for a, _ in shown} - {"all others", "nothing there"}, key=lambda a: int(a[1:])
    )
    chosen = [int(name[1:]) for name in names]
    assert len(chosen) == 30
    assert min(mistakes[chosen]) >= max(mistakes[i] for i in range(50) if i not in chosen)
    rest = [i for i in range(50) if i not in chosen]
    for i in chosen:
        assert shown[f"c{i}", f"c{chosen[0]}"] == counts[i, chosen[0]]
        assert shown[f"c{i}", "all others"] == counts[i, rest].sum()
        assert shown[f"c{i}", "missed"] == counts[i, -1]
        assert shown["nothing there", f"c{i}"] == counts[-1, i]
    assert shown["all others", "all others"] == counts[np.ix_(rest, rest)].sum()


def test_pictures_that_cannot_be_read_are_gray(tmp_path):
    dataset = with_pictures(one_of(2, 4, 4, seed=2), tmp_path)
    dataset.pictures[1].file.unlink()
    Image.new("RGB", (5, 5)).save(dataset.pictures[2].file)
    write(tmp_path / "page.html", dataset, random_records(dataset, 2))
    text = " ".join(check(tmp_path / "page.html").text)
    assert "2 pictures could not be read and are gray" in text


def test_records_of_pycocotools_and_scores_of_any_size(tmp_path):
    dataset = one_of(2, 4, 4)
    records = random_records(dataset, 0)
    for record in records:
        rle = record["segmentation"]
        record["segmentation"] = rle | {"counts": rle["counts"].encode()}
        record["score"] = 10 * record["score"] - 3
    write(tmp_path / "page.html", dataset, records)
    text = " ".join(check(tmp_path / "page.html").text)
    assert "scores outside 0..1" in text


def test_size_is_bounded_whatever_the_pictures(tmp_path):
    random = np.random.default_rng(0)
    size = (450, 600)
    dataset = FakeSet(
        [Category(1, "a")], [FakePicture(i, tmp_path, size) for i in range(6)],
        [(i, 0, blob(random, size), False) for i in range(6) for _ in range(2)],
    )  # fmt: skip
    with_pictures(dataset, tmp_path)
    write(tmp_path / "page.html", dataset, random_records(dataset, 0, stray=2))
    check(tmp_path / "page.html")


def test_an_old_page_stays_when_there_is_nothing_to_report(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    dataset = one_of(1, 2, 2)
    report = evaluate_records([], dataset)
    del report.values["mask/AP"]
    with pytest.raises(InputError, match="detects"):
        page.write(path, "n", report, dataset, progress=False)
    assert path.read_text() == "old"


def test_without_boundary_ap_in_the_table(tmp_path):
    dataset = one_of(2, 4, 4)
    records = random_records(dataset, 0)
    report = evaluate_records(records, dataset, boundary=False)
    page.write(tmp_path / "page.html", "n", report, dataset, progress=False)
    found = check(tmp_path / "page.html")
    assert found.row("figure") == ["mask", "box", ""]


# --- the command ---------------------------------------------------------------------------------


def test_command_writes_the_page(tmp_path, toy_set, tiny_model, capsys):
    data = toy_set / "val.json"
    dataset = CocoSet(data)
    records = []
    for i, picture in enumerate(dataset.pictures):
        records += to_records(dataset.target(i), picture.id, dataset.categories, picture.size)
    results, path = tmp_path / "results.json", tmp_path / "page.html"
    results.write_text(json.dumps(records))
    assert main(["evaluate", str(results), "--data", str(data), "--report", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "mask" in out
    assert str(path) in err
    found = check(path)
    assert found.row("AP")[:3] == ["100.0"] * 3
    assert [found.row(kind)[3] for kind in ERRORS] == ["0.0"] * 7
    assert "could not be read" not in " ".join(found.text)

    model = ["evaluate", str(tiny_model), "--data", str(data), "--report", str(path)]
    assert main([*model, "--limit", "2"]) == 0
    text = " ".join(check(path).text)
    assert "2 pictures" in text
    assert "Masks in true boxes" in text

    before = path.read_text()
    capsys.readouterr()
    assert main([*model, str(results)]) == 2
    assert "one MODEL" in capsys.readouterr().err
    assert main([*model, "--boxes", "ground-truth"]) == 2
    assert "--boxes ground-truth" in capsys.readouterr().err
    assert path.read_text() == before


# --- in a browser --------------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
#: what the browser itself asks for, whatever the page
ITS_OWN = re.compile(r"https?://([\w-]+\.)*(google|googleapis|gvt1|gstatic)\.com[/:]")


def open_in_browser(file, folder, *more):
    """The page's elements, what it said on the console, and the addresses it asked for."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--log-level=0",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}",
            *more, file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    asked = set(re.findall(r'"url":"(https?:[^"]*)"', log.read_text(errors="replace")))
    return done.stdout, said, {url for url in asked if not ITS_OWN.match(url)}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_in_a_browser(written, tmp_path):
    # This would be noticed:
    noisy = tmp_path / "noisy.html"
    noisy.write_text("<img src='http://example.invalid/a.png'><script>nothing()</script>")
    _, said, asked = open_in_browser(noisy, tmp_path, "--dump-dom")
    assert len(said) == 1
    assert asked == {"http://example.invalid/a.png"}

    dom, said, asked = open_in_browser(written[0], tmp_path, "--dump-dom")
    assert said == []
    assert asked == set()
    # The browser read it as it is written, and nothing ran.
    for tag in ("section", "svg", "figure", "details", "tr", "image", "path"):
        count = len(re.findall(rf"<{tag}[ >]", written[0].read_text(encoding="utf-8")))
        assert len(re.findall(rf"<{tag}[ >]", dom)) == count, tag

    shot = tmp_path / "shot.png"
    for scheme, back in ((1, (251, 251, 250)), (0, (20, 22, 26))):  # light, dark
        open_in_browser(
            written[0], tmp_path, f"--screenshot={shot}", "--window-size=1200,3000",
            f"--blink-settings=preferredColorScheme={scheme}",
        )  # fmt: skip
        with Image.open(shot) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert (pixels[:5] == back).all()
        shades = ((11, 111, 184), (209, 88, 10)) if scheme else ((92, 179, 238), (255, 154, 82))
        for shade in shades:  # masks and boundaries in the charts
            assert (pixels == shade).all(1).sum() > 500
