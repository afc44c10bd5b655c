// Vectors as wide as those of the instruction set that this file is compiled for, written with the
// vector extensions of GCC and Clang. Everything lies in namespace NCA_ISA, once for each set, so
// that no inline function of a set can stand in for that of another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "problem.hpp"

#define NCA_INLINE inline __attribute__((always_inline))

namespace nca::NCA_ISA {

#if defined(__AVX512F__) || defined(NCA_AMX)
constexpr int kLanes = 16, kRows = 9, kVectors = 3;  // of a micro-kernel: rows, vectors a row
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kVectors = 3;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8, kVectors = 3;
#else
constexpr int kLanes = 4, kRows = 4, kVectors = 2;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef std::int8_t Bytes __attribute__((vector_size(kLanes)));

NCA_INLINE Vec load(const float* at) {
  Vec v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
NCA_INLINE void store(float* at, Vec v) { std::memcpy(at, &v, sizeof v); }
NCA_INLINE Vec splat(float x) { return x - Vec{}; }
NCA_INLINE Vec select(Ints where, Vec yes, Vec no) {
  return (Vec)((where & (Ints)yes) | (~where & (Ints)no));
}

constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

// body(size, first) for groups of N, with the size as a constant, and for each that is left over.
template <int N, class Body>
NCA_INLINE void in_groups(Index count, Body&& body) {
  Index first = 0;
  for (; first + N <= count; first += N) body(std::integral_constant<int, N>(), first);
  for (; first < count; ++first) body(std::integral_constant<int, 1>(), first);
}


struct bfloat16 {
  std::uint16_t bits;
};

NCA_INLINE Words rounded_words(Vec v) {
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words is_nan = (Words)(v != v);
  return (rounded & ~is_nan) | ((bits | 0x400000u) & is_nan);
}

NCA_INLINE Vec round_to_bfloat16(Vec v) { return (Vec)(rounded_words(v) & 0xffff0000u); }

NCA_INLINE Vec load(const bfloat16* at) {
  Halves halves;
  std::memcpy(&halves, at, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, Words) << 16);
}
NCA_INLINE void store(bfloat16* at, Vec v) {
  const Halves halves = __builtin_convertvector(rounded_words(v) >> 16, Halves);
  std::memcpy(at, &halves, sizeof halves);
}

// Loads or stores the first n < kLanes elements; the others are zero when loaded, and not stored.
template <class T>
NCA_INLINE Vec load_part(const T* at, Index n) {
  T padded[kLanes] = {};
  std::memcpy(padded, at, n * sizeof(T));
  return load(padded);
}
template <class T>
NCA_INLINE void store_part(T* at, Vec v, Index n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(at, padded, n * sizeof(T));
}

// body(c, vector) for the n channels of a cell, a vector at a time; the last is filled with zeros.
template <class T, class Body>
NCA_INLINE void for_channels(Index n, T* at, Body&& body) {
  Index c = 0;
  for (; c + kLanes <= n; c += kLanes) body(c, load(at + c));
  if (c < n) body(c, load_part(at + c, n - c));
}
template <class T>
NCA_INLINE void store_channels(T* at, Index c, Index n, Vec v) {
  if (c + kLanes <= n) store(at + c, v);
  else store_part(at + c, v, n - c);
}

NCA_INLINE float value(const float* at) { return *at; }
NCA_INLINE float value(const bfloat16* at) {
  const std::uint32_t bits = std::uint32_t{at->bits} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// memcpy by vectors: for rows of some KB, libraries use string instructions, which are slow here.
template <class T>
NCA_INLINE void copy(const T* from, T* to, Index n) {
  constexpr Index kStep = 64 / sizeof(T);
  Index i = 0;
  for (; i + kStep <= n; i += kStep) __builtin_memcpy(to + i, from + i, 64);
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
}


// The lane of (a, b) that comes to `lane` when two rows that are `by` apart exchange halves. With
// by = 1 quads are interleaved instead, which is a single instruction on x86.
constexpr int shuffled_lane(int by, bool second, int lane) {
  if (by == 1) return (lane & ~3) + (lane & 2) / 2 + (second ? 2 : 0) + (lane & 1) * kLanes;
  const bool from_b = lane & by;
  return (from_b == second ? lane : lane ^ by) + (from_b ? kLanes : 0);
}

template <int by, bool second, int... lane>
NCA_INLINE Vec shuffled(Vec a, Vec b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, shuffled_lane(by, second, lane)...);
#else
  return __builtin_shuffle(a, b, Ints{shuffled_lane(by, second, lane)...});
#endif
}

template <int by = 1>
NCA_INLINE void transpose(Vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int r = 0; r < kLanes; ++r) {
    if (r & by) continue;
    const Vec a = rows[r], b = rows[r + by];
    rows[r] = shuffled<by, false>(a, b, lanes);
    rows[r + by] = shuffled<by, true>(a, b, lanes);
  }
  if constexpr (2 * by < kLanes) return transpose<2 * by>(rows);
  for (int r = 0; r < kLanes; r += 4) {  // the interleaving has left these two rows exchanged
    const Vec second = rows[r + 2];
    rows[r + 2] = rows[r + 1], rows[r + 1] = second;
  }
}


// A polynomial by Horner's rule; the coefficient of the highest power comes first.
template <class... Rest>
NCA_INLINE Vec polynomial(Vec x, float first, Rest... rest) {
  Vec sum = splat(first);
  ((sum = sum * x + rest), ...);
  return sum;
}

// e^x, relative error about 1e-7; Cephes' reduction x = n log 2 + r and polynomial in r.
NCA_INLINE Vec exp(Vec x) {
  x = select(x > 88.7f, splat(88.7f), select(x < -87.3f, splat(-87.3f), x));
  const Vec scaled = x * 1.44269504088896341f;
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (scaled + shift) - shift;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const Vec p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f);
  return (p * (r * r) + r + 1.0f) * (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// log x of normal positive x or NaN, relative error about 1e-7; Cephes' polynomial around 1.
NCA_INLINE Vec log(Vec x) {
  const Ints exponent = ((Ints)x - 0x3f3504f3) >> 23;  // of sqrt(1/2) and what follows: 0
  const Vec n = __builtin_convertvector(exponent, Vec);
  const Vec r = (Vec)((Ints)x - (exponent << 23)) - 1.0f;
  const Vec p = polynomial(r, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f,
                           -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                           2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  const Vec s = r * r;
  const Vec y = n * 0.693359375f + (r + (p * r * s - 0.5f * s - n * 2.12194440e-4f));
  return select(x == x, y, x);
}

// By Cephes' polynomial near zero, elsewhere from e^2|x|.
NCA_INLINE Vec tanh(Vec x) {
  const Vec size = (Vec)((Ints)x & 0x7fffffff);
  const Vec s = x * x;
  const Vec p = polynomial(s, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                           1.33314422036e-1f, -3.33332819422e-1f);
  const Vec small = p * s * x + x;
  const Vec far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  const Vec large = (Vec)((Ints)far | ((Ints)x & (std::int32_t)0x80000000));
  return select(size < 0.625f, small, large);
}

NCA_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace nca::NCA_ISA
