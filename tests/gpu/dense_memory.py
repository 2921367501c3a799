"""GPU memory of all dense weights of DeepSeek-R1's real shape in bf16, fp8 and int4; a program, prints a table.

    python tests/gpu/dense_memory.py FOLDER [--quants bf16,fp8,int4] [--limit-gb 24] [--max-model-len 32768]

FOLDER: from examples/make_synthetic_gguf.py FOLDER --no-experts, and made by it if it is not there. The engine runs in
its no-experts mode: routed experts contribute nothing. --limit-gb: as if the GPU had so many GB; prints the KV tokens.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# GB, with embedding, and the head one step more exact.
LIMITS = {"bf16": 37.0, "fp8": 21.5, "int4": 13.5}
_NUMBER = r"([\d.,]+)"

ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
arguments = json.loads(sys.argv[1])
llm = LLM(**arguments)
out = llm.generate([{"prompt_token_ids": [1, 2, 3, 4]}], SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
print("TOKENS", len(out[0].outputs[0].token_ids), flush=True)
"""


def found(pattern: str, log: str) -> float | None:
    match = re.search(pattern, log)
    return float(match[1].replace(",", "")) if match else None


def run(folder: Path, quant: str, max_model_len: int, limit_gb: float | None, eager: bool) -> dict[str, object]:
    """One engine's own account of its memory, from its log, in GB."""
    import torch

    kt = {"gguf": str(folder), "gpu_quant": quant, "no_experts": True}
    arguments: dict[str, object] = {
        "model": str(folder),
        "max_model_len": max_model_len,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "enforce_eager": eager,
        "skip_tokenizer_init": True,
        "additional_config": {"kt": kt},
    }
    total = torch.cuda.mem_get_info()[1]
    if limit_gb is not None:
        arguments["gpu_memory_utilization"] = limit_gb * 1e9 / total
    begin = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", ENGINE, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "DEBUG"},
    )
    log = process.stdout + process.stderr
    if process.returncode or "TOKENS 4" not in log:
        print(log[-8000:])
        sys.exit(f"the engine ended with status {process.returncode}")
    gib = (1 << 30) / 1e9
    weights = found(rf"Model loading took {_NUMBER} GiB", log)
    peak = found(rf"Peak GPU memory after loading weights: {_NUMBER} GiB", log)
    return {
        "quant": quant,
        "weights_gb": None if weights is None else round(weights * gib, 2),
        "peak_while_loading_gb": None if peak is None else round(peak * gib, 2),
        "limit_gb": LIMITS[quant],
        "loading_s": found(
            rf"Model loading took {_NUMBER} GiB memory and {_NUMBER} seconds".replace("([", "(?:[", 1), log
        ),
        "kv_tokens": found(rf"KV cache size: {_NUMBER} tokens", log),
        "start_to_end_s": round(time.perf_counter() - begin, 1),
        "lines": [line.split("] ")[-1] for line in log.splitlines() if "kt_vllm: " in line and "dense" in line],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--quants", default="bf16,fp8,int4")
    parser.add_argument("--limit-gb", type=float)
    parser.add_argument("--max-model-len", type=int, default=32768)
    parser.add_argument("--graphs", action="store_true", help="compiled, with CUDA graphs; default: eager")
    args = parser.parse_args()
    if not list(args.folder.glob("*.gguf")):
        command = [sys.executable, "examples/make_synthetic_gguf.py", str(args.folder.resolve()), "--no-experts"]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    failed = []
    for quant in args.quants.split(","):
        result = run(args.folder.resolve(), quant, args.max_model_len, args.limit_gb, not args.graphs)
        print("DENSE_MEMORY " + json.dumps(result), flush=True)
        weights = result["weights_gb"]
        if not isinstance(weights, float) or weights > LIMITS[quant]:
            failed.append(quant)
    if failed:
        sys.exit(f"above its limit, or not in the log: {', '.join(failed)}")


if __name__ == "__main__":
    main()
