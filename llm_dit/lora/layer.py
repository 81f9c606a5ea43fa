"""peft's LoRA layer with fusing that rounds once and is undone exactly, over quantized weights and those left in 16 bits.

peft's own (`TorchaoLoraLinear`) dequantizes, adds and quantizes again in new memory, for the int8 and fp8 of torchao's
configurations only; a second fusing starts from the rounded sum of the first, and in 16 bits subtraction leaves its rounding
behind. This one starts from the original each time (`originals`) and writes into the memory of the weight, so that compiled code
and graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from ..checkpoints.again import Reader
from ..quantization.detect import FP8_DTYPES
from ..quantization.torchao_tensors.requantize import requantize_, requantizing_config
from ..quantization.torchao_tensors.stream import fetch, row_chunks
from .originals import Original, dequantized, original_of


class ExactLoraLinear(LoraLinear):
    """A Linear, quantized or not, with LoRA branches beside it; made of a peft layer by `adopt`."""

    readers: Callable[[], Iterable[Reader]]
    """Ways to read the weight again, asked for when something is fused for the first time."""
    original: Original | None = None
    """The weight without what is fused into it; None while nothing is."""
    fused: dict[str, float]
    """The scaling of every adapter when it was fused."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuses adapters, by default the active ones, in addition to those that are fused already.

        What is more than a LoRA (DoRA, biases) is left to peft where the weight is not quantized.

        Raises:
            ValueError: if the sum is not finite, or an adapter is more than a LoRA and the weight quantized, or offloaded
                layer by layer; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        weight: Any = self.get_base_layer().weight
        strange = [name for name in names if name in self.lora_variant or self.lora_bias.get(name)]
        if strange and self.original is None and type(weight.data) is Tensor and weight.dtype not in FP8_DTYPES:
            super().merge(safe_merge, names)
            return
        if strange or (self.merged_adapters and self.original is None):
            raise ValueError(
                f"adapter {(strange or self.merged_adapters)[0]!r} is more than a LoRA (DoRA, or one with biases), which cannot "
                "be fused into a quantized weight, nor with others: leave it unfused, or fuse it in bf16 and quantize then"
            )
        if weight.is_meta:
            raise ValueError("the weights are offloaded one by one and are not there to be fused into: fuse before offloading")
        original = self.original or original_of(weight, self.readers())
        self._hold(original, {**self.fused, **{name: float(self.scaling[name]) for name in names}})

    def unmerge(self) -> None:
        """Undoes all fusing: the weight has the bits that it had before."""
        if self.original is None:
            if self.merged_adapters:
                super().unmerge()
            return
        weight: Any = self.get_base_layer().weight
        self.original.restore(weight)
        self.original, self.fused = None, {}
        self.merged_adapters.clear()

    def back_to(self, fused: dict[str, float]) -> None:
        """Leaves fused what `fused` says and nothing else; after a fusing that failed on another layer."""
        if fused == self.fused:
            return
        if fused and self.original is not None:
            self._hold(self.original, fused)
        else:
            self.unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft, where what a fused adapter added stays: it is part of the weight from now on, and not undone any more.

        Raises:
            ValueError: if others are fused with it, of which it could not be told apart.
        """
        if adapter_name in self.fused:
            others = ", ".join(name for name in self.fused if name != adapter_name)
            if others:
                raise ValueError(
                    f"adapter {adapter_name!r} is fused together with {others}: call unfuse_lora() before it is deleted"
                )
            self.original, self.fused = None, {}
            self.merged_adapters.clear()
        super().delete_adapter(adapter_name)

    def _hold(self, original: Original, fused: dict[str, float]) -> None:
        """Writes `original` plus what is `fused` into the weight."""
        weight: Any = self.get_base_layer().weight
        requantize_(weight, self._sum(original.values(weight), weight.device, fused))
        self.original, self.fused = original, fused
        self.merged_adapters[:] = list(fused)

    def fusing_noise(self) -> float:
        """Energy of the weight as it is now minus that of the sum it was quantized from, relative to the latter."""
        weight: Any = self.get_base_layer().weight
        assert self.original is not None
        wanted = self._sum(self.original.values(weight), weight.device, self.fused).double()
        return float((dequantized(weight).double() - wanted).square().sum() / wanted.square().sum())

    @torch.no_grad()
    def _sum(self, values: Tensor, device: torch.device, fused: dict[str, float]) -> Tensor:
        """[N, K] on `device`, in the dtype of `values`: them plus every adapter's product, added in float32, chunk by chunk."""
        result = torch.empty(values.shape, dtype=values.dtype, device=device)
        for chunk in row_chunks(values, device):
            rows = fetch(values[chunk], device).to(torch.float32, copy=True)
            for name, scaling in fused.items():
                up: Any = self.lora_B[name].weight
                down: Any = self.lora_A[name].weight
                rows.addmm_(up[chunk].to(device).float(), down.to(device).float(), alpha=scaling)
            result[chunk] = rows.to(values.dtype)
        return result


def adopt(layer: Any, readers: Callable[[], Iterable[Reader]]) -> None:
    """Makes a peft layer over a Linear an `ExactLoraLinear`, in place; leaves one whose weight another library quantized."""
    if isinstance(layer, ExactLoraLinear) or not isinstance(layer, LoraLinear):
        return
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    if isinstance(weight, TorchAOBaseTensor):
        try:
            requantizing_config(weight)
        except ValueError:
            return  # peft says what it can do with it
    elif not torch.is_tensor(weight) or type(weight.data) is not Tensor:
        return
    # peft chooses the class itself, by the type of the weight, and asks nobody (`dispatch_torchao`): changed afterwards. A
    # dispatcher that could be registered (huggingface/peft, `LoraConfig._register_custom_module` is per configuration, which
    # diffusers makes) would replace this.
    layer.__class__ = ExactLoraLinear
    adopted: Any = layer
    adopted.readers, adopted.original, adopted.fused = readers, None, {}
