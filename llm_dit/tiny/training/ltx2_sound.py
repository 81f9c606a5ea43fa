"""The sound of LTX-2: tones as spectrograms, their autoencoder, and the vocoder that makes them tones again."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import LTX2Pipeline
from torch import Tensor
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from ..scenes.clips import FRAME_RATE, FRAMES, SOUND_RATE
from .course import DEAD, Coding
from .loop import Budget, Run
from .ltx2_models import HOP, MEL_BINS

SOUND_TOKENS: Final = round(FRAMES / FRAME_RATE * SOUND_RATE / HOP / 4)
"""As the pipeline counts them; its autoencoder makes four frames of each, but of the first one."""
SOUND_FRAMES: Final = 4 * SOUND_TOKENS - 3
_WINDOW: Final = 1024


def spectrogram(sounds: Tensor) -> Tensor:
    """Logarithmic mel spectrogram [B, 2, 69, 32] float32 of sounds [B, samples] int16, the same in both channels."""
    waves, window = sounds.float() / 32768, torch.hann_window(_WINDOW, device=sounds.device)
    spectrum = torch.stft(waves, _WINDOW, HOP, window=window, return_complex=True).abs()
    mel = (_filters(sounds.device) @ spectrum)[..., :SOUND_FRAMES]
    return mel.clamp(min=1e-5).log().transpose(1, 2).unsqueeze(1).expand(-1, 2, -1, -1)


@cache
def _filters(device: torch.device) -> Tensor:
    """[32, 513], each the weights of the frequencies that a bin hears."""
    filters = mel_filter_bank(_WINDOW // 2 + 1, MEL_BINS, 0.0, SOUND_RATE / 2, SOUND_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.T.copy()).float().to(device)


class SoundCoding(Coding):
    """Spectrograms [B, 2, 69, 32], of sounds kept as [B, samples] int16; latents [B, 2, 18, 8]."""

    name = "ltx-2 sound"

    def prepared(self, drawn: Tensor) -> Tensor:
        return spectrogram(drawn)

    def moments(self, vae: Any, data: Tensor) -> Tensor:
        return vae.encoder(data)

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decoder(latents)

    def set_statistics(self, vae: Any, latents: Tensor) -> Tensor:
        packed = LTX2Pipeline._pack_audio_latents(latents)
        deviation = packed.std(dim=(0, 1))
        vae.latents_mean.copy_(packed.mean(dim=(0, 1)))
        vae.latents_std.copy_(torch.where(deviation > DEAD, deviation, torch.ones_like(deviation)))
        return latents

    def clean(self, vae: Any, latents: Tensor) -> Tensor:
        packed = LTX2Pipeline._pack_audio_latents(latents)
        return LTX2Pipeline._normalize_audio_latents(packed, vae.latents_mean, vae.latents_std)


def train_vocoder(
    coding: SoundCoding, vocoder: Any, vae: Any, sounds: Tensor, budget: Budget, checkpoint: Path, batch: int
) -> None:
    """Mean absolute error of waveforms, made of the spectrograms of sounds [N, samples] int16 as their autoencoder decodes them.

    No adversary is needed: the pitches have whole periods in a frame, and so one phase in all frames.
    """
    run = Run([vocoder], budget, checkpoint)

    def loss() -> Tensor:
        drawn = sounds[torch.randint(len(sounds), (batch,), device=run.device)]
        with torch.no_grad():
            heard = coding.decoded(vae, coding.posterior(vae, coding.prepared(drawn))[0])
        wanted = drawn[:, None, : SOUND_FRAMES * HOP].float() / 32768
        return functional.l1_loss(vocoder(heard).float(), wanted.expand(-1, 2, -1))

    run.train(loss, f"{coding.name}: vocoder")
