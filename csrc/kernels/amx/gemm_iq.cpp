// The vector kernels of types with grids once more, with the gathers of a CPU that has AMX: see vec_avx512.h.
#include "kernels/panel/gemm_int.h"
#include "kernels/panel/kernels.h"
#include "kernels/panel/unpack_iq.h"

namespace kt::KT_ISA_NAMESPACE {

KT_GRID_TYPES(KT_DEFINE_GEMM)

}  // namespace kt::KT_ISA_NAMESPACE
