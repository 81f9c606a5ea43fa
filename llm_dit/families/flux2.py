"""FLUX.2: dev, and klein in two sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)

from ..checkpoints.encoders import PRUNED, Unread
from ..checkpoints.names import OfficialName, Part, encoder_part
from ..forwards import Forwards, Keywords, Size, image_latents, noise, prompt_tokens
from ..mixin import QuantizablePipelineMixin
from ..published_encoders import mistral_small_24b, qwen3_4b, qwen3_8b
from ..splitting import Arguments, Share, Splitting, diffusers_plan
from .base import Encoding, Family, Generation, Published

_KLEIN_4B = partial(
    Flux2Transformer2DModel,
    num_layers=5,
    num_single_layers=20,
    num_attention_heads=24,
    joint_attention_dim=7680,
    guidance_embeds=False,
)
_KLEIN_9B = partial(
    Flux2Transformer2DModel,
    num_layers=8,
    num_single_layers=24,
    num_attention_heads=32,
    joint_attention_dim=12288,
    guidance_embeds=False,
)
_UNREAD = Unread(
    ("lm_head", "norm", "vision_tower", "multi_modal_projector"),
    layers_read=lambda count: count * 3 // 4,
    only_in_files=("norm",),
)
"""The prompt is read off hidden states up to three quarters of the way (`_own_call`); upsampling a prompt reads the rest."""
_SOURCE = "config.json of the repository; parameter counts agree with it"


def _own_call(pipe: Any) -> Mapping[str, Any]:
    """The text encoder's layers that become the prompt, and steps and guidance of models that are not distilled.

    Layers a quarter, half and three quarters of the way up are 9, 18, 27 of Qwen3's 36 and 10, 20, 30 of Mistral's 40, the
    pipelines' defaults, and it holds for tiny models too. Steps and guidance of FLUX.2-dev and of klein's base models are
    diffusers' defaults.
    """
    layers = pipe.text_encoder.config.get_text_config().num_hidden_layers
    found = {"text_encoder_out_layers": tuple(layers * quarter // 4 for quarter in (1, 2, 3))}
    distilled = pipe.config.get("is_distilled", False)
    return found if distilled else {**found, "num_inference_steps": 50, "guidance_scale": 4.0}


_OFFICIAL = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_OFFICIAL_DOUBLE = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_OFFICIAL_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_FUSED = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _official_name(name: str) -> OfficialName:
    """Black Forest Labs' name: q, k and v are one weight, norms have a `scale`, and the last modulation is (shift, scale)."""
    module, _, parameter = name.rpartition(".")
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
    if block is None:
        return OfficialName(f"{_OFFICIAL[module]}.{parameter}", swapped=module == "norm_out.linear")
    single, index, inner = block.groups()
    theirs = (_OFFICIAL_SINGLE if single else _OFFICIAL_DOUBLE)[inner]
    parameter = "scale" if theirs.endswith("_norm") else parameter
    place = _FUSED.index(inner) % 3 if inner in _FUSED and not single else 0
    return OfficialName(f"{'single' if single else 'double'}_blocks.{index}.{theirs}.{parameter}", place)


def _split_arguments(keywords: Arguments, share: Share) -> Arguments:
    share.refuse(keywords, "kv_cache", "kv_cache_mode")
    share.check(keywords["hidden_states"].shape[1], "image", f"give height and width that are multiples of {16 * share.count}")
    share.check(keywords["encoder_hidden_states"].shape[1], "text", "give a max_sequence_length that can be")
    return {}


def _step(model: Any, device: torch.device, size: Size) -> Keywords:
    """`Flux2KleinPipeline.__call__` and `Flux2Pipeline.__call__`: 16 x 16 pixels a token; references come after the picture."""
    latents = noise(device, size.batch, model.config.in_channels, size.height // 16, size.width // 16)
    prompt = noise(device, size.batch, size.text or _TEXT_TOKENS, model.config.joint_attention_dim, seed=2)
    tokens, ids = latents.flatten(2).transpose(1, 2), Flux2KleinPipeline._prepare_latent_ids(latents).to(device)
    if size.references:
        count = size.references * (size.reference_pixels // 256)
        tokens = torch.cat([tokens, noise(device, size.batch, count, model.config.in_channels, seed=3)], dim=1)
        ids = torch.cat([ids, ids.new_zeros(size.batch, count, ids.shape[-1])], dim=1)
    return {
        "hidden_states": tokens.contiguous(),
        "timestep": torch.full((size.batch,), 0.7, dtype=torch.bfloat16, device=device),
        "guidance": torch.full((size.batch,), 4.0, device=device) if model.config.guidance_embeds else None,
        "encoder_hidden_states": prompt,
        "txt_ids": Flux2KleinPipeline._prepare_text_ids(prompt).to(device),
        "img_ids": ids,
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _encode(model: Any, device: torch.device, size: Size) -> Any:
    """`_get_qwen3_prompt_embeds`, `_get_mistral_3_small_prompt_embeds`: three of all hidden states, side by side."""
    tokens = prompt_tokens(device, size.batch, size.text or _TEXT_TOKENS)
    states = model(**tokens, output_hidden_states=True, use_cache=False).hidden_states
    out = torch.stack([states[(len(states) - 1) * quarter // 4] for quarter in (1, 2, 3)], dim=1)
    return out.permute(0, 2, 1, 3).reshape(size.batch, tokens["input_ids"].shape[1], -1)


_TEXT_TOKENS = 512
"""`max_sequence_length` of the pipelines, to which they pad."""

FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    official_name=_official_name,
    parts={"transformer": Part(), "text_encoder": encoder_part(_UNREAD)},
    encoding=Encoding(("prompt_embeds", None)),
    forwards=Forwards(_step, image_latents, {"text_encoder": _encode}, most_references=10),
    generation=Generation({"num_inference_steps": 4, "guidance_scale": 1.0, "height": 1024, "width": 1024}, adapt=_own_call),
    casts_latents=False,
    splitting={"Flux2Transformer2DModel": Splitting(diffusers_plan, _split_arguments)},
    published=(
        Published(
            "flux2-dev",
            "black-forest-labs/FLUX.2-dev",
            "Flux2Pipeline",
            {"text_encoder": mistral_small_24b, "transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2},
            "defaults of Flux2Transformer2DModel; Mistral-Small-3.2-24B",
        ),
        Published(
            "klein-4b",
            "black-forest-labs/FLUX.2-klein-4B",
            "Flux2KleinPipeline",
            {"text_encoder": qwen3_4b, "transformer": _KLEIN_4B, "vae": AutoencoderKLFlux2},
            _SOURCE,
        ),
        Published(
            "klein-9b",
            "black-forest-labs/FLUX.2-klein-9B",
            "Flux2KleinPipeline",
            {"text_encoder": qwen3_8b, "transformer": _KLEIN_9B, "vae": AutoencoderKLFlux2},
            _SOURCE,
        ),
    ),
)


class _Flux2(QuantizablePipelineMixin):
    family = FAMILY

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; refused for a layer that was not loaded."""
        call = signature(super().encode_prompt).bind(*args, **kwargs)
        call.apply_defaults()
        asked = max(call.arguments["text_encoder_out_layers"])
        count = self.text_encoder.config.get_text_config().num_hidden_layers if self.text_encoder is not None else 0
        if getattr(self.text_encoder, PRUNED, ()) and asked > _UNREAD.layers_read(count):
            raise ValueError(
                f"text_encoder_out_layers asks for layer {asked} of a text encoder of which "
                f"{', '.join(getattr(self.text_encoder, PRUNED))} were left out: load it with encoder_layers='all'"
            )
        return super().encode_prompt(*args, **kwargs)


class QuantizableFlux2Pipeline(_Flux2, Flux2Pipeline):
    """FLUX.2-dev: text and reference images to image."""

    def upsample_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; refused with a text encoder of which a part was left out."""
        left_out = getattr(self.text_encoder, PRUNED, ())
        if left_out:
            raise ValueError(
                f"upsampling a prompt needs the whole text encoder, of which {', '.join(left_out)} were left out: load it "
                "from its folder, with encoder_layers='all'"
            )
        return super().upsample_prompt(*args, **kwargs)


class QuantizableFlux2KleinPipeline(_Flux2, Flux2KleinPipeline):
    """FLUX.2-klein: text and reference images to image."""


class QuantizableFlux2KleinInpaintPipeline(_Flux2, Flux2KleinInpaintPipeline):
    """FLUX.2-klein: fills a masked region."""


class QuantizableFlux2KleinKVPipeline(_Flux2, Flux2KleinKVPipeline):
    """FLUX.2-klein with the reference images' keys and values cached."""
