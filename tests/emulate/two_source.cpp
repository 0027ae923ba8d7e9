// All of csrc/two_source over CPU tensors.
#include "torch_host.h"

#include "two_source/two_source_bwd_bf16.cu"
#include "two_source/two_source_bwd_fp16.cu"
#include "two_source/two_source_fwd_bf16.cu"
#include "two_source/two_source_fwd_fp16.cu"
#include "two_source/two_source_torch.cpp"
