// Borders, tiles of cells, and rows of flags.
//
// A tile is a block of whole rows along x. Its state is copied into a box with a margin for the
// taps, in float32 with padded channels: what reads a box need not know about borders, dtypes and
// odd numbers of channels.
#pragma once

#include <algorithm>

#include "parallel.hpp"
#include "vector.hpp"

namespace nca::NCA_ISA {

// Which cell lies at position p of an axis; -1 for none.
NCA_INLINE Index at_border(Index p, Index size, Padding padding) {
  if (p >= 0 && p < size) return p;
  switch (padding) {
    case Padding::circular:
      return (p % size + size) % size;
    case Padding::replicate:
      return p < 0 ? 0 : size - 1;
    case Padding::reflect: {
      const Index period = std::max<Index>(2 * (size - 1), 1);
      const Index there = (p % period + period) % period, back = (-p % period + period) % period;
      return std::min(there, back);
    }
    case Padding::zeros:
      break;
  }
  return -1;
}

// The first cell, in its sample, of the row at (z, y); -1 for none.
NCA_INLINE Index row_at_border(const Step& step, Index z, Index y) {
  const Index near_z = at_border(z, step.size[0], step.padding);
  const Index near_y = at_border(y, step.size[1], step.padding);
  return near_z < 0 || near_y < 0 ? -1 : (near_z * step.size[1] + near_y) * step.size[2];
}

struct Tiles {
  Index size[2] = {1, 1}, count[2], of_sample;  // z, y; cells along x are never split

  // Tiles have few enough cells for a box to stay in the L2 cache and for every thread to get
  // tiles, but more where the margin would be half of the box. Among tiles of that size, those with
  // the smallest margin are taken. The choice depends on the shape alone, so the bits are the same
  // for any number of threads.
  explicit Tiles(const Step& step) {
    const Index share = step.groups * step.batch * step.cells / 32;
    Index target = std::clamp<Index>(share, 256, 2048);
    while (choose(step, target) > 1.5 && 2 * target <= std::min<Index>(share, 16384)) target *= 2;
    for (int axis = 0; axis < 2; ++axis)
      count[axis] = (step.size[axis] + size[axis] - 1) / size[axis];
    of_sample = count[0] * count[1];
  }

 private:
  // Sets the size to about `target` cells; returns the ratio of the cells of the box to the cells
  // of the tile.
  double choose(const Step& step, Index target) {
    double least = 0;
    for (Index z = 1; z <= step.size[0]; ++z) {
      const Index y = std::clamp<Index>(target / (z * step.size[2]), 1, step.size[1]);
      if (z > 1 && z * y * step.size[2] > 2 * target) break;
      const double margin =
          (1 + (step.kernel[0] - 1) / double(z)) * (1 + (step.kernel[1] - 1) / double(y));
      if (z == 1 || margin < least) least = margin, size[0] = z, size[1] = y;
    }
    return least;
  }
};

struct Tile {
  Index sample, first[2], size[2];  // z, y

  Tile(const Step& step, const Tiles& tiles, Index sample, Index index) : sample(sample) {
    const Index at[2] = {index / tiles.count[1], index % tiles.count[1]};
    for (int axis = 0; axis < 2; ++axis) {
      first[axis] = at[axis] * tiles.size[axis];
      size[axis] = std::min(tiles.size[axis], step.size[axis] - first[axis]);
    }
  }
  Index cells(const Step& step) const { return size[0] * size[1] * step.size[2]; }
  // The first cell of row (z, y) of the tile, in its sample.
  Index row(const Step& step, Index z, Index y) const {
    return ((first[0] + z) * step.size[1] + first[1] + y) * step.size[2];
  }
};


struct Box {
  Index size[3], padded;  // positions along z, y, x of the largest tile; floats a cell

  Box(const Step& step, const Tiles& tiles)
      : size{tiles.size[0] + step.kernel[0] - 1, tiles.size[1] + step.kernel[1] - 1,
             step.size[2] + step.kernel[2] - 1},
        padded(round_up(step.channels, kLanes)) {}
  Index at(Index z, Index y, Index x) const { return ((z * size[1] + y) * size[2] + x) * padded; }
  Index floats() const { return size[0] * size[1] * size[2] * padded; }
};

template <class T>
NCA_INLINE void widen(const T* from, float* to, Index channels, Index padded) {
  Index c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(to + c, load(from + c));
  if (c < padded) store(to + c, load_part(from + c, channels - c));
}

template <class T>
void widen_cells(const T* from, float* to, Index cells, Index channels, Index padded) {
  if (channels == padded) channels = padded = cells * channels, cells = 1;
  for (Index i = 0; i < cells; ++i) widen(from + i * channels, to + i * padded, channels, padded);
}

// Copies the state of a tile and its margin into a box, borders resolved. sample: [cells, C].
template <class T>
void fill_box(const Step& step, const Tile& tile, const Box& box, const T* sample, float* to) {
  const Index channels = step.channels, width = step.size[2], padded = box.padded;
  const Index before = step.before[2];
  for (Index pz = 0; pz < tile.size[0] + step.kernel[0] - 1; ++pz)
    for (Index py = 0; py < tile.size[1] + step.kernel[1] - 1; ++py) {
      float* row = to + box.at(pz, py, 0);
      const Index first = row_at_border(step, tile.first[0] + pz - step.before[0],
                                        tile.first[1] + py - step.before[1]);
      if (first < 0) {
        std::memset(row, 0, box.size[2] * padded * sizeof(float));
        continue;
      }
      const T* from = sample + first * channels;
      widen_cells(from, row + before * padded, width, channels, padded);
      for (Index px = 0; px < box.size[2]; ++px) {
        if (px == before) px += width;
        if (px >= box.size[2]) break;
        const Index x = at_border(px - before, width, step.padding);
        if (x < 0) std::memset(row + px * padded, 0, padded * sizeof(float));
        else widen(from + x * channels, row + px * padded, channels, padded);
      }
    }
}

// The transpose of fill_box along x: adds the margins of a row of a box to the cells they copy.
NCA_INLINE void fold_row(const Step& step, const Box& box, float* row) {
  const Index padded = box.padded, before = step.before[2], width = step.size[2];
  for (Index px = 0; px < box.size[2]; ++px) {
    if (px == before) px += width;  // the cells of the row itself
    if (px >= box.size[2]) return;
    const Index x = at_border(px - before, width, step.padding);
    if (x < 0) continue;
    float *to = row + (before + x) * padded, *from = row + px * padded;
    for (Index c = 0; c < padded; c += kLanes) store(to + c, load(to + c) + load(from + c));
  }
}


NCA_INLINE bool any(const std::uint8_t* flags, Index count) {
  return std::memchr(flags, 1, count) != nullptr;
}

// Rows of flags are read, and pooled rows written, by whole vectors: as much memory has to follow
// them.
typedef std::uint8_t Flags __attribute__((vector_size(64)));
constexpr Index kFlags = sizeof(Flags);

NCA_INLINE Flags load_flags(const std::uint8_t* at) {
  Flags flags;
  std::memcpy(&flags, at, sizeof flags);
  return flags;
}

// The pool of flags over the neighbourhood of each cell, a row at a time.
class FlagPool {
 public:
  // How far the pool reaches on each axis: the cells at most size - 1 away are all cells of an
  // axis, for every padding. A grid without a depth has a reach of 0 there.
  Index reach[3];

  FlagPool(const Step& step, Scope& scope) : step_(step) {
    for (int axis = 0; axis < 3; ++axis)
      reach[axis] = std::min(step.alive_radius, step.size[axis] - 1);
    const Index margin = round_up(reach[2], kFlags);
    merged_ = scope.array<std::uint8_t>(step.size[2] + 2 * margin + kFlags) + margin;
    rows_ = scope.array<const std::uint8_t*>((2 * reach[0] + 1) * (2 * reach[1] + 1));
  }

  // to[x] = any flag in the rows and columns around; row(dz, dy) is null outside the grid.
  template <class Row>
  NCA_INLINE void pool_row(std::uint8_t* to, Row&& row) const {
    const Index width = step_.size[2], reach_x = reach[2];
    int count = 0;
    for (Index dz = -reach[0]; dz <= reach[0]; ++dz)
      for (Index dy = -reach[1]; dy <= reach[1]; ++dy)
        if (const std::uint8_t* from = row(dz, dy)) rows_[count++] = from;
    for (Index x = 0; x < width; x += kFlags) {
      Flags any = {};
      for (int i = 0; i < count; ++i) any |= load_flags(rows_[i] + x);
      std::memcpy(merged_ + x, &any, sizeof any);
    }
    for (Index p = 1; p <= reach_x; ++p) {
      const Index left = at_border(-p, width, step_.padding);
      const Index right = at_border(width - 1 + p, width, step_.padding);
      merged_[-p] = left < 0 ? 0 : merged_[left];
      merged_[width - 1 + p] = right < 0 ? 0 : merged_[right];
    }
    for (Index x = 0; x < width; x += kFlags) {
      Flags any = load_flags(merged_ + x - reach_x);
      for (Index dx = 1 - reach_x; dx <= reach_x; ++dx) any |= load_flags(merged_ + x + dx);
      std::memcpy(to + x, &any, sizeof any);
    }
  }

  // The same for the cells of row (z, y) of a plane of flags [cells] of a sample.
  NCA_INLINE void pool_plane(const std::uint8_t* plane, Index z, Index y, std::uint8_t* to) const {
    pool_row(to, [&](Index dz, Index dy) -> const std::uint8_t* {
      const Index first = row_at_border(step_, z + dz, y + dy);
      return first < 0 ? nullptr : plane + first;
    });
  }

 private:
  const Step& step_;
  std::uint8_t* merged_;  // the flags of all rows around, between two margins along x
  const std::uint8_t** rows_;
};


NCA_INLINE Words rotate(Words x, int by) { return (x << by) | (x >> (32 - by)); }

// Threefry-2x32 of the 64-bit counters (high, low); as nca_kernels/fire_mask.py.
NCA_INLINE Words threefry(const std::uint32_t* key, Words high, Words low) {
  const std::uint32_t schedule[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDAu};
  Words x0 = high + schedule[0], x1 = low + schedule[1];
#define NCA_ROUND(by) x0 += x1, x1 = rotate(x1, by) ^ x0
#define NCA_INJECT(i) x0 += schedule[i % 3], x1 += schedule[(i + 1) % 3] + (std::uint32_t)i
#define NCA_EVEN NCA_ROUND(13), NCA_ROUND(15), NCA_ROUND(26), NCA_ROUND(6)
#define NCA_ODD NCA_ROUND(17), NCA_ROUND(29), NCA_ROUND(16), NCA_ROUND(24)
  NCA_EVEN, NCA_INJECT(1), NCA_ODD, NCA_INJECT(2), NCA_EVEN, NCA_INJECT(3);
  NCA_ODD, NCA_INJECT(4), NCA_EVEN, NCA_INJECT(5);
#undef NCA_ROUND
#undef NCA_INJECT
#undef NCA_EVEN
#undef NCA_ODD
  return x0 ^ x1;
}

// Writes the flags of `count` cells from the cell `first` of a sample on; `to` has room for kLanes
// more.
NCA_INLINE void fire_row(const Step& step, Index sample, Index first, Index count,
                         std::uint8_t* to) {
  const Index group = sample / step.batch, cell = sample % step.batch * step.cells + first;
  if (step.fire == Fire::all) {
    std::memset(to, 1, count);
  } else if (step.fire == Fire::mask) {
    std::memcpy(to, step.mask.of(group) + cell, count);
  } else {
    Words lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    for (Index x = 0; x < count; x += kLanes) {
      const std::uint64_t counter = cell + x;
      const Words low = lanes + (std::uint32_t)counter;
      const Words carried = (Words)(low < lanes);  // all bits set, which is minus one
      const Words bits =
          threefry(step.key.of(group), (std::uint32_t)(counter >> 32) - carried, low);
      const Ints fires = (Ints)((bits >> 9) < step.fire_threshold);
      const Bytes flags = __builtin_convertvector(fires & 1, Bytes);
      std::memcpy(to + x, &flags, sizeof flags);
    }
  }
}

}  // namespace nca::NCA_ISA
