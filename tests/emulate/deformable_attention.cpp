// All of csrc/deformable_attention over CPU tensors.
#include "torch_host.h"

#include "deformable_attention/deformable_attention_bwd.cu"
#include "deformable_attention/deformable_attention_fwd.cu"
#include "deformable_attention/deformable_attention_torch.cpp"
