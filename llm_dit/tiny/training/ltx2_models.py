"""The models of the trained LTX-2: the layout of 2.0, about 2.5 million parameters in all."""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from .. import scenes
from ..scenes.clips import SOUND_RATE
from ..tokenizers import CORPUS
from ..tokenizers import gemma_tokenizer as trained_tokenizer
from .course import fix_norms, initialized

CHANNELS: Final = 32
"""Of the latents of a clip."""
MEL_BINS: Final = 32
HOP: Final = 160
"""Samples of sound a frame of its spectrogram."""
SOUND_CHANNELS: Final = 2
SOUND_WIDTH: Final = SOUND_CHANNELS * MEL_BINS // 4
"""Of a token of sound; the audio autoencoder has to have as many channels."""
TEXT_LENGTH: Final = 16
_TEXT: Final = 64
_TEXT_LAYERS: Final = 2
_VIDEO: Final = 96
_AUDIO: Final = 32
"""Widths; four pitches need no more."""
_HEADS: Final = 4
_THETA: Final = 20.0
"""Of all rotary embeddings: there are 8 places in a row, not 10,000."""
_COMPRESSION: Final = (8, 16, 16)
"""Frames, rows and columns a latent."""


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer that has a token for every word of a caption."""
    words = [
        f"a {size} {colour} {shape} moving {direction}"
        for size in scenes.SIZES
        for colour in scenes.COLOURS
        for shape in scenes.SHAPES
        for direction in scenes.DIRECTIONS
    ]
    return trained_tokenizer((*CORPUS, *words))


def text_encoder() -> Gemma3ForConditionalGeneration:
    """Gemma 3 of width 64, with a vision tower that never runs."""
    text: dict[str, Any] = {
        "vocab_size": len(gemma_tokenizer()),
        "hidden_size": _TEXT,
        "intermediate_size": 128,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 512,
    }
    vision: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    images = {"mm_tokens_per_image": 4, "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7}
    return initialized(lambda: Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **images)), 2)


def connectors() -> LTX2TextConnectors:
    """One layer for each modality, and a register for every place of the caption."""
    each: dict[str, Any] = {
        "num_attention_heads": _HEADS,
        "attention_head_dim": _TEXT // _HEADS,
        "num_layers": 1,
        "num_learnable_registers": TEXT_LENGTH,
    }
    return initialized(
        lambda: LTX2TextConnectors(
            caption_channels=_TEXT,
            text_proj_in_factor=_TEXT_LAYERS + 1,
            connector_rope_base_seq_len=TEXT_LENGTH,
            rope_theta=_THETA,
            rope_type="split",
            **{f"{modality}_connector_{name}": value for modality in ("video", "audio") for name, value in each.items()},
        ),
        seed=3,
    )


def transformer() -> LTX2VideoTransformer3DModel:
    """Five blocks, 96 wide for what is seen, with positions that a clip of 128 px and a second fills."""
    model = initialized(
        lambda: LTX2VideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=_HEADS,
            attention_head_dim=_VIDEO // _HEADS,
            cross_attention_dim=_VIDEO,
            vae_scale_factors=_COMPRESSION,
            pos_embed_max_pos=1,
            base_height=128,
            base_width=128,
            audio_in_channels=SOUND_WIDTH,
            audio_out_channels=SOUND_WIDTH,
            audio_num_attention_heads=_HEADS,
            audio_attention_head_dim=_AUDIO // _HEADS,
            audio_cross_attention_dim=_AUDIO,
            audio_pos_embed_max_pos=1,
            num_layers=5,
            caption_channels=_TEXT,
            rope_theta=_THETA,
            rope_type="split",
        ),
        seed=4,
    )
    fix_norms(model)
    return model


def video_vae() -> AutoencoderKLLTX2Video:
    """16 pixels and 8 frames a latent; the decoder finds the frames first, where they are small, and then the pixels."""
    model = initialized(
        lambda: AutoencoderKLLTX2Video(
            latent_channels=CHANNELS,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=(0, 1, 0, 0, 1),
            downsample_type=("spatial", "spatiotemporal", "temporal", "temporal"),
            decoder_block_out_channels=(32,) * 5,
            decoder_layers_per_block=(1, 1, 0, 0, 0, 1),
            decoder_spatio_temporal_scaling=(True,) * 5,
            decoder_inject_noise=(False,) * 6,
            upsample_type=("temporal", "temporal", "temporal", "spatial", "spatial"),
            upsample_residual=(True,) * 5,
            upsample_factor=(1,) * 5,
            decoder_causal=False,
            spatial_compression_ratio=_COMPRESSION[1],
            temporal_compression_ratio=_COMPRESSION[0],
        ),
        seed=1,
    )
    # The one log variance of all channels: with noise as large as the latents the decoder would first learn to ignore them.
    with torch.no_grad():
        model.encoder.conv_out.conv.bias[-1] = -4
    return model


def audio_vae() -> AutoencoderKLLTX2Audio:
    """Four frames of a spectrogram a latent."""
    return initialized(
        lambda: AutoencoderKLLTX2Audio(
            base_channels=SOUND_WIDTH,
            ch_mult=(1, 1, 1),
            num_res_blocks=0,
            latent_channels=SOUND_CHANNELS,
            sample_rate=SOUND_RATE,
            mel_hop_length=HOP,
            mel_bins=MEL_BINS,
        ),
        seed=5,
    )


def vocoder() -> LTX2Vocoder:
    """Both channels' spectrograms in, both waveforms out."""
    return initialized(
        lambda: LTX2Vocoder(
            in_channels=2 * MEL_BINS,
            hidden_channels=32,
            upsample_kernel_sizes=[20, 8, 8],
            upsample_factors=[10, 4, 4],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
            output_sampling_rate=SOUND_RATE,
        ),
        seed=6,
    )
