// Products in the tile registers of AMX, which multiply bfloat16 and add in float32.
//
// A float32 is the sum of three bfloat16, its terms. The products of terms i and j with i + j < 3
// together have the accuracy of float32: six tile products, which are still faster than
// multiply-adds. Two terms have 16 bits, more than tensorfloat32 asks for, and bfloat16 is a single
// term.
//
// A tile is 16 lines of 32 bfloat16. A line holds the elements of two vectors in turn,
// a0 b0 a1 b1 .., so that the pairs that a tile product adds up are made without a shuffle. Where a
// depth is an odd multiple of 16, two terms of the last 16 share a line, so that half a tile costs
// half as much.
#pragma once

#include <algorithm>

#include "product.hpp"

namespace nca::NCA_ISA {

static_assert(kLanes == 16, "a tile's line is two vectors");
using Half = std::uint16_t;
constexpr Index kTileRows = 16, kTileDepth = 32, kTile = kTileRows * kTileDepth;  // in Halves


#if defined(NCA_EMULATE_AMX)  // for machines without AMX, and for sanitizers
inline thread_local float registers[8][kTileRows * kTileDepth / 2];

class TileRegisters {};
template <int R>
void tile_load(const void* from, Index bytes) {
  for (Index r = 0; r < kTileRows; ++r)
    std::memcpy(registers[R] + r * kLanes, static_cast<const char*>(from) + r * bytes, 64);
}
template <int R>
void tile_store(void* to, Index bytes) {
  for (Index r = 0; r < kTileRows; ++r)
    std::memcpy(static_cast<char*>(to) + r * bytes, registers[R] + r * kLanes, 64);
}
template <int R>
void tile_zero() {
  std::memset(registers[R], 0, sizeof registers[R]);
}
template <int C, int A, int B>
void tile_multiply() {
  const auto half = [](float pair, int odd) {
    std::uint32_t bits;
    std::memcpy(&bits, &pair, sizeof bits);
    bits = odd ? bits & 0xffff0000u : bits << 16;
    std::memcpy(&pair, &bits, sizeof pair);
    return pair;
  };
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int odd = 0; odd < 2; ++odd)
        for (int n = 0; n < 16; ++n)
          registers[C][m * 16 + n] +=
              half(registers[A][m * 16 + k], odd) * half(registers[B][k * 16 + n], odd);
}
#else
class TileRegisters {  // configures the registers of this thread while the object lives
 public:
  TileRegisters() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
};
template <int R>
NCA_INLINE void tile_load(const void* from, Index bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(R) : "memory");
}
template <int R>
NCA_INLINE void tile_store(void* to, Index bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(R) : "memory");
}
template <int R>
NCA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
template <int C, int A, int B>
NCA_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

template <class Body, int... i>
NCA_INLINE void each_of(std::integer_sequence<int, i...>, Body&& body) {
  (body(std::integral_constant<int, i>()), ...);
}
template <int N, class Body>
NCA_INLINE void each(Body&& body) {
  each_of(std::make_integer_sequence<int, N>(), body);
}


// Splits x into its terms. The first is rounded to nearest, so that the others have either sign and
// errors cancel.
template <int terms>
NCA_INLINE void split(Vec x, Vec (&term)[terms]) {
  if constexpr (terms == 1) {
    term[0] = round_to_bfloat16(x);
  } else {
    term[0] = (Vec)(((Words)x + 0x8000u) & 0xffff0000u);
    x -= term[0];
    term[1] = terms == 2 ? round_to_bfloat16(x) : (Vec)((Words)x & 0xffff0000u);
    if constexpr (terms == 3) term[2] = x - term[1];  // exact: the 8 bits that are left
  }
}

// Writes a line of two vectors of terms, whose lower halves are zero.
NCA_INLINE void put_line(Half* to, Vec a, Vec b) {
  const Words line = ((Words)a >> 16) | (Words)b;
  std::memcpy(to, &line, sizeof line);
}

// Writes a line to each of `terms` tiles.
template <int terms>
NCA_INLINE void put_lines(Half* to, Vec a, Vec b) {
  Vec as[terms], bs[terms];
  split<terms>(a, as);
  split<terms>(b, bs);
  for (int i = 0; i < terms; ++i) put_line(to + i * kTile, as[i], bs[i]);
}

// The tiles of a depth: `terms` whole tiles for each 32, and tiles for a rest that is half as deep.
struct Depth {
  Index whole;
  bool half;
  explicit Depth(Index depth) : whole((depth + 15) / 32), half((depth + 15) / 16 % 2) {}
  Index left_tiles(int terms) const { return terms * whole + (half ? terms == 3 ? 2 : 1 : 0); }
  Index right_tiles(int terms) const { return terms * (whole + half); }
};

// Half tiles: (x0 x1) and (x0 x2) of the left meet (y0 y0), (y1 y1) and (y2 y0) of the right.
template <int terms>
NCA_INLINE void put_half_left(Half* to, Vec x) {
  Vec term[terms];
  split<terms>(x, term);
  put_line(to, term[0], terms > 1 ? term[terms > 1] : Vec{});
  if constexpr (terms == 3) put_line(to + kTile, term[0], term[2]);
}
template <int terms>
NCA_INLINE void put_half_right(Half* to, Vec y) {
  Vec term[terms];
  split<terms>(y, term);
  put_line(to, term[0], terms > 1 ? term[0] : Vec{});
  if constexpr (terms > 1) put_line(to + kTile, term[1], terms > 2 ? term[1] : Vec{});
  if constexpr (terms > 2) put_line(to + 2 * kTile, term[2], term[0]);
}

// Which terms meet in step i: the smallest products first, in an order that loads few tiles twice.
struct Meeting {
  int left, right;
};
template <int terms, bool half>
constexpr int kMeetings = half ? terms : terms * (terms + 1) / 2;
template <int terms, bool half>
constexpr Meeting meeting(int i) {
  constexpr Meeting three[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}, {2, 0}};
  constexpr Meeting two[] = {{0, 1}, {0, 0}, {1, 0}};
  if (i < 0) return {-1, -1};
  if (half) return {i == 2 ? 1 : 0, i};
  return terms == 3 ? three[i] : terms == 2 ? two[i] : Meeting{0, 0};
}


struct Apart {  // distance in Halves between blocks of 16 rows of the left, or columns of the right
  Index left, right;
};

// Adds to M x N tiles of C from step i on. The accumulators are in the registers 0 to 3, the left
// operand in 4 and 5, the right operand in 6 and 7.
template <int terms, bool half, int M, int N, int i = 0>
NCA_INLINE void meet(const Half* left, const Half* right, Apart apart) {
  constexpr Meeting at = meeting<terms, half>(i), before = meeting<terms, half>(i - 1);
  constexpr bool new_left = at.left != before.left, new_right = at.right != before.right;
  left += at.left * kTile, right += at.right * kTile;
  if constexpr (new_right) tile_load<6>(right, 64);
  if constexpr (new_right && N == 2) tile_load<7>(right + apart.right, 64);
  each<M>([&](auto m) {
    if constexpr (new_left) tile_load<4 + m>(left + m * apart.left, 64);
    tile_multiply<m * N, 4 + m, 6>();
    if constexpr (N == 2) tile_multiply<m * N + 1, 4 + m, 7>();
  });
  left -= at.left * kTile, right -= at.right * kTile;
  if constexpr (i + 1 < kMeetings<terms, half>) meet<terms, half, M, N, i + 1>(left, right, apart);
}

template <int terms, int M, int N>
void tile_kernel(Depth depth, const Half* left, const Half* right, Apart apart, float* c,
                 Index c_stride, Start start) {
  constexpr Index kBytes = sizeof(float);
  each<M * N>([&](auto i) {
    const float* from = start.data + i / N * kTileRows * start.stride + i % N * kLanes;
    if (start.data != nullptr) tile_load<i>(from, start.stride * kBytes);
    else tile_zero<i>();
  });
  for (Index t = 0; t < depth.whole; ++t, left += terms * kTile, right += terms * kTile)
    meet<terms, false, M, N>(left, right, apart);
  if (depth.half) meet<terms, true, M, N>(left, right, apart);
  each<M * N>([&](auto i) {
    tile_store<i>(c + i / N * kTileRows * c_stride + i % N * kLanes, c_stride * kBytes);
  });
}

// C [16 blocks, columns] = start + left right.
template <int terms>
void multiply_tiles(Index blocks, Index columns, Depth depth, const Half* left, const Half* right,
                    float* c, Index c_stride, Start start) {
  const Apart apart = {depth.left_tiles(terms) * kTile, depth.right_tiles(terms) * kTile};
  for (Index n = 0; n < columns / kLanes; n += 2)
    for (Index m = 0; m < blocks; m += 2) {
      const bool wide = n + 1 < columns / kLanes, high = m + 1 < blocks;
      const auto run = high ? wide ? tile_kernel<terms, 2, 2> : tile_kernel<terms, 2, 1>
                            : wide ? tile_kernel<terms, 1, 2> : tile_kernel<terms, 1, 1>;
      const float* from = start.data + m * kTileRows * start.stride + n * kLanes;
      run(depth, left + m * apart.left, right + n * apart.right, apart,
          c + m * kTileRows * c_stride + n * kLanes, c_stride,
          {start.data == nullptr ? nullptr : from, start.stride});
    }
}


// Reads 16 columns of a matrix.
template <bool relu>
NCA_INLINE Vec read(const float* at) {
  const Vec x = load(at);
  return relu ? select(x < 0.0f, Vec{}, x) : x;  // keeps NaN
}

// Writes the tiles of A [rows, columns]: a line is 32 columns of a row.
template <int terms, bool relu>
void put_left(Index rows, Index columns, Matrix a, Half* to) {
  const Depth depth(columns);
  const Index tiles = depth.left_tiles(terms), last = (columns - 1) / kLanes * kLanes;
  Ints valid;  // lanes of the last vector; the memory behind them may hold anything
  for (int i = 0; i < kLanes; ++i) valid[i] = i < columns - last ? -1 : 0;
  for (Index r = 0; r < round_up(rows, kTileRows); ++r) {
    Half* line = to + r / kTileRows * tiles * kTile + r % kTileRows * kTileDepth;
    const float* from = a.data + std::min(r, rows - 1) * a.stride;
    for (Index k = 0; k < depth.whole * kTileDepth; k += kTileDepth, line += terms * kTile) {
      Vec second = read<relu>(from + k + kLanes);
      if (k + kLanes == last) second = select(valid, second, Vec{});
      put_lines<terms>(line, read<relu>(from + k), second);
    }
    if (depth.half) put_half_left<terms>(line, select(valid, read<relu>(from + last), Vec{}));
  }
}

// Writes the tiles of A^T for A [rows, columns]: a line is 32 rows of a column. Missing rows are
// zero.
template <int terms, bool relu>
void put_transposed(Index rows, Index columns, Matrix a, Half* to) {
  for (Index n = 0; n < columns; n += kLanes)
    for (Index r = 0; r < rows; r += kTileDepth, to += terms * kTile) {
      Vec halves[2][kLanes];
      for (int half = 0; half < 2; ++half) {
        for (Index i = 0, k = r + half * kLanes; i < kLanes; ++i, ++k)
          halves[half][i] = k < rows ? read<relu>(a.data + k * a.stride + n) : Vec{};
        transpose(halves[half]);
      }
      for (Index i = 0; i < kLanes; ++i)
        put_lines<terms>(to + i * kTileDepth, halves[0][i], halves[1][i]);
    }
}

// Writes the tiles of B [depth, columns]: a line is 16 columns of two rows that are 16 apart.
// row(k, n) returns the 16 values of row k from column n on.
template <int terms, class Row>
void put_right(Depth depth, Index columns, Half* to, Row&& row) {
  for (Index n = 0; n < columns; n += kLanes) {
    Index k = 0;
    for (; k < depth.whole * kTileDepth; k += kTileDepth, to += terms * kTile)
      for (Index i = 0; i < kLanes; ++i)
        put_lines<terms>(to + i * kTileDepth, row(k + i, n), row(k + kLanes + i, n));
    if (!depth.half) continue;
    for (Index i = 0; i < kLanes; ++i) put_half_right<terms>(to + i * kTileDepth, row(k + i, n));
    to += terms * kTile;
  }
}

// The same products as those of RegisterProducts, in tile registers.
class TileProducts {
 public:
  static constexpr Index kBlock = 64;
  static constexpr bool kAppliesRelu = true;
  using Registers = TileRegisters;

  explicit TileProducts(Precision precision)
      : terms_(precision == Precision::bfloat16        ? 1
               : precision == Precision::tensorfloat32 ? 2
                                                       : 3) {}

  Index packed_floats(Index depth, Index columns) const {
    return Depth(depth).right_tiles(terms_) * (columns / kLanes) * kTile / 2;
  }

  template <class Row>
  void pack(Index depth, Index columns, float* packed, Row&& row) const {
    const auto values = [&](Index k, Index n) {
      alignas(64) float columns_of_row[kLanes] = {};
      if (k < depth) row(k, n, Index{kLanes}, columns_of_row);
      return load(columns_of_row);
    };
    with_terms([&](auto terms) {
      put_right<terms>(Depth(depth), columns, reinterpret_cast<Half*>(packed), values);
    });
  }

  void round(Index, Index, Index, float*) const {}  // `split` rounds already

  void multiply(Index rows, Index depth, Index columns, Matrix a, const float* packed, float* c,
                Index c_stride, Start start) const {
    with_terms([&](auto terms) {
      constexpr Index kAtOnce = 20;  // tiles of the left: they stay in the L1 cache
      Scope local;
      const Index tiles = Depth(depth).left_tiles(terms);
      const Index at_once =
          std::min(std::max<Index>(kAtOnce / tiles, 1) * kTileRows, round_up(rows, kTileRows));
      Half* left = local.array<Half>(at_once / kTileRows * tiles * kTile);
      const Half* right = reinterpret_cast<const Half*>(packed);
      for (Index r = 0; r < rows; r += at_once) {
        const Index size = std::min(at_once, rows - r);
        const auto put = a.relu ? put_left<terms, true> : put_left<terms, false>;
        put(size, depth, {a.data + r * a.stride, a.stride}, left);
        const float* from = start.data == nullptr ? nullptr : start.data + r * start.stride;
        multiply_tiles<terms>(round_up(size, kTileRows) / kTileRows, columns, Depth(depth), left,
                              right, c + r * c_stride, c_stride, {from, start.stride});
      }
    });
  }

  void add_outer(Index rows, Index a_columns, Index b_columns, Matrix a, Matrix b,
                 float* c) const {
    with_terms([&](auto terms) {
      constexpr Index kAtOnce = 2 * kLanes;  // columns of B
      Scope local;
      const Depth depth(round_up(rows, kTileDepth));
      const Index blocks = round_up(a_columns, kTileRows) / kTileRows;
      Half* left = local.array<Half>(blocks * depth.left_tiles(terms) * kTile);
      Half* right = local.array<Half>(2 * depth.right_tiles(terms) * kTile);
      const auto transposed = a.relu ? put_transposed<terms, true> : put_transposed<terms, false>;
      transposed(rows, a_columns, a, left);
      for (Index n = 0; n < b_columns; n += kAtOnce) {
        const Index size = std::min(kAtOnce, b_columns - n);
        const auto put = [&](auto relu) {
          put_right<terms>(depth, size, right, [&](Index k, Index at) {
            return k < rows ? read<relu>(b.data + k * b.stride + n + at) : Vec{};
          });
        };
        b.relu ? put(std::true_type()) : put(std::false_type());
        multiply_tiles<terms>(blocks, size, depth, left, right, c + n, b_columns,
                              {c + n, b_columns});
      }
    });
  }

 private:
  template <class Body>
  void with_terms(Body&& body) const {
    if (terms_ == 1) body(std::integral_constant<int, 1>());
    else if (terms_ == 2) body(std::integral_constant<int, 2>());
    else body(std::integral_constant<int, 3>());
  }

  int terms_;
};

}  // namespace nca::NCA_ISA
