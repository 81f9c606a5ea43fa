"""Z-Image: a caption of up to 32 tokens, its padding a learned token, before 64 patches of 16 latent channels."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import AutoModel, Qwen3Config

from .course import deviations, fix_norms, initialized, tokenizer
from .pictures import PictureCourse

AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
}


def qwen3_config(layers: int) -> Qwen3Config:
    """Qwen3 of width 64."""
    return Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


class ZImageCourse(PictureCourse):
    """Width 96, for the MLP is 8/3 as wide: 256, which groups of 128 fit."""

    name = "z-image"
    call = {"height": 128, "width": 128, "num_inference_steps": 20, "guidance_scale": 3.0, "max_sequence_length": 32}
    text_length = 32
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

    def build(self) -> DiffusionPipeline:
        transformer = initialized(
            lambda: ZImageTransformer2DModel(
                dim=96, n_heads=3, n_kv_heads=3, n_layers=9, n_refiner_layers=1, cap_feat_dim=64, axes_dims=[8, 12, 12]
            ),
            seed=3,
        )
        fix_norms(transformer)
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift),
            vae=initialized(lambda: AutoencoderKL(**AUTOENCODER, use_quant_conv=False, use_post_quant_conv=False), seed=1),
            text_encoder=initialized(lambda: AutoModel.from_config(qwen3_config(3)), seed=2),
            tokenizer=tokenizer(),
            transformer=transformer,
        )

    def moments(self, vae: Any, pictures: Tensor) -> Tensor:
        return vae.encoder(pictures)

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decoder(latents)

    def set_statistics(self, vae: Any, latents: Tensor) -> Tensor:
        """Scales the channels in the weights on both sides of the latents: the configuration has one factor for all."""
        scale = deviations(latents)
        with torch.no_grad():
            last, first = vae.encoder.conv_out, vae.decoder.conv_in
            for tensor in (last.weight, last.bias):
                tensor[: len(scale)] /= scale.view(-1, *[1] * (tensor.ndim - 1))
            last.bias[len(scale) :] -= 2 * scale.log()
            first.weight *= scale.view(1, -1, 1, 1)
        vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        return latents / scale.view(1, -1, 1, 1)

    def clean(self, vae: Any, latents: Tensor) -> Tensor:
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def velocity(self, pipe: Any, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The transformer's forward takes lists and pads each caption by itself; all of a length, they are a batch."""
        model = pipe.transformer
        states = pipe.text_encoder(
            input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states[-2]
        batch, channels, height, width = noisy.shape
        patches = noisy.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shared = model.t_embedder((1 - sigma) * model.t_scale).to(noisy.dtype)
        picture_rope, caption_rope = self._rope(model, noisy.device)
        picture = model.all_x_embedder["2-1"](patches)
        for layer in model.noise_refiner:
            picture = layer(picture, None, picture_rope.expand(batch, -1, -1), shared)
        caption = torch.where(mask.bool().unsqueeze(-1), model.cap_embedder(states), model.cap_pad_token)
        for layer in model.context_refiner:
            caption = layer(caption, None, caption_rope.expand(batch, -1, -1))
        both, rope = torch.cat((picture, caption), dim=1), torch.cat((picture_rope, caption_rope), dim=1)
        for layer in model.layers:
            both = layer(both, None, rope.expand(batch, -1, -1), shared)
        out = model.all_final_layer["2-1"](both, c=shared)[:, : patches.shape[1]]
        grid = out.view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
        return -grid.reshape(noisy.shape)

    def _rope(self, model: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary embeddings [1, tokens, head_dim / 2] of patches and caption, at the places where the transformer puts them."""
        if device not in self._ropes:
            picture = torch.zeros(model.in_channels, 1, 16, 16, device=device)
            caption = torch.zeros(self.text_length, model.config.cap_feat_dim, device=device)
            _, _, _, picture_ids, caption_ids, _, _ = model.patchify_and_embed([picture], [caption], 2, 1)
            with torch.no_grad():
                self._ropes[device] = tuple(model.rope_embedder(ids[0])[None] for ids in (picture_ids, caption_ids))
        return self._ropes[device]

    @cached_property
    def _ropes(self) -> dict[torch.device, Any]:
        return {}
