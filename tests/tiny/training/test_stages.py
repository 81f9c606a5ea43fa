"""What autoencoders are trained through."""

import pytest
import torch

from llm_dit.tiny.training.stages import off_by_region


@pytest.mark.parametrize("places", [(16, 16), (3, 8, 8)], ids=["picture", "clip"])
def test_what_latents_are_off_by_is_shared_by_neighbours_and_follows_their_deviation(places):
    generator = torch.Generator().manual_seed(0)
    deviation = torch.tensor([0.02, 0.5, 4.0])
    latents = torch.randn(64, 3, *places, generator=generator) * deviation.view(1, -1, *[1] * len(places))
    latents.requires_grad_()
    torch.manual_seed(0)
    off = off_by_region(latents, 0.5)
    assert off.shape == latents.shape
    assert not off.requires_grad
    sizes = off.transpose(0, 1).flatten(1).std(dim=1) / deviation
    assert ((sizes > 0.2) & (sizes < 0.6)).all(), sizes
    torch.testing.assert_close(sizes, sizes.mean().expand(3), rtol=0.1, atol=0)
    beside, across = (off[..., 1:] - off[..., :-1]).std(), (off[..., -1] - off[..., 0]).std()
    assert beside < 0.5 * across
