"""A run of training goes on where it was interrupted."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llm_dit.tiny.training.loop import Budget, Run


def small():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def test_a_run_goes_on_where_it_ended(tmp_path):
    """With the moments of its gradients, and the averaged weights."""
    torch.manual_seed(0)
    data = torch.randn(64, 4)

    def run(minutes):
        model = small()
        found = Run([model], Budget(minutes, 1e-2), tmp_path / "run.safetensors")
        before = {kind: [tensor.clone() for tensor in each] for kind, each in found.kept().items()}
        found.train(lambda: (model(data).squeeze(1) - data.sum(dim=1)).square().mean(), "test")
        return found, before

    first, _ = run(0.005)
    again, before = run(0)
    assert again.steps == first.steps > 0
    after = first.kept()
    for kind in ("averaged", "first", "second"):
        assert all(torch.equal(one, other) for one, other in zip(after[kind], before[kind], strict=True))
    # The weights of now are the averaged ones after a run: what they were stands in the file.
    kept = load_file(tmp_path / "run.safetensors")
    assert all(torch.equal(one, kept[f"now.{index}"]) for index, one in enumerate(before["now"]))
    assert not any(torch.equal(one, other) for one, other in zip(before["now"], before["averaged"], strict=True))
    assert all(tensor.abs().max() > 0 for kind in ("first", "second") for tensor in after[kind])
    assert all(again.adamw.state[one]["step"] == first.steps for one in again.parameters)


def test_what_is_learnt_is_kept_in_the_model(tmp_path):
    torch.manual_seed(0)
    data, model = torch.randn(64, 4), small()

    def loss():
        return (model(data).squeeze(1) - data.sum(dim=1)).square().mean()

    before = loss().item()
    run = Run([model], Budget(0.02, 1e-2), tmp_path / "run.safetensors")
    run.train(loss, "test")
    assert loss().item() < before
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), run.averaged, strict=True))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run([small()], Budget(0, 1e-2), tmp_path / "run.safetensors").train(lambda: torch.zeros(()), "test")
    with pytest.raises(ValueError, match="is of another model than this one"):
        Run([nn.Linear(8, 8)], Budget(0, 1e-2), tmp_path / "run.safetensors")


def test_an_interrupted_run_keeps_its_steps(tmp_path):
    model, calls = small(), iter(range(5))

    def loss():
        if next(calls) == 4:
            raise KeyboardInterrupt
        return model(torch.ones(1, 4)).square().sum()

    with pytest.raises(KeyboardInterrupt):
        Run([model], Budget(1, 1e-2), tmp_path / "run.safetensors").train(loss, "test")
    again = Run([small()], Budget(1, 1e-2), tmp_path / "run.safetensors")
    assert again.steps == 4
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters, strict=True))


def test_a_stage_that_another_has_learned_is_not_trained_on(tmp_path):
    """An autoencoder would no longer make the latents that the denoiser knows."""
    later, model = tmp_path / "later.safetensors", small()

    def stage(minutes):
        return Run([model], Budget(minutes, 1e-2, before=later), tmp_path / "run.safetensors")

    stage(0.001).train(lambda: model(torch.ones(1, 4)).square().sum(), "test")
    later.touch()
    stage(0.001).train(lambda: pytest.fail("it is trained"), "test")
    with pytest.raises(ValueError, match=r"later.safetensors was trained on what .*run.safetensors makes after"):
        stage(1).train(lambda: pytest.fail("it is trained"), "test")
