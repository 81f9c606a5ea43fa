"""A soak: many generations on a tiny pipeline through compiling, swapping LoRAs and switching offloading; is memory flat?

Flat means that the trend of the last three quarters, over all of them, stays under an allowance: the first quarter compiles,
fills caches and lets allocators find their size. The trend is the median of all slopes between two samples (Theil-Sen), which a
single step does not move. Samples are taken once a cycle of the same acts, and nothing is collected or emptied for them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from rich.progress import track
from torch import Tensor, nn

from ..load import load_pipeline
from ..names import check_name
from ..quantization import VALID_METHODS, detect_hardware
from ..terminal import console
from ..tiny import build, get
from .fresh import FreshProcessError, in_fresh_process
from .results import Columns, Job, Row

MIB: Final = 2**20
ALLOWED_MIB: Final[Mapping[str, float]] = {"host": 16.0, "allocated": 1.0, "reserved": 20.0}
"""What the trend may add up to. Host: some arenas of malloc. Allocated: nothing but rounding. Reserved: one segment of torch's
allocator (20 MiB for requests between 1 and 10 MiB)."""
RANK: Final = 4
COLUMNS: Final[Columns] = (
    ("pipeline", ""),
    ("method", ""),
    ("generations", "d"),
    ("host_mib", ".0f"),
    ("host_trend_mib", ".2f"),
    ("allocated_mib", ".1f"),
    ("allocated_trend_mib", ".2f"),
    ("reserved_mib", ".1f"),
    ("reserved_trend_mib", ".2f"),
    ("flat", ""),
)


@dataclass(frozen=True)
class Case:
    """One soak: so many generations of a tiny pipeline under a method."""

    pipeline: str
    method: str
    generations: int


def plan(pipelines: Sequence[str], methods: Sequence[str], generations: int, timeout_s: float) -> Job:
    """All pipelines x methods.

    Raises:
        ValueError: for an unknown name, or too few generations to see a trend in.
    """
    for name in pipelines:
        get(name)
    for name in methods:
        check_name(name, VALID_METHODS, "method")
    if generations < 8 * len(CYCLE):
        raise ValueError(f"{generations} generations are too few to see a trend in: give at least {8 * len(CYCLE)}")
    cases = [Case(pipeline, method, generations) for pipeline in pipelines for method in methods]
    return Job(cases, partial(_run, timeout_s=timeout_s), COLUMNS)


def _run(cases: Sequence[Case], timeout_s: float) -> Iterator[Row]:
    for case in cases:
        common = {**asdict(case), "device": detect_hardware().name, "torch": torch.__version__}
        try:
            yield {**common, **in_fresh_process(soak, case, timeout_s=timeout_s)}
        except FreshProcessError as error:
            yield {**common, "error": str(error)}


def trend(samples: Sequence[float]) -> float:
    """What the last three quarters of `samples` grow by, in their unit."""
    last = list(enumerate(samples))[len(samples) // 4 :]
    slope = statistics.median((right - left) / (later - earlier) for (earlier, left), (later, right) in combinations(last, 2))
    return slope * (len(last) - 1)


class _Pipelines:
    """The pipelines of a soak: one compiled, into which LoRAs are swapped, and one whose structure changes."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.cuda = torch.cuda.is_available()
        self.name = case.pipeline
        load = partial(load_pipeline, folder, quantization=case.method, torch_dtype=torch.bfloat16)
        self.compiled, self.plain = load(compile=True), load()
        for pipe in (self.compiled, self.plain):
            pipe.to("cuda" if self.cuda else "cpu")
            pipe.set_progress_bar_config(disable=True)
        self.loras = [_lora(self.plain.transformer, seed) for seed in (0, 1)]
        self.compiled.enable_lora_hotswap(target_rank=RANK)
        self.compiled.load_lora_weights(self._lora(0), adapter_name="style")

    def _lora(self, index: int) -> dict[str, Tensor]:
        return dict(self.loras[index])  # loading takes the mapping apart

    def generate(self, pipe: Any) -> None:
        """Two steps of the tiny pipeline."""
        pipe(**get(self.name).call())

    def swap(self, index: int) -> None:
        """Another LoRA in the place of the one before, without a recompile."""
        self.compiled.load_lora_weights(self._lora(index), adapter_name="style", hotswap=True)
        self.generate(self.compiled)

    def load_lora(self) -> None:
        """A LoRA beside the weights."""
        self.plain.load_lora_weights(self._lora(0), adapter_name="style")
        self.generate(self.plain)

    def fuse(self) -> None:
        """The LoRA in the weights."""
        self.plain.fuse_lora()
        self.generate(self.plain)

    def unload_lora(self) -> None:
        """The weights as they were."""
        self.plain.unfuse_lora()
        self.plain.unload_lora_weights()
        self.generate(self.plain)

    def offload(self, pipe: Any) -> None:
        """One component on the device at a time, and all of them there again."""
        pipe.enable_model_cpu_offload(device="cuda" if self.cuda else "cpu")
        self.generate(pipe)
        pipe.remove_all_hooks()
        if self.cuda:
            pipe.to("cuda")


CYCLE: Final[tuple[Callable[[_Pipelines], None], ...]] = (
    lambda pipes: pipes.generate(pipes.compiled),
    lambda pipes: pipes.swap(1),
    lambda pipes: pipes.swap(0),
    lambda pipes: pipes.load_lora(),
    lambda pipes: pipes.fuse(),
    lambda pipes: pipes.unload_lora(),
    lambda pipes: pipes.offload(pipes.plain),
    lambda pipes: pipes.offload(pipes.compiled),
)
"""What is done again and again, a generation each."""


def soak(case: Case) -> Row:
    """Does it in this process."""
    process = psutil.Process()
    samples: dict[str, list[float]] = {"host": []}
    with tempfile.TemporaryDirectory() as folder:
        build(case.pipeline).save_pretrained(folder)
        pipes = _Pipelines(Path(folder), case)
        for index in track(range(case.generations), "generations", console=console):
            CYCLE[index % len(CYCLE)](pipes)
            if (index + 1) % len(CYCLE) == 0:
                samples["host"].append(process.memory_info().rss / MIB)
                if pipes.cuda:
                    samples.setdefault("allocated", []).append(torch.cuda.memory_allocated() / MIB)
                    samples.setdefault("reserved", []).append(torch.cuda.memory_reserved() / MIB)
    trends = {name: trend(values) for name, values in samples.items()}
    return {
        "flat": "yes" if all(grown <= ALLOWED_MIB[name] for name, grown in trends.items()) else "no",
        **{f"{name}_mib": values[-1] for name, values in samples.items()},
        **{f"{name}_trend_mib": grown for name, grown in trends.items()},
        "allowed_mib": dict(ALLOWED_MIB),
        "samples_mib": {name: [round(value, 2) for value in values] for name, values in samples.items()},
        "cycle": len(CYCLE),
    }


def _lora(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A LoRA in the first four Linears of blocks."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".0.att" in name]
    for name, layer in linears[:4]:
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features, generator=generator) / 16
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=generator) / 16
    return state
