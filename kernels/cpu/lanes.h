// Eight float32 lanes in the vector extensions of GCC and Clang, for any processor.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t kLanes = 8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
inline Vec splat(float x) { return Vec{} + x; }

// Load into a register. GCC would otherwise reload the memory operand at each use, and loads limit the inner loops.
inline Vec load_once(const float* p) {
  Vec x = load(p);
#ifdef __AVX__
  asm("" : "+x"(x));
#endif
  return x;
}

// Both reduce the lanes in a fixed order.
inline float sum_lanes(Vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
inline float max_lanes(Vec x) {
  return std::max(std::max(std::max(x[0], x[4]), std::max(x[2], x[6])),
                  std::max(std::max(x[1], x[5]), std::max(x[3], x[7])));
}

// Return exp(x) for x <= 88 within 2 units in the last place. Denormal results are flushed to zero; NaN stays NaN.
inline Vec exp_lanes(Vec x) {
  const float shifter = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which ends up in the low bits
  const Vec shifted = x * 1.44269504f + shifter;
  const Vec n = shifted - shifter;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, log 2 in two parts
  Vec tail = splat(1.39261864e-3f);  // (exp(r) - 1 - r) / r^2 on [-log(2)/2, log(2)/2], relative error 1e-8
  tail = tail * r + 8.36317905e-3f;
  tail = tail * r + 4.16665546e-2f;
  tail = tail * r + 1.66665770e-1f;
  tail = tail * r + 0.5f;
  const Vec mantissa = tail * (r * r) + r + 1.f;
  const Mask scaled = reinterpret_cast<Mask>(mantissa) + (reinterpret_cast<Mask>(shifted) << 23);
  return x < -87.3f ? Vec{} : reinterpret_cast<Vec>(scaled);
}

// Return all ones in those of the eight lanes from `column` whose column is in [begin, end).
inline Mask columns_between(int64_t column, int64_t begin, int64_t end) {
  const Mask lane = Mask{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<int32_t>(column);
  return (lane >= static_cast<int32_t>(begin)) & (lane < static_cast<int32_t>(end));
}

// Transpose in place.
inline void transpose_tile(Vec (&t)[8]) {
#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (Mask{__VA_ARGS__}))
#endif
  Vec u[8];
  for (int i = 0; i < 8; i += 2) {
    u[i] = MIX(t[i], t[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    u[i + 1] = MIX(t[i], t[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      t[i + 2 * j] = MIX(u[i + j], u[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      t[i + 2 * j + 1] = MIX(u[i + j], u[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    u[i] = MIX(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    u[i + 4] = MIX(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  std::copy(u, u + 8, t);
#undef MIX
}

}  // namespace
