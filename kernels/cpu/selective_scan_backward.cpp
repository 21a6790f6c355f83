// The gradients of the selective scan on the CPU. Called through ctypes.
//
// What is unusual:
// - Chunks are processed from the last to the first. The forward pass saves one state before each chunk; the others are
//   recomputed, a few states of eight channels at a time, into a buffer in the first-level cache.
// - The gradients of B, C and the low-rank factors of delta are sums over channels. They are accumulated with channels
//   in lanes over all channels of a task, and reduced across lanes once per chunk, eight columns at a time.
// - The work is divided by its shape alone, never by the number of threads, and partial results are summed in one
//   order.

#include "selective_scan.h"

namespace {

constexpr int64_t kMaxPartials = 32;  // partial sums over the batch, and tasks into which a small batch is cut
constexpr int64_t kLeastTiles = 4;    // minimum tiles per part of the channels: each part reduces across lanes

struct BackwardTensors {
  View x, delta, projected, grad, grad_x, grad_delta, grad_projected;
  float* states;
};

// The working set of a task: a chunk of one tile of channels, and sums over all its tiles.
struct Buffers {
  Tile x, delta, input, slope, grad;  // input: delta x; slope: of softplus
  Tile grad_delta, grad_input;
  Vec decays[kSteps][kStates], states[kSteps + 1][kStates];
  float* rows;         // the chunk's rows of `projected`
  float* grad_rows;    // gradients of `rows`
  float* lane_sums;    // `grad_rows` before the reduction across lanes, [step][column][lane]
  float* before;       // states before the chunk, [state][channel]
  float* state_grads;  // [tile][state][channel]
  Tile* raw_grads;     // of the chunk's delta before bias and softplus, for each tile
};

// From delta without its bias, compute delta, its slope, its product with x, and the part of x's gradient from D.
template <bool kSoftplus>
void prepare(int64_t count, const TileParameters& p, const TileParameters& sums, Buffers& b) {
  Vec grad_D[2] = {load(sums.D), load(sums.D + kLanes)};
  for (int64_t t = 0; t < count; ++t) {
    Vec raw[2], delta[2], z[2];
    for (int v = 0; v < 2; ++v) delta[v] = raw[v] = load(b.delta[t] + v * kLanes) + load(p.bias + v * kLanes);
    if (kSoftplus) softplus_lanes(delta, z);
    for (int v = 0; v < 2; ++v) {
      const int64_t c = v * kLanes;
      const Vec x = load(b.x[t] + c);
      store(b.delta[t] + c, delta[v]);
      store(b.input[t] + c, delta[v] * x);
      store(b.slope[t] + c, kSoftplus ? (raw[v] > 0.f ? splat(1.f) : z[v]) / (1.f + z[v]) : splat(1.f));
      grad_D[v] += load(b.grad[t] + c) * x;
    }
  }
  for (int v = 0; v < 2; ++v) store(sums.D + v * kLanes, grad_D[v]);
  std::fill_n(b.grad_delta[0], count * kTile, 0.f);
  std::fill_n(b.grad_input[0], count * kTile, 0.f);
}

// Recompute the states of a chunk: K of them before and after each step, and their decays.
template <int K>
inline void recompute(const Geometry& g, int64_t count, int64_t n, int64_t v, const TileParameters& p, Buffers& b) {
  const float* B = b.rows + g.rank + n;
  Vec a[K], h[K];
  for (int k = 0; k < K; ++k) {
    a[k] = load(p.A + (n + k) * kTile + v);
    b.states[0][k] = h[k] = load(b.before + (n + k) * kTile + v);
  }
  for (int64_t t = 0; t < count; ++t, B += g.pitch) {
    const Vec delta = load(b.delta[t] + v), input = load(b.input[t] + v);
    for (int k = 0; k < K; ++k) {
      const Vec decay = b.decays[t][k] = exp2_lanes(delta * a[k]);
      b.states[t + 1][k] = h[k] = decay * h[k] + input * B[k];
    }
  }
}

// Propagate the gradients of K states of eight channels back through a chunk.
template <int K>
inline void retreat(const Geometry& g, int64_t count, int64_t n, int64_t v, const TileParameters& p,
                    const TileParameters& sums, float* state_grads, Buffers& b) {
  Vec a[K], grad_h[K], grad_A[K];
  for (int k = 0; k < K; ++k) {
    const int64_t at = (n + k) * kTile + v;
    a[k] = load(p.A + at), grad_h[k] = load(state_grads + at), grad_A[k] = load(sums.A + at);
  }
  for (int64_t t = count - 1; t >= 0; --t) {
    const float *B = b.rows + t * g.pitch + g.rank + n, *C = B + g.state;
    float* grad_B = b.lane_sums + (t * g.pitch + g.rank + n) * kLanes;
    float* grad_C = grad_B + g.state * kLanes;
    const Vec grad = load(b.grad[t] + v), delta = load(b.delta[t] + v), input = load(b.input[t] + v);
    Vec grad_delta = {}, grad_input = {};
    for (int k = 0; k < K; ++k) {
      store(grad_C + k * kLanes, load(grad_C + k * kLanes) + grad * b.states[t + 1][k]);
      grad_h[k] += grad * C[k];
      store(grad_B + k * kLanes, load(grad_B + k * kLanes) + grad_h[k] * input);
      grad_input += grad_h[k] * B[k];
      grad_h[k] *= b.decays[t][k];
      const Vec grad_exponent = grad_h[k] * b.states[t][k];
      grad_A[k] += grad_exponent * delta;
      grad_delta += grad_exponent * a[k];
    }
    store(b.grad_delta[t] + v, load(b.grad_delta[t] + v) + grad_delta);
    store(b.grad_input[t] + v, load(b.grad_input[t] + v) + grad_input);
  }
  for (int k = 0; k < K; ++k) {
    const int64_t at = (n + k) * kTile + v;
    store(state_grads + at, grad_h[k]), store(sums.A + at, grad_A[k]);
  }
}

void retreat_all(const Geometry& g, int64_t count, int64_t lanes, const TileParameters& p, const TileParameters& sums,
                 float* state_grads, Buffers& b) {
  for (int64_t v = 0; v < lanes; v += kLanes) {
    int64_t n = 0;
    for (; n + kStates <= g.state; n += kStates) {
      recompute<kStates>(g, count, n, v, p, b);
      retreat<kStates>(g, count, n, v, p, sums, state_grads, b);
    }
    for (; n < g.state; ++n) {
      recompute<1>(g, count, n, v, p, b);
      retreat<1>(g, count, n, v, p, sums, state_grads, b);
    }
  }
}

// Turn the gradients of delta and delta x into those of delta before its bias and of x.
void finish(int64_t count, const TileParameters& p, const TileParameters& sums, Buffers& b, Tile& raw_grads) {
  for (int64_t v = 0; v < kTile; v += kLanes) {
    const Vec D = load(p.D + v);
    Vec grad_bias = load(sums.bias + v);
    for (int64_t t = 0; t < count; ++t) {
      const Vec grad_input = load(b.grad_input[t] + v);
      const Vec raw = (load(b.grad_delta[t] + v) * kLog2 + grad_input * load(b.x[t] + v)) * load(b.slope[t] + v);
      store(b.grad_input[t] + v, grad_input * load(b.delta[t] + v) + D * load(b.grad[t] + v));
      store(raw_grads[t] + v, raw);
      grad_bias += raw;
    }
    store(sums.bias + v, grad_bias);
  }
}

// Add to R rows of the weight of a tile: sum over t of raw_grads[t] rows[t][r].
template <int R>
inline void add_weight_grads(int64_t count, const Tile& raw_grads, const float* rows, int64_t pitch, float* sums) {
  Vec sum[R][2];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) sum[r][v] = load(sums + r * kTile + v * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    const Vec left = load(raw_grads[t]), right = load(raw_grads[t] + kLanes);
    for (int r = 0; r < R; ++r) {
      sum[r][0] += left * rows[t * pitch + r];
      sum[r][1] += right * rows[t * pitch + r];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) store(sums + r * kTile + v * kLanes, sum[r][v]);
}

// Compute the lane sums of R low-rank columns of N steps: over all tiles, raw_grads[t] weight[r].
template <int N, int R>
inline void fold_low_rank(const Geometry& g, int64_t tiles, const Tile* raw_grads, int64_t t, const float* weight,
                          float* lane_sums) {
  Vec sum[N][R] = {};
  for (int64_t tile = 0; tile < tiles; ++tile, weight += g.parameters * kTile)
    for (int64_t v = 0; v < kTile; v += kLanes)
      for (int r = 0; r < R; ++r) {
        const Vec w = load(weight + r * kTile + v);
        for (int n = 0; n < N; ++n) sum[n][r] += w * load(raw_grads[tile][t + n] + v);
      }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) store(lane_sums + (n * g.pitch + r) * kLanes, sum[n][r]);
}

void fold_low_ranks(const Geometry& g, int64_t count, int64_t tiles, const TileParameters& first, const Buffers& b) {
  for (int64_t t = 0; t < count; t += 4) {  // steps past the last contain garbage that is never read
    float* lane_sums = b.lane_sums + t * g.pitch * kLanes;
    int64_t r = 0;
    for (; r + 2 <= g.rank; r += 2)
      fold_low_rank<4, 2>(g, tiles, b.raw_grads, t, first.weight + r * kTile, lane_sums + r * kLanes);
    if (r < g.rank) fold_low_rank<4, 1>(g, tiles, b.raw_grads, t, first.weight + r * kTile, lane_sums + r * kLanes);
  }
}

// Reduce the lanes of eight columns at a time.
void fold_lanes(const Geometry& g, int64_t count, const float* lane_sums, float* rows) {
  for (int64_t c = 0; c < count * g.pitch; c += kLanes) {
    Vec tile[8];
    for (int i = 0; i < 8; ++i) tile[i] = load(lane_sums + (c + i) * kLanes);
    transpose_tile(tile);
    store(rows + c, ((tile[0] + tile[4]) + (tile[2] + tile[6])) + ((tile[1] + tile[5]) + (tile[3] + tile[7])));
  }
}

// The position of a task, and the destination of its sums.
struct Task {
  int64_t image, scan, first, end;  // tiles [first, end)
  float* sums;                      // sums of all parameters, in packed layout
  View grad_projected;
};

void load_states(const Geometry& g, const float* from, int64_t tile, float* to) {
  std::fill_n(to, g.state * kTile, 0.f);
  for (int64_t n = 0; n < g.state; ++n)
    std::copy_n(from + n * g.channels + tile * kTile, g.lanes(tile), to + n * kTile);
}

void go_back_tile(const Geometry& g, const BackwardTensors& m, const Task& task, float* packed, const Chunk& chunk,
                  const float* saved, int64_t tile, Buffers& b) {
  const TileParameters p(g, packed, task.scan, tile), sums(g, task.sums, task.scan, tile);
  const int64_t lanes = g.lanes(tile), channel = tile * kTile, image = task.image, k = task.scan;
  Tile& raw_grads = b.raw_grads[tile - task.first];
  load_states(g, saved, tile, b.before);
  load_tile(m.x, m.x.at(image, k, channel), chunk, lanes, b.x);
  load_tile(m.grad, m.grad.at(image, k, channel), chunk, lanes, b.grad);
  load_delta(g, m.delta, image, k, tile, chunk, b.rows, p.weight, b.delta);
  (g.softplus ? prepare<true> : prepare<false>)(chunk.count, p, sums, b);
  retreat_all(g, chunk.count, lanes, p, sums, b.state_grads + (tile - task.first) * g.state * kTile, b);
  finish(chunk.count, p, sums, b, raw_grads);
  const bool adds = m.grad_x.scan == 0 && k > 0;
  (adds ? store_tile<true> : store_tile<false>)(m.grad_x, m.grad_x.at(image, k, channel), chunk, lanes, b.grad_input);
  if (m.delta.data) store_tile<false>(m.grad_delta, m.grad_delta.at(image, k, channel), chunk, lanes, raw_grads);
  int64_t r = 0;
  for (; r + 4 <= g.rank; r += 4)
    add_weight_grads<4>(chunk.count, raw_grads, b.rows + r, g.pitch, sums.weight + r * kTile);
  for (; r < g.rank; ++r)
    add_weight_grads<1>(chunk.count, raw_grads, b.rows + r, g.pitch, sums.weight + r * kTile);
}

void go_back(const Geometry& g, const Path& path, const BackwardTensors& m, const Task& task, float* packed,
             Buffers& b) {
  const int64_t image = task.image, k = task.scan, tiles = task.end - task.first;
  const float* saved = g.states_of(m.states, path, image, k);
  const bool adds = task.grad_projected.scan == 0 && k > 0;
  std::fill_n(b.state_grads, tiles * g.state * kTile, 0.f);
  for (int64_t i = g.chunks(path) - 1; i >= 0; --i) {
    const Chunk chunk(path, g.height, g.width, i * kSteps);
    load_projected(g, m.projected, image, k, chunk, b.rows);
    std::fill_n(b.lane_sums, chunk.count * g.pitch * kLanes, 0.f);
    for (int64_t tile = task.first; tile < task.end; ++tile)
      go_back_tile(g, m, task, packed, chunk, saved + i * g.plane(), tile, b);
    fold_low_ranks(g, chunk.count, tiles, TileParameters(g, packed, k, task.first), b);
    fold_lanes(g, chunk.count, b.lane_sums, b.grad_rows);
    for (int64_t c = 0; c < g.columns; c += kLanes)
      (adds ? store_group<true> : store_group<false>)(task.grad_projected, task.grad_projected.at(image, k, c), chunk,
                                                      std::min(kLanes, g.columns - c), b.grad_rows + c, g.pitch);
  }
}

// Divides the work: by images, by scans if they write nothing in common, and for small batches by channels. Each
// division has its own sums of the parameters' gradients, each part of the channels its own gradient of `projected`.
struct Division {
  int64_t partials, together, groups, parts, part;  // together: scans per task; part: tiles per task

  Division(const Geometry& g, const BackwardTensors& m) {
    partials = std::min(g.batch, kMaxPartials);
    together = m.grad_x.scan == 0 || m.grad_projected.scan == 0 ? g.scans : 1;
    groups = g.scans / together;
    const int64_t wanted = std::min(ceil_div(g.tiles, kLeastTiles), ceil_div(kMaxPartials, partials * groups));
    part = ceil_div(g.tiles, wanted);
    parts = ceil_div(g.tiles, part);
  }
};

// Transpose [count][16] to rows [channel][count] of up to 16 channels.
void unpack_rows(const float* from, int64_t count, int64_t channels, float* to) {
  for (int64_t c = 0; to && c < channels; ++c)
    for (int64_t r = 0; r < count; ++r) to[c * count + r] = from[r * kTile + c];
}

// Sum the partial gradients of the parameters.
void add_up_parameters(const Geometry& g, int64_t partials, float* sums, const Parameters& to) {
  const int64_t floats = g.parameters * kTile, all = g.scans * g.tiles * floats;
#pragma omp parallel for num_threads(static_cast<int>(g.threads)) schedule(static)
  for (int64_t i = 0; i < g.scans * g.tiles; ++i) {
    float* sum = sums + i * floats;
    for (int64_t p = 1; p < partials; ++p)
      for (int64_t j = 0; j < floats; ++j) sum[j] += sum[p * all + j];
    const int64_t k = i / g.tiles, tile = i % g.tiles, channel = k * g.channels + tile * kTile, lanes = g.lanes(tile);
    const TileParameters from(g, sums, k, tile);
    unpack_rows(from.weight, g.rank, lanes, to.weight ? to.weight + channel * g.rank : nullptr);
    unpack_rows(from.A, g.state, lanes, to.A + channel * g.state);
    unpack_rows(from.bias, 1, lanes, to.bias ? to.bias + channel : nullptr);
    unpack_rows(from.D, 1, lanes, to.D ? to.D + channel : nullptr);
  }
}

// Gradients of `projected` per part of the channels, if there are several parts.
struct ProjectedParts {
  int64_t slots, row, size;  // row and size: floats per pixel and per part
  Floats memory;

  ProjectedParts(const Geometry& g, const View& to, int64_t parts)
      : slots(to.scan == 0 ? 1 : g.scans), row(slots * g.columns), size(g.batch * g.height * g.width * row) {
    if (parts == 1) return;
    memory = allocate(parts * size);
    if (g.gaps) std::fill_n(memory.get(), parts * size, 0.f);
  }

  View view(const Geometry& g, const View& to, int64_t part) const {
    if (!memory) return to;
    return {memory.get() + part * size, g.height * g.width * row, row, slots == 1 ? 0 : g.columns, 1};
  }

  void add_up(const Geometry& g, const View& to, int64_t parts) const {
    const int64_t pixels = g.height * g.width;
#pragma omp parallel for num_threads(static_cast<int>(g.threads)) schedule(static)
    for (int64_t i = 0; i < g.batch * pixels; ++i)
      for (int64_t j = 0; j < row; ++j) {
        float sum = memory[i * row + j];
        for (int64_t p = 1; p < parts; ++p) sum += memory[p * size + i * row + j];
        to.at(i / pixels, j / g.columns, j % g.columns)[i % pixels * to.pixel] = sum;
      }
  }
};

void backward(const Geometry& g, const Path* paths, const BackwardTensors& m, const Parameters& parameters,
              const Parameters& grads) {
  const Division d(g, m);
  const Floats packed = pack_parameters(g, parameters);
  const int64_t parameter_floats = g.scans * g.tiles * g.parameters * kTile;
  const Floats sums = allocate(d.partials * parameter_floats);
  std::fill_n(sums.get(), d.partials * parameter_floats, 0.f);
  const ProjectedParts projected(g, m.grad_projected, d.parts);
  const int64_t row_floats = kSteps * g.pitch, state_floats = g.state * kTile, tile_floats = kSteps * kTile;
  const int64_t room = row_floats * (2 + kLanes) + (d.part + 1) * state_floats + d.part * tile_floats;
  const Floats memory = allocate(room * g.threads);
#pragma omp parallel num_threads(static_cast<int>(g.threads))
  {
    alignas(64) Buffers b;
    b.raw_grads = reinterpret_cast<Tile*>(thread_room(memory.get(), room));
    std::fill_n(b.raw_grads[0][0], d.part * tile_floats, 0.f);
    b.before = b.raw_grads[d.part][0], b.state_grads = b.before + state_floats;
    b.rows = b.state_grads + d.part * state_floats, b.grad_rows = b.rows + row_floats;
    b.lane_sums = b.grad_rows + row_floats;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < d.partials * d.groups * d.parts; ++i) {
      const int64_t part = i % d.parts, group = i / d.parts % d.groups, partial = i / d.parts / d.groups;
      Task task = {0, 0, part * d.part, std::min(g.tiles, (part + 1) * d.part),
                   sums.get() + partial * parameter_floats, projected.view(g, m.grad_projected, part)};
      for (task.image = partial; task.image < g.batch; task.image += d.partials)
        for (task.scan = group * d.together; task.scan < (group + 1) * d.together; ++task.scan)
          go_back(g, paths[task.scan], m, task, packed.get(), b);
    }
  }
  add_up_parameters(g, d.partials, sums.get(), grads);
  if (d.parts > 1) projected.add_up(g, m.grad_projected, d.parts);
}

}  // namespace

// parameters: the inputs, then their gradients.
extern "C" __attribute__((visibility("default"))) int mixerzoo_scan_backward(const Scan* s, const Path* paths,
                                                                             const BackwardTensors* tensors,
                                                                             const Parameters* parameters) {
  return guard(*s, paths, [&](const Geometry& g) { backward(g, paths, *tensors, parameters[0], parameters[1]); });
}
