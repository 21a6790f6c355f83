// The two memory layouts of the far points of a slice, and the copies into them.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "memory.h"
#include "neighborhood.h"

namespace {

// Transposed operands are [row][dim][pitch], padded so that a whole tile is readable from any column; plain ones are
// [row][x][width].
struct Layout {
  int64_t dim, width, pitch, transposed_row, plain_row, rows;

  explicit Layout(const Geometry& g) : dim(g.dim), width(round_up(g.dim, kLanes)) {
    const int64_t points = ceil_div(g.size[2], g.dilation[2]);
    pitch = round_up(points + kLanes - 1, kLanes);
    if (pitch % 32 == 0) pitch += kLanes;  // a power of two would map all channels to a few cache sets
    transposed_row = dim * pitch;
    plain_row = points * width;
    rows = ceil_div(g.size[0], g.dilation[0]) * ceil_div(g.size[1], g.dilation[1]);
  }
};

// Copy source[x][d] to to[d * pitch + x] for x in [begin, end), zeros up to `fill`. A whole last tile fits in `to`.
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

// Copy source[x][d] to to[x * width + d], with zeros from dim on.
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
