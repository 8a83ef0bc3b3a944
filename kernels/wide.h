// Products in fp32 of x with w, both in bf16 or fp16: all there are with AVX2, and fp16's with AVX-512. Above GEMM_ABOVE of x
// they are by GEMM, but for experts.
//
// Of the instruction set's header it needs Two and load_two: values in two vectors, in an order that is the same for x and w.

constexpr int TWO = 2 * LANES;

// Put x [M, K] in the order in which it is read, in fp32: [K / TWO, M, TWO].
template <class T>
static const float* pack_wide(const T* x, int64_t M, int64_t K) {
    float* packed = room<12, float>(M * K);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k += TWO) {
            const Two two = load_two(x + m * K + k);
            store(packed + k * M + m * TWO, two.first);
            store(packed + k * M + m * TWO + LANES, two.second);
        }
    return packed;
}

// Add the products of C rows of x, of M that are packed, and R rows of w, over `width` columns, to sums [C, 16]. Fetched
// is what comes `ahead` of w: of `whole` rows in the order of memory, else at the same columns.
template <int R, int C, int M, class T>
static inline void wide_tile(const float* x, const T* w, int64_t K, int64_t width, int64_t ahead, bool whole, float* sums) {
    const int64_t step = whole ? R : 1, gap = whole ? 32 : K;
    Floats parts[R][C][2] = {};
    for (int64_t k = 0; k < width; k += 32) {
        for (int j = 0; j < R; j++) _mm_prefetch((const char*)(w + ahead + step * k + gap * j), _MM_HINT_T0);
        for (int i = 0; i < 32; i += TWO) {
            Two weights[R];
            for (int j = 0; j < R; j++) weights[j] = load_two(w + j * K + k + i);
            auto add = [&](int half) __attribute__((always_inline)) {
                for (int c = 0; c < C; c++) {
                    const Floats inputs = load<Floats>(x + (k + i) * M + TWO * c + LANES * half);
                    for (int j = 0; j < R; j++) {
                        Floats& sum = parts[j][c][R * C < 4 ? half : 0];  // where sums are few, two for each
                        sum += (half ? weights[j].second : weights[j].first) * inputs;
                    }
                }
            };
            add(0), add(1);
        }
    }
    for (int j = 0; j < R; j++)
        for (int c = 0; c < C; c++) sums[c * SUMMED_ROWS + j] += sum_of(parts[j][c][0] + parts[j][c][1]);
}

// The sums of `rows` rows of w, an even number: [M, 16]. x is taken in parts of its columns, which stay in the first
// cache.
template <int M, class T>
__attribute__((noinline)) static void wide_sums(const float* x, const T* w, int64_t K, int rows, float* sums) {
    constexpr int R = M > 1 ? 2 : 1, C = M > 5 ? (M + 1) / 2 : M;
    const int64_t pieces = M * K * int64_t(sizeof(float)) / X_PART_BYTES + 1, width = (K / 32 + pieces - 1) / pieces * 32;
    std::fill(sums, sums + M * SUMMED_ROWS, 0);
    for (int64_t k = 0; k < K; k += width)
        for (int r = 0; r < rows; r += R) {
            const T* p = w + r * K + k;
            const int64_t columns = std::min(width, K - k);
            const int64_t ahead = R == 1 && pieces == 1 ? PREFETCH_BYTES / int64_t(sizeof(T)) : R * K;
            wide_tile<R, C, M>(x + k * M, p, K, columns, ahead, pieces == 1, sums + r);
            if constexpr (M > C)
                wide_tile<R, M - C, M>(x + k * M + TWO * C, p, K, columns, ahead, pieces == 1, sums + r + C * SUMMED_ROWS);
        }
}

template <class T>
static void wide_product(const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K, const int64_t* experts) {
    if (M > GEMM_ABOVE && !experts)
        return gemm(x, y, M, N, K, [=](int64_t first, int64_t count) {
            const int64_t stride = distance_of_rows(K);
            float* rows = room<11, float>(count * stride);
            for (int64_t r = 0; r < count; r++)
                for (int64_t k = 0; k < K; k += LANES) store(rows + r * stride + k, load_wide(w + (first + r) * K + k));
            return std::pair<const float*, int64_t>(rows, stride);
        });
    over_rows<BLOCK_ROWS, pack_wide<T>>(x, M, N, K, experts, [=](const Pass& pass, const float* packed, int64_t first, int64_t last) {
        alignas(64) float sums[MAX_M * SUMMED_ROWS];
        for (int64_t n = first * BLOCK_ROWS; n < last * BLOCK_ROWS; n += SUMMED_ROWS) {
            const int count = int(std::min<int64_t>(SUMMED_ROWS, last * BLOCK_ROWS - n));
            with_rows(pass.rows, [&](auto M) { wide_sums<M>(packed, w + n * K, K, count, sums); });
            for (int i = 0; i < pass.rows; i++)
                for (int r = 0; r < count; r++) set(y[pass.out(N) + i * N + n + r], sums[i * SUMMED_ROWS + r]);
        }
    });
}
