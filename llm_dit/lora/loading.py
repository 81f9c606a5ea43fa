"""LoRAs in pipelines whose transformers are quantized: loading checks them, and fusing and unfusing are ours (`layer`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import log10
from typing import Any

import torch
from torch import nn

from ..checkpoints.again import weight_readers
from ..quantization.torchao_tensors.requantize import RAW_FLOAT8

Adapters = dict[tuple[str, str], set[str]]


@contextmanager
def loading(models: dict[str, nn.Module]) -> Iterator[None]:
    """Around diffusers' `load_lora_weights`.

    Raises:
        ValueError: if nothing of what was loaded belongs to one of `models`, or it holds NaN or infinity; it is not loaded then.
    """
    before = {id(parameter) for model in models.values() for _, parameter in _adapter_parameters(model)}
    with _sixteen_bit_stand_ins(models.values()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")  # fusing is ours, and needs none
        yield
    ...
