"""score.py's run with the hand-over to a coordinator, where there is no device: host code plays the stream.

Everything of the device's way but its kernels: placement, loader, layer, pieces, mailboxes, coordinator. A program, as
score.py; prints the same line.
"""

import json
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # what is replaced here must be replaced where the model is
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.plugins import load_general_plugins

from tests.e2e.score import GGUF, MODEL_DIR, NUM_LOGPROBS, compare


class HostStream:
    """A Way that does everything at once, on tensors of the host."""

    name = "host"

    def send(self, slot, layer, hidden_states, topk_weights, topk_ids, padding) -> None:
        from kt_vllm.handover.staging import message

        num_tokens = hidden_states.shape[0]
        slot.hidden_states[:num_tokens] = hidden_states
        slot.topk_weights[: topk_weights.numel()] = topk_weights.flatten()
        slot.topk_ids[: topk_ids.numel()] = topk_ids.flatten()
        slot.sent.add_(1)
        slot.request[0] = (int(slot.sent) << 32) | message(layer, num_tokens)

    def receive(self, slot, output) -> None:
        while int(slot.reply) != int(slot.sent):
            pass
        output.copy_(slot.output[: output.shape[0]])


class Device:
    """What the loader asks the platform."""

    device_type = "cpu"

    @staticmethod
    def is_cpu() -> bool:
        return False


def main() -> None:
    load_general_plugins()
    from kt_vllm import loader
    from kt_vllm.bench.e2e_clock import read_clock, start_clock
    from kt_vllm.handover import device_layer

    device_layer.MAX_PIECE_TOKENS = 300  # so that a batch goes in pieces
    device_layer.Handover._choose = lambda self, way: HostStream()
    device_layer.DeviceLayerHandle.is_capturing = staticmethod(lambda: False)
    loader.current_platform = Device()
    torch.accelerator.current_device_index = lambda: 0

    tokens = np.load(MODEL_DIR / "eval_tokens.npy")
    expected = dict(np.load(MODEL_DIR / "expected-Q4_K_M.npz"))
    llm = LLM(
        str(MODEL_DIR),
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=8,
        max_logprobs=NUM_LOGPROBS,
        enforce_eager=True,
        distributed_executor_backend="uni",
        additional_config={"kt": {"gguf": str(GGUF)}},
    )
    outputs = llm.generate(
        [{"prompt_token_ids": row.tolist()} for row in tokens],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=NUM_LOGPROBS, detokenize=False),
        use_tqdm=False,
    )
    assert llm.apply_model(start_clock) == ["coordinator, host"]
    (clock,) = llm.apply_model(read_clock)
    assert clock.num_layers == 3 and clock.num_calls >= 3 and clock.num_tokens >= 3 * tokens.size, clock
    print("SCORE " + json.dumps(compare(outputs, expected, tokens)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
