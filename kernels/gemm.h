// Products whose operands are read again and again, for every instruction set: those of attention, and GEMM.
//
// What is multiplied at once is a cell: a value in fp32, or a pair of bf16. Cells of one operand are broadcast; the lanes
// of a vector are columns of the other, and sums stay in registers. Of the instruction set's header it needs SUMS, vectors
// that stay in registers; Operands, for T what its values are multiplied as: Wide, or a class like it; transpose; and
// add_products of cells, but for fp32.

constexpr int PANEL = 32;                 // rows of x that are multiplied together
constexpr int64_t CELLS = 1024;           // of their columns
constexpr int64_t ROWS_TOGETHER = 1024;   // of x, which are copied: what that takes is kept
// Of w: half of the second cache, in which it stays while x passes by. That of Zen 4 and 5 has 1 MiB, that of most of
// Intel's more.
constexpr int64_t PART_BYTES = IS_AMD ? 512 << 10 : 1 << 20;

// Values that are multiplied in fp32, each a cell.
struct Wide {
    using Value = float;
    using Cell = float;
    using Cells = Floats;
    static constexpr int PER_CELL = 1;

    template <class T>
    static float value_of(T value) { return widen(value); }

    // Of a vector's values the first `count`, all where they are more; 0 for the others, whose memory is not read.
    template <class T>
    static Floats load(const T* p, int64_t count) {
        if (count >= LANES) return load_wide(p);
        T values[LANES] = {};
        if (count > 0) std::memcpy(values, p, count * sizeof(T));
        return load_wide(values);
    }

    // Make cells of as many rows as a cell has values.
    static void pair_up(Floats*) {}
};

static inline void add_products(Floats& sum, Floats a, float b) { sum += a * b; }

// Call run(row, how many) for rows [row, rows): as many together as MOST says, and then those that are left.
template <int MOST, class Run>
static inline void by_rows(int64_t row, int64_t rows, Run run) {
    for (; row + MOST <= rows; row += MOST) run(row, std::integral_constant<int, MOST>());
    if constexpr (MOST > 1) by_rows<MOST - 1>(row, rows, run);
}

// As `multiply_add`, R rows and V vectors of columns at a time: many sums side by side, since adding to one has to wait for
// itself.
template <class O, int R, int V>
static void multiply_add_by_vectors(const typename O::Value* a, int64_t stride, const typename O::Cell* b, float* sums,
                                    int64_t rows, int64_t cells, int64_t width) {
    by_rows<R>(0, rows, [&](int64_t r0, auto count) {
        constexpr int R0 = count;
        auto columns = [&](int64_t d, auto vectors) __attribute__((always_inline)) {
            constexpr int V0 = vectors;
            Floats parts[R0][V0];
            for (int i = 0; i < R0; i++)
                for (int j = 0; j < V0; j++) parts[i][j] = load<Floats>(sums + (r0 + i) * width + d + LANES * j);
            for (int64_t c = 0; c < cells; c++) {
                typename O::Cells values[V0];
                for (int j = 0; j < V0; j++) values[j] = load<typename O::Cells>(b + c * width + d + LANES * j), keep(values[j]);
                for (int i = 0; i < R0; i++) {
                    typename O::Cell cell;
                    std::memcpy(&cell, a + (r0 + i) * stride + c * O::PER_CELL, sizeof cell);
                    for (int j = 0; j < V0; j++) add_products(parts[i][j], values[j], cell);
                }
            }
            for (int i = 0; i < R0; i++)
                for (int j = 0; j < V0; j++) store(sums + (r0 + i) * width + d + LANES * j, parts[i][j]);
        };
        int64_t d = 0;
        for (; d + V * LANES <= width; d += V * LANES) columns(d, std::integral_constant<int, V>());
        for (; d < width; d += 2 * LANES) columns(d, std::integral_constant<int, 2>());
    });
}

// Add a x b to sums [rows, width]; a [rows, cells], its rows so many values apart, b [cells, width]. cells are a multiple of
// 16, width of 32.
template <class O>
static void multiply_add(const typename O::Value* a, int64_t stride, const typename O::Cell* b, float* sums, int64_t rows,
                         int64_t cells, int64_t width) {
    if (multiply_add_by_tiles(a, stride, b, sums, rows, cells, width)) return;
    // GEMM, with long rows, is faster with more of them together, attention with wider ones.
    if (cells < 256) multiply_add_by_vectors<O, 4, SUMS / 4>(a, stride, b, sums, rows, cells, width);
    else multiply_add_by_vectors<O, SUMS / 2, 2>(a, stride, b, sums, rows, cells, width);
}

// Put x [M, K], at most PANEL rows, in columns of cells [K / PER_CELL, PANEL]; rows that it does not have are 0.
template <class O, class T>
static void pack_panel(const T* x, int64_t M, int64_t K, typename O::Cell* out) {
    for (int64_t m = 0; m < PANEL; m += LANES)
        for (int64_t k = 0; k < K; k += LANES * O::PER_CELL) {
            typename O::Cells rows[LANES];
            for (int64_t i = 0; i < LANES; i++) rows[i] = O::load(x + (m + i < M ? m + i : 0) * K + k, m + i < M ? K : 0);
            transpose(rows);
            for (int64_t i = 0; i < LANES; i++) store(out + (k / O::PER_CELL + i) * PANEL + m, rows[i]);
        }
}

// Write sums [count, PANEL], rows of w and of x, to M rows of y, which lie N values apart.
template <class T>
static void write_sums(const float* sums, T* y, int64_t M, int64_t N, int64_t count) {
    for (int64_t r = 0; r < count; r += LANES)
        for (int64_t m = 0; m < M; m += LANES) {
            Floats rows[LANES];
            for (int64_t i = 0; i < LANES; i++) rows[i] = load<Floats>(sums + (r + i) * PANEL + m);
            transpose(rows);
            for (int64_t i = 0; i < std::min<int64_t>(LANES, M - m); i++) {
                alignas(64) T values[LANES];
                store_narrow(values, rows[i]);
                std::memcpy(y + (m + i) * N + r, values, std::min<int64_t>(LANES, count - r) * sizeof(T));
            }
        }
}

// rows_of(first, count): rows of w, in 16s, and how many values they lie apart.
template <class T, class RowsOf>
static void gemm(const T* x, T* y, int64_t M, int64_t N, int64_t K, RowsOf rows_of) {
    using O = Operands<T>;
    if (!N) return;
    if (M > ROWS_TOGETHER) {
        const int64_t half = (M / 2 + PANEL - 1) / PANEL * PANEL;
        gemm(x, y, half, N, K, rows_of);
        return gemm(x + half * K, y + half * N, M - half, N, K, rows_of);
    }
    const int64_t panels = (M + PANEL - 1) / PANEL, size = K / O::PER_CELL * PANEL;
    auto* const packed = room<9, typename O::Cell>(panels * size);
    for_each(panels, [=](int64_t p) {
        pack_panel<O>(x + p * PANEL * K, std::min<int64_t>(PANEL, M - p * PANEL), K, packed + p * size);
    });
    // Four pieces for each thread, so that it ends with the others. With many threads each piece has a part of x besides:
    // with fewer rows of w than 128 reading x would take longer than multiplying.
    const int64_t pieces = 4 * num_threads(), in_cache = PART_BYTES / (K * sizeof(typename O::Value));
    const int64_t most = std::max<int64_t>(32, std::min(in_cache, std::max<int64_t>(128, N / pieces)) / 32 * 32);  // rows of w
    const int64_t blocks = (N + most - 1) / most, parts = std::min((pieces + blocks - 1) / blocks, panels);
    for_each(blocks * parts, [=](int64_t piece) {
        const int64_t first = piece / parts * most, count = std::min(most, N - first), part = piece % parts;
        const int64_t whole = (count + 15) / 16 * 16;
        float* sums = room<10, float>(whole * PANEL);
        const auto [w, stride] = rows_of(first, count);
        for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; p++) {
            std::fill(sums, sums + whole * PANEL, 0);
            for (int64_t c = 0; c < K / O::PER_CELL; c += CELLS)
                multiply_add<O>(w + c * O::PER_CELL, stride, packed + p * size + c * PANEL, sums, count,
                                std::min(CELLS, K / O::PER_CELL - c), PANEL);
            write_sums(sums, y + p * PANEL * N + first, std::min<int64_t>(PANEL, M - p * PANEL), N, count);
        }
    });
}
