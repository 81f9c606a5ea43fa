"""FLUX.2 klein: three hidden states of the text encoder side by side, padding included, before 64 tokens of 64 channels.

Latents have half of the published 32 channels. Of 32, 20 carried nothing but the noise that a velocity has in all of them. In a
stream of width 128 the error of the other 12 was then twice Z-Image's, and 85 % of the captions were followed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from .course import Amounts, deviations, fix_norms, initialized, tokenizer
from .pictures import PictureCourse
from .z_image import AUTOENCODER, qwen3_config

LAYERS = (1, 2, 3)
"""The hidden states that become the prompt."""


class KleinCourse(PictureCourse):
    """Width 96 and MLPs of 256, as Z-Image's, which leaves bytes for twelve blocks and lets int4 have groups of 32."""

    name = "flux2-klein"
    call = {
        "height": 128,
        "width": 128,
        "num_inference_steps": 40,
        "guidance_scale": 2.0,
        "max_sequence_length": 32,
        "text_encoder_out_layers": LAYERS,
    }
    amounts = Amounts(minutes=20)
    text_length = 32
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    def build(self) -> DiffusionPipeline:
        transformer = initialized(
            lambda: Flux2Transformer2DModel(
                in_channels=4 * AUTOENCODER["latent_channels"],
                num_layers=2,
                num_single_layers=10,
                mlp_ratio=256 / 96,
                num_attention_heads=3,
                attention_head_dim=32,
                axes_dims_rope=(8, 8, 8, 8),
                joint_attention_dim=64 * len(LAYERS),
                guidance_embeds=False,
            ),
            seed=3,
        )
        fix_norms(transformer)
        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift),
            vae=initialized(lambda: AutoencoderKLFlux2(**AUTOENCODER), seed=1),
            text_encoder=initialized(lambda: AutoModelForCausalLM.from_config(qwen3_config(4)), seed=2),
            tokenizer=tokenizer(),
            transformer=transformer,
        )

    def moments(self, vae: Any, pictures: Tensor) -> Tensor:
        return vae.quant_conv(vae.encoder(pictures))

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decoder(vae.post_quant_conv(latents))

    def set_statistics(self, vae: Any, latents: Tensor) -> Tensor:
        patches = Flux2KleinPipeline._patchify_latents(latents)
        vae.bn.running_mean.copy_(patches.mean(dim=(0, 2, 3)))
        vae.bn.running_var.copy_(deviations(patches).square())
        return latents

    def clean(self, vae: Any, latents: Tensor) -> Tensor:
        patches = Flux2KleinPipeline._patchify_latents(latents)
        mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        return Flux2KleinPipeline._pack_latents((patches - mean) / (variance + vae.config.batch_norm_eps).sqrt())

    def velocity(self, pipe: Any, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        states = pipe.text_encoder.model(
            input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        prompt = torch.cat([states[layer] for layer in LAYERS], dim=-1)
        picture_ids, prompt_ids = _ids(int(noisy.shape[1] ** 0.5), prompt.shape[1], noisy.device)
        return pipe.transformer(
            hidden_states=noisy,
            encoder_hidden_states=prompt.to(noisy.dtype),
            timestep=sigma,
            img_ids=picture_ids,
            txt_ids=prompt_ids,
            return_dict=False,
        )[0]


@cache
def _ids(side: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions [1, tokens, 4] of a square picture's tokens, and of a prompt's."""
    grid, prompt = torch.zeros(1, 1, side, side), torch.zeros(1, length, 1)
    ids = Flux2KleinPipeline._prepare_latent_ids(grid), Flux2KleinPipeline._prepare_text_ids(prompt)
    return ids[0].to(device), ids[1].to(device)
