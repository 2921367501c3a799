python3 -m pip install -q --no-index --no-deps --target /tmp/site .carry/*.whl; export PYTHONPATH=/tmp/site:$PWD:/tmp
python3 -c "import sys,sysconfig; print(sys.version, sys.base_prefix)"; ls -la $(python3 -c "import sys;print(sys.executable)"); 
cmake -S . -B /tmp/b -G Ninja -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/kt_vllm > /dev/null; cmake --build /tmp/b -- --quiet; ldd kt_vllm/*.so; ldd $(python3 -c "import sys;print(sys.executable)")
g++ -O2 -shared -fPIC -std=c++20 $(python3 -m pybind11 --includes) .carry/mini.cpp -o /tmp/mini.so
gcc -shared -fPIC .carry/bt.c -o /tmp/bt.so
for f in c th t; do python3 -c "
import mini
try: print('$f', mini.$f())
except RuntimeError as e: print('$f raised', e)"; done
LD_PRELOAD=/tmp/bt.so python3 -c "
import kt_vllm._native as n, numpy as np
try: n.dequantize('F32', np.zeros(7,np.uint8))
except ValueError as e: print('ok', e)" 2>&1 | c++filt | head -40
LD_PRELOAD=/tmp/bt.so python3 -c "
import kt_vllm._native as n
e=n.Executor(isa='auto', cpus=[0], max_num_tokens=16); print('made')" 2>&1 | c++filt | head -40
