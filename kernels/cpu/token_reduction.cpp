// Token merging on the CPU: find the most similar tokens, and average the tokens that share a slot; float32. Called
// through ctypes. kernels/token_reduction defines the functions.
//
// What is unusual:
// - Similarities are never stored in memory: registers hold a tile of a few rows, with eight columns in the lanes, and
//   every lane tracks its maximum.
// - Matching is one task per image, since its half a million products take only microseconds. The keys of all heads are
//   summed while they are copied; cosine similarity is the same for the sum and for the mean.
// - Unmerged tokens are copied bit for bit.
// - Results are deterministic, independent of the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "memory.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// The arguments packed by _native.py.
struct Match {
  int64_t threads, batch, heads, tokens, dim, prefix, r;
  const float* metric;
  int64_t batch_stride, head_stride, token_stride;  // channels are adjacent
};

struct Merge {
  int64_t threads, batch, tokens, dim, length;
  const float* x;
  int64_t batch_stride, token_stride;
  const int64_t* slot;  // [batch][tokens]
  const float* size;    // [batch][tokens], or null for size 1
};

constexpr int kRows = 4, kVectors = 2;  // tile of similarities: eight vectors in registers
constexpr int64_t kColumns = kVectors * kLanes;

// The even (A) or the odd tokens (B) after the prefix.
struct Side {
  int64_t first, count;
  Side(const Match& m, int64_t parity) : first(m.prefix + (m.prefix + parity) % 2) {
    count = first < m.tokens ? (m.tokens - first + 1) / 2 : 0;
  }
};

struct Pair {
  float similarity;
  int64_t token, partner;
  bool operator<(const Pair& other) const {
    return similarity != other.similarity ? similarity > other.similarity : token < other.token;
  }
};

float inverse_norm(const float* row, int64_t dim) {
  Vec squares{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) squares += load(row + d) * load(row + d);
  float sum = sum_lanes(squares);
  for (; d < dim; ++d) sum += row[d] * row[d];
  return 1.f / std::max(std::sqrt(sum), 1e-12f);
}

void add_heads(const Match& m, const float* token, float* to) {
  std::copy_n(token, m.dim, to);
  for (int64_t h = 1; h < m.heads; ++h)
    for (int64_t d = 0; d < m.dim; ++d) to[d] += token[h * m.head_stride + d];
}

// Find for kRows rows of A the most similar column of B, [dim][pitch]; ties go to the lowest index.
void find_partners(const float* a, const float* b, int64_t dim, int64_t pitch, int64_t columns, Pair* pairs) {
  Vec best[kRows];
  Mask where[kRows];
  for (int i = 0; i < kRows; ++i) best[i] = splat(-kInfinity), where[i] = Mask{};
  for (int64_t j = 0; j < columns; j += kColumns) {
    Vec sums[kRows][kVectors] = {};
    for (int64_t d = 0; d < dim; ++d) {
      Vec column[kVectors];
      for (int v = 0; v < kVectors; ++v) column[v] = load_once(b + d * pitch + j + v * kLanes);
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) sums[i][v] += column[v] * a[i * dim + d];
    }
    for (int v = 0; v < kVectors; ++v) {
      const Mask index = Mask{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<int32_t>(j + v * kLanes);
      const Mask exists = index < static_cast<int32_t>(columns);
      for (int i = 0; i < kRows; ++i) {
        const Mask better = (sums[i][v] > best[i]) & exists;
        best[i] = better ? sums[i][v] : best[i];
        where[i] = better ? index : where[i];
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    int lane = 0;
    for (int l = 1; l < kLanes; ++l)
      if (best[i][l] > best[i][lane] || (best[i][l] == best[i][lane] && where[i][l] < where[i][lane])) lane = l;
    pairs[i].similarity = best[i][lane];
    pairs[i].partner = where[i][lane];
  }
}

// One thread's buffers for an image, padded to whole tiles.
struct Workspace {
  int64_t pitch, rows;
  Floats floats;
  std::vector<Pair> pairs;

  Workspace(const Match& m, const Side& a, const Side& b)
      : pitch(round_up(b.count, kColumns)), rows(round_up(a.count, kRows)), floats(allocate(size(m))), pairs(rows) {
    std::fill_n(floats.get(), size(m), 0.f);
  }
  int64_t size(const Match& m) const { return (rows + pitch + 1) * m.dim; }
};

void match_image(const Match& m, int64_t image, Workspace& w, int64_t* slot) {
  const Side a(m, 0), b(m, 1);
  float *rows = w.floats.get(), *columns = rows + w.rows * m.dim, *row = columns + w.pitch * m.dim;
  const float* tokens = m.metric + image * m.batch_stride;
  for (int64_t j = 0; j < b.count; ++j) {
    add_heads(m, tokens + (b.first + 2 * j) * m.token_stride, row);
    const float scale = inverse_norm(row, m.dim);
    for (int64_t d = 0; d < m.dim; ++d) columns[d * w.pitch + j] = row[d] * scale;
  }
  for (int64_t i = 0; i < a.count; ++i) add_heads(m, tokens + (a.first + 2 * i) * m.token_stride, rows + i * m.dim);
  for (int64_t i = 0; i < w.rows; i += kRows)
    find_partners(rows + i * m.dim, columns, m.dim, w.pitch, b.count, &w.pairs[i]);
  for (int64_t i = 0; i < a.count; ++i) {
    const float similarity = w.pairs[i].similarity * inverse_norm(rows + i * m.dim, m.dim);
    w.pairs[i].similarity = similarity == similarity ? similarity : -kInfinity;  // NaN cannot be ordered
    w.pairs[i].token = i;
  }
  std::nth_element(w.pairs.begin(), w.pairs.begin() + m.r, w.pairs.begin() + a.count);

  const int64_t first_b = m.prefix + a.count - m.r;
  for (int64_t n = 0; n < m.prefix; ++n) slot[n] = n;
  for (int64_t i = 0; i < a.count; ++i) slot[a.first + 2 * i] = -1;
  for (int64_t i = 0; i < m.r; ++i) slot[a.first + 2 * w.pairs[i].token] = first_b + w.pairs[i].partner;
  for (int64_t i = 0, next = m.prefix; i < a.count; ++i)
    if (slot[a.first + 2 * i] < 0) slot[a.first + 2 * i] = next++;
  for (int64_t j = 0; j < b.count; ++j) slot[b.first + 2 * j] = first_b + j;
}

void match(const Match& m, int64_t* slot) {
  const Side a(m, 0), b(m, 1);
  std::vector<Workspace> workspaces;
  for (int64_t t = 0; t < m.threads; ++t) workspaces.emplace_back(m, a, b);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(m.threads))
  for (int64_t image = 0; image < m.batch; ++image) {
#ifdef _OPENMP
    Workspace& workspace = workspaces[omp_get_thread_num()];
#else
    Workspace& workspace = workspaces[0];
#endif
    match_image(m, image, workspace, slot + image * m.tokens);
  }
}

// All tokens sorted by slot: with slots numbered over all images, slot s has tokens[start[s]] to
// tokens[start[s + 1] - 1], in ascending order.
struct Members {
  std::vector<int64_t> start, tokens;

  explicit Members(const Merge& m) : start(m.batch * m.length + 2), tokens(m.batch * m.tokens) {
    const auto visit = [&](auto take) {
      for (int64_t i = 0; i < m.batch * m.tokens; ++i)
        if (m.slot[i] >= 0) take(i / m.tokens * m.length + m.slot[i], i);
    };
    visit([&](int64_t slot, int64_t) { ++start[slot + 2]; });
    for (size_t s = 2; s < start.size(); ++s) start[s] += start[s - 1];
    visit([&](int64_t slot, int64_t token) { tokens[start[slot + 1]++] = token; });
  }
};

void merge_row(const Merge& m, const int64_t* begin, const int64_t* end, float* out, float* total) {
  const auto size = [&](int64_t token) { return m.size ? m.size[token] : 1.f; };
  const auto row = [&](int64_t token) {
    return m.x + token / m.tokens * m.batch_stride + token % m.tokens * m.token_stride;
  };
  *total = 0.f;
  for (const int64_t* n = begin; n < end; ++n) *total += size(*n);
  if (end - begin == 1) {
    std::copy_n(row(*begin), m.dim, out);
    return;
  }
  std::fill_n(out, m.dim, 0.f);
  for (const int64_t* n = begin; n < end; ++n) {
    const float weight = size(*n) / *total, *token = row(*n);
    for (int64_t d = 0; d < m.dim; ++d) out[d] += weight * token[d];
  }
}

void merge(const Merge& m, float* out, float* totals) {
  const Members members(m);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(m.threads))
  for (int64_t s = 0; s < m.batch * m.length; ++s)
    merge_row(m, members.tokens.data() + members.start[s], members.tokens.data() + members.start[s + 1],
              out + s * m.dim, totals + s);
}

}  // namespace

// slot: [batch][tokens].
extern "C" __attribute__((visibility("default"))) int mixerzoo_token_match(const Match* args, int64_t* slot) {
  const Match& m = *args;
  if (m.threads < 1 || m.prefix < 0 || m.r < 0 || m.heads < 1 || 2 * m.r > m.tokens - m.prefix) return kBadGeometry;
  return run_guarded([&] { match(m, slot); });
}

// out: [batch][length][dim]; totals: [batch][length].
extern "C" __attribute__((visibility("default"))) int mixerzoo_token_merge(const Merge* m, float* out, float* totals) {
  const int64_t* end = m->slot + m->batch * m->tokens;
  const bool fits = std::all_of(m->slot, end, [&](int64_t slot) { return slot < m->length; });
  if (!fits || m->threads < 1) return kBadGeometry;
  return run_guarded([&] { merge(*m, out, totals); });
}
