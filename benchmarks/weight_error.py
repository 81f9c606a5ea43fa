"""Relative error of one Linear under each method: its weight, and its output on 64 tokens.

    python benchmarks/weight_error.py

Random weights of 4096 x 4096 in bfloat16, Gaussian and with heavy tails (Student's t, 4 degrees of freedom); on the CPU.
"""

import torch
from torch.distributions import Normal, StudentT
from torch.nn.functional import linear

from llm_dit.quantization import METHODS
from llm_dit.quantization.torchao_tensors.stream import quantize_weight


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


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
    main()
