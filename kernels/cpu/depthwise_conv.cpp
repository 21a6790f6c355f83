// Depth-wise convolution on the CPU: forward and the gradient of the filters, float32, any odd kernel and dilation,
// stride 1, zero padding that preserves the map size. (The gradient of the input is the forward pass with mirrored
// filters.) Called through ctypes.
//
// What is unusual:
// - Eight channels are processed at a time, whatever the memory format. The map rows that a task needs are copied to
//   [row][column][8 channels], with zero columns on both sides; contiguous (channels-first) maps are transposed on the
//   way. The inner loops then handle neither borders nor strides, and a dilation only changes the distance between
//   loads.
// - On a channels_last map a task processes two groups of eight, a whole cache line, and neighbouring tasks process
//   neighbouring lines: large maps are read and written once.
// - Fourteen neighbouring columns share each filter tap: fourteen independent sums hide the latency of a fused
//   multiply-add, and divide the published maps of 56, 28 and 14 columns without remainder; maps of seven use seven.
// - Results are deterministic, independent of the number of threads: each sum is computed by one thread in one order.

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"
#include "memory.h"

namespace {

struct Convolution {
  int64_t threads, batch, channels, height, width, kernel[2], dilation[2];
};

struct Map {
  float* data;
  int64_t batch, channel, row, column;  // strides; that of channel or of column is 1
};

constexpr int64_t kBlock = 14;              // columns
constexpr int64_t kMaxTogether = 2;         // groups per task
constexpr int64_t kTaskFloats = 64 * 1024;  // a task's rows should stay in the second-level cache
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMaxPartials = 16;

struct Geometry2d : Convolution {
  int64_t groups, reach[2], padded, pitch;  // groups of eight channels; padding; columns, floats of a copied row

  explicit Geometry2d(const Convolution& c) : Convolution(c), groups(ceil_div(c.channels, kLanes)) {
    for (int a = 0; a < 2; ++a) reach[a] = kernel[a] / 2 * dilation[a];
    padded = round_up(width, kBlock) + 2 * reach[1];
    pitch = padded * kLanes;
  }

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t lanes(int64_t group) const { return std::min(kLanes, channels - group * kLanes); }

  // Return the kernel rows that overlap the map for output row `y`, [first, end).
  int64_t first_tap(int64_t y) const { return std::max<int64_t>(0, kernel[0] / 2 - y / dilation[0]); }
  int64_t end_tap(int64_t y) const { return kernel[0] / 2 + std::min(kernel[0] / 2, (height - 1 - y) / dilation[0]) + 1; }
};

// Transpose eight columns of eight channels from `from` to [column][channel], or back.
inline void transpose_columns(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  Vec tile[8];
  for (int i = 0; i < 8; ++i) tile[i] = load(from + i * from_pitch);
  transpose_tile(tile);
  for (int i = 0; i < 8; ++i) store(to + i * to_pitch, tile[i]);
}

// Copy one row of `count` channel groups to [group][column][8 channels], a group every `plane` floats; lanes without a
// channel become zero.
void pack_row(const Geometry2d& g, const Map& map, int64_t image, int64_t group, int64_t count, int64_t y, float* to,
              int64_t plane) {
  const float* from = map.data + image * map.batch + group * kLanes * map.channel + y * map.row;
  if (map.channel == 1 && g.lanes(group + count - 1) == kLanes) {
    for (int64_t x = 0; x < g.width; ++x)
      for (int64_t k = 0; k < count; ++k) store(to + k * plane + x * kLanes, load(from + x * map.column + k * kLanes));
    return;
  }
  for (int64_t k = 0; k < count; ++k, from += kLanes * map.channel, to += plane) {
    const int64_t lanes = g.lanes(group + k);
    int64_t x = 0;
    if (lanes == kLanes && map.column == 1)
      for (; x + kLanes <= g.width; x += kLanes) transpose_columns(from + x, map.channel, to + x * kLanes, kLanes);
    for (; x < g.width; ++x) {
      Vec values = {};
      for (int64_t c = 0; c < lanes; ++c) values[c] = from[c * map.channel + x * map.column];
      store(to + x * kLanes, values);
    }
  }
}

// Copy one row of sums, [group][column][8 channels], back to the map.
void unpack_row(const Geometry2d& g, const Map& map, int64_t image, int64_t group, int64_t count, int64_t y,
                const float* from) {
  float* to = map.data + image * map.batch + group * kLanes * map.channel + y * map.row;
  if (map.channel == 1 && g.lanes(group + count - 1) == kLanes) {
    for (int64_t x = 0; x < g.width; ++x)
      for (int64_t k = 0; k < count; ++k) store(to + x * map.column + k * kLanes, load(from + k * g.pitch + x * kLanes));
    return;
  }
  for (int64_t k = 0; k < count; ++k, to += kLanes * map.channel, from += g.pitch) {
    const int64_t lanes = g.lanes(group + k);
    int64_t x = 0;
    if (lanes == kLanes && map.column == 1)
      for (; x + kLanes <= g.width; x += kLanes) transpose_columns(from + x * kLanes, kLanes, to + x, map.channel);
    for (; x < g.width; ++x)
      for (int64_t c = 0; c < lanes; ++c) to[c * map.channel + x * map.column] = from[x * kLanes + c];
  }
}

// Copy rows [begin, end) of `count` groups, each between `margin` zero columns; `to` must be zero-initialised.
void pack_rows(const Geometry2d& g, const Map& map, int64_t image, int64_t group, int64_t count, int64_t begin,
               int64_t end, int64_t margin, float* to, int64_t plane) {
  for (int64_t y = begin; y < end; ++y)
    pack_row(g, map, image, group, count, y, to + (y - begin) * g.pitch + margin * kLanes, plane);
}

// Copy the filters of a group to [tap][8 channels].
void pack_filters(const Geometry2d& g, const float* weight, int64_t group, float* to) {
  for (int64_t t = 0; t < g.taps(); ++t)
    for (int64_t c = 0; c < kLanes; ++c)
      to[t * kLanes + c] = c < g.lanes(group) ? weight[(group * kLanes + c) * g.taps() + t] : 0.f;
}

// Compute N neighbouring sums of output row `y` from column `x`; `rows` holds the packed map from row `begin` on.
template <int N>
inline void convolve_block(const Geometry2d& g, const float* rows, int64_t begin, int64_t y, int64_t x,
                           const float* filters, Vec bias, float* out) {
  const int64_t middle = g.kernel[1] / 2, step = g.dilation[1];
  const int64_t first = std::max<int64_t>(0, middle - (x + N - 1) / step);
  const int64_t last = std::min(g.kernel[1] - 1, middle + (g.width - 1 - x) / step);
  Vec sum[N];
  for (int n = 0; n < N; ++n) sum[n] = bias;
  for (int64_t i = g.first_tap(y); i < g.end_tap(y); ++i) {
    const float* row = rows + (y + (i - g.kernel[0] / 2) * g.dilation[0] - begin) * g.pitch;
    for (int64_t j = first; j <= last; ++j) {
      const Vec tap = load_once(filters + (i * g.kernel[1] + j) * kLanes);
      const float* from = row + (x + j * step) * kLanes;
      for (int n = 0; n < N; ++n) sum[n] += tap * load(from + n * kLanes);
    }
  }
  for (int n = 0; n < N; ++n) store(out + (x + n) * kLanes, sum[n]);
}

// Divides the output rows of a map into tasks: bands, whose input rows overlap.
struct Bands {
  int64_t rows, count;

  Bands(const Geometry2d& g, int64_t tasks_without, int64_t together) {
    const int64_t for_threads = ceil_div(g.height * tasks_without, kTasksPerThread * g.threads);
    const int64_t for_cache = kTaskFloats / (g.pitch * together) - 2 * g.reach[0];
    const int64_t shortest = std::max<int64_t>(8, g.reach[0]);  // shorter bands would mostly copy halo rows
    rows = std::min(g.height, std::max(shortest, std::min(for_threads, for_cache)));
    count = ceil_div(g.height, rows);
  }
};

// Compute all output columns of row `y` of one group.
void convolve_row(const Geometry2d& g, const float* rows, int64_t begin, int64_t y, const float* filters, Vec bias,
                  float* out) {
  int64_t x = 0;
  for (; g.width - x > kBlock / 2; x += kBlock) convolve_block<kBlock>(g, rows, begin, y, x, filters, bias, out);
  if (x < g.width) convolve_block<kBlock / 2>(g, rows, begin, y, x, filters, bias, out);
}

void forward(const Geometry2d& g, const Map& x, const float* weight, const float* bias, const Map& out) {
  const int64_t together = x.channel == 1 ? std::min(g.groups, kMaxTogether) : 1;
  const int64_t parts = ceil_div(g.groups, together);
  const Bands bands(g, g.batch * parts, together);
  const int64_t plane = std::min(g.height, bands.rows + 2 * g.reach[0]) * g.pitch, filter_floats = g.taps() * kLanes;
  const int64_t room = together * (plane + filter_floats + g.pitch);
  const Floats memory = allocate(room * g.threads);
#pragma omp parallel num_threads(static_cast<int>(g.threads))
  {
#ifdef _OPENMP
    float* rows = memory.get() + omp_get_thread_num() * room;
#else
    float* rows = memory.get();
#endif
    float *filters = rows + together * plane, *sums = filters + together * filter_floats;
    std::fill_n(rows, together * plane, 0.f);  // the margins stay zero across tasks
#pragma omp for schedule(static)
    for (int64_t task = 0; task < parts * g.batch * bands.count; ++task) {
      const int64_t group = task % parts * together, count = std::min(together, g.groups - group);
      const int64_t band = task / parts % bands.count, image = task / parts / bands.count;
      const int64_t first = band * bands.rows, end = std::min(g.height, first + bands.rows);
      const int64_t begin = std::max<int64_t>(0, first - g.reach[0]);
      pack_rows(g, x, image, group, count, begin, std::min(g.height, end + g.reach[0]), g.reach[1], rows, plane);
      Vec offsets[kMaxTogether] = {};
      for (int64_t k = 0; k < count; ++k) {
        pack_filters(g, weight, group + k, filters + k * filter_floats);
        for (int64_t c = 0; bias && c < g.lanes(group + k); ++c) offsets[k][c] = bias[(group + k) * kLanes + c];
      }
      for (int64_t y = first; y < end; ++y) {
        for (int64_t k = 0; k < count; ++k)
          convolve_row(g, rows + k * plane, begin, y, filters + k * filter_floats, offsets[k], sums + k * g.pitch);
        unpack_row(g, out, image, group, count, y, sums);
      }
    }
  }
}

// Add the contribution of the output rows [first, end) to T neighbouring taps of the kernel's row `i`.
template <int T>
inline void correlate(const Geometry2d& g, const float* rows, int64_t begin, const float* grads, int64_t first,
                      int64_t end, int64_t i, int64_t j, float* total) {
  const int64_t offset = (i - g.kernel[0] / 2) * g.dilation[0], step = g.dilation[1] * kLanes;
  Vec sum[T];
  for (int t = 0; t < T; ++t) sum[t] = load(total + t * kLanes);
  for (int64_t y = std::max(first, -offset); y < std::min(end, g.height - offset); ++y) {
    const float* grad = grads + (y - first) * g.pitch;
    const float* from = rows + (y + offset - begin) * g.pitch + j * step;
    for (int64_t x = 0; x < g.width; ++x, from += kLanes) {
      const Vec factor = load_once(grad + x * kLanes);
      for (int t = 0; t < T; ++t) sum[t] += factor * load(from + t * step);
    }
  }
  for (int t = 0; t < T; ++t) store(total + t * kLanes, sum[t]);
}

template <int T = 8>
inline void correlate_taps(int64_t count, const Geometry2d& g, const float* rows, int64_t begin, const float* grads,
                           int64_t first, int64_t end, int64_t i, int64_t j, float* total) {
  if constexpr (T > 0) {
    if (count == T) correlate<T>(g, rows, begin, grads, first, end, i, j, total);
    else correlate_taps<T - 1>(count, g, rows, begin, grads, first, end, i, j, total);
  }
}

void weight_grad(const Geometry2d& g, const Map& grad, const Map& x, float* weight_grad) {
  const Bands bands(g, g.batch * g.groups, 1);
  const int64_t most_rows = std::min(g.height, bands.rows + 2 * g.reach[0]);
  const int64_t row_floats = most_rows * g.pitch, grad_floats = bands.rows * g.pitch, room = row_floats + grad_floats;
  const int64_t partials = std::min(g.batch, kMaxPartials), partial_floats = g.groups * g.taps() * kLanes;
  const Floats memory = allocate(room * g.threads), totals = allocate(partials * partial_floats);
  std::fill_n(totals.get(), partials * partial_floats, 0.f);
#pragma omp parallel num_threads(static_cast<int>(g.threads))
  {
#ifdef _OPENMP
    float* rows = memory.get() + omp_get_thread_num() * room;
#else
    float* rows = memory.get();
#endif
    float* grads = rows + row_floats;
    std::fill_n(rows, room, 0.f);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < g.groups * partials; ++task) {
      const int64_t group = task % g.groups, partial = task / g.groups;
      float* total = totals.get() + partial * partial_floats + group * g.taps() * kLanes;
      for (int64_t part = 0; part < ceil_div(g.batch - partial, partials) * bands.count; ++part) {
        const int64_t image = partial + part / bands.count * partials;
        const int64_t first = part % bands.count * bands.rows, end = std::min(g.height, first + bands.rows);
        const int64_t begin = std::max<int64_t>(0, first - g.reach[0]);
        pack_rows(g, x, image, group, 1, begin, std::min(g.height, end + g.reach[0]), g.reach[1], rows, 0);
        pack_rows(g, grad, image, group, 1, first, end, 0, grads, 0);
        for (int64_t i = 0; i < g.kernel[0]; ++i)
          for (int64_t j = 0; j < g.kernel[1]; j += 8)
            correlate_taps(std::min<int64_t>(8, g.kernel[1] - j), g, rows, begin, grads, first, end, i, j,
                           total + (i * g.kernel[1] + j) * kLanes);
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < g.channels; ++c)
      for (int64_t t = 0; t < g.taps(); ++t) {
        const float* from = totals.get() + (c / kLanes * g.taps() + t) * kLanes + c % kLanes;
        float sum = 0.f;
        for (int64_t p = 0; p < partials; ++p) sum += from[p * partial_floats];
        weight_grad[c * g.taps() + t] = sum;
      }
  }
}

template <typename Body>
int guard(const Convolution& c, Body body) {
  bool fits = c.threads > 0 && c.batch > 0 && c.channels > 0 && c.height > 0 && c.width > 0;
  for (int a = 0; a < 2; ++a) fits = fits && c.kernel[a] > 0 && c.kernel[a] % 2 == 1 && c.dilation[a] > 0;
  if (!fits) return kBadGeometry;
  return run_guarded([&] { body(Geometry2d(c)); });
}

}  // namespace

// weight: [channels][rows][columns], contiguous; bias: [channels] or null.
extern "C" __attribute__((visibility("default"))) int mixerzoo_depthwise_forward(const Convolution* c, const Map* x,
                                                                                 const float* weight,
                                                                                 const float* bias, const Map* out) {
  return guard(*c, [&](const Geometry2d& g) { forward(g, *x, weight, bias, *out); });
}

extern "C" __attribute__((visibility("default"))) int mixerzoo_depthwise_weight_grad(const Convolution* c,
                                                                                     const Map* grad, const Map* x,
                                                                                     float* grad_weight) {
  return guard(*c, [&](const Geometry2d& g) { weight_grad(g, *grad, *x, grad_weight); });
}
