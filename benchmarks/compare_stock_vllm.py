"""Tokens/s of the tiny model: from the GGUF beside stock vLLM on the same weights, dequantised to bfloat16.

    python benchmarks/compare_stock_vllm.py [--rounds 3] [--llm '{"enforce_eager": true}']

Both sides take turns in one run, each turn in a fresh process; the table gives medians and the ratio of the medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parents[1] / "examples/models/tiny-deepseek-v3"
GGUF = MODEL_DIR / "tiny-deepseek-v3-Q4_K_M.gguf"

# (batch size, prompt tokens, generated tokens). A generation of one token is a prefill.
CASES = ((1, 16, 128), (4, 16, 128), (8, 16, 128), (4, 512, 1))
REPEATS = 7  # of each case in each process, after one warm-up


def write_safetensors(folder: Path) -> None:
    """The model folder with every weight of the GGUF dequantised, under its Hugging Face name."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, dequantize
    from safetensors.torch import save_file

    from kt_vllm.checkpoint import CheckpointPlan, iter_dense
    from kt_vllm.gguf.reader import GGUFModel

    config = json.loads((MODEL_DIR / "config.json").read_text())
    plan = CheckpointPlan.build(GGUFModel.open(str(GGUF)), config)
    tensors = {name: tensor.contiguous() for name, tensor in iter_dense(plan, torch.bfloat16)}
    for layer, experts in plan.experts.items():
        for projection, source in (("gate", experts.gate), ("up", experts.up), ("down", experts.down)):
            data = b"".join(read_span(*span) for span in source.spans)
            rows = np.frombuffer(data, np.uint8).reshape(source.shape[0] * source.shape[1], -1)
            values = dequantize(rows, GGMLQuantizationType[source.type]).reshape(source.shape)
            for expert in range(source.shape[0]):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
                tensors[name] = torch.from_numpy(values[expert].copy()).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in MODEL_DIR.glob("*.json"):
        shutil.copy(file, folder)


def read_span(path: str, offset: int, nbytes: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def measure(model: str, gguf: str, llm: dict) -> None:
    """One process: prints the median seconds of every case as JSON."""
    from vllm import LLM, SamplingParams

    extra = {"additional_config": {"kt": {"gguf": gguf}}} if gguf else {}
    engine = LLM(
        model, dtype="bfloat16", max_model_len=1024, max_num_seqs=8, enable_prefix_caching=False, **extra, **llm
    )
    seconds = []
    for batch, prompt_len, output_len in CASES:
        prompts = [{"prompt_token_ids": [2 + (7 * i + 13 * j) % 4000 for j in range(prompt_len)]} for i in range(batch)]
        sampling = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True, detokenize=False)
        times = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            engine.generate(prompts, sampling, use_tqdm=False)
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times[1:]))
    print("SECONDS " + json.dumps(seconds), flush=True)


def run_side(model: str, gguf: str, llm: str) -> list[float]:
    command = [sys.executable, __file__, "--measure", model, "--gguf", gguf, "--llm", llm]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    for line in process.stdout.splitlines():
        if line.startswith("SECONDS "):
            return json.loads(line.removeprefix("SECONDS "))
    raise SystemExit(f"the measuring process failed:\n{process.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llm", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--gguf", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.gguf, json.loads(args.llm))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_safetensors(Path(folder))
        sides = {"stock": (folder, ""), "kt_vllm": (str(MODEL_DIR), str(GGUF))}
        seconds: dict[str, list[list[float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, (model, gguf) in sides.items():
                seconds[side].append(run_side(model, gguf, args.llm))
    print("| batch | prompt | generated | stock tokens/s | kt_vllm tokens/s | kt_vllm / stock |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case, (batch, prompt_len, output_len) in enumerate(CASES):
        tokens = batch * (output_len if output_len > 1 else prompt_len)
        stock, ours = (tokens / statistics.median(s[case] for s in seconds[side]) for side in sides)
        print(f"| {batch} | {prompt_len} | {output_len} | {stock:.0f} | {ours:.0f} | {ours / stock:.2f} |")


if __name__ == "__main__":
    main()
