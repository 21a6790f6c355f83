// Shared by the forward and backward pass of the selective scan: sizes, exp and softplus, and parameters per tile.

#pragma once

#include <algorithm>
#include <cstdint>
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"
#include "memory.h"
#include "scan.h"

namespace {

struct Scan {
  int64_t threads, batch, scans, channels, rank, state, height, width, softplus;
  int64_t gaps;  // whether some path skips pixels: the output maps are then zero-initialised
};

// Contiguous: [scan][channel][rank], [scan][channel], [scan][channel][state], [scan][channel]. All but A may be null.
struct Parameters {
  float *weight, *bias, *A, *D;
};

struct Geometry : Scan {
  int64_t columns, pitch, tiles, parameters;  // width and pitch of a row of `projected`; tiles; parameter rows per tile

  explicit Geometry(const Scan& s) : Scan(s) {
    columns = rank + 2 * state;
    pitch = round_up(columns, kLanes);
    tiles = ceil_div(channels, kTile);
    parameters = rank + state + 2;
  }

  int64_t lanes(int64_t tile) const { return std::min(kTile, channels - tile * kTile); }
  int64_t chunks(const Path& path) const {
    return ceil_div(ceil_div(height, path.step) * ceil_div(width, path.step), kSteps);
  }
  // Number of floats of the states of all channels, in an array [batch][scan][chunk and the end][state][channel].
  int64_t plane() const { return state * channels; }
  float* states_of(float* states, const Path& path, int64_t image, int64_t k) const {
    return states + (image * scans + k) * (chunks(path) + 1) * plane();
  }
};

// Number of states of eight channels that advance through a chunk together: as many as the registers hold.
constexpr int kStates = 4;
constexpr float kLog2E = 1.44269504f, kLog2 = 0.693147181f;

inline float* thread_room(float* memory, int64_t room) {
#ifdef _OPENMP
  return memory + omp_get_thread_num() * room;
#else
  return memory;
#endif
}

// Return 2^x: zero below -127, infinite from 128; NaN stays NaN.
inline Vec exp2_lanes(Vec x) {
  const float shifter = 12582912.f;  // as in exp_lanes
  const Vec low = splat(-127.f), high = splat(128.f);
#ifdef __AVX__
  x = _mm256_min_ps(high, _mm256_max_ps(low, x));  // min and max return the second operand if one is NaN
#else
  x = x < low ? low : x;
  x = x > high ? high : x;
#endif
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

// Replace x by log(1 + exp(x)), with a small relative error even for tiny results, and z by exp(-|x|). N vectors are
// processed together, so that their long dependency chains overlap.
template <int N>
inline void softplus_lanes(Vec (&x)[N], Vec (&z)[N]) {
  constexpr float kTerms[] = {-3.00658457e-2f, 7.92046189e-2f, -1.37538090e-1f, 1.91536576e-1f,
                              -2.48571649e-1f, 3.33213240e-1f, -4.99996483e-1f, 1.f};
  Vec p[N];
  for (int n = 0; n < N; ++n) z[n] = exp_lanes(-magnitude(x[n])), p[n] = splat(5.36483806e-3f);
  for (float term : kTerms)  // log(1 + z) / z on [0, 1], relative error 3e-8, exact at 0
    for (int n = 0; n < N; ++n) p[n] = p[n] * z[n] + term;
  for (int n = 0; n < N; ++n) x[n] = p[n] * z[n] + (x[n] > 0.f ? x[n] : Vec{});
}

// A tile's parameters in rows of 16 channels; A is in units of log 2, for `exp2_lanes`.
struct TileParameters {
  float *weight, *A, *bias, *D;

  TileParameters(const Geometry& g, float* tiles, int64_t k, int64_t tile)
      : weight(tiles + (k * g.tiles + tile) * g.parameters * kTile),
        A(weight + g.rank * kTile),
        bias(A + g.state * kTile),
        D(bias + kTile) {}
};

// Transpose rows [channel][count] of up to 16 channels to [count][16], padded with zeros.
inline void pack_rows(const float* from, int64_t count, int64_t channels, float* to) {
  std::fill_n(to, count * kTile, 0.f);
  for (int64_t c0 = 0; from && c0 < channels; c0 += kLanes) {
    int64_t r = 0;
    for (; channels - c0 >= kLanes && r + kLanes <= count; r += kLanes)
      transpose_pixels(from + c0 * count + r, count, 1, to + r * kTile + c0, kTile);
    for (; r < count; ++r)
      for (int64_t c = c0; c < std::min(channels, c0 + kLanes); ++c) to[r * kTile + c] = from[c * count + r];
  }
}

// Pack all parameters to [scan][tile][row][16 channels].
inline Floats pack_parameters(const Geometry& g, const Parameters& from) {
  Floats packed = allocate(g.scans * g.tiles * g.parameters * kTile);
#pragma omp parallel for num_threads(static_cast<int>(g.threads)) schedule(static)
  for (int64_t i = 0; i < g.scans * g.tiles; ++i) {
    const int64_t k = i / g.tiles, tile = i % g.tiles, channel = k * g.channels + tile * kTile, lanes = g.lanes(tile);
    const TileParameters to(g, packed.get(), k, tile);
    pack_rows(from.weight ? from.weight + channel * g.rank : nullptr, g.rank, lanes, to.weight);
    pack_rows(from.A + channel * g.state, g.state, lanes, to.A);
    for (int64_t n = 0; n < g.state * kTile; ++n) to.A[n] *= kLog2E;
    pack_rows(from.bias ? from.bias + channel : nullptr, 1, lanes, to.bias);
    pack_rows(from.D ? from.D + channel : nullptr, 1, lanes, to.D);
  }
  return packed;
}

// Compute delta[t] = sum over r of rows[t][r] weight[r], N steps at a time.
template <int N>
inline void expand_steps(int64_t rank, const float* rows, int64_t pitch, const float* weight, float* delta) {
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

// Load or expand delta of a chunk, without bias.
inline void load_delta(const Geometry& g, const View& view, int64_t image, int64_t k, int64_t tile, const Chunk& chunk,
                       const float* rows, const float* weight, Tile delta) {
  if (view.data) return load_tile(view, view.at(image, k, tile * kTile), chunk, g.lanes(tile), delta);
  int64_t t = 0;
  for (; t + 4 <= chunk.count; t += 4) expand_steps<4>(g.rank, rows + t * g.pitch, g.pitch, weight, delta[t]);
  for (; t < chunk.count; ++t) expand_steps<1>(g.rank, rows + t * g.pitch, g.pitch, weight, delta[t]);
}

// Load a chunk's rows of `projected`.
inline void load_projected(const Geometry& g, const View& view, int64_t image, int64_t k, const Chunk& chunk,
                           float* rows) {
  for (int64_t c = 0; c < g.columns; c += kLanes)
    load_group(view, view.at(image, k, c), chunk, std::min(kLanes, g.columns - c), rows + c, g.pitch);
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
