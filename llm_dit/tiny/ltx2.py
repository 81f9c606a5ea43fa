"""The tiny pipelines of LTX-2: every pipeline class of the family, each on a layout it was published for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2DFRPipeline,
    LTX2DFRTemporalRefinePipeline,
    LTX2HDRPipeline,
    LTX2ImageToVideoPipeline,
    LTX2InContextPipeline,
    LTX2LatentUpsamplePipeline,
    LTX2Pipeline,
    LTX2VideoDiffusionDecodePipeline,
    LTXEulerAncestralRFScheduler,
)
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from PIL import Image

from llm_dit.tiny import ltx2_parts as parts
from llm_dit.tiny.common import PROMPT, SIZE, picture
from llm_dit.tiny.spec import TinyPipeline

FRAMES = 9
# The shortest clip that holds a whole segment of keyframes, and its one keyframe.
DFR_FRAMES = 25
DFR_KEYFRAME = 24


def _latents(frames: int) -> torch.Tensor:
    """Video latents in place of those another pipeline would hand over."""
    shape = (1, parts.LATENT_CHANNELS, frames, SIZE // 32, SIZE // 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _clip() -> list[Image.Image]:
    return [picture(shift=20 * index) for index in range(FRAMES)]


def _output() -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}


def _prompted() -> dict[str, Any]:
    size = {"height": SIZE, "width": SIZE}
    return {"prompt": PROMPT, "max_sequence_length": 32, **size, **_output()}


def _video() -> dict[str, Any]:
    """Two steps without guidance: one pass a step, and no difference of passes that amplifies small errors."""
    return {
        **_prompted(),
        "num_frames": FRAMES,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "spatio_temporal_guidance_blocks": None,
    }


def _audio_video() -> dict[str, Any]:
    return {
        **_video(),
        "audio_guidance_scale": 1.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "audio_guidance_rescale": 0.0,
    }


def _image_to_video() -> dict[str, Any]:
    return {**_audio_video(), "image": picture(), "image_crf": 0}


def _condition() -> dict[str, Any]:
    return {**_audio_video(), "conditions": [LTX2VideoCondition(frames=picture(), crf=0)]}


def _in_context() -> dict[str, Any]:
    return {**_audio_video(), "reference_conditions": [LTX2ReferenceCondition(frames=_clip())]}


def _hdr() -> dict[str, Any]:
    return {**_video(), "reference_conditions": [LTX2HDRReferenceCondition(frames=_clip())]}


def _dfr() -> dict[str, Any]:
    """The duration head decides on the length, and these bounds leave it one choice, `DFR_FRAMES`."""
    return {**_prompted(), "min_seconds": 1.0, "max_seconds": 1.3, "sigmas": [1.0, 0.5]}


def _temporal_refine() -> dict[str, Any]:
    audio = torch.randn((1, parts.AUDIO_LATENT_CHANNELS, 26, parts.MEL_BINS // 4), generator=torch.Generator().manual_seed(2))
    return {
        **_prompted(),
        "latents": _latents(DFR_FRAMES // 8 + 1),
        "keyframes_latents": _latents(1),
        "keyframe_positions": [DFR_KEYFRAME],
        "audio_latents": audio,
        "num_frames": DFR_FRAMES,
        "sigmas": [0.725, 0.421875],
    }


def _upsample() -> dict[str, Any]:
    return {**_output(), "latents": _latents(2), "height": SIZE, "width": SIZE}


def _decode() -> dict[str, Any]:
    return {**_output(), "latents": _latents(2)}


def _generating(pipeline: type[DiffusionPipeline], version: parts.Version) -> DiffusionPipeline:
    return pipeline(**parts.components(version))


def _build_dfr() -> DiffusionPipeline:
    return LTX2DFRPipeline(
        **parts.components("2.5"),
        prompt_enhancer=parts.prompt_enhancer(),
        duration_head=parts.duration_head("2.5"),
    )


def _build_temporal_refine() -> DiffusionPipeline:
    """This class refuses any scheduler but the ancestral one."""
    components = {**parts.components("2.5"), "scheduler": LTXEulerAncestralRFScheduler(eta=0.5)}
    return LTX2DFRTemporalRefinePipeline(**components, temporal_latent_upsampler=parts.latent_upsampler("time"))


def _build_upsample() -> DiffusionPipeline:
    return LTX2LatentUpsamplePipeline(vae=parts.video_vae(), latent_upsampler=parts.latent_upsampler("space"))


def _build_decode() -> DiffusionPipeline:
    return LTX2VideoDiffusionDecodePipeline(
        diffusion_decoder=parts.diffusion_decoder(), scheduler=FlowMatchEulerDiscreteScheduler()
    )


PIPELINES: tuple[TinyPipeline, ...] = (
    TinyPipeline("ltx2", "LTX2Pipeline", partial(_generating, LTX2Pipeline, "2.0"), _audio_video),
    TinyPipeline("ltx2.3", "LTX2Pipeline", partial(_generating, LTX2Pipeline, "2.3"), _audio_video),
    TinyPipeline(
        "ltx2-image-to-video",
        "LTX2ImageToVideoPipeline",
        partial(_generating, LTX2ImageToVideoPipeline, "2.0"),
        _image_to_video,
    ),
    TinyPipeline("ltx2-condition", "LTX2ConditionPipeline", partial(_generating, LTX2ConditionPipeline, "2.0"), _condition),
    TinyPipeline("ltx2-in-context", "LTX2InContextPipeline", partial(_generating, LTX2InContextPipeline, "2.3"), _in_context),
    TinyPipeline("ltx2-hdr", "LTX2HDRPipeline", partial(_generating, LTX2HDRPipeline, "2.3"), _hdr),
    TinyPipeline("ltx2-dfr", "LTX2DFRPipeline", _build_dfr, _dfr),
    TinyPipeline("ltx2-dfr-temporal-refine", "LTX2DFRTemporalRefinePipeline", _build_temporal_refine, _temporal_refine),
    TinyPipeline("ltx2-latent-upsample", "LTX2LatentUpsamplePipeline", _build_upsample, _upsample),
    TinyPipeline("ltx2-diffusion-decode", "LTX2VideoDiffusionDecodePipeline", _build_decode, _decode),
)
