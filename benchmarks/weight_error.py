"""Relative error of one Linear under each method: its weight, and its output on 64 tokens.

    python benchmarks/weight_error.py
    python benchmarks/weight_error.py --fp8    # of fp8 weights by the scales they have

Random weights of 4096 x 4096 in bfloat16, Gaussian and with heavy tails (Student's t, 4 degrees of freedom); on the CPU.
"""

import sys

import torch
from torch.distributions import Normal, StudentT
from torch.nn.functional import linear

from llm_dit.quantization import METHODS
from llm_dit.quantization.torchao_tensors.stream import quantize_weight


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def by_scales() -> None:
    """fp8 with a scale per row, per tensor and without, for Gaussian weights of several standard deviations."""
    print("| standard deviation | one scale per row | one scale per tensor | no scale |\n|---|---|---|---|")
    config = METHODS["fp8-weight-only"].make_config
    assert config is not None
    for std in (0.05, 0.02, 0.01, 0.005, 0.002):
        torch.manual_seed(0)
        weight = (torch.randn(4096, 4096) * std).to(torch.bfloat16)
        scaled = [error(quantize_weight(weight, config(grain)).dequantize(), weight) for grain in ("per-row", "per-tensor")]
        cast = error(weight.clamp(-448, 448).to(torch.float8_e4m3fn).float(), weight)
        print(f"| {std} | " + " | ".join(f"{cell:.3f}" for cell in (*scaled, cast)) + " |")


def main() -> None:
    torch.manual_seed(0)
    print("| method | Gaussian: weight | output | heavy tails: weight | output |\n|---|---|---|---|---|")
    tokens = torch.randn(64, 4096).to(torch.bfloat16)
    weights = [(law.sample((4096, 4096)) * 0.02).to(torch.bfloat16) for law in (Normal(0, 1), StudentT(4))]
    for method in METHODS.values():
        if method.make_config is None:
            continue
        cells = []
        for weight in weights:
            quantized = quantize_weight(weight, method.make_config("per-row"))
            cells += [error(quantized.dequantize(), weight), error(linear(tokens, quantized), linear(tokens, weight))]
        print(f"| {method.name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")


if __name__ == "__main__":
    by_scales() if "--fp8" in sys.argv[1:] else main()
