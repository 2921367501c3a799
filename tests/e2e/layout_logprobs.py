"""Log-probabilities of the tiny model from several files, one after another; a program for test_layouts.py.

Takes pairs of model and --kt-gguf as JSON; prints a JSON line with each one's log-probabilities of the next tokens.
"""

import json
import os
import sys

import numpy as np

from tests.e2e.score import MODEL_DIR

NUM_ROWS, NUM_TOKENS = 2, 96


def main() -> None:
    # The default asks for most of the machine; the tiny model's cache is small.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as score.py does
    from vllm import SamplingParams

    from kt_vllm import LLM

    tokens = np.load(MODEL_DIR / "eval_tokens.npy")[:NUM_ROWS, :NUM_TOKENS]
    params = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0, logprobs=0, detokenize=False)
    for model, gguf in json.loads(sys.argv[1]):
        # One sequence at a time: how many tokens an expert gets at once decides its kernels, and so its last bits.
        llm = LLM(
            model, kt_gguf=gguf, dtype="bfloat16", max_model_len=256, max_num_seqs=1, enforce_eager=True
        )  # fmt: skip
        text = llm.generate("The history of", SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)
        outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in tokens], params, use_tqdm=False)
        logprobs = [
            entry[token].logprob
            for output, row in zip(outputs, tokens.tolist(), strict=True)
            for entry, token in [
                *zip(output.prompt_logprobs[1:], row[1:], strict=True),
                *zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True),
            ]
        ]
        kept = llm.llm_engine.vllm_config.additional_config["kt"]["gguf"]
        print("LOGPROBS " + json.dumps({"text": text[0].outputs[0].text, "values": logprobs, "gguf": kept}), flush=True)
        llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # as score.py does


if __name__ == "__main__":
    main()
