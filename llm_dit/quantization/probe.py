"""A short check, right after loading, that no quantized weight makes NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from .detect import FP8_DTYPES
from .sizes import plain_parts


def probe_finite(model: nn.Module) -> None:
    """Checks the quantized weights of `model`.

    Every scale must be finite. Of every kind of quantized Linear (layout and shape) one is run on a row of noise and a
    row of zeros, the row that makes unguarded fp8 divide zero by zero.

    Raises:
        RuntimeError: naming the layers that failed.
    """
    bad, probed = [], set()
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.is_meta:
                continue
            kind = (type(weight), type(module), tuple(weight.shape))
            if isinstance(weight, TorchAOBaseTensor):
                finite = _scales_finite(weight) and (kind in probed or _runs_finite(module, weight))
            elif weight.dtype in FP8_DTYPES:
                finite = kind in probed or bool(torch.isfinite(weight.to(torch.bfloat16)).all())
            else:
                continue
            probed.add(kind)
            if not finite:
                bad.append(name)
    if bad:
        listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise RuntimeError(
            f"quantized layers of {type(model).__name__} give NaN or infinity: {listed}. "
            "Check the checkpoint's weights, or leave these layers in bf16 with skip patterns"
        )


def _scales_finite(weight: TorchAOBaseTensor) -> bool:
    floats = [part for part in plain_parts(weight) if part.dtype in (torch.float32, torch.bfloat16, torch.float16)]
    return all(bool(torch.isfinite(part).all()) for part in floats)


def _runs_finite(module: nn.Module, weight: Tensor) -> bool:
    if not isinstance(module, nn.Linear):
        return True
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, module.in_features, generator=generator).to(weight.device, weight.dtype)
    output = nn.functional.linear(torch.cat((rows, torch.zeros_like(rows))), weight)
    return bool(torch.isfinite(output).all())
