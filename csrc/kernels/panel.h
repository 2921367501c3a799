// The memory layout of weights that all vector and tile kernels share: as many bits as the GGUF file, rows interleaved.
//
// 16 rows make a panel. A panel is [k / block_size] panel blocks, one after another; a panel block holds the blocks of
// its 16 rows field by field, and of each field unit by unit: a field of n units of u bytes at offset o of the GGUF
// block becomes [n][16 rows][u bytes] at offset 16 o. Units are 4 bytes wherever the format allows, so one vector load
// brings the same 4 bytes of 8 or 16 rows, a row a 32-bit lane: no kernel ever sums across lanes, scales are vectors,
// and four consecutive k of a lane are what integer dot products and AMX tiles take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gguf/ggml_type.h"

namespace kt {

inline constexpr int kPanelRows = 16;

// rows: [num_rows, row_bytes] as in the GGUF file, num_rows 1 to 16 (missing rows become zero bytes: weights of 0).
// panel: [16 * row_bytes]. k is a multiple of the type's block size.
void pack_panel(GgmlType type, const uint8_t* rows, size_t row_bytes, int num_rows, int k, uint8_t* panel);

}  // namespace kt
