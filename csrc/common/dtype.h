// Element types that cross from the torch side to a launcher.
#pragma once

#include <cstdint>

namespace vlk {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace vlk
