"""Qwen-Image and Qwen-Image 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
from torch.nn.functional import pad

from ..forwards import Forwards, Keywords, Size, noise, prompt_tokens
from ..mixin import QuantizablePipelineMixin
from ..published_encoders import qwen2_5_vl_7b, qwen3_vl_8b
from ..splitting import Arguments, Share, Splitting, diffusers_plan
from .base import Encoding, Family, Generation, Published


def _split_plan(transformer: Any) -> Mapping[str, Any]:
    """diffusers' plan, but for the mask of the text."""
    plan = dict(diffusers_plan(transformer))
    blocks = {name: split for name, split in plan["transformer_blocks.*"].items() if name != "encoder_hidden_states_mask"}
    return {**plan, "transformer_blocks.*": blocks}


def _whole_mask(keywords: Arguments, share: Share) -> Arguments:
    """The mask of the whole sequence as it lies after the exchange of heads: of each process in turn, its text and its image.

    A mask that is split has to be gathered in every block. Its end, the last process's image, is added by the attention itself.
    """
    mask = keywords.get("encoder_hidden_states_mask")
    if mask is None:
        return {}
    image = keywords["image_rotary_emb"][0].shape[0]
    ones = torch.ones((mask.shape[0], image), dtype=torch.bool, device=mask.device)
    parts = [part for text in mask.chunk(share.count, dim=1) for part in (text, ones)]
    return {"encoder_hidden_states_mask": torch.cat(parts[:-1], dim=1)}


def _split_arguments(keywords: Arguments, share: Share) -> Arguments:
    """A text of any length is padded to one that can be split, and the padding masked."""
    share.refuse(keywords, "controlnet_block_samples")
    share.check(keywords["hidden_states"].shape[1], "image", f"give height and width that are multiples of {16 * share.count}")
    text, mask = keywords["encoder_hidden_states"], keywords.get("encoder_hidden_states_mask")
    padding = -text.shape[1] % share.count
    share.refuse_masks(mask is not None or padding > 0)
    if not padding:
        return {}
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    return {
        "encoder_hidden_states": pad(text, (0, 0, 0, padding)),
        "encoder_hidden_states_mask": pad(mask.bool(), (0, padding)),
    }


_TEXT_TOKENS = 1024
"""`max_sequence_length` of the pipelines; a shorter prompt is not padded."""
_TEMPLATE_TOKENS = 34
"""`prompt_template_encode_start_idx`: the instruction before the prompt, cut off after encoding."""


def _step(model: Any, device: torch.device, size: Size) -> Keywords:
    """`QwenImagePipeline.__call__`, and `QwenImageEditPlusPipeline.__call__` with references.

    The mask of a prompt without padding is None there.
    """
    if not isinstance(model, QwenImageTransformer2DModel):
        raise ValueError(f"the steps of {type(model).__name__} are not planned yet: use `llm-dit estimate` and `recommend`")
    shapes = [(1, size.height // 16, size.width // 16)]
    side = int(size.reference_pixels**0.5) // 16
    shapes += [(1, side, side)] * size.references
    tokens = sum(frames * height * width for frames, height, width in shapes)
    return {
        "hidden_states": noise(device, size.batch, tokens, model.config.in_channels),
        "timestep": torch.full((size.batch,), 0.7, dtype=torch.bfloat16, device=device),
        "guidance": None,
        "encoder_hidden_states_mask": None,
        "encoder_hidden_states": noise(device, size.batch, size.text or _TEXT_TOKENS, model.config.joint_attention_dim, seed=2),
        "img_shapes": [shapes] * size.batch,
        "attention_kwargs": {},
        "return_dict": False,
    }


def _encode(model: Any, device: torch.device, size: Size) -> Any:
    """`_get_qwen_prompt_embeds`: the last of all hidden states."""
    tokens = prompt_tokens(device, size.batch, (size.text or _TEXT_TOKENS) + _TEMPLATE_TOKENS)
    return model(**tokens, output_hidden_states=True).hidden_states[-1][:, _TEMPLATE_TOKENS:]


def _latents(vae: Any, device: torch.device, size: Size) -> Keywords:
    """The VAE is one of videos; an image is its first frame."""
    side = vae.spatial_compression_ratio
    return {"z": noise(device, size.batch, vae.config.z_dim, 1, size.height // side, size.width // side), "return_dict": False}


FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    extra_roles={"controlnet": "transformer"},
    encoding=Encoding(("prompt_embeds", "prompt_embeds_mask"), negative=None),
    splitting={"QwenImageTransformer2DModel": Splitting(_split_plan, _split_arguments, _whole_mask)},
    forwards=Forwards(_step, _latents, {"text_encoder": _encode}, most_references=3),
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
