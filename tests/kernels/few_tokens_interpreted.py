"""benchmarks/int4_few_tokens.py in Triton's interpreter, on weights that vLLM's own code arranges as for Marlin.

Imports vLLM and sets Triton up for a process, so test_int4_few_tokens.py runs it in one of its own.
"""

import pytest
import torch
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales, marlin_zero_points
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights

from benchmarks.int4_few_tokens import GROUP, MAX_TOKENS, Shape, few_tokens
from kt_vllm import int4
from tests.tolerances import MAX_FEW_TOKENS_ERROR


def as_marlin_has_it(weight: int4.Int4Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What MarlinLinearKernel makes of it, in vLLM's NumPy version of the packing, which needs no GPU."""
    num_outputs, num_groups = weight.scale.shape
    num_inputs = num_groups * GROUP
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (weight.packed.unsqueeze(-1) >> shifts & 15).reshape(num_outputs, num_inputs)
    zeros = (weight.zero.unsqueeze(1) >> shifts.reshape(1, -1, 1) & 15).reshape(num_outputs, num_groups)
    return (
        marlin_weights(codes.T.contiguous(), num_inputs, num_outputs, 4, get_weight_perm(4)),
        marlin_permute_scales(weight.scale.T.contiguous(), num_inputs, num_outputs, GROUP),
        marlin_zero_points(zeros.T.contiguous(), num_groups, num_outputs, 4),
    )


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "shape", "dtype"),
    [
        (64, 384, Shape(8, 1), torch.bfloat16),  # two rounds of four groups, the second not full
        (64, 384, Shape(8, 1), torch.float16),
        (128, 256, Shape(16, 1), torch.bfloat16),
        (128, 128, Shape(32, 4), torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [1, MAX_TOKENS])
def test_against_exact_arithmetic(
    num_tokens: int, num_outputs: int, num_inputs: int, shape: Shape, dtype: torch.dtype
) -> None:
    weight = int4.quantize(torch.randn(num_outputs, num_inputs).to(dtype), GROUP)
    x = torch.randn(num_tokens, num_inputs).to(dtype)
    expected = x.double() @ int4.dequantize(weight).double().T
    error = few_tokens(x, *as_marlin_has_it(weight), shape, torch.float32).double() - expected
    assert error.norm() < MAX_FEW_TOKENS_ERROR * expected.norm()


def test_what_it_cannot_compute_is_refused() -> None:
    for num_tokens, num_outputs, num_inputs in ((0, 64, 128), (MAX_TOKENS + 1, 64, 128), (1, 96, 128), (1, 64, 64)):
        scale = torch.ones(num_inputs // GROUP, num_outputs, dtype=torch.bfloat16)
        words = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(ValueError, match="cannot be computed here"):
            few_tokens(torch.ones(num_tokens, num_inputs, dtype=torch.bfloat16), words, scale, words, Shape(8, 1))
