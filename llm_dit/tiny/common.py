"""What the tiny pipelines of all families share: prompt, pictures, and weights that let every layer be heard.

Constructors leave some parameters at zero and scale others so that every branch is faint; then a layer that was quantized
badly, or not loaded at all, would go unnoticed. The functions here give a model random weights that keep the variance of what
passes through, the same at every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..building import default_dtype

SIZE = 64
"""Side of every picture in pixels: the least that FLUX.2 and Omni accept as a reference."""

PROMPT = "a red circle above a blue square"


def picture(shift: int = 0) -> Image.Image:
    """Colour gradients, the same at every call; `shift` moves them, for a second picture that differs."""
    rows, columns = np.indices((SIZE, SIZE))
    channels = [4 * rows + shift, 4 * columns, 2 * (rows + columns) + shift]
    return Image.fromarray(np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8))


def mask() -> Image.Image:
    """White, to paint anew, on the left half."""
    return Image.fromarray(np.where(np.indices((SIZE, SIZE))[1] < SIZE // 2, 255, 0).astype(np.uint8))


@contextmanager
def bfloat16_construction() -> Iterator[None]:
    """Models are constructed in bfloat16 here, and the global random state is as before afterwards.

    Constructed, not cast: `from_pretrained` does the same, so that buffers which no checkpoint stores are rounded alike and a
    reloaded model is the built one, bit for bit.
    """
    with default_dtype(torch.bfloat16), torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


def seeded(make: Callable[[], Any], seed: int) -> Any:
    """The model that `make` constructs, every parameter of it drawn anew."""
    with bfloat16_construction():
        model = make().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.02 * noise)
            else:
                parameter.copy_(1 + 0.05 * noise)
    return model


def _fan_in(module: nn.Module) -> float:
    """How many products make one output of a Linear or a convolution."""
    weight = cast(torch.Tensor, module.weight)
    if getattr(module, "transposed", False):
        strides = cast(tuple[int, ...], module.stride)
        return weight.shape[0] * weight[0, 0].numel() / math.prod(strides)
    return weight[0].numel()


def seeded_layers(make: Callable[[], Any], seed: int = 0) -> Any:
    """The model that `make` constructs, its layers drawn anew; of the rest only what is all zeros, for it may be tables."""
    with bfloat16_construction():
        torch.default_generator.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d):
                module.weight.normal_(std=_fan_in(module) ** -0.5)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and not tensor.any():
                tensor.normal_(std=0.02)
    return model.eval()
