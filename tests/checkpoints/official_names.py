"""The names that the authors of the models give their tensors, made from those of diffusers and transformers.

The tables say what diffusers' converters say, but the other way round, and were written by hand: they share no code with
the library's loader, nor with diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]

TRANSFORMER_PREFIX = "model.diffusion_model."

FLUX2 = {
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
FLUX2_DOUBLE = {
    "attn.img_qkv": "img_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.txt_qkv": "txt_attn.qkv",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
FLUX2_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}

# Each of these is one part of a name, between two dots.
LTX2 = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    # Since 2.3, and not yet in diffusers' converter.
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
}
LTX2_CONNECTORS = {
    "video_connector": f"{TRANSFORMER_PREFIX}video_embeddings_connector",
    "audio_connector": f"{TRANSFORMER_PREFIX}audio_embeddings_connector",
    "transformer_blocks": "transformer_1d_blocks",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "text_proj_in": "text_embedding_projection.aggregate_embed",
    "video_text_proj_in": "text_embedding_projection.video_aggregate_embed",
    "audio_text_proj_in": "text_embedding_projection.audio_aggregate_embed",
}
LTX2_STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
LTX2_VAE = {**LTX2_STATISTICS, "resnets": "res_blocks"}
LTX2_VOCODER = {
    "upsamplers": "ups",
    "resnets": "resblocks",
    "conv_in": "conv_pre",
    "conv_out": "conv_post",
    "act_out": "act_post",
}

Z_IMAGE = (
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1.", "x_embedder."),
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
)


def official_names(family: str, state: State) -> dict[str, Tensor]:
    """The tensors of a transformer under the names, and in the shapes, of its authors.

    Args:
        family: "flux2", "ltx2" (2.0 and 2.3), "z_image" or "qwen_image".
        state: the tensors under the names of diffusers.
    """
    return _TRANSFORMERS[family](state)


def ltx_monolith(parts: Mapping[str, State]) -> dict[str, Tensor]:
    """The tensors of a whole LTX-2 or LTX-2.3 file, which has all components but the text encoder in it.

    Args:
        parts: the state dicts of diffusers by component: "transformer", "connectors", "vae", "audio_vae", "vocoder".
    """
    return {key: tensor for component, state in parts.items() for key, tensor in _LTX2_PARTS[component](state).items()}


def comfy_text_encoder(kind: str, state: State, layers: int | None = None) -> dict[str, Tensor]:
    """The tensors of a text encoder file of ComfyUI, along with the tokenizer that some of them carry.

    Args:
        kind: "qwen3", "qwen2_5_vl", "gemma3" or "mistral3".
        state: the tensors under the names of transformers.
        layers: how many layers of the language model are kept; the published mistral3 has 30 of 40.
    """
    named = _TEXT_ENCODERS[kind](_untied(state))
    return {key: tensor for key, tensor in named.items() if layers is None or _layer(key) < layers}


def _flux2(state: State) -> dict[str, Tensor]:
    fused = _fuse(_fuse(state, ("to_q", "to_k", "to_v"), "img_qkv"), ("add_q_proj", "add_k_proj", "add_v_proj"), "txt_qkv")
    result = {_flux2_name(key): tensor for key, tensor in fused.items()}
    modulation = "final_layer.adaLN_modulation.1.weight"
    # Theirs is (shift, scale), that of diffusers (scale, shift).
    result[modulation] = torch.cat(result[modulation].chunk(2)[::-1])
    return result


def _flux2_name(key: str) -> str:
    module, _, parameter = key.rpartition(".")
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
    if not block:
        return f"{FLUX2[module]}.{parameter}"
    single, index, inner = block.groups()
    name = (FLUX2_SINGLE if single else FLUX2_DOUBLE)[inner]
    parameter = "scale" if name.endswith("_norm") else parameter
    return f"{'single' if single else 'double'}_blocks.{index}.{name}.{parameter}"


def _fuse(state: State, parts: Sequence[str], fused: str) -> dict[str, Tensor]:
    """Stacks the weights of the Linears `parts` of each module into that of one, `fused`."""
    result = {}
    for key, tensor in state.items():
        module, _, name = key.removesuffix(".weight").rpartition(".")
        if name == parts[0]:
            result[f"{module}.{fused}.weight"] = torch.cat([state[f"{module}.{part}.weight"] for part in parts])
        elif name not in parts:
            result[key] = tensor
    return result


def _z_image(state: State) -> dict[str, Tensor]:
    result = {}
    for key, tensor in _fuse(state, ("to_q", "to_k", "to_v"), "qkv").items():
        name = key
        for theirs, official in Z_IMAGE:
            name = name.replace(theirs, official)
        result[name] = tensor
    return result


def _by_part(key: str, names: Mapping[str, str]) -> str:
    return ".".join(names.get(part, part) for part in key.split("."))


def _ltx2(state: State) -> dict[str, Tensor]:
    return {_by_part(key, LTX2): tensor for key, tensor in state.items()}


def _ltx2_transformer(state: State) -> dict[str, Tensor]:
    return {TRANSFORMER_PREFIX + key: tensor for key, tensor in _ltx2(state).items()}


def _ltx2_connectors(state: State) -> dict[str, Tensor]:
    return {_by_part(key, LTX2_CONNECTORS): tensor for key, tensor in state.items()}


def _ltx2_vae(state: State) -> dict[str, Tensor]:
    """Theirs numbers the stages of an encoder or decoder through; in diffusers, a block holds its resampler."""
    levels = {key.split(".")[2] for key in state if key.startswith("encoder.down_blocks.")}
    rules: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
        (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", lambda m: f"encoder.down_blocks.{2 * int(m[1]) + 1}."),
        (r"^encoder\.down_blocks\.(\d+)\.(?=resnets)", lambda m: f"encoder.down_blocks.{2 * int(m[1])}."),
        (r"^encoder\.mid_block\.", lambda m: f"encoder.down_blocks.{2 * len(levels)}."),
        (r"^decoder\.mid_block\.", lambda m: "decoder.up_blocks.0."),
        (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up_blocks.{2 * int(m[1]) + 1}."),
        (r"^decoder\.up_blocks\.(\d+)\.(?=resnets)", lambda m: f"decoder.up_blocks.{2 * int(m[1]) + 2}."),
    )
    result = {}
    for key, tensor in state.items():
        name = next((re.sub(pattern, new, key) for pattern, new in rules if re.match(pattern, key)), key)
        result[f"vae.{_by_part(name, LTX2_VAE)}"] = tensor
    return result


def _ltx2_audio_vae(state: State) -> dict[str, Tensor]:
    return {f"audio_vae.{_by_part(key, LTX2_STATISTICS)}": tensor for key, tensor in state.items()}


def _ltx2_vocoder(state: State) -> dict[str, Tensor]:
    names = {key: _by_part(key, LTX2_VOCODER).replace("downsample.filter", "downsample.lowpass.filter") for key in state}
    return {f"vocoder.{names[key]}": tensor for key, tensor in state.items()}


def _untied(state: State) -> dict[str, Tensor]:
    """Without a head that is the embedding: that is not stored twice."""
    embeddings = {tensor.data_ptr() for key, tensor in state.items() if key.endswith("embed_tokens.weight")}
    return {key: tensor for key, tensor in state.items() if key != "lm_head.weight" or tensor.data_ptr() not in embeddings}


def _layer(key: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", key)
    return int(match[1]) if match else -1


def _with_prefixes(state: State, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors whose names begin with one of `prefixes`, with that replaced; without the others."""
    found = ((key, next((prefix for prefix in prefixes if key.startswith(prefix)), None)) for key in state)
    return {prefixes[prefix] + key.removeprefix(prefix): state[key] for key, prefix in found if prefix is not None}


def _blob(text: str) -> Tensor:
    """Bytes in place of a tokenizer's file."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _qwen3(state: State) -> dict[str, Tensor]:
    return {key if key.startswith(("model.", "lm_head.")) else f"model.{key}": tensor for key, tensor in state.items()}


def _qwen2_5_vl(state: State) -> dict[str, Tensor]:
    return _with_prefixes(state, {"model.visual.": "visual.", "model.language_model.": "model.", "lm_head.": "lm_head."})


def _gemma3(state: State) -> dict[str, Tensor]:
    named = _with_prefixes(
        state,
        {
            "model.language_model.": "model.",
            "model.vision_tower.": "vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
    )
    return {**named, "spiece_model": _blob("the bytes of a sentencepiece model")}


def _mistral3(state: State) -> dict[str, Tensor]:
    """Pruned: no vision tower, and nothing past the last layer that FLUX.2 reads."""
    language = "model.language_model."
    named = _with_prefixes(state, {f"{language}{name}.": f"model.{name}." for name in ("embed_tokens", "layers")})
    return {**named, "tekken_model": _blob("the bytes of a tekken.json")}


_TRANSFORMERS: Mapping[str, Callable[[State], dict[str, Tensor]]] = {
    "flux2": _flux2,
    "ltx2": _ltx2,
    "z_image": _z_image,
    "qwen_image": dict,
}
_LTX2_PARTS: Mapping[str, Callable[[State], dict[str, Tensor]]] = {
    "transformer": _ltx2_transformer,
    "connectors": _ltx2_connectors,
    "vae": _ltx2_vae,
    "audio_vae": _ltx2_audio_vae,
    "vocoder": _ltx2_vocoder,
}
_TEXT_ENCODERS: Mapping[str, Callable[[State], dict[str, Tensor]]] = {
    "qwen3": _qwen3,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
}
