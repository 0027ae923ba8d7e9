#include "torch_host.h"

#include "selective_scan/selective_scan_torch.cpp"
