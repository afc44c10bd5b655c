// Activations and their derivatives, over a block of rows. A ReLU's slope is read off its values.
#pragma once

#include "vector.hpp"

namespace nca::NCA_ISA {

struct Both {
  Vec value, slope;
};

NCA_INLINE Both activate(Activation kind, Vec x, float negative_slope) {
  switch (kind) {
    case Activation::relu:
      x = select(x < 0.0f, Vec{}, x);  // keeps NaN
      return {x, x};
    case Activation::leaky_relu:
      return {select(x >= 0.0f, x, negative_slope * x),
              select(x >= 0.0f, splat(1.0f), splat(negative_slope))};
    case Activation::elu: {
      const Vec negative = exp(select(x < 0.0f, x, Vec{}));
      return {select(x > 0.0f, x, select(x <= 0.0f, negative - 1.0f, x)), negative};
    }
    case Activation::tanh: {
      const Vec t = tanh(x);
      return {t, 1.0f - t * t};
    }
    case Activation::silu: {
      const Vec s = sigmoid(x);
      return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    case Activation::gelu: {
      const Vec square = x * x;
      const Vec t = tanh(0.7978845608028654f * x * (1.0f + 0.044715f * square));
      const Vec inner = 0.7978845608028654f * (1.0f + 3 * 0.044715f * square);
      return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner};
    }
    case Activation::identity:
      break;
  }
  return {x, splat(1.0f)};
}

// Activates values [rows, columns], with rows `stride` apart, in place; writes the slopes to an
// array of the same form, unless that is null.
template <Activation kind>
void activate_rows(float negative_slope, Index rows, Index columns, Index stride, float* values,
                   float* slopes) {
  if constexpr (kind == Activation::identity) return;  // nobody asks for its slopes
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < columns; c += kLanes) {
      const Both both = activate(kind, load(values + r * stride + c), negative_slope);
      store(values + r * stride + c, both.value);
      if (slopes != nullptr && kind != Activation::relu) store(slopes + r * stride + c, both.slope);
    }
}

inline void activate_rows(Activation kind, float negative_slope, Index rows, Index columns,
                          Index stride, float* values, float* slopes) {
  switch (kind) {
#define NCA_CASE(name)     \
  case Activation::name:   \
    return activate_rows<Activation::name>(negative_slope, rows, columns, stride, values, slopes);
    NCA_ACTIVATIONS(NCA_CASE)
#undef NCA_CASE
  }
}

}  // namespace nca::NCA_ISA
