"""Several checks of one engine with the tiny model; a program for test_accuracy.py, prints a line of JSON for each.

An engine takes a minute to start on a GPU, so everything that one can show is asked of it in turn. The engine runs in
this process, where the hand-over's coordinator can be reached.

    python -m tests.gpu.engine_checks score,decode --llm '{"enforce_eager": true}' --kt '{"handover": "hostfunc"}'
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
from vllm import EngineArgs, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from kt_vllm.bench.e2e import Engine
from kt_vllm.bench.trace import summarise_trace
from tests.e2e.score import GGUF, MODEL_DIR, NUM_LOGPROBS, compare
from tests.tolerances import MOST_TOKENS

TOKENS = np.load(MODEL_DIR / "eval_tokens.npy")
# Of the captured sizes, between them, and above the smallest; 5 pads to 8.
BATCHES = (1, 2, 3, 5, 8, 16)
NEW_TOKENS = 24


def generate(llm: LLMEngine, prompts: list[list[int]], params: SamplingParams) -> list[Any]:
    """Final outputs in the order of the prompts."""
    begin = generate.count
    generate.count += len(prompts)
    for number, prompt in enumerate(prompts, begin):
        llm.add_request(f"{number:06}", {"prompt_token_ids": prompt}, params)
    done = {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.finished:
                done[output.request_id.split("-")[0]] = output
    return [done[f"{number:06}"] for number in range(begin, begin + len(prompts))]


generate.count = 0


def greedy(llm: LLMEngine, prompts: list[list[int]], num_tokens: int = NEW_TOKENS) -> tuple[list, list]:
    """The tokens that the model goes on with, and their log-probabilities from decode steps."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = generate(llm, prompts, params)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    logprobs = [
        [e[t].logprob for e, t in zip(o.outputs[0].logprobs, row, strict=True)]
        for o, row in zip(outputs, tokens, strict=True)
    ]
    return tokens, logprobs


def rescore(llm: LLMEngine, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of the answers' tokens from one prefill of prompt and answer."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return [
        [entry[t].logprob for entry, t in zip(o.prompt_logprobs[-len(answer) :], answer, strict=True)]
        for o, answer in zip(generate(llm, texts, params), answers, strict=True)
    ]


def difference(a: list[list[float]], b: list[list[float]]) -> dict[str, float]:
    differences = [abs(x - y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)]
    return {
        "mean": float(np.mean(differences)),
        "most": float(np.quantile(differences, MOST_TOKENS, method="lower")),
        "max": max(differences),
        "tokens": len(differences),
    }


def some_prompts(count: int, salt: int) -> list[list[int]]:
    """Of 5 to 40 tokens, other ones for each salt."""
    rng = np.random.default_rng(salt)
    rows, starts, lengths = rng.integers(0, 8, count), rng.integers(0, 200, count), rng.integers(5, 41, count)
    return [TOKENS[row, start : start + n].tolist() for row, start, n in zip(rows, starts, lengths, strict=True)]


class Checks:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.llm = engine, engine.llm

    def score(self) -> dict[str, Any]:
        """Against exact log-probabilities, by prefill."""
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=NUM_LOGPROBS, detokenize=False)
        outputs = generate(self.llm, TOKENS.tolist(), params)
        return compare(outputs, dict(np.load(MODEL_DIR / "expected-Q4_K_M.npz")), TOKENS)

    def decode(self) -> dict[str, Any]:
        """Greedy answers in each batch size: their log-probabilities by decode steps and by prefill are the same."""
        result: dict[str, Any] = {}
        for batch in BATCHES:
            prompts = some_prompts(batch, batch)
            before = self.engine.graphs.copy()
            tokens, logprobs = greedy(self.llm, prompts)
            graphs = dict(self.engine.graphs - before)
            result[str(batch)] = {**difference(logprobs, rescore(self.llm, prompts, tokens)), "graphs": graphs}
        return result

    def prefix(self) -> dict[str, Any]:
        """The second time the prompts are in the cache. Backwards, so that they are not the first time."""
        prompts = [row[249::-1].tolist() for row in TOKENS[:3]]
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        tokens, first = greedy(self.llm, prompts, 8)
        again, second = greedy(self.llm, prompts, 8)
        cached = [o.num_cached_tokens for o in generate(self.llm, prompts, params)]
        same = [
            next((i for i, (x, y) in enumerate(zip(*pair, strict=True)) if x != y), 8)
            for pair in zip(tokens, again, strict=True)
        ]
        # Up to where a near-tie went the other way.
        cut = [[row[:n] for row, n in zip(rows, same, strict=True)] for rows in (first, second)]
        return {**difference(*cut), "cached": cached}

    def preemption(self) -> dict[str, Any]:
        """More tokens than the cache holds."""

        def count() -> float:
            return sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")

        before, prompts = count(), some_prompts(16, 99)
        tokens, logprobs = greedy(self.llm, prompts, 96)
        return {**difference(logprobs, rescore(self.llm, prompts, tokens)), "preemptions": count() - before}

    def sleep(self) -> dict[str, Any]:
        """Level 1, and awake again."""
        prompts = some_prompts(3, 7)
        tokens, _ = greedy(self.llm, prompts)
        before = rescore(self.llm, prompts, tokens)
        self.llm.sleep(level=1)
        self.llm.wake_up()
        again, logprobs = greedy(self.llm, prompts)
        return {
            **difference(before, rescore(self.llm, prompts, tokens)),
            "decode": difference(logprobs, rescore(self.llm, prompts, again)),
        }

    def steps(self) -> dict[str, Any]:
        """Median time of a decode step of one request, in ms, and the executor's part."""
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
        medians = []
        for salt in range(3):
            self.llm.add_request(f"steps-{salt}", {"prompt_token_ids": some_prompts(1, salt)[0]}, params)
            times = []
            while self.llm.has_unfinished_requests():
                if self.llm.step():
                    times.append(time.perf_counter())
            medians.append(statistics.median(b - a for a, b in itertools.pairwise(times[8:])) * 1e3)
        return {"ms": min(medians), "medians": medians, "clock": self.engine.clock_by}

    def trace(self) -> dict[str, Any]:
        """How many graphs a decode step launches, and where its time goes, by torch's profiler."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            run = self.engine.run(1, 32, 16, trace=path)
            return {"graphs": run.graphs, **(summarise_trace(path, run.decode.num_layers) or {})}

    def watchdog(self) -> dict[str, Any]:
        """Nobody answers any more: the loop that steps the engine gets an exception. The last check."""
        self.llm.apply_model(stop_answering)
        begin = time.perf_counter()
        try:
            greedy(self.llm, some_prompts(3, 5))
        except RuntimeError as error:
            return {"raised": f"{type(error).__name__}: {error}", "after_seconds": time.perf_counter() - begin}
        raise AssertionError("an engine whose executor answers nothing went on")


def stop_answering(model: Any) -> None:
    """Of every coordinator of this worker."""
    from kt_vllm.handover.device_layer import handovers

    for handover in handovers:
        handover.coordinator.stop_answering()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checks")
    parser.add_argument("--llm", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--kt", default="{}", help="more of additional_config['kt'], as JSON")
    args = parser.parse_args()
    defaults = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 16, "max_logprobs": NUM_LOGPROBS}
    kt = {"gguf": str(GGUF), **json.loads(args.kt)}
    engine = Engine(
        EngineArgs(
            model=str(MODEL_DIR),
            **{**defaults, **json.loads(args.llm)},
            additional_config={"kt": kt},
            cudagraph_metrics=True,
        ),
        seed=0,
    )
    config = engine.config
    about = {
        "start_seconds": engine.start_seconds,
        "clock": engine.clock_by,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "v2_model_runner": bool(config.use_v2_model_runner),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "kv_cache_tokens": config.cache_config.kv_cache_size_tokens,
    }
    print("CHECK " + json.dumps({"engine": about}), flush=True)
    checks = Checks(engine)
    for name in args.checks.split(","):
        begin = time.perf_counter()
        try:
            result = getattr(checks, name)()
        except Exception as error:  # the others may still tell something
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        result["check_seconds"] = time.perf_counter() - begin
        print("CHECK " + json.dumps({name: result}), flush=True)
    engine.close()
    sys.stdout.flush()
    os._exit(0)  # as score.py does


if __name__ == "__main__":
    main()
