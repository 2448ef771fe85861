"""What was matched: the structure every figure is counted from, and the tape of masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from brefine.metrics.overlaps import assign, compare
from brefine.metrics.tape import Tape
from brefine.rle import decode
from samples import dense_rle, detect, disc, random_records, random_set
from test_evaluate import SIZE, dense_band, scene


def greedy(ious, threshold, ignored, crowd):
    """COCO's matching, one detection and one object after the other."""
    order = sorted(range(len(crowd)), key=lambda g: ignored[g])
    taken, found = set(), []
    for row in ious:
        best, chosen = threshold, -1
        for g in order:
            if g in taken and not crowd[g]:
                continue
            if chosen > -1 and not ignored[chosen] and ignored[g]:
                break
            if row[g] >= best:
                best, chosen = row[g], g
        if chosen > -1:
            taken.add(chosen)
        found.append(chosen)
    return found


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_matching_is_cocos(data):
    shape = data.draw(st.tuples(st.integers(0, 7), st.integers(0, 6)))
    values = st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.75, 0.8, 0.95, 1.0])
    ious = data.draw(hnp.arrays(np.float64, shape, elements=values))
    if shape[1] and data.draw(st.booleans()):  # as masks are: at most one object each
        only = data.draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))
        ious = ious * np.eye(shape[1])[only]
    crowd = data.draw(hnp.arrays(bool, shape[1]))
    ignored = data.draw(hnp.arrays(bool, (3, shape[1]))) | crowd
    thresholds = np.array([0.5, 0.75, 0.95])
    found = assign(ious, thresholds, ignored, crowd)
    assert found.shape == (shape[0], 3, 3)
    for a in range(3):
        for t, threshold in enumerate(thresholds):
            assert found[:, a, t].tolist() == greedy(ious, threshold, ignored[a], crowd)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("across", [False, True])
def test_overlaps_are_those_of_dense_masks(seed, across):
    dataset = random_set(seed, classes=3)
    records = random_records(dataset, seed)
    pictures = list(compare(records, dataset, across=across))
    ids = [dataset.pictures[o.picture].id for o in pictures]
    assert ids == sorted(picture.id for picture in dataset.pictures)
    seen = []
    for overlaps in pictures:
        picture = dataset.pictures[overlaps.picture]
        entries = dataset.annotations(overlaps.picture)
        true = [entries[i] for i in overlaps.objects]
        found = [records[i] for i in overlaps.records]
        assert len(true) == len(entries)
        assert all(record["image_id"] == picture.id for record in found)
        assert overlaps.size == picture.size
        assert overlaps.scores.tolist() == sorted((r["score"] for r in found), reverse=True)
        assert overlaps.scores.tolist() == [r["score"] for r in found]
        rows = [category.id for category in dataset.categories]
        assert [rows[label] for label in overlaps.labels] == [r["category_id"] for r in found]
        assert [rows[label] for label in overlaps.true_labels] == [t["category_id"] for t in true]
        assert overlaps.true_areas.tolist() == [t["area"] for t in true]
        assert overlaps.crowd.tolist() == [bool(t["iscrowd"]) for t in true]
        assert not any(excused.any() for excused in overlaps.excused.values())
        seen += overlaps.records.tolist()
        masks, truths = (
            [coco_mask.decode(one["segmentation"]).astype(bool) for one in side]
            for side in (found, true)
        )
        assert overlaps.areas["mask"].tolist() == [mask.sum() for mask in masks]
        np.testing.assert_allclose(
            overlaps.areas["box"], [r["bbox"][2] * r["bbox"][3] for r in found]
        )
        for i, mask in enumerate(masks):
            for j, truth in enumerate(truths):
                if not across and overlaps.labels[i] != overlaps.true_labels[j]:
                    assert all(ious[i, j] == 0 for ious in overlaps.ious.values())
                    continue
                shared, union = (mask & truth).sum(), (mask | truth).sum()
                if overlaps.crowd[j]:
                    union = mask.sum()
                whole = shared / max(union, 1)
                assert overlaps.ious["mask"][i, j] == pytest.approx(whole, abs=1e-12)
                if whole >= 0.5 and not overlaps.crowd[j]:
                    a, b = dense_band(mask), dense_band(truth)
                    whole = min(whole, (a & b).sum() / (a | b).sum())
                assert overlaps.ious["boundary"][i, j] == pytest.approx(whole, abs=1e-12)
    assert sorted(seen) == list(range(len(records)))


@pytest.mark.parametrize("seed", range(3))
def test_one_class_of_the_overlaps_and_whom_it_found(seed):
    dataset = random_set(seed, classes=3)
    records = random_records(dataset, seed)
    matched = 0
    for overlaps in compare(records, dataset, across=True):
        for kind in ("box", "mask", "boundary"):
            match = overlaps.match(kind, 0.6)
            matched += (match >= 0).sum()
            for label in range(3):
                part = overlaps.of(label)
                assert set(part.labels.tolist()) | set(part.true_labels.tolist()) <= {label}
                assert part.ranks().tolist() == list(range(len(part.labels)))
                mine = part.match(kind, 0.6)
                places = np.append(np.flatnonzero(overlaps.true_labels == label), -1)
                assert places[mine].tolist() == match[overlaps.labels == label].tolist()
                assert mine.tolist() == greedy(part.ious[kind], 0.6, part.crowd, part.crowd)
            anyone = overlaps.match(kind, 0.6, across=True)
            crowd = overlaps.crowd
            assert anyone.tolist() == greedy(overlaps.ious[kind], 0.6, crowd, crowd)
    assert matched > 20
    with pytest.raises(ValueError, match="equal classes only"):
        next(compare(records, dataset)).match("mask", across=True)


def test_beyond_a_hundred_of_a_class_detections_are_gone():
    dataset = scene((0, 0, disc(60, 45, 20), False))
    records = [detect(dataset, disc(20, 20, 8), 0.5, label) for label in [0] * 130 + [1] * 20]
    (overlaps,) = compare(records, dataset)
    assert np.bincount(overlaps.labels).tolist() == [100, 20]
    assert overlaps.ranks().max() == 99


def test_only_the_kinds_asked_for_and_the_first_pictures():
    dataset = random_set(1)
    records = random_records(dataset, 1)
    (overlaps,) = compare(records, dataset, kinds=("box",), limit=1)
    assert overlaps.picture == 0
    assert list(overlaps.ious) == list(overlaps.areas) == ["box"]


# --- the tape ------------------------------------------------------------------------------------

masks = hnp.arrays(bool, st.tuples(st.integers(0, 5), st.just(7), st.just(9)))


@settings(deadline=None, max_examples=100)
@given(masks, st.randoms(use_true_random=False))
def test_a_tape_holds_the_masks(dense, random):
    """Also of several forms, and with runs of no length in between."""
    size = dense.shape[1:]
    forms = []
    for mask in dense:
        edges = np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0)).tolist()
        counts = np.diff([0, *edges, mask.size]).tolist()
        for _ in range(random.randint(0, 2)):
            place = random.randint(0, len(counts))
            counts[place:place] = [0, 0]
        loose = {"size": list(size), "counts": counts}
        tight = coco_mask.frPyObjects(loose, *size)
        tight["counts"] = tight["counts"].decode()
        forms.append(tight if random.random() < 0.7 else loose)
    tape = Tape.of(forms, size)
    assert len(tape) == len(dense)
    assert tape.areas().tolist() == [mask.sum() for mask in dense]
    for i, mask in enumerate(dense):
        np.testing.assert_array_equal(tape.boxes[i], decode(forms[i], size).box())
        window, (x, y) = tape.window(i)
        whole = np.zeros(size, bool)
        whole[y : y + window.shape[0], x : x + window.shape[1]] = window
        np.testing.assert_array_equal(whole, mask)
        x1, y1, x2, y2 = tape.boxes[i]
        assert window.shape == (y2 - y1, x2 - x1)
        assert tape.runs(i).area() == mask.sum()


@pytest.mark.parametrize(
    "broken", [{"counts": "\x00"}, {"counts": ""}, {"counts": "5"}, {"size": [3, 3]}, {"counts": 3}]
)
def test_one_broken_mask_refuses_the_tape(broken):
    good = dense_rle(disc(60, 45, 20))
    assert Tape.of([good, good], SIZE).areas()[1] == disc(60, 45, 20).sum()
    with pytest.raises(ValueError, match=r"RLE|pixels"):
        Tape.of([good, good | broken], SIZE)
