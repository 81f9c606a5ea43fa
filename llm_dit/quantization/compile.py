"""What does not go together with `torch.compile`, said before it costs minutes."""

from __future__ import annotations

from ..names import COMPILE_MODES, check_name
from .methods import get_method


def get_quant_compile_warnings(method: str, compile_mode: str, offload: bool = False) -> list[str]:
    """Warnings for a method, a compile mode and offloading used together; empty when the combination is clean.

    Raises:
        ValueError: for an unknown method or mode.
    """
    row = get_method(method)
    if check_name(compile_mode, COMPILE_MODES, "compile_mode") != "reduce-overhead":
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
