// Products of x with codes of int8 and int4, for every instruction set: 32 columns at a time, and two vectors of rows.
//
// The lanes of a vector are rows of w; pairs of x are broadcast, one instruction multiplies two columns of each lane and
// adds them up, and nothing is summed across lanes. Pairs are of whole numbers, or, of int4 on AMD's processors with
// instructions for it, of bf16, as which its codes are made as fast.
//
// In whole numbers, x is in 16-bit fixed point, times a power of two for each STEP columns of a row. Of the largest value
// there, and of all down to its 128th part, no bit of a bf16 is lost; what is smaller is off by 2^-15 of that largest
// value at most. The sums of STEP columns, and what zero points take off them, are exact in fp32 with int4, and off by
// 2^-24 of the largest possible with int8.
//
// Vectors are the compiler's own (`vector_size`). Of the instruction set's header it needs Floats, LANES, load_wide,
// store_narrow, widen_to_shorts, widen_to_ints, add_products, largest_of, sum_of and HAS_BF16.

constexpr int STEP = 32;
template <int BITS>
constexpr int AHEAD = 32768 / BITS;  // bytes between the codes that are read and those that are fetched
constexpr int VECTORS = 2;  // that hold a number for each row of a block
constexpr int CODE_ROWS = VECTORS * LANES;

// Whether codes of so many bits are multiplied with x of T in whole numbers, but for tiles (tiles.h), which take bf16. Of
// int4, AMD's processors multiply pairs of bf16 as fast; Intel's take twice as long.
template <int BITS, class T>
constexpr bool IN_WHOLE = BITS == 8 || !HAS_BF16 || !IS_AMD || !std::is_same_v<T, bf16>;

using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Shorts = int16_t __attribute__((vector_size(4 * LANES)));
using UnsignedShorts = uint16_t __attribute__((vector_size(4 * LANES)));

template <class Vector>
static inline Vector load(const void* p) {
    Vector vector;
    std::memcpy(&vector, p, sizeof vector);
    return vector;
}

// Hold what has been loaded in a register: else GCC loads it again for each use.
template <class Vector>
static inline void keep(Vector& vector) {
    asm("" : "+v"(vector));
}

template <class Vector>
static inline void store(void* p, Vector vector) {
    std::memcpy(p, &vector, sizeof vector);
}

static inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// Rows of x [K / STEP, M, STEP] as whole numbers or bf16, and [K / STEP, M] each of scales, which STEP columns of whole
// numbers share, and of sums. A scale is a power of two, or NaN where a value is not finite.
struct Packed {
    int16_t* values;
    float *scales, *totals;
};

template <bool WHOLE, class T>
static const Packed* pack_pairs(const T* x, int64_t M, int64_t K) {
    using Narrow = int16_t __attribute__((vector_size(2 * LANES)));
    static thread_local Packed packed;
    packed = {room<12, int16_t>(M * K), room<13, float>(M * K / STEP), room<14, float>(M * K / STEP)};
    for (int64_t i = 0; i < M * K / STEP; i++) {
        const T* values = x + i % M * K + i / M * STEP;
        int16_t* out = packed.values + i * STEP;
        if constexpr (!WHOLE) {
            Floats total = {};
            for (int j = 0; j < STEP; j += LANES) total += load_wide(values + j);
            std::memcpy(out, values, STEP * sizeof(T));
            packed.totals[i] = sum_of(total);
            continue;
        }
        Floats wide[STEP / LANES];
        Ints most = {}, total = {};  // as integers magnitudes keep their order, and those not finite are above
        for (int j = 0; j < STEP / LANES; j++) {
            wide[j] = load_wide(values + LANES * j);
            const Ints magnitude = (Ints)wide[j] & 0x7fffffff;
            most = most > magnitude ? most : magnitude;
        }
        const int32_t largest = largest_of(most) >> 23;  // exponent
        const int32_t exponent = std::max(largest, 15);  // so that 2^(14 - exponent) and its inverse are normal numbers
        const int32_t bits[2] = {(268 - exponent) << 23, (exponent - 14) << 23};
        float inverse, scale;
        std::memcpy(&inverse, bits, 4), std::memcpy(&scale, bits + 1, 4);
        for (int j = 0; j < STEP / LANES; j++) {
            const Ints whole = (Ints)(wide[j] * inverse + 12582912.f) - 0x4b400000;  // 1.5 * 2^23: rounds, ties to even
            store(out + LANES * j, __builtin_convertvector(whole, Narrow));
            total += whole;
        }
        packed.scales[i] = largest == 255 ? NAN : scale;
        packed.totals[i] = sum_of(to_floats(total));
    }
    return &packed;
}

// Scales, whose type is asked when they are read: a function for each type would take long to compile.
struct Scales {
    const void* first;
    int type;  // 0: bf16, 1: fp16, 2: fp32
    const char* place(int64_t i) const { return (const char*)first + (type == 2 ? 4 : 2) * i; }
    Scales from(int64_t i) const { return {place(i), type}; }
    Floats vector(int64_t i) const {
        const void* p = place(i);
        return type == 0 ? load_wide((const bf16*)p) : type == 1 ? load_wide((const half*)p) : load_wide((const float*)p);
    }
};

// What codes of a block's rows have too much: their zero points, which int8 may not have, and 16 of int4 in bf16.
template <int BITS, bool WHOLE>
static inline void zeros_of(const uint8_t* zeros, int64_t i, Floats* wide) {
    const Ints mask = Ints{} + (BITS == 8 ? -1 : 15);
    for (int h = 0; h < VECTORS; h++) {
        const Ints codes = zeros ? (Ints)widen_to_ints(zeros + (BITS == 8 ? i + LANES * h : i / 2)) : Ints{};
        wide[h] = to_floats((BITS == 8 ? codes : codes >> 4 * h & mask)) + (BITS == 4 && !WHOLE ? 16.f : 0.f);
    }
}

// int4's codes number i of each word's halves.
static inline Shorts whole_codes(Ints words, int i) {
    return i == 3 ? (Shorts)((UnsignedShorts)words >> 12) : (Shorts)(words >> 4 * i & 0x000f000f);
}

// The same as bf16, the upper bits of a mantissa: 16 + code.
static inline Shorts bf16_codes(UnsignedShorts words, int i) {
    return (Shorts)(((i ? words >> (4 * i - 3) : words << 3) & (15 << 3)) | 0x4180);
}

// Call run(i, codes [VECTORS]) for each pair i of the STEP columns of a block of w; whole numbers, or int4's in bf16.
// ONCE: no other pass over w follows, so that the second cache need not keep it. With AMD's processors one row is 1.03 to
// 1.05 times as fast then; Intel's lose what they have fetched so, and take 1.3 to 2 times as long.
template <int BITS, bool WHOLE, bool ONCE = false, class Run>
static inline void each_pair(const uint8_t* w, Run run) {
    constexpr auto HINT = ONCE && IS_AMD ? _MM_HINT_NTA : _MM_HINT_T0;
#pragma GCC unroll 4
    for (int v = 0; v < STEP / 8; v++) {
        Ints words[VECTORS];
        for (int h = 0; BITS == 4 && h < VECTORS; h++) {
            const uint8_t* p = w + 4 * LANES * (VECTORS * v + h);
            words[h] = load<Ints>(p);
            if (4 * LANES * h % 64 == 0) _mm_prefetch((const char*)p + AHEAD<BITS>, HINT);  // a line's beginning
            keep(words[h]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            Shorts codes[VECTORS];
            if (BITS == 8) _mm_prefetch((const char*)w + AHEAD<BITS> + 2 * LANES * VECTORS * (4 * v + i), HINT);
            for (int h = 0; h < VECTORS; h++) {
                if constexpr (BITS == 8) codes[h] = (Shorts)widen_to_shorts(w + 2 * LANES * (VECTORS * (4 * v + i) + h));
                if constexpr (BITS == 4) codes[h] = WHOLE ? whole_codes(words[h], i) : bf16_codes((UnsignedShorts)words[h], i);
            }
            run(4 * v + i, codes);
        }
    }
}

// Add the products of C rows of x, and STEP columns of a block of w, to sums [C, VECTORS].
template <int BITS, bool WHOLE, int C>
static inline void add_step(const int16_t* x, const float* x_scales, const float* totals, const uint8_t* w, const Floats* scales,
                            const Floats* zeros, Floats (*sums)[VECTORS]) {
    constexpr int PARTS = std::clamp(PARALLEL_SUMS / (C * VECTORS), 1, BITS / 2);  // side by side, as measured: adding to one waits
    using Sums = std::conditional_t<WHOLE, Ints, Floats>;
    Sums parts[C][VECTORS][PARTS];  // not set to 0 here: GCC would do so in memory
    each_pair<BITS, WHOLE, C == 1>(w, [&](int i, const Shorts* codes) __attribute__((always_inline)) {
        for (int c = 0; c < C; c++) {
            int32_t pair;
            std::memcpy(&pair, x + c * STEP + 2 * i, 4);
            for (int h = 0; h < VECTORS; h++) {
                if (i < PARTS) parts[c][h][i] = Sums{};
                add_products(parts[c][h][i % PARTS], codes[h], pair);
            }
        }
    });
    for (int c = 0; c < C; c++)
        for (int h = 0; h < VECTORS; h++) {
            for (int i = 1; i < PARTS; i++) parts[c][h][0] += parts[c][h][i];
            const Floats exact = __builtin_convertvector(parts[c][h][0], Floats) - zeros[h] * totals[c];
            sums[c][h] += (WHOLE ? exact * x_scales[c] : exact) * scales[h];
        }
}

template <int BITS, int M, class T>
__attribute__((noinline)) static void code_blocks(const Packed* x, const uint8_t* w, Scales scales, const uint8_t* zeros, T* y,
                                                  int64_t N, int64_t K, int64_t group, int64_t first, int64_t last) {
    constexpr int C = M > REGISTER_ROWS ? (M + 1) / 2 : M;  // rows of x whose sums stay in registers
    constexpr int BYTES = CODE_ROWS * STEP * BITS / 8;
    constexpr bool WHOLE = IN_WHOLE<BITS, T>;
    w += first * CODE_ROWS * K * BITS / 8;
    int64_t at = first * (K / group) * CODE_ROWS;
    for (int64_t n = first; n < last; n++) {
        Floats sums[M][VECTORS] = {};
        const int16_t* values = x->values;
        const float *x_scales = x->scales, *totals = x->totals;
        for (int64_t g = 0; g < K / group; g++, at += CODE_ROWS) {
            // Scales have a quarter of the codes' bytes at most, zeros an eighth: they are fetched at least as early.
            _mm_prefetch(scales.place(at) + AHEAD<BITS> / 4, _MM_HINT_T0);
            if (zeros) _mm_prefetch((const char*)zeros + at * BITS / 8 + AHEAD<BITS> / 8, _MM_HINT_T0);
            Floats zero[VECTORS], scale[VECTORS];
            zeros_of<BITS, WHOLE>(zeros, at, zero);
            for (int h = 0; h < VECTORS; h++) scale[h] = scales.vector(at + LANES * h);
            for (int64_t k = 0; k < group; k += STEP, w += BYTES, values += M * STEP, x_scales += M, totals += M) {
                add_step<BITS, WHOLE, C>(values, x_scales, totals, w, scale, zero, sums);
                asm("" : "+r"(w));  // else GCC keeps the codes on the stack, which takes longer than to unpack them again
                if constexpr (M > C)
                    add_step<BITS, WHOLE, M - C>(values + C * STEP, x_scales + C, totals + C, w, scale, zero, sums + C);
            }
        }
        for (int m = 0; m < M; m++)
            for (int h = 0; h < VECTORS; h++) store_narrow(y + m * N + n * CODE_ROWS + LANES * h, sums[m][h]);
    }
}

// Write the rows of a block, [CODE_ROWS, K], so many values apart.
template <int BITS>
static void unpack(const uint8_t* w, Scales scales, const uint8_t* zeros, int64_t K, int64_t group, int64_t block, bf16* out,
                   int64_t stride);

// Do the same by tiles, and say whether they are for so many rows.
template <int BITS, class T>
static bool codes_by_tiles(const T* x, const uint8_t* w, Scales scales, const uint8_t* zeros, T* y, int64_t M, int64_t N,
                           int64_t K, int64_t group);

template <int BITS, class T>
static void code_product(const T* x, const uint8_t* w, Scales scales, const uint8_t* zeros, T* y, int64_t M, int64_t N,
                         int64_t K, int64_t group, const int64_t* experts) {
    if (!experts && codes_by_tiles<BITS>(x, w, scales, zeros, y, M, N, K, group)) return;
    // In fp32 GEMM would be slower than these products are at any number of rows.
    if constexpr (std::is_same_v<typename Operands<T>::Value, bf16>)
        if (M > GEMM_ABOVE && !experts)
            return gemm(x, y, M, N, K, [=](int64_t first, int64_t count) {
                const int64_t stride = distance_of_rows(K);
                T* rows = room<11, T>(count * stride);
                for (int64_t i = 0; i < count; i += CODE_ROWS)
                    unpack<BITS>(w, scales, zeros, K, group, (first + i) / CODE_ROWS, rows + i * stride, stride);
                return std::pair<const T*, int64_t>(rows, stride);
            });
    auto run = [=](const Pass& pass, const Packed* packed, int64_t first, int64_t last) {
        with_rows(pass.rows, [&](auto M) {
            code_blocks<BITS, M>(packed, w, scales, zeros, y + pass.out(N), N, K, group, first, last);
        });
    };
    over_rows<CODE_ROWS, pack_pairs<IN_WHOLE<BITS, T>, T>>(x, M, N, K, experts, run);
}
