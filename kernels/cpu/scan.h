// The order in which a scan visits a map, and the copies between its tensors and the small tiles of the kernels.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "memory.h"

namespace {

constexpr int64_t kSteps = 32;         // steps per chunk; the backward pass starts from the states saved between chunks
constexpr int64_t kTile = 2 * kLanes;  // channels per tile: one cache line
typedef float Tile[kSteps][kTile];

// One order in which a map is traversed, as defined by kernels/cross_scan.py.
struct Path {
  int64_t by_columns, flip_rows, flip_columns, row, column, step;
};

// A tensor over [batch][pixel][scan][channel] with strides; the `scan` stride is 0 if all scans share the entries.
struct View {
  float* data;
  int64_t batch, pixel, scan, channel;

  float* at(int64_t image, int64_t k, int64_t c) const { return data + image * batch + k * scan + c * channel; }
};

// Consecutive steps of a scan, and the pixels that they visit: -1 is outside the map.
struct Chunk {
  int64_t count;
  int32_t pixels[kSteps];
  int runs[kSteps / kLanes];  // +1 or -1 if eight pixels are adjacent in that order, else 0

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
    for (int64_t t = 0; t < count; t += kLanes) runs[t / kLanes] = find_run(t);
  }

 private:
  int find_run(int64_t t) const {
    if (t + kLanes > count) return 0;
    const int direction = pixels[t + 1] == pixels[t] + 1 ? 1 : -1;
    for (int64_t i = 0; i < kLanes; ++i)
      if (pixels[t + i] < 0 || pixels[t + i] != pixels[t] + i * direction) return 0;
    return direction;
  }
};

// Transpose eight channels (rows of `pitch` floats) of eight pixels, last pixel first if `direction` is -1.
inline void transpose_pixels(const float* from, int64_t pitch, int direction, float* to, int64_t to_pitch) {
  Vec tile[8];
  for (int i = 0; i < 8; ++i) tile[i] = load(from + i * pitch);
  transpose_tile(tile);
  for (int i = 0; i < 8; ++i) store(to + (direction > 0 ? i : 7 - i) * to_pitch, tile[i]);
}

// Copies between the entries of a view and tiles; with `kAdds` they accumulate.
//
// Copy V groups of eight adjacent channels.
template <int V>
inline void load_rows(const View& view, const float* from, const Chunk& chunk, float* to, int64_t pitch) {
  static const float zeros[V * kLanes] = {};
  for (int64_t t = 0; t < chunk.count; ++t) {
    const float* pixel = chunk.pixels[t] < 0 ? zeros : from + chunk.pixels[t] * view.pixel;
    for (int v = 0; v < V; ++v) store(to + t * pitch + v * kLanes, load(pixel + v * kLanes));
  }
}

template <int V, bool kAdds>
inline void store_rows(const View& view, float* to, const Chunk& chunk, const float* from, int64_t pitch) {
  for (int64_t t = 0; t < chunk.count; ++t) {
    if (chunk.pixels[t] < 0) continue;
    float* pixel = to + chunk.pixels[t] * view.pixel;
    for (int v = 0; v < V; ++v) {
      const Vec values = load(from + t * pitch + v * kLanes);
      store(pixel + v * kLanes, kAdds ? load(pixel + v * kLanes) + values : values);
    }
  }
}

// Copy one step with any strides, up to eight channels; zeros in the other lanes.
inline void load_step(const View& view, const float* from, int32_t pixel, int64_t channels, float* to) {
  for (int64_t c = 0; c < kLanes; ++c)
    to[c] = pixel >= 0 && c < channels ? from[pixel * view.pixel + c * view.channel] : 0.f;
}

inline void store_step(const View& view, float* to, int32_t pixel, int64_t channels, bool adds, const float* from) {
  for (int64_t c = 0; pixel >= 0 && c < channels; ++c) {
    float* entry = to + pixel * view.pixel + c * view.channel;
    *entry = adds ? *entry + from[c] : from[c];
  }
}

// Prefetch the next chunk's rows of eight channels: there are more streams than the hardware prefetcher follows.
inline void prefetch_next(const View& view, const float* first, const Chunk& chunk) {
  for (int64_t t = 0; t < chunk.count; t += kTile)  // one cache line
    for (int64_t c = 0; c < kLanes; ++c)
      __builtin_prefetch(first + c * view.channel + chunk.pixels[t] + chunk.runs[t / kLanes] * kSteps);
}

// Copy up to eight channels of a chunk to rows of `pitch` floats; zeros where there is no channel or pixel.
void load_group(const View& view, const float* from, const Chunk& chunk, int64_t channels, float* to, int64_t pitch) {
  if (channels == kLanes && view.channel == 1) return load_rows<1>(view, from, chunk, to, pitch);
  const bool transposes = channels == kLanes && view.pixel == 1;
  if (transposes) prefetch_next(view, from, chunk);
  for (int64_t t = 0; t < chunk.count;) {
    const int direction = transposes && t % kLanes == 0 ? chunk.runs[t / kLanes] : 0;
    if (direction) {
      const float* first = from + std::min(chunk.pixels[t], chunk.pixels[t + kLanes - 1]);
      transpose_pixels(first, view.channel, direction, to + t * pitch, pitch);
      t += kLanes;
    } else {
      load_step(view, from, chunk.pixels[t], channels, to + t * pitch);
      ++t;
    }
  }
}

// Copy back, for the pixels on the map.
template <bool kAdds>
void store_group(const View& view, float* to, const Chunk& chunk, int64_t channels, const float* from, int64_t pitch) {
  if (channels == kLanes && view.channel == 1) return store_rows<1, kAdds>(view, to, chunk, from, pitch);
  const bool transposes = channels == kLanes && view.pixel == 1;
  if (transposes) prefetch_next(view, to, chunk);
  for (int64_t t = 0; t < chunk.count;) {
    const int direction = transposes && t % kLanes == 0 ? chunk.runs[t / kLanes] : 0;
    if (direction) {
      Vec tile[8];
      for (int i = 0; i < 8; ++i) tile[i] = load(from + (t + (direction > 0 ? i : 7 - i)) * pitch);
      transpose_tile(tile);
      float* first = to + std::min(chunk.pixels[t], chunk.pixels[t + kLanes - 1]);
      for (int i = 0; i < 8; ++i, first += view.channel) store(first, kAdds ? load(first) + tile[i] : tile[i]);
      t += kLanes;
    } else {
      store_step(view, to, chunk.pixels[t], channels, kAdds, from + t * pitch);
      ++t;
    }
  }
}

void load_tile(const View& view, const float* from, const Chunk& chunk, int64_t channels, Tile to) {
  if (channels == kTile && view.channel == 1) return load_rows<2>(view, from, chunk, to[0], kTile);
  for (int64_t c = 0; c < kTile; c += kLanes)
    load_group(view, from + c * view.channel, chunk, std::clamp<int64_t>(channels - c, 0, kLanes), to[0] + c, kTile);
}

template <bool kAdds>
void store_tile(const View& view, float* to, const Chunk& chunk, int64_t channels, const Tile from) {
  if (channels == kTile && view.channel == 1) return store_rows<2, kAdds>(view, to, chunk, from[0], kTile);
  for (int64_t c = 0; c < channels; c += kLanes)
    store_group<kAdds>(view, to + c * view.channel, chunk, std::min(kLanes, channels - c), from[0] + c, kTile);
}

}  // namespace
