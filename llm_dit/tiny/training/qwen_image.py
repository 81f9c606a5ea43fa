"""Qwen-Image: the caption without its template's first 34 tokens, masked, before 64 tokens of 32 channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import MethodType
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ..qwen_image import VISION, VISION_TOKENS
from .course import Amounts, Plan, deviations, initialized, tokenizer
from .data import Drawn
from .pictures import PictureCourse

DROPPED = 34
"""Tokens of the template before the caption, which the pipeline leaves out (`prompt_template_encode_start_idx`)."""


_CHANNELS: Final = 8
"""Of the latents; a token has four. Of 16 all were used, and 64 numbers a token left 32 of a transformer 96 wide."""


class QwenImageCourse(PictureCourse):
    """Width 64. Where two things lie, all tokens have to agree on, a round a block: of five blocks 96 wide 3 % of pictures show
    a thing twice or two grown into one, of captions that were trained on as well. Heads of 16 do well, but not in int4."""

    name = "qwen-image"
    call = {"height": 128, "width": 128, "num_inference_steps": 28, "true_cfg_scale": 3.0, "negative_prompt": ""}
    shift = 4.0  # of 600 captions a trained model follows 97.7 %; with 2, as the others, 97.0 %
    off = 0.5
    amounts = Amounts(vae_minutes=5, minutes=32.5, scenes=262144)
    text_length = DROPPED + 18
    template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )

    def build(self) -> DiffusionPipeline:
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift),
            vae=initialized(
                lambda: AutoencoderKLQwenImage(base_dim=8, z_dim=_CHANNELS, dim_mult=[1, 2, 3, 3], num_res_blocks=1), seed=1
            ),
            text_encoder=initialized(lambda: Qwen2_5_VLForConditionalGeneration(_qwen25_vl()), seed=2),
            tokenizer=tokenizer(),
            transformer=initialized(
                lambda: QwenImageTransformer2DModel(
                    in_channels=4 * _CHANNELS,
                    out_channels=_CHANNELS,
                    num_layers=11,
                    num_attention_heads=2,
                    attention_head_dim=32,
                    joint_attention_dim=64,
                    axes_dims_rope=(8, 12, 12),
                ),
                seed=3,
            ),
        )

    def latents(self, pipe: Any, drawn: Drawn, plan: Plan) -> Tensor:
        with convolving_pictures(pipe.vae):
            return super().latents(pipe, drawn, plan)

    def moments(self, vae: Any, pictures: Tensor) -> Tensor:
        return vae.quant_conv(vae.encoder(pictures.unsqueeze(2)))[:, :, 0]

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        """Not clamped to -1..1, as `decode` does: what is outside would have no gradient."""
        return vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))[:, :, 0]

    def set_statistics(self, vae: Any, latents: Tensor) -> Tensor:
        vae.register_to_config(latents_mean=latents.mean(dim=(0, 2, 3)).tolist(), latents_std=deviations(latents).tolist())
        return latents

    def clean(self, vae: Any, latents: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(values).to(latents) for values in (vae.config.latents_mean, vae.config.latents_std))
        normalized = (latents - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
        return QwenImagePipeline._pack_latents(normalized, *latents.shape)

    def velocity(self, pipe: Any, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The transformer's forward, and the whole text encoder's, copy lengths and positions to the GPU at every call.

        That waits for it, and no CUDA graph can hold it; here they are made once.
        """
        model = pipe.transformer
        encoder = pipe.text_encoder.model.language_model
        states = encoder(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state[:, DROPPED:]
        prompt, picture = model.txt_in(model.txt_norm(states.to(noisy.dtype))), model.img_in(noisy)
        shared = model.time_text_embed(sigma.to(picture.dtype), picture)
        key = int(noisy.shape[1] ** 0.5), prompt.shape[1], noisy.device
        if key not in self._ropes:
            side, length, device = key
            self._ropes[key] = model.pos_embed([(1, side, side)], device=device, max_txt_seq_len=length)
        for block in model.transformer_blocks:
            prompt, picture = block(
                hidden_states=picture,
                encoder_hidden_states=prompt,
                encoder_hidden_states_mask=mask[:, DROPPED:].bool(),
                temb=shared,
                image_rotary_emb=self._ropes[key],
            )
        return model.proj_out(model.norm_out(picture, shared))

    @cached_property
    def _ropes(self) -> dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]]:
        return {}


@contextmanager
def convolving_pictures(vae: nn.Module) -> Iterator[None]:
    """Has the convolutions of a video autoencoder that sees one frame at a time compute in two dimensions.

    Before a first frame they put zeros, so that of three taps in time the last alone meets anything; a convolution in three
    dimensions multiplies the zeros too.
    """
    convolutions = [module for module in vae.modules() if isinstance(module, QwenImageCausalConv3d)]
    for module in convolutions:
        module.forward = MethodType(_convolve_picture, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


def _convolve_picture(convolution: Any, frame: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """[B, C, 1, H, W] of a first frame, for which nothing is cached."""
    columns, _, rows, *_ = convolution._padding
    found = functional.conv2d(
        frame[:, :, 0], convolution.weight[:, :, -1], convolution.bias, convolution.stride[1:], (rows, columns)
    )
    return found.unsqueeze(2)


def _qwen25_vl() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL of width 64, with the vision tower that no caption uses."""
    text = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
    }
    vision = {**VISION, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **VISION_TOKENS)
