"""int4.quantize: the layout the kernels read, and the error against exact arithmetic in float64."""

import numpy as np
import pytest
import torch

from kt_vllm import int4
from tests.tolerances import INT4_ERROR_OVER_BEST, INT4_ERROR_OVER_MIN_MAX

GROUP = 64
WEIGHTS = ("normal", "long tails", "four bits", "one side")


def weights(kind: str, rows: int = 40, cols: int = 512, seed: int | None = None) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, cols)) * rng.uniform(0.01, 1, (rows, 1))
    if kind == "long tails":
        values = rng.standard_t(4, (rows, cols)) * 0.02
    elif kind == "four bits":  # as they come from Q4_K: blocks of 32 with scale and minimum of their own
        blocks = values.reshape(-1, 32)
        low, step = blocks.min(1, keepdims=True), np.ptp(blocks, axis=1, keepdims=True) / 15
        values = (np.round((blocks - low) / step) * step + low).reshape(rows, cols)
    elif kind == "one side":
        values = np.abs(values) + 0.5
    return torch.from_numpy(values).to(torch.bfloat16)


def squared_error(weight: torch.Tensor, got: torch.Tensor) -> float:
    return float((weight.double() - got.double()).square().sum())


def best_error(weight: torch.Tensor) -> float:
    """Of every zero point with many scales, each of them fitted until it stays, in float64."""
    groups = weight.double().reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
    best = torch.full_like(low, torch.inf)
    for zero in range(16):
        for part in np.arange(0.52, 1.1, 0.04):
            scale = (high - low) * part / 15
            for _ in range(2):
                codes = ((groups / scale).round() + zero).clamp(0, 15) - zero
                best = torch.minimum(best, (codes * scale - groups).square().sum(1, keepdim=True))
                scale = (codes * groups).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp_min(1)
                scale = torch.where(scale == 0, 1.0, scale)
    return float(best.sum())


def min_max_error(weight: torch.Tensor) -> float:
    """Round to nearest between a group's least and largest weight."""
    groups = weight.double().reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return squared_error(groups, (((groups / scale).round() + zero).clamp(0, 15) - zero) * scale)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_error(kind: str) -> None:
    weight = weights(kind)
    error = squared_error(weight, int4.dequantize(int4.quantize(weight, GROUP)))
    assert error < min_max_error(weight) * INT4_ERROR_OVER_MIN_MAX
    if kind != "one side":  # no weight of a model is, and trying for it would cost all others
        assert error < best_error(weight) * INT4_ERROR_OVER_BEST


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_layout(dtype: torch.dtype, group: int) -> None:
    """Each number found by itself, as the kernels do: a code in 4 bits of an int32 with its row's neighbours."""
    weight = weights("normal", 24, 256).to(dtype)
    packed, scale, zero = int4.quantize(weight, group)
    assert (packed.dtype, packed.shape) == (torch.int32, (24, 32))
    assert (scale.dtype, scale.shape) == (dtype, (24, 256 // group))
    assert (zero.dtype, zero.shape) == (torch.int32, (3, 256 // group))
    got = int4.dequantize(int4.Int4Weight(packed, scale, zero))
    for row, col in [(0, 0), (23, 255), (9, 130), (5, 77)]:
        code = int(packed[row, col // 8]) >> 4 * (col % 8) & 15
        shift = int(zero[row // 8, col // group]) >> 4 * (row % 8) & 15
        assert got[row, col] == (code - shift) * float(scale[row, col // group])
        assert abs(got[row, col] - weight[row, col]) < 2 * abs(float(scale[row, col // group]))


def test_in_pieces_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights("long tails", 40, 256)
    whole = int4.quantize(weight, GROUP)
    monkeypatch.setattr(int4, "_CHUNK_WEIGHTS", 256 * 7)
    for a, b in zip(whole, int4.quantize(weight, GROUP), strict=True):
        assert torch.equal(a, b)


def test_groups_that_are_zero_constant_or_tiny() -> None:
    weight = torch.zeros(8, 256, dtype=torch.bfloat16)
    weight[1], weight[2], weight[3, 5], weight[4] = 1.0, -3.0, 1e-30, 1e-39
    got = int4.dequantize(int4.quantize(weight, GROUP))
    assert torch.isfinite(got).all() and not got[0].any() and not got[5:].any()
    assert torch.allclose(got[1:3], weight[1:3].float(), rtol=2**-8)  # the scale's rounding
    assert got[3, 5] == pytest.approx(1e-30, rel=0.01) and not got[3, 64:].any()


def test_shapes_without_groups() -> None:
    for rows, cols in ((12, 64), (8, 96)):
        with pytest.raises(ValueError, match=f"a weight of {rows} x {cols} has no groups of 64"):
            int4.quantize(torch.zeros(rows, cols), GROUP)
