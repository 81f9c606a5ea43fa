"""LTX-2: video with sound, in its published versions."""

from __future__ import annotations

from functools import partial

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
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE

from ..mixin import QuantizablePipelineMixin
from ..published_encoders import gemma3_12b
from .base import Family, Generation, Published

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
_VAE_2_3 = partial(
    AutoencoderKLLTX2Video,
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

FAMILY = Family(
    name="ltx2",
    title="LTX-2",
    extra_roles={
        "prompt_enhancer": "encoder",
        "connectors": "encoder",
        "diffusion_decoder": "transformer",
        "audio_vae": "vae",
        "vocoder": "vae",
        "latent_upsampler": "vae",
        "temporal_latent_upsampler": "vae",
    },
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
                "vae": AutoencoderKLLTX2Video,
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


class QuantizableLTX2Pipeline(_LTX2, LTX2Pipeline):
    """Text to video with sound."""


class QuantizableLTX2ImageToVideoPipeline(_LTX2, LTX2ImageToVideoPipeline):
    """Image and text to video with sound."""


class QuantizableLTX2ConditionPipeline(_LTX2, LTX2ConditionPipeline):
    """Text to video with frames given at chosen times."""


class QuantizableLTX2InContextPipeline(_LTX2, LTX2InContextPipeline):
    """Text to video after a reference clip."""


class QuantizableLTX2HDRPipeline(_LTX2, LTX2HDRPipeline):
    """Video to high dynamic range."""


class QuantizableLTX2DFRPipeline(_LTX2, LTX2DFRPipeline):
    """Text to video with a frame rate that varies."""


class QuantizableLTX2DFRTemporalRefinePipeline(_LTX2, LTX2DFRTemporalRefinePipeline):
    """Refines a clip in time."""


class QuantizableLTX2LatentUpsamplePipeline(_LTX2, LTX2LatentUpsamplePipeline):
    """Doubles the size of video latents."""


class QuantizableLTX2VideoDiffusionDecodePipeline(_LTX2, LTX2VideoDiffusionDecodePipeline):
    """Decodes video latents by diffusion instead of a VAE."""
