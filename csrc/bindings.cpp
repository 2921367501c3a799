// The Python module kt_vllm._native: check, fill plain data, release the GIL where a call may block, call.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "executor/moe_executor.h"
#include "gguf/dense_reader.h"
#include "gguf/dequantize.h"
#include "gguf/ggml_type.h"
#include "handover/coordinator.h"
#include "handover/host_functions.h"
#include "kernels/cpu_features.h"
#include "kernels/dispatch.h"
#include "limits/limits.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

using Span = std::tuple<std::string, uint64_t, uint64_t>;
using SlotAddresses = std::array<uintptr_t, 5>;  // the fields of kt::MailboxSlot
using Unlocked = py::call_guard<py::gil_scoped_release>;

kt::ExpertTensor make_tensor(const std::string& type, std::tuple<int, int, int> shape, const std::vector<Span>& spans) {
  kt::ExpertTensor tensor{
      kt::ggml_type_info(type).type, std::get<0>(shape), std::get<1>(shape), std::get<2>(shape), {}};
  for (const auto& [path, offset, bytes] : spans) tensor.spans.push_back({path, offset, bytes});
  return tensor;
}

kt::FloatType float_type(const std::string& name) {
  if (name == "float32") return kt::FloatType::F32;
  if (name == "float16") return kt::FloatType::F16;
  if (name == "bfloat16") return kt::FloatType::BF16;
  kt::fail("float_type is \"", name, "\", expected \"float32\", \"float16\" or \"bfloat16\"");
}

std::vector<kt::WorkerPlace> places(const std::vector<int>& cpus, const std::optional<std::vector<int>>& nodes) {
  KT_CHECK(!nodes || nodes->size() == cpus.size(), "nodes has ", nodes->size(), " entries, expected ", cpus.size(),
           ": the memory node of each of cpus, or -1");
  std::vector<kt::WorkerPlace> places;
  for (size_t i = 0; i < cpus.size(); ++i) places.push_back({cpus[i], nodes ? (*nodes)[i] : -1});
  return places;
}

// Adds to MoEExecutor that it can be closed, and that a coordinator keeps it.
class Executor {
 public:
  Executor(std::string isa, const std::vector<int>& cpus, int max_num_tokens,
           const std::optional<std::vector<int>>& nodes, int64_t spin_ns, bool caller_works)
      : executor_(std::make_unique<kt::MoEExecutor>(kt::ExecutorOptions{.isa = std::move(isa),
                                                                        .workers = places(cpus, nodes),
                                                                        .max_num_tokens = max_num_tokens,
                                                                        .spin_ns = spin_ns,
                                                                        .caller_works = caller_works})) {}

  kt::MoEExecutor& get() const {
    KT_CHECK(executor_ != nullptr, "the executor is closed; create another");
    return *executor_;
  }

  void close() { executor_.reset(); }

  void submit(int layer, uintptr_t hidden_states, uintptr_t topk_ids, uintptr_t topk_weights, uintptr_t output,
              const std::string& type, int num_tokens, int top_k) const {
    get().submit(layer, {.hidden_states = reinterpret_cast<const void*>(hidden_states),
                         .topk_ids = reinterpret_cast<const int32_t*>(topk_ids),
                         .topk_weights = reinterpret_cast<const float*>(topk_weights),
                         .output = reinterpret_cast<void*>(output),
                         .float_type = float_type(type),
                         .num_tokens = num_tokens,
                         .top_k = top_k});
  }

 private:
  std::unique_ptr<kt::MoEExecutor> executor_;
};

// The executor must not be closed before it.
std::unique_ptr<kt::Coordinator> make_coordinator(const Executor* executor, const std::vector<SlotAddresses>& slots,
                                                  const std::vector<std::pair<int, int>>& layers,
                                                  const std::string& type, int hidden_size, int max_tokens,
                                                  std::vector<int> worker_cpus, double watchdog_seconds,
                                                  int64_t spin_ns, std::function<void(const std::string&)> on_failure) {
  kt::CoordinatorOptions options;
  for (const auto& [mailbox, hidden_states, topk_ids, topk_weights, output] : slots)
    options.slots.push_back({.mailbox = reinterpret_cast<kt::Mailbox*>(mailbox),
                             .hidden_states = reinterpret_cast<const void*>(hidden_states),
                             .topk_ids = reinterpret_cast<const int32_t*>(topk_ids),
                             .topk_weights = reinterpret_cast<const float*>(topk_weights),
                             .output = reinterpret_cast<void*>(output)});
  for (const auto& [executor_layer, top_k] : layers) options.layers.push_back({executor_layer, top_k});
  options.float_type = float_type(type);
  options.hidden_size = hidden_size;
  options.max_tokens = max_tokens;
  options.worker_cpus = std::move(worker_cpus);
  options.watchdog_ns = static_cast<int64_t>(watchdog_seconds * 1e9);
  options.spin_ns = spin_ns;
  options.on_failure = std::move(on_failure);
  return std::make_unique<kt::Coordinator>(executor == nullptr ? nullptr : &executor->get(), std::move(options));
}

std::vector<std::string> isas(uint32_t features) {
  std::vector<std::string> names;
  for (const kt::KernelTable* table : kt::kernel_tables()) {
    if ((table->required_features & ~features) != 0) continue;
    if (names.empty() || names.back() != table->isa) names.emplace_back(table->isa);  // variants stand side by side
  }
  return names;
}

const kt::KernelTable& find_table(const std::string& isa) {
  for (const kt::KernelTable* table : kt::kernel_tables())
    if (isa == table->isa) return *table;
  kt::fail("isa is \"", isa, "\", expected a name that isas() lists");
}

std::vector<std::string> supported_types(const std::string& isa) {
  const kt::KernelTable& table = find_table(isa);
  std::vector<std::string> names;
  for (int i = 0; i < table.num_types; ++i) names.emplace_back(kt::ggml_type_info(table.types[i].type).name);
  return names;
}

py::dict type_sizes() {
  py::dict sizes;
  int count = 0;
  const kt::GgmlTypeInfo* types = kt::ggml_types(&count);
  for (int i = 0; i < count; ++i) sizes[types[i].name] = py::make_tuple(types[i].block_size, types[i].block_bytes);
  return sizes;
}

py::array_t<float> dequantize(const std::string& type, const py::array_t<uint8_t, py::array::c_style>& data) {
  const kt::GgmlTypeInfo& info = kt::ggml_type_info(type);
  const size_t bytes = static_cast<size_t>(data.nbytes());
  KT_CHECK(data.ndim() == 1 && bytes % info.block_bytes == 0, "data has ", data.ndim(), " dimensions and ", bytes,
           " bytes, expected one dimension and whole blocks of ", info.block_bytes, " bytes for type ", info.name);
  const int64_t num_weights = static_cast<int64_t>(bytes / info.block_bytes) * info.block_size;
  py::array_t<float> output(num_weights);
  const uint8_t* blocks = data.data();
  float* weights = output.mutable_data();
  const py::gil_scoped_release unlocked;
  kt::dequantize(info.type, blocks, num_weights, weights);
  return output;
}

void read_dense(const std::string& path, uint64_t offset, const std::string& type, int64_t num_weights,
                const std::string& name, uintptr_t destination, const std::string& destination_type, int num_threads) {
  kt::read_dense({path, offset, kt::ggml_type_info(type).type, num_weights}, name, reinterpret_cast<void*>(destination),
                 float_type(destination_type), num_threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C++ core of kt_vllm; see _native.pyi.";
  py::register_exception<kt::Error>(m, "NativeError", PyExc_ValueError);

  py::class_<kt::ExpertTensor>(m, "ExpertTensor").def(py::init(&make_tensor), "type"_a, "shape"_a, "spans"_a);

  py::class_<Executor>(m, "Executor")
      .def(py::init<std::string, const std::vector<int>&, int, const std::optional<std::vector<int>>&, int64_t, bool>(),
           py::kw_only(), "isa"_a, "cpus"_a, "max_num_tokens"_a, "nodes"_a = py::none(),
           "spin_ns"_a = kt::kSpinNanoseconds, "caller_works"_a = false, Unlocked())
      .def_property_readonly("isa", [](const Executor& self) { return self.get().isa(); })
      .def_property_readonly("isa_reason", [](const Executor& self) { return self.get().isa_reason(); })
      .def_property_readonly("placement_report", [](const Executor& self) { return self.get().placement_report(); })
      .def_property_readonly("memory_report", [](const Executor& self) { return self.get().memory_report(); })
      .def_property_readonly("num_invalid_ids", [](const Executor& self) { return self.get().num_invalid_ids(); })
      .def_property_readonly("first_layer_with_invalid_ids",
                             [](const Executor& self) { return self.get().first_layer_with_invalid_ids(); })
      .def_property_readonly("num_parks", [](const Executor& self) { return self.get().num_parks(); })
      .def(
          "add_layer",
          [](const Executor& self, const kt::ExpertTensor& gate, const kt::ExpertTensor& up,
             const kt::ExpertTensor& down) { return self.get().add_layer({gate, up, down}); },
          "gate"_a, "up"_a, "down"_a, Unlocked())
      .def(
          "workspace_bytes",
          [](const Executor& self, int top_k, int layer) { return self.get().workspace_bytes(top_k, layer); },
          "top_k"_a, "layer"_a)
      .def(
          "start_loading", [](const Executor& self) { self.get().start_loading(); }, Unlocked())
      .def("load_progress",
           [](const Executor& self) {
             const kt::LoadProgress progress = self.get().load_progress();
             return py::make_tuple(progress.bytes_done, progress.bytes_total, progress.finished);
           })
      .def(
          "cancel_loading", [](const Executor& self) { self.get().cancel_loading(); }, Unlocked())
      .def(
          "choose_prefetch", [](const Executor& self, int top_k) { return self.get().choose_prefetch(top_k); },
          "top_k"_a, Unlocked())
      // Keeps the GIL: it does not block, and to get the GIL back can take a whole switch interval (5 ms).
      .def("submit", &Executor::submit, "layer"_a, "hidden_states"_a, "topk_ids"_a, "topk_weights"_a, "output"_a,
           "float_type"_a, "num_tokens"_a, "top_k"_a)
      .def(
          "wait", [](const Executor& self) { self.get().wait(); }, Unlocked())
      .def("close", &Executor::close, Unlocked());

  // The coordinator holds on to the executor: Python must not free it first. Its end waits for its threads, one of
  // which may be about to call Python.
  py::class_<kt::Coordinator>(m, "Coordinator", py::release_gil_before_calling_cpp_dtor())
      .def(py::init(&make_coordinator), py::kw_only(), "executor"_a.none(true), "slots"_a, "layers"_a, "float_type"_a,
           "hidden_size"_a, "max_tokens"_a, "worker_cpus"_a, "watchdog_seconds"_a,
           "spin_ns"_a = 2 * kt::kStepSpinNanoseconds, "on_failure"_a = py::none(), py::keep_alive<1, 2>())
      .def_property_readonly("stats",
                             [](const kt::Coordinator& self) {
                               const kt::CoordinatorStats stats = self.stats();
                               py::dict result;
                               result["num_calls"] = stats.num_calls;
                               result["num_tokens"] = stats.num_tokens;
                               result["executor_ns"] = stats.executor_ns;
                               result["between_ns"] = stats.between_ns;
                               return result;
                             })
      .def("wake", &kt::Coordinator::wake)
      .def("stop_answering", &kt::Coordinator::stop_answering)
      .def("close", &kt::Coordinator::close, Unlocked());

  py::class_<kt::HostFunctions>(m, "HostFunctions")
      .def(py::init())
      .def(
          "call",
          [](kt::HostFunctions& self, uintptr_t mailbox, int layer, int num_tokens) {
            return reinterpret_cast<uintptr_t>(self.call(reinterpret_cast<kt::Mailbox*>(mailbox), layer, num_tokens));
          },
          "mailbox"_a, "layer"_a, "num_tokens"_a)
      .def_property_readonly_static(
          "request", [](const py::object&) { return reinterpret_cast<uintptr_t>(&kt::HostFunctions::request); })
      .def_property_readonly_static("await_reply", [](const py::object&) {
        return reinterpret_cast<uintptr_t>(&kt::HostFunctions::await_reply);
      });

  m.attr("SPIN_NS") = kt::kSpinNanoseconds;
  m.attr("STEP_SPIN_NS") = kt::kStepSpinNanoseconds;
  m.attr("ECHO_LAYER") = kt::kEchoLayer;

  m.def("isas", [] { return isas(~0u); });
  m.def("available_isas", [] { return isas(kt::detect_cpu_features()); });
  m.def(
      "choose_isa",
      [](const std::string& requested) {
        const kt::KernelChoice choice = kt::choose_kernel_table(requested, kt::detect_cpu_features());
        return py::make_tuple(choice.table->isa, choice.reason);
      },
      "requested"_a);
  m.def("supported_types", &supported_types, "isa"_a);
  m.def("type_sizes", &type_sizes);
  m.def("dequantize", &dequantize, "type"_a, "data"_a);
  m.def("read_dense", &read_dense, py::kw_only(), "path"_a, "offset"_a, "type"_a, "num_weights"_a, "name"_a,
        "destination"_a, "float_type"_a, "num_threads"_a, Unlocked());

  m.def("peak_kinds", &kt::peak_kinds);
  m.def("measure_peak", &kt::measure_peak, "kind"_a, "cpus"_a, "seconds"_a, Unlocked());
  m.def("measure_dram_read", &kt::measure_dram_read, "cpus"_a, "bytes"_a, "seconds"_a, Unlocked());
}
