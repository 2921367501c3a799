set -u
python3 -m pip install -q --no-index --no-deps --target /tmp/site .carry/*.whl; export PYTHONPATH=/tmp/site:$PWD
lscpu | grep -E "Model name|^CPU\(s\)|NUMA"; 
(time cmake -S . -B /tmp/b -G Ninja -DKT_BUILD_TESTS=ON -DKT_WERROR=ON -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/kt_vllm >/tmp/cm.log 2>&1 && cmake --build /tmp/b -- --quiet) 2>&1 | grep -E "real|error|warning" | head
ctest --test-dir /tmp/b --output-on-failure 2>&1 | tail -15
cmake -S . -B /tmp/t -G Ninja -DKT_BUILD_TESTS=ON -DKT_BUILD_PYTHON=OFF -DKT_SANITIZE=thread -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null && cmake --build /tmp/t -- --quiet && ctest --test-dir /tmp/t --output-on-failure 2>&1 | tail -12
(cd $PWD && timeout 200 python3 -m pytest tests/kernels -q -p no:cacheprovider 2>&1 | tail -8)
g++ -O3 -std=c++17 -pthread -march=sapphirerapids .carry/limits.cpp -o /tmp/limits && (timeout 70 /tmp/limits 2>&1 | grep -i -E "dram|read|avx2" | head -20)
for t in 16 15; do echo "threads $t"; timeout 120 python3 benchmarks/bench_moe_layer.py --threads $t --tokens 1,2,4,8,32,64,128,512 --seconds 2; done
echo "Q4_K_M mix, 15 threads"; timeout 60 python3 benchmarks/bench_moe_layer.py --threads 15 --types Q4_K,Q4_K,Q6_K --tokens 1,64 --seconds 2
