"""Tiny models and the official files made from them, for all tests of loading; and what diffusers says the files stand for.

The tiny pipelines have random weights, and their blocks add as much to the stream as they find in it, so that an error of one
layer grows in the next: the rounding of e4m3 alone moves one forward of their transformers by .009 (FLUX.2 klein) to .08
(Z-Image) of its norm, whoever loads the file. In trained models the stream is much larger than what one block adds. `folder`
makes the tiny ones alike: what embeds pictures and prompts into the stream is 4 to 32 times as large, the least that will do,
and nothing else is changed. Every block normalizes what it reads, so none computes on other magnitudes than before, and
every one is still heard: `test_loading.py` checks that a block with its rows out of order moves the output by more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import generate
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from official_names import official_names
from safetensors.torch import load_file
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor
from writer import FP8, LAYOUTS, Layout, write

from llm_dit import load_pipeline

BF16 = torch.bfloat16
FAMILIES = {
    "z-image": "z_image",
    "flux2-klein": "flux2",
    "flux2-dev": "flux2",
    "qwen-image": "qwen_image",
    "ltx2": "ltx2",
    "ltx2.3": "ltx2",
}
FP8_FILES = [
    (name, layout)
    for name in FAMILIES
    for layout in LAYOUTS
    # The MLPs of the tiny klein are 170 wide, so that a file with nothing but MLPs in fp8 has none.
    if layout != "bf16" and (name, layout) != ("flux2-klein", "mixed")
]
"""Every model with every layout of fp8."""
EMBEDDERS = ("x_embedder", "context_embedder", "proj_in", "audio_proj_in", "img_in", "txt_in")
EMBEDDERS_Z_IMAGE = ("all_x_embedder.2-1", "cap_embedder.1")
AMPLIFICATION = {"z-image": 16, "flux2-klein": 4, "flux2-dev": 8, "qwen-image": 16, "ltx2": 16, "ltx2.3": 32}


@cache
def folder(tiny: Callable[[str], Path], name: str) -> Path:
    """A copy of a tiny pipeline in whose transformer errors do not grow: see the top of this file."""
    tiny_folder = tiny(name)
    pipe = DiffusionPipeline.from_pretrained(tiny_folder, dtype=BF16)
    found = [pipe.transformer.get_submodule(name) for name in (*EMBEDDERS, *EMBEDDERS_Z_IMAGE) if _has(pipe.transformer, name)]
    assert len(found) == 2
    with torch.no_grad():
        for module in found:
            for parameter in module.parameters():
                parameter.mul_(AMPLIFICATION[name])
    path = tiny_folder.with_name(f"{tiny_folder.name}-trained")
    pipe.save_pretrained(path)
    return path


def _has(model: nn.Module, name: str) -> bool:
    return any(name == module for module, _ in model.named_modules())


@cache
def transformer(source: Path) -> nn.Module:
    """The bf16 transformer of a saved pipeline; not to be changed."""
    return DiffusionPipeline.from_pretrained(source, dtype=BF16).transformer


@cache
def inputs(source: Path, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the transformer of a pipeline is called with in its first step."""
    pipe = DiffusionPipeline.from_pretrained(source, dtype=BF16)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    pipe.transformer.register_forward_pre_hook(lambda model, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    generate(pipe, name)
    return calls[0]


def forward(model: nn.Module, source: Path, name: str) -> Tensor:
    """What `model` makes of these inputs, flat."""
    args, kwargs = inputs(source, name)
    with torch.no_grad():
        result = model(*args, **kwargs)
    return torch.cat(_flat(result if isinstance(result, tuple) else result.to_tuple()))


def _flat(value: Any) -> list[Tensor]:
    if torch.is_tensor(value):
        return [value.float().flatten()]
    return [tensor for item in value for tensor in _flat(item)]


@cache
def reference(source: Path, name: str) -> Tensor:
    """What the bf16 model makes of them."""
    return forward(transformer(source), source, name)


def official(source: Path, name: str) -> dict[str, Tensor]:
    """The tensors of the transformer by their official names."""
    return official_names(FAMILIES[name], transformer(source).state_dict())


@cache
def checkpoint(source: Path, name: str, layout: str | Layout) -> tuple[Path, dict[str, Tensor]]:
    """A file of the transformer in a layout, and the float32 values that it stands for; not to be changed."""
    how = LAYOUTS[layout] if isinstance(layout, str) else layout
    path = source.with_name(f"{source.name}-{how.name}.safetensors")
    return path, write(path, official(source, name), how)


def load(source: Path, file: Path | str | None = None, **keywords: Any) -> Any:
    """The pipeline without its other large parts, its transformer from `file`."""
    without = {"text_encoder": None, "vae": None}
    return load_pipeline(source, **{"torch_dtype": BF16, "transformer_file": file, **without, **keywords})


def converted(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` through diffusers' own conversion, which handles weights only, and the renames of LTX-2.3 that it lacks."""
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
    result = convert(checkpoint=dict(tensors), config=dict(model.config))
    return {name.replace("prompt_adaln_single.", "prompt_adaln."): tensor for name, tensor in result.items()}


def stored(path: Path, keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that are weights, without the prefix."""
    contents = load_file(path)
    prefix = "" if next(iter(keys)) in contents else "model.diffusion_model."
    return {key: contents[prefix + key] for key in keys}


def fp8_bytes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bytes of what is fp8 and zeros, of the same shape, for the rest; a converter takes them for weights."""
    return {
        key: tensor.view(torch.uint8) if tensor.dtype == FP8 else torch.zeros(tensor.shape, dtype=torch.uint8)
        for key, tensor in tensors.items()
    }


def fp8_mask(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ones for what is fp8."""
    return {key: torch.full(tensor.shape, int(tensor.dtype == FP8)) for key, tensor in tensors.items()}


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that make up a weight, quantized or not."""
    if isinstance(tensor, nn.Parameter):
        tensor = tensor.data
    if isinstance(tensor, TorchAOBaseTensor):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    return [tensor]


def same_weights(model: nn.Module, other: nn.Module) -> None:
    """Asserts that two models have the same weights, quantized alike, to the bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert type(tensor) is type(theirs[name]), name
        for part, expected in zip(parts(tensor), parts(theirs[name]), strict=True):
            assert same_bits(part, expected), name


def same_bits(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and tensor.shape == other.shape and torch.equal(_bytes(tensor), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
