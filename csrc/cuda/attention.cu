// Which attention kernel a launch takes.
#include "attention_kernels.cuh"

namespace pvdm::cuda {

void attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse, bool tensor_cores,
                       const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  if (tensor_cores)
    matrix_attention_forward(in, out, lse, target);
  else
    vector_attention_forward(in, out, lse, target);
}

void attention_backward(const AttentionInputs& in, const TensorView& grad, const TensorView& out, const TensorView& lse,
                        const TensorView& delta, const TensorView& dqkv, const TensorView& dquery, bool tensor_cores,
                        const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  if (tensor_cores)
    matrix_attention_backward(in, grad, out, lse, delta, dqkv, target);
  else
    vector_attention_backward(in, grad, out, lse, delta, dqkv, dquery, target);
}

int64_t attention_shared_memory(int64_t width, bool tensor_cores, bool backward) {
  return tensor_cores ? matrix_attention_shared(width, backward) : vector_attention_shared();
}

}  // namespace pvdm::cuda
