"""Models of the zoo through vLLM against the exact float32 log-probabilities; prints a line of JSON for each.

    python -m tests.zoo.score --models mixtral,glm-4.5 --mixes Q4_K_M,Q8_0 --modes eager,compiled

One engine after the other in one process (vLLM's in-process engine): most of the time to start one is importing vLLM.
"""

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.zoo.make import EXPECTED, GGUF_NAME, NUM_SEQUENCES, TOKENS, make
from tests.zoo.models import MODELS

MODES: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}, "compiled": {}}


def compare(outputs: list, expected: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Mean NLL of random tokens and of text, their relative differences to the exact ones, mean KL(exact || vLLM).

    expected [sequences, positions, vocabulary]; every position has vLLM's log-probabilities of the whole vocabulary.
    """
    actual = np.full_like(expected[:, :-1], np.nan)
    for row, output in enumerate(outputs):
        for position in range(1, tokens.shape[1]):
            for token, entry in output.prompt_logprobs[position].items():
                actual[row, position - 1, token] = entry.logprob
    assert np.isfinite(actual).all(), "vLLM left out log-probabilities"
    exact, next_tokens = expected[:, :-1], tokens[:, 1:, None]
    kl = (np.exp(exact) * (exact - actual)).sum(-1)
    want = -np.take_along_axis(exact, next_tokens, 2)[..., 0]
    got = -np.take_along_axis(actual, next_tokens, 2)[..., 0]
    result = {}
    for kind, rows in (("random", slice(None, NUM_SEQUENCES // 2)), ("text", slice(NUM_SEQUENCES // 2, None))):
        result[f"{kind}_nll"] = float(want[rows].mean())
        result[f"{kind}_nll_difference"] = float(got[rows].mean() / want[rows].mean() - 1)
        result[f"{kind}_kl"] = float(kl[rows].mean())
    return result


def score(folder: Path, llm_arguments: dict[str, Any], kt: dict[str, Any]) -> dict[str, float]:
    """Serves folder's model and compares."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    tokens, expected = np.load(folder / TOKENS), np.load(folder / EXPECTED)
    llm = LLM(
        str(folder),
        additional_config={"kt": {"gguf": str(folder / GGUF_NAME), **kt}},
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=1024,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        **llm_arguments,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": row.tolist()} for row in tokens],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False),
        use_tqdm=False,
    )
    llm.llm_engine.engine_core.shutdown()
    result = compare(outputs, expected, tokens)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--mixes", default="Q4_K_M")
    parser.add_argument("--modes", default="eager")
    parser.add_argument("--kt", default="{}", help="more of additional_config['kt'], as JSON")
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    with tempfile.TemporaryDirectory() as folder:
        for name, mix in itertools.product(args.models.split(","), args.mixes.split(",")):
            path = Path(folder) / f"{name}-{mix}"
            make(path, name, mix, seed)
            for mode in args.modes.split(","):
                start = time.monotonic()
                result: dict[str, Any] = {"model": name, "mix": mix, "mode": mode, "seed": seed}
                result |= score(path, MODES[mode], json.loads(args.kt))
                result["seconds"] = round(time.monotonic() - start, 1)
                print("ZOO " + json.dumps(result), flush=True)
    sys.stdout.flush()
    os._exit(0)  # not through the interpreter's end, where vLLM's threads may still free tensors


if __name__ == "__main__":
    main()
