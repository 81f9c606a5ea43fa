"""The sound of LTX-2: tones as spectrograms, their autoencoder, and the vocoder that makes them tones again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from diffusers import LTX2Pipeline
from torch import Tensor
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from ..scenes.clips import FRAME_RATE, FRAMES, SOUND_RATE
from .course import Coding, deviations
from .loop import Budget, Run
from .ltx2_models import HOP, MEL_BINS

SOUND_TOKENS: Final = round(FRAMES / FRAME_RATE * SOUND_RATE / HOP / 4)
"""As the pipeline counts them; its autoencoder makes four frames of each, but of the first one."""
SOUND_FRAMES: Final = 4 * SOUND_TOKENS - 3
_WINDOW: Final = 1024


@torch.no_grad()
def spectrograms(sounds: Tensor) -> Tensor:
    """Logarithmic mel spectrograms [N, 69, 32] float32 of sounds [N, samples] int16."""
    window, parts = torch.hann_window(_WINDOW, device=sounds.device), []
    for part in sounds.split(512):
        spectrum = torch.stft(part.float() / 32768, _WINDOW, HOP, window=window, return_complex=True).abs()
        parts.append((_filters(sounds.device) @ spectrum)[..., :SOUND_FRAMES].clamp(min=1e-5).log().transpose(1, 2))
    return torch.cat(parts)


def _filters(device: torch.device) -> Tensor:
    """[32, 513], each the weights of the frequencies that a bin hears."""
    filters = mel_filter_bank(_WINDOW // 2 + 1, MEL_BINS, 0.0, SOUND_RATE / 2, SOUND_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.T.copy()).float().to(device)


class SoundCoding(Coding):
    """Spectrograms [B, 2, 69, 32] of both channels, kept as one [B, 69, 32] for the two; latents [B, 2, 18, 8]."""

    name = "ltx-2 sound"

    def prepared(self, drawn: Tensor) -> Tensor:
        return drawn.unsqueeze(1).expand(-1, 2, -1, -1)

    def moments(self, vae: Any, data: Tensor) -> Tensor:
        return vae.encoder(data)

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decoder(latents)

    def set_statistics(self, vae: Any, latents: Tensor) -> Tensor:
        packed = LTX2Pipeline._pack_audio_latents(latents)
        vae.latents_mean.copy_(packed.mean(dim=(0, 1)))
        vae.latents_std.copy_(deviations(packed.transpose(1, 2)))
        return latents

    def clean(self, vae: Any, latents: Tensor) -> Tensor:
        packed = LTX2Pipeline._pack_audio_latents(latents)
        return LTX2Pipeline._normalize_audio_latents(packed, vae.latents_mean, vae.latents_std)


def train_vocoder(vocoder: Any, mels: Tensor, sounds: Tensor, budget: Budget, checkpoint: Path, batch: int) -> None:
    """Mean absolute error of waveforms: spectrograms [N, 2, 69, 32] as their autoencoder decodes them, sounds [N, samples] int16.

    No adversary is needed: the pitches have whole periods in a frame, and so one phase in all frames.
    """
    run = Run([vocoder], budget, checkpoint)

    def loss() -> Tensor:
        rows = torch.randint(len(sounds), (batch,), device=run.device)
        wanted = sounds[rows, None, : SOUND_FRAMES * HOP].float() / 32768
        return functional.l1_loss(vocoder(mels[rows]).float(), wanted.expand(-1, 2, -1))

    run.train(loss, "ltx-2: vocoder")
