// Attention, for every instruction set: q [B, S, H, D], out the same; of k and v [B, K, slots, D] the first T slots; mask
// [B, S, T], not 0 where a query sees a slot. The G = H / K heads that share a kv head, of some queries, are the rows of a
// tile. SLOTS slots are taken together; softmax is carried on from such a block to the next (arXiv:1805.02867).
//
// In the vectors of codes.h and the products of gemm.h. Of the instruction set's header it needs SLOTS and flags_of.

constexpr int TILE_ROWS = 64;  // unless the heads of one query are more

static inline int64_t whole_vectors(int64_t D) { return (D + 31) / 32 * 32; }
static inline int64_t padded(int64_t rows) { return has_tiles() ? (rows + 15) / 16 * 16 : rows; }  // for tiles.h

template <class T>
struct Tile {
    const T* q;           // the first query's first head
    const T *k, *v;       // slot 0
    const uint8_t* mask;  // of the first query
    int64_t queries, H, G, D, slots;
    int64_t rows() const { return queries * G; }
    int64_t width() const { return whole_vectors(D); }
    const T* row(int64_t r) const { return q + (r / G * H + r % G) * D; }
};

// exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline Floats exponential(Floats x) {
    x = x < -87 ? -87 : x;  // below, next to nothing; NaN stays
    const Floats shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds, and its lowest bits are n
    const Floats n = shifted - 12582912.f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats y = Floats{} + 1.f / 720;
    for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) y = y * r + c;
    return y * (Floats)(((Ints)shifted << 23) + (127 << 23));
}

// Put k of slots [first, first + SLOTS) in columns of cells, [width / PER_CELL, SLOTS]; beyond D they are 0. Where there is
// no slot, `last` - 1 stands for it.
template <class O, class T>
static void columns_of(const Tile<T>& tile, int64_t first, int64_t last, typename O::Cell* keys) {
    for (int64_t t = 0; t < SLOTS; t += LANES)
        for (int64_t d = 0; d < tile.width(); d += LANES * O::PER_CELL) {
            typename O::Cells rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const auto* k = tile.k + std::min(first + t + i, last - 1) * tile.D + d;
                if (d % 32 == 0 && d < tile.D) fetch(k);
                rows[i] = O::load(k, tile.D - d);
            }
            transpose(rows);
            for (int64_t i = 0; i < LANES; i++) store(keys + (d / O::PER_CELL + i) * SLOTS + t, rows[i]);
        }
}

// Scale a row's scores; those of slots that mask hides, and of those from `there` on, become -inf. Returns the largest, or
// `largest` where that is larger.
static float mask_scores(float* scores, const uint8_t* mask, int64_t there, float scale, float largest) {
    uint8_t part[SLOTS] = {};
    if (there < SLOTS) mask = (const uint8_t*)std::memcpy(part, mask, there);
    Floats most = Floats{} + largest;
    for (int i = 0; i < SLOTS; i += LANES) {
        const Ints seen = (Ints)widen_to_ints(mask + i);
        const Floats score = seen != 0 ? load<Floats>(scores + i) * scale : Floats{} - INFINITY;
        store(scores + i, score);
        most = most > score ? most : score;
    }
    return largest_of(most);
}

// Turn a row's scores into weights, relative to the largest score, and return their sum.
template <class Value>
static float weigh(const float* scores, float largest, Value* weights) {
    Floats sum = {};
    for (int i = 0; i < SLOTS; i += LANES) {
        const Floats score = load<Floats>(scores + i);
        const Floats weight = score != -INFINITY ? exponential(score - largest) : Floats{};
        store_narrow(weights + i, weight);
        sum += weight;
    }
    return sum_of(sum);
}

// Put slots [first, first + SLOTS) of v in cells; 0 for those that no query sees: they may hold anything, NaN too.
// seen: a bit for each, none from `last` on, whose memory is not even asked for: what is not mapped takes long.
template <class O, class T>
static void values_of(const Tile<T>& tile, int64_t first, int64_t last, uint64_t seen, typename O::Cell* cells) {
    for (int64_t t = 0; t < SLOTS; t += O::PER_CELL)
        for (int64_t d = 0; d < tile.width(); d += LANES * O::PER_CELL, cells += LANES * O::PER_CELL) {
            typename O::Cells slots[O::PER_CELL];
            for (int64_t i = 0; i < O::PER_CELL; i++) {
                const auto* v = tile.v + std::min(first + t + i, last - 1) * tile.D + d;
                if (d % 32 == 0) fetch(v);
                slots[i] = O::load(v, seen >> (t + i) & 1 ? tile.D - d : 0);
            }
            O::pair_up(slots);
            for (int i = 0; i < O::PER_CELL; i++) store(cells + LANES * i, slots[i]);
        }
}

// Buffers of a thread, for a tile; rows are padded.
template <class O>
struct Scratch {
    Room<uint8_t> seen;             // [T], by any query of the tile, and as many zeros as a block may go beyond
    Room<typename O::Value> queries, weights;  // [rows, width], [rows, SLOTS]
    Room<float> scores;             // [rows, SLOTS]
    Room<float> before, now;        // [rows], the largest scores without and with a block
    Room<float> shrink;             // [rows], the factor of what was summed up before it
    Room<typename O::Cell> keys, values;  // [width / PER_CELL, SLOTS] of k, [SLOTS / PER_CELL, width] of v
};

// Attend to the slots of part `split` of `splits` of those that the tile sees: outputs [rows, width], not yet divided
// by the total weights, and each row's largest score and total weight.
template <class T>
static void attend(const Tile<T>& tile, int64_t split, int64_t splits, float* out, float* largest, float* total) {
    using O = Operands<T>;
    static thread_local Scratch<O> scratch;
    // Found once: where a thread's own variable is takes a call to find out.
    const int64_t rows = tile.rows(), width = tile.width(), room = padded(rows);
    uint8_t* seen = scratch.seen.of(tile.slots + SLOTS);
    typename O::Value *queries = scratch.queries.of(room * width), *weights = scratch.weights.of(room * SLOTS);
    float *scores = scratch.scores.of(room * SLOTS), *before = scratch.before.of(rows + LANES);
    float *now = scratch.now.of(rows + LANES), *shrink = scratch.shrink.of(rows + LANES);
    typename O::Cell *keys = scratch.keys.of(width / O::PER_CELL * SLOTS), *values = scratch.values.of(SLOTS / O::PER_CELL * width);
    std::fill(queries, queries + rows * width, typename O::Value(0));
    for (int64_t r = 0; r < rows; r++) {
        const T* row = tile.row(r);
        for (int64_t d = 0; d < tile.D; d++) queries[r * width + d] = O::value_of(row[d]);
    }
    std::fill(seen, seen + tile.slots + SLOTS, 0);
    for (int64_t s = 0; s < tile.queries; s++) {
        const uint8_t* __restrict mask = tile.mask + s * tile.slots;
        uint8_t* __restrict any = seen;
        for (int64_t t = 0; t < tile.slots; t++) any[t] |= mask[t];
    }
    int64_t begin = 0, end = tile.slots;
    while (end > 0 && !seen[end - 1]) end--;
    while (begin < end && !seen[begin]) begin++;
    const int64_t length = end - begin;
    end = begin + length * (split + 1) / splits;
    begin += length * split / splits;
    const float scale = 1 / std::sqrt(float(tile.D));
    for (int64_t t = begin; t < end; t += SLOTS) {
        const int64_t there = std::min<int64_t>(SLOTS, end - t);  // another split's are not ours
        columns_of<O>(tile, t, end, keys);
        std::fill(scores, scores + rows * SLOTS, 0);
        multiply_add<O>(queries, width, keys, scores, rows, width / O::PER_CELL, SLOTS);
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t* mask = tile.mask + r / tile.G * tile.slots + t;
            before[r] = largest[r];
            now[r] = largest[r] = mask_scores(scores + r * SLOTS, mask, there, scale, largest[r]);
        }
        for (int64_t r = 0; r < rows; r += LANES) {  // of several rows at once
            const Floats earlier = load<Floats>(before + r), fall = earlier - load<Floats>(now + r);
            const Floats factor = fall < -87 ? Floats{} : exponential(fall);  // 0: what was summed up may be large
            store(shrink + r, earlier == load<Floats>(now + r) ? 1.f : factor);
        }
        for (int64_t r = 0; r < rows; r++) {
            const float factor = shrink[r];
            total[r] = total[r] * factor + weigh(scores + r * SLOTS, now[r], weights + r * SLOTS);
            if (factor != 1)
                for (int64_t d = 0; d < tile.D; d++) out[r * width + d] *= factor;
        }
        values_of<O>(tile, t, end, flags_of(seen + t) & (there < SLOTS ? (1ull << there) - 1 : ~0ull), values);
        multiply_add<O>(weights, SLOTS, values, out, rows, SLOTS / O::PER_CELL, width);
    }
}

template <class T>
static void attention(const T* q, const T* k, const T* v, const uint8_t* mask, T* out, int64_t B,
                          int64_t S, int64_t H, int64_t K, int64_t slots, int64_t D, int64_t batch_stride,
                          int64_t head_stride) {
    if (!B || !S) return;
    const int64_t G = H / K, queries = std::min(S, std::max<int64_t>(1, TILE_ROWS / G)), tiles = (S + queries - 1) / queries;
    const int64_t tasks = B * K * tiles, threads = num_threads();
    const int64_t width = whole_vectors(D), rows = padded(queries * G), size = rows * (width + 2);
    // The slots of a task are shared out so that all threads have as much to do.
    const int64_t splits = std::max<int64_t>(1, std::min(threads / std::gcd(threads, tasks), slots / (2 * SLOTS)));
    float* const parts = splits > 1 ? room<17, float>(tasks * splits * size) : nullptr;
    auto tile_of = [=](int64_t task) {
        const int64_t b = task / tiles / K, head = task / tiles % K, s = task % tiles * queries;
        const int64_t at = b * batch_stride + head * head_stride;
        return Tile<T>{q + ((b * S + s) * H + head * G) * D, k + at, v + at, mask + (b * S + s) * slots,
                    std::min(queries, S - s), H, G, D, slots};
    };
    auto finish = [=](int64_t task, float* first) {
        const Tile<T> tile = tile_of(task);
        const float* largest = first + rows * width;
        for (int64_t r = 0; r < tile.rows(); r++) {
            float most = largest[r], total = 0;
            for (int64_t i = 1; i < splits; i++) most = std::max(most, largest[i * size + r]);
            for (int64_t i = 0; i < splits; i++) {
                const float share = largest[i * size + r] == -INFINITY ? 0 : std::exp(largest[i * size + r] - most);
                float* sums = first + i * size + r * width;
                total += share * largest[i * size + rows + r];
                for (int64_t d = 0; d < D; d++) first[r * width + d] = (i ? first[r * width + d] : 0) + share * sums[d];
            }
            T* y = out + (tile.row(r) - q);
            for (int64_t d = 0; d < D; d++) set(y[d], total == 0 ? 0 : first[r * width + d] / total);  // 0 where nothing is seen
        }
    };
    for_each(tasks * splits, [&](int64_t i) {
        float* const sums = parts ? parts + i * size : room<16, float>(size);
        float *largest = sums + rows * width, *total = largest + rows;
        std::fill(sums, sums + size, 0);
        std::fill(largest, total, -INFINITY);
        attend(tile_of(i / splits), i % splits, splits, sums, largest, total);
        if (!parts) finish(i, sums);
    });
    if (parts) for_each(tasks, [&](int64_t task) { finish(task, parts + task * splits * size); });
}
