"""A training run of so many minutes: one schedule, averaged weights, and a checkpoint from which it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...writing import new_file

_WARM_UP = 200
"""Steps over which the learning rate rises."""
_DECAY = 0.5
"""Share of the time over which it falls to 0 again, at the end."""
_AVERAGE = 0.999
"""Weight of the past in the averaged weights."""
_EVERY_S = 30.0
"""Seconds between checkpoints."""


@dataclass(frozen=True)
class Budget:
    """How long a stage trains, and how fast it learns.

    Attributes:
        minutes: of training, summed over interruptions; the schedule follows the time.
        rate: the highest learning rate of AdamW.
        captured: on a GPU, one step is captured in a CUDA graph and replayed: it is a thousand small kernels. The loss must
            then neither wait for the GPU nor copy from the host.
        before: the checkpoint of a later stage, which learns what this one makes: where it is, this one may not learn more.
    """

    minutes: float
    rate: float
    captured: bool = True
    before: Path | None = None


class Run:
    """The parameters of some modules that want gradients, while they are trained.

    Args:
        modules: what is trained; at the end it holds the averaged weights.
        budget: for how long.
        checkpoint: a .safetensors file that the run writes, and goes on from if it is there.
    """

    def __init__(self, modules: Sequence[nn.Module], budget: Budget, checkpoint: Path) -> None:
        self.parameters: list[Tensor] = [one for module in modules for one in module.parameters() if one.requires_grad]
        self.device = self.parameters[0].device
        self.budget = budget
        self.checkpoint = checkpoint
        self.averaged = [parameter.detach().clone() for parameter in self.parameters]
        self.first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps, self.seconds = 0, 0.0
        if checkpoint.is_file():
            self._resume()
        self.rate = torch.tensor(0.0, device=self.device)
        self.adamw = self._adamw()

    def _adamw(self) -> torch.optim.AdamW:
        """In the state that was read."""
        capturable = {"capturable": True} if self.device.type == "cuda" else {}
        adamw = torch.optim.AdamW(self.parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True, **capturable)
        for parameter, first, second in zip(self.parameters, self.first, self.second, strict=True):
            step = torch.tensor(float(self.steps), device=self.device)
            adamw.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        return adamw

    def train(self, loss_of: Callable[[], Tensor], title: str) -> None:
        """Calls `loss_of` and follows its gradient until the time is up; interrupted, it keeps what it has.

        Raises:
            ValueError: if a later stage has learned what this one makes, and there is time left to change that.
        """
        end = self.budget.minutes * 60
        if self.seconds < end and self.budget.before is not None and self.budget.before.is_file():
            raise ValueError(
                f"{self.budget.before} was trained on what {self.checkpoint} makes after {self.seconds / 60:.2g} minutes, "
                f"and not after {self.budget.minutes:.2g}: ask for no more, give another folder, or remove it"
            )
        step = self._captured(loss_of) if self.budget.captured and self.device.type == "cuda" else lambda: self._step(loss_of)
        saved = time.perf_counter()  # compiling is not training
        started = saved - self.seconds
        try:
            with tqdm(total=round(end), initial=round(self.seconds), desc=title, unit="s") as bar:
                while self.seconds < end:
                    self.rate.fill_(self.budget.rate * self._scheduled(self.seconds / end))
                    loss = step()
                    self.steps += 1
                    if self.steps % 50 == 0:
                        bar.set_postfix(steps=self.steps, loss=f"{loss.item():.4f}")  # waits, so that the clock is right
                        bar.update(min(round(self.seconds), round(end)) - bar.n)
                    self.seconds = time.perf_counter() - started
                    if time.perf_counter() - saved > _EVERY_S:
                        self._save()
                        saved = time.perf_counter()
        except KeyboardInterrupt:
            self._save()
            raise
        self._save()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averaged)

    def _scheduled(self, done: float) -> float:
        """Share of the highest rate."""
        return max(0.0, min(1.0, (self.steps + 1) / _WARM_UP, (1 - done) / _DECAY))

    def _step(self, loss_of: Callable[[], Tensor]) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        # Without the cache of cast weights, which would outlive a graph.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.parameters, 1 - _AVERAGE)
        return loss.detach()

    def _captured(self, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A step as a CUDA graph, after a few that compile and allocate; their rate is 0, so they train nothing."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(loss_of)
        torch.cuda.current_stream().wait_stream(side)
        for parameter in self.parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._step(loss_of)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay

    def _save(self) -> None:
        tensors = {f"{kind}.{i}": tensor.detach() for kind, each in self.kept().items() for i, tensor in enumerate(each)}
        with new_file(self.checkpoint) as beside:
            save_file(tensors, beside, {"progress": json.dumps({"steps": self.steps, "seconds": self.seconds})})

    def kept(self) -> dict[str, list[Tensor]]:
        """What a checkpoint holds: weights, their average, and the moments of the gradients."""
        return {"now": self.parameters, "averaged": self.averaged, "first": self.first, "second": self.second}

    def _resume(self) -> None:
        with safe_open(self.checkpoint, "pt") as file, torch.no_grad():
            shapes = {f"now.{index}": list(parameter.shape) for index, parameter in enumerate(self.parameters)}
            names = [name for name in file.keys() if name.startswith("now.")]  # noqa: SIM118 - a file is no mapping
            found = {name: file.get_slice(name).get_shape() for name in names}
            if found != shapes:
                raise ValueError(f"{self.checkpoint} is of another model than this one: give another folder, or remove it")
            for kind, each in self.kept().items():
                for index, tensor in enumerate(each):
                    tensor.copy_(file.get_tensor(f"{kind}.{index}"))
            progress = json.loads(file.metadata()["progress"])
        self.steps, self.seconds = progress["steps"], progress["seconds"]
