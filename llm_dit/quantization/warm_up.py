"""The first multiplication of a process, made while weights are still being read.

It loads the GPU's libraries and compiles kernels: 0.5 to 2 s in which neither disk nor GPU has anything to do. Whoever checks or
runs the quantized layers afterwards finds them warm.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

import torch
from torch import nn
from torchao.core.config import AOBaseConfig

from .torchao_tensors.stream import quantize_weight

logger = logging.getLogger(__name__)
_FEATURES = 256
"""Of the Linear that is run; every method takes it."""
_threads: dict[str, threading.Thread] = {}


def warm_up(configs: Iterable[AOBaseConfig]) -> None:
    """Starts to run a small Linear of each configuration on the current GPU, once in a process; returns at once."""
    if not torch.cuda.is_available():
        return
    for config in configs:
        if repr(config) not in _threads:
            thread = threading.Thread(target=_run, args=(config, torch.cuda.current_device()), daemon=True)
            _threads[repr(config)] = thread
            thread.start()


def wait_for_warm_up() -> None:
    """Returns when all that `warm_up` started is done."""
    for thread in _threads.values():
        thread.join()


def _run(config: AOBaseConfig, device: int) -> None:
    try:
        with torch.cuda.device(device), torch.no_grad():
            layer = nn.Linear(_FEATURES, _FEATURES, device="cuda", dtype=torch.bfloat16)
            layer.weight = nn.Parameter(quantize_weight(layer.weight, config), requires_grad=False)
            layer(torch.ones(2, _FEATURES, device="cuda", dtype=torch.bfloat16))
            torch.cuda.synchronize()
    except Exception:  # a card that cannot run it: the check of the loaded layers says so, with their names
        logger.debug("warming up %s failed", config, exc_info=True)
