"""The transformers that the speed benchmark runs: the published geometries, and a tiny one of each family for the CPU.

A geometry is the transformer with random weights, made on the device that runs it, and the keyword arguments of one
step as the family's diffusers pipeline passes them. What a pipeline makes once a picture (position ids, coordinates)
is made here once too, so that a measured forward does what a step of the pipeline does and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..families import published_models

STD: Final = 0.02
"""Standard deviation of random matrices: at the widths of these models activations keep a scale near 1."""
_RESIDUAL: Final = re.compile(r"(to_out|to_out\.0|to_add_out|linear_out|net\.2|w2)\.weight$")
"""Weights whose products are added to the residual stream. They are smaller by the root of their number, as GPT-2 initializes
them: otherwise the stream grows with every block, and any rounding error with it."""

Keywords = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """A transformer and the step it is measured on, batch 1.

    Attributes:
        name: what `--geometry` takes.
        family: name of the family's module in `llm_dit.families`.
        tiny: the tiny pipeline of the same class; whole pipelines take its tokenizer and scheduler.
        build: makes the transformer in bfloat16 on a device with the same random weights at every call; "meta" works.
        inputs: from the transformer and a device, the keyword arguments of one forward.
        published: name of the published model whose sizes these are, or "" for a tiny one.
    """

    name: str
    family: str
    tiny: str
    build: Callable[[torch.device], nn.Module]
    inputs: Callable[[nn.Module, torch.device], Keywords]
    published: str = ""


def of_size(geometry: Geometry, **size: int) -> Geometry:
    """The geometry on inputs of another size, e.g. side=128, in the keywords of its row."""
    return replace(geometry, inputs=partial(geometry.inputs, **size))


def random_model(make: Callable[[], nn.Module], device: torch.device, seed: int = 0) -> nn.Module:
    """The model that `make` constructs, in bfloat16 on `device`, with random weights that `seed` fixes.

    Constructed there, not on meta and emptied: some models keep tables that are neither parameters nor buffers.
    """
    with _bfloat16_default(), torch.device(device):
        model = make()
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        residual = [name for name, _ in model.named_parameters() if _RESIDUAL.search(name)]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                norm = parameter.ndim == 1 and not name.endswith("bias")
                std = STD / len(residual) ** 0.5 if name in residual else STD
                parameter.normal_(float(norm), 0.05 if norm else std, generator=generator)
    return model.eval().requires_grad_(False)


@contextmanager
def _bfloat16_default() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _build_published(name: str, device: torch.device) -> nn.Module:
    return random_model(published_models()[name].components["transformer"], device)


def _build_tiny(name: str, device: torch.device) -> nn.Module:
    """The tiny pipeline's own weights, which let every layer be heard at its width."""
    from ..tiny import build

    return build(name).transformer.to(device).requires_grad_(False)


def _noise(device: torch.device, *shape: int, seed: int = 1) -> Tensor:
    """Standard normal bfloat16; empty on meta."""
    if device.type == "meta":
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), dtype=torch.bfloat16, device=device)


def _klein(model: Any, device: torch.device, side: int, text: int) -> Keywords:
    """`Flux2KleinPipeline.__call__`: `side` x `side` image tokens, ids made once, no guidance embedding."""
    from diffusers import Flux2KleinPipeline

    latents = _noise(device, 1, model.config.in_channels, side, side)
    prompt = _noise(device, 1, text, model.config.joint_attention_dim, seed=2)
    return {
        "hidden_states": latents.flatten(2).transpose(1, 2).contiguous(),
        "timestep": torch.full((1,), 0.7, dtype=torch.bfloat16, device=device),
        "guidance": None,
        "encoder_hidden_states": prompt,
        "txt_ids": Flux2KleinPipeline._prepare_text_ids(prompt).to(device),
        "img_ids": Flux2KleinPipeline._prepare_latent_ids(latents).to(device),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _qwen_image(model: Any, device: torch.device, side: int, text: int) -> Keywords:
    """`QwenImagePipeline.__call__`: the mask of a prompt without padding is None there."""
    return {
        "hidden_states": _noise(device, 1, side * side, model.config.in_channels),
        "timestep": torch.full((1,), 0.7, dtype=torch.bfloat16, device=device),
        "guidance": None,
        "encoder_hidden_states_mask": None,
        "encoder_hidden_states": _noise(device, 1, text, model.config.joint_attention_dim, seed=2),
        "img_shapes": [[(1, side, side)]],
        "attention_kwargs": {},
        "return_dict": False,
    }


def _z_image(model: Any, device: torch.device, side: int, text: int) -> Keywords:
    """`ZImagePipeline.__call__`: lists of one picture and one prompt, patches of 2 x 2 cut by the transformer itself."""
    return {
        "x": [_noise(device, model.in_channels, 1, 2 * side, 2 * side)],
        "t": torch.full((1,), 0.3, device=device),
        "cap_feats": [_noise(device, text, model.config.cap_feat_dim, seed=2)],
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def _ltx2(model: Any, device: torch.device, frames: int, height: int, width: int, audio: int, text: int) -> Keywords:
    """`LTX2Pipeline.__call__`: sizes in latents; coordinates made once; the connectors leave a mask of ones."""
    config = model.config
    timestep = torch.full((1,), 700.0, device=device)
    mask = torch.ones((1, text), dtype=torch.int64, device=device)
    return {
        "hidden_states": _noise(device, 1, frames * height * width, config.in_channels),
        "audio_hidden_states": _noise(device, 1, audio, config.audio_in_channels, seed=2),
        "encoder_hidden_states": _noise(device, 1, text, config.cross_attention_dim, seed=3),
        "audio_encoder_hidden_states": _noise(device, 1, text, config.audio_cross_attention_dim, seed=4),
        "timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 24.0,
        "audio_num_frames": audio,
        "video_coords": model.rope.prepare_video_coords(1, frames, height, width, device, fps=24.0),
        "audio_coords": model.audio_rope.prepare_audio_coords(1, audio, device),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _published(name: str, model: str, family: str, tiny: str, inputs: Callable[..., Keywords]) -> Geometry:
    return Geometry(name, family, tiny, partial(_build_published, model), inputs, model)


def _tiny(name: str, family: str, tiny: str, inputs: Callable[..., Keywords]) -> Geometry:
    return Geometry(name, family, tiny, partial(_build_tiny, tiny), inputs)


_1024: Final[Keywords] = {"side": 64, "text": 512}
"""1024 x 1024 pixels: 4096 image tokens, and 512 text tokens."""
_TINY: Final[Keywords] = {"side": 8, "text": 32}
_CLIP: Final[Keywords] = {"frames": 16, "height": 16, "width": 24, "audio": 126, "text": 1024}
"""121 frames of 768 x 512 at 24 a second: 6144 video tokens, 126 of audio, 1024 of text."""
_TINY_CLIP: Final[Keywords] = {"frames": 2, "height": 4, "width": 4, "audio": 9, "text": 32}

_ROWS: Final = (
    _published("klein-9b", "klein-9b", "flux2", "flux2-klein", partial(_klein, **_1024)),
    _published("klein-4b", "klein-4b", "flux2", "flux2-klein", partial(_klein, **_1024)),
    _published("qwen-image", "qwen-image", "qwen_image", "qwen-image", partial(_qwen_image, **_1024)),
    _published("ltx-2.3", "ltx-2.3", "ltx2", "ltx2.3", partial(_ltx2, **_CLIP)),
    _published("z-image", "z-image-turbo", "z_image", "z-image", partial(_z_image, **_1024)),
    _tiny("tiny-klein", "flux2", "flux2-klein", partial(_klein, **_TINY)),
    _tiny("tiny-qwen-image", "qwen_image", "qwen-image", partial(_qwen_image, **_TINY)),
    _tiny("tiny-ltx-2.3", "ltx2", "ltx2.3", partial(_ltx2, **_TINY_CLIP)),
    _tiny("tiny-z-image", "z_image", "z-image", partial(_z_image, **_TINY)),
)

GEOMETRIES: Final[Mapping[str, Geometry]] = {row.name: row for row in _ROWS}
