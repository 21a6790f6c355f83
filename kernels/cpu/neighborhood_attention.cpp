// Neighborhood attention on the CPU: forward and backward, float32, any head_dim, window, stride, dilation and mix of
// causal axes. The window arithmetic is that of kernels/neighborhood_attention/_geometry.py. Called through ctypes.
//
// What is unusual:
// - One routine serves three passes. A pass visits its "near" points (queries in the forward pass and for dq, keys for
//   dk and dv) and gathers over the "far" points paired with each. The queries that see a key are contiguous on every
//   axis, as the keys of a query are, so the gradients of keys and values are gathered too. There are no atomics, every
//   result is written once, and results are deterministic, independent of the number of threads.
// - Dilated maps are split into their lattices. A slice is one lattice of one head of one image, and is plain undilated
//   attention. The far points of a few slices at a time (a wave) are copied twice: transposed, [row][dim][x], so that
//   eight scores take one fused multiply-add per channel and no sum across lanes; and untransposed, [row][x][dim], for
//   the weighted average.
// - Neighbouring near points share their loads: windows of up to seven columns, two at a time, fill eight lanes
//   exactly.
// - Columns outside a window are computed with their tile of eight, then masked, never multiplied by zero, so that a
//   NaN there does not propagate.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "copies.h"
#include "lanes.h"
#include "memory.h"
#include "neighborhood.h"

namespace {

// The far rows seen by the near points of a row, and one thread's buffers for their scores.
struct Reach {
  std::vector<int64_t> rows, bias, tiles;  // far rows; their offsets in a bias table; offsets of their tiles
  int64_t row_count = 0, tile_count = 0, columns = 0, room = 0;
  Floats scores, grads;  // [group][Q][row][column], `room` floats per group

  // List the tiles of `row_count` rows for groups that see `group_columns` columns; a group adds its first column.
  void aim(int64_t group_columns, const Layout& layout) {
    if (columns == group_columns) return;
    columns = group_columns;
    tile_count = 0;
    for (int64_t r = 0; r < row_count; ++r)
      for (int64_t c = 0; c < columns; c += kLanes) tiles[tile_count++] = rows[r] * layout.transposed_row + c;
  }
};

// scores[q][t][lane] = sum over d of near[q][d] * columns[tiles[t] + d * pitch + lane], for T tiles from `first`
template <int Q, int T>
inline void dot_tiles(Points near, const float* columns, const Reach& reach, int64_t first, const Layout& layout,
                      float* scores) {
  const float *point[Q], *tile[T];
  Vec sum[Q][T] = {};
  for (int q = 0; q < Q; ++q) point[q] = near[q];
  for (int t = 0; t < T; ++t) tile[t] = columns + reach.tiles[first + t];
  for (int64_t d = 0, i = 0; d < layout.dim; ++d, i += layout.pitch)
    for (int t = 0; t < T; ++t) {
      const Vec far = load_once(tile[t] + i);
      for (int q = 0; q < Q; ++q) sum[q][t] += point[q][d] * far;
    }
  for (int q = 0; q < Q; ++q)
    for (int t = 0; t < T; ++t) store(scores + (q * reach.tile_count + first + t) * kLanes, sum[q][t]);
}

template <int Q, int T>
inline void dot_last_tiles(Points near, const float* columns, const Reach& reach, int64_t first, const Layout& layout,
                           float* scores) {
  if constexpr (T > 0) {
    if (reach.tile_count - first == T) return dot_tiles<Q, T>(near, columns, reach, first, layout, scores);
    dot_last_tiles<Q, T - 1>(near, columns, reach, first, layout, scores);
  }
}

template <int Q>
void dot(Points near, const float* columns, const Reach& reach, const Layout& layout, float* scores) {
  constexpr int T = 8 / Q;  // eight sums hide the latency of a fused multiply-add
  int64_t t = 0;
  for (; t + T <= reach.tile_count; t += T) dot_tiles<Q, T>(near, columns, reach, t, layout, scores);
  dot_last_tiles<Q, T - 1>(near, columns, reach, t, layout, scores);
}

// Add weights[q][c] * values[c] to sum[q], over a run of columns of one row, for N vectors of channels.
template <int Q, int N>
inline void add_columns(const float* const* weights, const float* values, int64_t width, int64_t begin, int64_t end,
                        Vec (*sum)[N]) {
  for (int64_t c = begin; c < end; ++c)
    for (int n = 0; n < N; ++n) {
      const Vec value = load_once(values + c * width + n * kLanes);
      for (int q = 0; q < Q; ++q) sum[q][n] += weights[q][c] * value;
    }
}

// Compute out[q] = factor[q] * sum over q's window of weights[q] * values, for N vectors of channels from `channel`.
template <int Q, int N>
inline void average_channels(const Group& group, const Reach& reach, const Layout& layout, int64_t channel,
                             const float* weights, const float* values, const float* factor, Points out) {
  Vec sum[Q][N] = {};
  for (int64_t r = 0; r < reach.row_count; ++r) {
    const float* row = values + reach.rows[r] * layout.plain_row + group.start * layout.width + channel;
    const float* w[2] = {weights + r * group.columns, weights + (reach.row_count + r) * group.columns};
    if constexpr (Q == 1) {
      add_columns<1>(w, row, layout.width, 0, group.end[0], sum);
    } else {  // columns seen by the first only, by both, by the second only
      add_columns<1>(w, row, layout.width, 0, std::min(group.begin[1], group.end[0]), sum);
      add_columns<2>(w, row, layout.width, group.begin[1], group.end[0], sum);
      add_columns<1>(w + 1, row, layout.width, std::max(group.begin[1], group.end[0]), group.end[1], sum + 1);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < N; ++n) {
      const Vec result = factor[q] * sum[q][n];
      const int64_t d = channel + n * kLanes, left = layout.dim - d;
      if (left >= kLanes) store(out[q] + d, result);
      else std::memcpy(out[q] + d, &result, sizeof(float) * left);
    }
}

template <int Q>
void average(const Group& group, const Reach& reach, const Layout& layout, const float* weights, const float* values,
             const float* factor, Points out) {
  for (int64_t d = 0; d < layout.width; d += 4 * kLanes) switch ((layout.width - d) / kLanes) {
      case 1:
        average_channels<Q, 1>(group, reach, layout, d, weights, values, factor, out);
        break;
      case 2:
        average_channels<Q, 2>(group, reach, layout, d, weights, values, factor, out);
        break;
      case 3:
        average_channels<Q, 3>(group, reach, layout, d, weights, values, factor, out);
        break;
      default:
        average_channels<Q, 4>(group, reach, layout, d, weights, values, factor, out);
    }
}

enum class Kind { kForward, kQueryGrad, kKeyGrad };

// near_a . far_a are the scores, near_b . far_b the gradients of the probabilities. out_a is a weighted average
// of the far points of a (in the forward pass of b, the values), out_b of those of b. lse and delta belong to queries,
// near or far.
struct Operands {
  View near_a, near_b, far_a, far_b, lse, delta, out_a, out_b;
  const float* rpb;
  float* grad_rpb;
};

template <Kind kind>
class Pass {
  static constexpr bool kForward = kind == Kind::kForward, kNearKeys = kind == Kind::kKeyGrad;
  static constexpr int64_t kUnitPoints = 64;      // approximate near points per unit of work
  static constexpr int64_t kMaxUnits = 512;       // approximate units per slice: each keeps a table of gradients
  static constexpr int64_t kChunk = 8;            // groups that execute each step together
  static constexpr int64_t kCopyColumns = 256;    // far columns copied by one unit
  static constexpr int64_t kUnitsPerThread = 8;   // minimum units in a wave, for load balance
  static constexpr int64_t kWaveFloats = 262144;  // or floats, so that small slices synchronise less often

  const Geometry& g_;
  const Operands& o_;
  const float scale_;
  const Layout layout_;
  const Neighborhood near_;
  const BiasTable bias_;
  const int64_t column_units_, rows_per_unit_, row_units_, copy_units_, slices_;
  int64_t slot_floats_ = 0, wave_ = 0, table_floats_ = 0;
  int64_t columns_a_ = 0, columns_b_ = 0, plain_a_ = 0, plain_b_ = 0, lse_ = 0, delta_ = 0;  // offsets in a slot
  Floats slots_, table_grads_;        // [slot][...], [slot][unit][table]
  std::vector<double> table_totals_;  // [head][table]
  std::vector<Reach> reaches_;        // one per thread

  void lay_out_slot() {
    const auto place = [this](bool needed, int64_t row) {
      const int64_t start = slot_floats_;
      slot_floats_ += needed ? round_up(layout_.rows * row, 16) : 0;
      return start;
    };
    columns_a_ = place(true, layout_.transposed_row);
    columns_b_ = place(!kForward, layout_.transposed_row);
    plain_a_ = place(!kForward, layout_.plain_row);
    plain_b_ = place(kForward || kNearKeys, layout_.plain_row);
    lse_ = place(kNearKeys, layout_.pitch);
    delta_ = place(kNearKeys, layout_.pitch);
  }

  // Copy rows of far points of one slice into its slot; `unit` selects the row and the run of columns.
  void copy(const Slice& s, float* slot, int64_t unit) const {
    const int64_t row = unit / copy_units_, begin = unit % copy_units_ * kCopyColumns;
    const int64_t end = std::min(begin + kCopyColumns, s.points[2]), z = row / s.points[1], y = row % s.points[1];
    if (z >= s.points[0] || begin >= end) return;
    const int64_t fill = end == s.points[2] ? layout_.pitch : end;
    const Points a = o_.far_a.row(g_, s, z, y), b = o_.far_b.row(g_, s, z, y);
    copy_transposed(a, begin, end, fill, layout_, slot + columns_a_ + row * layout_.transposed_row);
    if (!kForward) {
      copy_transposed(b, begin, end, fill, layout_, slot + columns_b_ + row * layout_.transposed_row);
      copy_plain(a, begin, end, layout_, slot + plain_a_ + row * layout_.plain_row);
    }
    if (kForward || kNearKeys) copy_plain(b, begin, end, layout_, slot + plain_b_ + row * layout_.plain_row);
    if (kNearKeys)
      for (const auto& [view, place] : {std::pair{&o_.lse, lse_}, std::pair{&o_.delta, delta_}}) {
        const Points points = view->row(g_, s, z, y);
        float* to = slot + place + row * layout_.pitch;
        for (int64_t x = begin; x < end; ++x) to[x] = *points[x];
        std::fill(to + end, to + fill, 0.f);
      }
  }

  // Turn scores into unnormalised probabilities, and return the missing factors.
  template <int Q>
  void softmax(const Group& group, const Reach& reach, const float* bias, float* scores, Points lse,
               float* factor) const {
    const int64_t size = reach.row_count * group.columns;
    Vec largest[Q], sum[Q] = {};
    for (Vec& x : largest) x = splat(-kInfinity);
    for (int64_t c = 0; c < group.columns; c += kLanes) {
      Mask inside[Q];
      for (int q = 0; q < Q; ++q) inside[q] = columns_between(c, group.begin[q], group.end[q]);
      for (int64_t r = 0; r < reach.row_count; ++r)
        for (int q = 0; q < Q; ++q) {
          float* at = scores + q * size + r * group.columns + c;
          Vec score = load(at) * scale_;
          if (bias) score += load(bias + reach.bias[r] + c - q);
          score = inside[q] ? score : splat(-kInfinity);
          store(at, score);
          largest[q] = score > largest[q] ? score : largest[q];
        }
    }
    float shift[Q];
    for (int q = 0; q < Q; ++q) shift[q] = max_lanes(largest[q]);
    for (int64_t i = 0; i < size; i += kLanes)
      for (int q = 0; q < Q; ++q) {
        const Vec p = exp_lanes(load(scores + q * size + i) - shift[q]);
        store(scores + q * size + i, p);
        sum[q] += p;
      }
    for (int q = 0; q < Q; ++q) {
      const float total = sum_lanes(sum[q]);
      *lse[q] = shift[q] + std::log(total);
      factor[q] = 1.f / total;
    }
  }

  // Turn scores into probabilities, and the gradients of probabilities into gradients of scores.
  template <int Q>
  void differentiate(const Group& group, const Reach& reach, const float* slot, const float* bias, Points near_lse,
                     Points near_delta, float* scores, float* grads, float* bias_grad) const {
    const int64_t size = reach.row_count * group.columns;
    for (int64_t c = 0; c < group.columns; c += kLanes)
      for (int q = 0; q < Q; ++q) {
        const Mask inside = columns_between(c, group.begin[q], group.end[q]);
        Vec lse{}, delta{};
        if (!kNearKeys) lse = splat(*near_lse[q]), delta = splat(*near_delta[q]);
        for (int64_t r = 0; r < reach.row_count; ++r) {
          const int64_t at = q * size + r * group.columns + c;
          if (kNearKeys) {
            const int64_t far = reach.rows[r] * layout_.pitch + group.start + c;
            lse = load(slot + lse_ + far), delta = load(slot + delta_ + far);
          }
          Vec score = load(scores + at) * scale_ - lse;
          if (bias) score += load(bias + reach.bias[r] + c - q);
          const Vec p = exp_lanes(score), gradient = inside ? p * (load(grads + at) - delta) : Vec{};
          store(scores + at, p);
          store(grads + at, gradient);
          if (bias_grad) {
            float* to = bias_grad + reach.bias[r] + c - q;
            store(to, load(to) + gradient);
          }
        }
      }
  }

  // Process a few groups of one row, step by step: each step finds the data of the previous group in the L1 cache.
  void visit(const Slice& s, const float* slot, int64_t z, int64_t y, const Group* groups, int64_t count, Reach& reach,
             float* table_grad) const {
    const Points a = o_.near_a.row(g_, s, z, y), b = o_.near_b.row(g_, s, z, y), lse = o_.lse.row(g_, s, z, y);
    const Points delta = o_.delta.row(g_, s, z, y), out_a = o_.out_a.row(g_, s, z, y),
                 out_b = o_.out_b.row(g_, s, z, y);
    const auto each = [&](auto step) {
      for (int64_t i = 0; i < count; ++i) {
        float *scores = reach.scores.get() + i * reach.room, *grads = reach.grads.get() + i * reach.room;
        if (groups[i].count == 2) step(std::integral_constant<int, 2>{}, groups[i], i, scores, grads);
        else step(std::integral_constant<int, 1>{}, groups[i], i, scores, grads);
      }
    };
    each([&](auto q, const Group& group, int64_t, float* scores, float*) {
      reach.aim(group.columns, layout_);
      dot<q>(a.from(group.x), slot + columns_a_ + group.start, reach, layout_, scores);
    });
    if (!kForward)
      each([&](auto q, const Group& group, int64_t, float*, float* grads) {
        reach.aim(group.columns, layout_);
        dot<q>(b.from(group.x), slot + columns_b_ + group.start, reach, layout_, grads);
      });
    float factors[kChunk][2];
    each([&](auto q, const Group& group, int64_t i, float* scores, float* grads) {
      const int64_t offset = bias_.pad + g_.kernel[2] - 1 + group.start - group.x;
      const float* bias = o_.rpb ? bias_.data.data() + s.head * table_floats_ + offset : nullptr;
      float* bias_grad = table_grad ? table_grad + offset : nullptr;
      if (kForward) return softmax<q>(group, reach, bias, scores, lse.from(group.x), factors[i]);
      differentiate<q>(group, reach, slot, bias, lse.from(group.x), delta.from(group.x), scores, grads, bias_grad);
      std::fill(factors[i], factors[i] + 2, scale_);
    });
    const float ones[2] = {1.f, 1.f};
    each([&](auto q, const Group& group, int64_t i, float* scores, float* grads) {
      const float* plain = slot + (kForward ? plain_b_ : plain_a_);
      average<q>(group, reach, layout_, kForward ? scores : grads, plain, factors[i], out_a.from(group.x));
      if (kNearKeys) average<q>(group, reach, layout_, scores, slot + plain_b_, ones, out_b.from(group.x));
    });
  }

  // Process the near points of some rows, or of a part of one long row.
  void compute(const Slice& s, const float* slot, int64_t unit, Reach& reach, float* table_grad) const {
    if (table_grad) std::fill(table_grad, table_grad + table_floats_, 0.f);
    const int64_t rows = s.points[0] * s.points[1], first = unit / column_units_ * rows_per_unit_;
    const std::vector<Group>& groups = near_.groups[s.length[2]];
    const int64_t group_count = groups.size(), begin = unit % column_units_ * (kUnitPoints / 2);
    for (int64_t row = first; row < std::min(first + rows_per_unit_, rows); ++row) {
      const int64_t z = row / s.points[1], y = row % s.points[1];
      const Windows &wz = near_.axis[0][s.length[0]], &wy = near_.axis[1][s.length[1]];
      reach.row_count = 0;
      for (int64_t far_z = wz.start[z]; far_z < wz.end[z]; ++far_z)
        for (int64_t far_y = wy.start[y]; far_y < wy.end[y]; ++far_y) {
          const int64_t step_z = g_.kernel[0] - 1 + far_z - z, step_y = g_.kernel[1] - 1 + far_y - y;
          reach.rows[reach.row_count] = far_z * s.points[1] + far_y;
          reach.bias[reach.row_count++] = (step_z * (2 * g_.kernel[1] - 1) + step_y) * bias_.pitch;
        }
      reach.columns = 0;
      const int64_t end = std::min(begin + kUnitPoints / 2, group_count);
      for (int64_t i = begin; i < end; i += kChunk)
        visit(s, slot, z, y, groups.data() + i, std::min(kChunk, end - i), reach, table_grad);
    }
  }

  // Sum one row of the bias gradients of all heads of a wave in slice and unit order, whichever thread computed them.
  void total(int64_t first, int64_t count, int64_t row) {
    const int64_t units = row_units_ * column_units_;
    for (int64_t i = 0; i < count * units; ++i) {
      const float* grad = table_grads_.get() + i * table_floats_ + row * bias_.pitch + bias_.pad;
      double* to = table_totals_.data() + (make_slice(g_, first + i / units).head * bias_.rows + row) * bias_.width;
      for (int64_t j = 0; j < bias_.width; ++j) to[j] += grad[j];
    }
  }

 public:
  Pass(const Geometry& g, const Operands& o, float scale)
      : g_(g),
        o_(o),
        scale_(scale),
        layout_(g),
        near_(g, kNearKeys),
        bias_(g, o.rpb, kNearKeys, near_.max_columns),
        column_units_(ceil_div(std::max(near_.groups[0].size(), near_.groups[1].size()), kUnitPoints / 2)),
        rows_per_unit_(
            std::max(kUnitPoints * g.dilation[2] / g.size[2], ceil_div(layout_.rows * column_units_, kMaxUnits))),
        row_units_(ceil_div(layout_.rows, rows_per_unit_)),
        copy_units_(ceil_div(ceil_div(g.size[2], g.dilation[2]), kCopyColumns)),
        slices_(g.batch * g.heads * g.dilation[0] * g.dilation[1] * g.dilation[2]),
        reaches_(g.threads) {
    lay_out_slot();
    const int64_t units = row_units_ * column_units_;
    wave_ = std::min(std::max(ceil_div(kUnitsPerThread * g.threads, units), kWaveFloats / slot_floats_), slices_);
    slots_ = allocate(wave_ * slot_floats_);
    table_floats_ = bias_.rows * bias_.pitch;
    if (o.grad_rpb) {
      table_grads_ = allocate(wave_ * units * table_floats_);
      table_totals_.resize(g.heads * bias_.rows * bias_.width);
    }
    for (Reach& reach : reaches_) {
      reach.room = 2 * near_.max_rows * near_.max_columns;
      reach.rows.resize(near_.max_rows);
      reach.bias.resize(near_.max_rows);
      reach.tiles.resize(reach.room / 2 / kLanes);
      reach.scores = allocate(kChunk * reach.room);
      reach.grads = allocate(kForward ? 0 : kChunk * reach.room);
    }
  }

  void run() {
    const int64_t copies = layout_.rows * copy_units_, units = row_units_ * column_units_;
#pragma omp parallel num_threads(static_cast<int>(g_.threads))
    {
#ifdef _OPENMP
      Reach& reach = reaches_[omp_get_thread_num()];
#else
      Reach& reach = reaches_[0];
#endif
      for (int64_t first = 0; first < slices_; first += wave_) {
        const int64_t count = std::min(wave_, slices_ - first);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * copies; ++i)
          copy(make_slice(g_, first + i / copies), slots_.get() + i / copies * slot_floats_, i % copies);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * units; ++i)
          compute(make_slice(g_, first + i / units), slots_.get() + i / units * slot_floats_, i % units, reach,
                  o_.grad_rpb ? table_grads_.get() + i * table_floats_ : nullptr);
        if (o_.grad_rpb) {
#pragma omp for schedule(static)
          for (int64_t row = 0; row < bias_.rows; ++row) total(first, count, row);
        }
      }
    }
    std::copy(table_totals_.begin(), table_totals_.end(), o_.grad_rpb);
  }
};

template <typename Body>
int guard(const Geometry& g, Body body) {
  for (int a = 0; a < 3; ++a) {
    const bool fits = g.kernel[a] >= 1 && g.dilation[a] >= 1 && g.kernel[a] <= g.size[a] / g.dilation[a];
    if (!fits || g.stride[a] < 1 || g.stride[a] > g.kernel[a]) return kBadGeometry;
  }
  if (g.threads < 1 || g.batch < 1 || g.heads < 1 || g.dim < 1) return kBadGeometry;
  return run_guarded(body);
}

}  // namespace

// views: query, key, value, rpb, out, lse. Only the data pointer of rpb is read: contiguous, or null.
extern "C" __attribute__((visibility("default"))) int mixerzoo_na_forward(const Geometry* g, const View* views,
                                                                          float scale) {
  const auto [q, k, v, rpb, out, lse] = *reinterpret_cast<const View(*)[6]>(views);
  const Operands operands{q, q, k, v, lse, lse, out, out, rpb.data, nullptr};
  return guard(*g, [&] { Pass<Kind::kForward>(*g, operands, scale).run(); });
}

// views: grad_out, query, key, value, rpb, lse, delta, grad_query, grad_key, grad_value, grad_rpb.
extern "C" __attribute__((visibility("default"))) int mixerzoo_na_backward(const Geometry* g, const View* views,
                                                                           float scale) {
  const auto [grad, q, k, v, rpb, lse, delta, dq, dk, dv, drpb] = *reinterpret_cast<const View(*)[11]>(views);
  const Operands to_queries{q, grad, k, v, lse, delta, dq, dq, rpb.data, drpb.data};
  const Operands to_keys{k, v, q, grad, lse, delta, dk, dv, rpb.data, nullptr};
  return guard(*g, [&] {
    Pass<Kind::kQueryGrad>(*g, to_queries, scale).run();
    Pass<Kind::kKeyGrad>(*g, to_keys, scale).run();
  });
}
