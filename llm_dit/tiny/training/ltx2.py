"""LTX-2: 192 tokens of a clip and 18 of its sound, denoised together, each with its own reading of the caption."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from torch import Tensor
from torch.nn import functional

from .. import scenes
from ..scenes.clips import FRAME_RATE, FRAMES
from ..scenes.drawing import SIDE
from . import ltx2_models as models
from .course import Amounts, Coding, Course, Plan, Sigmas, deviations
from .data import CLIPS, Drawn, to_bytes, to_float
from .loop import Budget
from .ltx2_sound import SOUND_TOKENS, SoundCoding, spectrograms, train_vocoder
from .pictures import colour_weights
from .stages import clean_all, encode_all, train_autoencoder

_GRID: Final = (3, 8, 8)
"""Latents of a clip: frames, rows, columns."""
_CLIP: Final = 3 * 8 * 8 * models.CHANNELS
_CLIP_RATE: Final = 6e-4
"""A convolution sums over three frames what it sums over one in pictures, and takes smaller steps."""
_NOISE: Final = 1e-3
"""Deviation of the noise that the channels of a trained autoencoder share. A channel of 0.02 still tells shapes: with those below
0.05 left as small as they are, of the captions of a trained model motion and colour were right in all, and the shape in 45 %."""
_READ_THROUGH: Final = 0.2
"""Noise, in deviations of each channel, through which reconstructions are read: denoised latents are not exact either."""
_SOUND_SHARE: Final = 0.05
"""Of the autoencoder's minutes, for the autoencoder of the sound, and for the vocoder: after 15 seconds of each on an H200 100 of
100 pitches are read right."""
_TESTED: Final = 100


class ClipCoding(Coding):
    """Clips [B, 3, 17, 128, 128] in -1..1, kept as [B, 17, 128, 128, 3] uint8; latents [B, 32, 3, 8, 8]."""

    name = "ltx-2 clips"
    off = 0.6

    def prepared(self, drawn: Tensor) -> Tensor:
        return to_float(drawn)

    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """As of pictures, with squares: a thing fills so little of a clip that the median of all colours, a grey, holds on."""
        error = found - wanted
        return ((error.abs() + 4 * error.square()) * colour_weights(found, wanted)).mean()

    def moments(self, vae: Any, data: Tensor) -> Tensor:
        return vae.encoder(data)

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decoder(latents)

    def set_statistics(self, vae: Any, latents: Tensor) -> Tensor:
        vae.latents_mean.copy_(latents.mean(dim=(0, 2, 3, 4)))
        vae.latents_std.copy_(deviations(latents, dead=_NOISE))
        return latents

    def clean(self, vae: Any, latents: Tensor) -> Tensor:
        normalized = LTX2Pipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        return LTX2Pipeline._pack_latents(normalized)


class Ltx2Course(Course):
    """A clip's tokens [B, 192, 32] and its sound's [B, 18, 16] are one vector [B, 6432] for the training; one sigma is theirs."""

    name = "ltx-2"
    subject = CLIPS
    call = {
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "frame_rate": float(FRAME_RATE),
        "num_inference_steps": 20,
        "guidance_scale": 2.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_guidance_scale": 2.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "audio_guidance_rescale": 0.0,
        "max_sequence_length": models.TEXT_LENGTH,
    }
    text_length = models.TEXT_LENGTH
    template = "{}"
    amounts = Amounts(vae_minutes=7.5, minutes=15.5, vae_batch=16, batch=256)
    shift = 6.0  # of twenty steps eight start above 0.9; with 2, as the others, four do
    sigmas = Sigmas(2.0, 1.3)  # about ln 6: as many of the schedule's steps lie above as below; a clip is decided at 0.99 to 0.9
    learners = ("text_encoder", "connectors", "transformer")
    seen, heard = ClipCoding(), SoundCoding()

    def build(self) -> DiffusionPipeline:
        return LTX2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift),
            vae=models.video_vae(),
            audio_vae=models.audio_vae(),
            text_encoder=models.text_encoder(),
            tokenizer=models.gemma_tokenizer(),
            connectors=models.connectors(),
            transformer=models.transformer(),
            vocoder=models.vocoder(),
        )

    def latents(self, pipe: Any, drawn: Drawn, plan: Plan) -> Tensor:
        clips, sounds = drawn.on("clips", plan.device), drawn.on("sounds", plan.device)
        short = plan.autoencoder_budget(share=_SOUND_SHARE)
        seen = self._coded(self.seen, pipe.vae, clips, "vae", plan, plan.autoencoder_budget(_CLIP_RATE))
        heard = self._coded(self.heard, pipe.audio_vae, spectrograms(sounds), "audio-vae", plan, short)
        with torch.no_grad():
            mels = torch.cat([self.heard.decoded(pipe.audio_vae, part) for part in heard.split(512)])
        checkpoint = plan.folder / f"{self.name}-vocoder.safetensors"
        train_vocoder(pipe.vocoder, mels, sounds, short, checkpoint, plan.amounts.vae_batch)
        pipe.vocoder.eval()
        kept = ", ".join(f"{part} {share:.0%}" for part, share in self.reconstructed(pipe, plan.device).items())
        typer.echo(f"{self.name}: of {_TESTED} reconstructed clips is read right: {kept}")
        parts = clean_all(self.seen, pipe.vae, seen), clean_all(self.heard, pipe.audio_vae, heard)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _coded(self, coding: Coding, vae: Any, drawn: Tensor, file: str, plan: Plan, budget: Budget) -> Tensor:
        """Trains an autoencoder; the latents of `drawn`."""
        train_autoencoder(coding, vae, drawn, budget, plan.folder / f"{self.name}-{file}.safetensors", plan.amounts.vae_batch)
        vae.eval()
        return coding.set_statistics(vae, encode_all(coding, vae, drawn, batch=64))

    @torch.inference_mode()
    def reconstructed(self, pipe: Any, device: torch.device) -> dict[str, float]:
        """By part as in `scenes.score_clip`, and "all": the share of clips in whose reconstructions it is read right."""
        generator = np.random.default_rng(7)
        scores = []
        for _ in range(_TESTED):
            clip = scenes.sample_clip(generator)
            frames = torch.from_numpy(scenes.draw_clip(clip, generator)[None]).to(device)
            sound = torch.from_numpy(scenes.draw_tone(clip, generator)[None]).to(device)
            latents = self.seen.posterior(pipe.vae, to_float(frames))[0]
            noise = _READ_THROUGH * pipe.vae.latents_std.view(1, -1, 1, 1, 1) * torch.randn_like(latents)
            found = self.seen.decoded(pipe.vae, latents + noise)
            mel = self.heard.prepared(spectrograms(sound))
            wave = pipe.vocoder(self.heard.decoded(pipe.audio_vae, self.heard.posterior(pipe.audio_vae, mel)[0]))[0].cpu().numpy()
            scores.append(scenes.score_clip(to_bytes(found)[0], clip.caption, wave, pipe.vocoder.config.output_sampling_rate))
        parts = {part: sum(score.parts[part] for score in scores) / len(scores) for part in scores[0].parts}
        return {**parts, "all": sum(score.whole for score in scores) / len(scores)}

    def velocity_error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Both modalities weigh the same, however many tokens they have."""
        seen = functional.mse_loss(found[:, :_CLIP], wanted[:, :_CLIP])
        return seen + functional.mse_loss(found[:, _CLIP:], wanted[:, _CLIP:])

    def velocity(self, pipe: Any, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        batch, timestep = len(noisy), 1000 * sigma
        video, audio = self._connected(pipe, tokens, mask)
        video_places, audio_places = self._places(pipe.transformer, noisy.device)
        found = pipe.transformer(
            hidden_states=noisy[:, :_CLIP].unflatten(1, (-1, models.CHANNELS)),
            audio_hidden_states=noisy[:, _CLIP:].unflatten(1, (-1, models.SOUND_WIDTH)),
            encoder_hidden_states=video,
            audio_encoder_hidden_states=audio,
            # No masks: registers have taken the place of all padding, so that theirs would be all ones.
            timestep=timestep,
            sigma=timestep,
            video_coords=video_places.expand(batch, -1, -1, -1),
            audio_coords=audio_places.expand(batch, -1, -1, -1),
            use_cross_timestep=True,
            return_dict=False,
        )
        return torch.cat([part.flatten(1) for part in found], dim=1)

    def _connected(self, pipe: Any, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the connectors make of all hidden states of Gemma, [B, 16, 64] for each modality.

        Gemma's own forward makes masks in a way that waits for the GPU; here a caption is shorter than any window, and its
        layers share one. Padding sees itself, for what sees nothing would not be a number; no caption sees padding.
        """
        length = tokens.shape[1]
        places = torch.arange(length, device=tokens.device)
        causal, itself = places[:, None] >= places, places[:, None] == places
        seen = (causal & mask.bool()[:, None, None]) | itself
        states = pipe.text_encoder.model.language_model(
            input_ids=tokens,
            attention_mask={"full_attention": seen, "sliding_attention": seen},
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        video, audio, _ = pipe.connectors(torch.stack(states, dim=-1).flatten(2), mask, padding_side="left")
        return video, audio

    def _places(self, transformer: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where tokens are: [1, 3, 192, 2] and [1, 1, 18, 2]; making them copies to the GPU, so they are made once."""
        if device not in self._known_places:
            video = transformer.rope.prepare_video_coords(1, *_GRID, device, fps=float(FRAME_RATE))
            self._known_places[device] = video, transformer.audio_rope.prepare_audio_coords(1, SOUND_TOKENS, device)
        return self._known_places[device]

    @cached_property
    def _known_places(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}
