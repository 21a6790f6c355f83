// The selective scan on the CPU, h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t, y_t = C_t . h_t + D x_t, over maps that
// are walked along given paths: forward and backward, float32. Called through ctypes.
//
// What is unusual:
// - Lanes are channels and time is walked step by step, so there is no prefix sum, no shuffle and no sum over lanes. The
//   states of a chunk of 32 steps stay in registers, a few at a time; everything else is in small tiles in the
//   first-level cache, into which maps are copied (and transposed, where time is what is adjacent) chunk by chunk.
// - No sequence is ever made: a scan reads and writes the map where its path leads. With all scans added up, one task
//   makes all the scans of its channels, one after the other; delta is expanded from its few factors on the way.
// - The scan's exponential is 2^(delta A log2 e), with log2 e in A from the start.
// - Results depend on neither the number of threads nor their timing: each sum is made by one thread in one order.

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"
#include "memory.h"
#include "scan.h"

namespace {

struct Scan {
  int64_t threads, batch, scans, channels, rank, state, height, width, softplus;
  int64_t adds;  // outputs start as zeros: some path does not visit the whole map
};

struct Parameters {  // contiguous: [scan][channel][rank], [scan][channel], [scan][channel][state], [scan][channel]
  const float *weight, *bias, *decay, *skip;
};

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMaxTiles = 8;  // of a task: their states should stay in the first-level cache

struct Geometry : Scan {
  int64_t steps, columns, pitch, tiles, parameters;

  explicit Geometry(const Scan& s) : Scan(s) {
    columns = rank + 2 * state;
    pitch = round_up(columns, kLanes);
    tiles = ceil_div(channels, kTile);
    parameters = rank + state + 2;
  }

  int64_t lanes(int64_t tile) const { return std::min(kTile, channels - tile * kTile); }
};

// 2^x: zero below -127, infinite from 128; NaN stays NaN.
inline Vec exp2_lanes(Vec x) {
  const float shifter = 12582912.f;  // as in exp_lanes
  const Vec low = splat(-127.f), high = splat(128.f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec shifted = x + shifter;
  const Vec r = x - (shifted - shifter);
  Vec p = splat(1.32647273e-3f);  // on [-1/2, 1/2], relative error 9e-8, exact at 0
  p = p * r + 9.67151206e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.f;
  return reinterpret_cast<Vec>(reinterpret_cast<Mask>(p) + (reinterpret_cast<Mask>(shifted) << 23));
}

inline Vec magnitude(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Mask>(x) & 0x7fffffff); }

// log(1 + exp(x)), with a small relative error however small it is.
inline Vec softplus_lanes(Vec x) {
  const Vec z = exp_lanes(-magnitude(x));
  Vec p = splat(5.36483806e-3f);  // log(1 + z) / z on [0, 1], relative error 3e-8, exact at 0
  p = p * z - 3.00658457e-2f;
  p = p * z + 7.92046189e-2f;
  p = p * z - 1.37538090e-1f;
  p = p * z + 1.91536576e-1f;
  p = p * z - 2.48571649e-1f;
  p = p * z + 3.33213240e-1f;
  p = p * z - 4.99996483e-1f;
  p = p * z + 1.f;
  return p * z + (x > 0.f ? x : Vec{});
}

// Rows [channel][count] of up to 16 channels to [count][16].
void pack_rows(const float* from, int64_t count, int64_t channels, float* to) {
  std::fill_n(to, count * kTile, 0.f);
  for (int64_t c0 = 0; from && c0 < channels; c0 += kLanes) {
    int64_t r = 0;
    for (; channels - c0 >= kLanes && r + kLanes <= count; r += kLanes) {
      Vec rows[8];
      load_transposed(from + c0 * count + r, count, 1, rows);
      for (int i = 0; i < 8; ++i) store(to + (r + i) * kTile + c0, rows[i]);
    }
    for (; r < count; ++r)
      for (int64_t c = c0; c < std::min(channels, c0 + kLanes); ++c) to[r * kTile + c] = from[c * count + r];
  }
}

// A tile's parameters, each in rows of 16 channels.
struct Packed {
  const float *weight, *decay, *bias, *skip;

  Packed(const Geometry& g, const float* p)
      : weight(p), decay(p + g.rank * kTile), bias(decay + g.state * kTile), skip(bias + kTile) {}
};

Floats pack_parameters(const Geometry& g, const Parameters& from) {
  Floats packed = allocate(g.scans * g.tiles * g.parameters * kTile);
#pragma omp parallel for num_threads(static_cast<int>(g.threads)) schedule(static)
  for (int64_t i = 0; i < g.scans * g.tiles; ++i) {
    const int64_t first = i / g.tiles * g.channels + i % g.tiles * kTile, lanes = g.lanes(i % g.tiles);
    float *weight = packed.get() + i * g.parameters * kTile, *decay = weight + g.rank * kTile;
    pack_rows(from.weight + first * g.rank, g.rank, lanes, weight);
    pack_rows(from.decay + first * g.state, g.state, lanes, decay);
    for (int64_t n = 0; n < g.state * kTile; ++n) decay[n] *= 1.44269504f;
    pack_rows(from.bias ? from.bias + first : nullptr, 1, lanes, decay + g.state * kTile);
    pack_rows(from.skip ? from.skip + first : nullptr, 1, lanes, decay + (g.state + 1) * kTile);
  }
  return packed;
}

// What a task works on: a chunk of one tile of channels.
struct Buffers {
  Tile x, delta, input, y;  // input: delta x
  float *rows, *states;     // the chunk's rows of `projected`; [tile][state][channel]
};

void load_tile(const View& view, const float* from, const Chunk& chunk, int64_t channels, Tile to) {
  for (int64_t c = 0; c < channels; c += kLanes)
    load_group(view, from + c * view.channel, chunk, std::min(kLanes, channels - c), to[0] + c, kTile);
}

void store_tile(const View& view, float* to, const Chunk& chunk, int64_t channels, bool adds, const Tile from) {
  for (int64_t c = 0; c < channels; c += kLanes)
    store_group(view, to + c * view.channel, chunk, std::min(kLanes, channels - c), adds, from[0] + c, kTile);
}

// delta[t] = sum over r of rows[t][r] weight[r], a block of steps at a time.
template <int N>
inline void expand_block(int64_t rank, const float* rows, int64_t pitch, const float* weight, float* delta) {
  Vec sum[N][2] = {};
  for (int64_t r = 0; r < rank; ++r) {
    const Vec left = load(weight + r * kTile), right = load(weight + r * kTile + kLanes);
    for (int n = 0; n < N; ++n) {
      sum[n][0] += left * rows[n * pitch + r];
      sum[n][1] += right * rows[n * pitch + r];
    }
  }
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < 2; ++v) store(delta + n * kTile + v * kLanes, sum[n][v]);
}

void expand(const Geometry& g, int64_t count, const float* rows, const float* weight, Tile delta) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) expand_block<4>(g.rank, rows + t * g.pitch, g.pitch, weight, delta[t]);
  for (; t < count; ++t) expand_block<1>(g.rank, rows + t * g.pitch, g.pitch, weight, delta[t]);
}

// From delta without its bias: delta, its product with x, and the part of y that skips the scan.
template <bool kSoftplus>
void prepare(int64_t count, int64_t vectors, const Packed& p, Buffers& b) {
  for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
    const Vec bias = load(p.bias + v), skip = load(p.skip + v);
    for (int64_t t = 0; t < count; ++t) {
      const Vec x = load(b.x[t] + v), raw = load(b.delta[t] + v) + bias;
      const Vec delta = kSoftplus ? softplus_lanes(raw) : raw;
      store(b.delta[t] + v, delta);
      store(b.input[t] + v, delta * x);
      store(b.y[t] + v, skip * x);
    }
  }
}

// K states of eight channels through a chunk. B and C are rows of `pitch` floats.
template <int K>
inline void advance(int64_t count, const float* delta, const float* input, float* y, const float* B, const float* C,
                    int64_t pitch, const float* decay, float* states) {
  Vec a[K], h[K];
  for (int k = 0; k < K; ++k) a[k] = load(decay + k * kTile), h[k] = load(states + k * kTile);
  for (int64_t t = 0; t < count; ++t, B += pitch, C += pitch) {
    const Vec d = load(delta + t * kTile), in = load(input + t * kTile);
    Vec out = load(y + t * kTile);
    for (int k = 0; k < K; ++k) {
      h[k] = exp2_lanes(d * a[k]) * h[k] + in * B[k];
      out += h[k] * C[k];
    }
    store(y + t * kTile, out);
  }
  for (int k = 0; k < K; ++k) store(states + k * kTile, h[k]);
}

constexpr int kStates = 4;  // together: what the registers hold

void advance_all(const Geometry& g, int64_t count, int64_t vectors, const Packed& p, Buffers& b, float* states) {
  const float *B = b.rows + g.rank, *C = B + g.state;
  for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
    float *delta = b.delta[0] + v, *input = b.input[0] + v, *y = b.y[0] + v;
    int64_t n = 0;
    for (; n + kStates <= g.state; n += kStates)
      advance<kStates>(count, delta, input, y, B + n, C + n, g.pitch, p.decay + n * kTile + v, states + n * kTile + v);
    for (; n < g.state; ++n)
      advance<1>(count, delta, input, y, B + n, C + n, g.pitch, p.decay + n * kTile + v, states + n * kTile + v);
  }
}

struct Tensors {
  View x, delta, projected, y;  // no data in delta where it is expanded
  float* states;                // [batch][scan][chunk][state][channel], or null
};

void save_states(const Geometry& g, const float* from, int64_t lanes, float* to) {
  for (int64_t n = 0; n < g.state; ++n) std::copy_n(from + n * kTile, lanes, to + n * g.channels);
}

void forward_scan(const Geometry& g, const Path& path, const Tensors& m, const float* packed, int64_t image, int64_t k,
                  int64_t first, int64_t end, Buffers& b) {
  const int64_t steps = ceil_div(g.height, path.step) * ceil_div(g.width, path.step);
  const int64_t chunks = ceil_div(steps, kSteps), plane = g.state * g.channels, room = g.state * kTile;
  float* saved = m.states ? m.states + (image * g.scans + k) * (chunks + 1) * plane : nullptr;
  std::fill_n(b.states, (end - first) * room, 0.f);
  for (int64_t i = 0; i < chunks; ++i) {
    const Chunk chunk(path, g.height, g.width, i * kSteps);
    for (int64_t c = 0; c < g.columns; c += kLanes)
      load_group(m.projected, m.projected.at(image, k, c), chunk, std::min(kLanes, g.columns - c), b.rows + c, g.pitch);
    for (int64_t tile = first; tile < end; ++tile) {
      const int64_t lanes = g.lanes(tile), vectors = ceil_div(lanes, kLanes), channel = tile * kTile;
      const Packed p(g, packed + (k * g.tiles + tile) * g.parameters * kTile);
      float* states = b.states + (tile - first) * room;
      if (saved) save_states(g, states, lanes, saved + i * plane + channel);
      load_tile(m.x, m.x.at(image, k, channel), chunk, lanes, b.x);
      if (m.delta.data) load_tile(m.delta, m.delta.at(image, k, channel), chunk, lanes, b.delta);
      else expand(g, chunk.count, b.rows, p.weight, b.delta);
      (g.softplus ? prepare<true> : prepare<false>)(chunk.count, vectors, p, b);
      advance_all(g, chunk.count, vectors, p, b, states);
      store_tile(m.y, m.y.at(image, k, channel), chunk, lanes, m.y.scan == 0 && (g.adds || k > 0), b.y);
    }
  }
  for (int64_t tile = first; saved && tile < end; ++tile)
    save_states(g, b.states + (tile - first) * room, g.lanes(tile), saved + chunks * plane + tile * kTile);
}

void forward(const Geometry& g, const Path* paths, const Tensors& m, const Parameters& parameters) {
  const Floats packed = pack_parameters(g, parameters);
  const int64_t together = m.y.scan == 0 ? g.scans : 1, scan_tasks = g.scans / together;
  const int64_t wanted = ceil_div(kTasksPerThread * g.threads, g.batch * scan_tasks);
  const int64_t part = std::min(kMaxTiles, ceil_div(g.tiles, wanted)), parts = ceil_div(g.tiles, part);
  const int64_t row_floats = kSteps * g.pitch, room = row_floats + part * g.state * kTile;
  const Floats memory = allocate(room * g.threads);
#pragma omp parallel num_threads(static_cast<int>(g.threads))
  {
#ifdef _OPENMP
    float* own = memory.get() + omp_get_thread_num() * room;
#else
    float* own = memory.get();
#endif
    alignas(64) Buffers b = {};
    b.rows = own, b.states = own + row_floats;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < g.batch * scan_tasks * parts; ++task) {
      const int64_t first = task % parts * part, group = task / parts % scan_tasks, image = task / parts / scan_tasks;
      for (int64_t k = group * together; k < (group + 1) * together; ++k)
        forward_scan(g, paths[k], m, packed.get(), image, k, first, std::min(g.tiles, first + part), b);
    }
  }
}

template <typename Body>
int guard(const Scan& s, const Path* paths, Body body) {
  bool fits = s.threads > 0 && s.batch > 0 && s.scans > 0 && s.channels > 0 && s.height > 0 && s.width > 0;
  fits = fits && s.rank >= 0 && s.state > 0 && s.height * s.width <= INT32_MAX;
  for (int64_t k = 0; fits && k < s.scans; ++k) fits = paths[k].step > 0 && paths[k].row >= 0 && paths[k].column >= 0;
  if (!fits) return kBadGeometry;
  return run_guarded([&] { body(Geometry(s)); });
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int mixerzoo_scan_forward(const Scan* s, const Path* paths,
                                                                            const Tensors* tensors,
                                                                            const Parameters* parameters) {
  return guard(*s, paths, [&](const Geometry& g) { forward(g, paths, *tensors, *parameters); });
}
