"""What is told of a profile: kinds of kernels, and gaps between them."""

import pytest
import torch

from llm_dit.bench.kernels import kernel_times, kind_of, summarized


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("_quantize_rows_kernel", "quantize"),
        ("_dequantize_int4_kernel", "quantize"),
        ("triton_poi_fused_add_gelu_mul_0", "compiled"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_cat_permute_view_5", "compiled"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "elementwise"),
    ],
)
def test_kinds(kernel, kind):
    assert kind_of(kernel) == kind


def test_times_are_added_and_gaps_are_idle():
    kernels = [("a_gemm", 0, 1000), ("copy", 500, 2000), ("triton_x", 3000, 3500), ("b_gemm", 3200, 3400)]
    found = summarized(kernels)
    assert found == pytest.approx({"elementwise": 1.5, "matmul": 1.2, "idle": 1.0, "compiled": 0.5})
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_profile_of_nothing():
    assert summarized([]) == {"idle": 0.0}


@pytest.mark.gpu
def test_a_product_is_found():
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    found = kernel_times(lambda: torch.relu(matrix @ matrix))
    assert found["matmul"] > found["elementwise"] > 0
