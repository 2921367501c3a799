#include "executor/moe_layer.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "check.h"
#include "executor/activation_layout.h"
#include "executor/layer_check.h"
#include "executor/multiply.h"

namespace kt {
namespace {

enum : int { kPrepare, kGateUp, kDown };  // kDown + pass; see the header

// Weights of an item of the vector path, at most: they stay in an L2 of 1 MiB, beside the activations of one GEMM call,
// while the item's tokens are gone through. DeepSeek-R1 in Q4_K: 32 rows of gate and up, 224 of down.
constexpr size_t kMaxVectorItemBytes = size_t{256} << 10;

// Activations that are worth a work item of their own: below this, taking the item costs as much as preparing them.
constexpr int kMinPrepareRange = 1024;

// Rows of an item are whole cache lines of float32, and whole panels.
constexpr int kIntermediateGranule = 32;

// Of the rows of gate and up while tiles compute them: an odd number of cache lines, see DownPasses.
constexpr int kTileStride = kMaxItemRows + static_cast<int>(kCacheLine / sizeof(float));

constexpr int kNever = std::numeric_limits<int>::max();

// The same for merging, where top_k rows are read for each output.
constexpr int kMinMergeRange = 256;

// Outputs of a merge item when there are tokens enough: some microseconds.
constexpr int kMergeItem = 4096;

// How a row of k elements is cut when there are fewer rows than workers.
struct RowCut {
  int length;  // elements a range; the last may be shorter
  int ranges;
};
RowCut cut_row(int k, int64_t num_rows, int num_workers, int granule, int least) {
  const int64_t wanted = num_rows >= num_workers ? 1 : ceil_div(num_workers, std::max<int64_t>(num_rows, 1));
  const int64_t length = std::max<int64_t>(ceil_div(k, wanted), least);
  const int64_t aligned = std::min<int64_t>(ceil_div(length, granule) * granule, k);
  return {static_cast<int>(aligned), static_cast<int>(ceil_div(k, aligned))};
}

// Rows of an item of the vector path whose weights are row_bytes each.
int max_vector_rows(size_t row_bytes, int granule) {
  const size_t rows = kMaxVectorItemBytes / row_bytes / granule * granule;
  return static_cast<int>(std::clamp<size_t>(rows, granule, kMaxItemRows / granule * granule));
}

const MoELayerSpec& checked(const MoELayerSpec& spec, const KernelTable& table, int index) {
  check_layer(spec, table, index);
  return spec;
}

// Intermediate rows of an item of the vector path: whole blocks of down's activations, of whole cache lines.
int vector_granule(const MoELayerSpec& spec, const KernelTable& table) {
  const int granule = std::lcm(kIntermediateGranule, aligned_activations(*find_type_kernels(table, spec.down.type)));
  KT_CHECK(granule <= kMaxItemRows, "kernels ", table.isa, " want blocks of ", granule,
           " activations, expected at most ", kMaxItemRows, "; the executor must learn larger items first");
  return granule;
}

// What tiles of tokens are for gate and up: 8 bits where both have kernels for it. What rounding to them loses is about
// what the vector kernels lose. The products of gate and up, whose largest are further from the rest, would lose twice
// as much: down's tiles are always bfloat16.
TileFormat input_tile_format(const MoELayerSpec& spec, const KernelTable& table) {
  const auto has_int8 = [&](const ExpertTensor& tensor) {
    return has_tile_gemm(*find_type_kernels(table, tensor.type), TileFormat::INT8_256);
  };
  return has_int8(spec.gate) && has_int8(spec.up) ? TileFormat::INT8_256 : TileFormat::BF16;
}

// Tokens from which all three matrices are faster by their tile kernels.
int tile_min_tokens(const MoELayerSpec& spec, const KernelTable& table) {
  int tokens = 1;
  for (const ExpertTensor* tensor : {&spec.gate, &spec.up, &spec.down}) {
    const TypeKernels& kernels = *find_type_kernels(table, tensor->type);
    const TileFormat format = tensor == &spec.down ? TileFormat::BF16 : input_tile_format(spec, table);
    if (!has_tile_gemm(kernels, format) || table.store_tile_row == nullptr || tensor->num_cols % kTileK != 0)
      return kNever;
    tokens = std::max(tokens, kernels.tile_min_tokens);
  }
  return tokens;
}

// Slices of intermediate rows are cut where items of both paths may begin.
int slice_granule(const MoELayerSpec& spec, const KernelTable& table) {
  const int granule = vector_granule(spec, table);
  return tile_min_tokens(spec, table) == kNever ? granule : std::lcm(granule, tile_granule(TileFormat::BF16));
}

}  // namespace

// A worker's own buffers, one after another.
struct MoELayer::Scratch {
  float* gate;  // [kMaxItemTokens, kTileStride]
  float* up;    // [kMaxItemTokens, kTileStride]
  float* row;   // [hidden_size]

  explicit Scratch(uint8_t* memory) {
    gate = reinterpret_cast<float*>(memory);
    up = gate + kMaxItemTokens * kTileStride;
    row = up + kMaxItemTokens * kTileStride;
  }
  static size_t bytes(int hidden_size) {
    return (2 * kMaxItemTokens * kTileStride + static_cast<size_t>(hidden_size)) * sizeof(float);
  }
};

MoELayer::MoELayer(const MoELayerSpec& spec, const KernelTable& table, const ThreadPool& pool, int index)
    : table_(table),
      pool_(pool),
      gate_(checked(spec, table, index).gate, table, slice_granule(spec, table), pool.workers_on_nodes()),
      up_(spec.up, table, slice_granule(spec, table), pool.workers_on_nodes()),
      down_(spec.down, table, kHiddenGranule, pool.workers_on_nodes()),
      vector_granule_(vector_granule(spec, table)),
      input_tile_format_(input_tile_format(spec, table)),
      tile_min_tokens_(kt::tile_min_tokens(spec, table)) {}

bool MoELayer::has_tiles() const { return tile_min_tokens_ != kNever; }

// Activations [begin, begin + n) of k of a token, which is `row` in the tiles.
void MoELayer::store_tiles(TileFormat format, const float* x, int begin, int n, int k, int64_t row,
                           uint8_t* tiles) const {
  table_.store_tile_row(format, x, begin, n, k, static_cast<int>(row % kTileTokens),
                        tiles + row / kTileTokens * table_.tile_group_bytes(format, k));
}

void MoELayer::prepare_loading(ExpertLoader& loader) {
  for (ExpertWeights* weights : {&gate_, &up_, &down_}) weights->prepare_loading(pool_, loader);
}

WorkspaceSize MoELayer::workspace_size(int max_num_tokens, int top_k) const {
  const size_t tokens = max_num_tokens, slots = tokens * top_k;
  WorkspaceSize size;
  size.input[0] = tokens * activation_row_bytes(gate_.kernels(), hidden_size());
  size.input[1] = shares_input() ? 0 : tokens * activation_row_bytes(up_.kernels(), hidden_size());
  size.intermediate = slots * activation_row_bytes(down_.kernels(), intermediate_size());
  if (has_tiles()) {
    // Every expert on the tile path may leave part of a tile empty.
    const size_t tiles = slots / kTileTokens + std::min<size_t>(num_experts(), slots / tile_min_tokens_);
    size.input_tiles = tiles * table_.tile_group_bytes(input_tile_format_, hidden_size());
    size.intermediate_tiles = tiles * table_.tile_group_bytes(TileFormat::BF16, intermediate_size());
  }
  for (int i = 0; i < 2; ++i)
    size.slot_rows[i] = DownPasses::buffer_bytes(down_.slices(), static_cast<int64_t>(slots), i == 1);
  size.worker = Scratch::bytes(hidden_size());
  return size;
}

int MoELayer::begin_phase(MoEPiece& piece) const {
  piece.passes = DownPasses(down_.slices(), piece.groups.num_slots());
  // Nothing but padding: one merge of nothing writes its zeros.
  const int phase = piece.groups.num_slots() == 0 ? kDown + 1 : kPrepare;
  begin(phase, piece);
  return phase;
}

int MoELayer::begin_phase_after(int phase, MoEPiece& piece) const {
  if (phase == kDown + piece.passes.num_passes()) return ThreadPool::kDone;
  begin(phase + 1, piece);
  return phase + 1;
}

void MoELayer::begin(int phase, MoEPiece& piece) const {
  piece.next_token_item.store(0, std::memory_order_relaxed);
  const int pass = phase - kDown;
  if (phase == kGateUp) {
    piece.rows = gate_.slices();  // of the same length: no allocation
    const int rows = max_vector_rows(gate_.row_bytes() + up_.row_bytes(), vector_granule_);
    piece.queue.fill(piece.groups, piece.rows, {vector_granule_, rows, tile_granule(TileFormat::BF16)});
  } else if (phase >= kDown && pass < piece.passes.num_passes()) {
    for (int slice = 0; slice < piece.passes.num_slices(); ++slice)
      piece.rows[slice] = piece.passes.part(pass, slice).rows;
    piece.queue.fill(piece.groups, piece.rows,
                     {kHiddenGranule, max_vector_rows(down_.row_bytes(), kHiddenGranule), kHiddenGranule});
  }
}

void MoELayer::run_phase(int phase, MoEPiece& piece, int worker) const {
  if (phase == kPrepare) return prepare(piece, worker);
  if (phase == kGateUp) return gate_up(piece, worker);
  const int pass = phase - kDown;
  // Merging first: its rows are in some cache still, and the small items of down make a better end of the phase.
  if (pass > 0) merge(piece, pass - 1, worker);
  if (pass < piece.passes.num_passes()) down(piece, pass, worker);
}

// Item: a range of one routed token's row. Converted once for the vector kernels of each format, however many experts
// read it, and copied to a tile for each expert on the tile path.
void MoELayer::prepare(MoEPiece& piece, int worker) const {
  const TokenGroups& groups = piece.groups;
  const int k = hidden_size();
  const int num_formats = shares_input() ? 1 : 2;
  const TypeKernels* formats[2] = {&gate_.kernels(), &up_.kernels()};
  const int granule =
      std::lcm(has_tiles() ? tile_granule(input_tile_format_) : 1,
               std::lcm(aligned_activations(*formats[0]), aligned_activations(*formats[num_formats - 1])));
  const RowCut cut = cut_row(k, groups.num_routed_tokens(), pool_.num_workers(), granule, kMinPrepareRange);
  const int64_t num_items = int64_t{groups.num_routed_tokens()} * cut.ranges;
  float* x = Scratch(piece.workspace->worker(worker)).row;

  for (int64_t item; (item = piece.next_token_item.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
    const int token = groups.routed_tokens()[item / cut.ranges];
    const int begin = static_cast<int>(item % cut.ranges) * cut.length;
    const int n = std::min(cut.length, k - begin);
    const int64_t first = int64_t{token} * k + begin;
    table_.load_floats(piece.hidden_states + first * float_bytes(piece.float_type), piece.float_type, x, n);
    bool vectors = false;
    for (const int32_t slot : groups.slots_of(token)) {
      const int32_t row = groups.slot_tile_rows()[slot];
      vectors |= row < 0;
      if (row < 0) continue;
      store_tiles(input_tile_format_, x, begin, n, k, row, piece.workspace->input_tiles());
    }
    for (int i = 0; vectors && i < num_formats; ++i) {
      uint8_t* row = piece.workspace->input(i) + token * activation_row_bytes(*formats[i], k);
      formats[i]->quantize_activations(x, row + activation_bytes(*formats[i], begin), n);
    }
  }
}

void MoELayer::gate_up(MoEPiece& piece, int worker) const {
  const Scratch scratch(piece.workspace->worker(worker));
  for (WorkItem item; piece.queue.take(pool_.node_of(worker), pool_.place_on_node(worker), &item);) {
    if (piece.groups.group(item.group).uses_tiles())
      gate_up_tiles(piece, item, scratch);
    else
      gate_up_vectors(piece, item, scratch);
  }
}

// Where the weights of the worker's next item begin; nullptr: unknown.
const uint8_t* MoELayer::next_panel(const ExpertWeights& weights, const MoEPiece& piece, const WorkItem& item) {
  if (item.next_group < 0) return nullptr;
  return weights.panel(item.slice, piece.groups.group(item.next_group).expert, item.next_first_row);
}

void MoELayer::gate_up_vectors(const MoEPiece& piece, const WorkItem& item, const Scratch& scratch) const {
  const TokenGroups::Group& group = piece.groups.group(item.group);
  const TypeKernels& next = down_.kernels();
  const size_t next_row_bytes = activation_row_bytes(next, intermediate_size());
  const uint8_t* inputs[2] = {piece.workspace->input(0), piece.workspace->input(shares_input() ? 0 : 1)};
  for (int done = 0; done < item.num_tokens; done += kVectorTokens) {
    const int num_tokens = std::min(kVectorTokens, item.num_tokens - done);
    const int first_slot = group.first_slot + item.first_token + done;
    const int32_t* tokens = piece.groups.slot_tokens() + first_slot;
    const uint8_t* next_rows = up_.panel(item.slice, group.expert, item.first_row);
    multiply_vectors(gate_, item, group.expert, {inputs[0], tokens, num_tokens, next_rows, piece.prefetch},
                     scratch.gate, item.num_rows);
    multiply_vectors(up_, item, group.expert,
                     {inputs[1], tokens, num_tokens, next_panel(gate_, piece, item), piece.prefetch}, scratch.up,
                     item.num_rows);
    for (int t = 0; t < num_tokens; ++t) {
      float* row = scratch.gate + t * item.num_rows;
      table_.silu_mul(row, scratch.up + t * item.num_rows, row, item.num_rows);
      next.quantize_activations(
          row,
          piece.workspace->intermediate() + (first_slot + t) * next_row_bytes + activation_bytes(next, item.first_row),
          item.num_rows);
    }
  }
}

void MoELayer::gate_up_tiles(const MoEPiece& piece, const WorkItem& item, const Scratch& scratch) const {
  const TokenGroups::Group& group = piece.groups.group(item.group);
  const int32_t* tile_rows = piece.groups.slot_tile_rows() + group.first_slot + item.first_token;
  const size_t group_bytes = table_.tile_group_bytes(input_tile_format_, hidden_size());
  multiply_tiles({{&gate_, scratch.gate}, {&up_, scratch.up}}, item, group.expert,
                 {input_tile_format_, piece.workspace->input_tiles() + tile_rows[0] / kTileTokens * group_bytes,
                  group_bytes, group.tile_slots, next_panel(gate_, piece, item)},
                 kTileStride);
  for (int t = 0; t < item.num_tokens; ++t) {
    float* row = scratch.gate + t * kTileStride;
    table_.silu_mul(row, scratch.up + t * kTileStride, row, item.num_rows);
    store_tiles(TileFormat::BF16, row, item.first_row, item.num_rows, intermediate_size(), tile_rows[t],
                piece.workspace->intermediate_tiles());
  }
}

// Writes the slot rows of a pass: no two items meet, so nothing is added up between threads.
void MoELayer::down(MoEPiece& piece, int pass, int worker) const {
  for (WorkItem item; piece.queue.take(pool_.node_of(worker), pool_.place_on_node(worker), &item);) {
    const TokenGroups::Group& group = piece.groups.group(item.group);
    const DownPasses::Part part = piece.passes.part(pass, item.slice);
    const int64_t first_slot = group.first_slot + item.first_token;
    float* output = piece.workspace->slot_rows(pass) + first_slot * piece.passes.stride() + part.column +
                    (item.first_row - part.rows.begin);
    if (group.uses_tiles())
      down_tiles(piece, item, output);
    else
      down_vectors(piece, item, output);
  }
}

void MoELayer::down_vectors(const MoEPiece& piece, const WorkItem& item, float* output) const {
  const TokenGroups::Group& group = piece.groups.group(item.group);
  const size_t row_bytes = activation_row_bytes(down_.kernels(), intermediate_size());
  for (int done = 0; done < item.num_tokens; done += kVectorTokens) {
    const int num_tokens = std::min(kVectorTokens, item.num_tokens - done);
    const uint8_t* input = piece.workspace->intermediate() + (group.first_slot + item.first_token + done) * row_bytes;
    multiply_vectors(down_, item, group.expert,
                     {input, nullptr, num_tokens, next_panel(down_, piece, item), piece.prefetch},
                     output + static_cast<size_t>(done) * piece.passes.stride(), piece.passes.stride());
  }
}

void MoELayer::down_tiles(const MoEPiece& piece, const WorkItem& item, float* output) const {
  const TokenGroups::Group& group = piece.groups.group(item.group);
  const int32_t* tile_rows = piece.groups.slot_tile_rows() + group.first_slot + item.first_token;
  const size_t group_bytes = table_.tile_group_bytes(TileFormat::BF16, intermediate_size());
  multiply_tiles({{&down_, output}}, item, group.expert,
                 {TileFormat::BF16, piece.workspace->intermediate_tiles() + tile_rows[0] / kTileTokens * group_bytes,
                  group_bytes, group.tile_slots, next_panel(down_, piece, item)},
                 piece.passes.stride());
}

// Item: some tokens, or part of one, in the hidden rows of a pass. An output is added up by one worker, experts
// ascending: the order of the sum is always the same.
void MoELayer::merge(MoEPiece& piece, int pass, int worker) const {
  const TokenGroups& groups = piece.groups;
  const int width = piece.passes.width(pass);
  const RowCut cut = cut_row(width, piece.num_tokens, pool_.num_workers(), kHiddenGranule, kMinMergeRange);
  const int tokens = cut.ranges > 1 ? 1 : std::max(1, kMergeItem / width);
  const int64_t num_items = ceil_div(piece.num_tokens, tokens) * cut.ranges;
  const size_t element = float_bytes(piece.float_type);
  const float* slot_rows = piece.workspace->slot_rows(pass);
  float* sum = Scratch(piece.workspace->worker(worker)).row;

  for (int64_t item; (item = piece.next_token_item.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
    const int first_token = static_cast<int>(item / cut.ranges) * tokens;
    const int begin = static_cast<int>(item % cut.ranges) * cut.length;
    const int end = std::min(begin + cut.length, width);
    for (int token = first_token; token < std::min(first_token + tokens, piece.num_tokens); ++token) {
      std::fill(sum, sum + (end - begin), 0.0f);
      for (const int32_t slot : groups.slots_of(token))
        table_.add_scaled(groups.slot_weights()[slot], slot_rows + int64_t{slot} * piece.passes.stride() + begin, sum,
                          end - begin);
      for (int slice = 0; slice < piece.passes.num_slices(); ++slice) {
        const DownPasses::Part part = piece.passes.part(pass, slice);
        const int from = std::max(begin, part.column), to = std::min(end, part.column + part.rows.size());
        if (from >= to) continue;
        const int64_t row = part.rows.begin + (from - part.column);
        table_.store_floats(sum + (from - begin), piece.float_type,
                            piece.output + (int64_t{token} * hidden_size() + row) * element, to - from);
      }
    }
  }
}

}  // namespace kt
