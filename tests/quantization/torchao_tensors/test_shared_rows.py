"""An activation that several Linears read is quantized once, and never when it might have changed."""

import gc
import threading

import torch

from llm_dit.quantization.torchao_tensors import shared_rows
from llm_dit.quantization.torchao_tensors.shared_rows import quantize_shared_rows

BOUND = 1e-12


def test_the_same_tensor_is_quantized_once():
    activation = torch.randn(2, 3, 32)
    rows, scale = quantize_shared_rows(activation, BOUND)
    assert rows.shape == (6, 32)
    assert quantize_shared_rows(activation, BOUND)[0] is rows
    assert quantize_shared_rows(activation, 1e-3)[0] is not rows
    assert scale.shape == (6, 1)


def test_a_changed_or_another_tensor_is_quantized_anew():
    activation = torch.randn(4, 32)
    first, _ = quantize_shared_rows(activation, BOUND)
    view = activation[1:]
    view.mul_(-1)
    second, _ = quantize_shared_rows(activation, BOUND)
    assert not torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    equal = activation.clone()
    assert quantize_shared_rows(equal, BOUND)[0] is not second


def test_nothing_is_kept_of_a_tensor_that_is_gone():
    activation = torch.randn(4, 32)
    quantize_shared_rows(activation, BOUND)
    assert shared_rows._last.result is not None
    del activation
    gc.collect()
    assert shared_rows._last.result is None


def test_under_inference_mode_nothing_is_shared():
    with torch.inference_mode():
        activation = torch.randn(4, 32)
        first, _ = quantize_shared_rows(activation, BOUND)
        activation.mul_(-1)
        second, _ = quantize_shared_rows(activation, BOUND)
    assert not torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_threads_share_nothing():
    activation = torch.randn(4, 32)
    mine, _ = quantize_shared_rows(activation, BOUND)
    theirs = []
    thread = threading.Thread(target=lambda: theirs.append(quantize_shared_rows(activation, BOUND)[0]))
    thread.start()
    thread.join()
    assert theirs[0] is not mine
    assert quantize_shared_rows(activation, BOUND)[0] is mine
