// step and update: forward and backward, tile by tile.
#pragma once

#include "network.hpp"

namespace nca::NCA_ISA {

template <class T>
struct StepKernel {
  const Step& step;
  Pool& pool;
  Scope scope;
  const Tiles tiles;
  const Box box;
  const Network network;
  Weights* weights;
  Index weights_stride;  // 1: each group has weights of its own; 0: all groups share them

  StepKernel(const Step& s, Pool& p, bool backward)
      : step(s), pool(p), tiles(s), box(s, tiles), network(s, box, scope, backward) {
    weights_stride = step.taps.stride > 0 || step.perception_bias.stride > 0;
    for (const Layer& layer : step.layers)
      weights_stride |= layer.weight.stride > 0 || layer.bias.stride > 0;
    const Index sets = weights_stride ? step.groups : 1;
    weights = scope.array<Weights>(sets);
    for (Index g = 0; g < sets; ++g) weights[g] = network.pack(g, scope);
  }

  Index samples() const { return step.groups * step.batch; }
  Index channels() const { return step.channels; }
  Index width() const { return step.size[2]; }
  const Weights& weights_of(Index sample) const {
    return weights[sample / step.batch * weights_stride];
  }
  // A sample [cells, C] of an array of states.
  const T* sample_of(const void* states, Index sample) const {
    return static_cast<const T*>(states) + sample * step.cells * step.channels;
  }
  T* sample_of(void* states, Index sample) const {
    return static_cast<T*>(states) + sample * step.cells * step.channels;
  }

  // Runs body(tile) for every tile of every sample, in parallel. Light work is handed out many
  // cells at a time: pooling a thousand bytes takes less time than waking up a thread.
  template <class Body>
  void for_tiles(Body&& body, bool light = false) {
    const Index all = samples() * tiles.of_sample, cells = tiles.size[0] * tiles.size[1] * width();
    const Index at_once = light ? (kLightCells + cells - 1) / cells : 1;
    parallel_for(pool, (all + at_once - 1) / at_once, [&](Index task) {
      for (Index i = task * at_once; i < std::min(all, (task + 1) * at_once); ++i)
        body(Tile(step, tiles, i / tiles.of_sample, i % tiles.of_sample));
    });
  }
  static constexpr Index kLightCells = 4096;

  // Runs body(z, y, first cell of the row in the sample) for every row of a tile.
  template <class Body>
  void for_rows(const Tile& tile, Body&& body) const {
    for (Index z = 0; z < tile.size[0]; ++z)
      for (Index y = 0; y < tile.size[1]; ++y) body(z, y, tile.row(step, z, y));
  }

  // Runs body(rows) for the rows of a block at a time.
  template <class Body>
  void for_blocks(const Rows& rows, Body&& body) const {
    for (Index first = 0; first < rows.count; first += kBlock)
      body(Rows{std::min(kBlock, rows.count - first), rows.box_at + first, rows.cell + first});
  }


  void forward() {
    const Index all = samples() * step.cells;
    // Whether the value of each cell alone exceeds the threshold, [samples, cells].
    std::uint8_t *lives = nullptr, *lives_after = nullptr;
    if (step.alive) {
      lives = scope.array<std::uint8_t>(all + kFlags);
      lives_after = scope.array<std::uint8_t>(all + kFlags);
      for_tiles([&](const Tile& tile) { find_living(tile, lives); }, true);
    }
    for_tiles([&](const Tile& tile) { forward_tile(tile, lives, lives_after); });
    if (step.alive) for_tiles([&](const Tile& tile) { clear_dead(tile, lives_after); }, true);
  }

  bool lives(const T* cell) const {
    return value(cell + step.alive_channel) > step.alive_threshold;
  }

  void find_living(const Tile& tile, std::uint8_t* plane) const {
    const T* state = sample_of(step.state, tile.sample);
    plane += tile.sample * step.cells;
    for_rows(tile, [&](Index, Index, Index cell) {
      for (Index x = 0; x < width(); ++x) plane[cell + x] = lives(state + (cell + x) * channels());
    });
  }

  // Writes to alive_mask which cells are alive before the step, and to `needed` the cells whose
  // update matters. Those are the cells that fire and have a living cell around them: the update of
  // a dead cell can keep a living neighbour alive.
  void mark_needed(const Tile& tile, const std::uint8_t* plane, std::uint8_t* needed) const {
    Scope local;
    const FlagPool flags(step, local);
    const Index w = width(), reach_z = flags.reach[0], reach_y = flags.reach[1];
    const Index depth = tile.size[0] + 2 * reach_z, height = tile.size[1] + 2 * reach_y;
    std::uint8_t* fires = local.array<std::uint8_t>(w + kLanes);
    std::uint8_t* alive = nullptr;  // [depth, height, x]: the rows of the tile between two margins
    const auto row = [&](Index z, Index y) { return alive + (z * height + y) * w; };
    if (step.alive) {
      alive = local.array<std::uint8_t>(depth * height * w + kFlags);
      plane += tile.sample * step.cells;
      for (Index z = 0; z < depth; ++z)
        for (Index y = 0; y < height; ++y) {
          const Index zz = at_border(tile.first[0] + z - reach_z, step.size[0], step.padding);
          const Index yy = at_border(tile.first[1] + y - reach_y, step.size[1], step.padding);
          if (zz < 0 || yy < 0) std::memset(row(z, y), 0, w);
          else flags.pool_plane(plane, zz, yy, row(z, y));
        }
    }
    for_rows(tile, [&](Index z, Index y, Index cell) {
      std::uint8_t* to = needed + (z * tile.size[1] + y) * w;
      if (!step.alive) {
        fire_row(step, tile.sample, cell, w, fires);
        std::memcpy(to, fires, w);
        return;
      }
      const Index near_z = z + reach_z, near_y = y + reach_y;
      std::memcpy(step.alive_mask + tile.sample * step.cells + cell, row(near_z, near_y), w);
      flags.pool_row(to, [&](Index dz, Index dy) -> const std::uint8_t* {
        return row(near_z + dz, near_y + dy);
      });
      if (!any(to, w)) return;
      fire_row(step, tile.sample, cell, w, fires);
      for (Index x = 0; x < w; ++x) to[x] &= fires[x];
    });
  }

  // The flagged cells of a tile as rows.
  Rows compact(const Tile& tile, const std::uint8_t* flags, Scope& local) const {
    const Index most = tile.cells(step) + 1;
    Index *box_at = local.array<Index>(most), *cells = local.array<Index>(most), count = 0;
    for_rows(tile, [&](Index z, Index y, Index cell) {
      const std::uint8_t* row = flags + (z * tile.size[1] + y) * width();
      if (!any(row, width())) return;
      const Index corner = box.at(z, y, 0);
      for (Index x = 0; x < width(); ++x) {  // without a branch: half of the cells fire
        box_at[count] = corner + x * box.padded;
        cells[count] = cell + x;
        count += row[x];
      }
    });
    return {count, box_at, cells};
  }

  void forward_tile(const Tile& tile, const std::uint8_t* lives_before,
                    std::uint8_t* lives_after) const {
    Scope local;
    std::uint8_t* needed = local.array<std::uint8_t>(tile.cells(step) + kFlags);
    mark_needed(tile, lives_before, needed);
    const Rows rows = compact(tile, needed, local);
    write_unfired(tile, lives_before, lives_after);
    if (rows.count == 0) return;
    float* window = local.floats(box.floats());
    if (step.perception != Perception::precomputed)
      fill_box(step, tile, box, sample_of(step.state, tile.sample), window);
    Block block(network, local);
    for_blocks(rows, [&](const Rows& part) {
      const float* update = block.forward(weights_of(tile.sample), part, tile.sample, window);
      add_update(part, tile.sample, update, block.update_stride, lives_after);
    });
  }

  // Writes the new state as if no cell fired.
  void write_unfired(const Tile& tile, const std::uint8_t* before, std::uint8_t* after) const {
    const T* state = sample_of(step.state, tile.sample);
    T* to = sample_of(step.new_state, tile.sample);
    for_rows(tile, [&](Index, Index, Index cell) {
      const Index first = tile.sample * step.cells + cell;
      const std::uint8_t* alive = step.alive ? step.alive_mask + first : nullptr;
      T* row = to + cell * channels();
      if (alive != nullptr) std::memcpy(after + first, before + first, width());
      if (alive != nullptr && !any(alive, width())) {
        std::memset(row, 0, width() * channels() * sizeof(T));
        return;
      }
      copy(state + cell * channels(), row, width() * channels());
      for (Index x = 0; alive != nullptr && x < width(); ++x)
        if (!alive[x]) std::memset(row + x * channels(), 0, channels() * sizeof(T));
    });
  }

  void add_update(const Rows& rows, Index sample, const float* update, Index stride,
                  std::uint8_t* lives_after) const {
    const T* state = sample_of(step.state, sample);
    T* new_state = sample_of(step.new_state, sample);
    for (Index r = 0; r < rows.count; ++r) {
      const Index cell = rows.cell[r];
      T* to = new_state + cell * channels();
      for_channels(channels(), state + cell * channels(), [&](Index c, Vec old) {
        store_channels(to, c, channels(), old + step.step_size * load(update + r * stride + c));
      });
      if (!step.alive) continue;
      lives_after[sample * step.cells + cell] = lives(to);
      if (!step.alive_mask[sample * step.cells + cell])  // it mattered only to its neighbours
        std::memset(to, 0, channels() * sizeof(T));
    }
  }

  void clear_dead(const Tile& tile, const std::uint8_t* lives_after) const {
    Scope local;
    const FlagPool flags(step, local);
    std::uint8_t* alive = local.array<std::uint8_t>(width() + kFlags);
    const std::uint8_t* plane = lives_after + tile.sample * step.cells;
    for_rows(tile, [&](Index z, Index y, Index cell) {
      std::uint8_t* mask = step.alive_mask + tile.sample * step.cells + cell;
      if (!any(mask, width())) return;
      flags.pool_plane(plane, tile.first[0] + z, tile.first[1] + y, alive);
      T* row = sample_of(step.new_state, tile.sample) + cell * channels();
      for (Index x = 0; x < width(); ++x) {
        if (mask[x] && !alive[x]) std::memset(row + x * channels(), 0, channels() * sizeof(T));
        mask[x] &= alive[x];
      }
    });
  }


  // Partial gradients of weights. Each is the sum over the same tiles for any number of threads,
  // and they are added up in a fixed order.
  struct Partials {
    Index count;       // of partial gradients in a group
    float* sums;       // [groups, count, gradient_floats]
    std::uint8_t* used;
  };

  // What each tile adds to the gradients of cells in other tiles or across a border: the rows of
  // its box outside the tile, folded along x. [tiles, margin rows, x, padded]
  struct Margins {
    Index rows;
    float* sums;
    std::uint8_t* used;  // by tile
  };

  Index tiles_of_group() const { return step.batch * tiles.of_sample; }

  void backward() {
    const Index all_tiles = samples() * tiles.of_sample;
    Partials partials = make_partials();
    Margins margins = {(step.kernel[0] - 1) * box.size[1] + tiles.size[0] * (step.kernel[1] - 1),
                       nullptr, scope.array<std::uint8_t>(all_tiles)};
    std::memset(margins.used, 0, all_tiles);
    if (step.d_state != nullptr)
      margins.sums = scope.floats(all_tiles * margins.rows * width() * box.padded);
    // bfloat16 gradients are added up in float32.
    float* d_state = static_cast<float*>(step.d_state);
    if (step.d_state != nullptr && step.bfloat16)
      d_state = scope.floats(samples() * step.cells * channels());
    const bool per_sample = step.d_input != nullptr && !step.inputs_per_cell;
    float* d_inputs = per_sample ? scope.floats(all_tiles * step.inputs) : nullptr;

    parallel_for(pool, step.groups * partials.count, [&](Index task) {
      const Index group = task / partials.count, first = task % partials.count;
      float* sums = partials.sums + task * network.gradient_floats;
      for (Index i = first; i < tiles_of_group(); i += partials.count) {
        const Index sample = group * step.batch + i / tiles.of_sample;
        const Index tile = sample * tiles.of_sample + i % tiles.of_sample;
        backward_tile(Tile(step, tiles, sample, i % tiles.of_sample), sums, partials.used[task],
                      d_state, margins, tile, d_inputs ? d_inputs + tile * step.inputs : nullptr);
      }
    });
    if (step.d_state != nullptr) add_margins(margins, d_state);
    if (network.gradient_floats > 0) add_partials(partials);
    for (Index sample = 0; per_sample && sample < samples(); ++sample)
      for (Index i = 0; i < step.inputs; ++i) {
        float sum = 0;
        for (Index tile = 0; tile < tiles.of_sample; ++tile)
          sum += d_inputs[(sample * tiles.of_sample + tile) * step.inputs + i];
        step.d_input[sample * step.inputs + i] = sum;
      }
  }

  Partials make_partials() {
    constexpr Index kMost = 32, kFloats = Index{1} << 26;
    Index count = tiles_of_group();
    if (network.gradient_floats > 0) {
      const Index fitting = kFloats / (step.groups * network.gradient_floats);
      count = std::min(count, std::max<Index>(std::min(kMost / step.groups, fitting), 1));
    }
    Partials partials = {count, scope.floats(step.groups * count * network.gradient_floats),
                         scope.array<std::uint8_t>(step.groups * count)};
    std::memset(partials.used, 0, step.groups * count);
    return partials;
  }

  // Marks the cells that fired and stay alive: no others contribute to the gradients of weights.
  void mark_active(const Tile& tile, std::uint8_t* active) const {
    for_rows(tile, [&](Index z, Index y, Index cell) {
      Scope local;
      std::uint8_t* fires = local.array<std::uint8_t>(width() + kLanes);
      std::uint8_t* to = active + (z * tile.size[1] + y) * width();
      const std::uint8_t* alive = step.alive_mask + tile.sample * step.cells + cell;
      if (step.alive && !any(alive, width())) {
        std::memset(to, 0, width());
        return;
      }
      fire_row(step, tile.sample, cell, width(), fires);
      for (Index x = 0; x < width(); ++x) to[x] = step.alive ? fires[x] & alive[x] : fires[x];
    });
  }

  void backward_tile(const Tile& tile, float* sums, std::uint8_t& used, float* d_state,
                     const Margins& margins, Index index, float* d_inputs) const {
    Scope local;
    std::uint8_t* active = local.array<std::uint8_t>(tile.cells(step));
    mark_active(tile, active);
    const Rows rows = compact(tile, active, local);
    clear_gradients(tile, d_inputs);
    if (rows.count == 0) {
      if (d_state != nullptr) finish_rows(tile, d_state, nullptr);
      return;
    }
    if (!used) std::memset(sums, 0, network.gradient_floats * sizeof(float));
    used = 1;
    float *window = nullptr, *d_window = nullptr;
    if (step.perception != Perception::precomputed) {
      window = local.floats(box.floats());
      fill_box(step, tile, box, sample_of(step.state, tile.sample), window);
      if (d_state != nullptr) {
        d_window = local.floats(box.floats());
        std::memset(d_window, 0, box.floats() * sizeof(float));
      }
    }
    Block block(network, local);
    const T* cotangent = sample_of(step.cotangent, tile.sample);
    for_blocks(rows, [&](const Rows& part) {
      block.forward(weights_of(tile.sample), part, tile.sample, window);
      for (Index r = 0; r < part.count; ++r)
        for_channels(channels(), cotangent + part.cell[r] * channels(), [&](Index c, Vec d) {
          store(block.d_update + r * block.update_stride + c, step.step_size * d);
        });
      block.backward(weights_of(tile.sample), part, tile.sample, window, block.d_update, d_window,
                     sums, d_inputs);
    });
    if (d_state == nullptr) return;
    finish_rows(tile, d_state, d_window);
    if (d_window != nullptr && margins.rows > 0) {
      copy_margins(tile, d_window, margins.sums + index * margins.rows * width() * box.padded);
      margins.used[index] = 1;
    }
  }

  void clear_gradients(const Tile& tile, float* d_inputs) const {
    if (d_inputs != nullptr) std::memset(d_inputs, 0, step.inputs * sizeof(float));
    for_rows(tile, [&](Index, Index, Index row) {
      const Index cell = tile.sample * step.cells + row;
      const auto clear = [&](float* all, Index size) {
        std::memset(all + cell * size, 0, width() * size * sizeof(float));
      };
      if (step.d_precomputed != nullptr) clear(step.d_precomputed, step.perceived);
      if (step.d_input != nullptr && step.inputs_per_cell) clear(step.d_input, step.inputs);
    });
  }

  // Writes the gradient of the state: the cotangent where the cell stays alive, plus the gradient
  // in the box.
  void finish_rows(const Tile& tile, float* d_state, float* d_window) const {
    const T* cotangent = static_cast<const T*>(step.cotangent);
    for_rows(tile, [&](Index z, Index y, Index row) {
      const Index cell = tile.sample * step.cells + row;
      float* d_row = nullptr;
      if (d_window != nullptr) {
        float* box_row = d_window + box.at(z + step.before[0], y + step.before[1], 0);
        fold_row(step, box, box_row);
        d_row = box_row + box.at(0, 0, step.before[2]);
      } else if (step.alive && !any(step.alive_mask + cell, width())) {
        std::memset(d_state + cell * channels(), 0, width() * channels() * sizeof(float));
        return;
      }
      for (Index x = 0; x < width(); ++x) {
        float* to = d_state + (cell + x) * channels();
        const bool alive = !step.alive || step.alive_mask[cell + x];
        for_channels(channels(), cotangent + (cell + x) * channels(), [&](Index c, Vec d) {
          if (!alive) d = Vec{};
          if (d_row != nullptr) d += load(d_row + x * box.padded + c);
          store_channels(to, c, channels(), d);
        });
      }
    });
  }

  // Copies the rows of a box that lie outside the tile, in the order of margin_row.
  void copy_margins(const Tile& tile, float* d_window, float* to) const {
    const Index floats = width() * box.padded;
    for (Index z = 0; z < tile.size[0] + step.kernel[0] - 1; ++z)
      for (Index y = 0; y < tile.size[1] + step.kernel[1] - 1; ++y) {
        const Index at = margin_row(tile.size, z, y);
        if (at < 0) continue;
        float* row = d_window + box.at(z, y, 0);
        fold_row(step, box, row);
        copy(row + box.at(0, 0, step.before[2]), to + at * floats, floats);
      }
  }

  // The number of the margin row at (z, y) of the box of a tile; -1 for a row of the tile itself.
  Index margin_row(const Index* size, Index z, Index y) const {
    const Index tile_z = z - step.before[0], tile_y = y - step.before[1];
    if (tile_z < 0 || tile_z >= size[0]) return (tile_z < 0 ? z : z - size[0]) * box.size[1] + y;
    if (tile_y >= 0 && tile_y < size[1]) return -1;
    return (step.kernel[0] - 1) * box.size[1] + tile_z * (step.kernel[1] - 1) +
           (tile_y < 0 ? y : y - size[1]);
  }

  // A position along one axis of a tile's box.
  struct BoxPosition {
    Index tile, at;
    const BoxPosition* next;  // the next one that stands for the same cells
  };

  // For every index along an axis, the positions in the margins of tiles that stand for it.
  const BoxPosition** margin_positions(int axis) {
    const Index size = step.size[axis], reach = step.kernel[axis] - 1;
    const BoxPosition** heads = scope.array<const BoxPosition*>(size);
    std::fill(heads, heads + size, nullptr);
    BoxPosition* position = scope.array<BoxPosition>(tiles.count[axis] * reach);
    for (Index tile = tiles.count[axis] - 1; tile >= 0; --tile) {
      const Index first = tile * tiles.size[axis];
      const Index tile_size = std::min(tiles.size[axis], size - first);
      for (Index at = tile_size + reach - 1; at >= 0; --at) {
        const Index offset = at - step.before[axis];
        if (offset >= 0 && offset < tile_size) continue;
        const Index cell = at_border(first + offset, size, step.padding);
        if (cell < 0) continue;
        *position = {tile, at, heads[cell]};
        heads[cell] = position++;
      }
    }
    return heads;
  }

  // Adds to each row what other tiles have in their margins for it, in a fixed order, and rounds
  // the sums to bfloat16 at the end.
  void add_margins(const Margins& margins, float* d_state) {
    const BoxPosition **along_z = margin_positions(0), **along_y = margin_positions(1);
    for_tiles([&](const Tile& tile) {
      for_rows(tile, [&](Index z, Index y, Index row) {
        float* to = d_state + (tile.sample * step.cells + row) * channels();
        const Index grid_z = tile.first[0] + z, grid_y = tile.first[1] + y;
        const BoxPosition self_z = {grid_z / tiles.size[0], z + step.before[0], along_z[grid_z]};
        const BoxPosition self_y = {grid_y / tiles.size[1], y + step.before[1], along_y[grid_y]};
        for (const BoxPosition* at_z = &self_z; at_z != nullptr; at_z = at_z->next) {
          // The row itself is in no margin: its gradient is in d_state already.
          const BoxPosition* at_y = at_z == &self_z ? self_y.next : &self_y;
          for (; at_y != nullptr; at_y = at_y->next)
            add_margin(margins, tile.sample, *at_z, *at_y, to);
        }
        if (step.bfloat16)
          for_channels(width() * channels(), to, [&](Index i, Vec d) {
            T* out = static_cast<T*>(step.d_state) + (to - d_state);
            store_channels(out, i, width() * channels(), d);
          });
      });
    }, true);
  }

  void add_margin(const Margins& margins, Index sample, const BoxPosition& z, const BoxPosition& y,
                  float* to) const {
    const Index index = z.tile * tiles.count[1] + y.tile;
    const Index tile = sample * tiles.of_sample + index;
    if (!margins.used[tile]) return;
    const Index at = margin_row(Tile(step, tiles, sample, index).size, z.at, y.at);
    const float* from = margins.sums + (tile * margins.rows + at) * width() * box.padded;
    for (Index x = 0; x < width(); ++x)
      for_channels(channels(), to + x * channels(), [&](Index c, Vec sum) {
        store_channels(to + x * channels(), c, channels(), sum + load(from + x * box.padded + c));
      });
  }

  void add_partials(const Partials& partials) {
    constexpr Index kFloats = 4096;
    const Index size = network.gradient_floats, blocks = (size + kFloats - 1) / kFloats;
    float* totals = scope.floats(step.groups * size);
    parallel_for(pool, step.groups * blocks, [&](Index task) {
      const Index group = task / blocks, first = task % blocks * kFloats;
      const Index count = std::min(kFloats, size - first);
      float* total = totals + group * size + first;
      std::memset(total, 0, count * sizeof(float));
      for (Index i = 0; i < partials.count; ++i) {
        if (!partials.used[group * partials.count + i]) continue;
        const float* from = partials.sums + (group * partials.count + i) * size + first;
        for (Index j = 0; j < count; j += kLanes)  // sizes are multiples of kLanes
          store(total + j, load(total + j) + load(from + j));
      }
    });
    for (Index group = 0; group < step.groups; ++group)
      network.unpack(totals + group * size, group);
  }
};

inline void step_forward(const Step& step, Pool& pool) {
  if (step.bfloat16) StepKernel<bfloat16>(step, pool, false).forward();
  else StepKernel<float>(step, pool, false).forward();
}

inline void step_backward(const Step& step, Pool& pool) {
  if (step.bfloat16) StepKernel<bfloat16>(step, pool, true).backward();
  else StepKernel<float>(step, pool, true).backward();
}

}  // namespace nca::NCA_ISA
