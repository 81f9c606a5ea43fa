"""Tiny Qwen-Image: a double-stream transformer, Qwen2.5-VL and a causal video autoencoder; and Qwen-Image 2.1, which
shares no component with it but the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
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
from transformers import (
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from llm_dit.tiny.common import PROMPT, SIZE, mask, picture, seeded_layers
from llm_dit.tiny.spec import TinyPipeline
from llm_dit.tiny.tokenizers import QWEN_SPECIAL_TOKENS, qwen2_tokenizer

BLOCKS: Mapping[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 256,
    "axes_dims_rope": (8, 12, 12),
}
"""What the ControlNet shares with the transformer."""

TEXT: Mapping[str, Any] = {
    "vocab_size": 400,
    "intermediate_size": 120,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
"""What the text models of both generations share; the MLP's width is no multiple of a group."""

VISION: Mapping[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 36, "num_heads": 2}

VISION_TOKENS: Mapping[str, int] = {
    "vision_start_token_id": QWEN_SPECIAL_TOKENS.index("<|vision_start|>"),
    "vision_end_token_id": QWEN_SPECIAL_TOKENS.index("<|vision_end|>"),
    "image_token_id": QWEN_SPECIAL_TOKENS.index("<|image_pad|>"),
    "video_token_id": QWEN_SPECIAL_TOKENS.index("<|video_pad|>"),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
)
"""The VL models' template, for messages whose content is a list of texts and images."""


def _open_gates(model: Any) -> Any:
    """`model`, with each branch of its double-stream blocks let through rather than faded out."""
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            # Shift, scale and gate of the attention, then of the MLP.
            modulation.bias.data.view(2, 3, -1)[:, 2] += 1
    return model


def qwen25_vl() -> Qwen2_5_VLForConditionalGeneration:
    """The text encoder of Qwen-Image, with the vision tower through which the edit pipelines look at the picture."""
    text = {"hidden_size": 256, "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}}
    vision = {"out_hidden_size": 256, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config={**TEXT, **text}, vision_config={**VISION, **vision}, **VISION_TOKENS)
    return seeded_layers(lambda: Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> Qwen3VLForConditionalGeneration:
    """The text encoder of Qwen-Image 2.1."""
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    text = {"hidden_size": 128, "head_dim": 32, "rope_parameters": rope}
    vision = {"out_hidden_size": 128, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    config = Qwen3VLConfig(text_config={**TEXT, **text}, vision_config={**VISION, **vision}, **VISION_TOKENS)
    return seeded_layers(lambda: Qwen3VLForConditionalGeneration(config))


def autoencoder(channels: int) -> AutoencoderKLQwenImage:
    """The autoencoder of Qwen-Image at 4 to 16 channels, for the edit pipelines always show it a million pixels.

    Its posterior has next to no variance, for inpainting with a ControlNet samples it without the caller's generator.
    """
    vae = seeded_layers(partial(AutoencoderKLQwenImage, base_dim=4, num_res_blocks=1, input_channels=channels))
    vae.quant_conv.weight.data[vae.z_dim :] = 0
    vae.quant_conv.bias.data[vae.z_dim :] = -30
    return vae


def processor(name: str, patch_size: int) -> ProcessorMixin:
    """The VL processor class of this name, which shows a picture as four tokens; its video half needs torchvision."""
    images = {"patch_size": patch_size, "min_pixels": (4 * patch_size) ** 2, "max_pixels": (4 * patch_size) ** 2}
    return getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**images),
        tokenizer=qwen2_tokenizer(),
        video_processor=getattr(transformers, f"{name}VideoProcessor")(patch_size=patch_size),
        chat_template=CHAT_TEMPLATE,
    )


def _scheduler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, **config)


def _pipeline(
    pipeline_class: Callable[..., Any],
    *,
    edits: bool = False,
    channels: int = 3,
    transformer: Mapping[str, Any] | None = None,
    **others: Any,
) -> DiffusionPipeline:
    """A pipeline of the shared components and of `others`.

    Args:
        edits: whether the text encoder sees the picture, for which the pipeline has a processor.
        channels: of the pictures, 4 with transparency.
        transformer: the configuration in which a release's transformer differs from the first.
    """
    if edits:
        others["processor"] = processor("Qwen2VL", patch_size=14)
    return pipeline_class(
        scheduler=_scheduler(max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02),
        vae=autoencoder(channels),
        text_encoder=qwen25_vl(),
        tokenizer=qwen2_tokenizer(),
        transformer=_open_gates(seeded_layers(partial(QwenImageTransformer2DModel, **BLOCKS, **(transformer or {})))),
        **others,
    )


def _controlled(pipeline_class: Callable[..., Any], extra_channels: int = 0) -> DiffusionPipeline:
    """A pipeline with a ControlNet, which for inpainting also reads a mask of `extra_channels`."""
    controlnet = seeded_layers(partial(QwenImageControlNetModel, **BLOCKS, extra_condition_channels=extra_channels))
    return _pipeline(pipeline_class, controlnet=_open_gates(controlnet))


def _newest() -> DiffusionPipeline:
    """Qwen-Image 2.1: one stream, a transformer wider than its text encoder, and 16 pixels a latent."""
    transformer = seeded_layers(
        partial(
            QwenImage21Transformer2DModel,
            num_layers=2,
            num_attention_heads=8,
            attention_head_dim=32,
            context_in_dim=128,
            axes_dims_rope=(8, 12, 12),
        )
    )
    # Without a bias only the weights can open the gates.
    transformer.modulation[1].weight.data.mul_(4)
    return QwenImage21Pipeline(
        scheduler=_scheduler(max_shift=1.15),
        vae=seeded_layers(partial(AutoencoderKLQwenImage21, base_dim=4, decoder_base_dim=4, num_res_blocks=1)),
        text_encoder=qwen3_vl(),
        processor=processor("Qwen3VL", patch_size=16),
        transformer=transformer,
    )


def _call(**others: Any) -> dict[str, Any]:
    """Two steps without guidance, which would magnify every rounding error; `others` add to that."""
    return {
        "prompt": PROMPT,
        "true_cfg_scale": 1.0,
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
        **others,
    }


def _generate() -> dict[str, Any]:
    return _call(height=SIZE, width=SIZE)


def _img2img() -> dict[str, Any]:
    # Half the strength of four steps leaves two.
    return {**_generate(), "image": picture(), "strength": 0.5, "num_inference_steps": 4}


def _inpaint() -> dict[str, Any]:
    return {**_generate(), "image": picture(), "mask_image": mask(), "strength": 1.0}


def _control() -> dict[str, Any]:
    return {**_generate(), "control_image": picture(shift=64)}


def _control_inpaint() -> dict[str, Any]:
    return {**_control(), "control_mask": mask()}


def _edit() -> dict[str, Any]:
    return {**_generate(), "image": picture()}


def _edit_inpaint() -> dict[str, Any]:
    return _call(image=picture(), mask_image=mask(), strength=1.0)


def _edit_plus() -> dict[str, Any]:
    return {**_generate(), "image": [picture()]}


def _layers() -> dict[str, Any]:
    return _call(image=picture().convert("RGBA"), layers=1, resolution=640)


def _newest_call() -> dict[str, Any]:
    return {**_generate(), "image": picture().convert("RGBA"), "output_resolution": SIZE}


VISION_PACKAGES = ("torchvision",)

PIPELINES: tuple[TinyPipeline, ...] = (
    TinyPipeline("qwen-image", "QwenImagePipeline", partial(_pipeline, QwenImagePipeline), _generate),
    TinyPipeline("qwen-image-img2img", "QwenImageImg2ImgPipeline", partial(_pipeline, QwenImageImg2ImgPipeline), _img2img),
    TinyPipeline("qwen-image-inpaint", "QwenImageInpaintPipeline", partial(_pipeline, QwenImageInpaintPipeline), _inpaint),
    TinyPipeline(
        "qwen-image-controlnet",
        "QwenImageControlNetPipeline",
        partial(_controlled, QwenImageControlNetPipeline),
        _control,
    ),
    TinyPipeline(
        "qwen-image-controlnet-inpaint",
        "QwenImageControlNetInpaintPipeline",
        partial(_controlled, QwenImageControlNetInpaintPipeline, extra_channels=4),
        _control_inpaint,
    ),
    TinyPipeline(
        "qwen-image-edit",
        "QwenImageEditPipeline",
        partial(_pipeline, QwenImageEditPipeline, edits=True),
        _edit,
        VISION_PACKAGES,
    ),
    TinyPipeline(
        "qwen-image-edit-inpaint",
        "QwenImageEditInpaintPipeline",
        partial(_pipeline, QwenImageEditInpaintPipeline, edits=True),
        _edit_inpaint,
        VISION_PACKAGES,
    ),
    TinyPipeline(
        "qwen-image-edit-plus",
        "QwenImageEditPlusPipeline",
        partial(_pipeline, QwenImageEditPlusPipeline, edits=True, transformer={"zero_cond_t": True}),
        _edit_plus,
        VISION_PACKAGES,
    ),
    TinyPipeline(
        "qwen-image-layered",
        "QwenImageLayeredPipeline",
        partial(
            _pipeline,
            QwenImageLayeredPipeline,
            edits=True,
            channels=4,
            transformer={"use_additional_t_cond": True, "use_layer3d_rope": True},
        ),
        _layers,
        VISION_PACKAGES,
    ),
    TinyPipeline("qwen-image-2.1", "QwenImage21Pipeline", _newest, _newest_call, VISION_PACKAGES),
)
