"""What has to be put right before diffusers and transformers save quantized components."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel
from transformers.integrations.torchao import TorchAoDeserialize

from .backends.saving import attach_plain_saver
from .checkpoints.encoders import PRUNED


def prepare_for_saving(models: Mapping[str, nn.Module]) -> None:
    """Refuses what would write a broken folder, and mends what keeps a reloaded one from saving.

    Raises:
        ValueError: for a component with a LoRA that is not fused: its keys would be written in a form nothing reads.
    """
    for name, model in models.items():
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"{name} has LoRA adapters loaded, and saving it now writes a folder that does not load: call "
                "unload_lora_weights(), or fuse_lora() and then unload_lora_weights(), before save_pretrained"
            )
        if getattr(model, PRUNED, ()):
            left_out = ", ".join(getattr(model, PRUNED))
            raise ValueError(
                f"{name} was read from a file that leaves out {left_out}, and a saved folder needs them: load the encoder from "
                "its repository to save it"
            )
        if getattr(model, "hf_quantizer", None) is None and any(isinstance(p, TorchAOBaseTensor) for p in model.parameters()):
            attach_plain_saver(model)
        if isinstance(model, PreTrainedModel):
            _drop_deserializers(model)


def _drop_deserializers(model: PreTrainedModel) -> None:
    """Takes torchao's reading step off the conversions that transformers inverts for saving.

    It has no inverse (transformers 5.23, `TorchAoDeserialize.reverse_op`), so that a reloaded quantized model could
    not be saved again. Flattening the tensors is the quantizer's work and needs none. An inverse upstream would remove
    this.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(isinstance(op, TorchAoDeserialize) for op in getattr(conversion, "operations", ()))
        ]
