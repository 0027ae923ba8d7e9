// One instantiation a file: each keeps nvcc busy for seconds.
#include "two_source/two_source.cuh"

namespace vlk {

template <>
const char* launch_two_source_bwd<DType::kFloat16>(const TwoSourceParams& params, void* stream) {
  return two_source::launch<__half, true>(params, stream);
}

}  // namespace vlk
