"""Muon is torch's, all matrices of a shape at once."""

import pytest
import torch
from torch import nn

from llm_dit.tiny.training.__main__ import COURSES
from llm_dit.tiny.training.loop import Budget, Run
from llm_dit.tiny.training.muon import Muon, block_matrices, orthogonalized

SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8)]


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_the_steps_are_those_of_torch():
    ours, theirs = matrices(), matrices()
    muon = Muon(ours, [torch.zeros_like(matrix) for matrix in ours], torch.tensor(0.1))
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in (1, 2, 3):
        for one, other, gradient in zip(ours, theirs, matrices(seed), strict=True):
            one.grad, other.grad = gradient.detach().clone(), gradient.detach().clone()
        muon.step()
        reference.step()
    for one, other, start in zip(ours, theirs, matrices(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * (other - start).abs().max().item())


def test_a_matrix_without_a_gradient_stays():
    ours = matrices()
    Muon(ours, [torch.zeros_like(matrix) for matrix in ours], torch.tensor(0.1)).step()
    assert all(torch.equal(one, other) for one, other in zip(ours, matrices(), strict=True))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 48, 16), (2, 16, 48)])
def test_singular_values_are_near_one(shape):
    found = orthogonalized(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float()
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    assert values.median() > 0.6


@pytest.mark.parametrize("name", COURSES)
def test_what_embeds_and_predicts_is_not_muons(name):
    transformer = COURSES[name].build().transformer
    chosen = {id(matrix) for matrix in block_matrices(transformer)}
    names = [name for name, parameter in transformer.named_parameters() if id(parameter) in chosen]
    assert len(names) > 20
    assert not any("embed" in name or name.startswith(("proj_out", "all_final")) for name in names)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.predict = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, data):
        data = self.embed(data)
        for block in self.blocks:
            data = data + block(data)
        return self.predict(data)


def test_a_run_goes_on_where_it_ended(tmp_path):
    """With the momenta of both, and the averaged weights."""
    torch.manual_seed(0)
    data = torch.randn(64, 4)

    def run(minutes):
        model = Small()
        found = Run([model], Budget(minutes, 1e-2, 1e-2), tmp_path / "run.safetensors")
        before = {kind: [tensor.clone() for tensor in each] for kind, each in found.kept().items()}
        found.train(lambda: (model(data).squeeze(1) - data.sum(dim=1)).square().mean(), "test")
        return found, before

    first, _ = run(0.005)
    again, before = run(0)
    assert again.steps == first.steps > 0
    assert [len(pairs) for pairs in first.muon.groups.values()] == [2]
    after = first.kept()
    for kind in ("averaged", "first", "second"):  # the weights of now are the averaged ones after a run
        assert all(torch.equal(one, other) for one, other in zip(after[kind], before[kind], strict=True))
    assert all(tensor.abs().max() > 0 for tensor in first.kept()["first"])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run([Small()], Budget(0, 1e-2), tmp_path / "run.safetensors").train(lambda: torch.zeros(()), "test")
    with pytest.raises(ValueError, match="is of another model than this one"):
        Run([nn.Linear(8, 8)], Budget(0, 1e-2), tmp_path / "run.safetensors")
