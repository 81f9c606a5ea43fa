"""What autoencoders are trained through."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from llm_dit.tiny.training.stages import off_at_every_scale


@pytest.mark.parametrize("places", [(16, 16), (3, 8, 8)], ids=["picture", "clip"])
def test_what_latents_are_off_by_follows_their_deviation_and_is_partly_shared_by_neighbours(places):
    generator = torch.Generator().manual_seed(0)
    deviation = torch.tensor([0.02, 0.5, 4.0])
    latents = torch.randn(64, 3, *places, generator=generator) * deviation.view(1, -1, *[1] * len(places))
    latents.requires_grad_()
    torch.manual_seed(0)
    off = off_at_every_scale(latents, 0.5)
    assert off.shape == latents.shape
    assert not off.requires_grad
    sizes = off.transpose(0, 1).flatten(1).std(dim=1) / deviation
    torch.testing.assert_close(sizes, torch.full((3,), 0.5), rtol=0.1, atol=0)
    relative = (off / deviation.view(1, -1, *[1] * len(places))).flatten(0, -3)
    shared = avg_pool2d(relative.unsqueeze(1), 4).std()
    assert 0.5 * 0.4 < shared < 0.5 * 0.8  # of white noise a quarter would be left
