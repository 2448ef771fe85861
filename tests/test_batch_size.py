"""``train.batch_size: auto``: the number is right, is kept, and changes nothing else."""

import math

import numpy as np
import pytest
import torch

from brefine import batch_size, cli, reproduce, weights
from brefine.batch_size import Steps, fit, frames, free_memory, heaviest, resolve
from brefine.data import toy
from brefine.data.read import read
from brefine.rates import find_rate
from brefine.recipe import Recipe
from brefine.structures import InputError
from brefine.train import train
from test_train import recipe

AUTO = "train.batch_size=auto"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, train=6, val=2, size=(64, 80), seed=3, progress=False)
    return folder


@pytest.fixture(scope="module")
def dataset(pictures):
    return read(pictures / "train.json", split="train")


@pytest.mark.parametrize(
    ("limit", "most", "expected", "measured"),
    [
        (109, 64, 0, [1]),  # bytes are 100 + 10 n
        (119, 64, 1, [1]),
        (240, 64, 8, [1, 2, 4]),  # 14 would fit
        (100 + 10 * 16, 64, 16, [1, 2, 4]),
        (100 + 10 * 16 - 1, 64, 8, [1, 2, 4]),
        (10**9, 64, 64, [1, 2, 4]),
        (10**9, 6, 4, [1, 2, 4]),
        (10**9, 1, 1, [1]),
        (10**9, 3, 2, [1, 2]),
    ],
)
def test_the_largest_power_of_two_below_the_line(limit, most, expected, measured):
    asked = []

    def measure(count):
        asked.append(count)
        return 100 + 10 * count

    found = fit(measure, limit, most)
    assert (found.size, asked) == (expected, measured)
    if len(measured) > 1:
        assert (found.base, found.each) == pytest.approx((100, 10))


def test_the_line_lies_above_whatever_was_measured():
    for taken in ({1: 30, 2: 31, 4: 70}, {1: 10, 2: 60, 4: 61}, {1: 50, 2: 40, 4: 30}):
        found = fit(taken.__getitem__, 10**9, 64)
        assert found.each >= 0
        assert all(found.base + found.each * n >= value - 1e-6 for n, value in taken.items())
    assert fit({1: 10, 2: 20, 4: 100}.__getitem__, 99, 64).size == 2  # more than the line said


def test_what_a_gpu_refuses_is_halved():
    asked = []

    def measure(count):
        asked.append(count)
        return 10 * count if count < 16 else math.inf  # fragments, say

    assert fit(measure, 10**4, 64, confirm=True).size == 8
    assert asked == [1, 2, 4, 64, 32, 16, 8]
    assert fit(lambda n: 10 * n if n < 2 else math.inf, 10**4, 64, confirm=True).size == 1
    with pytest.raises(MemoryError):
        fit(lambda n: math.inf, 10**4, 64)


def test_memory_grows_with_pictures_and_with_their_size(pictures, dataset):
    taken = {}
    for side in (64, 192):
        used = recipe(pictures, f"data.short_side={side}", f"data.long_side={side * 5 // 4}")
        steps = Steps(used, dataset, 6, torch.device("cpu"))
        steps.run(1)
        taken[side] = [steps.measure(count) for count in (1, 2, 4, 6)]
    one, two, four, six = taken[192]
    assert one < two < four < six
    each = (six - one) / 5
    assert abs(four - one - 3 * each) < each  # noise of the allocator is part of a picture
    assert 0.5 * each < one < 2.5 * each
    assert all(large > 2 * small for small, large in zip(taken[64], taken[192], strict=True))


def test_what_the_optimizer_keeps_is_counted(pictures, dataset):
    def state(*settings):
        return Steps(recipe(pictures, *settings), dataset, 1, torch.device("cpu")).state

    words = state()
    assert words == 4 * sum(
        p.numel()
        for p in Steps(recipe(pictures), dataset, 1, torch.device("cpu")).model.parameters()
        if p.requires_grad
    )
    assert state("train.momentum=0") == 0
    assert state("train.optimizer=adamw") == 2 * words
    assert 0 < state("train.freeze=['trunk.*']", "train.optimizer=adamw") < 2 * words
    assert state("train.ema=0.9") >= 2 * words


def test_batches_are_as_heavy_as_the_set_can_give(pictures, dataset):
    used = recipe(pictures, "data.short_side=[32, 64, 48]", "data.flip=0")
    counts = [len(targets[0]) for _, targets in heaviest(dataset, used, 6)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == max(len(dataset.target(i)) for i in range(len(dataset)))
    assert frames(dataset, used.data) == ((64, 96), (64, 96))
    turned = recipe(pictures, "data.rotate90=true")
    alone, together = frames(dataset, turned.data)
    assert sorted(alone) == [64, 96]
    assert together == (96, 96)
    cropped = recipe(pictures, "data.crop=100", "data.jitter=[0.1, 2]")
    assert frames(dataset, cropped.data) == ((128, 128), (128, 128))
    steps = Steps(turned, dataset, 4, torch.device("cpu"))
    steps.run(3)
    assert steps.shape[:2] == (96, 96)
    assert steps.shape[2] == sum(counts[:3])
    own = Steps(used, dataset, 2, torch.device("cpu"), lambda *each: each[:2])
    own.run(2)
    assert own.shape[:2] == (64, 96)


@pytest.mark.parametrize("method", ["mask_rcnn", "brefine"])
def test_mask_heads_get_what_a_trained_detector_gives_them(pictures, dataset, method):
    most = ["model.options.detector.proposals=[100, 100]", "model.options.detector.mask_rois=null"]
    used = recipe(pictures, *most, method=method)
    steps = Steps(used, dataset, 1, torch.device("cpu"))
    seen, loss = [], steps.model.mask_head.loss

    def watched(features, rows, *rest):
        seen.append(len(rows))
        return loss(features, rows, *rest)

    steps.model.mask_head.loss = watched
    steps.run(1)
    assert seen[0] >= 5 * len(steps.targets[0])


def test_precision_is_that_of_training(pictures, dataset):
    used, seen = recipe(pictures, "train.precision=bf16-mixed"), []
    steps = Steps(used, dataset, 1, torch.device("cpu"))
    steps.model.box_head.fc2.register_forward_hook(lambda *each: seen.append(each[2].dtype))
    steps.run(1)
    assert seen == [torch.bfloat16]


def test_weights_are_those_of_a_run_with_the_number(pictures, tmp_path, capsys):
    short = ["train.steps=2", "data.val=null", "model.options.detector.mask_rois=2"]
    folder = train(recipe(pictures, *short, AUTO), tmp_path / "auto")
    lines = [line for line in capsys.readouterr().err.splitlines() if "train.batch_size" in line]
    assert len(lines) == 1
    for words in ("train.batch_size = 4: ", " GB free (at most 70%)", " MB a picture; of 6 in the"):
        assert words in lines[0]
    assert "train.lr stays 0.01" in lines[0]
    named = recipe(pictures, *short, "train.batch_size=4")
    other = train(named, tmp_path / "named")
    one, two = (weights.load(path).segmenter.state_dict() for path in (folder, other))
    assert all(torch.equal(one[key], two[key]) for key in two)
    assert Recipe.load(tmp_path / "auto/recipe.yaml") == named
    assert weights.load(folder).recipe == named


def test_no_random_state_changes(pictures, dataset):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = resolve(recipe(pictures, AUTO, "train.lr_reference_batch=2"), dataset)
    assert found.train.batch_size == 4
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert resolve(found, dataset) is found


def test_a_run_goes_on_with_the_number_that_it_had(pictures, tmp_path, monkeypatch):
    short = ["data.val=null", "train.milestones=9"]
    run = tmp_path / "run"
    train(recipe(pictures, *short, AUTO, "train.steps=1"), run)
    monkeypatch.setattr(batch_size, "resolve", None)  # measuring again would fail
    file = tmp_path / "recipe.yaml"
    recipe(pictures, *short, AUTO, "train.steps=2").save(file)
    assert Recipe.load(file).train.batch_size == "auto"
    assert cli.main(["train", str(file), "--out", str(run), "--resume"]) == 0
    assert Recipe.load(run / "recipe.yaml").train.batch_size == 4
    train(recipe(pictures, *short, "train.batch_size=4", "train.steps=2"), tmp_path / "named")
    one, two = (
        weights.load(path / "last").segmenter.state_dict()
        for path in (run, file.with_name("named"))
    )
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_one_line_says_what_to_lower_if_not_even_one_fits(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch_size, "free_memory", lambda kind: 10**6)
    file = tmp_path / "recipe.yaml"
    recipe(pictures, AUTO).save(file)
    assert cli.main(["train", str(file), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: train.batch_size: auto: not even one fits: out of memory with 1")
    assert "1 picture a process of 64 x 96" in line
    assert "set data.long_side=60" in line
    assert "of 1 MB free" in line
    assert not (tmp_path / "run").exists()

    def hungry(self, count):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Steps, "run", hungry)
    with pytest.raises(InputError, match="not even one fits: out of memory with 1 picture a pro"):
        train(recipe(pictures, AUTO), tmp_path / "run")
    monkeypatch.setattr(Steps, "run", lambda self, count: [].pop())
    with pytest.raises(IndexError):  # a fault of ours stays one
        train(recipe(pictures, AUTO), tmp_path / "run")


def test_several_processes_are_refused(pictures, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    recipe(pictures, AUTO).save(file)
    assert cli.main(["train", str(file), "--out", str(tmp_path / "run"), "--devices", "2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "measured by one process, not by 2: run with --devices 1 once" in line


@pytest.mark.parametrize("value", ["automatic", "0", "-3", "1.5", "[2]", "null"])
def test_what_is_neither_a_number_nor_auto_is_one_line(pictures, tmp_path, capsys, value):
    file = tmp_path / "recipe.yaml"
    recipe(pictures).save(file)
    assert cli.main(["train", str(file), "--set", f"train.batch_size={value}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "train.batch_size: expected a whole number above 0, or auto, not" in line
    assert line.count("train.batch_size:") == 1


def test_a_search_for_a_rate_chooses_first(pictures):
    options = {"low": 1e-5, "high": 1e-2, "steps": 20}
    found = find_rate(recipe(pictures, AUTO), **options)
    assert found == find_rate(recipe(pictures, "train.batch_size=4"), **options)


def test_tables_want_a_number(pictures, tmp_path):
    with pytest.raises(InputError, match="auto: rows would differ by machine: give a number"):
        reproduce.reproduce("table1", pictures, tmp_path, small=True, settings=[AUTO])
    with pytest.raises(InputError, match="auto is for brefine train: give a number here"):
        _ = recipe(pictures, AUTO).train.pictures


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_limits_of_containers_are_kept(tmp_path):
    info = {"proc__meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}
    bare, new, old = tmp_path / "bare", tmp_path / "new", tmp_path / "old"
    write(bare, **info)
    assert free_memory("cpu", bare) == 8000 * 1024
    write(new, **info, proc__self__cgroup="0::/job/task\n")
    group = new / "sys/fs/cgroup/job"
    write(group, **{"memory.max": "3000000\n", "memory.current": "1500000\n"})
    write(group, **{"memory.stat": "anon 1\ninactive_file 500000\n"})
    write(group / "task", **{"memory.max": "max\n", "memory.current": "9\n"})
    assert free_memory("cpu", new) == 2000000  # of the folder above; files' cache is free
    write(group / "task", **{"memory.max": "100009\n"})
    assert free_memory("cpu", new) == 100000
    write(old, **info, proc__self__cgroup="5:cpu:/x\n4:memory:/docker/of-the-host\n0::/\n")
    top = {"memory.limit_in_bytes": "700\n", "memory.usage_in_bytes": "900\n"}
    write(old / "sys/fs/cgroup/memory", **top)
    assert free_memory("cpu", old) == 0
    with pytest.raises(InputError, match="does not tell how much memory is free: give a number"):
        free_memory("cpu", tmp_path / "none")
