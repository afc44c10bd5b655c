// neighborhood_attention: forward and backward, tile by tile.
//
// Each channel of an array becomes a plane, in which a neighbour has the same distance in memory
// from every cell of a tile: vectors run over cells, whatever the head size. The rows of a plane
// have a margin for the window. The positions in the margins between two rows are computed along
// with the cells, and their results are never stored.
//
// Nothing is scattered: cell j is a neighbour of cell i exactly as often as i is a neighbour of j,
// so the gradients of keys and values are sums over the same window. The formulas are in
// backends/xla/attention.py.
#pragma once

#include <cmath>

#include "grid.hpp"

namespace nca::NCA_ISA {


// Copies n < kLanes elements in a few moves of fixed sizes.
template <class T, int most = kLanes / 2>
NCA_INLINE void store_few(T* to, const T* from, Index n) {
  if (n & most) std::memcpy(to, from, most * sizeof(T)), to += most, from += most;
  if constexpr (most > 1) store_few<T, most / 2>(to, from, n);
}

// Channels of the cells of an array [cells, `apart`], which ends `end` elements behind `data`.
template <class T>
struct Cells {
  T* data;
  Index apart, channels, end;
};

// Copies `count` cells, from cell `first` on, to planes; up to kLanes - 1 positions behind them are
// overwritten.
template <class T>
void to_planes(const Cells<const T>& cells, Index first, Index count, float scale, float* to,
               Index plane) {
  for (Index i = 0; i < count; i += kLanes)
    for (Index c = 0; c < cells.channels; c += kLanes) {
      Vec block[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        const Index at = (first + i + j) * cells.apart + c, left = cells.end - at;
        if (i + j >= count) block[j] = Vec{};
        else if (left < kLanes) block[j] = load_part(cells.data + at, left);
        else block[j] = load(cells.data + at);
        __builtin_prefetch(cells.data + at + 2 * kLanes * cells.apart);
      }
      transpose(block);
      const Index channels = std::min<Index>(kLanes, cells.channels - c);
      float* row = to + c * plane + i;
      for (int j = 0; j < kLanes; ++j)
        if (j < channels) store(row + j * plane, scale * block[j]);
    }
}

template <class T>
void to_cells(const float* from, Index plane, const Cells<T>& cells, Index first, Index count) {
  for (Index i = 0; i < count; i += kLanes)
    for (Index c = 0; c < cells.channels; c += kLanes) {
      const Index channels = std::min<Index>(kLanes, cells.channels - c);
      Vec block[kLanes];
      for (int j = 0; j < kLanes; ++j)
        block[j] = j < channels ? load(from + (c + j) * plane + i) : Vec{};
      transpose(block);
      T* to = cells.data + (first + i) * cells.apart + c;
      for (int j = 0; j < kLanes; ++j) {
        if (i + j >= count) continue;
        if (channels == kLanes) {
          store(to + j * cells.apart, block[j]);
        } else {
          T padded[kLanes];
          store(padded, block[j]);
          store_few(to + j * cells.apart, padded, channels);
        }
      }
    }
}


// The neighbours of a cell, along one axis or in a plane. A neighbour that the window meets several
// times around a circle is listed once, and the logarithm of the number of times is added to its
// logit.
struct Window {
  Index count;
  Index* offset;
  float* log_times;

  Window(Index most, Scope& scope)
      : count(0), offset(scope.array<Index>(most)), log_times(scope.floats(most)) {}
  void add(Index o, float log) { offset[count] = o, log_times[count++] = log; }
};

// body(first, size) for each part of n, split as evenly as possible into parts of at most `most`.
template <int most, class Body>
NCA_INLINE void in_parts(Index n, Body&& body) {
  for (Index first = 0, parts = (n + most - 1) / most; parts > 0; --parts) {
    const Index size = (n - first + parts - 1) / parts;
    body(first, size);
    first += size;
  }
}

// Calls body with n, 1 <= n <= most, as a compile-time constant.
template <int most, class Body>
NCA_INLINE void with_constant(Index n, Body&& body) {
  if constexpr (most > 1)
    if (n < most) return with_constant<most - 1>(n, body);
  body(std::integral_constant<int, most>());
}

// to[k] = the sum over channels of `left` at a cell times `right` at neighbour k of that cell.
inline void dots(const Window& window, Index channels, const float* left, Index left_plane,
                 const float* right, Index right_plane, Vec* to) {
  in_parts<9>(window.count, [&](Index first, Index size) {
    with_constant<9>(size, [&](auto constant) {
      constexpr int n = constant;
      const float* at[n];
      Vec sum[n];
      for (int k = 0; k < n; ++k) at[k] = right + window.offset[first + k], sum[k] = Vec{};
      for (Index c = 0; c < channels; ++c) {
        const Vec value = load(left + c * left_plane);
        for (int k = 0; k < n; ++k) sum[k] += value * load(at[k] + c * right_plane);
      }
      for (int k = 0; k < n; ++k) to[first + k] = sum[k];
    });
  });
}

// For every channel: to = factor * the sum over neighbours k of weight[k] times `right` at k.
inline void mix(const Window& window, Index channels, const Vec* weight, const float* right,
                Index right_plane, Vec factor, float* to, Index to_plane) {
  in_parts<8>(channels, [&](Index first, Index size) {
    with_constant<8>(size, [&](auto constant) {
      constexpr int n = constant;
      Vec sum[n];
      for (int c = 0; c < n; ++c) sum[c] = Vec{};
      for (Index k = 0; k < window.count; ++k) {
        const float* at = right + window.offset[k] + first * right_plane;
        for (int c = 0; c < n; ++c) sum[c] += weight[k] * load(at + c * right_plane);
      }
      for (int c = 0; c < n; ++c) store(to + (first + c) * to_plane, factor * sum[c]);
    });
  });
}


template <class T>
struct AttentionKernel {
  struct Tile {  // a box of cells, and a range of their heads
    Index sample, first[3], size[3], first_head, heads;
  };

  struct Frame {  // the positions of a tile and its margin in a plane
    Index margin[3], size[3], used, plane;

    Frame(const Tile& tile, Index z, Index y, Index x) : margin{z, y, x}, used(1) {
      for (int axis = 0; axis < 3; ++axis)
        used *= size[axis] = tile.size[axis] + 2 * margin[axis];
      plane = round_up(used + kLanes, 16);
      if (plane % 32 == 0) plane += 16;  // planes a power of two apart would share a cache set
    }
    Index at(Index z, Index y, Index x) const {  // the tile's first cell is at 0, 0, 0
      return ((z + margin[0]) * size[1] + y + margin[1]) * size[2] + x + margin[2];
    }
  };

  const Attention& call;
  Pool& pool;
  Scope scope;
  const Padding padding;
  const float factor;  // of the logits
  Index together;      // heads in a tile: enough to fill a vector when cells become planes
  Index reach[3], tile_size[3], tile_count[3], tasks;
  const Window* axes[3];

  AttentionKernel(const Attention& a, Pool& p)
      : call(a),
        pool(p),
        padding(a.circular ? Padding::circular : Padding::zeros),
        factor(1 / std::sqrt(static_cast<float>(a.head_size))) {
    together = std::clamp<Index>(kLanes / call.head_size, 1, call.heads);
    for (int axis = 0; axis < 3; ++axis) axes[axis] = make_axis(axis);
    cut();
  }

  // The neighbours on an axis. No cell is farther away than the grid is long, and around a circle
  // none is farther away than half of that.
  const Window* make_axis(int axis) {
    const Index size = call.size[axis], radius = call.radius[axis];
    const Index after = std::min(radius, call.circular ? size / 2 : size - 1);
    const Index before = std::min(radius, call.circular ? (size - 1) / 2 : size - 1);
    Window* window = scope.array<Window>(1);
    *window = Window(before + after + 1, scope);
    for (Index o = -before; o <= after; ++o) {
      const Index times = call.circular ? (radius + o) / size + (radius - o) / size + 1 : 1;
      window->add(o, std::log(static_cast<float>(times)));
    }
    reach[axis] = after;
    return window;
  }

  // Chooses tiles whose planes stay in the L2 cache, and enough tiles for all threads. The choice
  // depends on the shape alone, so the bits are the same for any number of threads.
  void cut() {
    constexpr Index kFloats = 1 << 15;
    const Index channels = together * call.head_size;
    const Index all = call.samples * call.cells * call.heads / together;
    const Index most = std::clamp<Index>(all / 32, 256, std::max<Index>(kFloats / channels, 256));
    std::memcpy(tile_size, call.size, sizeof tile_size);
    while (tile_size[0] * tile_size[1] * tile_size[2] > most) {
      // The axis that is longest compared with its margin is halved; long rows are better.
      double length[3];
      for (int axis = 0; axis < 3; ++axis) length[axis] = tile_size[axis] / (2.0 * reach[axis] + 1);
      length[2] /= 4;
      int longest = 0;
      for (int axis = 0; axis < 3; ++axis)
        if (tile_size[axis] > 1 && (tile_size[longest] == 1 || length[axis] > length[longest]))
          longest = axis;
      tile_size[longest] = (tile_size[longest] + 1) / 2;
    }
    tasks = call.samples * ((call.heads + together - 1) / together);
    for (int axis = 0; axis < 3; ++axis)
      tasks *= tile_count[axis] = (call.size[axis] + tile_size[axis] - 1) / tile_size[axis];
  }

  template <class Body>
  void for_tiles(Body&& body) {
    parallel_for(pool, tasks, [&](Index task) {
      const auto next = [&](Index count) {
        const Index digit = task % count;
        task /= count;
        return digit;
      };
      Tile tile;
      tile.first_head = next((call.heads + together - 1) / together) * together;
      tile.heads = std::min(together, call.heads - tile.first_head);
      for (int axis = 2; axis >= 0; --axis) {
        tile.first[axis] = next(tile_count[axis]) * tile_size[axis];
        tile.size[axis] = std::min(tile_size[axis], call.size[axis] - tile.first[axis]);
      }
      tile.sample = task;
      body(tile);
    });
  }

  // A frame with a margin for the window, and a frame of the tile's cells alone, whose rows have
  // the same distance, so that a single loop runs through both.
  Frame frame_around(const Tile& tile) const { return Frame(tile, reach[0], reach[1], reach[2]); }
  Frame frame_of(const Tile& tile) const { return Frame(tile, 0, 0, reach[2]); }

  Window window_in(const Frame& frame, Scope& local) const {
    Window window(axes[0]->count * axes[1]->count * axes[2]->count, local);
    for (Index z = 0; z < axes[0]->count; ++z)
      for (Index y = 0; y < axes[1]->count; ++y)
        for (Index x = 0; x < axes[2]->count; ++x)
          window.add((axes[0]->offset[z] * frame.size[1] + axes[1]->offset[y]) * frame.size[2] +
                         axes[2]->offset[x],
                     axes[0]->log_times[z] + axes[1]->log_times[y] + axes[2]->log_times[x]);
    return window;
  }

  // The tile's heads in an array [samples, cells, heads, each].
  template <class U>
  Cells<U> heads_of(const Tile& tile, U* array, Index each) const {
    const Index skipped = (tile.sample * call.cells * call.heads + tile.first_head) * each;
    return {array + skipped, call.heads * each, tile.heads * each,
            call.samples * call.cells * call.heads * each - skipped};
  }
  Cells<const T> vectors_of(const Tile& tile, const void* array) const {
    return heads_of(tile, static_cast<const T*>(array), call.head_size);
  }

  // Planes of the cells of a frame; 0 outside the grid.
  template <class U>
  float* planes(const Tile& tile, const Frame& frame, const Cells<const U>& cells, Scope& local,
                float scale = 1) const {
    float* all = local.floats(cells.channels * frame.plane);
    const Index width = call.size[2], before = tile.first[2] - frame.margin[2];
    const Index begin = std::max<Index>(0, -before), end = std::min(frame.size[2], width - before);
    for_rows(tile, frame, [&](Index z, Index y, Index at) {
      float* row = all + at;
      if (z < 0 || y < 0) {
        for (Index c = 0; c < cells.channels; ++c)
          std::memset(row + c * frame.plane, 0, frame.size[2] * sizeof(float));
        return;
      }
      const Index first = (z * call.size[1] + y) * width;
      to_planes(cells, first + before + begin, end - begin, scale, row + begin, frame.plane);
      for (Index p = 0; p < frame.size[2]; ++p) {
        if (p == begin) p = end;
        if (p >= frame.size[2]) break;
        const Index x = at_border(before + p, width, padding);
        for (Index c = 0; c < cells.channels; ++c)
          row[c * frame.plane + p] =
              x < 0 ? 0 : scale * value(cells.data + (first + x) * cells.apart + c);
      }
    });
    for (Index c = 0; c < cells.channels; ++c)
      std::memset(all + c * frame.plane + frame.used, 0,
                  (frame.plane - frame.used) * sizeof(float));
    return all;
  }

  // What is added to the logit of each neighbour: minus infinity outside the grid, else 0.
  float* outside_of(const Tile& tile, const Frame& frame, Scope& local) const {
    float* plane = local.floats(frame.plane);
    for (Index p = 0; p < frame.plane; ++p) plane[p] = call.circular ? 0 : -INFINITY;
    const Index before = tile.first[2] - frame.margin[2];
    const Index begin = std::max<Index>(0, -before);
    const Index end = std::min(frame.size[2], call.size[2] - before);
    for_rows(tile, frame, [&](Index z, Index y, Index at) {
      if (z >= 0 && y >= 0) std::memset(plane + at + begin, 0, (end - begin) * sizeof(float));
    });
    return plane;
  }

  // body(z, y, position of the row's begin) for every row of a frame; z or y is -1 outside the
  // grid.
  template <class Body>
  void for_rows(const Tile& tile, const Frame& frame, Body&& body) const {
    for (Index z = 0; z < frame.size[0]; ++z)
      for (Index y = 0; y < frame.size[1]; ++y)
        body(at_border(tile.first[0] - frame.margin[0] + z, call.size[0], padding),
             at_border(tile.first[1] - frame.margin[1] + y, call.size[1], padding),
             (z * frame.size[1] + y) * frame.size[2]);
  }

  // Writes the planes of a tile's cells, without margins in z and y, to an array.
  template <class U>
  void store_planes(const Tile& tile, const Frame& inner, const float* all,
                    const Cells<U>& cells) const {
    for_rows(tile, inner, [&](Index z, Index y, Index at) {
      const Index first = (z * call.size[1] + y) * call.size[2] + tile.first[2];
      to_cells(all + at + inner.margin[2], inner.plane, cells, first, tile.size[2]);
    });
  }

  // body(head, position in the frame of the tile's cells, position in the frame around them) for
  // every vector. All rows with the same z are a single line of vectors.
  template <class Body>
  void for_vectors(const Tile& tile, const Frame& inner, const Frame& around, Body&& body) const {
    const Index line = inner.at(0, tile.size[1] - 1, tile.size[2]) - inner.at(0, 0, 0);
    for (Index head = 0; head < tile.heads; ++head)
      for (Index z = 0; z < tile.size[0]; ++z)
        for (Index i = 0; i < line; i += kLanes)
          body(head, inner.at(z, 0, 0) + i, around.at(z, 0, 0) + i);
  }


  void forward() {
    for_tiles([&](const Tile& tile) { forward_tile(tile); });
  }

  void forward_tile(const Tile& tile) const {
    Scope local;
    const Frame inner = frame_of(tile), around = frame_around(tile);
    const Window window = window_in(around, local);
    const Index size = call.head_size;
    const float* query = planes(tile, inner, vectors_of(tile, call.query), local, factor);
    const float* key = planes(tile, around, vectors_of(tile, call.key), local);
    const float* value = planes(tile, around, vectors_of(tile, call.value), local);
    const float* outside = outside_of(tile, around, local);
    float* out = local.floats(tile.heads * size * inner.plane);
    float* log_sum_exp = local.floats(tile.heads * inner.plane);
    Vec* weight = local.array<Vec>(window.count);

    for_vectors(tile, inner, around, [&](Index head, Index at, Index there) {
      const Index mine = head * size * inner.plane + at, near = head * size * around.plane + there;
      dots(window, size, query + mine, inner.plane, key + near, around.plane, weight);
      Vec highest = splat(-INFINITY), total = Vec{};
      for (Index k = 0; k < window.count; ++k) {
        weight[k] += window.log_times[k] + load(outside + there + window.offset[k]);
        highest = select(weight[k] > highest, weight[k], highest);
      }
      for (Index k = 0; k < window.count; ++k) total += weight[k] = exp(weight[k] - highest);
      mix(window, size, weight, value + near, around.plane, 1.0f / total, out + mine, inner.plane);
      store(log_sum_exp + head * inner.plane + at, highest + log(total));
    });
    store_planes(tile, inner, out, heads_of(tile, static_cast<T*>(call.out), size));
    store_planes(tile, inner, log_sum_exp, heads_of(tile, call.log_sum_exp, 1));
  }


  // delta [samples, cells, heads]: the sum over a cell's neighbours of the weight times its
  // gradient, which is `worth` below.
  void backward() {
    float* delta = nullptr;  // the gradient of the values does not need it
    if (call.d_query != nullptr || call.d_key != nullptr) {
      delta = scope.floats(call.samples * call.cells * call.heads);
      for_tiles([&](const Tile& tile) { backward_queries(tile, delta); });
    }
    if (call.d_key != nullptr || call.d_value != nullptr)
      for_tiles([&](const Tile& tile) { backward_keys(tile, delta); });
  }

  // The gradients of queries: sums around each cell that attends.
  void backward_queries(const Tile& tile, float* all_delta) const {
    Scope local;
    const Frame inner = frame_of(tile), around = frame_around(tile);
    const Window window = window_in(around, local);
    const Index size = call.head_size;
    const float* query = planes(tile, inner, vectors_of(tile, call.query), local, factor);
    const float* cotangent = planes(tile, inner, vectors_of(tile, call.cotangent), local);
    const float* log_sum_exp =
        planes(tile, inner, heads_of<const float>(tile, call.log_sum_exp, 1), local);
    const float* key = planes(tile, around, vectors_of(tile, call.key), local);
    const float* value = planes(tile, around, vectors_of(tile, call.value), local);
    const float* outside = outside_of(tile, around, local);
    float* delta = local.floats(tile.heads * inner.plane);
    float* d_query = call.d_query ? local.floats(tile.heads * size * inner.plane) : nullptr;
    Vec *weight = local.array<Vec>(window.count), *worth = local.array<Vec>(window.count);

    for_vectors(tile, inner, around, [&](Index head, Index at, Index there) {
      const Index mine = head * size * inner.plane + at, near = head * size * around.plane + there;
      dots(window, size, query + mine, inner.plane, key + near, around.plane, weight);
      dots(window, size, cotangent + mine, inner.plane, value + near, around.plane, worth);
      const Vec lse = load(log_sum_exp + head * inner.plane + at);
      Vec sum = Vec{};
      for (Index k = 0; k < window.count; ++k) {
        const Vec extra = window.log_times[k] + load(outside + there + window.offset[k]);
        weight[k] = exp(weight[k] + extra - lse);
        sum += weight[k] * worth[k];
      }
      store(delta + head * inner.plane + at, sum);
      if (d_query == nullptr) return;
      for (Index k = 0; k < window.count; ++k) weight[k] *= worth[k] - sum;
      mix(window, size, weight, key + near, around.plane, splat(factor), d_query + mine,
          inner.plane);
    });
    store_planes(tile, inner, delta, heads_of(tile, all_delta, 1));
    if (d_query != nullptr)
      store_planes(tile, inner, d_query, heads_of(tile, static_cast<T*>(call.d_query), size));
  }

  // The gradients of keys and values: sums around each cell that is attended to. Outside the grid
  // everything that is read is 0, and so is what it adds.
  void backward_keys(const Tile& tile, const float* all_delta) const {
    Scope local;
    const Frame inner = frame_of(tile), around = frame_around(tile);
    const Window window = window_in(around, local);
    const Index size = call.head_size;
    const auto scalars_of = [&](const float* array) {
      return planes(tile, around, heads_of(tile, array, 1), local);
    };
    const float* key = planes(tile, inner, vectors_of(tile, call.key), local);
    const float* query = planes(tile, around, vectors_of(tile, call.query), local, factor);
    const float* cotangent = planes(tile, around, vectors_of(tile, call.cotangent), local);
    const float* log_sum_exp = scalars_of(call.log_sum_exp);
    const float *value = nullptr, *delta = nullptr;
    float *d_key = nullptr, *d_value = nullptr;
    if (call.d_key != nullptr) {
      value = planes(tile, inner, vectors_of(tile, call.value), local);
      delta = scalars_of(all_delta);
      d_key = local.floats(tile.heads * size * inner.plane);
    }
    if (call.d_value != nullptr) d_value = local.floats(tile.heads * size * inner.plane);
    Vec *weight = local.array<Vec>(window.count), *worth = local.array<Vec>(window.count);

    for_vectors(tile, inner, around, [&](Index head, Index at, Index there) {
      const Index mine = head * size * inner.plane + at, near = head * size * around.plane + there;
      const Index scalar = head * around.plane + there;
      dots(window, size, key + mine, inner.plane, query + near, around.plane, weight);
      for (Index k = 0; k < window.count; ++k) {
        const Vec lse = load(log_sum_exp + scalar + window.offset[k]);
        weight[k] = exp(weight[k] + window.log_times[k] - lse);
      }
      if (d_value != nullptr)
        mix(window, size, weight, cotangent + near, around.plane, splat(1), d_value + mine,
            inner.plane);
      if (d_key == nullptr) return;
      dots(window, size, value + mine, inner.plane, cotangent + near, around.plane, worth);
      for (Index k = 0; k < window.count; ++k)
        weight[k] *= worth[k] - load(delta + scalar + window.offset[k]);
      mix(window, size, weight, query + near, around.plane, splat(1), d_key + mine, inner.plane);
    });
    if (d_key != nullptr)
      store_planes(tile, inner, d_key, heads_of(tile, static_cast<T*>(call.d_key), size));
    if (d_value != nullptr)
      store_planes(tile, inner, d_value, heads_of(tile, static_cast<T*>(call.d_value), size));
  }
};

inline void attention_forward(const Attention& call, Pool& pool) {
  if (call.bfloat16) AttentionKernel<bfloat16>(call, pool).forward();
  else AttentionKernel<float>(call, pool).forward();
}

inline void attention_backward(const Attention& call, Pool& pool) {
  if (call.bfloat16) AttentionKernel<bfloat16>(call, pool).backward();
  else AttentionKernel<float>(call, pool).backward();
}

}  // namespace nca::NCA_ISA
