"""Qwen-Image and Qwen-Image 2.1."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from ..mixin import QuantizablePipelineMixin
from ..published_encoders import qwen2_5_vl_7b, qwen3_vl_8b
from .base import Encoding, Family, Generation, Published

FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    extra_roles={"controlnet": "transformer"},
    encoding=Encoding(("prompt_embeds", "prompt_embeds_mask"), negative=None),
    generation=Generation(
        {"num_inference_steps": 50, "true_cfg_scale": 4.0, "negative_prompt": " ", "height": 1024, "width": 1024},
        guidance_argument="true_cfg_scale",
    ),
    published=(
        Published(
            "qwen-image",
            "Qwen/Qwen-Image",
            "QwenImagePipeline",
            {
                "text_encoder": qwen2_5_vl_7b,
                "transformer": QwenImageTransformer2DModel,
                "vae": AutoencoderKLQwenImage,
            },
            "defaults of the diffusers classes; Qwen2.5-VL-7B",
        ),
        Published(
            "qwen-image-2.1",
            "Qwen/Qwen-Image-2.1",
            "QwenImage21Pipeline",
            {
                "text_encoder": qwen3_vl_8b,
                "transformer": QwenImage21Transformer2DModel,
                "vae": AutoencoderKLQwenImage21,
            },
            "defaults of the diffusers classes; Qwen3-VL-8B",
        ),
    ),
)


class _QwenImage(QuantizablePipelineMixin):
    family = FAMILY


class QuantizableQwenImagePipeline(_QwenImage, QwenImagePipeline):
    """Text to image."""


class QuantizableQwenImageImg2ImgPipeline(_QwenImage, QwenImageImg2ImgPipeline):
    """Image and text to image."""


class QuantizableQwenImageInpaintPipeline(_QwenImage, QwenImageInpaintPipeline):
    """Fills a masked region."""


class QuantizableQwenImageEditPipeline(_QwenImage, QwenImageEditPipeline):
    """Edits an image as told."""


class QuantizableQwenImageEditInpaintPipeline(_QwenImage, QwenImageEditInpaintPipeline):
    """Edits a masked region as told."""


class QuantizableQwenImageEditPlusPipeline(_QwenImage, QwenImageEditPlusPipeline):
    """Edits with several reference images."""


class QuantizableQwenImageLayeredPipeline(_QwenImage, QwenImageLayeredPipeline):
    """Takes an image apart into layers."""


class QuantizableQwenImageControlNetPipeline(_QwenImage, QwenImageControlNetPipeline):
    """Text to image under a control image."""


class QuantizableQwenImageControlNetInpaintPipeline(_QwenImage, QwenImageControlNetInpaintPipeline):
    """Fills a masked region under a control image."""


class QuantizableQwenImage21Pipeline(_QwenImage, QwenImage21Pipeline):
    """Qwen-Image 2.1: text and reference images to image, with transparency."""
