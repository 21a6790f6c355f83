// The selective scan on the CPU, h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t, y_t = C_t . h_t + D x_t, over maps
// along given paths, float32. Called through ctypes. The gradients are in selective_scan_backward.cpp.
//
// What is unusual:
// - Lanes are channels and steps are sequential: no prefix sum, no shuffle, no sum over lanes. The states
//   of a chunk of 32 steps stay in registers, a few at a time. All else is in small tiles in the first-level
//   cache, into which maps are copied chunk by chunk (and transposed, if pixels are adjacent in memory).
// - No sequence is materialised: a scan reads and writes the map along its path. If the scans are summed, one task runs
//   all scans of its channels, one after the other; delta is expanded from its low-rank factors on the way.
// - Results are deterministic, independent of the number of threads: each sum is computed by one thread in one order.

#include "selective_scan.h"

namespace {

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMaxTiles = 16;  // per task: the next chunk's inputs should stay in the second-level cache

struct ForwardTensors {
  View x, delta, projected, y;  // delta has no data if it is expanded
  float* states;                // after every chunk, or null
};

// The working set of a task: a chunk of one tile of channels.
struct Buffers {
  Tile x, delta, input, y;  // input: delta x
  float *rows, *states;     // the chunk's rows of `projected`; [tile][state][channel]
};

// From delta without its bias, compute delta, its product with x, and the part of y that bypasses the scan.
template <bool kSoftplus>
void prepare(int64_t count, const TileParameters& p, Buffers& b) {
  constexpr int kTogether = 4;  // vectors
  for (int64_t i = 0; i < count * kTile; i += kTogether * kLanes) {
    Vec delta[kTogether], z[kTogether];
    for (int k = 0; k < kTogether; ++k) delta[k] = load(b.delta[0] + i + k * kLanes) + load(p.bias + k % 2 * kLanes);
    if (kSoftplus) softplus_lanes(delta, z);
    for (int k = 0; k < kTogether; ++k) {
      const int64_t at = i + k * kLanes;
      const Vec x = load(b.x[0] + at);
      store(b.delta[0] + at, delta[k]);
      store(b.input[0] + at, delta[k] * x);
      store(b.y[0] + at, load(p.D + k % 2 * kLanes) * x);
    }
  }
}

// Advance K states of eight channels through a chunk. B and C are rows of `pitch` floats, everything else tile rows.
template <int K>
inline void advance(int64_t count, const float* delta, const float* input, const float* B, const float* C,
                    int64_t pitch, const float* A, float* y, float* states) {
  Vec a[K], h[K];
  for (int k = 0; k < K; ++k) a[k] = load(A + k * kTile), h[k] = load(states + k * kTile);
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

void advance_all(const Geometry& g, int64_t count, int64_t lanes, const TileParameters& p, Buffers& b, float* states) {
  const float *B = b.rows + g.rank, *C = B + g.state;
  for (int64_t v = 0; v < lanes; v += kLanes) {
    const float *delta = b.delta[0] + v, *input = b.input[0] + v;
    const auto walk = [&](auto advance_some, int64_t n) {
      advance_some(count, delta, input, B + n, C + n, g.pitch, p.A + n * kTile + v, b.y[0] + v, states + n * kTile + v);
    };
    int64_t n = 0;
    for (; n + kStates <= g.state; n += kStates) walk(advance<kStates>, n);
    for (; n < g.state; ++n) walk(advance<1>, n);
  }
}

void save_states(const Geometry& g, const float* from, int64_t tile, float* to) {
  for (int64_t n = 0; n < g.state; ++n)
    std::copy_n(from + n * kTile, g.lanes(tile), to + n * g.channels + tile * kTile);
}

// Run one scan over the channels of tiles [first, end).
void scan_tiles(const Geometry& g, const Path& path, const ForwardTensors& m, float* packed, int64_t image, int64_t k,
                int64_t first, int64_t end, Buffers& b) {
  const int64_t chunks = g.chunks(path), room = g.state * kTile;
  float* saved = m.states ? g.states_of(m.states, path, image, k) : nullptr;
  const bool adds = m.y.scan == 0 && k > 0;
  std::fill_n(b.states, (end - first) * room, 0.f);
  for (int64_t i = 0; i < chunks; ++i) {
    const Chunk chunk(path, g.height, g.width, i * kSteps);
    load_projected(g, m.projected, image, k, chunk, b.rows);
    for (int64_t tile = first; tile < end; ++tile) {
      const TileParameters p(g, packed, k, tile);
      const int64_t lanes = g.lanes(tile), channel = tile * kTile;
      float* states = b.states + (tile - first) * room;
      if (saved) save_states(g, states, tile, saved + i * g.plane());
      load_tile(m.x, m.x.at(image, k, channel), chunk, lanes, b.x);
      load_delta(g, m.delta, image, k, tile, chunk, b.rows, p.weight, b.delta);
      (g.softplus ? prepare<true> : prepare<false>)(chunk.count, p, b);
      advance_all(g, chunk.count, lanes, p, b, states);
      (adds ? store_tile<true> : store_tile<false>)(m.y, m.y.at(image, k, channel), chunk, lanes, b.y);
    }
  }
  for (int64_t tile = first; saved && tile < end; ++tile)
    save_states(g, b.states + (tile - first) * room, tile, saved + chunks * g.plane());
}

void forward(const Geometry& g, const Path* paths, const ForwardTensors& m, const Parameters& parameters) {
  const Floats packed = pack_parameters(g, parameters);
  const int64_t together = m.y.scan == 0 ? g.scans : 1, groups = g.scans / together;
  const int64_t wanted = ceil_div(g.threads > 1 ? kTasksPerThread * g.threads : 1, g.batch * groups);
  const int64_t part = std::min(kMaxTiles, ceil_div(g.tiles, wanted)), parts = ceil_div(g.tiles, part);
  const int64_t row_floats = kSteps * g.pitch, room = row_floats + part * g.state * kTile;
  const Floats memory = allocate(room * g.threads);
#pragma omp parallel num_threads(static_cast<int>(g.threads))
  {
    alignas(64) Buffers b;
    b.rows = thread_room(memory.get(), room), b.states = b.rows + row_floats;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < g.batch * groups * parts; ++task) {
      const int64_t first = task % parts * part, group = task / parts % groups, image = task / parts / groups;
      for (int64_t k = group * together; k < (group + 1) * together; ++k)
        scan_tiles(g, paths[k], m, packed.get(), image, k, first, std::min(g.tiles, first + part), b);
    }
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int mixerzoo_scan_forward(const Scan* s, const Path* paths,
                                                                            const ForwardTensors* tensors,
                                                                            const Parameters* parameters) {
  return guard(*s, paths, [&](const Geometry& g) { forward(g, paths, *tensors, *parameters); });
}
