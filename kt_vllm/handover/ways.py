"""The two ways to hand a call over on a stream, eager or captured: flags, and host functions."""

import ctypes
from typing import Protocol

import torch

from kt_vllm import _native
from kt_vllm.handover import kernels
from kt_vllm.handover.staging import Slot, message

# Above this the copy engine moves the rows, and leaves the device's cores free. Not tuned: 16 tokens of DeepSeek-R1
# go by kernel in 37 us there and back, 64 by copies in 145.
_MAX_KERNEL_BYTES = 256 << 10


class Way(Protocol):
    """Everything is queued on the current stream; a slot's send() and receive() alternate."""

    name: str

    def send(
        self,
        slot: Slot,
        layer: int,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        """Device tensors: hidden_states [num_tokens, hidden_size], topk_weights float32 and topk_ids int32
        [num_tokens, top_k], padding bool [num_tokens]: rows whose ids count as -1. Makes the request."""

    def receive(self, slot: Slot, output: torch.Tensor) -> None:
        """Holds the stream until the reply is there, then fills output [num_tokens, hidden_size]."""


class Flags:
    """Small kernels write and await the flags: some microseconds a call (kernels.py)."""

    name = "flags"

    def send(
        self,
        slot: Slot,
        layer: int,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        num_tokens = hidden_states.shape[0]
        if hidden_states.nbytes <= _MAX_KERNEL_BYTES:
            staged = (slot.hidden_states, slot.topk_weights, slot.topk_ids)
            kernels.send_rows(
                hidden_states,
                topk_weights,
                topk_ids,
                padding,
                staged,
                slot.request,
                slot.sent,
                slot.arrived,
                message(layer, num_tokens),
            )
        else:
            _copy_to(slot, hidden_states, topk_weights, topk_ids, padding)
            kernels.request(slot.request, slot.sent, message(layer, num_tokens))

    def receive(self, slot: Slot, output: torch.Tensor) -> None:
        if output.nbytes <= _MAX_KERNEL_BYTES:
            kernels.receive_rows(slot.output, output, slot.reply, slot.sent)
        else:
            kernels.await_reply(slot.reply, slot.sent)
            output.copy_(slot.output[: output.shape[0]], non_blocking=True)


class HostFunctions:
    """cuLaunchHostFunc: works on every driver, and costs some 60 us a call."""

    name = "hostfunc"

    def __init__(self) -> None:
        self._functions = _native.HostFunctions()  # captured graphs point into it
        self._calls: dict[tuple[int, int, int], int] = {}
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def send(
        self,
        slot: Slot,
        layer: int,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:
        _copy_to(slot, hidden_states, topk_weights, topk_ids, padding)
        self._queue(self._functions.request, slot, layer, hidden_states.shape[0])

    def receive(self, slot: Slot, output: torch.Tensor) -> None:
        self._queue(self._functions.await_reply, slot, 0, 0)
        output.copy_(slot.output[: output.shape[0]], non_blocking=True)

    def _queue(self, function: int, slot: Slot, layer: int, num_tokens: int) -> None:
        key = (slot.request.data_ptr(), layer, num_tokens)
        if key not in self._calls:
            self._calls[key] = self._functions.call(*key)
        status = self._launch(torch.cuda.current_stream().cuda_stream, function, self._calls[key])
        if status != 0:
            raise RuntimeError(f"cuLaunchHostFunc failed with CUresult {status}")


def _copy_to(
    slot: Slot,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    padding: torch.Tensor | None,
) -> None:
    if padding is not None:
        topk_ids = topk_ids.masked_fill(padding[:, None], -1)
    slot.hidden_states[: hidden_states.shape[0]].copy_(hidden_states, non_blocking=True)
    slot.topk_weights[: topk_weights.numel()].copy_(topk_weights.flatten(), non_blocking=True)
    slot.topk_ids[: topk_ids.numel()].copy_(topk_ids.flatten(), non_blocking=True)
