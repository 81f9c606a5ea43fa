"""Tiny FLUX.2: klein, which reads Qwen3, and dev, which reads Mistral 3; one kind of transformer, one autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from llm_dit.tiny.common import PROMPT, SIZE, mask, picture, seeded
from llm_dit.tiny.spec import TinyPipeline
from llm_dit.tiny.tokenizers import mistral_tokenizer, qwen2_tokenizer
from llm_dit.tiny.z_image import AUTOENCODER, qwen3_config

TRANSFORMER: Mapping[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "axes_dims_rope": (8, 8, 8, 8),
    # Three layers of a text encoder of width 128, side by side.
    "joint_attention_dim": 384,
}

LAYERS = (1, 2, 3)
"""The hidden states that become the prompt; as in the published models, the last layer is not among them."""


def _pipeline(pipeline_class: Callable[..., Any], **components: Any) -> DiffusionPipeline:
    """A pipeline of `components`, a scheduler and the autoencoder."""
    vae = seeded(lambda: AutoencoderKLFlux2(**AUTOENCODER), seed=1)
    generator = torch.Generator().manual_seed(1)
    # Latents are normalized by these buffers; at 0 and 1 nothing would tell that they were lost.
    vae.bn.running_mean.normal_(0, 0.1, generator=generator)
    vae.bn.running_var.uniform_(0.5, 2, generator=generator)
    return pipeline_class(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, **components)


def _klein(pipeline_class: Callable[..., Any]) -> DiffusionPipeline:
    """A klein pipeline; its MLPs are 170 wide, so that they and the single blocks' outputs fit no group."""
    return _pipeline(
        pipeline_class,
        text_encoder=seeded(lambda: AutoModelForCausalLM.from_config(qwen3_config()), seed=2),
        tokenizer=qwen2_tokenizer(),
        transformer=seeded(lambda: Flux2Transformer2DModel(**TRANSFORMER, mlp_ratio=170 / 128, guidance_embeds=False), seed=3),
    )


def _mistral3(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    """The text encoder of dev: a language model, and a vision tower that only the upsampling of prompts uses."""
    block = {"hidden_size": 128, "intermediate_size": 120, "num_attention_heads": 4}
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id,
            **block,
        },
        vision_config={"model_type": "pixtral", "num_hidden_layers": 2, "patch_size": 16, "image_size": SIZE, **block},
        image_token_index=tokenizer.get_vocab()["[IMG]"],
        tie_word_embeddings=False,
    )
    return seeded(lambda: AutoModelForImageTextToText.from_config(config), seed=2)


def _dev(processor: Callable[[PreTrainedTokenizerFast], Any]) -> DiffusionPipeline:
    """A dev pipeline with what `processor` makes of the tokenizer; the published MLP ratio and guidance embedding."""
    tokenizer = mistral_tokenizer()
    return _pipeline(
        Flux2Pipeline,
        text_encoder=_mistral3(tokenizer),
        tokenizer=processor(tokenizer),
        transformer=seeded(lambda: Flux2Transformer2DModel(**TRANSFORMER), seed=3),
    )


def _pixtral(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    return PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size=16, size={"longest_edge": SIZE}),
        tokenizer=tokenizer,
        patch_size=16,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )


def _call(**others: Any) -> dict[str, Any]:
    """Two steps at the smallest size; `others` add to that or go before it."""
    return {
        "prompt": PROMPT,
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": 2,
        "max_sequence_length": 64,
        "text_encoder_out_layers": LAYERS,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
        **others,
    }


def _generate() -> dict[str, Any]:
    return _call(guidance_scale=1.5)


def _inpaint() -> dict[str, Any]:
    return _call(guidance_scale=1.5, image=picture(), mask_image=mask(), strength=1.0)


def _edit() -> dict[str, Any]:
    return _call(image=picture())


def _dev_edit() -> dict[str, Any]:
    # The system message alone takes about a hundred tokens.
    return _call(image=picture(), guidance_scale=4.0, max_sequence_length=128)


PIPELINES: tuple[TinyPipeline, ...] = (
    TinyPipeline("flux2-klein", "Flux2KleinPipeline", partial(_klein, Flux2KleinPipeline), _generate),
    TinyPipeline("flux2-klein-inpaint", "Flux2KleinInpaintPipeline", partial(_klein, Flux2KleinInpaintPipeline), _inpaint),
    TinyPipeline("flux2-klein-kv", "Flux2KleinKVPipeline", partial(_klein, Flux2KleinKVPipeline), _edit),
    TinyPipeline("flux2-dev", "Flux2Pipeline", partial(_dev, lambda tokenizer: tokenizer), _dev_edit),
    TinyPipeline("flux2-dev-pixtral", "Flux2Pipeline", partial(_dev, _pixtral), _dev_edit, requires=("torchvision",)),
)
