// Memory for the far points of a slice, and the two ways to lay them out in it.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "memory.h"
#include "neighborhood.h"

namespace {

// Transposed operands are [row][dim][pitch] and readable for a whole tile from any column; plain ones [row][x][width].
struct Layout {
  int64_t dim, width, pitch, transposed_row, plain_row, rows;

  explicit Layout(const Geometry& g) : dim(g.dim), width(round_up(g.dim, kLanes)) {
    const int64_t points = ceil_div(g.size[2], g.dilation[2]);
    pitch = round_up(points + kLanes - 1, kLanes);
    if (pitch % 32 == 0) pitch += kLanes;  // a power of two would put all channels into a few sets of the cache
    transposed_row = dim * pitch;
    plain_row = points * width;
    rows = ceil_div(g.size[0], g.dilation[0]) * ceil_div(g.size[1], g.dilation[1]);
  }
};

// source[x][d] -> to[d * pitch + x] for x in [begin, end), and zeros up to `fill`. There is room for a whole last tile.
void copy_transposed(Points source, int64_t begin, int64_t end, int64_t fill, const Layout& layout, float* to) {
  for (int64_t d0 = 0; d0 < layout.dim; d0 += kLanes) {
    const int64_t channels = std::min(kLanes, layout.dim - d0);
    int64_t written = end;
    if (channels == kLanes) {
      for (int64_t x = begin; x < end; x += kLanes) {
        Vec tile[8];
        for (int i = 0; i < 8; ++i) tile[i] = x + i < end ? load(source[x + i] + d0) : Vec{};
        transpose_tile(tile);
        for (int i = 0; i < 8; ++i) store(to + (d0 + i) * layout.pitch + x, tile[i]);
        written = x + kLanes;
      }
    } else {
      for (int64_t d = d0; d < layout.dim; ++d)
        for (int64_t x = begin; x < end; ++x) to[d * layout.pitch + x] = source[x][d];
    }
    for (int64_t d = d0; d < d0 + channels; ++d)
      std::fill(to + d * layout.pitch + written, to + d * layout.pitch + std::max(written, fill), 0.f);
  }
}

// source[x][d] -> to[x * width + d], zeros from dim on.
void copy_plain(Points source, int64_t begin, int64_t end, const Layout& layout, float* to) {
  for (int64_t x = begin; x < end; ++x) {
    const float* point = source[x];
    float* row = to + x * layout.width;
    int64_t d = 0;
    for (; d + kLanes <= layout.dim; d += kLanes) store(row + d, load(point + d));
    for (; d < layout.width; ++d) row[d] = d < layout.dim ? point[d] : 0.f;
  }
}

}  // namespace
