"""Compiling a transformer, block by block where its class allows it, and capturing it in CUDA graphs."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from .cheaper_arithmetic import CheaperArithmetic
from .graphs import graph_forward
from .names import EAGER_GRAPH_MODE, GRAPH_MODE, GRAPH_MODES


def compile_component(model: Any, mode: str) -> None:
    """Compiles `model` in place.

    Regional compilation compiles one block for all that are alike: seconds where the whole model takes minutes. It is
    used where the diffusers class names its repeated blocks.

    Args:
        mode: a mode of `torch.compile`, or "cuda-graph": compiled with the default mode, and the whole forward, compiled blocks
            and all between them, captured in CUDA graphs (`llm_dit.graphs`); or "cuda-graph-eager": captured and not compiled.

    Raises:
        ValueError: for a mode that captures without a CUDA device.
    """
    if mode in GRAPH_MODES and not torch.cuda.is_available():
        raise ValueError(f"compile_mode={mode!r} captures CUDA graphs, and there is no CUDA device: use 'default'")
    if mode == EAGER_GRAPH_MODE:
        graph_forward(model)
        return
    options = _options("default" if mode == GRAPH_MODE else mode)
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(options=options)
        if mode == GRAPH_MODE:
            graph_forward(model)
    elif mode == GRAPH_MODE:  # the capture must stand around what is compiled, and `compile` stands around `forward`
        graph_forward(model, MethodType(torch.compile(type(model).forward, options=options), model))
    else:
        model.compile(options=options)


def _options(mode: str) -> dict[str, Any]:
    """What `mode` stands for, and our passes; `torch.compile` takes either a mode or options."""
    from torch._inductor import list_mode_options

    return {**list_mode_options(mode), "post_grad_custom_pre_pass": CheaperArithmetic()}
