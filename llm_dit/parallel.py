"""Context parallelism: one picture or clip on several GPUs, each with a part of the sequence.

diffusers is the engine: its hooks split and gather the sequence, its attention exchanges heads (Ulysses) or passes keys and
values on (ring). Here is what it leaves to do: plans for classes that have none, checks before anything runs, and the CPU.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline
from diffusers.hooks.context_parallel import ContextParallelSplitHook, apply_context_parallel
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from .families.base import Family
from .graphs import GraphedForward
from .names import CONTEXT_PARALLEL, check_name
from .splitting import Arguments, Share, Splitting

ALONE: Final = "context parallelism needs several processes: start them with torchrun --nproc-per-node N"
RING_BACKEND: Final = "_native_cudnn"
"""torch's own attention that returns the log-sums by which a ring adds up, and the fastest of them on Hopper."""


class ParallelMixin(DiffusionPipeline):
    """Before a diffusers pipeline in the bases."""

    family: ClassVar[Family]

    def enable_context_parallel(self, kind: str = "ulysses") -> None:
        """Splits the transformer's sequence between all processes of the default process group.

        Every process loads the pipeline, calls this, and then makes the same calls with the same arguments and seeds; each gets
        the whole result.

        Args:
            kind: "ulysses" exchanges attention heads, "ring" passes keys and values on and takes no masks.

        Raises:
            ValueError: for a transformer, a number of processes or an attention backend with which it cannot work, saying why.
        """
        if getattr(self, "controlnet", None) is not None:
            raise ValueError(f"{type(self).__name__} adds a ControlNet's outputs, which are not split: run it on one GPU")
        split_transformer(getattr(self, "transformer", None), self.family, kind)


def split_transformer(transformer: Any, family: Family, kind: str) -> None:
    """`enable_context_parallel` for a transformer without a pipeline."""
    check_name(kind, CONTEXT_PARALLEL, "kind of context parallelism")
    splitting = family.splitting.get(type(transformer).__name__)
    if splitting is None:
        raise ValueError(f"this {family.title} pipeline has no transformer that can be split between GPUs: run it on one")
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count < 2:
        raise ValueError(ALONE)
    # Not the transformer's: an offloaded one lies on the CPU between its calls.
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    share = Share(count, dist.get_rank(), kind == "ring")
    _check(transformer, share, device)
    _split(transformer, splitting, share, device)


def _check(transformer: Any, share: Share, device: torch.device) -> None:
    """Raises ValueError where context parallelism cannot work."""
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError("this transformer is split already")
    if isinstance(transformer.forward, GraphedForward):
        raise ValueError("a transformer that is captured in CUDA graphs cannot be split: use compile_mode='default'")
    if share.ring and device.type != "cuda":
        raise ValueError("ring attention needs a CUDA device: no attention of the CPU returns the sums it adds up, use 'ulysses'")
    for module in transformer.modules():
        heads = getattr(module, "heads", None)
        if not share.ring and hasattr(module, "processor") and isinstance(heads, int) and heads % share.count:
            raise ValueError(f"{heads} attention heads cannot be split evenly between {share.count} processes: use 'ring'")
    name = _backend(transformer)
    if not _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(name)):
        raise ValueError(f"attention backend {name!r} cannot be split between GPUs: call transformer.reset_attention_backend()")


def _split(transformer: Any, splitting: Splitting, share: Share, device: torch.device) -> None:
    """What `enable_parallelism` of diffusers does for context parallelism.

    That one asks for an accelerator, and numbers devices by the rank among all hosts.
    """
    ring_backend = RING_BACKEND if share.ring and _backend(transformer) == "native" else None
    degree: dict[str, Any] = {"ring_degree" if share.ring else "ulysses_degree": share.count}
    config = ContextParallelConfig(**degree)
    mesh = init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(share.rank, share.count, device, mesh=mesh)
    transformer._parallel_config = parallel
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
            # Here and not by `set_attention_backend`, which sets it for every model of the process too.
            module.processor._attention_backend = ring_backend or module.processor._attention_backend
    _prepare(transformer, splitting.prepare, share)
    if splitting.prepare_block is not None:
        for block in transformer.transformer_blocks:
            _prepare(block, splitting.prepare_block, share)
    apply_context_parallel(transformer, config, dict(splitting.plan(transformer)))
    for module in transformer.modules():
        _find_parameters(module)


def _prepare(module: nn.Module, change: Callable[[Arguments, Share], Arguments], share: Share) -> None:
    """Lets `change` replace arguments of every call of a module."""
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def prepare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return (), {**given, **change(given, share)}

    module.register_forward_pre_hook(prepare, with_kwargs=True)


def _find_parameters(module: nn.Module) -> None:
    """Tells diffusers' hooks the names of the module's arguments, which they would otherwise look up while dynamo traces them."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    for hook in registry.hooks.values() if registry is not None else ():
        if isinstance(hook, ContextParallelSplitHook):
            names = tuple(inspect.signature(type(module).forward).parameters)[1:]
            hook.module_forward_metadata.cached_parameter_indices = {name: place for place, name in enumerate(names)}


def _backend(transformer: Any) -> str:
    """The attention backend of the transformer."""
    processors = (getattr(module, "processor", None) for module in transformer.modules())
    set_here = (getattr(processor, "_attention_backend", None) for processor in processors)
    return next(
        (AttentionBackendName(name).value for name in set_here if name), _AttentionBackendRegistry.get_active_backend()[0].value
    )


def rank() -> int:
    """Which process this is of those that torchrun or accelerate started; 0 if it was started alone."""
    return int(os.environ.get("RANK", "0"))


def use_own_device() -> None:
    """Makes "cuda" mean the GPU of this process, the one of its number on this machine."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} has no GPU of its own: start {torch.cuda.device_count()} processes, one a GPU")
        torch.cuda.set_device(local)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The processes that torchrun or accelerate started, joined while it lasts.

    Raises:
        ValueError: if there is only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(ALONE)
    if device.type == "cuda":
        use_own_device()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
