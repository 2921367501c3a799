"""Log-probabilities of the tiny model through vLLM against the exact ones; run as a program, prints one line of JSON.

A process of its own for each configuration: vLLM holds global state, and its workers must start from a clean one.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np

MODEL_DIR = Path(__file__).resolve().parents[2] / "examples/models/tiny-deepseek-v3"
GGUF = MODEL_DIR / "tiny-deepseek-v3-Q4_K_M.gguf"

# Enough of vLLM's own distribution to hold the stored top 20: what is missing is reported as missing_mass.
NUM_LOGPROBS = 256


def compare(outputs: list, expected: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, float]:
    """Mean NLL, its relative difference to the expected one, mean KL(expected || actual) over the stored top 20."""
    nll, kl, missing_mass = [], [], 0.0
    for row, output in enumerate(outputs):
        for position in range(1, tokens.shape[1]):
            actual = {token: entry.logprob for token, entry in output.prompt_logprobs[position].items()}
            nll.append(-actual[int(tokens[row, position])])
            divergence = 0.0
            for token, log_p in zip(
                expected["top_ids"][row, position - 1], expected["top_logprobs"][row, position - 1], strict=True
            ):
                if int(token) in actual:
                    divergence += np.exp(log_p) * (log_p - actual[int(token)])
                else:
                    missing_mass += float(np.exp(log_p))
            kl.append(divergence)
    want = float(expected["nll"].mean())
    return {
        "nll": float(np.mean(nll)),
        "expected_nll": want,
        "nll_difference": abs(float(np.mean(nll)) / want - 1),
        "kl": float(np.mean(kl)),
        "missing_mass": missing_mass / len(kl),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--gguf", default=str(GGUF), help="'none' for stock vLLM on the weights in --model")
    parser.add_argument("--llm", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--kt", default="{}", help="more of additional_config['kt'], as JSON")
    args = parser.parse_args()

    # The default asks for most of the machine; the tiny model's cache is small.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    config = json.loads(args.llm)
    if config.get("enforce_eager") and config.get("tensor_parallel_size", 1) == 1:
        # Processes for engine and worker would double the time: each imports vLLM. Compiled runs and servers have them.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    tokens = np.load(MODEL_DIR / "eval_tokens.npy")
    expected = dict(np.load(MODEL_DIR / "expected-Q4_K_M.npz"))
    extra = {} if args.gguf == "none" else {"additional_config": {"kt": {"gguf": args.gguf, **json.loads(args.kt)}}}
    defaults = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 8, "max_logprobs": NUM_LOGPROBS}
    llm = LLM(args.model, **{**defaults, **extra, **config})
    outputs = llm.generate(
        [{"prompt_token_ids": row.tolist()} for row in tokens],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=NUM_LOGPROBS, detokenize=False),
        use_tqdm=False,
    )
    print("SCORE " + json.dumps(compare(outputs, expected, tokens)), flush=True)
    # Not through the interpreter's end: vLLM's output thread may still free tensors there, and torch then aborts.
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
