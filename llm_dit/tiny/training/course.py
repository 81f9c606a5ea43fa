"""What a family's model is trained on and how its pipeline would have used it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from diffusers import DiffusionPipeline
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2Tokenizer

from .. import scenes
from ..tokenizers import CORPUS, QWEN_CHAT_TEMPLATE, qwen2_tokenizer
from .data import Drawn, Subject
from .loop import Budget

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


_DEAD: Final = 0.2
"""Deviation of the mean of a latent channel that carries nothing: the KL term leaves it at its prior."""


@dataclass(frozen=True)
class Tokens:
    """Captions as a text encoder reads them: both [B, L] int64, L the same for all captions."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Amounts:
    """How long a course trains, and on how much at once.

    Attributes:
        vae_minutes: of the autoencoder.
        minutes: of transformer and text encoder.
        scenes: how many are drawn; as many as of its subject if it is not said.
    """

    vae_minutes: float = 2
    minutes: float = 13
    vae_batch: int = 64
    batch: int = 512
    scenes: int | None = None


@dataclass(frozen=True)
class Sigmas:
    """Which noise levels are trained on: their logits are normal (arXiv:2403.03206, 3.1).

    Where a trained model's error of the clean latents falls from all of their variance to little of it, it is decided what lies
    where: in Z-Image, klein and Qwen-Image at sigmas of 0.98 to 0.8, which have logits of 3.9 to 1.4.
    """

    mean: float = 1.0
    deviation: float = 1.0

    def draw(self, count: int, device: torch.device) -> Tensor:
        """[count] in 0..1."""
        return torch.sigmoid(self.mean + self.deviation * torch.randn(count, device=device))


@dataclass(frozen=True)
class Plan:
    """A run: where its checkpoints are, the denoiser's among them, on what it runs, and how much it trains."""

    folder: Path
    device: torch.device
    amounts: Amounts
    captured: bool
    denoiser: Path | None = None

    def autoencoder_budget(self, rate: float = 1.5e-3, share: float = 1.0) -> Budget:
        """Of a model that takes `share` of the autoencoder's minutes."""
        return Budget(share * self.amounts.vae_minutes, rate, captured=self.captured, before=self.denoiser)


class Coding(ABC):
    """An autoencoder of one kind of data, and how a pipeline uses it: D stands for the data's dimensions, d for the latents'.

    Attributes:
        name: what it is called in the output.
        off: how far off latents are while it is trained; see `off_at_every_scale`.
    """

    name: ClassVar[str]
    off: ClassVar[float] = 0.0

    @abstractmethod
    def prepared(self, drawn: Tensor) -> Tensor:
        """Data [B, ...] as it is kept -> [B, C, *D] float32 as the encoder takes it."""

    @abstractmethod
    def moments(self, vae: Any, data: Tensor) -> Tensor:
        """What the encoder makes of data [B, C, *D]: means, then log variances, [B, 2 c, *d]."""

    @abstractmethod
    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        """Data [B, C, *D] of latents [B, c, *d]."""

    @abstractmethod
    def set_statistics(self, vae: Any, latents: Tensor) -> Tensor:
        """Makes `clean` of latents [B, c, *d] have deviation 1; returns them as the autoencoder gives them from now on."""

    @abstractmethod
    def clean(self, vae: Any, latents: Tensor) -> Tensor:
        """What the transformer is to predict for latents [B, c, *d]: normalized, and in the shape that it takes."""

    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far data are from data [B, C, *D]."""
        return functional.l1_loss(found, wanted)

    def posterior(self, vae: Any, data: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents [B, c, *d] of data [B, C, *D]; bounded as in diffusers' distribution."""
        mean, logvar = self.moments(vae, data).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)


class Course(ABC):
    """One model: how it is built, and what its pipeline makes of captions and of what is drawn.

    Attributes:
        name: the folder of the trained pipeline.
        subject: what it is trained on.
        call: the arguments its pipeline is called with, prompt and generator apart.
        text_length: L of `Tokens`.
        template: a caption in "{}" and what the pipeline puts around it.
        amounts: what a run trains if nothing else is asked for.
        sigmas: the noise levels it is trained on.
        shift: of the sigmas of the pipeline's scheduler: more of its steps are noisy ones.
        learners: the components that learn to denoise.
    """

    name: ClassVar[str]
    subject: ClassVar[Subject]
    call: ClassVar[Mapping[str, Any]]
    text_length: ClassVar[int]
    template: ClassVar[str]
    amounts: ClassVar[Amounts] = Amounts()
    sigmas: ClassVar[Sigmas] = Sigmas()
    shift: ClassVar[float] = 2.0
    learners: ClassVar[tuple[str, ...]] = ("text_encoder", "transformer")

    @abstractmethod
    def build(self) -> DiffusionPipeline:
        """The pipeline in float32 with fresh weights, the same at every call."""

    @abstractmethod
    def latents(self, pipe: Any, drawn: Drawn, plan: Plan) -> Tensor:
        """Trains what makes latents of what is drawn, and returns what the transformer is to predict, [N, ...] bfloat16."""

    @abstractmethod
    def velocity(self, pipe: Any, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The transformer's estimate of noise - clean at noisy = (1 - sigma) clean + sigma noise; sigma is [B]."""

    def velocity_error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """How far velocities [B, ...] are from the true ones."""
        return functional.mse_loss(found, wanted)

    def tokens(self, tokenizer: Any, captions: Sequence[str]) -> Tokens:
        """Captions as the pipeline tokenizes them.

        Raises:
            ValueError: if one is longer than `text_length`.
        """
        texts = [self.template.format(caption) for caption in captions]
        if max(map(len, tokenizer(texts).input_ids)) > self.text_length:
            raise ValueError(f"a caption is longer than the {self.text_length} tokens that {self.name} is trained for")
        found = tokenizer(texts, padding="max_length", max_length=self.text_length, return_tensors="pt")
        return Tokens(found.input_ids, found.attention_mask)


def deviations(latents: Tensor, dead: float = _DEAD) -> Tensor:
    """Of the channels of latents [B, C, ...], [C]; 1 for one that carries nothing: what is left in it shall stay small."""
    found = latents.transpose(0, 1).flatten(1).std(dim=1)
    return torch.where(found > dead, found, torch.ones_like(found))


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


_ZERO: Final = (
    "adaLN_modulation",
    "img_mod",
    "txt_mod",
    "_modulation",
    "time_embed.linear",
    "scale_shift.linear",
    "gate.linear",
    "proj_out",
    "final_layer",
)
"""In the names of modulations and predictions."""


def fix_norms(model: nn.Module) -> None:
    """Leaves the weights of RMS norms at 1: scales follow them, and their gradients, sums over all tokens, take too long."""
    for module in model.modules():
        if isinstance(module, RMSNorm | nn.RMSNorm):
            module.requires_grad_(False)


def _starts_at_zero(name: str) -> bool:
    return any(part in name for part in _ZERO)
