"""A short check, right after loading, that no quantized weight makes NaN or infinity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from .detect import FP8_DTYPES
from .sizes import plain_parts
from .torchao_tensors.stream import row_chunks


def probe_finite(model: nn.Module) -> None:
    """Checks the quantized weights of `model`.

    Every scale must be finite, and so must raw fp8 weights. Of every layout the smallest weight is looked at too; a large one
    would take more memory than the load. One of ours is dequantized on the host: a process's first multiplication on a GPU loads
    libraries and compiles kernels for over a second, which the first call of the pipeline needs and a load does not. A Linear of
    stock torchao's is run, on a row of noise and a row of zeros, for which unguarded fp8 divides zero by zero.

    Raises:
        RuntimeError: naming the layers that failed.
    """
    bad: list[str] = []
    smallest: dict[type, tuple[str, nn.Linear]] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or weight.is_meta:
                continue
            if isinstance(weight, TorchAOBaseTensor):
                if not _scales_finite(weight):
                    bad.append(name)
                _, least = smallest.get(type(weight), ("", None))
                if isinstance(module, nn.Linear) and (least is None or weight.numel() < least.weight.numel()):
                    smallest[type(weight)] = (name, module)
            elif weight.dtype in FP8_DTYPES and not raw_finite(weight):
                bad.append(name)
        bad += [name for name, module in smallest.values() if name not in bad and not _works(module)]
    if bad:
        listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise RuntimeError(
            f"quantized layers of {type(model).__name__} give NaN or infinity: {listed}. "
            "Check the checkpoint's weights, or leave these layers in bf16 with skip patterns"
        )


def raw_finite(weight: Tensor) -> Tensor:
    """A boolean on the weight's device, not waited for: False if the float8 weight holds NaN or, in e5m2, infinity.

    Read in chunks, from the bits.
    """
    limit = 0x7E if weight.dtype == torch.float8_e4m3fn else 0x7B
    bits = weight.view(torch.uint8)
    return torch.stack([((bits[chunk] & 0x7F) <= limit).all() for chunk in row_chunks(bits, weight.device)]).all()


def _scales_finite(weight: TorchAOBaseTensor) -> bool:
    floats = [part for part in plain_parts(weight) if part.dtype in (torch.float32, torch.bfloat16, torch.float16)]
    return all(bool(torch.isfinite(part).all()) for part in floats)


def _works(module: nn.Linear) -> bool:
    weight: Any = module.weight
    if type(weight).__module__.startswith("torchao."):
        return _runs_finite(module)
    return bool(torch.isfinite(weight.to("cpu").dequantize()).all())


def _runs_finite(module: nn.Linear) -> bool:
    weight = module.weight
    if weight.device.type == "cpu" and torch.cuda.is_available():
        weight = weight.to("cuda")  # where it will run; not every torch multiplies fp8 by row scales on the CPU
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, module.in_features, generator=generator).to(weight.device, weight.dtype)
    output = nn.functional.linear(torch.cat((rows, torch.zeros_like(rows))), weight)
    return bool(torch.isfinite(output).all())
