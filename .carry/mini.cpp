#include <pybind11/pybind11.h>
#include <stdexcept>
#include <thread>
PYBIND11_MODULE(mini, m){ m.def("t",[]{ throw std::runtime_error("x"); }); m.def("c",[]{ try { throw std::runtime_error("x"); } catch(std::exception&e){ return 1;} return 0;}); m.def("th",[]{ std::thread t([]{}); t.join(); return 2;}); }
