// Products of a few rows with a large matrix on a CPU, at the speed at which memory delivers the matrix.
//
// One token's decode step reads every weight once and computes almost nothing, so each core must stream through its rows
// without a stall: one row of the matrix at a time, several sums under way, and a prefetch far enough ahead. Sums are in
// float32. Integers are widened in registers; activations are not rounded.
//
// Layouts (see llama/kernels/formats.py): int8 [N, K] with one scale a row; int4 [N, K / 2], where 16 bytes hold
// 32 columns, byte j column j in its low half and column 16 + j in its high half, biased by 8, with a bfloat16 scale
// for each group of columns.

#pragma once

#include "rows.h"

namespace {

constexpr int64_t BLOCK = 32;    // columns of int4 that are packed together
constexpr int64_t TILE = 4;      // rows of x for which a matrix row is widened once
constexpr int64_t AHEAD = 1024;  // bytes; integers, which are through sooner, look two or three times as far

inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 3); }

// -- bfloat16: one row of x -----------------------------------------------------------------------------------------

float dot(const at::BFloat16* w, const at::BFloat16* x, int64_t n) {
  int64_t k = 0;
  float sum = 0;
#if defined(__AVX512BF16__)
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
  const auto load = [](const at::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); };
  for (; k + 128 <= n; k += 128) {
    for (int64_t line = 0; line < 256; line += 64) prefetch(reinterpret_cast<const char*>(w + k) + AHEAD + line);
    a = _mm512_dpbf16_ps(a, load(w + k), load(x + k));
    b = _mm512_dpbf16_ps(b, load(w + k + 32), load(x + k + 32));
    c = _mm512_dpbf16_ps(c, load(w + k + 64), load(x + k + 64));
    d = _mm512_dpbf16_ps(d, load(w + k + 96), load(x + k + 96));
  }
  sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
#endif
  for (; k < n; ++k) sum += static_cast<float>(w[k]) * static_cast<float>(x[k]);
  return sum;
}

// x [..., K] of one row and w [N, K], both bfloat16, to [..., N].
at::Tensor bf16_row(const at::Tensor& x, const at::Tensor& w) {
  TORCH_CHECK(x.numel() == w.size(1) && x.scalar_type() == at::kBFloat16 && w.scalar_type() == at::kBFloat16);
  const auto row = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = w.size(0);
  auto y = at::empty(shape, x.options());
  const auto* xs = row.const_data_ptr<at::BFloat16>();
  const auto* ws = w.const_data_ptr<at::BFloat16>();
  auto* out = y.mutable_data_ptr<at::BFloat16>();
  const int64_t columns = w.size(1);
  share_rows(w.size(0), 2 * columns, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) out[n] = dot(ws + n * columns, xs, columns);
  });
  return y;
}

// -- integers: a few rows of x, in float32 --------------------------------------------------------------------------

// M sums of one int8 row with M rows of x, `stride` apart.
template <int M>
void dot_int8(const int8_t* w, const float* x, int64_t stride, int64_t n, float* sums) {
  int64_t k = 0;
  for (int m = 0; m < M; ++m) sums[m] = 0;
#if defined(__AVX512F__)
  __m512 a[M], b[M];
  for (int m = 0; m < M; ++m) a[m] = b[m] = _mm512_setzero_ps();
  const auto widen = [](const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  };
  for (; k + 64 <= n; k += 64) {
    prefetch(w + k + 2 * AHEAD);
    const __m512 first = widen(w + k), second = widen(w + k + 16), third = widen(w + k + 32),
                 fourth = widen(w + k + 48);
    for (int m = 0; m < M; ++m) {
      const float* at = x + m * stride + k;
      a[m] = _mm512_fmadd_ps(first, _mm512_loadu_ps(at), a[m]);
      b[m] = _mm512_fmadd_ps(second, _mm512_loadu_ps(at + 16), b[m]);
      a[m] = _mm512_fmadd_ps(third, _mm512_loadu_ps(at + 32), a[m]);
      b[m] = _mm512_fmadd_ps(fourth, _mm512_loadu_ps(at + 48), b[m]);
    }
  }
  for (int m = 0; m < M; ++m) sums[m] = _mm512_reduce_add_ps(_mm512_add_ps(a[m], b[m]));
#endif
  for (; k < n; ++k)
    for (int m = 0; m < M; ++m) sums[m] += static_cast<float>(w[k]) * x[m * stride + k];
}

// The scales of the 16 blocks from column k on, as far as there are columns.
template <int64_t GROUP>
void load_scales(const at::BFloat16* scales, int64_t k, int64_t n, float* out) {
#if defined(__AVX512F__)
  if (GROUP == BLOCK && k + 16 * BLOCK <= n) {
    const auto halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + k / GROUP));
    _mm512_storeu_si512(out, _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    return;
  }
#endif
  for (int64_t block = 0; block < 16; ++block) out[block] = scales[std::min(k + block * BLOCK, n - 1) / GROUP];
}

// M sums of one int4 row with M rows of x; GROUP columns share a scale.
template <int M, int64_t GROUP>
void dot_int4(const uint8_t* w, const at::BFloat16* scales, const float* x, int64_t stride, int64_t n, float* sums) {
  int64_t k = 0;
  for (int m = 0; m < M; ++m) sums[m] = 0;
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  constexpr int CHAINS = M == 1 ? 4 : 2;  // sums under way: enough to hide their latency, few enough for registers
  __m512 total[M][CHAINS];
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < CHAINS; ++c) total[m][c] = _mm512_setzero_ps();
  alignas(64) float factors[16];
  for (; k + 16 * BLOCK <= n; k += 16 * BLOCK) {
    load_scales<GROUP>(scales, k, n, factors);
    for (int step = 0; step < 16; step += CHAINS) {
      const int64_t base = k + step * BLOCK;
      prefetch(w + base / 2 + AHEAD);
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) {
        const int64_t at = base + c * BLOCK;
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + at / 2)));
        // The lookup takes the low four bits of each lane and leaves the others out.
        const __m512 low = _mm512_permutexvar_ps(pairs, table);
        const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
        const __m512 scale = _mm512_set1_ps(factors[step + c]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          __m512 part = _mm512_mul_ps(low, _mm512_loadu_ps(x + m * stride + at));
          part = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + m * stride + at + BLOCK / 2), part);
          total[m][c] = _mm512_fmadd_ps(part, scale, total[m][c]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < CHAINS; ++c) sums[m] += _mm512_reduce_add_ps(total[m][c]);
#endif
  for (; k < n; k += BLOCK) {
    const float scale = scales[k / GROUP];
    float part[M] = {};
    for (int64_t j = 0; j < BLOCK / 2; ++j) {
      const int byte = w[k / 2 + j];
      const float low = (byte & 15) - 8, high = (byte >> 4) - 8;
      for (int m = 0; m < M; ++m) part[m] += low * x[m * stride + k + j] + high * x[m * stride + k + j + BLOCK / 2];
    }
    for (int m = 0; m < M; ++m) sums[m] += part[m] * scale;
  }
}

#if defined(__AVX512VNNI__)
#define LLAMA_INTEGER_DOT

constexpr int64_t SPAN = 128;  // columns of int4 in a vector of bytes

// A row of x as integers of 15 bits, of which each block of 32 columns has its own scale: finer than bfloat16 by far,
// and a product with four bits is then one of bytes. Per span of 128 columns, in the order in which the nibbles of int4
// come: the upper bytes of the low and of the high halves of its four blocks, then the lower ones.
struct Fixed {
  std::vector<int8_t> bytes;   // [K / 128][2 planes][2 halves][64]
  std::vector<int32_t> start;  // [K / 128][16]: what the bias of 8 takes off, at the first lane of each block
  std::vector<float> scales;   // [K / 32, and some]

  Fixed(const float* x, int64_t n) : bytes(2 * n), start(n / 8), scales(n / BLOCK + 16) {
    for (int64_t k = 0; k < n; k += BLOCK) round_block(x + k, k);
  }

  void round_block(const float* x, int64_t k) {
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < BLOCK; ++j) largest = std::max(largest, std::abs(x[j]));
    const float factor = largest > 0 ? 16256 / largest : 0;
    scales[k / BLOCK] = largest / 16256;
    int32_t sum = 0;
    for (int64_t half = 0; half < 2; ++half) {
      int8_t* to = bytes.data() + k / SPAN * 4 * 64 + half * 64 + k % SPAN / 2;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < 16; ++j) {
        const int32_t value = static_cast<int32_t>(std::rint(x[half * 16 + j] * factor)), upper = (value + 64) >> 7;
        to[j] = upper;
        to[j + 128] = value - upper * 128;
        sum += value;
      }
    }
    start[k / SPAN * 16 + k % SPAN / 8] = -8 * sum;
  }
};

// M sums of one int4 row with M rows of x as integers; n is a multiple of 128.
template <int M, int64_t GROUP>
void dot_int4(const uint8_t* w, const at::BFloat16* scales, const Fixed* x, int64_t n, float* sums) {
  const __m512i low_half = _mm512_set1_epi8(15);
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512 total[M];
  for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
  alignas(64) float factors[16];
  for (int64_t k = 0; k < n; k += 16 * BLOCK) {
    const int64_t stop = std::min(n, k + 16 * BLOCK);
    load_scales<GROUP>(scales, k, n, factors);
    __m512 scale[M];
    for (int m = 0; m < M; ++m)
      scale[m] = _mm512_mul_ps(_mm512_load_ps(factors), _mm512_loadu_ps(x[m].scales.data() + k / BLOCK));
    __m512i lane = lanes;
    for (int64_t at = k; at < stop; at += SPAN) {
      prefetch(w + at / 2 + 3 * AHEAD);
      const __m512i both = _mm512_loadu_si512(w + at / 2);
      const __m512i low = _mm512_and_si512(both, low_half);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
      for (int m = 0; m < M; ++m) {
        const int8_t* bytes = x[m].bytes.data() + 2 * at;
        __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(bytes));
        __m512i lower = _mm512_dpbusd_epi32(_mm512_loadu_si512(x[m].start.data() + at / 8), low,
                                            _mm512_loadu_si512(bytes + 128));
        upper = _mm512_dpbusd_epi32(upper, high, _mm512_loadu_si512(bytes + 64));
        lower = _mm512_dpbusd_epi32(lower, high, _mm512_loadu_si512(bytes + 192));
        const __m512 part = _mm512_cvtepi32_ps(_mm512_add_epi32(lower, _mm512_slli_epi32(upper, 7)));
        total[m] = _mm512_fmadd_ps(part, _mm512_permutexvar_ps(lane, scale[m]), total[m]);
      }
      lane = _mm512_add_epi32(lane, _mm512_set1_epi32(4));
    }
  }
  for (int m = 0; m < M; ++m) sums[m] = _mm512_reduce_add_ps(total[m]);
}
#endif

// Calls `dot.operator()<M>(n, m, sums)` for every row n of a matrix and every tile of rows of x, from m on; y[m, n] is
// a sum. A row of the matrix holds `row_bytes`.
template <typename Dot>
at::Tensor products(const at::Tensor& x, int64_t n_rows, int64_t row_bytes, const Dot& dot) {
  const int64_t n_x = x.numel() / x.size(-1);
  auto shape = x.sizes().vec();
  shape.back() = n_rows;
  auto y = at::empty(shape, x.options().dtype(at::kFloat));
  float* out = y.mutable_data_ptr<float>();
  share_rows(n_rows, row_bytes, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n)
      for (int64_t m = 0; m < n_x; m += TILE) {
        float sums[TILE];
        const int64_t count = std::min(TILE, n_x - m);
        switch (count) {
          case 1: dot.template operator()<1>(n, m, sums); break;
          case 2: dot.template operator()<2>(n, m, sums); break;
          case 3: dot.template operator()<3>(n, m, sums); break;
          default: dot.template operator()<4>(n, m, sums);
        }
        for (int64_t i = 0; i < count; ++i) out[(m + i) * n_rows + n] = sums[i];
      }
  });
  return y.to(x.scalar_type());
}

// x [..., K], w [N, K] int8, scales [N] float32 to [..., N].
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& scales) {
  TORCH_CHECK(x.size(-1) == w.size(1) && w.scalar_type() == at::kChar && w.is_contiguous());
  const auto* ws = w.const_data_ptr<int8_t>();
  const float* factors = scales.const_data_ptr<float>();
  const int64_t columns = w.size(1);
  const auto wide = x.to(at::kFloat).contiguous();
  const float* xs = wide.const_data_ptr<float>();
  return products(x, w.size(0), columns, [&]<int M>(int64_t n, int64_t m, float* sums) {
    dot_int8<M>(ws + n * columns, xs + m * columns, columns, columns, sums);
    for (int m = 0; m < M; ++m) sums[m] *= factors[n];
  });
}

#if defined(LLAMA_INTEGER_DOT)
template <int64_t GROUP>
at::Tensor int4_products(const at::Tensor& x, const uint8_t* w, const at::BFloat16* scales, int64_t n_rows) {
  const int64_t columns = x.size(-1);
  const auto wide = x.to(at::kFloat).contiguous();
  std::vector<Fixed> rows;
  for (int64_t m = 0; m < x.numel() / columns; ++m) rows.emplace_back(wide.const_data_ptr<float>() + m * columns, columns);
  return products(x, n_rows, columns / 2, [&]<int M>(int64_t n, int64_t m, float* sums) {
    dot_int4<M, GROUP>(w + n * columns / 2, scales + n * (columns / GROUP), rows.data() + m, columns, sums);
  });
}
#endif

template <int64_t GROUP>
at::Tensor int4_sums(const at::Tensor& x, const uint8_t* w, const at::BFloat16* scales, int64_t n_rows) {
  const int64_t columns = x.size(-1);
#if defined(LLAMA_INTEGER_DOT)
  // Not for float32 activations: their products are computed in float32.
  if (x.scalar_type() != at::kFloat && columns % SPAN == 0) return int4_products<GROUP>(x, w, scales, n_rows);
#endif
  const auto wide = x.to(at::kFloat).contiguous();
  const float* xs = wide.const_data_ptr<float>();
  return products(x, n_rows, columns / 2, [&]<int M>(int64_t n, int64_t m, float* sums) {
    dot_int4<M, GROUP>(w + n * columns / 2, scales + n * (columns / GROUP), xs + m * columns, columns, columns, sums);
  });
}

// x [..., K], w [N, K / 2] uint8, scales [N, K / group] bfloat16 to [..., N].
at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& scales) {
  const int64_t columns = x.size(-1), group = columns / scales.size(1);
  TORCH_CHECK(columns == 2 * w.size(1) && group * scales.size(1) == columns && group % BLOCK == 0);
  TORCH_CHECK(w.scalar_type() == at::kByte && w.is_contiguous() && scales.is_contiguous());
  const auto* ws = w.const_data_ptr<uint8_t>();
  const auto* factors = scales.const_data_ptr<at::BFloat16>();
  switch (group) {
    case 32: return int4_sums<32>(x, ws, factors, w.size(0));
    case 64: return int4_sums<64>(x, ws, factors, w.size(0));
    case 128: return int4_sums<128>(x, ws, factors, w.size(0));
    default: TORCH_CHECK(false, "int4 has groups of 32, 64 or 128, not ", group);
  }
}

// -- back to numbers, for products of many rows ---------------------------------------------------------------------

template <typename T>
void widen_int8(const int8_t* w, float scale, int64_t n, T* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = static_cast<T>(w[k] * scale);
}

template <typename T>
void widen_int4(const uint8_t* w, float scale, T* out) {
  for (int64_t j = 0; j < BLOCK / 2; ++j) {
    out[j] = static_cast<T>(((w[j] & 15) - 8) * scale);
    out[j + BLOCK / 2] = static_cast<T>(((w[j] >> 4) - 8) * scale);
  }
}

#if defined(__AVX512BF16__)
inline void store(at::BFloat16* out, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(values));
}

template <>
void widen_int8(const int8_t* w, float scale, int64_t n, at::BFloat16* out) {
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k)));
    store(out + k, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(scale)));
  }
  for (; k < n; ++k) out[k] = w[k] * scale;
}

template <>
void widen_int4(const uint8_t* w, float scale, at::BFloat16* out) {
  const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512 table = _mm512_mul_ps(numbers, _mm512_set1_ps(scale));
  const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  store(out, _mm512_permutexvar_ps(pairs, table));
  store(out + BLOCK / 2, _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table));
}
#endif

// w [N, K] int8, scales [N] float32 to [N, K] of `like`'s dtype.
at::Tensor int8_values(const at::Tensor& w, const at::Tensor& scales, const at::Tensor& like) {
  TORCH_CHECK(w.is_contiguous() && scales.is_contiguous());
  const int64_t columns = w.size(1);
  auto out = at::empty({w.size(0), columns}, like.options());
  const auto* ws = w.const_data_ptr<int8_t>();
  const float* factors = scales.const_data_ptr<float>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, out.scalar_type(), "int8_values", [&] {
    auto* values = out.mutable_data_ptr<scalar_t>();
    share_rows(w.size(0), columns, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) widen_int8(ws + n * columns, factors[n], columns, values + n * columns);
    });
  });
  return out;
}

// w [N, K / 2] uint8, scales [N, K / group] bfloat16 to [N, K] of `like`'s dtype.
at::Tensor int4_values(const at::Tensor& w, const at::Tensor& scales, const at::Tensor& like) {
  TORCH_CHECK(w.is_contiguous() && scales.is_contiguous());
  const int64_t columns = 2 * w.size(1), n_groups = scales.size(1), group = columns / n_groups;
  auto out = at::empty({w.size(0), columns}, like.options());
  const auto* ws = w.const_data_ptr<uint8_t>();
  const auto* factors = scales.const_data_ptr<at::BFloat16>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, out.scalar_type(), "int4_values", [&] {
    auto* values = out.mutable_data_ptr<scalar_t>();
    share_rows(w.size(0), columns / 2, [&](int64_t first, int64_t last) {
      for (int64_t i = first * n_groups; i < last * n_groups; ++i)
        for (int64_t k = i * group; k < (i + 1) * group; k += BLOCK) widen_int4(ws + k / 2, float(factors[i]), values + k);
    });
  });
  return out;
}

// -- from numbers to integers, to the bit as llama/kernels/formats.py -------------------------------------------------

// The value of largest magnitude, sign and all; the first of several.
float largest_of(const float* values, int64_t n) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(values[i]));
  return *std::find_if(values, values + n - 1, [&](float value) { return std::abs(value) == largest; });
}

// values [N, K] float32: columns from start to stop as int8, and the scales [N] of the whole rows.
std::tuple<at::Tensor, at::Tensor> int8_pack(const at::Tensor& values, int64_t start, int64_t stop) {
  const int64_t n_rows = values.size(0), columns = values.size(1), width = stop - start;
  auto packed = at::empty({n_rows, width}, values.options().dtype(at::kChar));
  auto scales = at::empty({n_rows}, values.options());
  const auto rows = values.contiguous();
  const float* from = rows.const_data_ptr<float>();
  auto* to = packed.mutable_data_ptr<int8_t>();
  float* factors = scales.mutable_data_ptr<float>();
  share_rows(n_rows, 4 * columns, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const float* row = from + n * columns;
      const float largest = std::abs(largest_of(row, columns)), scale = largest > 0 ? largest / 127 : 1;
      factors[n] = scale;
#pragma omp simd
      for (int64_t k = 0; k < width; ++k)
        to[n * width + k] = static_cast<int>(std::min(std::max(std::rint(row[start + k] / scale), -127.0f), 127.0f));
    }
  });
  return {packed, scales};
}

// values [N, K] float32 as int4 [N, K / 2], and the scales [N, K / group] bfloat16.
std::tuple<at::Tensor, at::Tensor> int4_pack(const at::Tensor& values, int64_t group) {
  const int64_t n_rows = values.size(0), columns = values.size(1), n_groups = columns / group;
  TORCH_CHECK(n_groups * group == columns && group % BLOCK == 0 && group <= 128);
  auto packed = at::empty({n_rows, columns / 2}, values.options().dtype(at::kByte));
  auto scales = at::empty({n_rows, n_groups}, values.options().dtype(at::kBFloat16));
  const auto rows = values.contiguous();
  const float* from = rows.const_data_ptr<float>();
  auto* to = packed.mutable_data_ptr<uint8_t>();
  auto* factors = scales.mutable_data_ptr<at::BFloat16>();
  share_rows(n_rows, 4 * columns, [&](int64_t first, int64_t last) {
    std::array<uint8_t, 128> numbers;
    for (int64_t i = first * n_groups; i < last * n_groups; ++i) {
      const float* at = from + i * group;
      const at::BFloat16 rounded = largest_of(at, group) / -8;
      const float scale = rounded == 0 ? 1.0f : static_cast<float>(rounded);
      factors[i] = scale;
#pragma omp simd
      for (int64_t k = 0; k < group; ++k)
        numbers[k] = static_cast<int>(std::min(std::max(std::rint(at[k] / scale) + 8, 0.0f), 15.0f));
      for (int64_t k = 0; k < group; k += BLOCK)
#pragma omp simd
        for (int64_t j = 0; j < BLOCK / 2; ++j)
          to[(i * group + k) / 2 + j] = numbers[k + j] | numbers[k + j + BLOCK / 2] << 4;
    }
  });
  return {packed, scales};
}

}  // namespace
