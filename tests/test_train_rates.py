"""The search for a learning rate."""

import numpy as np
import pytest

from brefine import cli
from brefine.data import toy
from brefine.rates import _steepest, find_rate
from brefine.structures import InputError
from test_train import recipe


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, train=6, val=2, size=(64, 80), seed=3, progress=False)
    return folder


@pytest.mark.parametrize("middle", [1e-4, 1e-2])
def test_the_suggestion_is_where_the_loss_falls_fastest(middle):
    rates = np.geomspace(1e-6, 1, 100)
    losses = 1 / (1 + (rates / middle) ** 2)  # steepest, by the logarithm, at the middle
    assert _steepest(rates.tolist(), losses.tolist()) == pytest.approx(middle, rel=0.15)
    with pytest.raises(InputError, match="never fell"):
        _steepest(rates.tolist(), rates.tolist())
    with pytest.raises(InputError, match="diverged at once"):
        _steepest([1e-6] * 5, [1.0] * 5)


def test_a_search_ends_where_the_loss_diverges(pictures):
    used = recipe(pictures, "data.flip=0")
    found = find_rate(used, low=1e-5, high=1e6, steps=80)
    assert found.rates == sorted(found.rates)
    assert found.rates[0] == 1e-5
    assert found.rates[-1] < 1e5  # not to the end
    assert found.suggestion in found.rates
    assert found.losses[found.rates.index(found.suggestion)] < found.losses[0]
    assert find_rate(used, low=1e-5, high=1e6, steps=80) == found
    for wrong in ({"low": 1.0, "high": 0.1}, {"steps": 3}):
        with pytest.raises(InputError, match="give 20 or more, rising"):
            find_rate(used, **wrong)


def test_the_command_prints_the_rate(pictures, tmp_path, capsys):
    recipe(pictures).save(tmp_path / "recipe.yaml")
    assert cli.main(["find-rate", str(tmp_path / "recipe.yaml"), "--steps", "40"]) == 0
    out, err = capsys.readouterr()
    assert 1e-6 < float(out) < 1
    assert "train.lr" in err
