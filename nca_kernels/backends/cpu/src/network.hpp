// The perception and the MLP of blocks of rows, forward and back.
//
// A row is a cell that needs the MLP. Depthwise perceptions are filter-major here, f*padded + c. A
// dense perception is one more linear map, whose input is the neighbours side by side. Packed
// weights and gradients have padded columns; pack and unpack map them to the callers' layout.
#pragma once

#include "activation.hpp"
#include "grid.hpp"
#include "parallel.hpp"
#if defined(NCA_AMX)
#include "amx.hpp"
#else
#include "product.hpp"
#endif

namespace nca::NCA_ISA {

#if defined(NCA_AMX)
using Products = TileProducts;
#else
using Products = RegisterProducts;
#endif
constexpr Index kBlock = Products::kBlock;  // rows at a time

struct Map {  // rows [in] -> activation(rows W + b) [out]
  const Layer* layer;
  Index in, in_padded, out, out_padded;
  Index in_stride;  // of the rows of inputs
  Activation activation;
  bool has_bias, wants_weight, wants_bias;
  bool outputs_first;  // the gradient of the weight is [out, in]: the shorter operand is transposed
  Index packed_at, transposed_at, bias_at, d_weight_at, d_bias_at;
};

struct Tap {  // of a filter, at a position of the kernel
  Index delta, filter;
  const float* values;  // [padded channels]
};

// The taps of a kernel that are not zero, as a list for each filter or for each position.
struct TapLists {
  Index* start;  // of each list, and the end of the last
  Tap* taps;
};

struct Stencil {
  TapLists by_filter, by_position;
};

struct Weights {  // of one group, packed
  float* packed;
  Stencil stencil;
};

class Network {
 public:
  Network(const Step& step, const Box& box, Scope& scope, bool backward);

  Weights pack(Index group, Scope& scope) const;
  void unpack(const float* gradients, Index group) const;

  const Step& step;
  const Box& box;
  const Products products;
  bool backward;
  Index positions, filters, padded;  // of the kernel; of a depthwise perception; padded channels
  Index* deltas;                     // of the kernel's positions in the box
  Index width;                       // columns of the perception's rows
  Index inputs_at;                   // column of the inputs in the rows of map `first`
  Index first, num_maps;             // maps: the dense perception, if any, then the layers
  Map* maps;
  Layer taps;                        // a dense perception as a layer
  Index widest = 0;
  Index packed_floats = 0, taps_at = 0, perception_bias_at = 0;
  Index gradient_floats = 0, d_taps_at = 0, d_perception_bias_at = 0;
  bool wants_rows;  // gradients of what the rows are made of

 private:
  void add_map(const Layer* layer, Index in, Activation activation);
  Index row_of(Index map, Index k) const;  // the layer's row that is packed as row k, or -1
  TapLists list_taps(const float* packed_taps, bool by_filter, Scope& scope) const;
};

inline Network::Network(const Step& s, const Box& b, Scope& scope, bool is_backward)
    : step(s), box(b), products(s.precision), backward(is_backward), num_maps(0) {
  const bool depthwise = step.perception == Perception::depthwise;
  const bool dense = step.perception == Perception::dense;
  positions = step.kernel[0] * step.kernel[1] * step.kernel[2];
  padded = box.padded;
  filters = depthwise ? step.perceived / step.channels : 0;
  width = depthwise ? filters * padded : dense ? positions * step.channels : step.perceived;
  deltas = scope.array<Index>(positions);
  for (Index o = 0; o < positions; ++o) {
    const Index area = step.kernel[1] * step.kernel[2];
    deltas[o] = box.at(o / area, o % area / step.kernel[2], o % step.kernel[2]);
  }
  maps = scope.array<Map>(step.layers.size() + 1);
  first = dense ? 1 : 0;
  wants_rows = step.d_state != nullptr || step.d_precomputed != nullptr ||
               step.d_input != nullptr || (depthwise && (step.d_taps || step.d_perception_bias));
  if (depthwise) {
    taps_at = packed_floats, packed_floats += positions * width;
    perception_bias_at = packed_floats, packed_floats += width;
    d_taps_at = gradient_floats, gradient_floats += step.d_taps ? positions * width : 0;
    d_perception_bias_at = gradient_floats;
    gradient_floats += step.d_perception_bias ? width : 0;
  }
  if (dense) {
    taps = {step.taps, step.perception_bias, step.d_taps, step.d_perception_bias, width,
            step.perceived};
    add_map(&taps, width, step.perception_activation);
    inputs_at = maps[0].out_padded;
  } else {
    inputs_at = width;
  }
  for (const Layer& layer : step.layers)
    add_map(&layer, &layer == &step.layers.front() ? inputs_at + step.inputs : layer.in,
            &layer == &step.layers.back() ? Activation::identity : step.activation);
}

inline void Network::add_map(const Layer* layer, Index in, Activation activation) {
  Map& map = maps[num_maps++];
  map.layer = layer;
  map.in = in;
  map.in_padded = round_up(in, kLanes);
  map.in_stride = map.in_padded + (map.in_padded % 64 == 0 ? kLanes : 0);  // spreads over L1's sets
  map.out = layer->out;
  map.out_padded = round_up(layer->out, kLanes);
  map.activation = activation;
  map.has_bias = bool(layer->bias);
  map.wants_weight = bool(layer->d_weight);
  map.wants_bias = bool(layer->d_bias);
  map.outputs_first = map.out_padded < map.in_padded;
  map.packed_at = packed_floats, packed_floats += products.packed_floats(in, map.out_padded);
  map.transposed_at = packed_floats;
  packed_floats += backward ? products.packed_floats(layer->out, map.in_padded) : 0;
  map.bias_at = packed_floats, packed_floats += map.out_padded;
  map.d_weight_at = gradient_floats;
  gradient_floats += map.wants_weight ? map.in_padded * map.out_padded : 0;
  map.d_bias_at = gradient_floats, gradient_floats += map.wants_bias ? map.out_padded : 0;
  widest = std::max({widest, map.in_stride, map.out_padded});
}

inline Index Network::row_of(Index map, Index k) const {
  if (map != first) return k < maps[map].layer->in ? k : -1;
  if (k >= inputs_at) return k - inputs_at + step.perceived;
  if (filters == 0) return k < step.perceived ? k : -1;
  return k % padded < step.channels ? k % padded * filters + k / padded : -1;
}

inline Weights Network::pack(Index group, Scope& scope) const {
  float* to = scope.floats(packed_floats);
  for (Index i = 0; i < num_maps; ++i) {
    const Map& map = maps[i];
    const float* weight = map.layer->weight.of(group);
    Index* rows = scope.array<Index>(map.in_padded);
    for (Index k = 0; k < map.in_padded; ++k) rows[k] = k < map.in ? row_of(i, k) : -1;
    products.pack(map.in, map.out_padded, to + map.packed_at,
                  [&](Index k, Index n, Index count, float* row) {
                    const Index filled = rows[k] < 0 ? 0 : std::min(count, map.out - n);
                    std::copy_n(weight + rows[k] * map.out + n, filled, row);
                    std::fill(row + filled, row + count, 0.0f);
                  });
    if (backward)
      products.pack(map.out, map.in_padded, to + map.transposed_at,
                    [&](Index n, Index k, Index count, float* row) {
                      for (Index j = 0; j < count; ++j)
                        row[j] = rows[k + j] < 0 ? 0.0f : weight[rows[k + j] * map.out + n];
                    });
    for (Index n = 0; n < map.out_padded; ++n)
      to[map.bias_at + n] = map.has_bias && n < map.out ? map.layer->bias.of(group)[n] : 0.0f;
  }
  if (filters == 0) return {to, {}};
  for (Index o = 0; o < positions; ++o)
    for (Index k = 0; k < width; ++k) {
      const Index from = row_of(0, k);
      to[taps_at + o * width + k] = from < 0 ? 0 : step.taps.of(group)[o * step.perceived + from];
    }
  for (Index k = 0; k < width; ++k) {
    const Index from = step.perception_bias ? row_of(0, k) : -1;
    to[perception_bias_at + k] = from < 0 ? 0 : step.perception_bias.of(group)[from];
  }
  return {to, {list_taps(to + taps_at, true, scope), list_taps(to + taps_at, false, scope)}};
}

inline TapLists Network::list_taps(const float* packed_taps, bool by_filter, Scope& scope) const {
  const Index lists = by_filter ? filters : positions, longest = by_filter ? positions : filters;
  TapLists result = {scope.array<Index>(lists + 1), scope.array<Tap>(filters * positions)};
  Index count = 0;
  for (Index i = 0; i < lists; ++i) {
    result.start[i] = count;
    for (Index j = 0; j < longest; ++j) {
      const Index f = by_filter ? i : j, o = by_filter ? j : i;
      const float* values = packed_taps + o * width + f * padded;
      if (std::any_of(values, values + padded, [](float x) { return x != 0; }))
        result.taps[count++] = {deltas[o], f, values};
    }
  }
  result.start[lists] = count;
  return result;
}

// Copies the gradients of a group to the callers' layout.
inline void Network::unpack(const float* gradients, Index group) const {
  for (Index i = 0; i < num_maps; ++i) {
    const Map& map = maps[i];
    if (map.wants_weight)
      for (Index k = 0; k < map.in; ++k)
        if (const Index row = row_of(i, k); row >= 0) {
          float* to = map.layer->d_weight.of(group) + row * map.out;
          const float* from = gradients + map.d_weight_at;
          if (map.outputs_first)
            for (Index n = 0; n < map.out; ++n) to[n] = from[n * map.in_padded + k];
          else
            std::memcpy(to, from + k * map.out_padded, map.out * sizeof(float));
        }
    if (map.wants_bias)
      std::memcpy(map.layer->d_bias.of(group), gradients + map.d_bias_at,
                  map.out * sizeof(float));
  }
  for (Index k = 0; filters > 0 && k < width; ++k) {
    const Index to = row_of(0, k);
    if (to < 0) continue;
    for (Index o = 0; step.d_taps && o < positions; ++o)
      step.d_taps.of(group)[o * step.perceived + to] = gradients[d_taps_at + o * width + k];
    if (step.d_perception_bias)
      step.d_perception_bias.of(group)[to] = gradients[d_perception_bias_at + k];
  }
}


// Where the rows of a tile are: the offset of each neighbourhood in the box, each cell in the
// sample.
struct Rows {
  Index count;
  const Index *box_at, *cell;
};

class Block {
 public:
  Block(const Network& network, Scope& scope);

  // Runs the rows of a sample; returns the updates [rows, update_stride].
  const float* forward(const Weights&, Rows rows, Index sample, const float* box);

  // Adds to the gradients, after forward on the same rows. d_update [kBlock, update_stride] is
  // overwritten.
  void backward(const Weights&, Rows rows, Index sample, const float* box, float* d_update,
                float* d_box, float* gradients, float* d_sample_inputs);

  Index update_stride;
  float* d_update;

 private:
  bool relu_is_due(Index map) const;
  Matrix input_of(Index map) const;
  void perceive(const Weights&, Rows rows, Index sample, const float* box);
  void add_inputs(Rows rows, Index sample);
  void perceive_backward(const Weights&, Rows rows, Index sample, const float* box, float* d_rows,
                         float* d_box, float* gradients);
  void taps_backward(Rows rows, const float* box, const float* d_rows, float* gradients);
  void inputs_backward(Rows rows, Index sample, const float* d_rows, float* d_sample_inputs);

  const Network& net;
  const Step& step;
  const Products::Registers registers;
  float* slopes_of(Activation kind, float* activated, Index floats, Scope& scope) const;
  float **values, **slopes;  // of each map: its input rows; what tells its activation's slopes
  float *update, *perception_slopes, *spare;
};

inline Block::Block(const Network& network, Scope& scope)
    : net(network), step(network.step), registers() {
  const Index maps = net.num_maps;
  const auto rows_of = [&](Index i) { return kBlock * net.maps[i].in_stride + kLanes; };
  values = scope.array<float*>(maps);
  slopes = scope.array<float*>(maps);
  for (Index i = 0; i < maps; ++i) values[i] = scope.floats(rows_of(i));
  for (Index i = 0; i + 1 < maps; ++i)
    slopes[i] = slopes_of(net.maps[i].activation, values[i + 1], rows_of(i + 1), scope);
  slopes[maps - 1] = nullptr;
  update_stride = net.maps[maps - 1].out_padded;
  update = scope.floats(kBlock * update_stride);
  perception_slopes = slopes_of(step.perception_activation, values[0], rows_of(0), scope);
  d_update = net.backward ? scope.floats(kBlock * net.widest + kLanes) : nullptr;
  spare = net.backward ? scope.floats(kBlock * net.widest + kLanes) : nullptr;
}

// A ReLU's slopes are read off its values, before it or after.
inline float* Block::slopes_of(Activation kind, float* activated, Index floats,
                               Scope& scope) const {
  if (!net.backward || kind == Activation::identity) return nullptr;
  return kind == Activation::relu ? activated : scope.floats(floats);
}

// Whether products apply the ReLU to the inputs of a map; rows with other inputs have it applied.
inline bool Block::relu_is_due(Index map) const {
  return Products::kAppliesRelu && map > net.first &&
         net.maps[map - 1].activation == Activation::relu;
}

inline Matrix Block::input_of(Index map) const {
  return {values[map], net.maps[map].in_stride, relu_is_due(map)};
}

// The depthwise perception of N rows, which share the loads of the taps.
template <int N>
NCA_INLINE void perceive_rows(const Network& net, const Weights& weights, const Index* box_at,
                              const float* box, float* to, Index stride) {
  const float* bias = weights.packed + net.perception_bias_at;
  for (Index f = 0; f < net.filters; ++f)
    for (Index c = 0; c < net.padded; c += kLanes) {
      Vec sum[N];
      for (int n = 0; n < N; ++n) sum[n] = load(bias + f * net.padded + c);
      const TapLists& lists = weights.stencil.by_filter;
      const Index end = lists.start[f + 1];
      for (Index i = lists.start[f]; i < end; ++i) {
        const Tap& tap = lists.taps[i];
        const Vec value = load(tap.values + c);
        for (int n = 0; n < N; ++n) sum[n] += value * load(box + box_at[n] + tap.delta + c);
      }
      for (int n = 0; n < N; ++n) store(to + n * stride + f * net.padded + c, sum[n]);
    }
}

// The transpose: adds to the neighbourhoods of N rows. It takes the positions of the kernel in
// turn, because at a single position no two cells add to the same values.
template <int N>
NCA_INLINE void spread_rows(const Network& net, const Weights& weights, const Index* box_at,
                            const float* d_rows, Index stride, float* d_box) {
  const bool dense = net.filters == 0;
  const Index channels = net.step.channels;
  const TapLists& lists = weights.stencil.by_position;
  const Tap* tap = lists.taps;
  for (Index o = 0; o < net.positions; ++o) {
    const Tap* end = dense ? tap : lists.taps + lists.start[o + 1];
    if (!dense && tap == end) continue;
    for (Index c = 0; c < net.padded; c += kLanes) {
      float* to = d_box + net.deltas[o] + c;
      Vec sum[N];
      for (int n = 0; n < N; ++n) sum[n] = load(to + box_at[n]);
      if (dense)  // what lies behind the channels is added to the padding of the box
        for (int n = 0; n < N; ++n) sum[n] += load(d_rows + n * stride + o * channels + c);
      for (const Tap* t = tap; t < end; ++t) {
        const Vec value = load(t->values + c);
        const float* from = d_rows + t->filter * net.padded + c;
        for (int n = 0; n < N; ++n) sum[n] += value * load(from + n * stride);
      }
      for (int n = 0; n < N; ++n) store(to + box_at[n], sum[n]);
    }
    tap = end;
  }
}

inline void Block::perceive(const Weights& weights, Rows rows, Index sample, const float* box) {
  const Index stride = net.maps[0].in_stride;
  if (step.perception == Perception::depthwise)
    return in_groups<4>(rows.count, [&](auto size, Index r) {
      perceive_rows<size>(net, weights, rows.box_at + r, box, values[0] + r * stride, stride);
    });
  for (Index r = 0; r < rows.count; ++r) {
    float* to = values[0] + r * stride;
    if (step.perception == Perception::precomputed) {
      const Index cell = sample * step.cells + rows.cell[r];
      std::memcpy(to, step.precomputed + cell * step.perceived, step.perceived * sizeof(float));
    } else {  // whole vectors: the next position overwrites what lies behind the channels
      for (Index o = 0; o < net.positions; ++o)
        for (Index c = 0; c < net.padded; c += kLanes)
          store(to + o * step.channels + c, load(box + rows.box_at[r] + net.deltas[o] + c));
    }
  }
}

inline void Block::add_inputs(Rows rows, Index sample) {
  const Index stride = net.maps[net.first].in_stride;
  for (Index r = 0; step.inputs > 0 && r < rows.count; ++r) {
    const Index row = step.inputs_per_cell ? sample * step.cells + rows.cell[r] : sample;
    std::memcpy(values[net.first] + r * stride + net.inputs_at, step.input + row * step.inputs,
                step.inputs * sizeof(float));
  }
}

inline const float* Block::forward(const Weights& weights, Rows rows, Index sample,
                                   const float* box) {
  perceive(weights, rows, sample, box);
  if (net.filters > 0)
    activate_rows(step.perception_activation, step.negative_slope, rows.count, net.width,
                  net.maps[0].in_stride, values[0], perception_slopes);
  add_inputs(rows, sample);
  for (Index i = 0; i < net.num_maps; ++i) {
    const Map& map = net.maps[i];
    const bool last = i + 1 == net.num_maps;
    if (last && net.backward) break;  // the update itself is not needed
    net.products.round(rows.count, map.in_padded, map.in_stride, values[i]);
    float* to = last ? update : values[i + 1];
    const Index stride = last ? update_stride : net.maps[i + 1].in_stride;
    net.products.multiply(rows.count, map.in, map.out_padded, input_of(i),
                          weights.packed + map.packed_at, to, stride,
                          {weights.packed + map.bias_at, 0});
    if (last || !relu_is_due(i + 1))
      activate_rows(map.activation, step.negative_slope, rows.count, map.out_padded, stride, to,
                    slopes[i]);
  }
  if (net.backward) {
    const Map& map = net.maps[net.num_maps - 1];
    net.products.round(rows.count, map.in_padded, map.in_stride, values[net.num_maps - 1]);
  }
  return update;
}

// Multiplies values [rows, columns] by the slopes, unless those are null, and adds the sums of
// columns to `sums`, unless that is null. For a ReLU, a positive number stands for a slope of 1 and
// any other for 0.
template <bool relu>
void scale_and_sum(Index rows, Index columns, Index stride, float* values, const float* slopes,
                   float* sums) {
  constexpr Index kAtOnce = 4;  // vectors: a column's lines would leave the cache between two
  if (slopes == nullptr && sums == nullptr) return;
  for (Index first = 0; first < columns; first += kAtOnce * kLanes) {
    const Index vectors = std::min(kAtOnce, (columns - first) / kLanes);
    Vec sum[kAtOnce] = {};
    for (Index r = 0; r < rows; ++r)
      for (Index v = 0; v < vectors; ++v) {
        const Index at = r * stride + first + v * kLanes;
        Vec x = load(values + at);
        if (slopes != nullptr) {
          const Vec slope = load(slopes + at);
          x = relu ? select(slope > 0.0f, x, Vec{}) : x * slope;
          store(values + at, x);
        }
        sum[v] += x;
      }
    for (Index v = 0; sums != nullptr && v < vectors; ++v) {
      float* to = sums + first + v * kLanes;
      store(to, load(to) + sum[v]);
    }
  }
}

inline void scale_and_sum(Activation kind, Index rows, Index columns, Index stride, float* values,
                          const float* slopes, float* sums) {
  (kind == Activation::relu ? scale_and_sum<true> : scale_and_sum<false>)(rows, columns, stride,
                                                                          values, slopes, sums);
}

inline void Block::backward(const Weights& weights, Rows rows, Index sample, const float* box,
                            float* d_out, float* d_box, float* gradients,
                            float* d_sample_inputs) {
  Index stride = update_stride;
  float* d_in = spare;
  for (Index i = net.num_maps - 1; i >= 0; --i) {
    const Map& map = net.maps[i];
    scale_and_sum(map.activation, rows.count, map.out_padded, stride, d_out, slopes[i],
                  map.wants_bias ? gradients + map.d_bias_at : nullptr);
    net.products.round(rows.count, map.out_padded, stride, d_out);
    const Matrix in = input_of(i), out = {d_out, stride};
    float* d_weight = gradients + map.d_weight_at;
    if (map.wants_weight && map.outputs_first)
      net.products.add_outer(rows.count, map.out_padded, map.in_padded, out, in, d_weight);
    else if (map.wants_weight)
      net.products.add_outer(rows.count, map.in_padded, map.out_padded, in, out, d_weight);
    if (i == 0 && !net.wants_rows) return;
    net.products.multiply(rows.count, map.out, map.in_padded, out,
                          weights.packed + map.transposed_at, d_in, map.in_stride, {nullptr, 0});
    stride = map.in_stride;
    std::swap(d_out, d_in);
    if (i == net.first) inputs_backward(rows, sample, d_out, d_sample_inputs);
  }
  perceive_backward(weights, rows, sample, box, d_out, d_box, gradients);
}

inline void Block::inputs_backward(Rows rows, Index sample, const float* d_rows,
                                   float* d_sample_inputs) {
  if (step.d_input == nullptr) return;
  for (Index r = 0; r < rows.count; ++r) {
    const float* from = d_rows + r * net.maps[net.first].in_stride + net.inputs_at;
    if (step.inputs_per_cell)
      std::memcpy(step.d_input + (sample * step.cells + rows.cell[r]) * step.inputs, from,
                  step.inputs * sizeof(float));
    else
      for (Index i = 0; i < step.inputs; ++i) d_sample_inputs[i] += from[i];
  }
}

inline void Block::perceive_backward(const Weights& weights, Rows rows, Index sample,
                                     const float* box, float* d_rows, float* d_box,
                                     float* gradients) {
  const Index stride = net.maps[0].in_stride;
  if (step.perception == Perception::precomputed) {
    for (Index r = 0; step.d_precomputed != nullptr && r < rows.count; ++r)
      std::memcpy(step.d_precomputed + (sample * step.cells + rows.cell[r]) * step.perceived,
                  d_rows + r * stride, step.perceived * sizeof(float));
    return;
  }
  if (net.filters > 0)
    scale_and_sum(step.perception_activation, rows.count, net.width, stride, d_rows,
                  perception_slopes,
                  step.d_perception_bias ? gradients + net.d_perception_bias_at : nullptr);
  if (step.d_taps && net.filters > 0) taps_backward(rows, box, d_rows, gradients);
  if (d_box == nullptr) return;
  in_groups<4>(rows.count, [&](auto size, Index r) {
    spread_rows<size>(net, weights, rows.box_at + r, d_rows + r * stride, stride, d_box);
  });
}

// Adds to the gradients of the taps at N positions from o on, for each output k. The sums stay in
// registers.
template <int N>
NCA_INLINE void taps_of_rows(const Network& net, Rows rows, const float* box, const float* d_rows,
                             Index o, float* d_taps) {
  for (Index k = 0; k < net.width; k += kLanes) {
    const float* seen = box + k % net.padded;
    Vec sum[N];
    for (int n = 0; n < N; ++n) sum[n] = load(d_taps + (o + n) * net.width + k);
    for (Index r = 0; r < rows.count; ++r) {
      const Vec d = load(d_rows + r * net.maps[0].in_stride + k);
      for (int n = 0; n < N; ++n) sum[n] += d * load(seen + rows.box_at[r] + net.deltas[o + n]);
    }
    for (int n = 0; n < N; ++n) store(d_taps + (o + n) * net.width + k, sum[n]);
  }
}

inline void Block::taps_backward(Rows rows, const float* box, const float* d_rows,
                                 float* gradients) {
  in_groups<4>(net.positions, [&](auto size, Index o) {
    taps_of_rows<size>(net, rows, box, d_rows, o, gradients + net.d_taps_at);
  });
}

}  // namespace nca::NCA_ISA
