"""What a family's model is trained on and how its pipeline would have used it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from .. import scenes
from ..tokenizers import CORPUS, QWEN_CHAT_TEMPLATE, qwen2_tokenizer

WORDS = (
    *CORPUS,
    *(
        f"a {size} {colour} {shape} {relation} a {size} {colour} {shape}"
        for size in scenes.SIZES
        for colour in scenes.COLOURS
        for shape in scenes.SHAPES
        for relation in scenes.RELATIONS
    ),
    "system user assistant <think> </think> of the objects and background:",
    QWEN_CHAT_TEMPLATE,
)
"""What the tokenizers are trained on: every word of a caption, and of the templates around it, becomes one token."""


SHIFT: Final = 2.0
"""Of the sigmas: noisier ones are trained more, and the schedulers shift likewise."""


_DEAD: Final = 0.2
"""Deviation of the mean of a latent channel that carries nothing: the KL term leaves it at its prior."""


@dataclass(frozen=True)
class Tokens:
    """Captions as a text encoder reads them: both [B, L] int64, padded on the right, L the same for all captions."""

    ids: Tensor
    mask: Tensor


class Course(ABC):
    """One model: how it is built, and what its pipeline makes of captions and pictures.

    Attributes:
        name: the folder of the trained pipeline.
        call: the arguments its pipeline is called with, prompt and generator apart.
        text_length: L of `Tokens`.
        template: a caption in "{}" and what the pipeline puts around it.
    """

    name: ClassVar[str]
    call: ClassVar[Mapping[str, Any]]
    text_length: ClassVar[int]
    template: ClassVar[str]

    @abstractmethod
    def build(self) -> DiffusionPipeline:
        """The pipeline in float32 with fresh weights, the same at every call."""

    @abstractmethod
    def moments(self, vae: Any, pictures: Tensor) -> Tensor:
        """What the encoder makes of pictures [B, 3, 128, 128] in -1..1: means, then log variances, [B, 2 C, h, w]."""

    @abstractmethod
    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures [B, 3, 128, 128] in -1..1 of latents [B, C, h, w]."""

    @abstractmethod
    def set_statistics(self, vae: Any, latents: Tensor) -> Tensor:
        """Makes `clean` of latents [B, C, h, w] have deviation 1; returns them as the autoencoder gives them from now on."""

    @abstractmethod
    def clean(self, vae: Any, latents: Tensor) -> Tensor:
        """What the transformer is to predict for latents [B, C, h, w]: normalized, and in the shape that it takes."""

    @abstractmethod
    def velocity(self, pipe: Any, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The transformer's estimate of noise - clean at noisy = (1 - sigma) clean + sigma noise; sigma is [B]."""

    def posterior(self, vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents [B, C, h, w] of pictures; bounded as in diffusers' distribution."""
        mean, logvar = self.moments(vae, pictures).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def tokens(self, tokenizer: Qwen2Tokenizer, captions: Sequence[str]) -> Tokens:
        """Captions as the pipeline tokenizes them.

        Raises:
            ValueError: if one is longer than `text_length`.
        """
        texts = [self.template.format(caption) for caption in captions]
        if max(map(len, tokenizer(texts).input_ids)) > self.text_length:
            raise ValueError(f"a caption is longer than the {self.text_length} tokens that {self.name} is trained for")
        found = tokenizer(texts, padding="max_length", max_length=self.text_length, return_tensors="pt")
        return Tokens(found.input_ids, found.attention_mask)


def deviations(latents: Tensor) -> Tensor:
    """Of the channels of latents [B, C, h, w], [C]; 1 for one that carries nothing: what is left in it shall stay small."""
    found = latents.std(dim=(0, 2, 3))
    return torch.where(found > _DEAD, found, torch.ones_like(found))


def tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer that has a token for every word of a caption."""
    return qwen2_tokenizer(WORDS, vocab_size=1024)


def initialized(make: Callable[[], Any], seed: int) -> Any:
    """The model that `make` constructs, in float32 and in training mode, its Linears drawn to keep variances.

    Modulations, and what makes the prediction, start at zero, as in DiT (arXiv:2212.09748, 3.2): blocks are identities first.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = make()
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif isinstance(module, nn.Linear):
                if _starts_at_zero(name):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model.train()


def _starts_at_zero(name: str) -> bool:
    return any(part in name for part in ("adaLN_modulation", "img_mod", "txt_mod", "_modulation", "proj_out", "final_layer"))
