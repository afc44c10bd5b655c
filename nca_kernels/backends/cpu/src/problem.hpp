// A call as plain data, which the handlers fill in and the kernels read.
//
// Grids have three axes here, z y x. A plane has depth 1; a line is a column of cells along y, so
// that tiles can split it. Every array is float32, except that states may be bfloat16.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace nca {

using Index = std::int64_t;

// Each enum is written once, as a list of its names. A call has the names as text, and a name that
// is not in the list is refused. A switch over such an enum has no default, so that the compiler
// warns of a missing case.
#define NCA_ACTIVATIONS(X) X(relu) X(gelu) X(silu) X(tanh) X(elu) X(leaky_relu) X(identity)
#define NCA_PADDINGS(X) X(zeros) X(circular) X(replicate) X(reflect)
#define NCA_FIRES(X) X(all) X(key) X(mask)
#define NCA_PERCEPTIONS(X) X(depthwise) X(dense) X(precomputed)
#define NCA_PRECISIONS(X) X(float32) X(tensorfloat32) X(bfloat16)  // the least of products

#define NCA_MEMBER(name) name,
#define NCA_COMPARE(name) \
  if (text == #name) return value = Enum::name, void();
#define NCA_ENUM(type, NAMES)                                        \
  enum class type : int { NAMES(NCA_MEMBER) };                       \
  inline void read_name(std::string_view text, type& value) {        \
    using Enum = type;                                               \
    NAMES(NCA_COMPARE)                                               \
    throw std::invalid_argument("the native kernels know no " #type  \
                                " named " + std::string(text));      \
  }
NCA_ENUM(Activation, NCA_ACTIVATIONS)
NCA_ENUM(Padding, NCA_PADDINGS)
NCA_ENUM(Fire, NCA_FIRES)
NCA_ENUM(Perception, NCA_PERCEPTIONS)
NCA_ENUM(Precision, NCA_PRECISIONS)
#undef NCA_ENUM
#undef NCA_COMPARE
#undef NCA_MEMBER

// An operand or a gradient [groups, ...]; an operand that all groups share has stride 0.
template <class T>
struct Grouped {
  T* data = nullptr;  // null: absent, or not asked for
  Index stride = 0;
  T* of(Index group) const { return data + group * stride; }
  explicit operator bool() const { return data != nullptr; }
};

struct Layer {
  Grouped<const float> weight, bias;  // [in, out], [out]
  Grouped<float> d_weight, d_bias;
  Index in = 0, out = 0;
};

struct Step {
  Index groups, batch, size[3], cells, channels;  // cells: of a sample
  bool bfloat16;                                  // the dtype of states
  Padding padding;
  Perception perception;
  Index kernel[3], before[3];  // of the taps; 1 and 0 without taps
  Index perceived, inputs;     // sizes of the perception and of the inputs
  bool inputs_per_cell;
  Precision precision;
  Activation activation, perception_activation;
  float negative_slope;  // of leaky_relu
  float step_size;
  Fire fire;
  std::uint32_t fire_threshold;
  bool alive;
  Index alive_channel, alive_radius;
  float alive_threshold;
  std::vector<Layer> layers;

  const void* state;                         // [groups, batch, cells, C]
  Grouped<const std::uint32_t> key;          // [2]
  Grouped<const std::uint8_t> mask;          // [batch, cells]
  const float *precomputed, *input;          // [groups, batch, cells, P], [.., I]
  Grouped<const float> taps, perception_bias;  // [kernel, 1, F*C] or [kernel, C, P], [P]

  // Forward.
  void* new_state;
  std::uint8_t* alive_mask;  // [groups, batch, cells]; read by the backward

  // Backward; a gradient that is null is not asked for.
  const void* cotangent;
  void* d_state;
  float *d_precomputed, *d_input;
  Grouped<float> d_taps, d_perception_bias;
  bool wants_weights;
};

struct Attention {
  Index samples, size[3], cells, heads, head_size, radius[3];
  bool bfloat16, circular;
  const void *query, *key, *value;  // [samples, cells, heads, d]
  void* out;
  float* log_sum_exp;  // [samples, cells, heads]; read by the backward
  const void* cotangent;
  void *d_query, *d_key, *d_value;  // null: not asked for
};

}  // namespace nca
