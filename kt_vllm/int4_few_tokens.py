"""A product of one to four tokens with an int4 weight as Marlin has it, near the time of reading the weight once.

Marlin's tiles are of 16 tokens, and it takes 1.06 to 1.5 times as long for so few (benchmarks/RESULTS.md). Larger
batches go on through it, so the weight stays as vLLM's MarlinLinearKernel arranges it.

Marlin's layout, codes of 4 bits with zero points, groups of 64: a tile is 64 outputs of 16 inputs, 128 words. Word
4 * lane + j has the codes of outputs 16 * j + lane // 4 (+ 0 or 8) and inputs 2 * (lane % 4) (+ 0, 1, 8 or 9); its
nibbles, lowest first, as (output, input): (0, 0), (0, 8), (8, 0), (8, 8), (0, 1), (0, 9), (8, 1), (8, 9): what a lane
holds of the first matrix of mma.m16n8k16. Scales and zero points of a lane's eight outputs stand side by side: scales
as j = 0 (+ 0, + 8), j = 1 (+ 0, + 8) and so on, zero points as nibbles j + 4 * (0 or 1). (Frantar et al., "MARLIN",
2024; vLLM's marlin_permute_scales, marlin_zero_points; PTX ISA, "Matrix Fragments for mma.m16n8k16".)
"""

import torch
from vllm.triton_utils import tl, triton

MAX_TOKENS = 4
GROUP = 64
TILE_OUTPUTS = 64
_WARPS = 8
_MAX_PARTS = 4

# 16 bytes a thread, past L1: nobody reads them again. Triton's own loads would spread four words over threads.
_LOAD = tl.constexpr("""{
    .reg .pred %inside;
    setp.ne.s32 %inside, $5, 0;
    mov.b32 $0, 0;
    mov.b32 $1, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
    @%inside ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];
}""")
# The tensor cores' own instruction, on what each lane holds: Triton's dot would take both matrices through shared
# memory to arrange them, and here they lie in place. It needs one element a thread, in the order of threads.
# A code or-ed into the mantissa of 128 is 128 + code in bfloat16, exactly, and so are products and, nearly, the sums in
# float32. (Kim et al., "Who Says Elephants Can't Run", 2022.)
_MULTIPLY = tl.constexpr("""{
    .reg .b32 %near0, %near8, %far0, %far8, %word;
    lop3.b32 %near0, $4, 0x000f000f, 0x43004300, 0xea;
    shr.u32 %word, $4, 4;
    lop3.b32 %near8, %word, 0x000f000f, 0x43004300, 0xea;
    shr.u32 %word, $4, 8;
    lop3.b32 %far0, %word, 0x000f000f, 0x43004300, 0xea;
    shr.u32 %word, $4, 12;
    lop3.b32 %far8, %word, 0x000f000f, 0x43004300, 0xea;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {%near0, %far0, %near8, %far8}, {$5, $6}, {$7, $8, $9, $10};
}""")
# The same with ones in place of the codes.
_ADD_UP = tl.constexpr("""{
    .reg .b32 %ones;
    mov.b32 %ones, 0x3f803f80;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {$0, $1, $2, $3}, {%ones, %ones, %ones, %ones}, {$4, $5}, {$6, $7, $8, $9};
}""")


@triton.jit
def _four_words(pointer, mask):
    """The words at each pointer; zeros where mask is not set."""
    return tl.inline_asm_elementwise(
        _LOAD,
        "=&r,=&r,=&r,=&r,l,r",
        [pointer.to(tl.int64), mask.to(tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _multiply(words, x0, x8, s0, s1, s2, s3):
    """Adds inputs * (128 + code) to the sums of outputs + 0 (s0, s1: two tokens) and + 8 (s2, s3)."""
    return tl.inline_asm_elementwise(
        _MULTIPLY,
        "=f,=f,=f,=f,r,r,r,f,f,f,f",
        [words, x0, x8, s0, s1, s2, s3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _add_up(x0, x8, s0, s1, s2, s3):
    """Adds the inputs."""
    return tl.inline_asm_elementwise(
        _ADD_UP,
        "=f,=f,=f,=f,r,r,f,f,f,f",
        [x0, x8, s0, s1, s2, s3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _scale(pair, HALF: tl.constexpr):
    """One of two neighbours in bfloat16."""
    if HALF == 0:
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _zero_point(codes, NIBBLE: tl.constexpr):
    """128 + the zero point."""
    code = codes << (16 - 4 * NIBBLE) if NIBBLE < 4 else codes >> (4 * NIBBLE - 16)
    return ((code & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["x"])
def _few_tokens(
    x,  # pairs, int32 [num_tokens, num_inputs / 2]
    packed,  # int32 [num_inputs / 16, 2 * num_outputs]
    scale,  # pairs, int32 [num_inputs / 64, num_outputs / 2]
    zero,  # int32 [num_inputs / 64, num_outputs / 8]
    output,  # [num_tokens, num_outputs]
    partial,  # float32 [PARTS * WARPS, num_tokens, num_outputs]
    arrived,  # int32 [num_outputs / 64]: programs that have written their partial sums
    num_tokens,
    num_inputs,
    num_outputs,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """A program computes 64 outputs, each of its warps every (PARTS * WARPS)-th group of inputs."""
    tile_row, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, 32)[None, :]
    row, column = lane // 4, lane % 4
    zeros = tl.zeros([WARPS, 32], tl.float32)
    # Of outputs 16 * j + row (+ 0, + 8), tokens 2 * column and, unless there is one alone, the next one.
    EACH: tl.constexpr = 1 if TOKENS == 1 else 2
    totals = (zeros,) * (8 * EACH)
    num_groups = num_inputs // 64
    own = part * WARPS + tl.arange(0, WARPS)[:, None]
    for first in range(0, num_groups, PARTS * WARPS):
        group = first + own
        inside = (group < num_groups) & (lane < 32)  # the latter for its shape: [WARPS, 32]
        words = ()
        for tile in tl.static_range(4):
            words += _four_words(packed + ((group * 4 + tile) * num_outputs + tile_row * 64 + lane * 2) * 2, inside)
        scales = _four_words(scale + group * (num_outputs // 2) + tile_row * 32 + row * 4, inside)
        zeros_of_group = tl.load(zero + group * (num_outputs // 8) + tile_row * 8 + row, mask=inside, other=0)
        inputs = ()
        s0, s1, s2, s3 = zeros, zeros, zeros, zeros
        for tile in tl.static_range(4):
            pair = x + row * (num_inputs // 2) + (group * 4 + tile) * 8 + column
            x0 = tl.load(pair, mask=inside & (row < num_tokens), other=0)
            x8 = tl.load(pair + 4, mask=inside & (row < num_tokens), other=0)
            inputs += (x0, x8)
            s0, s1, s2, s3 = _add_up(x0, x8, s0, s1, s2, s3)
        inputs_added = (s0, s1)
        new = ()
        for j in tl.static_range(4):
            s0, s1, s2, s3 = zeros, zeros, zeros, zeros
            for tile in tl.static_range(4):
                s0, s1, s2, s3 = _multiply(words[4 * tile + j], inputs[2 * tile], inputs[2 * tile + 1], s0, s1, s2, s3)
            sums = (s0, s1, s2, s3)
            for half in tl.static_range(2):
                for token in tl.static_range(EACH):
                    of_zero = _zero_point(zeros_of_group, j + 4 * half) * inputs_added[token]
                    product = (sums[2 * half + token] - of_zero) * _scale(scales[j], half)
                    new += (totals[(2 * j + half) * EACH + token] + product,)
        totals = new
    # Through memory, not by Triton's reduction: its exchange through shared memory took up to a third of the time.
    sums_at = partial + own * (num_tokens * num_outputs) + tile_row * 64 + row
    for token in tl.static_range(EACH):
        of = 2 * column + token
        for i in tl.static_range(8):
            tl.store(sums_at + of * num_outputs + 8 * i, totals[i * EACH + token], mask=(of < num_tokens) & (lane < 32))
    tl.debug_barrier()
    is_last = True
    if PARTS > 1:
        is_last = tl.atomic_add(arrived + tile_row, 1, sem="acq_rel", scope="gpu") == PARTS - 1
    if is_last:
        if PARTS > 1:
            tl.store(arrived + tile_row, 0)
        outputs = tile_row * 64 + tl.arange(0, 64)
        for token in tl.static_range(TOKENS):
            total = tl.zeros([64], tl.float32)
            exists = tl.zeros_like(outputs) + token < num_tokens
            for i in tl.static_range(PARTS * WARPS):
                at = partial + (i * num_tokens + token) * num_outputs + outputs
                total += tl.load(at, mask=exists, other=0, cache_modifier=".cg")
            tl.store(output + token * num_outputs + outputs, total.to(output.dtype.element_ty), mask=exists)


def parts_for(num_outputs: int, num_inputs: int, packed: torch.Tensor, scale: torch.Tensor) -> int | None:
    """Programs that share the inputs of 64 outputs; None where the weight is not as this kernel reads it.

    That is, filled up by Marlin, of one group alone (its scales are in another order then), or not bfloat16.
    """
    as_is = packed.shape == (num_inputs // 16, 2 * num_outputs) and scale.shape == (num_inputs // GROUP, num_outputs)
    if not as_is or num_inputs <= GROUP or num_outputs % TILE_OUTPUTS or scale.dtype != torch.bfloat16:
        return None
    # One and a half programs a processor: fewer leave some without, and of more all partial sums are more to add up.
    programs = 1.5 * torch.cuda.get_device_properties(scale.device).multi_processor_count
    parts = 1
    while parts < _MAX_PARTS and parts * (num_outputs // TILE_OUTPUTS) < programs:
        parts *= 2
    return parts


def multiply_few_tokens(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    arrived: torch.Tensor,
    parts: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x: bfloat16 [num_tokens, num_inputs], num_tokens at most MAX_TOKENS -> [num_tokens, num_outputs].

    packed, scale, zero: as Marlin has them, see _few_tokens. arrived: int32 [num_outputs / 64], zeros, and zeros again
    afterwards; of no other weight. Sums are float32, always in the same order.
    """
    num_tokens, num_inputs = x.shape
    if not 0 < num_tokens <= MAX_TOKENS:
        raise ValueError(f"{num_tokens} tokens, expected 1 to {MAX_TOKENS}.")
    num_outputs = scale.shape[1]
    output = x.new_empty(num_tokens, num_outputs, dtype=out_dtype)
    _few_tokens[(num_outputs // TILE_OUTPUTS, parts)](
        x.contiguous().view(torch.int32),
        packed,
        scale.view(torch.int32),
        zero,
        output,
        x.new_empty(parts * _WARPS * num_tokens * num_outputs, dtype=torch.float32),
        arrived,
        num_tokens,
        num_inputs,
        num_outputs,
        1 if num_tokens == 1 else MAX_TOKENS,
        parts,
        _WARPS,
        num_warps=_WARPS,
    )
    return output
