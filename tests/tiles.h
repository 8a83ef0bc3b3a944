// AMX in plain C++, for machines without it: what kernels/tiles.h asks of it, as Intel's manual of instructions has it.
//
// g++ -include tests/tiles.h compiles cpu.cpp with it, for AVX-512 with bf16.

#include <immintrin.h>
#include <sys/syscall.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef MADE_BY_AMD  // whose processors have no AMX
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#undef SYS_arch_prctl
#define SYS_arch_prctl SYS_sched_yield  // which always succeeds

namespace emulated {

struct Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Shapes) == 64);

inline thread_local Shapes shapes = {};
inline thread_local uint8_t tiles[8][16][64];

inline void require(bool fits) {
    if (!fits) abort();  // as a program that uses a tile without a shape is ended
}

inline void load_shapes(const void* p) {
    std::memcpy(&shapes, p, 64);
    require(shapes.palette == 1);
    for (int i = 0; i < 8; i++) require(shapes.rows[i] <= 16 && shapes.row_bytes[i] <= 64 && shapes.row_bytes[i] % 4 == 0);
    std::memset(tiles, 0, sizeof tiles);
}

inline void zero(int t) {
    require(shapes.palette == 1 && shapes.rows[t]);
    std::memset(tiles[t], 0, sizeof tiles[t]);
}

inline void load(int t, const void* p, int64_t stride) {
    zero(t);
    for (int r = 0; r < shapes.rows[t]; r++) std::memcpy(tiles[t][r], (const char*)p + r * stride, shapes.row_bytes[t]);
}

inline void store(int t, void* p, int64_t stride) {
    require(shapes.palette == 1 && shapes.rows[t]);
    for (int r = 0; r < shapes.rows[t]; r++) std::memcpy((char*)p + r * stride, tiles[t][r], shapes.row_bytes[t]);
}

inline float value(const uint8_t* p) {  // of a bf16
    uint16_t narrow;
    std::memcpy(&narrow, p, 2);
    const uint32_t bits = uint32_t(narrow) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void multiply(int c, int a, int b) {
    require(shapes.palette == 1 && c != a && c != b && a != b);
    require(shapes.rows[c] == shapes.rows[a] && shapes.row_bytes[c] == shapes.row_bytes[b]);
    require(shapes.row_bytes[a] == 4 * shapes.rows[b]);
    for (int m = 0; m < shapes.rows[c]; m++)
        for (int k = 0; k < shapes.row_bytes[a] / 4; k++)
            for (int n = 0; n < shapes.row_bytes[c] / 4; n++) {
                float sum;
                std::memcpy(&sum, tiles[c][m] + 4 * n, 4);
                for (int i = 0; i < 4; i += 2) sum += value(tiles[a][m] + 4 * k + i) * value(tiles[b][k] + 4 * n + i);
                std::memcpy(tiles[c][m] + 4 * n, &sum, 4);
            }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_shapes
#define _tile_storeconfig(p) std::memcpy((void*)(p), &emulated::shapes, 64)
#define _tile_release() (void)(emulated::shapes = {})
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
