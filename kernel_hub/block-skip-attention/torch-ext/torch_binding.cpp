// The op schema, the same for every backend, and its registration.
#include "torch_binding.h"

#include <torch/csrc/stable/library.h>

#include "registration.h"

// In the tests' emulation, the kernels for CUDA take the CPU's tensors.
#if defined(BSA_EMULATE)
#define BSA_DISPATCH_KEY CPU
#else
#define BSA_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor? key_valid, Tensor? q_offset, Tensor? sinks, "
      "Tensor? log_lambda, Tensor? block_threshold, Tensor? max_dropped_mass, float scale, bool "
      "causal, "
      "int window, float softcap, int block_q, int block_k, int order, int split_k, bool "
      "keep_sink, "
      "bool return_skips, bool return_dropped_mass, Tensor? int8_keys=None, "
      "float expected_sparsity=0.5) "
      "-> (Tensor out, Tensor lse, Tensor counts, Tensor skips, Tensor dropped_mass)");
  ops.def(
      "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor skips, Tensor? key_valid, Tensor? q_offset, Tensor? sinks, float scale, bool causal, "
      "int window, float softcap, int block_q, int block_k) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  ops.def("append_int8_keys(Tensor k, Tensor position, Tensor(a!) copy) -> ()");
  ops.def(
      "observe(Tensor q, Tensor k, Tensor v, Tensor? sinks, float scale, int window, "
      "float softcap, Tensor geometries, Tensor kept, bool keep_sink, Tensor groups, "
      "int group_count, Tensor eps, int bins, float u_min, float bins_per_nat, float mass_unit, "
      "int sample_from, int sample_every) "
      "-> (Tensor out, Tensor prefill, Tensor decode, Tensor prefill_tops, Tensor decode_tops)");
  ops.def("rotate_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? norm, float eps) -> ()");
  ops.def("cpu_level() -> str");
}

#if defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, BSA_DISPATCH_KEY, ops) {
  ops.impl("forward", TORCH_BOX(&forward_cuda));
  ops.impl("append_int8_keys", TORCH_BOX(&append_int8_keys_cuda));
}
#else
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("forward", TORCH_BOX(&forward_cpu));
  ops.impl("backward", TORCH_BOX(&backward_cpu));
  ops.impl("append_int8_keys", TORCH_BOX(&append_int8_keys_cpu));
  ops.impl("observe", TORCH_BOX(&observe_cpu));
  ops.impl("rotate_", TORCH_BOX(&rotate_cpu));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("cpu_level", TORCH_BOX(&cpu_level));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
