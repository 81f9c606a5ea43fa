"""What does not go together with `torch.compile`, said before it costs minutes."""

from __future__ import annotations

from typing import Final

from .methods import get_method, nearest

COMPILE_MODES: Final = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_compile_mode(mode: str, where: str = "compile_mode") -> str:
    """Returns `mode`; raises ValueError, naming `where` and the nearest valid one, if torch has no such mode."""
    if mode not in COMPILE_MODES:
        raise ValueError(f"unknown {where} {mode!r}: {nearest(mode, COMPILE_MODES)}")
    return mode


def get_quant_compile_warnings(method: str, compile_mode: str, offload: bool = False) -> list[str]:
    """Warnings for a method, a compile mode and offloading used together; empty when the combination is clean.

    Raises:
        ValueError: for an unknown method or mode.
    """
    row = get_method(method)
    if check_compile_mode(compile_mode) != "reduce-overhead":
        return []
    warnings = []
    if row.compile_note:
        warnings.append(f"{row.compile_note} (CUDA graphs): use compile_mode='default'")
    if offload:
        warnings.append(
            "reduce-overhead captures CUDA graphs, which keep addresses that offloading frees: "
            "use compile_mode='default' with offload=True"
        )
    return warnings
