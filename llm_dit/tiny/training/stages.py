"""The two stages: an autoencoder of scenes, and a transformer with its text encoder on that autoencoder's latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from .. import scenes
from .course import Course
from .data import to_float
from .loop import Budget, Run

KL_WEIGHT: Final = 0.012
"""Of the divergence from the prior, all latents together, beside the absolute error in -1..1 of all pixels together."""
SIGMA_LOGIT: Final = 1.0
"""Mean of the logits of sigma, of deviation 1 (arXiv:2403.03206, 3.1): at 0.6 to 0.95 it is decided what lies where."""
UNGUIDED: Final = 0.1
"""Share of captions that are left out, so that guidance has something to guide away from."""


def train_autoencoder(course: Course, vae: Any, pictures: Tensor, budget: Budget, checkpoint: Path, batch: int) -> None:
    """Mean absolute error and KL divergence on pictures [N, 128, 128, 3] uint8."""
    run = Run([vae], budget, checkpoint)

    def loss() -> Tensor:
        wanted = to_float(pictures[torch.randint(len(pictures), (batch,), device=run.device)])
        mean, logvar = course.posterior(vae, wanted)
        mean, logvar = mean.float(), logvar.float()
        found = course.decoded(vae, mean + torch.randn_like(mean) * (0.5 * logvar).exp())
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / wanted.numel()
        return functional.l1_loss(found.float(), wanted) + KL_WEIGHT * divergence

    run.train(loss, f"{course.name}: autoencoder")


@torch.inference_mode()
def encode_all(course: Course, vae: Any, pictures: Tensor, batch: int = 512) -> Tensor:
    """Mean latents [N, C, h, w], float32, of pictures [N, 128, 128, 3] uint8."""
    parts = tqdm(pictures.split(batch), f"{course.name}: encoding", unit="batch", delay=2)
    return torch.cat([course.posterior(vae, to_float(part))[0].float() for part in parts]).clone()


@torch.inference_mode()
def reconstruction_score(course: Course, vae: Any, count: int, device: torch.device) -> float:
    """The share of scenes that are read right off their reconstructions."""
    generator = np.random.default_rng(7)
    wanted = [scenes.sample(generator) for _ in range(count)]
    pictures = torch.from_numpy(np.stack([scenes.draw(scene, generator) for scene in wanted])).to(device)
    found = course.decoded(vae, course.posterior(vae, to_float(pictures))[0])
    values = ((found.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return sum(scenes.score(picture, scene.caption).whole for picture, scene in zip(values, wanted, strict=True)) / count


def train_denoiser(
    course: Course, pipe: Any, clean: Tensor, captions: list[str], budget: Budget, checkpoint: Path, batch: int
) -> None:
    """Flow matching on clean latents [N, ...], with text encoder and transformer learning together."""
    run = Run([pipe.text_encoder, pipe.transformer], budget, checkpoint)
    device = run.device
    known = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    tokens = course.tokens(pipe.tokenizer, list(known))
    empty = course.tokens(pipe.tokenizer, [""])
    ids, mask = torch.cat((tokens.ids, empty.ids)).to(device), torch.cat((tokens.mask, empty.mask)).to(device)
    which = torch.tensor([known[caption] for caption in captions], device=device)

    def loss() -> Tensor:
        rows = torch.randint(len(clean), (batch,), device=device)
        data = clean[rows].float()
        caption = torch.where(torch.rand(batch, device=device) < UNGUIDED, len(known), which[rows])
        sigma = torch.sigmoid(SIGMA_LOGIT + torch.randn(batch, device=device))
        weight = sigma.view(-1, *[1] * (data.ndim - 1))
        noise = torch.randn_like(data)
        found = course.velocity(pipe, (1 - weight) * data + weight * noise, sigma, ids[caption], mask[caption])
        return functional.mse_loss(found.float(), noise - data)

    run.train(loss, f"{course.name}: denoiser")
