"""Weights as integers of 4 bits: each group of a row has a scale and a zero point, chosen by squared error.

weight = (code - zero) * scale, code and zero from 0 to 15. Runs where the weight is; needs torch alone.
"""

from typing import NamedTuple

import torch

CODES_PER_INT32 = 8
_MAX_CODE = 15
# Ranges tried, as parts of a group's own: clipping the few largest weights makes the step of all others finer. Steps
# of 2.5 % down to 60 %, with four rounds of fitting instead of one, lower the error by another 0.5 % of itself.
_RANGES = (1.0, 0.92, 0.84, 0.76)
# Weights worked on at once: 16 MiB as float32, of which some seven are alive; small beside a layer, and large beside
# the cost of a kernel launch.
_CHUNK_WEIGHTS = 4 << 20


class Int4Weight(NamedTuple):
    """Of a weight [rows, cols] in groups of `group` columns; an int32 has its first code in the lowest bits.

    packed: int32 [rows, cols / 8]; scale: [rows, cols / group], the weight's type; zero: int32 [rows / 8, cols / group]
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def quantize(weight: torch.Tensor, group: int) -> Int4Weight:
    """weight: [rows, cols] of any float type, rows a multiple of 8, cols of `group`, and that of 8."""
    rows, cols = weight.shape
    if rows % CODES_PER_INT32 or cols % group or group % CODES_PER_INT32:
        raise ValueError(f"a weight of {rows} x {cols} has no groups of {group}; rows must be a multiple of 8.")
    packed = weight.new_empty(rows, cols // CODES_PER_INT32, dtype=torch.int32)
    scale = weight.new_empty(rows, cols // group)
    zero = weight.new_empty(rows, cols // group, dtype=torch.int32)
    step = max(1, _CHUNK_WEIGHTS // cols)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        groups = weight[part].float().reshape(-1, group)
        part_scale, part_zero = _choose(groups, weight.dtype)
        codes = _codes(groups, part_scale, part_zero) + part_zero
        packed[part] = _pack(codes.to(torch.int32).reshape(-1, CODES_PER_INT32)).reshape(-1, cols // CODES_PER_INT32)
        scale[part] = part_scale.reshape(-1, cols // group).to(weight.dtype)
        zero[part] = part_zero.reshape(-1, cols // group).to(torch.int32)
    # Eight rows to an int32.
    return Int4Weight(packed, scale, _pack(zero.reshape(rows // CODES_PER_INT32, CODES_PER_INT32, -1).transpose(1, 2)))


def dequantize(weight: Int4Weight) -> torch.Tensor:
    """[rows, cols] in float32: what the kernels multiply with, before they round it to their activations' type."""
    rows, num_groups = weight.scale.shape
    codes = _unpack(weight.packed).reshape(rows, num_groups, -1)
    zero = _unpack(weight.zero).transpose(1, 2).reshape(rows, num_groups, 1)
    return ((codes - zero) * weight.scale.float().unsqueeze(2)).reshape(rows, -1)


def _choose(groups: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) of each group, [num_groups, 1] float32; groups: [num_groups, group].

    From each range the zero point, and with it the scale that fits the codes best; then once more around the best.
    """
    low = groups.amin(1, keepdim=True).clamp_max_(0)
    high = groups.amax(1, keepdim=True).clamp_min_(0)
    best = _Best(groups, dtype)
    for part in _RANGES:
        scale = best.usable((high - low) * (part / _MAX_CODE))
        zero = (low * -part / scale).round_().clamp_(0, _MAX_CODE)
        best.fit(best.consider(scale, zero), zero)
    scale, zero = best.scale, best.zero
    for move in (0, -1, 1):
        moved = (zero + move).clamp_(0, _MAX_CODE)
        best.fit(_codes(groups, scale, moved), moved)
    return best.scale, best.zero


class _Best:
    """The best scale and zero point yet of each group."""

    def __init__(self, groups: torch.Tensor, dtype: torch.dtype) -> None:
        self.groups, self.dtype = groups, dtype
        self.error = groups.new_full((len(groups), 1), torch.inf)
        self.scale = torch.ones_like(self.error)
        self.zero = torch.zeros_like(self.error)

    def usable(self, scale: torch.Tensor) -> torch.Tensor:
        """As it will be stored; 1 where that would be 0, which all weights 0 need not care about."""
        scale = scale.to(self.dtype).float()
        return torch.where(scale == 0, 1.0, scale)

    def consider(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Returns the codes, less the zero point."""
        codes = _codes(self.groups, scale, zero)
        error = (codes * scale).sub_(self.groups).square_().sum(1, keepdim=True)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        return codes

    def fit(self, codes: torch.Tensor, zero: torch.Tensor) -> None:
        """Considers the scale of least squared error for these codes."""
        square = codes.square().sum(1, keepdim=True)
        self.consider(self.usable((codes * self.groups).sum(1, keepdim=True) / square.clamp_min_(1)), zero)


def _codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The nearest codes, less the zero point."""
    return (groups / scale).round_().add_(zero).clamp_(0, _MAX_CODE).sub_(zero)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """int32 [..., 8] -> int32 [...]; no two share a bit, and the sign bit is one as any other."""
    packed = codes[..., 0].clone()
    for i in range(1, CODES_PER_INT32):
        packed |= codes[..., i] << (4 * i)
    return packed


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 [...] -> int32 [..., 8]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts) & _MAX_CODE
