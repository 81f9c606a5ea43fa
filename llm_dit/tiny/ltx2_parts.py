"""The components of the tiny LTX-2 pipelines, in the three layouts that have been published.

2.0 projects the captions inside the transformer. 2.3 does that in the connectors, once for each modality, and has gated
attention, modulated prompts and a vocoder with bandwidth extension. 2.5 adds embeddings of keyframes, a head that
predicts the duration, and Gemma 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoDiffusionDecoderModel,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel, LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.duration_head import LTX2DurationHead
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    GemmaTokenizer,
)

from llm_dit.tiny.common import seeded_layers
from llm_dit.tiny.tokenizers import GEMMA_SPECIAL_TOKENS, train_bpe

Version = Literal["2.0", "2.3", "2.5"]

TEXT_DIM = 128
TEXT_LAYERS = 2
VIDEO_DIM = 128
LATENT_CHANNELS = 128
MEL_BINS = 16
AUDIO_LATENT_CHANNELS = 8

CONTRAST = 0.5
"""Takes the decoders' last layer back, so that few pixels are clipped, and none is past telling in HDR."""

TEXT: Mapping[str, Any] = {
    "vocab_size": 400,
    "hidden_size": TEXT_DIM,
    "intermediate_size": 120,
    "num_hidden_layers": TEXT_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 512,
}
"""What the text models of all Gemma generations share; the MLP's width is no multiple of a group."""

TEXT_4: Mapping[str, Any] = {**TEXT, "global_head_dim": 64}

VISION: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}


def audio_dim(version: Version) -> int:
    """The width of the audio stream: in 2.0 half the video's, as published; later one that fits every group."""
    return 64 if version == "2.0" else VIDEO_DIM


def scheduler(version: Version) -> FlowMatchEulerDiscreteScheduler:
    """Up to 2.3 the number of tokens shifts the sigmas; 2.5 is distilled, and its sigmas are used as they are."""
    if version == "2.5":
        return FlowMatchEulerDiscreteScheduler()
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer, which pads on the left."""
    vocab, merges = train_bpe(list(GEMMA_SPECIAL_TOKENS))
    # Annotated as strings, but handed on to a BPE, which takes pairs.
    return GemmaTokenizer(vocab=vocab, merges=cast(list[str], merges), model_max_length=512)


def text_encoder(version: Version) -> Gemma3ForConditionalGeneration | Gemma4UnifiedForConditionalGeneration:
    """Gemma 3 with a vision tower that never runs; from 2.5 on Gemma 4, whose other modalities are optional."""
    if version == "2.5":
        return seeded_layers(lambda: Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(text_config={**TEXT_4})))
    config = Gemma3Config(
        text_config={**TEXT, "query_pre_attn_scalar": TEXT["head_dim"]},
        vision_config={**VISION},
        mm_tokens_per_image=4,
        boi_token_index=5,
        eoi_token_index=6,
        image_token_index=7,
    )
    return seeded_layers(lambda: Gemma3ForConditionalGeneration(config))


def prompt_enhancer() -> Gemma4ForConditionalGeneration:
    """The Gemma 4 that comes with 2.5, with the small embeddings it adds at every layer."""
    per_layer = {"vocab_size_per_layer_input": TEXT["vocab_size"], "hidden_size_per_layer_input": 16}
    return seeded_layers(lambda: Gemma4ForConditionalGeneration(Gemma4Config(text_config={**TEXT_4, **per_layer})))


def connectors(version: Version) -> LTX2TextConnectors:
    """The stack that makes a sequence for each modality of all hidden states of the text encoder."""
    separate = version != "2.0"
    video, audio = (VIDEO_DIM, audio_dim(version)) if separate else (TEXT_DIM, TEXT_DIM)
    return seeded_layers(
        partial(
            LTX2TextConnectors,
            caption_channels=TEXT_DIM,
            text_proj_in_factor=TEXT_LAYERS + 1,
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=video // 4,
            video_connector_num_learnable_registers=8,
            video_gated_attn=separate,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=audio // 4,
            audio_connector_num_learnable_registers=8,
            audio_gated_attn=separate,
            connector_rope_base_seq_len=64,
            rope_type="split",
            per_modality_projections=separate,
            video_hidden_dim=video,
            audio_hidden_dim=audio,
            proj_bias=separate,
        )
    )


def transformer(version: Version) -> LTX2VideoTransformer3DModel:
    """Two blocks of the transformer for video and audio, with the gates of their branches open."""
    modern = version != "2.0"
    audio = audio_dim(version)
    audio_channels = AUDIO_LATENT_CHANNELS * MEL_BINS // 4
    model = seeded_layers(
        partial(
            LTX2VideoTransformer3DModel,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=4,
            attention_head_dim=VIDEO_DIM // 4,
            cross_attention_dim=VIDEO_DIM,
            gated_attn=modern,
            cross_attn_mod=modern,
            audio_in_channels=audio_channels,
            audio_out_channels=audio_channels,
            audio_num_attention_heads=4,
            audio_attention_head_dim=audio // 4,
            audio_cross_attention_dim=audio,
            audio_gated_attn=modern,
            audio_cross_attn_mod=modern,
            num_layers=2,
            caption_channels=TEXT_DIM,
            rope_type="split",
            use_prompt_embeddings=not modern,
            perturbed_attn=modern,
            ff_bias=version != "2.5",
            use_keyframes_abs_pos_embedding=version == "2.5",
        )
    )
    for block in model.transformer_blocks:
        for table in (block.scale_shift_table, block.audio_scale_shift_table):
            # Shift, scale and gate of each branch in turn.
            table.data[2::3] += 1
    return model


def video_vae() -> AutoencoderKLLTX2Video:
    """The published stages at up to 32 channels: 32 pixels and 8 frames a latent.

    The first stage has no resnets, for they would be as wide as the latents and outweigh all else.
    """
    model = seeded_layers(
        partial(
            AutoencoderKLLTX2Video,
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(16, 32, 32, 32),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(0, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )
    )
    model.decoder.conv_out.conv.weight.data.mul_(CONTRAST)
    return model


def audio_vae() -> AutoencoderKLLTX2Audio:
    """Its `base_channels` have to be the width of a packed latent, for its statistics are that long."""
    return seeded_layers(
        partial(
            AutoencoderKLLTX2Audio,
            base_channels=AUDIO_LATENT_CHANNELS * MEL_BINS // 4,
            ch_mult=(1, 1, 2),
            num_res_blocks=1,
            latent_channels=AUDIO_LATENT_CHANNELS,
            mel_bins=MEL_BINS,
        )
    )


def vocoder(version: Version) -> LTX2Vocoder | LTX2VocoderWithBWE:
    """Makes a waveform at the published rates; since 2.3 with bandwidth extension."""
    stages: dict[str, Any] = {
        "in_channels": 2 * MEL_BINS,
        "hidden_channels": 32,
        "upsample_kernel_sizes": [20, 8, 8],
        "upsample_factors": [10, 4, 4],
        "resnet_kernel_sizes": [3],
        "resnet_dilations": [[1, 3]],
    }
    if version == "2.0":
        return seeded_layers(partial(LTX2Vocoder, **stages, output_sampling_rate=16000))
    extension = {**stages, "upsample_kernel_sizes": [12, 11, 16], "upsample_factors": [6, 5, 8]}
    model = seeded_layers(
        partial(
            LTX2VocoderWithBWE,
            **stages,
            **{f"bwe_{name}": value for name, value in extension.items()},
            filter_length=128,
            window_length=128,
            num_mel_channels=MEL_BINS,
        )
    )
    model.mel_stft.mel_basis.abs_()
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            # The snake activations amplify.
            module.weight.data.mul_(0.65)
    # The extension adds to the waveform and must not drown it.
    model.bwe_generator.conv_out.weight.data.mul_(0.2)
    return model


def latent_upsampler(axis: Literal["space", "time"]) -> LTX2LatentUpsamplerModel:
    """Doubles the latents along `axis`."""
    return seeded_layers(
        partial(
            LTX2LatentUpsamplerModel,
            in_channels=LATENT_CHANNELS,
            mid_channels=32,
            num_blocks_per_stage=2,
            spatial_upsample=axis == "space",
            temporal_upsample=axis == "time",
            use_rational_resampler=False,
        )
    )


def diffusion_decoder() -> LTX2VideoDiffusionDecoderModel:
    """A decoder of Linears only: four stages of neighbourhood attention, then one denoising step on the pixels."""
    model = seeded_layers(
        partial(
            LTX2VideoDiffusionDecoderModel,
            latent_channels=LATENT_CHANNELS,
            decoder_head_dim=32,
            decoder_stage_channels=(256, 128, 128, 128, 128),
            decoder_stage_depths=(1, 2, 1, 1, 2),
            decoder_stage_kernels=((1, 2, 2), (2, 3, 3), (3, 3, 3), (3, 3, 3)),
            decoder_upsample_channel_reductions=(2, 1, 1, 1),
            decoder_stage5_kernel=(3, 5, 5),
            decoder_t_emb_dim=128,
        )
    )
    model.decoder.conv_out.weight.data.mul_(CONTRAST)
    return model


def duration_head(version: Version) -> LTX2DurationHead:
    """Predicts how long the video is from what the connectors make of the prompt."""
    return seeded_layers(
        partial(
            LTX2DurationHead,
            video_cross_attention_dim=VIDEO_DIM,
            audio_cross_attention_dim=audio_dim(version),
            pooler_hidden_dim=64,
            mlp_hidden_dim=64,
        )
    )


def components(version: Version) -> dict[str, Any]:
    """What all pipelines with a prompt share, by the names of its slots."""
    return {
        "scheduler": scheduler(version),
        "vae": video_vae(),
        "audio_vae": audio_vae(),
        "text_encoder": text_encoder(version),
        "tokenizer": gemma_tokenizer(),
        "connectors": connectors(version),
        "transformer": transformer(version),
        "vocoder": vocoder(version),
    }
