"""Filling a component from a checkpoint file: fp8 bytes as they are, the rest in 16 bits or quantized while it is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, PerRow, PerTensor
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..quantization.probe import raw_finite
from ..quantization.torchao_tensors.fused import as_fused, zero_row_bound
from ..quantization.torchao_tensors.staging import drain_staging, move_to_gpu
from ..quantization.torchao_tensors.static import StaticFloat8Tensor
from ..quantization.torchao_tensors.stream import quantize_weight
from .names import Piece
from .plan import Plan, full_precision, input_scale, listed, opened


def load_component(model: nn.Module, plan: Plan, device: torch.device) -> None:
    """Fills `model` on `device` as planned; the bf16 model never exists whole."""
    by_weight = {layer.parameter: layer for layer in plan.layers if layer.config is not None}
    buffers = dict(model.named_buffers())
    finite: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad(), opened(plan.layout) as file:
        for name, found in tqdm(plan.pieces.items(), desc=f"Reading {type(model).__name__}", delay=2, leave=False):
            if name in plan.kept:
                qdata = _placed(_joined([_rows(file, piece) for piece in found]), device)
                finite[name] = raw_finite(qdata)
                value = _float8(plan, name, found, qdata)
            else:
                value = _dense(plan, found, file)
                layer = by_weight.get(name)
                value = (
                    quantize_weight(value, layer.config, device, wait=False) if layer and layer.config else _placed(value, device)
                )
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if name in buffers:
                module._buffers[leaf] = value
            else:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for module in model.modules():  # tables that no file holds, e.g. of rotary embeddings
            module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None})
        if isinstance(model, PreTrainedModel):
            model.tie_weights()
    drain_staging()
    _check_finite(plan, finite)


def read_weight(plan: Plan, name: str) -> Tensor:
    """A parameter, on the host, as it was read before it was quantized."""
    with opened(plan.layout) as file:
        return _dense(plan, plan.pieces[name], file)


def _check_finite(plan: Plan, finite: dict[str, Tensor]) -> None:
    """Raises ValueError for the weights that hold NaN; waits for the device once, and not for every weight."""
    flags = torch.stack(list(finite.values())).tolist() if finite else []
    keys = [piece.key for name, sound in zip(finite, flags, strict=True) if not sound for piece in plan.pieces[name]]
    if keys:
        raise ValueError(f"{plan.layout.header.path}: {listed(keys)} holds NaN, from which every picture would be black")


def _float8(plan: Plan, name: str, found: tuple[Piece, ...], qdata: Tensor) -> Tensor:
    """The file's fp8 rows, on their device, as a weight: their bytes and scales are the file's."""
    wanted, device = plan.wanted, qdata.device
    row_scales = torch.cat([_row_scales(plan, piece) for piece in found])
    one_value = bool((row_scales == row_scales[0]).all())
    scale = row_scales.to(device)
    rows, columns = qdata.shape
    dynamic = wanted.method.quantizes_activations and not full_precision(plan, name)
    fixed = input_scale(plan, name) if wanted.static and dynamic else None
    if fixed is not None:
        return StaticFloat8Tensor(qdata, scale, fixed.reshape(1, 1).to(device), wanted.dtype)
    # torchao takes a scale [1, 1] over a 128 x 128 weight for DeepSeek's blockwise layout, so that size gets row scales.
    one_scale = wanted.granularity == "per-tensor" and (rows, columns) != (128, 128) and one_value
    mm_config = Float8MMConfig(use_fast_accum=True) if dynamic else None
    activation = QuantizeTensorToFloat8Kwargs(
        granularity=PerTensor() if one_scale else PerRow(), mm_config=mm_config, hp_value_lb=zero_row_bound(wanted.dtype)
    )
    return as_fused(
        Float8Tensor(
            qdata,
            scale[:1].clone() if one_scale else scale,
            block_size=[rows if one_scale else 1, columns],
            mm_config=mm_config,
            act_quant_kwargs=activation if dynamic else None,
            dtype=wanted.dtype,
        )
    )


def _dense(plan: Plan, found: tuple[Piece, ...], file: Any) -> Tensor:
    """The rows as one tensor on the host, in the dtype of the component if they are floats."""
    parts = []
    for piece in found:
        rows = _rows(file, piece)
        weight = plan.layout.fp8.get(piece.key)
        if weight is not None:
            values = rows.float()
            if weight.scale is not None:
                values *= _row_scales(plan, piece).reshape(-1, *[1] * (values.ndim - 1))
            rows = values
        parts.append(rows.to(plan.wanted.dtype) if rows.is_floating_point() else rows)
    return _joined(parts)


def _rows(file: Any, piece: Piece) -> Tensor:
    """A piece, mapped from the file and not yet read."""
    tensor = file.get_tensor(piece.key)
    return tensor[piece.start : piece.stop] if tensor.ndim else tensor


def _row_scales(plan: Plan, piece: Piece) -> Tensor:
    """[rows, 1] float32: the scale of each row of a piece, 1 where the file cast without scales."""
    key = plan.layout.fp8[piece.key].scale
    rows = piece.stop - piece.start
    if key is None:
        return torch.ones(rows, 1)
    scale = plan.scales[key]
    return (scale.expand(rows) if scale.numel() == 1 else scale[piece.start : piece.stop]).reshape(rows, 1).clone()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _placed(value: Tensor, device: torch.device) -> Tensor:
    return move_to_gpu(value, device) if device.type == "cuda" else value.to(device)
