// The kernel's coordinates and descriptors, and the emulation's reading of them, against CuTe's layouts. Prints "agree".
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "two_source/two_source.cuh"

using namespace cute;
namespace ts = vlk::two_source;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "differs from CuTe: %s\n", what);
  std::exit(1);
}

// The accumulators of the two warpgroups' threads in a block's tile.
template <typename X>
void accumulators() {
  using Atom = conditional_t<is_same_v<X, bfloat16_t>,
                             SM90_64x256x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>,
                             SM90_64x256x16_F32F16F16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>>;
  auto mma = make_tiled_mma(Atom{}, Layout<Shape<Int<ts::kConsumers>, _1, _1>>{});
  check(int(size(mma)) == ts::kConsumers * ts::kWarpgroup, "the threads of a tile");
  auto tile = make_identity_tensor(Shape<Int<ts::kBlockM>, Int<ts::kBlockN>>{});
  for (int thread = 0; thread < size(mma); ++thread) {
    auto mine = mma.get_slice(thread).partition_C(tile);
    check(size(mine) == 128, "128 accumulators");
    for (int j = 0; j < 32; ++j) {
      for (int i = 0; i < 2; ++i) {
        for (int c = 0; c < 2; ++c) {
          const int row = thread / ts::kWarpgroup * 64 + ts::acc_row(thread % ts::kWarpgroup, i);
          const int col = ts::acc_col(thread % ts::kWarpgroup, j) + c;
          auto at = mine(4 * j + 2 * i + c);
          check(get<0>(at) == row && get<1>(at) == col, "coordinates of an accumulator");
        }
      }
    }
  }
}

// The tile in shared memory; its pointer, not its layout, carries the swizzle.
template <typename Layout>
auto in_shared(Layout layout) {
  alignas(1024) static half_t memory[ts::kBlockN * ts::kBlockK];
  return make_tensor(make_smem_ptr(memory), layout);
}

// Bytes from the tile's beginning.
template <typename Tensor, typename Element>
uint32_t offset(const Tensor& tile, const Element& element) {
  return static_cast<uint32_t>(reinterpret_cast<const char*>(&element) -
                               reinterpret_cast<const char*>(raw_pointer_cast(tile.data())));
}

// An operand in its layout: what wgmma is told, and where it then looks.
template <SM90::GMMA::Major kMajor, typename Layout>
void operand(Layout layout, uint64_t base, uint32_t step, const char* what) {
  auto whole = in_shared(layout);
  auto steps = local_tile(whole, make_shape(size<0>(whole), Int<ts::kStepK>{}), make_coord(_0{}, _));
  auto mine = SM90::GMMA::make_gmma_desc<kMajor>(steps(_, _, 0));
  // the address is the kernel's affair: on the host CuTe has none
  constexpr uint64_t kAddress = 0x3FFF;
  uint64_t ignored = kAddress;
  // of a K-major operand with a swizzle the leading offset is not read
  if (kMajor == SM90::GMMA::Major::K) ignored |= 0x3FFFull << 16;
  check((mine.desc_ & ~ignored) == (base & ~ignored), what);
  auto pieces = recast<uint128_t const>(steps).layout();
  for (int i = 0; i < ts::kBlockK / ts::kStepK; ++i) {
    check(pieces(0, 0, i) == static_cast<int>(i * step), what);
    const vlk::sm90::Operand read(base + i * step);
    for (int row = 0; row < size<0>(whole); ++row) {
      for (int k = 0; k < ts::kStepK; ++k) {
        const uint32_t address = kMajor == SM90::GMMA::Major::K ? read.along_k(row, k) : read.along_n(row, k);
        check(vlk::sm90::swizzled(address) == offset(whole, steps(row, k, i)), what);
      }
    }
  }
}

// A box as the copy lays it out: row r of 64 elements, 128 bytes from row to row, swizzled.
template <typename Layout>
void box(Layout layout, bool along_k, const char* what) {
  auto whole = in_shared(layout);
  for (int row = 0; row < size<0>(whole); ++row) {
    for (int k = 0; k < ts::kBlockK; ++k) {
      const uint32_t plain = along_k ? row * 128 + k * 2 : row / 64 * ts::kBoxBytes + k * 128 + row % 64 * 2;
      check(vlk::sm90::swizzled(plain) == offset(whole, whole(row, k)), what);
    }
  }
}

// Every tile comes once, and those of one turn of the clusters lie together.
void tiles() {
  for (int tiles_m : {1, 2, 7, 8, 9, 33}) {
    for (int tiles_n : {1, 3, 16}) {
      std::vector<int> seen(tiles_m * tiles_n);
      for (int i = 0; i < tiles_m * tiles_n; ++i) {
        const ts::Tile tile = ts::tile_of(i, tiles_m, tiles_n);
        check(tile.m >= 0 && tile.m < tiles_m && tile.n >= 0 && tile.n < tiles_n, "a tile lies outside");
        ++seen[tile.m * tiles_n + tile.n];
      }
      for (int count : seen) check(count == 1, "a tile comes twice or never");
    }
  }
}

int main() {
  using namespace SM90::GMMA;
  accumulators<bfloat16_t>();
  accumulators<half_t>();
  auto x = tile_to_shape(Layout_K_SW128_Atom<half_t>{}, Shape<Int<64>, Int<ts::kBlockK>>{});
  auto w_along_k = tile_to_shape(Layout_K_SW128_Atom<half_t>{}, Shape<Int<ts::kBlockN>, Int<ts::kBlockK>>{});
  // boxes side by side: the depth of a box first
  auto w_along_n =
      tile_to_shape(Layout_MN_SW128_Atom<half_t>{}, Shape<Int<ts::kBlockN>, Int<ts::kBlockK>>{}, Step<_2, _1>{});
  operand<Major::K>(x, ts::descriptor_along_k(0), ts::kStepAlongK, "the operand x");
  operand<Major::K>(w_along_k, ts::descriptor_along_k(0), ts::kStepAlongK, "the operand w along k");
  operand<Major::MN>(w_along_n, ts::descriptor_along_n(0), ts::kStepAlongN, "the operand w along n");
  box(w_along_k, true, "the box of w along k");
  box(w_along_n, false, "the box of w along n");
  tiles();
  std::printf("agree\n");
}
