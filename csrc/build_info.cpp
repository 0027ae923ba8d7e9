// What this build holds, as JSON. vlk_build_info.h is written by setup.py.
#include "vlk_build_info.h"

extern "C" __attribute__((visibility("default"))) const char* vlkernels_build_info() { return VLK_BUILD_INFO; }
