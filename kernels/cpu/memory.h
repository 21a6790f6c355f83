// Integer rounding, aligned memory, and the status codes of the exported functions.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

inline Floats allocate(int64_t count) {
  float* p = static_cast<float*>(std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(float), 64)));
  if (!p) throw std::bad_alloc();
  return Floats(p);
}

enum Status { kDone, kBadGeometry, kNoMemory };

// Run `body`, which allocates; no exception may propagate into C.
template <typename Body>
int run_guarded(Body body) {
  try {
    body();
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace
