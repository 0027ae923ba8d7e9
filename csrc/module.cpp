// vlkernels._C: reports which archs, CUDA version and ops the build holds. Nothing needs it to work.
#include <pybind11/pybind11.h>

#include "vlk_build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the compiled part of vlkernels was built from and for.";
  m.def(
      "info", [] { return pybind11::module_::import("json").attr("loads")(VLK_BUILD_INFO); },
      "A dict: version, archs, cuda, torch, torch_target, ops, git.");
}
