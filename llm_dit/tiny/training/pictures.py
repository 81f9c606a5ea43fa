"""Courses of pictures: one autoencoder, whose latents are what the transformer predicts."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
import typer
from torch import Tensor

from .. import scenes
from ..scenes.reading import COLOURFUL
from .course import Coding, Course, Plan
from .data import PICTURES, Drawn, to_bytes, to_float
from .stages import clean_all, encode_all, train_autoencoder

_COLOURED: Final = 3.0
"""How much more an error counts in a coloured pixel. Things fill a tenth of a picture and are all that is read in it; without,
latents describe the pattern of a ground and round a cross to a diamond: of Qwen-Image's reconstructions 92.5 % were read right
after 12,700 steps, and with 5.0 99 % after 5,700."""


class PictureCourse(Course, Coding):
    """Its data are pictures [B, 3, 128, 128] in -1..1, kept as [B, 128, 128, 3] uint8, its latents are [B, C, h, w]."""

    subject = PICTURES

    def prepared(self, drawn: Tensor) -> Tensor:
        return to_float(drawn)

    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Absolute; pixels that are coloured, or should be, count several times."""
        return ((found - wanted).abs() * colour_weights(found, wanted)).mean()

    def latents(self, pipe: Any, drawn: Drawn, plan: Plan) -> Tensor:
        pictures = drawn.on("pictures", plan.device)
        checkpoint = plan.folder / f"{self.name}-vae.safetensors"
        train_autoencoder(self, pipe.vae, pictures, plan.autoencoder_budget(), checkpoint, plan.amounts.vae_batch)
        pipe.vae.eval()
        latents = self.set_statistics(pipe.vae, encode_all(self, pipe.vae, pictures))
        share = self._reconstruction_score(pipe.vae, 200, plan.device)
        typer.echo(f"{self.name}: {share:.1%} of 200 reconstructed scenes are read right")
        return clean_all(self, pipe.vae, latents)

    @torch.inference_mode()
    def _reconstruction_score(self, vae: Any, count: int, device: torch.device) -> float:
        """The share of scenes that are read right off their reconstructions."""
        generator = np.random.default_rng(7)
        wanted = [scenes.sample(generator) for _ in range(count)]
        pictures = torch.from_numpy(np.stack([scenes.draw(scene, generator) for scene in wanted])).to(device)
        found = to_bytes(self.decoded(vae, self.posterior(vae, to_float(pictures))[0]))
        return sum(scenes.score(picture, scene.caption).whole for picture, scene in zip(found, wanted, strict=True)) / count


def colour_weights(found: Tensor, wanted: Tensor) -> Tensor:
    """What an error counts in each pixel, [B, 1, ...], of pictures or clips [B, 3, ...] in -1..1.

    Their mean is 1, as beside them the divergence from the prior has a weight of its own.
    """
    coloured = torch.maximum(_saturation(found.detach()), _saturation(wanted)) > COLOURFUL / 127.5
    weights = 1 + _COLOURED * coloured
    return weights / weights.mean()


def _saturation(pictures: Tensor) -> Tensor:
    """Largest minus smallest channel, [B, 1, ...], of pictures or clips [B, 3, ...]."""
    return pictures.amax(dim=1, keepdim=True) - pictures.amin(dim=1, keepdim=True)
