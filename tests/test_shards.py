"""Processes that share an evaluation: the report is that of one process, to the last digit."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from brefine.data.coco import CocoSet
from brefine.evaluate import evaluate
from brefine.metrics.shards import gather, merge, share
from brefine.predict import Predictor
from brefine.structures import InputError


@given(st.data(), st.sets(st.integers(0, 50)), st.integers(1, 4))
def test_merging_loses_and_doubles_nothing(data, pictures, processes):
    parts: list[dict[int, list[str]]] = [{} for _ in range(processes)]
    for picture in pictures:  # some pictures lie on several processes
        for place in data.draw(st.sets(st.integers(0, processes - 1), min_size=1)):
            parts[place][picture] = [f"of {picture}"]
    merged = merge(data.draw(st.permutations(parts)))
    assert list(merged) == sorted(pictures)
    assert merged == {picture: [f"of {picture}"] for picture in pictures}


def test_alone_everything_is_mine():
    assert list(share(range(5))) == [0, 1, 2, 3, 4]
    assert gather({3: "c", 1: "a"}) == {1: "a", 3: "c"}
    with pytest.raises(InputError, match="broken"):
        gather({}, InputError("broken"))


def work(rank: int, processes: int, folder: Path, model: Path, labels: Path) -> None:
    """One of several processes: its report, its share and the fault it saw, as json."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=processes
    )
    try:
        dataset = CocoSet(labels)
        seen = {"share": list(share(range(len(dataset))))}
        try:
            report = evaluate(Predictor.load(model, "cpu"), dataset, progress=False)
            seen |= {"report": report.as_dict(), "records": report.records}
        except InputError as error:
            seen["fault"] = str(error)
        (folder / f"{rank}.json").write_text(json.dumps(seen))
    finally:
        distributed.destroy_process_group()


def run(processes: int, folder: Path, model: Path, labels: Path) -> list[dict]:
    context = multiprocessing.get_context("fork")
    folder.mkdir()
    started = [
        context.Process(target=work, args=(rank, processes, folder, model, labels))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_processes_give_the_report_of_one(backend, toy_set, tiny_model, tmp_path, monkeypatch):
    # Beside NCCL objects go through a group of their own: told so, it is made without a GPU, too.
    monkeypatch.setattr(distributed, "get_backend", lambda group: backend)
    labels = toy_set / "val.json"
    alone = evaluate(Predictor.load(tiny_model, "cpu"), CocoSet(labels), progress=False)
    assert alone.records
    found = run(2, tmp_path / "two", tiny_model, labels)
    assert [one["share"] for one in found] == [[0, 2], [1]]  # uneven
    for one in found:
        assert one["report"] == json.loads(json.dumps(alone.as_dict()))
    assert [one["records"] for one in found] == [json.loads(json.dumps(alone.records)), []]


def test_a_process_without_pictures_and_one_that_fails(toy_set, tiny_model, tmp_path):
    content = json.loads((toy_set / "val.json").read_text())
    first = content["images"][0]["id"]
    content["images"] = content["images"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first]
    (toy_set / "one.json").write_text(json.dumps(content))
    found = run(2, tmp_path / "one", tiny_model, toy_set / "one.json")
    assert [one["share"] for one in found] == [[0], []]
    assert found[0]["report"] == found[1]["report"]
    content["images"][0]["file_name"] = "gone.png"
    (toy_set / "gone.json").write_text(json.dumps(content))
    for one in run(2, tmp_path / "gone", tiny_model, toy_set / "gone.json"):
        assert "gone.png" in one["fault"]
