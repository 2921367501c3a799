"""A product of a few tokens with an int4 weight as Marlin has it, bound by reading the weight once: a candidate.

benchmarks/linear.py times it beside Marlin, whose tiles of 16 tokens are mostly empty where one to four tokens decode.
The weight stays as vLLM's MarlinLinearKernel arranges it, so that larger batches could go on through Marlin.

Marlin's layout, codes of 4 bits with zero points, groups of 64: a tile is 64 outputs of 16 inputs, 128 words. Word
4 * lane + j has the codes of outputs 16 * j + lane // 4 (+ 0 or 8) and inputs 2 * (lane % 4) (+ 0, 1, 8 or 9); its
nibbles, lowest first, as (output, input): (0, 0), (0, 8), (8, 0), (8, 8), (0, 1), (0, 9), (8, 1), (8, 9). Scales and
zero points of a lane's eight outputs stand side by side: scales as j = 0 (+ 0, + 8), j = 1 (+ 0, + 8) and so on, zero
points as nibbles j + 4 * (0 or 1). (Frantar et al., "MARLIN", 2024; vLLM's marlin_permute_scales, marlin_zero_points.)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_TOKENS = 4
GROUP = 64
TILE_OUTPUTS = 64
LANES = 32
# What is or-ed into a code to make it a float from 1 to 2: an argument, since an instruction of three operands takes
# one constant, and that is the mask.
_ONE = 0x3F800000


class Shape(NamedTuple):
    """How a product is cut. lanes: of a tile, to a program, 8, 16 or 32; the warps share the groups. registers: a limit
    for a thread, 0 for none.
    """

    lanes: int
    num_warps: int
    registers: int = 0


@triton.jit
def _one_plus(word, MASK: tl.constexpr, one):
    """1 + code / 2^7 of the code at bits 16 to 19, or 1 + code / 2^11 at bits 12 to 15, as float32."""
    return ((word & MASK) | one).to(tl.float32, bitcast=True)


@triton.jit
def _at_bit_16(word, NIBBLE: tl.constexpr):
    if NIBBLE < 4:
        return word << (16 - 4 * NIBBLE)
    else:
        return word >> (4 * NIBBLE - 16)


@triton.jit
def _two(pair, dtype: tl.constexpr):
    """Two neighbours of a type of 16 bits, as float32."""
    low = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _four_words(pointer, mask):
    """Read as two of 64 bits: a dimension of four would be spread over threads."""
    first = tl.load(pointer, mask=mask, other=0, eviction_policy="evict_first")
    second = tl.load(pointer + 1, mask=mask, other=0, eviction_policy="evict_first")
    return first.to(tl.int32), (first >> 32).to(tl.int32), second.to(tl.int32), (second >> 32).to(tl.int32)


@triton.jit
def _add_word(near, far, word, x0, x1, x8, x9, one):
    """Adds input * (1 + code / 2^7) to the sums of outputs + 0 and + 8; x8 and x9 are 16 times the inputs."""
    left, right = word << 8, word >> 8
    near = tl.fma(x0, _one_plus(word << 16, 0xF0000, one), near)
    far = tl.fma(x0, _one_plus(left, 0xF0000, one), far)
    near = tl.fma(x1, _one_plus(word, 0xF0000, one), near)
    far = tl.fma(x1, _one_plus(right, 0xF0000, one), far)
    near = tl.fma(x8, _one_plus(left, 0xF000, one), near)
    far = tl.fma(x8, _one_plus(word, 0xF000, one), far)
    near = tl.fma(x9, _one_plus(right, 0xF000, one), near)
    far = tl.fma(x9, _one_plus(word >> 16, 0xF000, one), far)
    return near, far


@triton.jit(do_not_specialize=["one"])
def _few_tokens(
    x,  # pairs, int32 [TOKENS, num_inputs / 2]
    packed,  # pairs of words, int64 [num_inputs / 16, num_outputs]
    scale,  # fours, int64 [num_inputs / 64, num_outputs / 4]
    zero,  # int32 [num_inputs / 64, num_outputs / 8]
    output,  # [TOKENS, num_outputs]
    num_inputs,
    num_outputs,
    one,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    dtype: tl.constexpr,
):
    """A program computes 2 * LANES outputs, each of its threads one lane of every GROUPS-th group."""
    parts: tl.constexpr = 32 // LANES
    tile_row = tl.program_id(0) // parts
    first_lane = tl.program_id(0) % parts * LANES
    lane = (first_lane + tl.arange(0, LANES))[None, :]
    row = lane % 4
    zeros = tl.zeros([GROUPS, LANES], tl.float32)
    totals = (zeros,) * (8 * TOKENS)
    num_groups = num_inputs // 64
    for first in range(0, num_groups, GROUPS):
        group = (first + tl.arange(0, GROUPS))[:, None]
        mask = (group < num_groups) & (row < 4)
        words = ()
        for tile in tl.static_range(4):
            words += _four_words(packed + (group * 4 + tile) * num_outputs + tile_row * 64 + lane * 2, mask)
        scales = ()
        for half in tl.static_range(2):
            at = group * (num_outputs // 4) + tile_row * 16 + lane // 4 * 2 + half
            four = tl.load(scale + at, mask=mask, other=0)
            scales += _two(four.to(tl.int32), dtype) + _two((four >> 32).to(tl.int32), dtype)
        zero_codes = tl.load(zero + group * (num_outputs // 8) + tile_row * 8 + lane // 4, mask=mask, other=0)
        for token in tl.static_range(TOKENS):
            inputs, near, far = (), zeros, zeros
            for tile in tl.static_range(4):
                pair = x + token * (num_inputs // 2) + (group * 4 + tile) * 8 + row
                x0, x1 = _two(tl.load(pair, mask=mask, other=0), dtype)
                x8, x9 = _two(tl.load(pair + 4, mask=mask, other=0), dtype)
                near += x0 + x1
                far += x8 + x9
                inputs += (x0, x1, 16 * x8, 16 * x9)
            # The ones add the inputs, and 16 times the far ones: once goes with the zero point.
            sums = (-15 * far,) * 8
            plain = near + far
            for tile in tl.static_range(4):
                new = ()
                for j in tl.static_range(4):
                    new += _add_word(
                        sums[2 * j],
                        sums[2 * j + 1],
                        words[4 * tile + j],
                        inputs[4 * tile],
                        inputs[4 * tile + 1],
                        inputs[4 * tile + 2],
                        inputs[4 * tile + 3],
                        one,
                    )
                sums = new
            new = ()
            for i in tl.static_range(8):
                part = sums[i] - _one_plus(_at_bit_16(zero_codes, i // 2 + i % 2 * 4), 0xF0000, one) * plain
                new += (totals[8 * token + i] + part * scales[i],)
            totals = totals[: 8 * token] + new + totals[8 * token + 8 :]
    bit = tl.arange(0, 2)
    at = (tile_row * 64 + first_lane // 4 + tl.arange(0, LANES // 4))[:, None, None, None]
    at += 32 * bit[None, :, None, None] + 16 * bit[None, None, :, None] + 8 * bit[None, None, None, :]
    for token in tl.static_range(TOKENS):
        # All eight as one tensor [GROUPS, LANES, j // 2, j % 2, + 0 or 8]: one exchange between warps.
        t = totals[8 * token : 8 * token + 8]
        near_sums = tl.join(tl.join(t[0], t[4]), tl.join(t[2], t[6]))
        far_sums = tl.join(tl.join(t[1], t[5]), tl.join(t[3], t[7]))
        total = tl.sum(tl.join(near_sums, far_sums), 0)
        total = tl.sum(tl.reshape(total, [LANES // 4, 4, 2, 2, 2]), 1) * 128
        tl.store(output + token * num_outputs + at, total.to(output.dtype.element_ty))


def few_tokens(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    shape: Shape,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x: [num_tokens, num_inputs] of bfloat16 or float16, num_tokens at most MAX_TOKENS -> [num_tokens, num_outputs].

    packed: int32 [num_inputs / 16, 2 * num_outputs]; scale: [num_inputs / 64, num_outputs], x's type; zero: int32
    [num_inputs / 64, num_outputs / 8]: as Marlin has them, for num_inputs above 64. Sums are float32; codes are exact,
    and inputs within 3e-5 (half of them count in steps of 2^-24 of sixteen times themselves).
    """
    num_tokens, num_inputs = x.shape
    num_outputs = scale.shape[1]
    if not 0 < num_tokens <= MAX_TOKENS or num_inputs <= GROUP or num_inputs % GROUP or num_outputs % TILE_OUTPUTS:
        raise ValueError(f"{num_tokens} tokens of a weight of {num_outputs} x {num_inputs} cannot be computed here.")
    output = x.new_empty(num_tokens, num_outputs, dtype=out_dtype)
    _few_tokens[(num_outputs // TILE_OUTPUTS * (LANES // shape.lanes),)](
        x.contiguous().view(torch.int32),
        packed.view(torch.int64),
        scale.view(torch.int64),
        zero,
        output,
        num_inputs,
        num_outputs,
        _ONE,
        TOKENS=num_tokens,
        LANES=shape.lanes,
        GROUPS=shape.num_warps * 32 // shape.lanes,
        dtype=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        num_warps=shape.num_warps,
        **({"maxnreg": shape.registers} if shape.registers else {}),
    )
    return output
