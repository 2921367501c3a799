"""Kernels that carry a call's rows to host memory and back, and raise and await the flags.

All pointers named staged_*, request and reply are pinned host memory, which the device reads and writes over its bus.
`sent` and `arrived` are the device's own: how many requests it made on this slot, and how many programs of the running
one have written their rows.

Neither side sees a flag before what was written ahead of it. Barrier and atomic bring all rows before the last
program's release, which is for the whole system and holds for them too (PTX memory model: it is cumulative); an acquire
of the reply and a barrier keep the loads of the output behind it.
"""

import torch
from vllm.triton_utils import tl, triton

# A thread moves some 16-byte vectors of a row at once, enough to have the bus busy.
_NUM_WARPS = 8


# Of the threads of a program, the first alone: every poll is a read over the bus, in whose way the host's answer is.
# Labels and registers in braces are the block's own.
_RELEASE = tl.constexpr("""{
    .reg .pred %other;
    .reg .b32 %thread;
    mov.u32 %thread, %tid.x;
    setp.ne.u32 %other, %thread, 0;
    @%other bra $$L_end;
    st.release.sys.global.u64 [$1], $2;
$$L_end:
    mov.u32 $0, 0;
}""")
_ACQUIRE = tl.constexpr("""{
    .reg .pred %other;
    .reg .b32 %thread, %seen;
    mov.u32 %thread, %tid.x;
    setp.ne.u32 %other, %thread, 0;
    @%other bra $$L_end;
$$L_again:
    ld.acquire.sys.global.u32 %seen, [$1];
    setp.ne.u32 %other, %seen, $2;
    @%other bra $$L_again;
$$L_end:
    mov.u32 $0, 0;
}""")


@triton.jit
def _store_release(pointer, word):
    tl.inline_asm_elementwise(_RELEASE, "=r,l,l", [pointer.to(tl.int64), word], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _poll(pointer, value):
    tl.inline_asm_elementwise(_ACQUIRE, "=r,l,r", [pointer.to(tl.int64), value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _raise_request(request, sent, message):
    sequence = tl.load(sent) + 1
    tl.store(sent, sequence)
    _store_release(request, (sequence.to(tl.int64) << 32) | message)


@triton.jit
def _wait_for_reply(reply, sent):
    _poll(reply, tl.load(sent))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["message"], do_not_specialize_on_alignment=["weights", "ids", "padding"])
def _send_rows(
    hidden_states,
    weights,
    ids,
    padding,
    staged_hidden_states,
    staged_weights,
    staged_ids,
    request,
    sent,
    arrived,
    message,
    hidden_size: tl.constexpr,
    top_k: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    TOP_K_BLOCK: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ONE_ROW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HIDDEN_BLOCK)
    inside = columns < hidden_size
    values = tl.load(hidden_states + row * hidden_size + columns, mask=inside)
    tl.store(staged_hidden_states + row * hidden_size + columns, values, mask=inside)
    choices = tl.arange(0, TOP_K_BLOCK)
    chosen = choices < top_k
    row_ids = tl.load(ids + row * top_k + choices, mask=chosen)
    if HAS_PADDING:
        row_ids = tl.where(tl.load(padding + row) != 0, -1, row_ids)
    tl.store(staged_ids + row * top_k + choices, row_ids, mask=chosen)
    tl.store(staged_weights + row * top_k + choices, tl.load(weights + row * top_k + choices, mask=chosen), mask=chosen)
    tl.debug_barrier()
    if ONE_ROW:
        _raise_request(request, sent, message)
    elif tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        _raise_request(request, sent, message)


@triton.jit
def _receive_rows(
    staged_output, output, reply, sent, hidden_size: tl.constexpr, HIDDEN_BLOCK: tl.constexpr, WAIT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HIDDEN_BLOCK)
    inside = columns < hidden_size
    if WAIT:
        _wait_for_reply(reply, sent)
    values = tl.load(staged_output + row * hidden_size + columns, mask=inside)
    tl.store(output + row * hidden_size + columns, values, mask=inside)


@triton.jit(do_not_specialize=["message"])
def _request(request, sent, message):
    _raise_request(request, sent, message)


@triton.jit
def _await_reply(reply, sent):
    _wait_for_reply(reply, sent)


def send_rows(
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    padding: torch.Tensor | None,
    staged: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    request: torch.Tensor,
    sent: torch.Tensor,
    arrived: torch.Tensor,
    message: int,
) -> None:
    """Rows to `staged` (hidden states, weights, ids), ids of padding rows as -1, then the request."""
    num_tokens, hidden_size = hidden_states.shape
    top_k = ids.shape[1]
    _send_rows[(num_tokens,)](
        hidden_states,
        weights,
        ids,
        padding if padding is not None else ids,
        *staged,
        request,
        sent,
        arrived,
        message,
        hidden_size,
        top_k,
        triton.next_power_of_2(hidden_size),
        triton.next_power_of_2(top_k),
        padding is not None,
        num_tokens == 1,
        num_warps=_NUM_WARPS,
    )


def receive_rows(staged_output: torch.Tensor, output: torch.Tensor, reply: torch.Tensor, sent: torch.Tensor) -> None:
    """Waits for the reply, then takes the first rows of staged_output into output [num_tokens, hidden_size]."""
    num_tokens, hidden_size = output.shape
    # One poller: for several rows, a program of its own ahead of those that copy.
    wait = num_tokens == 1
    if not wait:
        await_reply(reply, sent)
    _receive_rows[(num_tokens,)](
        staged_output, output, reply, sent, hidden_size, triton.next_power_of_2(hidden_size), wait, num_warps=_NUM_WARPS
    )


def request(request: torch.Tensor, sent: torch.Tensor, message: int) -> None:
    """Makes the request alone; the stream has copied the rows."""
    _request[(1,)](request, sent, message, num_warps=1)


def await_reply(reply: torch.Tensor, sent: torch.Tensor) -> None:
    """Holds the stream until the reply is there."""
    _await_reply[(1,)](reply, sent, num_warps=1)
