#!/usr/bin/env bash
# All checks of a machine with an NVIDIA GPU and vLLM (CUDA) installed; one table last. Needs no network: a C++ compiler,
# cmake, ninja, and a Python with vLLM, pybind11 and pytest.
#
#     [OUT=folder] [MODELS=folder] [WHEELS=folder] [PYTHON=python3] benchmarks/gpu_machine.sh [STEP ...]
#
# STEP, in the order of importance; default: all of them.
#   build       the extension, and what lets vLLM find the plugin
#   handover    hand-over alone: tests, and what it costs
#   accuracy    the tiny model, every mode; ACCURACY="-k test_graphs" chooses an engine
#   few, many   DeepSeek-R1's shape with 3 and 7 MoE layers: made, prefill and decode measured, a decode step traced
#   serve       `vllm bench serve` with the model of `many`
#   linear      the dense products of a decode step alone, by every kernel that could compute them
#   quant       dense weights in fp8 and int4: tests
#   memory      all 61 layers' dense weights on the GPU; then int4 in 24 GB
#   gpuonly     the model of `many` without experts: the GPU's part of a step, and of the engine's start
#   soak        mixed load for SOAK_SECONDS (default 420), then a lost executor
#   soakstart, soakresult   the same for 600 s beside other calls of this script
#   clean       removes the models
#   table       of what is in OUT; always last
# OUT: where logs and JSON files go. MODELS: room for 52 GB, best in memory, which must then hold file and experts: 100 GB.
# WHEELS: what that Python lacks of gguf, rich and the like. Every step has a time limit; a step that fails does not stop
# the next one, unless it was the build.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=$(command -v "${PYTHON:-python3}")
BUILD=build/gpu
OUT=${OUT:-$BUILD/results}
SOAK_SECONDS=${SOAK_SECONDS:-420}
LIKE=${LIKE:-deepseek-r1}
mkdir -p "$BUILD/site" "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD:$PWD/$BUILD/site${PYTHONPATH:+:$PYTHONPATH}
export KT_RESULTS=$OUT

free_gb() { df -B1000000000 --output=avail "$1" 2>/dev/null | tail -n 1 | tr -d ' '; }
if [ -z "${MODELS:-}" ]; then
  MODELS=/tmp/kt-models
  [ "$(free_gb /dev/shm || echo 0)" -gt 55 ] && MODELS=/dev/shm/kt-models
fi
mkdir -p "$MODELS"

for wheel in ${WHEELS:+"$WHEELS"/*.whl}; do
  "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$BUILD/site" "$wheel" || exit 1
done

summary=() failed=0

# run NAME SECONDS COMMAND...: the output goes to a file, its end to the terminal.
run() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $name (at most $limit s)"
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n "${TAIL:-30}" "$OUT/$name.log" | cut -c 1-400
  [ $status -eq 124 ] && echo "-- $name ran into its time limit"
  [ $status -ne 0 ] && failed=1
  summary+=("$name: $([ $status -eq 0 ] && echo ok || echo "FAILED ($status)"), $((SECONDS - start)) s")
  return $status
}

build() {
  cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DKT_BUILD_TESTS=OFF \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/kt_vllm" -DPython_EXECUTABLE="$PYTHON" && cmake --build "$BUILD" && register
}

# vLLM finds plugins by the metadata of installed packages.
register() {
  local version info
  version=$("$PYTHON" -c 'import kt_vllm; print(kt_vllm.__version__)') || return 1
  info=$BUILD/site/kt_vllm-$version.dist-info
  mkdir -p "$info"
  printf 'Metadata-Version: 2.1\nName: kt-vllm\nVersion: %s\n' "$version" >"$info/METADATA"
  printf '[vllm.general_plugins]\nkt = kt_vllm.plugin:register\n' >"$info/entry_points.txt"
  "$PYTHON" -c '
import importlib.metadata, kt_vllm._native as native, torch
found = [e.value for e in importlib.metadata.entry_points(group="vllm.general_plugins")]
assert "kt_vllm.plugin:register" in found, found
print("extension:", *native.choose_isa("auto"))
print("device:", torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch", torch.__version__)
'
}

# model LAYERS: made unless it is there; other depths go, since memory holds one.
model() {
  local folder=$MODELS/$LIKE-$1 other
  for other in "$MODELS/$LIKE"-*; do [ "$other" = "$folder" ] || rm -rf "$other"; done
  [ -f "$folder/complete" ] && return 0
  rm -rf "$folder"
  "$PYTHON" examples/make_synthetic_gguf.py "$folder" --like "$LIKE" --layers "$1" ${EXPERTS:+--experts "$EXPERTS"} &&
    touch "$folder/complete"
}

# The same for every engine, so that compiled code is found again.
ENGINE=(--dtype bfloat16 --max-model-len "${MAX_LEN:-16384}" --max-num-seqs 16 --max-num-batched-tokens 8192
  --gpu-memory-utilization "${GPU_MEMORY:-0.85}" --compilation-config '{"cudagraph_capture_sizes":[1,2,4,8,16]}')
[ -n "${EAGER:-}" ] && ENGINE+=(--enforce-eager)

# depth NAME LAYERS: one model, measured.
depth() {
  local folder=$MODELS/$LIKE-$2 trace=(--trace "$OUT/trace-$1.json")
  model "$2" || return 1
  [ -n "${NO_TRACE:-}" ] && trace=()
  "$PYTHON" -m kt_vllm.cli bench e2e "$folder" --kt-gguf "$folder" "${ENGINE[@]}" --json "$OUT/e2e-$1.json" "${trace[@]}" \
    --prompt-tokens "${PROMPTS:-512,2048,8192}" --batch "${BATCHES:-1,4,16}" --decode-tokens "${DECODE:-64}" --runs 2
}

gpuonly() {
  local folder=$MODELS/$LIKE-$1
  model "$1" || return 1
  "$PYTHON" -m kt_vllm.cli bench e2e "$folder" --kt-gguf "$folder" --kt-no-experts "${ENGINE[@]}" \
    --json "$OUT/gpuonly.json" --prompt-tokens "${PROMPTS:-512,2048,8192}" --batch "${BATCHES:-1,4,16}" --runs 2
}

# serve LAYERS: a server, asked by so many clients at once.
serve() {
  local folder=$MODELS/$LIKE-$1 port=${PORT:-8765} server clients status=0
  model "$1" || return 1
  setsid "$PYTHON" -m kt_vllm.cli serve "$folder" --kt-gguf "$folder" --host 127.0.0.1 --port "$port" \
    --served-model-name giant "${ENGINE[@]}" >"$OUT/serve-server.log" 2>&1 &
  server=$!
  # shellcheck disable=SC2064  # this server
  trap "kill -KILL -- -$server 2>/dev/null" EXIT
  "$PYTHON" - "$port" "$server" <<'P' || { tail -n 40 "$OUT/serve-server.log"; return 1; }
import os, sys, time, urllib.request
port, server = map(int, sys.argv[1:])
for _ in range(1200):
    os.kill(server, 0)  # ends this program when the server has ended
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        break
    except OSError:
        time.sleep(0.25)
else:
    sys.exit("the server is not healthy after 300 s")
P
  for clients in 1 4 16; do
    echo "-- $clients at once"
    timeout 90 "$PYTHON" -m kt_vllm.cli bench serve --base-url "http://127.0.0.1:$port" --model giant --tokenizer "$folder" \
      --dataset-name random --random-input-len "${SERVE_INPUT:-256}" --random-output-len "${SERVE_OUTPUT:-64}" --ignore-eos \
      --num-prompts $((clients == 1 ? 3 : 2 * clients)) --max-concurrency "$clients" >"$OUT/serve-$clients.log" 2>&1 || status=1
    grep -E 'Successful requests|throughput|TTFT|TPOT' "$OUT/serve-$clients.log" || tail -n 20 "$OUT/serve-$clients.log"
  done
  return $status
}

soak() {
  "$PYTHON" benchmarks/soak.py --seconds "$1" --json "$OUT/soak.json" --log "$OUT/soak-server.log" --max-model-len 5120 \
    --dtype bfloat16 --gpu-memory-utilization "${SOAK_GPU_MEMORY:-0.1}" \
    --hf-overrides '{"max_position_embeddings":5120}' --compilation-config '{"cudagraph_capture_sizes":[1,2,4,8,16]}' \
    ${EAGER:+--enforce-eager}
}

steps=("$@")
if [ ${#steps[@]} -eq 0 ]; then steps=(build handover accuracy few many serve linear quant gpuonly clean memory clean soak); fi
export -f build register model depth gpuonly serve soak
export BUILD PYTHON OUT MODELS LIKE
# Arrays are not exported: functions that use them run here, in a subshell with a limit of its own.
limited() { run "$1" "$2" bash -c "$(declare -p ENGINE); ${*:3}"; }

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
lscpu 2>/dev/null | grep -E 'Model name|^CPU\(s\)|^NUMA node\(s\)|L3'
PYTEST=("$PYTHON" -m pytest -q -rP -p no:cacheprovider)
for step in "${steps[@]}"; do
  case $step in
    build) run build 240 bash -c build || break ;;
    handover)
      run handover 240 "${PYTEST[@]}" tests/gpu/test_handover.py
      TAIL=40 run handover-bench 120 "$PYTHON" benchmarks/handover.py
      ;;
    # shellcheck disable=SC2086  # several arguments
    accuracy) run accuracy 560 "${PYTEST[@]}" tests/gpu/test_accuracy.py ${ACCURACY:-} ;;
    few) TAIL=70 limited few 400 depth few "${FEW_LAYERS:-6}" ;;
    many) TAIL=70 limited many 500 depth many "${MANY_LAYERS:-10}" ;;
    serve) limited serve 500 serve "${MANY_LAYERS:-10}" ;;
    gpuonly) limited gpuonly 300 gpuonly "${MANY_LAYERS:-10}" ;;
    linear) TAIL=40 run linear 200 "$PYTHON" benchmarks/linear.py --json "$OUT/linear.json" ;;
    quant) run quant 420 "${PYTEST[@]}" tests/gpu/test_gpu_quant.py ;;
    memory)
      rm -rf "${MODELS:?}/$LIKE"-*
      run memory 400 "$PYTHON" tests/gpu/dense_memory.py "$MODELS/dense"
      run memory24 180 "$PYTHON" tests/gpu/dense_memory.py "$MODELS/dense" --quants int4 --limit-gb 24
      ;;
    soak) run soak $((SOAK_SECONDS + 170)) bash -c "soak $SOAK_SECONDS" ;;
    soakstart)
      setsid nohup bash -c "soak 600" >"$OUT/soak.log" 2>&1 </dev/null &
      echo "soak: running beside"
      ;;
    soakresult)
      for _ in $(seq 550); do grep -q '^soak: ' "$OUT/soak.log" && break; sleep 1; done
      cat "$OUT/soak.log"
      ;;
    clean) rm -rf "${MODELS:?}/$LIKE"-* "${MODELS:?}/dense" ;;
    table) ;;
    *) echo "there is no step '$step': see the head of $0"; exit 2 ;;
  esac
done

echo "== summary"
[ ${#summary[@]} -gt 0 ] && printf '%s\n' "${summary[@]}" | tee -a "$OUT/summary.txt"
"$PYTHON" benchmarks/gpu_table.py "$OUT" --like "$LIKE" | tee "$OUT/table.txt"
exit $failed
