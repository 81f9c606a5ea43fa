"""Tiny Z-Image: a single-stream transformer, Qwen3 and FLUX.1's autoencoder; with controls, and Omni's SigLIP.

The padding tokens, the ControlNet's projections and every other part that starts at zero get random weights here:
a part that adds nothing cannot show that it was quantized badly, or not loaded at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import AutoModel, Qwen3Config, Siglip2ImageProcessorPil, Siglip2VisionConfig

from llm_dit.tiny.common import PROMPT, SIZE, mask, picture, seeded
from llm_dit.tiny.spec import TinyPipeline
from llm_dit.tiny.tokenizers import qwen2_tokenizer

BLOCKS: Mapping[str, Any] = {"dim": 128, "n_heads": 4, "n_kv_heads": 4, "n_refiner_layers": 2}
"""What the ControlNet shares with the transformer; the MLP is int(128 / 3 * 8) = 341 wide."""

TRANSFORMER: Mapping[str, Any] = {**BLOCKS, "n_layers": 2, "cap_feat_dim": 128, "axes_dims": [8, 12, 12]}

AUTOENCODER: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
"""What the autoencoders of FLUX.1 and FLUX.2 share: four levels, as published, so that latents are 8 times smaller.

Most of the time of a test is theirs: a CPU without instructions for bfloat16 convolves in it 80 times as slowly as in float32."""


def qwen3_config() -> Qwen3Config:
    """Qwen3 with tied embeddings, as the 4B model has them; its MLP's width is no multiple of a group."""
    return Qwen3Config(
        vocab_size=400,
        hidden_size=128,
        intermediate_size=120,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def _pipeline(pipeline_class: Callable[..., Any], **others: Any) -> DiffusionPipeline:
    """A pipeline of the shared components and of `others`, which go before the shared ones."""
    shared = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": seeded(
            lambda: AutoencoderKL(
                **AUTOENCODER,
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            seed=1,
        ),
        "text_encoder": seeded(lambda: AutoModel.from_config(qwen3_config()), seed=2),
        "tokenizer": qwen2_tokenizer(),
        "transformer": seeded(lambda: ZImageTransformer2DModel(**TRANSFORMER), seed=3),
    }
    return pipeline_class(**{**shared, **others})


def _controlled(pipeline_class: Callable[..., Any], **config: Any) -> DiffusionPipeline:
    """A pipeline with a ControlNet that steers both layers of the transformer."""
    controlnet = seeded(lambda: ZImageControlNetModel(control_layers_places=[0, 1], **BLOCKS, **config), seed=4)
    return _pipeline(pipeline_class, controlnet=controlnet)


def _omni() -> DiffusionPipeline:
    """The pipeline whose transformer also reads what SigLIP sees in the reference pictures."""
    vision = Siglip2VisionConfig(
        hidden_size=128,
        intermediate_size=120,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=16,
        num_patches=16,
    )
    return _pipeline(
        ZImageOmniPipeline,
        transformer=seeded(lambda: ZImageTransformer2DModel(**TRANSFORMER, siglip_feat_dim=128), seed=3),
        siglip=seeded(lambda: AutoModel.from_config(vision), seed=5),
        siglip_processor=Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16),
    )


def _call(**others: Any) -> dict[str, Any]:
    """Two steps at the smallest size; `others` add to that or go before it."""
    return {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        # Guided, but faintly: the difference of the two predictions magnifies every rounding error.
        "guidance_scale": 0.5,
        "max_sequence_length": 64,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
        **others,
    }


def _generate() -> dict[str, Any]:
    return _call(height=SIZE, width=SIZE)


def _edit() -> dict[str, Any]:
    # Half the strength of four steps leaves two.
    return _call(image=picture(), strength=0.5, num_inference_steps=4)


def _inpaint() -> dict[str, Any]:
    return _call(image=picture(), mask_image=mask(), strength=1.0)


def _control() -> dict[str, Any]:
    return {**_generate(), "control_image": picture(shift=64)}


def _control_inpaint() -> dict[str, Any]:
    return {**_control(), "image": picture(), "mask_image": mask()}


def _compose() -> dict[str, Any]:
    return _call(image=[picture()])


PIPELINES: tuple[TinyPipeline, ...] = (
    TinyPipeline("z-image", "ZImagePipeline", partial(_pipeline, ZImagePipeline), _generate),
    TinyPipeline("z-image-img2img", "ZImageImg2ImgPipeline", partial(_pipeline, ZImageImg2ImgPipeline), _edit),
    TinyPipeline("z-image-inpaint", "ZImageInpaintPipeline", partial(_pipeline, ZImageInpaintPipeline), _inpaint),
    TinyPipeline(
        "z-image-controlnet",
        "ZImageControlNetPipeline",
        # The layout of the first ControlNet: the control passes a refiner of its own.
        partial(_controlled, ZImageControlNetPipeline, control_in_dim=16),
        _control,
    ),
    TinyPipeline(
        "z-image-controlnet-inpaint",
        "ZImageControlNetInpaintPipeline",
        # The second layout, the only one that takes a mask: 16 channels of control, 1 of mask, 16 of picture.
        partial(
            _controlled,
            ZImageControlNetInpaintPipeline,
            control_in_dim=33,
            control_refiner_layers_places=[0, 1],
            add_control_noise_refiner="control_noise_refiner",
        ),
        _control_inpaint,
    ),
    TinyPipeline("z-image-omni", "ZImageOmniPipeline", _omni, _compose),
)
