// The formulas between a block's matrices, each in one pass over memory: norm, rotation and SwiGLU. Arithmetic is in
// float32; tensors are float32, float16 or bfloat16.
//
// Shape legend: B batch, T tokens, E dim, F FFN width, H heads, D head_dim.

#pragma once

#include "rows.h"

namespace {

#define DISPATCH_FLOAT32(type, name, ...)                                      \
  AT_DISPATCH_SWITCH(type, name, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)     \
                                     AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__)  \
                                     AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

// e^x to within a few units in the last place, written for compilers to vectorise; x is clamped to [-87, 88].
inline float fast_exp(float x) {
  const float bounded = std::min(std::max(x, -87.0f), 88.0f);
  const float whole = std::rint(bounded * 1.44269504f);
  const float rest = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts
  float power = 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  return power * std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

template <typename T>
void norm_row(const T* x, const T* weight, int64_t width, float eps, T* out) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < width; ++k) squares += widen(x[k]) * widen(x[k]);
  const float scale = 1.0f / std::sqrt(squares / width + eps);
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) {
    const float normed = widen(narrow<T>(widen(x[k]) * scale));  // rounded before it is weighted, as in the formula
    out[k] = narrow<T>(normed * widen(weight[k]));
  }
}

// x [..., E] over its root mean square, times weight [E] (arXiv:1910.07467).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const auto rows = x.contiguous(), factors = weight.contiguous();
  const int64_t width = x.size(-1), n_rows = width ? x.numel() / width : 0;
  TORCH_CHECK(weight.numel() == width && weight.scalar_type() == x.scalar_type());
  auto y = at::empty_like(rows);
  DISPATCH_FLOAT32(x.scalar_type(), "rms_norm", [&] {
    const auto *from = rows.const_data_ptr<scalar_t>(), *by = factors.const_data_ptr<scalar_t>();
    auto* to = y.mutable_data_ptr<scalar_t>();
    share_rows(n_rows, rows.element_size() * width, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        norm_row(from + row * width, by, width, static_cast<float>(eps), to + row * width);
    });
  });
  return y;
}

template <typename T>
void rotate_row(const T* x, const float* cos, const float* sin, int64_t width, T* out) {
#pragma omp simd
  for (int64_t k = 0; k < width / 2; ++k) {
    const float even = widen(x[2 * k]), odd = widen(x[2 * k + 1]);
    out[2 * k] = narrow<T>(even * cos[k] - odd * sin[k]);
    out[2 * k + 1] = narrow<T>(even * sin[k] + odd * cos[k]);
  }
}

// x [B, T, H, D] with neighbouring pairs of features rotated by the angles of cos and sin [B, T, 1, D / 2] float32
// (arXiv:2104.09864).
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  if (x.numel() == 0) return at::empty_like(x);
  const int64_t n_heads = x.size(-2), width = x.size(-1), n_tokens = x.numel() / (n_heads * width);
  const auto rows = x.contiguous(), c = cos.contiguous(), s = sin.contiguous();
  TORCH_CHECK(cos.numel() == n_tokens * width / 2 && sin.numel() == cos.numel() && cos.scalar_type() == at::kFloat);
  const float *cosines = c.const_data_ptr<float>(), *sines = s.const_data_ptr<float>();
  auto y = at::empty_like(rows);
  DISPATCH_FLOAT32(x.scalar_type(), "rotate", [&] {
    const auto* from = rows.const_data_ptr<scalar_t>();
    auto* to = y.mutable_data_ptr<scalar_t>();
    share_rows(n_tokens, rows.element_size() * n_heads * width, [&](int64_t first, int64_t last) {
      for (int64_t row = first * n_heads; row < last * n_heads; ++row) {
        const int64_t angle = row / n_heads * (width / 2);
        rotate_row(from + row * width, cosines + angle, sines + angle, width, to + row * width);
      }
    });
  });
  return y;
}

template <typename T>
void swiglu_run(T* gate, const T* up, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const float x = widen(gate[k]);
    gate[k] = narrow<T>(x / (1.0f + fast_exp(-x)) * widen(up[k]));
  }
}

// silu(gate) * up in the place of gate, both [..., F] (arXiv:2002.05202).
void swiglu_(at::Tensor gate, const at::Tensor& up) {
  const auto by = up.contiguous();
  TORCH_CHECK(gate.is_contiguous() && gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type());
  const int64_t width = gate.size(-1), n_rows = width ? gate.numel() / width : 0;
  DISPATCH_FLOAT32(gate.scalar_type(), "swiglu_", [&] {
    auto* to = gate.mutable_data_ptr<scalar_t>();
    const auto* from = by.const_data_ptr<scalar_t>();
    share_rows(n_rows, gate.element_size() * width, [&](int64_t first, int64_t last) {
      swiglu_run(to + first * width, from + first * width, (last - first) * width);
    });
  });
}

}  // namespace
