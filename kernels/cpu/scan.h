// The order in which a scan visits a map, and the copies between its tensors and the small tiles that it computes on.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "memory.h"

namespace {

constexpr int64_t kSteps = 32;           // of a chunk; the states between chunks are what the backward pass keeps
constexpr int64_t kTile = 2 * kLanes;    // channels: a line of the cache
typedef float Tile[kSteps][kTile];

// One order in which a map is walked, as kernels/cross_scan.py defines it.
struct Path {
  int64_t by_columns, flip_rows, flip_columns, row, column, step;
};

// Any tensor over [batch][pixel][scan][channel], by its strides; that of `scan` is 0 where all scans share the entries.
struct View {
  float* data;
  int64_t batch, pixel, scan, channel;

  float* at(int64_t image, int64_t k, int64_t c) const { return data + image * batch + k * scan + c * channel; }
};

// Neighbouring steps of a scan, and the pixels that they visit: -1 is outside the map.
struct Chunk {
  int64_t count;
  int32_t pixels[kSteps];

  Chunk(const Path& path, int64_t height, int64_t width, int64_t first) {
    const int64_t rows = ceil_div(height, path.step), columns = ceil_div(width, path.step);
    const int64_t inner = path.by_columns ? rows : columns;
    count = std::min(kSteps, rows * columns - first);
    int64_t slow = first / inner, fast = first % inner;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t i = path.by_columns ? fast : slow, j = path.by_columns ? slow : fast;
      const int64_t y = path.row + path.step * (path.flip_rows ? rows - 1 - i : i);
      const int64_t x = path.column + path.step * (path.flip_columns ? columns - 1 - j : j);
      pixels[t] = y < height && x < width ? static_cast<int32_t>(y * width + x) : -1;
      if (++fast == inner) fast = 0, ++slow;
    }
  }

  // +1 or -1 where the eight pixels from step `t` are neighbours in that order, else 0.
  int run(int64_t t) const {
    if (t + kLanes > count || pixels[t] < 0) return 0;
    const int direction = pixels[t + 1] == pixels[t] + 1 ? 1 : -1;
    for (int64_t i = 1; i < kLanes; ++i)
      if (pixels[t + i] != pixels[t] + i * direction) return 0;
    return pixels[t + kLanes - 1] < 0 ? 0 : direction;
  }
};

// Eight channels (rows of `pitch` floats) of eight neighbouring pixels, transposed, from the last pixel on if `direction` is -1.
inline void load_transposed(const float* from, int64_t pitch, int direction, Vec (&tile)[8]) {
  Vec columns[8];
  for (int i = 0; i < 8; ++i) columns[i] = load(from + i * pitch);
  transpose_tile(columns);
  for (int i = 0; i < 8; ++i) tile[i] = columns[direction > 0 ? i : 7 - i];
}

// Up to eight channels of a chunk, from `from` on, to rows of `pitch` floats; zeros where there is no channel or no pixel.
void load_group(const View& view, const float* from, const Chunk& chunk, int64_t channels, float* to, int64_t pitch) {
  for (int64_t t = 0; t < chunk.count;) {
    const int direction = channels == kLanes && view.pixel == 1 && view.channel != 1 ? chunk.run(t) : 0;
    if (direction) {
      Vec tile[8];
      load_transposed(from + std::min(chunk.pixels[t], chunk.pixels[t + 7]), view.channel, direction, tile);
      for (int i = 0; i < 8; ++i) store(to + (t + i) * pitch, tile[i]);
      t += kLanes;
      continue;
    }
    Vec values = {};
    const float* pixel = from + chunk.pixels[t] * view.pixel;
    if (chunk.pixels[t] >= 0 && channels == kLanes && view.channel == 1) values = load(pixel);
    else if (chunk.pixels[t] >= 0)
      for (int64_t c = 0; c < channels; ++c) values[c] = pixel[c * view.channel];
    store(to + t * pitch, values);
    ++t;
  }
}

// The other way, for the pixels that exist: stored, or added to what is there.
void store_group(const View& view, float* to, const Chunk& chunk, int64_t channels, bool adds, const float* from,
                 int64_t pitch) {
  for (int64_t t = 0; t < chunk.count;) {
    const int direction = channels == kLanes && view.pixel == 1 && view.channel != 1 ? chunk.run(t) : 0;
    if (direction) {
      Vec tile[8];
      for (int i = 0; i < 8; ++i) tile[i] = load(from + (t + (direction > 0 ? i : 7 - i)) * pitch);
      transpose_tile(tile);
      float* first = to + std::min(chunk.pixels[t], chunk.pixels[t + 7]);
      for (int i = 0; i < 8; ++i) {
        float* row = first + i * view.channel;
        store(row, adds ? load(row) + tile[i] : tile[i]);
      }
      t += kLanes;
      continue;
    }
    float* pixel = to + chunk.pixels[t] * view.pixel;
    const float* values = from + t * pitch;
    if (chunk.pixels[t] >= 0 && channels == kLanes && view.channel == 1)
      store(pixel, adds ? load(pixel) + load(values) : load(values));
    else if (chunk.pixels[t] >= 0)
      for (int64_t c = 0; c < channels; ++c)
        pixel[c * view.channel] = adds ? pixel[c * view.channel] + values[c] : values[c];
    ++t;
  }
}

}  // namespace
