"""torchao's quantizers of diffusers and transformers, for folders of stock tensors: saved as torchao's, and read in linear time.

torchao 0.18 puts the tensors of a file together (`unflatten_tensor_state_dict`) by comparing every name with every key, and
transformers asks for that once a layer. 1,660 Linears took ten seconds, and an encoder of 448 took 24. The classes below ask for
one tensor at a time, with the metadata of that one alone, and stand in both libraries' tables in the place of the originals. A
lookup by name in torchao would remove all but the saving.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusers.quantizers import auto as diffusers_auto
from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer as DiffusersTorchAoQuantizer
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from transformers.integrations.torchao import TorchAoDeserialize
from transformers.quantizers import auto as transformers_auto
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer as TransformersTorchAoQuantizer

from ..quantization.torchao_tensors.fused import as_stock

_NAMES = "tensor_names"
"""Where torchao's metadata lists the tensors of a file."""


class DiffusersStockQuantizer(DiffusersTorchAoQuantizer):
    """diffusers' torchao quantizer."""

    _metadata: dict[str, Any]
    _pending_flattened_state_dict: dict[str, Any]

    def get_state_dict_and_metadata(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return super().get_state_dict_and_metadata({name: as_stock(value) for name, value in state_dict.items()}, *args, **kwargs)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not self._metadata:
            return super().maybe_update_state_dict(state_dict)
        whole, pending = self._metadata, {**self._pending_flattened_state_dict, **state_dict}
        names = {_parts_prefix(name): name for name in json.loads(whole[_NAMES])}
        groups: dict[str, dict[str, Any]] = {}
        for key, value in pending.items():
            groups.setdefault(_tensor_of(key, names), {})[key] = value
        result: dict[str, Any] = {}
        left: dict[str, Any] = {}
        try:
            for name, group in groups.items():
                if name not in whole:
                    result.update(group)
                    continue
                self._metadata, self._pending_flattened_state_dict = _narrowed(whole, name), {}
                result.update(super().maybe_update_state_dict(group))
                left.update(self._pending_flattened_state_dict)
        finally:
            self._metadata, self._pending_flattened_state_dict = whole, left
        return result


class _Deserialize(TorchAoDeserialize):
    """transformers' step that puts one parameter together."""

    def convert(self, *args: Any, full_layer_name: str | None = None, **kwargs: Any) -> Any:
        whole = self.hf_quantizer.metadata
        if full_layer_name is not None and full_layer_name in whole:
            self.hf_quantizer.metadata = _narrowed(whole, full_layer_name)
        try:
            return super().convert(*args, full_layer_name=full_layer_name, **kwargs)
        finally:
            self.hf_quantizer.metadata = whole


class TransformersStockQuantizer(TransformersTorchAoQuantizer):
    """transformers' torchao quantizer."""

    def get_state_dict_and_metadata(self, model: nn.Module) -> Any:
        return flatten_tensor_state_dict({name: as_stock(value) for name, value in model.state_dict().items()})

    def get_load_operations(self) -> dict[str, Any]:
        return {**super().get_load_operations(), "deserialize": _Deserialize}


def _parts_prefix(name: str) -> str:
    """What the keys of a tensor's parts begin with: "blocks.0.weight" is saved as "blocks.0._weight_qdata" and so on."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}._{leaf}_"


def _tensor_of(key: str, names: Mapping[str, str]) -> str:
    """The tensor that a key belongs to, by the prefixes of all: itself, or the one whose part it is."""
    owner, _, leaf = key.rpartition(".")
    cuts = [place for place, letter in enumerate(leaf) if letter == "_" and place]
    return next((names[found] for place in cuts if (found := f"{owner}.{leaf[: place + 1]}") in names), key)


def _narrowed(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The metadata of one tensor."""
    return {_NAMES: json.dumps([name]), name: metadata[name]}


def _take_places() -> None:
    if diffusers_auto.AUTO_QUANTIZER_MAPPING.get("torchao") is DiffusersTorchAoQuantizer:
        diffusers_auto.AUTO_QUANTIZER_MAPPING["torchao"] = DiffusersStockQuantizer
    if transformers_auto.AUTO_QUANTIZER_MAPPING.get("torchao") is TransformersTorchAoQuantizer:
        transformers_auto.AUTO_QUANTIZER_MAPPING["torchao"] = TransformersStockQuantizer


_take_places()
