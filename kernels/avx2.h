// What cpu.cpp needs of AVX2 with FMA and F16C, for x in bf16 and fp16.
//
// Weights in bf16 and fp16 are multiplied in fp32, above GEMM_ABOVE rows of x by GEMM. Codes of int8 and int4 are
// multiplied in whole numbers.
//
// Included by cpu.cpp, whose helpers and forms of weights it uses.

constexpr char INSTRUCTION_SET[] = "avx2";
constexpr bool HAS_BF16 = false;
constexpr int PARALLEL_SUMS = 4;   // vectors of them, in codes.h
constexpr int REGISTER_ROWS = 5;   // of x, whose sums stay in registers there
constexpr int GEMM_ABOVE = 32;       // of x; above, GEMM of bf16 and fp16 is faster

using Floats = __m256;
constexpr int LANES = 8;

struct Wide;
template <class T>  // what values of x are multiplied as, where they are multiplied again and again
using Operands = Wide;

static inline __m256 load_wide(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline __m256 load_wide(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline __m256 load_wide(const float* p) { return _mm256_loadu_ps(p); }

template <class T>
static inline void store_narrow(T* p, __m256 values) {
    alignas(32) float wide[8];
    _mm256_store_ps(wide, values);
    for (int i = 0; i < 8; i++) set(p[i], wide[i]);
}

// 16 values in two vectors, in an order that is the same for x and w: bf16 as even and odd ones, which takes no shuffle.
struct Two {
    __m256 first, second;
};

static inline Two load_two(const bf16* p) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i*)p), odd = _mm256_set1_epi32(0xffff0000);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(_mm256_and_si256(pairs, odd))};
}
static inline Two load_two(const half* p) { return {load_wide(p), load_wide(p + 8)}; }

// Bytes with a sign, as many as a vector takes.
static inline __m256i widen_to_shorts(const uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
static inline __m256i widen_to_ints(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

// Add the products of pairs of int16, one of which all lanes share.
template <class Ints, class Shorts>
static inline void add_products(Ints& sum, Shorts a, int32_t pair) {
#ifdef __AVXVNNI__
    sum = (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, _mm256_set1_epi32(pair));
#else
    sum += (Ints)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(pair));
    asm("" : "+x"(sum));  // else GCC adds up many products first, for which there are no registers
#endif
}

template <class Ints>
static inline int32_t largest_of(Ints v) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return std::max(_mm_cvtsi128_si32(four), _mm_extract_epi32(four, 1));
}

static inline float sum_of(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

static inline float largest_of(__m256 v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

#include "codes.h"
#include "wide.h"

template <class T>
static void dense_product(const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K, const int64_t* experts) {
    wide_product(x, w, y, M, N, K, experts);
}

#include "tiles.h"  // where there are none

// ---------------------------------------------------------------------------------------------------------------------
// What is multiplied again and again, in fp32

constexpr int SLOTS = 32;  // of attention, taken together
constexpr int SUMS = 8;    // vectors of them, in gemm.h

static inline void store_narrow(float* p, __m256 values) { _mm256_storeu_ps(p, values); }

// Transpose 8 x 8 values.
static inline void transpose(__m256* v) {
    __m256 twos[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        twos[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        twos[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(twos[i + j], twos[i + 2 + j], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(twos[i + j], twos[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
        v[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
}

// A bit for each of SLOTS bytes: whether it is not 0.
static inline uint64_t flags_of(const uint8_t* seen) {
    const __m256i zero = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)seen), _mm256_setzero_si256());
    return uint32_t(~_mm256_movemask_epi8(zero));
}
