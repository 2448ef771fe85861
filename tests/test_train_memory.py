"""A mask head that works its inner results out again: the same gradients, less kept."""

import sys

import pytest
import torch

from brefine.methods import create
from brefine.parts.two_stage import Truth
from test_train import MODEL
from test_train_together import batch


def learn(method, checkpoint):
    """Losses, gradients, and the bytes that the mask head keeps for its gradient."""
    torch.manual_seed(3)
    detector = {**MODEL["detector"], "proposals": (60, 60), "mask_rois": None}
    options = {**MODEL, "detector": detector, "mask_checkpoint": checkpoint}
    model = create(method, 3, **options)
    torch.manual_seed(4)
    kept, seen = [0], set()

    def keep(tensor):
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept[0] += storage.nbytes()
        return tensor

    inside, loss = [False], model.mask_head.loss

    def watched(*args):
        inside[0] = True
        try:
            return loss(*args)
        finally:
            inside[0] = False

    model.mask_head.loss = watched
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        named = model.loss(*batch([1, 2]))
    total = torch.stack([v for k, v in named.items() if not k.startswith("raw_")]).sum()
    total.backward()
    return named, {name: p.grad for name, p in model.named_parameters()}, kept[0]


@pytest.mark.parametrize("method", ["mask_rcnn", "brefine"])
def test_gradients_stay_and_memory_goes(method):
    named, grads, kept = learn(method, False)
    same, again, less = learn(method, True)
    assert all(torch.equal(named[name], same[name]) for name in named)
    for name, grad in grads.items():
        if grad is not None:
            assert torch.allclose(grad, again[name], rtol=1e-5, atol=1e-7), name
    assert grads["mask_head.logits.weight"].abs().max() > 0
    assert less < 0.6 * kept


def test_rois_are_learnt_from_in_groups(monkeypatch):
    cut = Truth.__call__
    sides = []
    monkeypatch.setattr(Truth, "__call__", lambda self, side: sides.append(side) or cut(self, side))
    whole = {}
    for group in (1000, 7):
        monkeypatch.setattr(sys.modules["brefine.methods.brefine"], "GROUP", group)
        for checkpoint in (False, True):
            whole[group, checkpoint] = learn("brefine", checkpoint)
    named, grads, _ = whole[1000, False]
    for others, again, _ in whole.values():
        for name, value in named.items():
            assert torch.allclose(value, others[name], rtol=1e-5, atol=1e-7), name
        for name, grad in grads.items():
            if grad is not None:
                assert torch.allclose(grad, again[name], rtol=1e-4, atol=1e-6), name
    assert len(sides) == 4  # the true masks are cut out once, not once a group
    # of a group nothing stays but which RoIs it is of: groups cost nothing
    assert whole[7, True][2] < 1.01 * whole[1000, True][2]
