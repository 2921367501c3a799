python3 -m pip install -q --no-index --no-deps --target /tmp/site .carry/*.whl; export PYTHONPATH=/tmp/site:$PWD:/tmp
env | grep -i -E "flags|^CC|^CXX|static|cmake"; which -a g++ c++ cmake; 
cmake -S . -B /tmp/b -G Ninja -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/kt_vllm > /dev/null; grep -E "static|CMAKE_CXX_COMPILER:|LINKER_FLAGS|CXX_FLAGS" /tmp/b/CMakeCache.txt; cmake --build /tmp/b -- -v 2>&1 | tail -2 | cut -c1-1500
c++ --version | head -1; cat $(which c++) | head -c 300 | strings | head -5
