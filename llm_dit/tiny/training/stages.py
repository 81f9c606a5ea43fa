"""The stages: an autoencoder, and a transformer with its text encoder on the latents of autoencoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from .course import Coding, Course
from .loop import Budget, Run

KL_WEIGHT: Final = 0.012
"""Of the divergence from the prior, all latents together, beside the absolute error in -1..1 of all pixels together."""
UNGUIDED: Final = 0.1
"""Share of captions that are left out, so that guidance has something to guide away from."""

_STRIDES: Final = (1, 2, 4)
"""Places that share a value of `off_at_every_scale`: a small thing is three across, a large one six."""


def train_autoencoder(coding: Coding, vae: Any, drawn: Tensor, budget: Budget, checkpoint: Path, batch: int) -> None:
    """Error and KL divergence on data [N, ...] as `coding` keeps it."""
    run = Run([vae], budget, checkpoint)

    def loss() -> Tensor:
        wanted = coding.prepared(drawn[torch.randint(len(drawn), (batch,), device=run.device)])
        mean, logvar = coding.posterior(vae, wanted)
        mean, logvar = mean.float(), logvar.float()
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        if coding.off:
            latents = latents + off_at_every_scale(mean, coding.off)
        found = coding.decoded(vae, latents)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / wanted.numel()
        return coding.error(found.float(), wanted) + KL_WEIGHT * divergence

    run.train(loss, f"{coding.name}: autoencoder")


def off_at_every_scale(latents: Tensor, size: float) -> Tensor:
    """Noise for latents [B, c, *d], of `size` deviations of each channel: drawn for every place, every second and every fourth.

    A denoiser, and more so one of few bits, is off alike all over a thing, where the noise of the posterior averages out. Trained
    through the latter alone, Qwen-Image's latents of yellow and blue, and of cyan and green, lay 1.2 to 1.4 deviations apart, and
    those of all colours of Z-Image and klein at least 3.4: int4 left two of three right captions right, and yellow became blue.
    Noise of every fourth place alone does not do: what it spares, differences between neighbours, then carries everything,
    and is hard to denoise.
    """
    batch, channels, *places = latents.shape
    mode = {2: "bilinear", 3: "trilinear"}[len(places)]
    total = torch.zeros_like(latents)
    for stride in _STRIDES:
        drawn = torch.randn(batch, channels, *(-(-length // stride) for length in places), device=latents.device)
        spread = functional.interpolate(drawn, size=places, mode=mode)
        total = total + spread / spread.std()
    deviation = latents.detach().transpose(0, 1).flatten(1).std(dim=1).view(1, -1, *[1] * len(places))
    return size * deviation * total / len(_STRIDES) ** 0.5


@torch.inference_mode()
def encode_all(coding: Coding, vae: Any, drawn: Tensor, batch: int = 512) -> Tensor:
    """Mean latents [N, c, *d], float32, of data [N, ...] as `coding` keeps it."""
    parts = tqdm(drawn.split(batch), f"{coding.name}: encoding", unit="batch", delay=2)
    return torch.cat([coding.posterior(vae, coding.prepared(part))[0].float() for part in parts]).clone()


@torch.no_grad()
def clean_all(coding: Coding, vae: Any, latents: Tensor, batch: int = 4096) -> Tensor:
    """`clean` of latents [N, c, *d], in bfloat16."""
    return torch.cat([coding.clean(vae, part).bfloat16() for part in latents.split(batch)])


def train_denoiser(
    course: Course, pipe: Any, clean: Tensor, captions: list[str], budget: Budget, checkpoint: Path, batch: int
) -> None:
    """Flow matching on clean latents [N, ...], with all that turns captions into a velocity learning together."""
    run = Run([pipe.components[name] for name in course.learners], budget, checkpoint)
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
        sigma = course.sigmas.draw(batch, device)
        weight = sigma.view(-1, *[1] * (data.ndim - 1))
        noise = torch.randn_like(data)
        found = course.velocity(pipe, (1 - weight) * data + weight * noise, sigma, ids[caption], mask[caption])
        return course.velocity_error(found.float(), noise - data)

    run.train(loss, f"{course.name}: denoiser")
