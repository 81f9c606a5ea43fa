"""The published text encoders, as their configurations: several families share one.

Sizes are those of the config.json of each repository; the totals in the docstrings are what the meta models count.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def qwen3_4b() -> nn.Module:
    """Qwen/Qwen3-4B: 4.02 B parameters, the head tied to the embedding."""
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM(_qwen3(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True))


def qwen3_4b_base() -> nn.Module:
    """Qwen/Qwen3-4B without its head."""
    from transformers import Qwen3Model

    return Qwen3Model(_qwen3(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True))


def qwen3_8b() -> nn.Module:
    """Qwen/Qwen3-8B: 8.19 B parameters."""
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM(_qwen3(hidden_size=4096, intermediate_size=12288))


def mistral_small_24b() -> nn.Module:
    """mistralai/Mistral-Small-3.2-24B-Instruct-2506: 24.0 B parameters with its vision tower."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "image_size": 1540,
        "patch_size": 14,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False))


def gemma3_12b() -> nn.Module:
    """google/gemma-3-12b-it: 12.2 B parameters with its vision tower, the head tied to the embedding."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 262208,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))


def qwen2_5_vl_7b() -> nn.Module:
    """Qwen/Qwen2.5-VL-7B-Instruct: 8.29 B parameters with its vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False))


def qwen3_vl_8b() -> nn.Module:
    """Qwen/Qwen3-VL-8B-Instruct: 8.77 B parameters with its vision tower."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {"hidden_size": 4096, "intermediate_size": 12288, **_QWEN3}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False))


_QWEN3: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


def _qwen3(**sizes: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_QWEN3, **sizes)
