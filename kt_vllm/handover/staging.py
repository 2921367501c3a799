"""The pinned host memory of the hand-over: what csrc/handover/mailbox.h calls a slot, as tensors of both sides."""

from dataclasses import dataclass

import torch

# Words of csrc/handover/mailbox.h.
_MAILBOX_BYTES = 128
_REPLY_OFFSET = 64


@dataclass(frozen=True)
class Slot:
    """Where one call at a time waits. Host tensors are pinned; sent and arrived are the device's (kernels.py)."""

    hidden_states: torch.Tensor  # [max_tokens, hidden_size]
    topk_weights: torch.Tensor  # float32 [max_tokens * max_top_k]
    topk_ids: torch.Tensor  # int32 [max_tokens * max_top_k]
    output: torch.Tensor  # [max_tokens, hidden_size]
    request: torch.Tensor  # int64 [1]
    reply: torch.Tensor  # int32 [1]
    sent: torch.Tensor  # int32 [1]
    arrived: torch.Tensor  # int32 [1]

    @classmethod
    def allocate(
        cls, max_tokens: int, hidden_size: int, max_top_k: int, dtype: torch.dtype, device: torch.device
    ) -> "Slot":
        mailbox = _pinned(_MAILBOX_BYTES, dtype=torch.uint8)
        assert mailbox.data_ptr() % _REPLY_OFFSET == 0, "a cache line for each word"
        return cls(
            hidden_states=_pinned(max_tokens, hidden_size, dtype=dtype),
            topk_weights=_pinned(max_tokens * max_top_k, dtype=torch.float32),
            topk_ids=_pinned(max_tokens * max_top_k, dtype=torch.int32),
            output=_pinned(max_tokens, hidden_size, dtype=dtype),
            request=mailbox.view(torch.int64)[:1],
            reply=mailbox.view(torch.int32)[_REPLY_OFFSET // 4 :][:1],
            sent=torch.zeros(1, dtype=torch.int32, device=device),
            arrived=torch.zeros(1, dtype=torch.int32, device=device),
        )

    def addresses(self) -> tuple[int, int, int, int, int]:
        """As kt::MailboxSlot has them."""
        tensors = (self.request, self.hidden_states, self.topk_ids, self.topk_weights, self.output)
        return tuple(tensor.data_ptr() for tensor in tensors)

    def last_request(self) -> int:
        """The sequence number of the last request that arrived, as a signed number: what its reply is."""
        return int(self.request.item()) >> 32

    def restore_device_words(self) -> None:
        """After the device's memory was discarded (sleep level 2): as they were while nothing is in flight."""
        self.sent.copy_(self.reply)
        self.arrived.zero_()


def message(layer: int, num_tokens: int) -> int:
    """The lower half of a request."""
    return layer << 16 | num_tokens


def _pinned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    # Zeros: every page is there before the first call, and a slot that was never answered holds nothing strange.
    return torch.zeros(*shape, dtype=dtype, pin_memory=torch.cuda.is_available())
