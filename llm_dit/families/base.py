"""What is particular to a family of pipelines, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from diffusers import DiffusionPipeline
from torch import nn

from ..checkpoints.names import OfficialName, Part, encoder_part
from ..forwards import Forwards
from ..splitting import Splitting

COMMON_ROLES: Final[Mapping[str, str]] = {"text_encoder": "encoder", "transformer": "transformer", "vae": "vae"}


@dataclass(frozen=True)
class Published:
    """A published model, as its sizes: enough to build its components on the meta device without a download.

    Attributes:
        name: an offline name, e.g. "klein-9b".
        repo_id: where it is published.
        pipeline_class: the diffusers class of its model_index.json.
        components: by component name, what builds it (call it under `torch.device("meta")`).
        source: where the sizes come from.
    """

    name: str
    repo_id: str
    pipeline_class: str
    components: Mapping[str, Callable[[], nn.Module]]
    source: str


@dataclass(frozen=True)
class Generation:
    """Defaults of the family's command-line script: what the model cards recommend for the published model.

    Attributes:
        call: keyword arguments of the pipeline's call besides the prompt.
        guidance_argument: the name of the pipeline's guidance parameter.
        video: the pipeline returns frames and audio, written as MP4, instead of an image, written as PNG.
        adapt: from a loaded pipeline, arguments that depend on its components.
    """

    call: Mapping[str, Any]
    guidance_argument: str = "guidance_scale"
    video: bool = False
    adapt: Callable[[DiffusionPipeline], Mapping[str, Any]] = lambda pipe: {}


@dataclass(frozen=True)
class Encoding:
    """What `encode_prompt` of the family's pipelines returns, and how it goes into their call.

    Attributes:
        outputs: by place, the argument of the call that takes it; None for what the call makes again.
        negative: the negative prompt of a call that names none; None if it is then not guided.
        together: one call of `encode_prompt` encodes both prompts; otherwise a second one does, and its outputs go to the
            arguments of the same names with "negative_" before them.
        encoders: the components that only encoding needs.
    """

    outputs: tuple[str | None, ...]
    negative: str | None = ""
    together: bool = False
    encoders: tuple[str, ...] = ("text_encoder",)


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: name of its module in `llm_dit.families` and of its section in config.toml.
        title: name for people.
        generation: defaults of its script.
        encoding: how prompts become arguments of a call.
        forwards: what the pipelines give their components, by size.
        extra_roles: roles of components besides `COMMON_ROLES`, by component name.
        casts_latents: the pipelines cast latents to the VAE's dtype, so that a float32 VAE beside bfloat16 works.
        published: the published models.
        parts: by component name, where its tensors stand in a single checkpoint file.
        official_name: the authors' name of a tensor of the transformer, from diffusers'; the inverse of diffusers' converter.
        bf16_blocks: indices, from both ends, of the blocks that the authors leave in bf16 in their fp8 files.
        splitting: by transformer class, how its sequence is split between GPUs; a class that is not here cannot be.
    """

    name: str
    title: str
    generation: Generation
    encoding: Encoding
    forwards: Forwards
    extra_roles: Mapping[str, str] = field(default_factory=dict)
    casts_latents: bool = True
    published: tuple[Published, ...] = ()
    parts: Mapping[str, Part] = field(default_factory=lambda: {"transformer": Part(), "text_encoder": encoder_part()})

    official_name: Callable[[str], OfficialName] = OfficialName
    bf16_blocks: tuple[int, ...] = ()
    splitting: Mapping[str, Splitting] = field(default_factory=dict)

    @property
    def roles(self) -> Mapping[str, str]:
        """By component name, the role."""
        return {**COMMON_ROLES, **self.extra_roles}

    def role(self, component: str) -> str | None:
        """The role of a component of the pipeline, or None if it stays as it is."""
        return self.roles.get(component)
