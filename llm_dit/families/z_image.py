"""Z-Image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from ..checkpoints.encoders import Unread
from ..checkpoints.names import OfficialName, Part, encoder_part
from ..forwards import Forwards, Keywords, Size, image_latents, noise, prompt_tokens
from ..mixin import QuantizablePipelineMixin
from ..published_encoders import qwen3_4b_base
from ..splitting import Arguments, Share, Splitting
from .base import Encoding, Family, Generation, Published


def _flux1_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


_OFFICIAL = (
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1.", "x_embedder."),
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
)


def _official_name(name: str) -> OfficialName:
    """The authors' name: q, k and v are one weight."""
    fused = re.fullmatch(r"(.+\.attention)\.to_([qkv])\.(.+)", name)
    if fused is not None:
        return OfficialName(f"{fused[1]}.qkv.{fused[3]}", "qkv".index(fused[2]))
    for ours, theirs in _OFFICIAL:
        name = name.replace(ours, theirs)
    return OfficialName(name)


def _split_plan(transformer: Any) -> Mapping[str, Any]:
    """diffusers has none for this class: each of three stacks of blocks is split before its first and gathered after its last.

    Masks stay whole: after the exchange of heads every process has the whole sequence, in its order.
    """
    plan: dict[str, Any] = {}
    for stack in ("noise_refiner", "context_refiner", "layers"):
        blocks = getattr(transformer, stack)
        if len(blocks):
            plan[f"{stack}.0"] = {"x": ContextParallelInput(1, 3)}
            plan[f"{stack}.*"] = {"freqs_cis": ContextParallelInput(1, 3)}
            plan[f"{stack}.{len(blocks) - 1}"] = ContextParallelOutput(1, 3)
    return plan


def _split_arguments(keywords: Arguments, share: Share) -> Arguments:
    """Texts and pictures are padded to multiples of 32 tokens by the transformer itself."""
    share.refuse(keywords, "controlnet_block_samples", "siglip_feats")
    share.check(SEQ_MULTI_OF, "text and image", f"start a number of processes that divides {SEQ_MULTI_OF}")
    lengths = {-(-len(text) // SEQ_MULTI_OF) for text in keywords["cap_feats"]}
    share.refuse_masks(len(lengths) > 1)
    return {}


_TEXT_TOKENS = 512
"""`max_sequence_length` of the pipelines, to which they pad for encoding."""


def _step(model: Any, device: torch.device, size: Size) -> Keywords:
    """`ZImagePipeline.__call__`: lists of pictures and prompts, patches of 2 x 2 latents cut by the transformer itself."""
    picture = (model.in_channels, 1, size.height // 8, size.width // 8)
    return {
        "x": [noise(device, *picture) for _ in range(size.batch)],
        "t": torch.full((size.batch,), 0.3, device=device),
        "cap_feats": [noise(device, size.text or _TEXT_TOKENS, model.config.cap_feat_dim, seed=2) for _ in range(size.batch)],
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _encode(model: Any, device: torch.device, size: Size) -> Any:
    """`_encode_prompt`: all hidden states, of which the last but one is taken."""
    tokens = prompt_tokens(device, size.batch, size.text or _TEXT_TOKENS)
    return model(**tokens, output_hidden_states=True).hidden_states[-2]


FAMILY = Family(
    name="z_image",
    title="Z-Image",
    official_name=_official_name,
    extra_roles={"controlnet": "transformer", "siglip": "encoder"},
    parts={"transformer": Part(), "text_encoder": encoder_part(Unread(("lm_head",), layers_read=lambda count: count - 1))},
    splitting={"ZImageTransformer2DModel": Splitting(_split_plan, _split_arguments)},
    encoding=Encoding(("prompt_embeds", "negative_prompt_embeds"), together=True),
    forwards=Forwards(_step, image_latents, {"text_encoder": _encode}),
    generation=Generation({"num_inference_steps": 9, "guidance_scale": 0.0, "height": 1024, "width": 1024}),
    published=(
        Published(
            "z-image-turbo",
            "Tongyi-MAI/Z-Image-Turbo",
            "ZImagePipeline",
            {"text_encoder": qwen3_4b_base, "transformer": ZImageTransformer2DModel, "vae": _flux1_vae},
            "defaults of ZImageTransformer2DModel; Qwen3-4B; the VAE of FLUX.1",
        ),
    ),
)


class _ZImage(QuantizablePipelineMixin):
    family = FAMILY


class QuantizableZImagePipeline(_ZImage, ZImagePipeline):
    """Text to image."""


class QuantizableZImageImg2ImgPipeline(_ZImage, ZImageImg2ImgPipeline):
    """Image and text to image."""


class QuantizableZImageInpaintPipeline(_ZImage, ZImageInpaintPipeline):
    """Fills a masked region."""


class QuantizableZImageControlNetPipeline(_ZImage, ZImageControlNetPipeline):
    """Text to image under a control image."""


class QuantizableZImageControlNetInpaintPipeline(_ZImage, ZImageControlNetInpaintPipeline):
    """Fills a masked region under a control image."""


class QuantizableZImageOmniPipeline(_ZImage, ZImageOmniPipeline):
    """Text and reference images, read by SigLIP, to image."""
