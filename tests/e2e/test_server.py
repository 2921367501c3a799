"""The OpenAI endpoint: completions, streams, concurrency, vLLM's own benchmarks; and how it starts and ends."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.e2e.score import GGUF, MODEL_DIR
from tests.e2e.server import Server
from tests.e2e.wide_vocabulary import write_wide_model
from tests.tolerances import MAX_BATCHED_LOGPROB_DIFFERENCE, MAX_MEAN_BATCHED_LOGPROB_DIFFERENCE

pytestmark = pytest.mark.e2e

# Engines of `bench` in one process, as in score.py; the server's are several.
SMALL_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "log.txt")
    try:
        yield running.wait_healthy()
    finally:
        assert running.stop(signal.SIGTERM) < 10


def prompt(index: int) -> list[int]:
    """Token ids of a prompt; lengths 8 to 256."""
    tokens = np.load(MODEL_DIR / "eval_tokens.npy")
    length = (8, 17, 40, 64, 100, 128, 200, 256)[index % 8]
    return tokens[index % 8, :length].tolist()


def test_completion_and_streamed_chat(server: Server) -> None:
    client = openai.OpenAI(base_url=server.base_url + "/v1", api_key="none")
    completion = client.completions.create(model="tiny", prompt="The history of", max_tokens=16, temperature=0)
    assert completion.choices[0].text.strip() and completion.usage.completion_tokens == 16
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "In the beginning"}],
        max_tokens=16,
        stream=True,
        temperature=0,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).strip()


def test_several_choices_of_one_prompt(server: Server) -> None:
    client = openai.OpenAI(base_url=server.base_url + "/v1", api_key="none")
    completion = client.completions.create(model="tiny", prompt="The history of", max_tokens=8, n=3, seed=7)
    assert len(completion.choices) == 3


async def _stream(client: openai.AsyncOpenAI, index: int) -> list[tuple[str, float]]:
    """(token, log-probability) of each streamed token."""
    stream = await client.completions.create(
        model="tiny", prompt=prompt(index), max_tokens=8 + index % 17, temperature=0, stream=True, logprobs=1
    )
    answer: list[tuple[str, float]] = []
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        if logprobs is not None:
            answer += zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    return answer


def test_32_concurrent_streams_equal_single_requests(server: Server) -> None:
    """Greedy answers are compared token by token up to the first near-tie that batching decides the other way."""

    async def run() -> tuple[list, list]:
        client = openai.AsyncOpenAI(base_url=server.base_url + "/v1", api_key="none", timeout=300)
        together = await asyncio.gather(*(_stream(client, index) for index in range(32)))
        return together, [await _stream(client, index) for index in range(32)]

    together, alone = asyncio.run(run())
    differences = []
    for index, (batched, single) in enumerate(zip(together, alone, strict=True)):
        assert len(batched) == len(single) == 8 + index % 17
        for (token_a, logprob_a), (token_b, logprob_b) in zip(batched, single, strict=True):
            differences.append(abs(logprob_a - logprob_b))
            if token_a != token_b:
                break
    assert len(differences) > 32 * 8 / 2, f"only {len(differences)} tokens could be compared"
    assert np.mean(differences) < MAX_MEAN_BATCHED_LOGPROB_DIFFERENCE, sorted(differences)[-20:]
    assert max(differences) < MAX_BATCHED_LOGPROB_DIFFERENCE, sorted(differences)[-20:]


def test_vllm_bench_serve(server: Server) -> None:
    command = [
        *(sys.executable, "-m", "kt_vllm.cli", "bench", "serve", "--base-url", server.base_url, "--model", "tiny"),
        *("--tokenizer", str(MODEL_DIR), "--dataset-name", "random", "--random-input-len", "32"),
        *("--random-output-len", "8", "--num-prompts", "8"),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Successful requests:" in process.stdout and "Output token throughput" in process.stdout


def bench(*arguments: str) -> str:
    """What `kt-vllm bench` printed."""
    command = [sys.executable, "-m", "kt_vllm.cli", "bench", *arguments, "--enforce-eager"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=SMALL_CACHE)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_vllm_bench_latency(tmp_path: Path) -> None:
    # It draws token ids below 10000, more than the shipped model has.
    model, weights = write_wide_model(tmp_path / "model")
    out = bench(
        *("latency", "--model", str(model), "--kt-gguf", str(weights), "--dtype", "bfloat16", "--max-model-len", "512"),
        *("--input-len", "32", "--output-len", "8", "--batch-size", "2", "--num-iters-warmup", "1", "--num-iters", "2"),
    )
    assert "Avg latency" in out


def test_vllm_bench_throughput() -> None:
    out = bench(
        *("throughput", "--model", str(MODEL_DIR), "--kt-gguf", str(GGUF), "--dtype", "bfloat16"),
        *("--max-model-len", "512", "--random-input-len", "32", "--random-output-len", "8", "--num-prompts", "8"),
    )
    assert "Throughput:" in out and "total tokens/s" in out


def test_interrupt_while_serving(tmp_path: Path) -> None:
    """SIGTERM while serving ends the fixture's server."""
    running = Server(tmp_path / "log.txt", "--enforce-eager").wait_healthy()
    assert running.stop(signal.SIGINT) < 10


@pytest.mark.alone
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_loading(tmp_path: Path, signal_number: int) -> None:
    running = Server(tmp_path / "log.txt", "--enforce-eager")
    running.wait_for_log("Loading GGUF")
    assert running.stop(signal_number) < 10
