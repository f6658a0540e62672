#include "scan.h"

namespace logra::cuda {
namespace {

constexpr std::int64_t kLargest = 128;  // k
// Tiles of the kernels, which are checked below: every ROWS is between these two, MERGE is kMerge.
constexpr std::int64_t kSmallestTile = 64, kLargestTile = 128, kMerge = 1024;
constexpr std::int64_t kWorkspaceBytes = 64 << 20, kSmallestBlock = 4096;

void check_k(std::int64_t k) {
  expect(1 <= k && k <= kLargest, "k: expected 1 to 128, got " + std::to_string(k));
}

/// Rows are scanned in blocks, so that the candidates take a bounded amount of memory.
struct Plan {
  Pieces pieces;
  Epilogue epilogue;
  std::int64_t block;
  std::int64_t *candidates, *merged, *new_ids;  // keys of both ends
  float* new_scores;

  Plan(const logra_cuda_matrix* queries, const logra_cuda_matrix* rows, std::int64_t k, const float* scale,
       const float* bias, Workspace& workspace)
      : pieces((check_scan(queries, rows, "queries"), check_k(k), *queries), rows->dtype, workspace),
        epilogue(scale, bias, workspace) {
    const std::int64_t count = std::max<std::int64_t>(queries->rows, 1);
    const std::int64_t fitting = kWorkspaceBytes / (16 * count) / kLargestTile * kLargestTile;
    block = std::min(std::max(kSmallestBlock, fitting), kLargestTile * ceil_div(rows->rows, kLargestTile));
    // Keys of one end of one query. Larger tiles keep fewer keys in total.
    const std::int64_t keys = block / kSmallestTile * std::min(k, kSmallestTile);
    candidates = workspace.take<std::int64_t>(2 * count * keys);
    merged = workspace.take<std::int64_t>(2 * count * std::max<std::int64_t>(1, ceil_div(keys, kMerge)) * k);
    new_scores = workspace.take<float>(count * k);
    new_ids = workspace.take<std::int64_t>(count * k);
  }
};

std::int64_t width_for(std::int64_t k) {
  std::int64_t width = 16;
  while (width < k) width *= 2;
  return width;
}

/// The best k keys of each list: [lists, k], in `from` or `to`, whichever is returned.
std::int64_t* merge(std::int64_t* from, std::int64_t* to, std::int64_t lists, std::int64_t count,
                    std::int64_t k, Stream stream) {
  const Kernel& chosen = kernel("merge.");
  expect(constant(chosen, "MERGE") == kMerge, "the library and its kernels disagree about MERGE");
  for (std::int64_t groups = 0; groups != 1; count = groups * k, std::swap(from, to)) {
    groups = std::max<std::int64_t>(1, ceil_div(count, kMerge));
    Launch launch(chosen);
    launch.pointer(from).pointer(to).number("queries.rows", lists);
    launch.number("rows", count).number("rows", groups).number("k", k);
    launch.run(lists * groups, stream);
  }
  return from;
}

void merge_state(const std::int64_t* keys, bool top, std::int64_t num_queries, std::int64_t k,
                 std::int64_t row_offset, const logra_cuda_topk& state, const Plan& plan, Stream stream) {
  float* scores = top ? state.top_scores : state.bottom_scores;
  std::int64_t* ids = top ? state.top_ids : state.bottom_ids;
  Launch launch(kernel("state." + part("width", width_for(k)) + "," + part("top", top)));
  launch.pointer(keys).pointer(scores).pointer(ids).pointer(plan.new_scores).pointer(plan.new_ids);
  launch.number("queries.rows", num_queries).number("k", k).wide(k).wide(k).wide(row_offset).number("k", k);
  launch.run(num_queries, stream);
  const std::size_t count = static_cast<std::size_t>(num_queries * k);
  expect_success(driver().copy(address(scores), address(plan.new_scores), count * sizeof(float), stream),
                 "state");
  expect_success(driver().copy(address(ids), address(plan.new_ids), count * sizeof(std::int64_t), stream),
                 "state");
}

void check_state(const logra_cuda_topk* state) {
  expect(state != nullptr && state->top_scores != nullptr && state->top_ids != nullptr &&
             state->bottom_scores != nullptr && state->bottom_ids != nullptr,
         "state: expected four pointers, got NULL");
}

}  // namespace
}  // namespace logra::cuda

using namespace logra::cuda;

logra_cuda_status logra_cuda_topk_reset(const logra_cuda_topk* state, std::int64_t num_queries,
                                        std::int64_t k, logra_cuda_stream stream) {
  return guarded([&] {
    check_k(k);
    check_size(num_queries, "num_queries");
    if (num_queries == 0) return;
    check_state(state);
    const std::size_t count = static_cast<std::size_t>(num_queries * k);
    const unsigned infinity = 0x7f800000u, minus_infinity = 0xff800000u;
    expect_success(driver().fill32(address(state->top_scores), minus_infinity, count, stream), "state");
    expect_success(driver().fill32(address(state->bottom_scores), infinity, count, stream), "state");
    expect_success(driver().fill8(address(state->top_ids), 0xff, 8 * count, stream), "state");
    expect_success(driver().fill8(address(state->bottom_ids), 0xff, 8 * count, stream), "state");
  });
}

std::size_t logra_cuda_topk_scores_workspace(const logra_cuda_matrix* queries, const logra_cuda_matrix* rows,
                                             std::int64_t k) {
  return workspace_bytes([&](Workspace& workspace) { Plan(queries, rows, k, nullptr, nullptr, workspace); });
}

logra_cuda_status logra_cuda_topk_scores(const logra_cuda_matrix* queries, const logra_cuda_matrix* rows,
                                         std::int64_t k, const float* row_scale, const float* row_bias,
                                         std::int64_t row_offset, const logra_cuda_topk* state,
                                         void* workspace, std::size_t workspace_bytes,
                                         logra_cuda_stream stream) {
  return guarded([&] {
    Workspace memory(workspace, workspace_bytes);
    const Plan plan(queries, rows, k, row_scale, row_bias, memory);
    if (queries->rows == 0 || rows->rows == 0) return;
    check_state(state);
    memory.expect_room();
    const bool fast = aligned(*rows) && plan.pieces.aligned();
    const std::string name = "candidates." + part("rows", rows->dtype) + "," + part("aligned", fast) + "," +
                             part("queries", queries->rows <= 16 ? 16 : 64) + ",";
    // Below a tile's rows the kernel selects k of them; from there on another keeps whole tiles.
    const bool select = k < constant(kernel(name + part("select", 1)), "ROWS");
    const Kernel& chosen = kernel(name + part("select", select));
    const std::int64_t row_tile = constant(chosen, "ROWS"), keep = std::min(k, row_tile);
    expect(kSmallestTile <= row_tile && row_tile <= kLargestTile && (select || keep == row_tile),
           "the library and its kernels disagree about ROWS");
    plan.pieces.make(*queries, stream);
    plan.epilogue.make(stream);
    for (std::int64_t first = 0; first < rows->rows; first += plan.block) {
      logra_cuda_matrix some = *rows;
      some.rows = std::min(plan.block, rows->rows - first);
      some.data =
          static_cast<const char*>(rows->data) + first * rows->row_stride * element_bytes(rows->dtype);
      const std::int64_t tiles = ceil_div(some.rows, row_tile);
      Launch launch(chosen);
      plan.pieces.add(launch, some.data);
      launch.pointer(plan.epilogue.scale + first * plan.epilogue.scale_stride);
      launch.pointer(plan.epilogue.bias + first * plan.epilogue.bias_stride);
      launch.pointer(plan.candidates).number("k", keep);
      add_epilogue(add_scan(launch, plan.pieces, some, queries->rows), plan.epilogue);
      launch.run(tiles * ceil_div(queries->rows, constant(chosen, "QUERIES")), stream);
      const std::int64_t* best =
          merge(plan.candidates, plan.merged, 2 * queries->rows, tiles * keep, k, stream);
      merge_state(best, true, queries->rows, k, row_offset + first, *state, plan, stream);
      merge_state(best + queries->rows * k, false, queries->rows, k, row_offset + first, *state, plan,
                  stream);
    }
  });
}
