"""kt_vllm.int4_few_tokens in Triton's interpreter, on weights that vLLM's own code arranges as for Marlin.

The interpreter has no inline assembly: NumPy takes its place, by the layouts of the PTX manual. Imports vLLM and sets
Triton up for a process, so test_int4_few_tokens.py runs it in one of its own.
"""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import vllm.triton_utils
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales, marlin_zero_points
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights

from kt_vllm import int4
from tests.tolerances import MAX_FEW_TOKENS_ERROR

vllm.triton_utils.tl, vllm.triton_utils.triton = tl, triton  # as where there is a GPU
from kt_vllm import int4_few_tokens, int4_linear  # noqa: E402
from kt_vllm.int4_few_tokens import GROUP, MAX_TOKENS, multiply_few_tokens, parts_for  # noqa: E402

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4


def data(tensor: Any) -> np.ndarray:
    return tensor.handle.data


def like(tensor: Any, values: np.ndarray) -> Any:
    return tl.tensor(type(tensor.handle)(values, tensor.handle.dtype), tensor.type)


def halves(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two bfloat16 of each int32."""
    low, high = (pairs << 16).view(np.float32), (pairs & np.int32(-65536)).view(np.float32)
    return low.astype(np.float64), high.astype(np.float64)


def mma(a: np.ndarray, x0: Any, x8: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
    """mma.m16n8k16 of each warp; a: [warps, 16, 16]."""
    b = np.zeros((len(a), 16, 8))
    for pairs, k in ((data(x0), 0), (data(x8), 8)):
        b[:, k + 2 * COLUMN, ROW], b[:, k + 2 * COLUMN + 1, ROW] = halves(pairs)
    c = a @ b
    new = (c[:, i, 2 * COLUMN + j] for i in (ROW, ROW + 8) for j in (0, 1))
    return tuple(like(s, (data(s) + part).astype(np.float32)) for s, part in zip(sums, new, strict=True))


def multiply(words: Any, x0: Any, x8: Any, *sums: Any) -> tuple[Any, ...]:
    a = np.zeros((len(data(words)), 16, 16))
    places = ((0, 0), (0, 8), (8, 0), (8, 8), (0, 1), (0, 9), (8, 1), (8, 9))
    for nibble, (output, input_) in enumerate(places):
        a[:, ROW + output, 2 * COLUMN + input_] = 128 + (data(words) >> (4 * nibble) & 15)
    return mma(a, x0, x8, sums)


def add_up(x0: Any, x8: Any, *sums: Any) -> tuple[Any, ...]:
    return mma(np.ones((len(data(x0)), 16, 16)), x0, x8, sums)


def four_words(pointer: Any, mask: Any) -> tuple[Any, ...]:
    inside = np.broadcast_to(data(mask), data(pointer).shape)
    words = np.zeros((4, *inside.shape), np.int32)
    for place in zip(*np.nonzero(inside), strict=True):
        words[(slice(None), *place)] = (ctypes.c_int32 * 4).from_address(int(data(pointer)[place]))
    return tuple(like(tl.zeros(inside.shape, tl.int32), one) for one in words)


@pytest.fixture(autouse=True)
def in_place_of_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("_four_words", four_words), ("_multiply", multiply), ("_add_up", add_up)):
        monkeypatch.setattr(int4_few_tokens, name, function)


def as_marlin_has_it(weight: int4.Int4Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What MarlinLinearKernel makes of it, in vLLM's NumPy version of the packing, which needs no GPU."""
    num_outputs, num_groups = weight.scale.shape
    num_inputs = num_groups * GROUP
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (weight.packed.unsqueeze(-1) >> shifts & 15).reshape(num_outputs, num_inputs)
    zeros = (weight.zero.unsqueeze(1) >> shifts.reshape(1, -1, 1) & 15).reshape(num_outputs, num_groups)
    return (
        marlin_weights(codes.T.contiguous(), num_inputs, num_outputs, 4, get_weight_perm(4)),
        marlin_permute_scales(weight.scale.T.contiguous(), num_inputs, num_outputs, GROUP).contiguous(),
        marlin_zero_points(zeros.T.contiguous(), num_groups, num_outputs, 4),
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 640), (128, 128), (192, 1216)])
@pytest.mark.parametrize("num_tokens", [1, 3, MAX_TOKENS])
def test_against_exact_arithmetic(num_tokens: int, num_outputs: int, num_inputs: int, parts: int) -> None:
    weight = int4.quantize(torch.randn(num_outputs, num_inputs).bfloat16(), GROUP)
    x = torch.randn(num_tokens, num_inputs).bfloat16()
    expected = x.double() @ int4.dequantize(weight).double().T
    arrived = torch.zeros(num_outputs // 64, dtype=torch.int32)
    error = multiply_few_tokens(x, *as_marlin_has_it(weight), arrived, parts, torch.float32).double() - expected
    assert error.norm() < MAX_FEW_TOKENS_ERROR * expected.norm()
    assert not arrived.any(), "ready for the next call"


def test_too_many_tokens_are_refused() -> None:
    words = torch.zeros(1, dtype=torch.int32)
    for num_tokens in (0, MAX_TOKENS + 1):
        with pytest.raises(ValueError, match=f"{num_tokens} tokens, expected 1 to 4"):
            multiply_few_tokens(torch.ones(num_tokens, 128).bfloat16(), words, torch.ones(2, 64), words, words, 1)


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "parts"),
    [(2112, 7168, 4), (7168, 16384, 2), (24576, 1536, 1), (4096, 7168, 4), (64, 64, None), (96, 128, None)],
)
def test_parts(num_outputs: int, num_inputs: int, parts: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU with 132 processors."""
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    packed = torch.empty(num_inputs // 16, 2 * num_outputs, dtype=torch.int32, device="meta")
    scale = torch.empty(num_inputs // GROUP, num_outputs, dtype=torch.bfloat16, device="meta")
    assert parts_for(num_outputs, num_inputs, packed, scale) == parts
    assert parts_for(num_outputs, num_inputs, packed, scale.half()) is None
    assert parts_for(num_outputs - 32, num_inputs, packed, scale) is None, "filled up by Marlin"


@pytest.fixture
def weight(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """[outputs, inputs], and as Marlin has it; exact arithmetic in Marlin's place."""
    stored = int4.quantize(torch.randn(128, 256).bfloat16(), GROUP)
    exact = int4.dequantize(stored)
    monkeypatch.setattr(int4_linear, "_marlin", lambda x, *_: (x.float() @ exact.T).bfloat16())
    monkeypatch.setattr(int4_linear, "_checked", {})
    monkeypatch.setattr(int4_linear, "parts_for", lambda *_: 2)
    return exact, as_marlin_has_it(stored)


def test_one_op_goes_by_the_number_of_tokens(
    weight: tuple[torch.Tensor, tuple[torch.Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once for all of them, as vLLM compiles a model."""
    exact, stored = weight
    counts: list[int] = []
    few = int4_linear.multiply_few_tokens
    monkeypatch.setattr(int4_linear, "multiply_few_tokens", lambda x, *others: counts.append(len(x)) or few(x, *others))
    arrived = int4_linear.counters(128, torch.device("cpu"))
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.kt_vllm.int4_linear(x * 2, *stored, arrived, 2) + 1

    for shape in ((17,), (5,), (2,), (4,), (3, 2), (2, 2)):
        x = torch.randn(*shape, 256).bfloat16()
        torch._dynamo.maybe_mark_dynamic(x, 0)
        got = model(x)
        assert got.shape == (*shape, 128) and got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), (2 * x.float()) @ exact.T + 1, rtol=0.02, atol=0.5)
    assert counts == [2, 4, 4]
    assert graphs == 2, "of x [tokens, inputs] and of x [., ., inputs]"


def test_a_kernel_that_is_wrong_here_is_not_used(
    weight: tuple[torch.Tensor, tuple[torch.Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, stored = weight
    assert int4_linear.few_tokens_parts(128, 256, *stored) == 2
    few = int4_linear.multiply_few_tokens
    for wrong in (lambda *a: few(*a) * 1.05, lambda *a: few(*a) * float("nan")):
        monkeypatch.setattr(int4_linear, "_checked", {})
        monkeypatch.setattr(int4_linear, "multiply_few_tokens", wrong)
        caplog.clear()
        assert int4_linear.few_tokens_parts(128, 256, *stored) is None
        assert int4_linear.few_tokens_parts(128, 256, *stored) is None
        assert caplog.text.count("Marlin computes int4 products of few tokens too") == 1
