#include "executor/layer_check.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <sstream>
#include <string>

#include "check.h"

namespace kt {
namespace {

// Beyond any model. The first keeps the bytes of a row and of a workspace far from overflow; three such sizes
// multiplied would still overflow, so the bytes of a tensor (2^48: 256 TiB) have a limit of their own.
constexpr int kMaxSize = 1 << 24;
constexpr uint64_t kMaxTensorBytes = uint64_t{1} << 48;

struct NamedTensor {
  const ExpertTensor& tensor;
  std::string label;  // "layer 3, tensor gate"
};

std::string shape_of(const ExpertTensor& tensor) {
  std::ostringstream text;
  text << '[' << tensor.num_experts << ", " << tensor.num_rows << ", " << tensor.num_cols << ']';
  return text.str();
}

void check_kernels(const NamedTensor& named, const KernelTable& table) {
  const ExpertTensor& tensor = named.tensor;
  const GgmlTypeInfo& info = ggml_type_info(tensor.type);
  const TypeKernels* kernels = find_type_kernels(table, tensor.type);
  if (kernels == nullptr) {
    std::ostringstream supported;
    for (int i = 0; i < table.num_types; ++i)
      supported << (i == 0 ? "" : ", ") << ggml_type_info(table.types[i].type).name;
    fail(named.label, ": instruction set ", table.isa, " has no kernels for type ", info.name, ", expected one of ",
         supported.str(), "; requantise the model or choose another --kt-isa");
  }
  const int multiple = info.block_size > kernels->activation_block ? info.block_size : kernels->activation_block;
  KT_CHECK(tensor.num_cols % info.block_size == 0 && tensor.num_cols % kernels->activation_block == 0, named.label,
           ": rows are ", tensor.num_cols, " long, expected a multiple of ", multiple, " for type ", info.name,
           "; the shape does not belong to this type");
}

void check_spans(const NamedTensor& named) {
  const ExpertTensor& tensor = named.tensor;
  const uint64_t row_bytes = ggml_row_bytes(tensor.type, tensor.num_cols);
  const uint64_t num_rows = static_cast<uint64_t>(tensor.num_rows) * static_cast<uint64_t>(tensor.num_experts);
  KT_CHECK(num_rows <= kMaxTensorBytes / row_bytes, named.label, ": ", shape_of(tensor), " in ",
           ggml_type_info(tensor.type).name, " is more than ", kMaxTensorBytes,
           " bytes, which no machine holds; the GGUF's tensor table is wrong");
  const uint64_t needed = num_rows * row_bytes;
  uint64_t total = 0;
  for (const FileSpan& span : tensor.spans) {
    KT_CHECK(span.bytes <= needed - total, named.label, ": its file spans hold more than the ", needed, " bytes of ",
             shape_of(tensor), " in ", ggml_type_info(tensor.type).name, "; the GGUF's tensor table is wrong");
    total += span.bytes;
  }
  KT_CHECK(total == needed, named.label, ": its file spans hold ", total, " bytes, expected ", needed, " for ",
           shape_of(tensor), " in ", ggml_type_info(tensor.type).name, "; the GGUF's tensor table is wrong");
  for (const FileSpan& span : tensor.spans) {
    struct stat file;
    KT_CHECK(stat(span.path.c_str(), &file) == 0, named.label, ": cannot open ", span.path, " (", std::strerror(errno),
             "); check --kt-gguf");
    KT_CHECK(S_ISREG(file.st_mode), named.label, ": ", span.path, " is not a regular file; check --kt-gguf");
    const uint64_t length = static_cast<uint64_t>(file.st_size);
    KT_CHECK(span.offset <= length && span.bytes <= length - span.offset, named.label, ": ", span.path, " is ", length,
             " bytes long, expected at least ", span.offset, " + ", span.bytes,
             "; the file is truncated, download or copy it again");
  }
}

void check_shape(const NamedTensor& named, int num_experts, int num_rows, int num_cols) {
  const ExpertTensor& t = named.tensor;
  KT_CHECK(t.num_experts == num_experts && t.num_rows == num_rows && t.num_cols == num_cols, named.label, ": shape is ",
           shape_of(t), ", expected [", num_experts, ", ", num_rows, ", ", num_cols,
           "] to go with gate; the tensors do not belong to one layer");
}

}  // namespace

void check_layer(const MoELayerSpec& spec, const KernelTable& table, int layer_index) {
  const std::string layer = "layer " + std::to_string(layer_index) + ", tensor ";
  const NamedTensor gate{spec.gate, layer + "gate"}, up{spec.up, layer + "up"}, down{spec.down, layer + "down"};
  for (const int size : {spec.gate.num_experts, spec.gate.num_rows, spec.gate.num_cols})
    KT_CHECK(size >= 1 && size <= kMaxSize, gate.label, ": shape is ", shape_of(spec.gate), ", expected sizes of 1 to ",
             kMaxSize, "; the GGUF's tensor table is wrong");
  check_shape(up, spec.gate.num_experts, spec.gate.num_rows, spec.gate.num_cols);
  check_shape(down, spec.gate.num_experts, spec.gate.num_cols, spec.gate.num_rows);
  for (const NamedTensor* named : {&gate, &up, &down}) check_kernels(*named, table);
  for (const NamedTensor* named : {&gate, &up, &down}) check_spans(*named);
}

}  // namespace kt
