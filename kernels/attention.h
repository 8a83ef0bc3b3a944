// Attention, for every instruction set: q [B, S, H, D], out the same; of k and v [B, K, slots, D] the first T slots; mask
// [B, S, T], not 0 where a query sees a slot. The G = H / K heads that share a kv head, of some queries, are the rows of a
// tile. SLOTS slots are taken together; softmax is carried on from such a block to the next (arXiv:1805.02867).
//
// In the vectors of codes.h. Of the instruction set's header it needs Cell, what is multiplied at once: a value, or a pair
// of bf16; Cells, a vector of them; load_cells, transpose, pair_up and add_products; Weight, queries_of and flags_of.

constexpr int TILE_ROWS = 64;  // unless the heads of one query are more

static inline int64_t whole_vectors(int64_t D) { return (D + 31) / 32 * 32; }

// x's type is T; queries are held as Q, the instruction set's choice.
template <class T, class Q>
struct Tile {
    const Q* q;           // the first query's first head
    const T *k, *v;       // slot 0
    const uint8_t* mask;  // of the first query
    int64_t queries, H, G, D, slots;
    int64_t rows() const { return queries * G; }
    int64_t width() const { return whole_vectors(D); }
    const Q* row(int64_t r) const { return q + (r / G * H + r % G) * D; }
};

// Call run(row, how many) for rows [row, rows): as many together as MOST says, and then those that are left.
template <int MOST, class Run>
static void by_rows(int64_t row, int64_t rows, Run run) {
    for (; row + MOST <= rows; row += MOST) run(row, std::integral_constant<int, MOST>());
    if constexpr (MOST > 1) by_rows<MOST - 1>(row, rows, run);
}

// exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline Floats exponential(Floats x) {
    x = x < -87 ? -87 : x;  // below, next to nothing; NaN stays
    const Floats shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds, and its lowest bits are n
    const Floats n = shifted - 12582912.f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats y = Floats{} + 1.f / 720;
    for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) y = y * r + c;
    return y * (Floats)(((Ints)shifted << 23) + (127 << 23));
}

// Put k of slots [first, first + SLOTS) in columns of cells, [D / PER_CELL, SLOTS]. Where there is none, `last` - 1 stands
// for it.
template <class Tile>
static void columns_of(const Tile& tile, int64_t first, int64_t last, Cell* keys) {
    for (int64_t t = 0; t < SLOTS; t += LANES)
        for (int64_t d = 0; d < tile.D; d += LANES * PER_CELL) {
            Cells rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const auto* k = tile.k + std::min(first + t + i, last - 1) * tile.D + d;
                if (d % 32 == 0) fetch(k);
                rows[i] = load_cells(k, tile.D - d);
            }
            transpose(rows);
            for (int64_t i = 0; i < LANES; i++) store(keys + (d / PER_CELL + i) * SLOTS + t, rows[i]);
        }
}

// Write the scores of rows x slots [first, first + SLOTS), -inf where masked or not below `last`.
template <class Tile>
static void score(const Tile& tile, int64_t first, int64_t last, const Cell* keys, float* scores) {
    const float scale = 1 / std::sqrt(float(tile.D));
    const int64_t there = std::min<int64_t>(SLOTS, last - first);
    by_rows<4>(0, tile.rows(), [&](int64_t r0, auto count) {
        constexpr int R = count, V = VECTORS_OF_SUMS;
        for (int64_t t = 0; t < SLOTS; t += V * LANES) {
            Floats sums[R][V] = {};
            for (int64_t c = 0; c < tile.D / PER_CELL; c++) {
                Cells k[V];
                for (int j = 0; j < V; j++) k[j] = load<Cells>(keys + c * SLOTS + t + LANES * j), keep(k[j]);
                for (int i = 0; i < R; i++) {
                    Cell q;
                    std::memcpy(&q, tile.row(r0 + i) + c * PER_CELL, sizeof q);
                    for (int j = 0; j < V; j++) add_products(sums[i][j], k[j], q);
                }
            }
            for (int i = 0; i < R; i++) {
                const uint8_t* mask = tile.mask + (r0 + i) / tile.G * tile.slots + first;
                uint8_t part[SLOTS] = {};
                if (there < SLOTS) mask = (const uint8_t*)std::memcpy(part, mask, there);
                for (int j = 0; j < V; j++) {
                    const Ints seen = (Ints)widen_to_ints(mask + t + LANES * j);
                    const Floats score = seen != 0 ? sums[i][j] * scale : Floats{} - INFINITY;
                    store(scores + (r0 + i) * SLOTS + t + LANES * j, score);
                }
            }
        }
    });
}

// Turn a row's scores into weights, relative to the largest score so far. Returns what earlier weights shrink by.
static float soften(const float* scores, Weight* weights, float& largest, float& total) {
    Floats most = Floats{} + largest, sum = {};
    for (int i = 0; i < SLOTS; i += LANES) {
        const Floats score = load<Floats>(scores + i);
        most = most > score ? most : score;
    }
    const float now = largest_of(most), shrink = largest == now ? 1 : std::exp(largest - now);
    for (int i = 0; i < SLOTS; i += LANES) {
        const Floats score = load<Floats>(scores + i);
        const Floats weight = score != -INFINITY ? exponential(score - now) : Floats{};
        store_narrow(weights + i, weight);
        sum += weight;
    }
    largest = now;
    total = total * shrink + sum_of(sum);
    return shrink;
}

// Put slots [first, first + SLOTS) of v in cells; 0 for those that no query sees: they may hold anything, NaN too.
// seen: a bit for each, none from `last` on, whose memory is not even asked for: what is not mapped takes long.
template <class Tile>
static void values_of(const Tile& tile, int64_t first, int64_t last, uint64_t seen, Cell* cells) {
    for (int64_t t = 0; t < SLOTS; t += PER_CELL)
        for (int64_t d = 0; d < tile.width(); d += LANES * PER_CELL, cells += LANES * PER_CELL) {
            Cells slots[PER_CELL];
            for (int64_t i = 0; i < PER_CELL; i++) {
                const auto* v = tile.v + std::min(first + t + i, last - 1) * tile.D + d;
                if (d % 32 == 0) fetch(v);
                slots[i] = load_cells(v, seen >> (t + i) & 1 ? tile.D - d : 0);
            }
            pair_up(slots);
            for (int i = 0; i < PER_CELL; i++) store(cells + LANES * i, slots[i]);
        }
}

// Add weights x v of a block of slots to the rows' outputs [rows, width].
template <class Tile>
static void accumulate(const Tile& tile, const Weight* weights, const Cell* cells, float* out) {
    const int64_t width = tile.width();
    by_rows<4>(0, tile.rows(), [&](int64_t r0, auto count) {
        constexpr int R = count;
        auto columns = [&](int64_t d, auto vectors) __attribute__((always_inline)) {
            constexpr int V = vectors;  // many sums side by side, since adding to one has to wait for itself
            Floats sums[R][V];
            for (int i = 0; i < R; i++)
                for (int j = 0; j < V; j++) sums[i][j] = load<Floats>(out + (r0 + i) * width + d + LANES * j);
            for (int64_t c = 0; c < SLOTS / PER_CELL; c++) {
                Cells values[V];
                for (int j = 0; j < V; j++) values[j] = load<Cells>(cells + c * width + d + LANES * j), keep(values[j]);
                for (int i = 0; i < R; i++) {
                    Cell weight;
                    std::memcpy(&weight, weights + (r0 + i) * SLOTS + c * PER_CELL, sizeof weight);
                    for (int j = 0; j < V; j++) add_products(sums[i][j], values[j], weight);
                }
            }
            for (int i = 0; i < R; i++)
                for (int j = 0; j < V; j++) store(out + (r0 + i) * width + d + LANES * j, sums[i][j]);
        };
        int64_t d = 0;
        for (; d + VECTORS_OF_SUMS * LANES <= width; d += VECTORS_OF_SUMS * LANES)
            columns(d, std::integral_constant<int, VECTORS_OF_SUMS>());
        for (; d < width; d += 2 * LANES) columns(d, std::integral_constant<int, 2>());
    });
}

// Buffers of a thread, for a tile.
struct Scratch {
    std::vector<uint8_t> seen;    // [T], by any query of the tile, and as many zeros as a block may go beyond
    std::vector<float> scores;    // [rows, SLOTS]
    std::vector<Weight> weights;  // [rows, SLOTS]
    std::vector<Line> keys;       // [width / PER_CELL, SLOTS] cells of k
    std::vector<Cell> values;     // [SLOTS / PER_CELL, width] cells of v
};

// Attend to the slots of part `split` of `splits` of those that the tile sees: outputs [rows, width], not yet divided
// by the total weights, and each row's largest score and total weight.
template <class Tile>
static void attend(const Tile& tile, int64_t split, int64_t splits, float* out, float* largest, float* total) {
    static thread_local Scratch scratch;
    scratch.seen.assign(tile.slots + SLOTS, 0);
    scratch.keys.resize(tile.width() / PER_CELL * SLOTS / 16);
    scratch.scores.resize(tile.rows() * SLOTS);
    scratch.weights.resize(tile.rows() * SLOTS);
    scratch.values.resize(SLOTS / PER_CELL * tile.width());
    // Found once: where a thread's own variable is takes a call to find out.
    uint8_t* seen = scratch.seen.data();
    Cell *keys = (Cell*)scratch.keys.data(), *values = scratch.values.data();
    float* scores = scratch.scores.data();
    Weight* weights = scratch.weights.data();
    for (int64_t s = 0; s < tile.queries; s++)
        for (int64_t t = 0; t < tile.slots; t++) seen[t] |= tile.mask[s * tile.slots + t];
    int64_t begin = 0, end = tile.slots;
    while (end > 0 && !seen[end - 1]) end--;
    while (begin < end && !seen[begin]) begin++;
    const int64_t length = end - begin;
    end = begin + length * (split + 1) / splits;
    begin += length * split / splits;
    for (int64_t t = begin; t < end; t += SLOTS) {
        columns_of(tile, t, end, keys);
        score(tile, t, end, keys, scores);
        for (int64_t r = 0; r < tile.rows(); r++) {
            float shrink = soften(scores + r * SLOTS, weights + r * SLOTS, largest[r], total[r]);
            if (shrink != 1)
                for (int64_t d = 0; d < tile.D; d++) out[r * tile.width() + d] *= shrink;
        }
        const uint64_t before_end = end - t < SLOTS ? (1ull << (end - t)) - 1 : ~0ull;  // another split's are not ours
        values_of(tile, t, end, flags_of(seen + t) & before_end, values);
        accumulate(tile, weights, values, out);
    }
}

template <class T>
static void attention(const T* q, const T* k, const T* v, const uint8_t* mask, T* out, int64_t B,
                          int64_t S, int64_t H, int64_t K, int64_t slots, int64_t D, int64_t batch_stride,
                          int64_t head_stride) {
    if (!B || !S) return;
    const int64_t G = H / K, queries = std::min(S, std::max<int64_t>(1, TILE_ROWS / G)), tiles = (S + queries - 1) / queries;
    const int64_t tasks = B * K * tiles, threads = num_threads();
    const int64_t width = whole_vectors(D), size = queries * G * (width + 2);
    // The slots of a task are shared out so that all threads have as much to do.
    const int64_t splits = std::max<int64_t>(1, std::min(threads / std::gcd(threads, tasks), slots / (2 * SLOTS)));
    std::vector<float> parts(tasks * splits * size);
    const auto* all_queries = queries_of(q, B * S * H * D);
    using ATile = Tile<T, std::remove_cv_t<std::remove_pointer_t<decltype(all_queries)>>>;
    auto tile_of = [=](int64_t task) {
        const int64_t b = task / tiles / K, head = task / tiles % K, s = task % tiles * queries;
        const int64_t at = b * batch_stride + head * head_stride;
        return ATile{all_queries + ((b * S + s) * H + head * G) * D, k + at, v + at, mask + (b * S + s) * slots,
                    std::min(queries, S - s), H, G, D, slots};
    };
    auto finish = [=, first_part = parts.data()](int64_t task) {
        const ATile tile = tile_of(task);
        float *first = first_part + task * splits * size, *largest = first + queries * G * width;
        for (int64_t r = 0; r < tile.rows(); r++) {
            float most = largest[r], total = 0;
            for (int64_t i = 1; i < splits; i++) most = std::max(most, largest[i * size + r]);
            for (int64_t i = 0; i < splits; i++) {
                const float share = largest[i * size + r] == -INFINITY ? 0 : std::exp(largest[i * size + r] - most);
                float* sums = first + i * size + r * width;
                total += share * largest[i * size + queries * G + r];
                for (int64_t d = 0; d < D; d++) first[r * width + d] = (i ? first[r * width + d] : 0) + share * sums[d];
            }
            T* y = out + (tile.row(r) - all_queries);
            for (int64_t d = 0; d < D; d++) set(y[d], total == 0 ? 0 : first[r * width + d] / total);  // 0 where nothing is seen
        }
    };
    for_each(tasks * splits, [&](int64_t i) {
        float *sums = parts.data() + i * size, *largest = sums + queries * G * width, *total = largest + queries * G;
        std::fill(largest, total, -INFINITY);
        attend(tile_of(i / splits), i % splits, splits, sums, largest, total);
        if (splits == 1) finish(i);
    });
    if (splits > 1) for_each(tasks, finish);
}
