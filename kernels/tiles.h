// Products of several rows of x, and those of GEMM and attention, by AMX: tiles of 16 rows of 64 bytes, of which an instruction
// multiplies two. Its first factor has rows of 32 bf16, its second 16 pairs of columns of 16 rows: w of bf16 lies as the
// first, and codes as the second.
//
// Included by the instruction sets' headers, of which AVX2 has no tiles. For machines without AMX, tests/tiles.h computes
// what the instructions do.

template <class A, class B>
static bool multiply_add_by_tiles(const A*, int64_t, const B*, float*, int64_t, int64_t, int64_t) { return false; }

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)

constexpr int TILES_FROM = 4;      // rows of x, with w of bf16; with codes from MAX_M on
constexpr int TILES_TO = 32;       // with codes; above, GEMM is faster
constexpr int AMX_ROWS = 16;
constexpr int MULTIPLY_TILES_FROM = 6;  // rows in `multiply_add`: the padding costs as much as rows
using TileRow = Line;  // 64 bytes

// Linux lends the tiles' registers to a process that asks for them; a guest or a container may be refused.
static bool ask_for_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

static bool has_tiles() {
    static const bool allowed = ask_for_tiles();
    return allowed;
}

// The shapes of a thread's tiles, while it lives: `rows` rows in the first three tiles, AMX_ROWS in the others. Those that
// oneDNN has set up come back, since it sets them up only where they are others than its own.
class Tiles {
    struct alignas(64) Shapes {
        uint8_t palette = 0, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } before;

  public:
    explicit Tiles(int rows) {
        _tile_storeconfig(&before);
        asm volatile("" : : "r"(&before) : "memory");  // GCC 12 knows of their first bytes alone
        Shapes shapes;
        shapes.palette = 1;
        for (int i = 0; i < 8; i++) shapes.row_bytes[i] = sizeof(TileRow), shapes.rows[i] = i < 3 ? rows : AMX_ROWS;
        asm volatile("" : : "r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
    }
    ~Tiles() {
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
};

// What a tile is loaded from has been written: GCC 12 does not say so itself.
static inline void before_tiles_load() { asm volatile("" ::: "memory"); }

// Put x [M, K] in pairs of columns, [K / 32, 16 pairs, 16 rows]; 0 for rows that x does not have.
static void pack_pairs_of_columns(const bf16* x, int64_t M, int64_t K, TileRow* out) {
    for (int64_t k = 0; k < K; k += 32) {
        __m512i rows[AMX_ROWS];
        for (int m = 0; m < AMX_ROWS; m++) rows[m] = m < M ? _mm512_loadu_si512(x + m * K + k) : _mm512_setzero_si512();
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512(out + k / 2 + i, rows[i]);
    }
}

static const TileRow* pack_for_tiles(const bf16* x, int64_t M, int64_t K) {
    TileRow* packed = room<15, TileRow>(K / 2);
    pack_pairs_of_columns(x, M, K, packed);
    return packed;
}

static bool bf16_by_tiles(const bf16* x, const bf16* w, bf16* y, int64_t M, int64_t N, int64_t K) {
    if (M < TILES_FROM || M > GEMM_ABOVE || !has_tiles() || N % AMX_ROWS) return false;
    over_rows<AMX_ROWS, pack_for_tiles>(x, M, N, K, nullptr, [=](const Pass&, const TileRow* packed, int64_t first, int64_t last) {
        const Tiles shapes(AMX_ROWS);
        alignas(64) __m512i sums[4][AMX_ROWS];
        for (int64_t n = first * AMX_ROWS; n < last * AMX_ROWS; n += AMX_ROWS) {
            const bf16* p = w + n * K;
            // Fetched are the rows that come next, in the order of memory.
#define MULTIPLY(sum, weights, inputs, k)                                                                    \
    for (int64_t i = 0; i < AMX_ROWS * 32; i += 32) _mm_prefetch((const char*)(p + AMX_ROWS * (K + (k)) + i), _MM_HINT_T1); \
    _tile_loadd(weights, p + (k), K * sizeof(bf16));                                                         \
    _tile_loadd(inputs, packed + (k) / 2, sizeof(TileRow));                                                  \
    _tile_dpbf16ps(sum, weights, inputs)
            before_tiles_load();
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            int64_t k = 0;
            for (; k + 128 <= K; k += 128) {  // four sums side by side, since adding to one waits for itself
                MULTIPLY(0, 4, 5, k);
                MULTIPLY(1, 6, 7, k + 32);
                MULTIPLY(2, 4, 5, k + 64);
                MULTIPLY(3, 6, 7, k + 96);
            }
            for (; k < K; k += 32) {
                MULTIPLY(0, 4, 5, k);
            }
#undef MULTIPLY
            _tile_stored(0, sums[0], sizeof(TileRow));
            _tile_stored(1, sums[1], sizeof(TileRow));
            _tile_stored(2, sums[2], sizeof(TileRow));
            _tile_stored(3, sums[3], sizeof(TileRow));
            for (int r = 0; r < AMX_ROWS; r++)
                for (int i = 1; i < 4; i++) sums[0][r] = (__m512i)((__m512)sums[0][r] + (__m512)sums[i][r]);
            transpose(sums[0]);
            for (int64_t m = 0; m < M; m++) store_narrow(y + m * N + n, (__m512)sums[0][m]);
        }
    }, GEMM_ABOVE);
    return true;
}

// As `multiply_add` (gemm.h), in whole tiles of 16 rows, for which a and sums have room.
static bool multiply_add_by_tiles(const bf16* a, int64_t stride, const int32_t* b, float* sums, int64_t rows, int64_t cells, int64_t width) {
    if (rows < MULTIPLY_TILES_FROM || !has_tiles()) return false;
    const Tiles shapes(AMX_ROWS);
    const int64_t apart = width * sizeof(float), a_apart = stride * sizeof(bf16);
    before_tiles_load();
    for (int64_t r = 0; r < rows; r += 2 * AMX_ROWS)
        for (int64_t d = 0; d < width; d += 2 * AMX_ROWS) {
            const bool two = r + AMX_ROWS < rows;
            const bf16 *first = a + r * stride, *second = first + AMX_ROWS * stride;
            float *out = sums + r * width + d, *more = out + AMX_ROWS * width;
            _tile_loadd(0, out, apart);
            _tile_loadd(1, out + 16, apart);
            if (two) {  // GCC's are macros of statements, which no comma joins
                _tile_loadd(2, more, apart);
                _tile_loadd(3, more + 16, apart);
            }
            for (int64_t c = 0; c < cells; c += 16) {
                _tile_loadd(4, first + 2 * c, a_apart);
                _tile_loadd(6, b + c * width + d, apart);
                _tile_loadd(7, b + c * width + d + 16, apart);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (!two) continue;
                _tile_loadd(5, second + 2 * c, a_apart);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, out, apart);
            _tile_stored(1, out + 16, apart);
            if (two) {
                _tile_stored(2, more, apart);
                _tile_stored(3, more + 16, apart);
            }
        }
    return true;
}

template <int BITS, class T>
static bool codes_by_tiles(const T* x, const uint8_t* w, Scales scales, const uint8_t* zeros, T* y, int64_t M, int64_t N,
                           int64_t K, int64_t group) {
    if (M < MAX_M || M > TILES_TO || !std::is_same_v<T, bf16> || !has_tiles()) return false;
    auto run = [=](const Pass& pass, const Packed* packed, int64_t first, int64_t last) {
        const int64_t rows = pass.rows;
        T* const out = y + pass.out(N);
        const Tiles shapes(rows);
        alignas(64) Shorts codes[VECTORS][AMX_ROWS];
        alignas(64) Floats parts[VECTORS][AMX_ROWS], sums[VECTORS][AMX_ROWS];
        const uint8_t* p = w + first * CODE_ROWS * K * BITS / 8;
        int64_t at = first * (K / group) * CODE_ROWS;
        for (int64_t n = first; n < last; n++) {
            for (int h = 0; h < VECTORS; h++) std::fill(sums[h], sums[h] + rows, Floats{});
            const int16_t* values = packed->values;
            const float* totals = packed->totals;
            for (int64_t g = 0; g < K / group; g++, at += CODE_ROWS) {
                float total[AMX_ROWS] = {};
                _tile_zero(0);
                _tile_zero(1);
                for (int64_t k = 0; k < group; k += STEP, p += CODE_ROWS * STEP * BITS / 8, values += rows * STEP, totals += rows) {
                    each_pair<BITS, false>(p, [&](int i, const Shorts* pair) __attribute__((always_inline)) {
                        for (int h = 0; h < VECTORS; h++) codes[h][i] = BITS == 8 ? to_bf16(pair[h]) : pair[h];
                    });
                    for (int64_t m = 0; m < rows; m++) total[m] += totals[m];
                    before_tiles_load();
                    _tile_loadd(2, values, sizeof(TileRow));
                    _tile_loadd(3, codes[0], sizeof(TileRow));
                    _tile_loadd(4, codes[1], sizeof(TileRow));
                    _tile_dpbf16ps(0, 2, 3);
                    _tile_dpbf16ps(1, 2, 4);
                }
                _tile_stored(0, parts[0], sizeof(TileRow));
                _tile_stored(1, parts[1], sizeof(TileRow));
                Floats zero[VECTORS];
                zeros_of<BITS, false>(zeros, at, zero);
                for (int h = 0; h < VECTORS; h++) {
                    const Floats scale = scales.vector(at + LANES * h);
                    for (int64_t m = 0; m < rows; m++) sums[h][m] += (parts[h][m] - zero[h] * total[m]) * scale;
                }
            }
            for (int64_t m = 0; m < rows; m++)
                for (int h = 0; h < VECTORS; h++) store_narrow(out + m * N + n * CODE_ROWS + LANES * h, sums[h][m]);
        }
    };
    over_rows<CODE_ROWS, pack_pairs<false, T>>(x, M, N, K, nullptr, run, AMX_ROWS);
    return true;
}

#else

static bool bf16_by_tiles(const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t) { return false; }
static bool has_tiles() { return false; }

template <int BITS, class T>
static bool codes_by_tiles(const T*, const uint8_t*, Scales, const uint8_t*, T*, int64_t, int64_t, int64_t, int64_t) {
    return false;
}

#endif
