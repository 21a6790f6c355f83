// The geometry of neighborhood attention: the slices of a call, and which points see each other within a slice.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "memory.h"

namespace {

// The caller's arguments: 64-bit words throughout, packed by _native.py.
struct Geometry {
  int64_t threads, batch, heads, dim;
  int64_t size[3], kernel[3], stride[3], dilation[3], causal[3];
};

struct Slice {
  int64_t batch, head, origin[3], points[3];
  int length[3];  // per axis: 0 if the lattice has ceil(size / dilation) points, 1 if it has one less
};

// The points of one row of a slice.
struct Points {
  float* data;
  int64_t step;
  float* operator[](int64_t x) const { return data + x * step; }
  Points from(int64_t x) const { return {data + x * step, step}; }
};

// A float32 tensor [batch, Z, Y, X, heads(, dim)] with strides in elements; dim, if present, is contiguous.
struct View {
  float* data;
  int64_t batch, axis[3], head;

  Points row(const Geometry& g, const Slice& s, int64_t z, int64_t y) const {
    float* first = data + s.batch * batch + s.head * head + (s.origin[0] + z * g.dilation[0]) * axis[0] +
                   (s.origin[1] + y * g.dilation[1]) * axis[1] + s.origin[2] * axis[2];
    return {first, g.dilation[2] * axis[2]};
  }
};

Slice make_slice(const Geometry& g, int64_t index) {
  Slice s;
  for (int axis = 2; axis >= 0; --axis) {
    s.origin[axis] = index % g.dilation[axis];
    index /= g.dilation[axis];
    s.points[axis] = ceil_div(g.size[axis] - s.origin[axis], g.dilation[axis]);
    s.length[axis] = s.points[axis] == ceil_div(g.size[axis], g.dilation[axis]) ? 0 : 1;
  }
  s.head = index % g.heads;
  s.batch = index / g.heads;
  return s;
}

// The far points paired with each near point, along one axis of a lattice.
struct Windows {
  std::vector<int64_t> start, end;
  int64_t width(int64_t i) const { return end[i] - start[i]; }
  int64_t widest() const {
    int64_t widest = 0;
    for (size_t i = 0; i < start.size(); ++i) widest = std::max(widest, end[i] - start[i]);
    return widest;
  }
};

// Return the keys of each query along one axis of a lattice.
Windows key_windows(int64_t points, int64_t kernel, int64_t stride, bool causal) {
  Windows w;
  for (int64_t i = 0; i < points; ++i) {
    const int64_t lead = std::min(i / stride * stride + (causal ? stride - 1 : stride / 2), points - 1);
    const int64_t start = causal ? lead - kernel + 1 : std::min(lead - kernel / 2, points - kernel);
    w.start.push_back(std::max<int64_t>(start, 0));
    w.end.push_back(causal ? i + 1 : w.start.back() + kernel);
  }
  return w;
}

// Return the queries of each key: a contiguous run, because neither end of a window ever moves back.
Windows query_windows(const Windows& keys) {
  Windows w;
  const int64_t points = keys.start.size();
  for (int64_t key = 0, start = 0, end = 0; key < points; ++key) {
    while (start < points && keys.end[start] <= key) ++start;
    while (end < points && keys.start[end] <= key) ++end;
    w.start.push_back(start);
    w.end.push_back(std::max(start, end));
  }
  return w;
}

// One near point, or two neighbours that share the tiles of eight far columns.
struct Group {
  int64_t x, count, start, columns;  // far columns [start, start + columns), whole tiles
  int64_t begin[2], end[2];          // each point's own window, from start
};

std::vector<Group> make_groups(const Windows& w) {
  std::vector<Group> groups;
  const int64_t points = w.start.size();
  for (int64_t x = 0; x < points;) {
    Group group{x, 1, w.start[x], round_up(w.width(x), kLanes), {0, 0}, {w.width(x), 0}};
    if (x + 1 < points) {
      const int64_t shared = round_up(w.end[x + 1] - w.start[x], kLanes);
      if (2 * shared <= group.columns + round_up(w.width(x + 1), kLanes)) {
        group.count = 2;
        group.columns = shared;
        group.begin[1] = w.start[x + 1] - group.start;
        group.end[1] = w.end[x + 1] - group.start;
      }
    }
    x += group.count;
    groups.push_back(group);
  }
  return groups;
}

// The pairing of a pass on all three axes, for both possible lengths of a lattice.
struct Neighborhood {
  Windows axis[3][2];
  std::vector<Group> groups[2];
  int64_t max_rows = 1, max_columns = 0;  // maximum numbers of far rows and columns that a group sees

  Neighborhood(const Geometry& g, bool keys_are_near) {
    for (int a = 0; a < 3; ++a) {
      for (int shorter = 0; shorter < 2; ++shorter) {
        const int64_t points = shorter ? g.size[a] / g.dilation[a] : ceil_div(g.size[a], g.dilation[a]);
        axis[a][shorter] = key_windows(points, g.kernel[a], g.stride[a], g.causal[a]);
        if (keys_are_near) axis[a][shorter] = query_windows(axis[a][shorter]);
      }
      if (a < 2) max_rows *= std::max(axis[a][0].widest(), axis[a][1].widest());
    }
    for (int shorter = 0; shorter < 2; ++shorter) {
      groups[shorter] = make_groups(axis[2][shorter]);
      for (const Group& group : groups[shorter]) max_columns = std::max(max_columns, group.columns);
    }
  }
};

// The relative position table of every head, indexed by kernel - 1 + far - near on each axis (`flipped` if the near
// points are keys). Its rows are padded so that whole tiles can be read.
struct BiasTable {
  int64_t rows, width, pad, pitch;
  std::vector<float> data;

  BiasTable(const Geometry& g, const float* rpb, bool flipped, int64_t max_columns)
      : rows((2 * g.kernel[0] - 1) * (2 * g.kernel[1] - 1)),
        width(2 * g.kernel[2] - 1),
        pad(max_columns),
        pitch(width + 2 * pad) {
    if (!rpb) return;
    data.assign(g.heads * rows * pitch, 0.f);
    for (int64_t h = 0; h < g.heads; ++h)
      for (int64_t i = 0; i < rows; ++i) {
        const float* row = rpb + (h * rows + (flipped ? rows - 1 - i : i)) * width;
        float* to = data.data() + (h * rows + i) * pitch + pad;
        if (flipped) std::reverse_copy(row, row + width, to);
        else std::copy(row, row + width, to);
      }
  }
};

}  // namespace
