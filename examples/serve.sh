#!/usr/bin/env bash
# An OpenAI server on port 8000: examples/serve.sh [model folder] [gguf] [further flags of `vllm serve`]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
model="${1:-$root/examples/models/tiny-deepseek-v3}"
gguf="${2:-$root/examples/models/tiny-deepseek-v3/tiny-deepseek-v3-Q4_K_M.gguf}"
# GiB for the KV cache on vLLM's CPU platform, which would take half of the machine's memory; a GPU does not read it.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
exec "$root/.venv/bin/kt-vllm" serve "$model" --kt-gguf "$gguf" "${@:3}"
