"""Order of the pictures: nothing lost or doubled on any number of processes, and reproducible."""

import collections
import itertools
import json
import math
import os
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from brefine.data.coco import CocoSet
from brefine.data.loader import train_loader
from brefine.data.samplers import EpochSampler, aspect_groups, repeat_factors
from brefine.recipe import DataRecipe


def shares(sampler, epoch=0):
    """What each process shows: lists of (index, copy)."""
    return [
        [tuple(key) for key in sampler.share(epoch, rank).tolist()]
        for rank in range(sampler.processes)
    ]


def check_epoch(sampler, expected, groups=None, epoch=0):
    """Every property of an epoch in which picture i comes ``expected[i]`` times, and fill."""
    per_process = shares(sampler, epoch)
    size, processes = sampler.batch_size, sampler.processes
    total = sum(expected)
    steps = math.ceil(total / (size * processes))
    assert (
        [len(share) for share in per_process]
        == [steps * size] * processes
        == ([len(sampler)] * processes)
    )
    shown = [key for share in per_process for key in share]
    assert len(set(shown)) == len(shown)  # no key twice: what comes again is drawn differently
    counts = collections.Counter(index for index, _ in shown)
    for index, count in enumerate(expected):
        assert sorted(copy for i, copy in shown if i == index) == list(range(counts[index]))
        assert counts[index] >= count
    assert sum(counts.values()) - total < size * processes  # the fill is less than a step
    if total:
        again = [counts[index] - count for index, count in enumerate(expected)]
        assert max(again) <= math.ceil((len(shown) - total) / total) * max(expected)
    if groups is not None:
        batches = [share[i : i + size] for share in per_process for i in range(0, len(share), size)]
        mixed = sum(len({groups[index] for index, _ in batch}) > 1 for batch in batches)
        assert mixed < max(1, len(set(groups)))


def test_every_small_world():
    for processes in (1, 2, 3):
        for batch_size in (1, 2, 3, 4):
            for size in range(13):
                options = {"batch_size": batch_size, "processes": processes}
                check_epoch(EpochSampler(size, 5, **options), [1] * size)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.integers(0, 10),
)
def test_any_world_with_groups_and_repeats(groups, batch_size, processes, repeats, seed, epoch):
    sampler = EpochSampler(
        len(groups),
        seed,
        batch_size=batch_size,
        processes=processes,
        groups=np.array(groups, int),
        repeats=repeats,
    )
    check_epoch(sampler, [repeats] * len(groups), groups, epoch)
    assert shares(sampler, epoch) == shares(sampler, epoch)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.floats(1, 6), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_factors_are_rounded_up_or_down(factors, batch_size, processes, repeats, seed):
    options = {"batch_size": batch_size, "processes": processes, "repeats": repeats}
    sampler = EpochSampler(len(factors), seed, factors=factors, **options)
    total = repeats * sum(factors)
    slots = math.ceil(total / (batch_size * processes)) * batch_size * processes
    assert len(sampler) * processes == slots
    counts = collections.Counter(i for share in shares(sampler) for i, _ in share)
    fill = slots - math.floor(total) + repeats
    for index, factor in enumerate(factors):
        assert counts[index] >= repeats * math.floor(factor)
        assert counts[index] <= repeats * math.ceil(factor) + fill
    assert sum(counts.values()) == slots


def test_no_picture_is_lost_where_every_pass_is_rounded():
    """Three passes of 3.5 fill 11 places: rounded one by one they could need 12."""
    for seed in range(200):
        sampler = EpochSampler(3, seed, factors=[1, 1, 1.5], repeats=3)
        counts = np.bincount(sampler.share(0, 0)[:, 0], minlength=3)
        assert len(sampler) == 11
        assert (counts >= 3).all()


def test_factors_hold_on_average():
    factors = np.array([1, 1.25, 2.5, 3.9, 1, 1, 1.35])  # 12 in all: no fill
    sampler = EpochSampler(len(factors), 3, factors=factors)
    epochs = 2000
    counts = np.zeros(len(factors))
    pairs = np.zeros(2)
    for epoch in range(epochs):
        found = np.bincount(sampler.share(epoch, 0)[:, 0], minlength=len(factors))
        assert ((found == np.floor(factors)) | (found == np.ceil(factors))).all()
        counts += found
        pairs += found[2] == 3, found[2] == 3 and found[1] == 2
    assert np.abs(counts / epochs - factors).max() < 0.05  # over 4 standard errors
    assert len(sampler) == 12
    # Rounding is anew in each epoch, not the same pictures together.
    assert 0.02 < pairs[1] / pairs[0] < 0.6


def test_an_order_follows_from_seed_and_epoch():
    sampler = EpochSampler(50, seed=7)
    first, second = list(sampler), list(sampler)
    assert [key[0] for key in first + second] == [0] * 50 + [1] * 50
    assert sorted(key[1] for key in first) == sorted(key[1] for key in second) == list(range(50))
    assert [key[1] for key in first] != [key[1] for key in second]
    assert {key[2] for key in first} == {0}
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(EpochSampler(50, seed=8)) != first


def test_several_processes_show_what_one_shows_with_larger_batches():
    alone = EpochSampler(37, seed=2, batch_size=6).share(4, 0).reshape(-1, 6, 2)
    several = EpochSampler(37, seed=2, batch_size=2, processes=3)
    together = [several.share(4, rank).reshape(-1, 2, 2) for rank in range(3)]
    assert np.array_equal(np.concatenate(together, 1), alone)


def test_repeats_are_passes_one_after_the_other():
    order = [index for _, index, _ in EpochSampler(20, seed=1, repeats=8)]
    for start in range(0, 160, 20):
        assert sorted(order[start : start + 20]) == list(range(20))
    assert order[:20] != order[20:40]


def test_batches_of_one_group_come_in_mixed_order():
    groups = [i % 2 for i in range(400)]
    keys = EpochSampler(400, seed=0, batch_size=4, groups=groups).share(0, 0)
    kinds = [groups[index] for index in keys[::4, 0]]
    assert [groups[index] for index in keys[:, 0]] == np.repeat(kinds, 4).tolist()
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert 30 < changes < 70  # 50 on average, of 99
    # A single group changes nothing.
    one = EpochSampler(400, seed=0, batch_size=4, groups=[3] * 400)
    assert list(one) == list(EpochSampler(400, seed=0))


def test_a_pass_can_leave_out_its_first_batches():
    sampler = EpochSampler(20, seed=1, batch_size=3)
    first, second = list(sampler), list(sampler)
    sampler.set_epoch(0)
    sampler.skip(2)
    assert list(sampler) == first[6:]
    assert list(sampler) == second


def test_the_rank_is_that_of_the_running_process(monkeypatch):
    sampler = EpochSampler(20, seed=1, batch_size=3, processes=2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler.set_epoch(6)
        assert [key[1:] for key in sampler] == [tuple(k) for k in sampler.share(6, rank).tolist()]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(RuntimeError, match="3 processes share an epoch made for 2"):
        iter(sampler)


# ------------------------------------------------------------------------------- sets


def write_set(folder, sizes, classes):
    """Pictures of sizes (height, width), each with objects of classes; a class "crowd 2" too."""
    folder.mkdir(exist_ok=True)
    annotations = []
    for number, shown in enumerate(classes):
        for name in shown:
            crowd, category = (1, int(name[5:])) if isinstance(name, str) else (0, name)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 10 * category,
                    "iscrowd": crowd,
                    "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]],
                }
            )
    for number, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height)).save(folder / f"{number}.png")
    images = [
        {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        for number, (height, width) in enumerate(sizes)
    ]
    categories = [{"id": 10 * i, "name": str(i)} for i in range(1, 5)]
    values = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(values))
    return CocoSet(folder / "set.json")


def test_repeat_factors_are_those_of_the_lvis_paper(tmp_path):
    classes = [[1, 1], [1, 2], [1], [], [3, "crowd4"], [1, 2, 3]] + [[1]] * 4
    dataset = write_set(tmp_path, [(10, 12)] * 10, classes)
    share = {1: 8 / 10, 2: 2 / 10, 3: 2 / 10}
    for threshold in (1e-3, 0.3, 0.5, 1):
        expected = [
            max([1.0] + [math.sqrt(threshold / share[c]) for c in shown if isinstance(c, int)])
            for shown in classes
        ]
        assert repeat_factors(dataset, threshold) == pytest.approx(expected)
    assert (repeat_factors(dataset, 1e-3) == 1).all()


def test_high_and_wide_pictures_are_two_groups(tmp_path):
    dataset = write_set(tmp_path, [(10, 12), (12, 10), (11, 11), (40, 11)], [[1]] * 4)
    assert aspect_groups(dataset).tolist() == [0, 1, 0, 1]


def test_the_recipe_decides_on_the_order(tmp_path):
    sizes = [(20, 30), (30, 20)] * 8
    dataset = write_set(tmp_path, sizes, [[1]] * 14 + [[2]] * 2)

    def loader(**options):
        recipe = DataRecipe(short_side=20, long_side=30, flip=0, workers=0, **options)
        return train_loader(dataset, recipe, batch_size=4, seed=0)

    padded = [tuple(images.pixels.shape[2:]) for images, _ in loader()]
    assert sorted(padded) == [(32, 32)] * 4
    shapes = [{target.size for target in targets} for _, targets in loader()]
    assert [len(shape) for shape in shapes] == [1] * 4
    shapes = [{target.size for target in targets} for _, targets in loader(group_by_aspect=False)]
    assert max(len(shape) for shape in shapes) == 2
    assert len(loader(repeats=8)) == 32
    # f = 1/8 for class 2: sqrt(0.5 / 0.125) = 2 for its two pictures.
    rare = loader(repeat_threshold=0.5)
    assert len(rare) == math.ceil(18 / 4)
    counts = collections.Counter(index for _, index, _ in rare.sampler)
    assert counts[14] >= 2 <= counts[15]


# ------------------------------------------------------------------------------- Lightning


class Recorder(L.LightningModule):
    """Writes down which pictures each step is given; their widths are their names."""

    def __init__(self, folder, stop=None):
        super().__init__()
        self.layer, self.folder, self.stop = nn.Linear(1, 1), folder, stop

    def training_step(self, batch, index):
        if self.global_step == self.stop:
            raise RuntimeError("power cut")
        images, _ = batch
        with (Path(self.folder) / f"{self.global_rank}.txt").open("a") as file:
            names = " ".join(str(int(width)) for width in images.sizes[:, 1])
            file.write(f"{self.trainer.current_epoch}: {names}\n")
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def transfer_batch_to_device(self, batch, device, index):
        return batch


def fit(dataset, folder, *, processes=1, steps, workers=0, resume=False, stop=None, every=None):
    """Train for some steps as ``train.py`` does; lines by process."""
    folder.mkdir(exist_ok=True)
    recipe = DataRecipe(short_side=10, long_side=1000, flip=0, workers=workers)
    loader = train_loader(dataset, recipe, batch_size=2, seed=4, processes=processes)
    callbacks = []
    if every:
        callbacks.append(
            L.pytorch.callbacks.ModelCheckpoint(
                folder, filename="c", every_n_train_steps=every, enable_version_counter=False
            )
        )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp_fork",
        use_distributed_sampler=False,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(every),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Recorder(folder, stop)
    path = folder / "c.ckpt" if resume else None
    if stop is None:
        trainer.fit(module, loader, ckpt_path=path, weights_only=True)
    else:
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.fit(module, loader, ckpt_path=path, weights_only=True)
    return [(folder / f"{rank}.txt").read_text().splitlines() for rank in range(processes)]


def expected(size, epochs, processes=1):
    """The same from the sampler alone."""
    sampler = EpochSampler(size, 4, batch_size=2, processes=processes)
    lines = [[] for _ in range(processes)]
    for epoch in range(epochs):
        for rank, mine in enumerate(lines):
            names = (sampler.share(epoch, rank)[:, 0] + 10).reshape(-1, 2).tolist()
            mine += [f"{epoch}: {a} {b}" for a, b in names]
    return lines


@pytest.fixture(scope="module")
def eleven(tmp_path_factory):
    """Eleven pictures, 10 pixels high and 10, 11, ... wide."""
    folder = tmp_path_factory.mktemp("eleven")
    return write_set(folder, [(10, 10 + i) for i in range(11)], [[1]] * 11)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_broke_in_an_epoch_goes_on_there(eleven, tmp_path, workers):
    (whole,) = expected(11, 3)  # 6 steps an epoch
    fit(eleven, tmp_path, steps=16, stop=9, every=4, workers=workers)
    (tmp_path / "0.txt").unlink()
    (rest,) = fit(eleven, tmp_path, steps=16, resume=True, every=4, workers=workers)
    assert rest == whole[8:16]


def test_a_run_that_broke_between_epochs_starts_the_next(eleven, tmp_path):
    (whole,) = expected(11, 3)
    fit(eleven, tmp_path, steps=16, stop=7, every=6)
    (tmp_path / "0.txt").unlink()
    (rest,) = fit(eleven, tmp_path, steps=16, resume=True, every=6)
    assert rest == whole[6:16]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the two processes are forked")
def test_two_processes_share_an_epoch_under_lightning(eleven, tmp_path):
    lines = fit(eleven, tmp_path, processes=2, steps=6)
    assert lines == expected(11, 2, processes=2)
    shown = [name for mine in lines for line in mine[:3] for name in line.split()[1:]]
    assert {int(name) for name in shown} == set(range(10, 21))
