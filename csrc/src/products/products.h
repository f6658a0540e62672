// Private: blocks of rows times all queries, which scores, topk_scores, project, projected_gradients and
// self_influence share. `queries` may be a projection's or a factor's rows.
#pragma once

#include <memory>
#include <vector>

#include "base/scratch.h"
#include "isa/kernels.h"
#include "logra/types.h"
#include "tiles/tiles.h"

namespace logra {

// 48 rows of kDimBlock floats (192 KiB) and 64 queries (256 KiB) stay in a 512 KiB L2 cache.
constexpr std::size_t kRowBlock = 48;
constexpr std::size_t kQueryBlock = 64;

class Products {
 public:
  /// Copies the queries block by block of D (a stride of a power of two would map them all to a few cache
  /// sets), unless they are few. On tiles, skip_zeros leaves out a query's trailing zeros within a block; it
  /// must not be used where a row's NaN has to meet them.
  Products(const Kernels& kernels, const Matrix& queries, Dtype rows, std::size_t num_rows,
           bool skip_zeros = false);

  std::size_t num_queries() const { return queries_.rows; }
  bool on_tiles() const { return tiles_ != nullptr; }
  /// Rows that are best handed to run() at a time: no more than these; and how many that follow it looks at.
  std::size_t row_block() const { return tiles_ ? tiles_->row_block() : kRowBlock; }
  std::size_t ahead() const { return tiles_ ? kStageRows : 6; }
  std::size_t query_block() const { return tiles_ ? tiles_->query_block() : kQueryBlock; }
  std::size_t query_blocks() const { return (queries_.rows + query_block() - 1) / query_block(); }

  /// Floats that one thread needs: run()'s scratch.
  std::size_t scratch_floats() const;

  /// For block.num_rows <= row_block(), block.end <= block.begin + query_block(); begin is a multiple of 16.
  void run(const ProductBlock& block, float* scratch) const;

 private:
  /// Queries cut into blocks of D: block b of query q is at data[b * block_stride + q * query_stride].
  template <class T>
  struct Blocks {
    const T* data = nullptr;  // nullptr if there are none of this type
    std::size_t length = 0, count = 0, query_stride = 0, block_stride = 0;  // count: blocks of D
    Scratch<T> storage;                                                     // of a copy
  };
  template <class T>
  T* allocate(Blocks<T>& blocks, std::size_t length) const;
  /// use(block, first column, columns)
  template <class T, class Use>
  void for_blocks(const Blocks<T>& blocks, const Use& use) const;
  bool direct() const;
  std::size_t wide_floats() const;  // scratch for rows converted to float32
  void pack();
  std::size_t pack_bf16();  // returns how many queries are exact in bfloat16
  void run_f32(const ProductBlock& block, float* scratch) const;
  void run_widened(const ProductBlock& block, float* scratch) const;
  template <class T>
  void run_dots(Dots<T> dots, const Blocks<T>& blocks, const ProductBlock& block) const;

  const Kernels& kernels_;
  std::unique_ptr<TileProducts> tiles_;  // where the CPU multiplies tiles: computes every product then
  Matrix queries_;
  Dtype dtype_;                      // of the rows
  Blocks<float> blocks_;             // no data if every query is exact in bfloat16
  Blocks<Bfloat16> halves_;          // where the CPU multiplies bfloat16: the queries that are exact in it
  std::vector<std::uint8_t> exact_;  // [Q]: which queries those are; empty if none is
};

}  // namespace logra
