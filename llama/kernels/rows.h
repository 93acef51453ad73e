// Work on the rows of a matrix, shared by the threads.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t RUN = 1 << 20;    // bytes of rows that a thread takes at a time: memory slows down with shorter ones
constexpr int64_t ALONE = 1 << 16;  // bytes of a matrix for which starting threads costs more than it saves

// Calls `run(first, last)` for all rows of a matrix, whose rows hold `bytes` each, on all threads. A thread that is done
// fetches the next run of rows: cores are not equally fast, and other programs use them too.
template <typename Run>
void share_rows(int64_t n_rows, int64_t bytes, const Run& run) {
  const int64_t n_threads = n_rows * bytes < ALONE ? 1 : std::min<int64_t>(at::get_num_threads(), n_rows);
  const int64_t most = RUN / std::max<int64_t>(1, bytes), equal = (n_rows + n_threads - 1) / std::max<int64_t>(1, n_threads);
  const int64_t step = std::max<int64_t>(1, std::min(most, equal));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, n_threads, 1, [&](int64_t, int64_t) {
    for (int64_t first = next.fetch_add(step); first < n_rows; first = next.fetch_add(step))
      run(first, std::min(first + step, n_rows));
  });
}

// A number as float32 and back, rounded to the nearest, in a form that compilers vectorise.
template <typename T>
inline float widen(T x) {
  return static_cast<float>(x);
}

template <>
inline float widen(at::BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}

template <typename T>
inline T narrow(float x) {
  return static_cast<T>(x);
}

template <>
inline at::BFloat16 narrow(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return at::BFloat16(static_cast<uint16_t>(x != x ? 0x7fc0 : rounded), at::BFloat16::from_bits());
}

}  // namespace
