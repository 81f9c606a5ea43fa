"""LTX-2: video with sound, in its published versions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2ConditionPipeline,
    LTX2DFRPipeline,
    LTX2DFRTemporalRefinePipeline,
    LTX2HDRPipeline,
    LTX2ImageToVideoPipeline,
    LTX2InContextPipeline,
    LTX2LatentUpsamplePipeline,
    LTX2Pipeline,
    LTX2VideoDiffusionDecodePipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE

from ..checkpoints.layout import PREFIXES
from ..checkpoints.names import OfficialName, Part, encoder_part
from ..forwards import FRAME_RATE, Forwards, Keywords, Size, noise, prompt_tokens
from ..mixin import QuantizablePipelineMixin
from ..published_encoders import gemma3_12b
from ..splitting import Arguments, Share, Splitting
from .base import Encoding, Family, Generation, Published

_TRANSFORMER_2_3 = partial(
    LTX2VideoTransformer3DModel,
    gated_attn=True,
    cross_attn_mod=True,
    audio_gated_attn=True,
    audio_cross_attn_mod=True,
    use_prompt_embeddings=False,
    perturbed_attn=True,
    rope_type="split",
)
_CONNECTORS_2_3 = partial(
    LTX2TextConnectors,
    video_connector_num_attention_heads=32,
    video_connector_attention_head_dim=128,
    video_connector_num_layers=8,
    video_gated_attn=True,
    audio_connector_num_attention_heads=32,
    audio_connector_attention_head_dim=64,
    audio_connector_num_layers=8,
    audio_gated_attn=True,
    per_modality_projections=True,
    proj_bias=True,
    rope_type="split",
)
_VAE = partial(AutoencoderKLLTX2Video, spatial_compression_ratio=32, temporal_compression_ratio=8)
_VAE_2_3 = partial(
    _VAE,
    block_out_channels=(256, 512, 1024, 1024),
    decoder_block_out_channels=(256, 512, 512, 1024),
    layers_per_block=(4, 6, 4, 2, 2),
    decoder_layers_per_block=(4, 6, 4, 2, 2),
    decoder_spatio_temporal_scaling=(True, True, True, True),
    decoder_inject_noise=(False, False, False, False, False),
    upsample_residual=(False, False, False, False),
    upsample_factor=(2, 2, 1, 2),
    upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
)


def _transformer_name(name: str, expected: Collection[str]) -> str:
    """What LTX-2.3 added and diffusers' converter (0.42.1) does not know (huggingface/diffusers#14145)."""
    return re.sub(r"^(audio_)?prompt_adaln_single\.", r"\1prompt_adaln.", name)


def _connectors_name(name: str, expected: Collection[str]) -> str | None:
    """The connectors stand between the transformer's tensors, and their projections apart."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    if not re.match(r"(video|audio)_embeddings_connector\.|text_embedding_projection\.", name):
        return None
    for theirs, ours in _CONNECTORS:
        name = name.replace(theirs, ours)
    return name


_CONNECTORS = (
    ("text_embedding_projection.video_aggregate_embed", "video_text_proj_in"),
    ("text_embedding_projection.audio_aggregate_embed", "audio_text_proj_in"),
    ("text_embedding_projection.aggregate_embed", "text_proj_in"),
    ("_embeddings_connector.", "_connector."),
    ("transformer_1d_blocks", "transformer_blocks"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)


def _vae_name(name: str, expected: Collection[str]) -> str | None:
    """The file numbers the stages of encoder and decoder through; in diffusers a block holds its resampler.

    diffusers' own converter does this for three levels, and LTX-2.3's decoder has four.
    """
    if name.startswith("per_channel_statistics."):
        return _STATISTICS.get(name)
    name = name.replace("res_blocks", "resnets")
    stage = re.match(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(.+)", name)
    if stage is None:
        return name
    side, number, rest = stage[1], int(stage[2]), stage[3]
    block, odd = divmod(number, 2)
    if side == "decoder.up":
        if number == 0:
            return f"decoder.mid_block.{rest}"
        return f"decoder.up_blocks.{block}.upsamplers.0.{rest}" if odd else f"decoder.up_blocks.{block - 1}.{rest}"
    if odd:
        return f"encoder.down_blocks.{block}.downsamplers.0.{rest}"
    own = f"encoder.down_blocks.{block}.{rest}"
    return own if own in expected else f"encoder.mid_block.{rest}"


_STATISTICS = {
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}


def _audio_vae_name(name: str, expected: Collection[str]) -> str | None:
    return _STATISTICS.get(name) if name.startswith("per_channel_statistics.") else name


def _vocoder_name(name: str, expected: Collection[str]) -> str:
    parts = [_VOCODER.get(part, part) for part in name.split(".")]
    return ".".join(parts).replace("downsample.lowpass.filter", "downsample.filter")


_VOCODER = {"ups": "upsamplers", "resblocks": "resnets", "conv_pre": "conv_in", "conv_post": "conv_out", "act_post": "act_out"}

_OTHER_PARTS = ("video_embeddings_connector.", "audio_embeddings_connector.")
PARTS = {
    "text_encoder": encoder_part(),
    "transformer": Part(
        prefixes=(*PREFIXES, ""),
        without=(*_OTHER_PARTS, "text_embedding_projection.", "vae.", "audio_vae.", "vocoder."),
        rename=_transformer_name,
    ),
    "connectors": Part(
        prefixes=(*(prefix + name for prefix in PREFIXES for name in _OTHER_PARTS), *_OTHER_PARTS, "text_embedding_projection."),
        keep_prefix=True,
        rename=_connectors_name,
        convert=False,
    ),
    "vae": Part(prefixes=("vae.",), rename=_vae_name, convert=False),
    "audio_vae": Part(prefixes=("audio_vae.",), rename=_audio_vae_name, convert=False),
    "vocoder": Part(prefixes=("vocoder.",), rename=_vocoder_name, convert=False),
}
"""A published file of LTX-2 holds all but the text encoder (names: diffusers' scripts/convert_ltx2_to_diffusers.py)."""

_OFFICIAL = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}


def _official_name(name: str) -> OfficialName:
    """Lightricks' name; each entry above is one dotted part of it."""
    return OfficialName(".".join(_OFFICIAL.get(part, part) for part in name.split(".")))


def _split_plan(transformer: Any) -> Mapping[str, Any]:
    """The video and its text are split. The audio is short and whole in every process: attention over as many copies of the same
    keys as there are processes gives the same result.

    diffusers' own plan splits neither the positions of "split" RoPE, which every published checkpoint has, nor those of the
    attention between video and audio.
    """
    heads_first = transformer.config.rope_type == "split"
    part = ContextParallelInput(2, 4, split_output=True) if heads_first else ContextParallelInput(1, 3, split_output=True)
    return {
        "": {"hidden_states": ContextParallelInput(1, 3), "encoder_hidden_states": ContextParallelInput(1, 3)},
        "rope": {0: part, 1: part},
        "cross_attn_rope": {0: part, 1: part},
        "proj_out": ContextParallelOutput(1, 3),
    }


def _split_arguments(keywords: Arguments, share: Share) -> Arguments:
    """The connectors leave no padding, so that their masks say nothing; timesteps of single tokens are split as tokens are."""
    share.refuse(keywords, "video_self_attention_mask")
    tokens = keywords["hidden_states"].shape[1]
    share.check(tokens, "video", "change height, width or the number of frames")
    share.check(keywords["encoder_hidden_states"].shape[1], "text", "give a max_sequence_length that can be")
    changed: dict[str, Any] = {}
    for name in ("encoder_attention_mask", "audio_encoder_attention_mask"):
        mask = keywords.get(name)
        if mask is not None and not bool((mask > 0).all()):
            raise ValueError(f"context parallelism does not split {name}, which masks something: run this pipeline on one GPU")
        changed[name] = None
    for name in ("timestep", "video_keyframes_mask"):
        value = keywords.get(name)
        if value is not None and value.ndim > 1 and value.shape[1] == tokens:
            changed[name] = share.of(value)
    if keywords.get("audio_timestep") is None and "timestep" in changed:
        changed["audio_timestep"] = keywords["timestep"]
    return changed


_TEXT_TOKENS = 1024
"""`max_sequence_length` of the pipelines, to which they pad."""
_KEPT = 3 * _TEXT_TOKENS * 3840 * 49 * 2
"""Every hidden state of Gemma-3-12B, of the negative prompt once and of both in one tensor: locals of the pipeline's call."""
_AUDIO_RATE = 25.0
"""Audio latents a second: 16,000 samples, of which 160 make a column of the spectrogram, and four of those a latent."""


def _step(model: Any, device: torch.device, size: Size) -> Keywords:
    """`LTX2Pipeline.__call__`: coordinates made once; the connectors leave a mask of ones."""
    config, batch, text = model.config, size.batch, size.text or _TEXT_TOKENS
    frames, height, width = (size.frames - 1) // 8 + 1, size.height // 32, size.width // 32
    audio = round(size.frames / FRAME_RATE * _AUDIO_RATE)
    projected = config.caption_channels if config.use_prompt_embeddings else 0  # 2.3 projects in its connectors
    timestep = torch.full((batch,), 700.0, device=device)
    mask = torch.ones((batch, text), dtype=torch.int64, device=device)
    return {
        "hidden_states": noise(device, batch, frames * height * width, config.in_channels),
        "audio_hidden_states": noise(device, batch, audio, config.audio_in_channels, seed=2),
        "encoder_hidden_states": noise(device, batch, text, projected or config.cross_attention_dim, seed=3),
        "audio_encoder_hidden_states": noise(device, batch, text, projected or config.audio_cross_attention_dim, seed=4),
        "timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": FRAME_RATE,
        "audio_num_frames": audio,
        "video_coords": model.rope.prepare_video_coords(batch, frames, height, width, device, fps=FRAME_RATE),
        "audio_coords": model.audio_rope.prepare_audio_coords(batch, audio, device),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _encode(model: Any, device: torch.device, size: Size) -> Any:
    """`_get_gemma_prompt_embeds`: all hidden states side by side, while the model's outputs are still there."""
    outputs = model(**prompt_tokens(device, size.batch, size.text or _TEXT_TOKENS), output_hidden_states=True)
    return torch.stack(outputs.hidden_states, dim=-1).flatten(2, 3)


def _connect(model: Any, device: torch.device, size: Size) -> Any:
    """`LTX2Pipeline.__call__`: both prompts in one batch."""
    batch, text, config = 2 * size.batch, size.text or _TEXT_TOKENS, model.config
    prompts = noise(device, batch, text, config.caption_channels * config.text_proj_in_factor)
    return model(prompts, torch.ones((batch, text), dtype=torch.int64, device=device), padding_side="left")


def _latents(vae: Any, device: torch.device, size: Size) -> Keywords:
    shape = (vae.config.latent_channels, (size.frames - 1) // 8 + 1, size.height // 32, size.width // 32)
    return {"z": noise(device, size.batch, *shape), "temb": None, "return_dict": False}


FAMILY = Family(
    name="ltx2",
    title="LTX-2",
    parts=PARTS,
    official_name=_official_name,
    bf16_blocks=(0, 1, -2, -1),
    splitting={"LTX2VideoTransformer3DModel": Splitting(_split_plan, _split_arguments)},
    extra_roles={
        "prompt_enhancer": "encoder",
        "connectors": "encoder",
        "diffusion_decoder": "transformer",
        "audio_vae": "vae",
        "vocoder": "vae",
        "latent_upsampler": "vae",
        "temporal_latent_upsampler": "vae",
    },
    encoding=Encoding(
        ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"), together=True
    ),
    forwards=Forwards(
        _step,
        _latents,
        {"text_encoder": _encode, "connectors": _connect},
        pixels_per_token=32,
        guided_batch=2,
        kept=_KEPT,
        frames_step=8,
    ),
    generation=Generation(
        {"num_inference_steps": 40, "guidance_scale": 4.0, "height": 512, "width": 768, "num_frames": 121},
        video=True,
    ),
    published=(
        Published(
            "ltx-2",
            "Lightricks/LTX-2",
            "LTX2Pipeline",
            {
                "text_encoder": gemma3_12b,
                "connectors": LTX2TextConnectors,
                "transformer": LTX2VideoTransformer3DModel,
                "vae": _VAE,
                "audio_vae": AutoencoderKLLTX2Audio,
                "vocoder": LTX2Vocoder,
            },
            "defaults of the diffusers classes; Gemma-3-12B",
        ),
        Published(
            "ltx-2.3",
            "Lightricks/LTX-2.3",
            "LTX2Pipeline",
            {
                "text_encoder": gemma3_12b,
                "connectors": _CONNECTORS_2_3,
                "transformer": _TRANSFORMER_2_3,
                "vae": _VAE_2_3,
                "audio_vae": AutoencoderKLLTX2Audio,
                "vocoder": LTX2VocoderWithBWE,
            },
            "diffusers' conversion of the 2.3 checkpoint; parameter counts agree with it",
        ),
    ),
)


class _LTX2(QuantizablePipelineMixin):
    family = FAMILY


class _Enhancing(_LTX2):
    """Of pipelines that can rewrite their prompt."""

    def enhance_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, which moves the model that rewrites to the device: where models take turns, its turn comes first."""
        if self._turns is not None and getattr(self, "prompt_enhancer", None) is None:
            self._turns.take(encoding=True)
        diffusers: Any = super()
        return diffusers.enhance_prompt(*args, **kwargs)


class QuantizableLTX2Pipeline(_Enhancing, LTX2Pipeline):
    """Text to video with sound."""


class QuantizableLTX2ImageToVideoPipeline(_Enhancing, LTX2ImageToVideoPipeline):
    """Image and text to video with sound."""


class QuantizableLTX2ConditionPipeline(_Enhancing, LTX2ConditionPipeline):
    """Text to video with frames given at chosen times."""


class QuantizableLTX2InContextPipeline(_Enhancing, LTX2InContextPipeline):
    """Text to video after a reference clip."""


class QuantizableLTX2HDRPipeline(_LTX2, LTX2HDRPipeline):
    """Video to high dynamic range."""


class QuantizableLTX2DFRPipeline(_Enhancing, LTX2DFRPipeline):
    """Text to video with a frame rate that varies."""


class QuantizableLTX2DFRTemporalRefinePipeline(_LTX2, LTX2DFRTemporalRefinePipeline):
    """Refines a clip in time."""


class QuantizableLTX2LatentUpsamplePipeline(_LTX2, LTX2LatentUpsamplePipeline):
    """Doubles the size of video latents."""


class QuantizableLTX2VideoDiffusionDecodePipeline(_LTX2, LTX2VideoDiffusionDecodePipeline):
    """Decodes video latents by diffusion instead of a VAE."""
