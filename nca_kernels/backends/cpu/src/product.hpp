// Products of blocks of rows, by multiply-adds that keep kRows x kVectors sums in registers. The
// order of a sum is the same for every element, however rows are grouped.
#pragma once

#include <algorithm>

#include "parallel.hpp"
#include "vector.hpp"

namespace nca::NCA_ISA {

struct Matrix {  // row-major
  const float* data;
  Index stride;
  bool relu = false;  // whether its ReLU is still to be applied
};

// What the sums start from: rows that are `stride` apart. With a stride of 0 all rows start from
// the same row, and without data they start from zeros.
struct Start {
  const float* data;
  Index stride;
};

// A(m, k) = data[m * row + k * column]; `row` is 1 if the matrix is transposed.
struct Left {
  const float* data;
  Index row, column;
};

// The columns of B are cut into panels of up to kVectors vectors. In a packed B each panel
// [K, columns of the panel] is contiguous; otherwise B is row-major with this stride.
struct Right {
  const float* data;
  Index stride;  // 0: packed
};

NCA_INLINE Index panel(Index vectors_left) {
  return vectors_left == 4 && kVectors == 3 ? 2 : std::min<Index>(vectors_left, kVectors);
}

template <int M, int N, bool transposed>
NCA_INLINE void micro_kernel(Index depth, Left a, const float* b, Index stride, float* c,
                             Index c_stride, Start start) {
  Vec sum[M][N];  // all loaded, and no branch: so that the compiler keeps them in registers
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = load(start.data + m * start.stride + n * kLanes);
  for (Index k = 0; k < depth; ++k) {
    Vec right[N];
    for (int n = 0; n < N; ++n) right[n] = load(b + k * stride + n * kLanes);
    for (int m = 0; m < M; ++m) {
      const float left = transposed ? a.data[k * a.column + m] : a.data[m * a.row + k];
      for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(c + m * c_stride + n * kLanes, sum[m][n]);
}

template <int N, bool transposed, int M = kRows>
void panel_rows(Index rows, Index depth, Left a, const float* b, Index stride, float* c,
                Index c_stride, Start start) {
  Index m = 0;
  for (; m + M <= rows; m += M) {
    const Left from = {a.data + m * a.row, a.row, a.column};
    micro_kernel<M, N, transposed>(depth, from, b, stride, c + m * c_stride, c_stride,
                                   {start.data + m * start.stride, start.stride});
  }
  if constexpr (M > 1)
    if (m < rows)
      panel_rows<N, transposed, M / 2>(rows - m, depth, {a.data + m * a.row, a.row, a.column}, b,
                                       stride, c + m * c_stride, c_stride,
                                       {start.data + m * start.stride, start.stride});
}

template <bool transposed>
void multiply_panels(Index rows, Index depth, Index columns, Left a, Right b, float* c,
                     Index c_stride, Start start) {
  alignas(64) static const float zeros[kVectors * kLanes] = {};
  for (Index n = 0, left = columns / kLanes; left > 0;) {
    const Index vectors = panel(left), width = vectors * kLanes;
    const float* from = b.data + (b.stride ? n : n * depth);
    const Index stride = b.stride ? b.stride : width;
    const Start panel_start = {start.data ? start.data + n : zeros, start.stride};
    const auto run = vectors == 1   ? panel_rows<1, transposed>
                     : vectors == 2 ? panel_rows<2, transposed>
                                    : panel_rows<kVectors, transposed>;
    run(rows, depth, a, from, stride, c + n, c_stride, panel_start);
    n += width;
    left -= vectors;
  }
}

// Products in vector registers. The numbers of columns of right operands and of results are
// multiples of kLanes.
class RegisterProducts {
 public:
  static constexpr Index kBlock = 72;  // rows at a time: they stay in the L1 and L2 caches
  static constexpr bool kAppliesRelu = false;  // whether operands can have their ReLU still due
  struct Registers {};                         // what a thread sets up while it multiplies

  explicit RegisterProducts(Precision precision) : rounds_(precision == Precision::bfloat16) {}

  Index packed_floats(Index depth, Index columns) const { return depth * columns; }

  // B [depth, columns]; row(k, n, count, to) writes B(k, n) and the count - 1 elements behind.
  template <class Row>
  void pack(Index depth, Index columns, float* packed, Row&& row) const {
    float* to = packed;
    for (Index n = 0, left = columns / kLanes; left > 0;) {
      const Index vectors = panel(left), width = vectors * kLanes;
      for (Index k = 0; k < depth; ++k, to += width) row(k, n, width, to);
      n += width;
      left -= vectors;
    }
    round(1, to - packed, 0, packed);
  }

  // Rounds a left operand [rows, columns] of the two products below if products are in bfloat16.
  void round(Index rows, Index columns, Index stride, float* at) const {
    for (Index r = 0; rounds_ && r < rows; ++r)
      for (Index c = 0; c < columns; c += kLanes)
        store(at + r * stride + c, round_to_bfloat16(load(at + r * stride + c)));
  }

  // C [rows, columns] = start + A [rows, depth] B, packed.
  void multiply(Index rows, Index depth, Index columns, Matrix a, const float* packed, float* c,
                Index c_stride, Start start) const {
    multiply_panels<false>(rows, depth, columns, {a.data, a.stride, 1}, {packed, 0}, c, c_stride,
                           start);
  }

  // C [a_columns, b_columns] += A^T B, of A [rows, a_columns] and B [rows, b_columns].
  void add_outer(Index rows, Index a_columns, Index b_columns, Matrix a, Matrix b,
                 float* c) const {
    multiply_panels<true>(a_columns, rows, b_columns, {a.data, 1, a.stride}, {b.data, b.stride}, c,
                          b_columns, {c, b_columns});
  }

 private:
  bool rounds_;
};

}  // namespace nca::NCA_ISA
