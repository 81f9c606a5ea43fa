"""The transformers that the speed benchmark runs: the published geometries, and a tiny one of each family for the CPU.

A geometry is the transformer with random weights, made on the device that runs it, and the keyword arguments of one
step as the family's diffusers pipeline passes them. What a pipeline makes once a picture (position ids, coordinates)
is made here once too, so that a measured forward does what a step of the pipeline does and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from ..building import default_dtype
from ..families import get_family, published_models
from ..forwards import Keywords, Size
from ..names import check_name

STD: Final = 0.02
"""Standard deviation of random matrices: at the widths of these models activations keep a scale near 1."""
_RESIDUAL: Final = re.compile(r"(to_out|to_out\.0|to_add_out|linear_out|net\.2|w2)\.weight$")
"""Weights whose products are added to the residual stream. They are smaller by the root of their number, as GPT-2 initializes
them: otherwise the stream grows with every block, and any rounding error with it."""


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


def of_size(geometry: Geometry, size: Size) -> Geometry:
    """The geometry on inputs of another size."""
    return replace(geometry, inputs=partial(_step, geometry.family, size))


def random_model(make: Callable[[], nn.Module], device: torch.device, seed: int = 0) -> nn.Module:
    """The model that `make` constructs, in bfloat16 on `device`, with random weights that `seed` fixes.

    Constructed there, not on meta and emptied: some models keep tables that are neither parameters nor buffers.
    """
    with default_dtype(torch.bfloat16), torch.device(device):
        model = make().to(device)  # which a tiny one, made before, is not yet on
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        residual = [name for name, _ in model.named_parameters() if _RESIDUAL.search(name)]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                norm = parameter.ndim == 1 and not name.endswith("bias")
                std = STD / len(residual) ** 0.5 if name in residual else STD
                parameter.normal_(float(norm), 0.05 if norm else std, generator=generator)
    return model.eval().requires_grad_(False)


def _build_published(name: str, device: torch.device) -> nn.Module:
    return random_model(published_models()[name].components["transformer"], device)


def _build_tiny(name: str, device: torch.device) -> nn.Module:
    """The tiny pipeline's own weights, which let every layer be heard at its width."""
    from ..tiny import build

    return build(name).transformer.to(device).requires_grad_(False)


def _step(family: str, size: Size, model: Any, device: torch.device) -> Keywords:
    return get_family(family).forwards.step(model, device, size)


def _published(name: str, model: str, family: str, tiny: str, size: Size) -> Geometry:
    return Geometry(name, family, tiny, partial(_build_published, model), partial(_step, family, size), model)


def _tiny(name: str, family: str, tiny: str, size: Size) -> Geometry:
    return Geometry(name, family, tiny, partial(_build_tiny, tiny), partial(_step, family, size))


_PICTURE: Final = Size(1024, 1024, text=512)
"""4096 image tokens, and 512 text tokens."""
_TINY: Final = Size(128, 128, text=32)
_CLIP: Final = Size(512, 768, frames=121)
"""At 24 frames a second: 6144 video tokens, 126 of audio, 1024 of text."""
_TINY_CLIP: Final = Size(128, 128, frames=9, text=32)

_ROWS: Final = (
    _published("klein-9b", "klein-9b", "flux2", "flux2-klein", _PICTURE),
    _published("klein-4b", "klein-4b", "flux2", "flux2-klein", _PICTURE),
    _published("qwen-image", "qwen-image", "qwen_image", "qwen-image", _PICTURE),
    _published("ltx-2.3", "ltx-2.3", "ltx2", "ltx2.3", _CLIP),
    _published("z-image", "z-image-turbo", "z_image", "z-image", _PICTURE),
    _tiny("tiny-klein", "flux2", "flux2-klein", _TINY),
    _tiny("tiny-qwen-image", "qwen_image", "qwen-image", _TINY),
    _tiny("tiny-ltx-2.3", "ltx2", "ltx2.3", _TINY_CLIP),
    _tiny("tiny-z-image", "z_image", "z-image", _TINY),
)

GEOMETRIES: Final[Mapping[str, Geometry]] = {row.name: row for row in _ROWS}


def check_geometry(name: str) -> str:
    """The name; raises ValueError for an unknown one, and without a GPU for one of the published sizes."""
    check_name(name, tuple(GEOMETRIES), "geometry")
    if GEOMETRIES[name].published and not torch.cuda.is_available():
        small = next(row.name for row in _ROWS if row.tiny == GEOMETRIES[name].tiny and not row.published)
        raise ValueError(f"{name} has its published size and is measured on a GPU, and there is none here: use {small!r}")
    return name
