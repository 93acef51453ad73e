// The kernels of a CPU as operators of torch, in the namespace `llama_shards`: see the headers for what each does.

#include "block.h"
#include "products.h"
#if defined(__linux__)
#include "shared.h"
#endif

TORCH_LIBRARY(llama_shards, library) {
  library.def("bf16_row(Tensor x, Tensor w) -> Tensor");
  library.def("int8_linear(Tensor x, Tensor w, Tensor scales) -> Tensor");
  library.def("int4_linear(Tensor x, Tensor w, Tensor scales) -> Tensor");
  library.def("int8_values(Tensor w, Tensor scales, Tensor like) -> Tensor");
  library.def("int4_values(Tensor w, Tensor scales, Tensor like) -> Tensor");
  library.def("int8_pack(Tensor values, int start, int stop) -> (Tensor, Tensor)");
  library.def("int4_pack(Tensor values, int group) -> (Tensor, Tensor)");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def("swiglu_(Tensor(a!) gate, Tensor up) -> ()");
#if defined(__linux__)
  library.def("segment_bytes(int world_size) -> int", &segment_bytes);
  library.def("open_segment(str path, int rank, int world_size) -> int", &open_segment);
  library.def("close_segment(int segment) -> ()", &close_segment);
  library.def("shared_all_reduce(Tensor x, int segment, bool largest) -> Tensor");
  library.def("shared_all_gather(Tensor x, int segment, int world_size) -> Tensor");
#endif
}

TORCH_LIBRARY_IMPL(llama_shards, CPU, library) {
  library.impl("bf16_row", &bf16_row);
  library.impl("int8_linear", &int8_linear);
  library.impl("int4_linear", &int4_linear);
  library.impl("int8_values", &int8_values);
  library.impl("int4_values", &int4_values);
  library.impl("int8_pack", &int8_pack);
  library.impl("int4_pack", &int4_pack);
  library.impl("rms_norm", &rms_norm);
  library.impl("rotate", &rotate);
  library.impl("swiglu_", &swiglu_);
#if defined(__linux__)
  library.impl("shared_all_reduce", &shared_all_reduce);
  library.impl("shared_all_gather", &shared_all_gather);
#endif
}
