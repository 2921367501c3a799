#!/usr/bin/env bash
# Builds, tests and measures on a bare machine without network: a C++ compiler, cmake, ninja, and a Python with pybind11,
# numpy, torch and pytest are all it needs.
#
#     [OUT=folder] [WHEELS=folder] [PYTHON=python3] [BENCH="arguments"] [COMPARE="arguments"] benchmarks/amx_machine.sh [STEP ...]
#
# STEP: build ctest pytest bench compare; default: all of them, compare only where WHEELS has kt-kernel.
# WHEELS: what that Python lacks of gguf, rich (markdown-it-py, mdurl, pygments) and tqdm, and kt_kernel; nothing else.
# OUT: where the logs and the JSON files go. BENCH, COMPARE: more arguments of the two commands, such as "--threads 15".
# Every step has a time limit; a step that fails does not stop the next one, unless it was the build.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=$(command -v "${PYTHON:-python3}")
BUILD=build/amx
OUT=${OUT:-$BUILD/results}
TOKENS=1,8,32,64,128,512,1024,2048,4096
mkdir -p "$BUILD/site" "$BUILD/kt" "$OUT"
export PYTHONPATH=$PWD:$PWD/$BUILD/site

kt_wheel=""
for wheel in ${WHEELS:+"$WHEELS"/*.whl}; do
  folder=site
  # Apart: it brings packages of other names with it.
  case $wheel in */kt_kernel-*) folder=kt kt_wheel=$wheel ;; esac
  "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$BUILD/$folder" "$wheel" || exit 1
done
"$PYTHON" -c 'import gguf, numpy, rich, tqdm' || { echo "put the wheel of what is missing into WHEELS"; exit 1; }

steps=("$@")
if [ ${#steps[@]} -eq 0 ]; then steps=(build ctest pytest bench ${kt_wheel:+compare}); fi
summary=() failed=0

# run NAME SECONDS COMMAND...: the output goes to a file, its end to the terminal.
run() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $name (at most $limit s)"
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 30 "$OUT/$name.log"
  [ $status -eq 124 ] && echo "-- $name ran into its time limit"
  [ $status -ne 0 ] && failed=1
  summary+=("$name: $([ $status -eq 0 ] && echo ok || echo "FAILED ($status)"), $((SECONDS - start)) s")
  return $status
}

build() {
  cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DKT_BUILD_TESTS=ON -DKT_WERROR=ON \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/kt_vllm" -DPython_EXECUTABLE="$PYTHON" && cmake --build "$BUILD"
}
export -f build
export BUILD PYTHON

lscpu 2>/dev/null | grep -E 'Model name|^CPU\(s\)|^NUMA node\(s\)|L3'
for step in "${steps[@]}"; do
  case $step in
    build) run build 420 bash -c build || break ;;
    ctest) run ctest 180 ctest --test-dir "$BUILD" --output-on-failure --no-tests=error ;;
    pytest) run pytest 240 "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider ;;
    # shellcheck disable=SC2086  # several arguments
    bench) run bench 300 "$PYTHON" -m kt_vllm.cli bench layer --tokens $TOKENS --json "$OUT/bench.json" ${BENCH:-} ;;
    # shellcheck disable=SC2086
    compare) PYTHONPATH=$PYTHONPATH:$PWD/$BUILD/kt run compare 420 "$PYTHON" benchmarks/compare_kt_kernel.py \
      --kt-python "$PYTHON" --tokens $TOKENS --json "$OUT/compare.json" ${COMPARE:-} ;;
    *) echo "there is no step '$step', expected build, ctest, pytest, bench or compare"; exit 2 ;;
  esac
done

echo "== summary"
printf '%s\n' "${summary[@]}"
for table in bench compare; do [[ " ${steps[*]} " == *" $table "* ]] && cat "$OUT/$table.log" 2>/dev/null; done
exit $failed
