/* Attention and its tangent over one tile of queries. Compiled once for each instruction set with -DFEWSTEP_CHUNK=attention_chunk_<name>.
 *
 * A lane of a vector is a query: a panel of C vectors holds its queries, results and scores transposed, so that keys and values are read where
 * they lie, one number for all lanes, and no maximum or sum crosses lanes. Every product is blocks of R rows of keys (or columns of values) by C
 * vectors that stay in registers. With p = exp(S - max S) and c the mean of dS over the first keys that a query attends, carried along:
 * l = sum p, r = sum p (dS - c), O = sum p v, T = sum p (dS - c) v + p dv; at the end out = O / l and d_out = (T - r out) / l. Taking c off
 * first changes nothing in that and spares the digits that a shift common to all keys would cost. */
#pragma GCC optimize("fp-contract=fast")
#include "attention.h"
#include "element.h"

namespace {

constexpr int64_t STRETCH = 32; /* products in one running sum at most: longer sums are sums of such */
constexpr int ROWS = 6, COLUMNS = WIDTH == 64 ? 4 : 2; /* of a block: its accumulators, a row of vectors and one more fit the registers */

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
    typedef float Vector __attribute__((vector_size(WIDTH)));
    typedef uint32_t Bits __attribute__((vector_size(WIDTH)));
    /* exp(r) for |r| <= log(2) / 2, by least squares: 4e-9 */
    static constexpr float SERIES[] = {1.38991962e-3f, 8.36889759e-3f, 4.16668504e-2f, 1.66665187e-1f, 0.5f, 1.0f, 1.0f};
    static constexpr float LOWEST = -87.0f, MAGIC = 12582912.0f, LOG2_E = 1.44269504f, LN2 = 0.693359375f, LN2_REST = -2.12194440e-4f;
    static constexpr uint32_t SHIFT = 23, BIAS = 127;
};
template <>
struct Lanes<double> {
    typedef double Vector __attribute__((vector_size(WIDTH)));
    typedef uint64_t Bits __attribute__((vector_size(WIDTH)));
    /* Taylor's, to 4e-18 */
    static constexpr double SERIES[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                        1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    static constexpr double LOWEST = -708.0, MAGIC = 0x1.8p52, LOG2_E = 1.4426950408889634, LN2 = 0x1.62e42feep-1, LN2_REST = 0x1.a39ef35793c76p-33;
    static constexpr uint64_t SHIFT = 52, BIAS = 1023;
};

template <class T>
using Vector = typename Lanes<T>::Vector;
template <class T>
constexpr int64_t WIDE = WIDTH / sizeof(T);

template <class T>
inline Vector<T> get(const T *p) {
    Vector<T> x;
    memcpy(&x, p, WIDTH);
    return x;
}
template <class T>
inline void put(T *p, Vector<T> x) { memcpy(p, &x, WIDTH); }

/* exp of what is not positive; 0 below LOWEST, and a NaN stays one. */
template <class T>
inline Vector<T> exponential(Vector<T> x) {
    typedef Lanes<T> L;
    typedef typename L::Bits Bits;
    const Vector<T> shifted = x * L::LOG2_E + L::MAGIC, n = shifted - L::MAGIC, r = (x - n * L::LN2) - n * L::LN2_REST;
    Vector<T> p = Vector<T>{} + L::SERIES[0];
#pragma GCC unroll 16
    for (unsigned i = 1; i < sizeof(L::SERIES) / sizeof(T); ++i) p = p * r + L::SERIES[i];
    const Bits power = ((Bits)shifted + L::BIAS) << L::SHIFT; /* 2^n: the low bits of shifted hold n */
    p *= (Vector<T>)power;
    return x < L::LOWEST ? Vector<T>{} : p;
}

/* total[r][c] += sum over k < depth of a[r row + k step] b[k][c] */
template <class T, int R, int C>
inline void multiply(const T *a, int64_t row, int64_t step, const T *b, int64_t depth, Vector<T> (&total)[R][C]) {
    for (int64_t k = 0; k < depth; ++k, a += step, b += C * WIDE<T>) {
        Vector<T> lanes[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) lanes[c] = get(b + c * WIDE<T>);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const T x = a[r * row];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) total[r][c] += x * lanes[c];
        }
    }
}

/* body over [first, last) in pieces of ROWS and a shorter last one: body(integral constant, start). */
template <int R>
struct Count {
    static constexpr int value = R;
};
template <class Body>
inline void pieces(int64_t count, const Body &body) {
    int64_t i = 0;
    for (; i + ROWS <= count; i += ROWS) body(Count<ROWS>{}, i);
    switch (count - i) {
    case 5: body(Count<5>{}, i); break;
    case 4: body(Count<4>{}, i); break;
    case 3: body(Count<3>{}, i); break;
    case 2: body(Count<2>{}, i); break;
    case 1: body(Count<1>{}, i); break;
    }
}

/* A tile of keys, or their values, or tangents of either: rows of T. */
template <class T>
struct Rows {
    const T *at = nullptr;
    int64_t stride = 0;
};
template <class T>
struct KeyTile {
    int64_t start, count;
    Rows<T> k, v, tk, tv;
};

/* C vectors of queries: everything is [.., C WIDE] */
template <class T>
struct Panel {
    int64_t first, rows; /* of the tile */
    int columns;
    T *q, *tq, *out, *tangent;     /* [width], [value_width] */
    T *highest, *total, *shift, *centre; /* m, l, r, c */
};

template <class T>
T *floats(T *&scratch, int64_t count) {
    T *found = scratch;
    scratch += count;
    return found;
}

/* to[k][lane] = from[lane][k] scale, 0 beyond the rows. */
template <class T>
void turn(const AttentionTile &tile, const fewstep_rows &from, const Panel<T> &panel, T scale, T *to, T *row) {
    const int64_t size = item_size(tile.dtype), lanes = panel.columns * WIDE<T>;
    memset(to, 0, tile.width * lanes * sizeof(T));
    for (int64_t n = 0; n < panel.rows; ++n) {
        const void *at = (const char *)from.data + (panel.first + n) * from.row_stride * size;
        const T *x = tile.dtype == dtype_of<T>() ? (const T *)at : row;
        if (x == row) load(at, tile.dtype, row, tile.width);
        for (int64_t k = 0; k < tile.width; ++k) to[k * lanes + n] = x[k] * scale;
    }
}

/* to[m][lane] = sum over columns of rows[m] and panel[lane], or that much more: sums of at most STRETCH products. */
template <class T, int R, int C>
inline void products(const Rows<T> &rows, int64_t m, const T *panel, int64_t width, bool more, T *to) {
    for (int64_t k = 0; k < width; k += STRETCH, more = true) {
        Vector<T> total[R][C] = {};
        const int64_t depth = width - k < STRETCH ? width - k : STRETCH;
        multiply<T, R, C>(rows.at + m * rows.stride + k, rows.stride, 1, panel + k * C * WIDE<T>, depth, total);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                T *at = to + ((m + r) * C + c) * WIDE<T>;
                put(at, more ? get(at) + total[r][c] : total[r][c]);
            }
    }
}

/* Scores and, where wanted, their tangents: [keys, lanes] each. */
template <class T, int C>
void score(const AttentionTile &tile, const Panel<T> &panel, const KeyTile<T> &keys, T *scores, T *changes) {
    pieces(keys.count, [&](auto r, int64_t m) __attribute__((always_inline)) {
        constexpr int R = decltype(r)::value;
        products<T, R, C>(keys.k, m, panel.q, tile.width, false, scores);
        if (!changes) return;
        if (panel.tq) products<T, R, C>(keys.k, m, panel.tq, tile.width, false, changes);
        if (keys.tk.at) products<T, R, C>(keys.tk, m, panel.q, tile.width, panel.tq, changes);
    });
}

/* Scores of keys that a query may not attend become -inf; an added mask is added. */
template <class T>
void cover(const AttentionTile &tile, const Panel<T> &panel, const KeyTile<T> &keys, int64_t lanes, T *scores, T *row) {
    const T never = -__builtin_inf();
    const fewstep_mask &mask = tile.mask;
    for (int64_t n = 0; mask.data && n < panel.rows; ++n) {
        const char *from = (const char *)mask.data;
        const int64_t at = (panel.first + n) * mask.row_stride + keys.start * mask.column_stride;
        if (mask.dtype == FEWSTEP_BOOL) {
            for (int64_t m = 0; m < keys.count; ++m)
                if (!from[at + m * mask.column_stride]) scores[m * lanes + n] = never;
            continue;
        }
        from += at * item_size((int)mask.dtype);
        if (mask.column_stride == 1) load(from, (int)mask.dtype, row, keys.count);
        else for (int64_t m = 0; m < keys.count; ++m) load(from + m * mask.column_stride * item_size((int)mask.dtype), (int)mask.dtype, row + m, 1);
        for (int64_t m = 0; m < keys.count; ++m) scores[m * lanes + n] += row[m];
    }
    const int64_t query = tile.first + panel.first;
    for (int64_t m = 0; tile.causal && m < keys.count; ++m)
        for (int64_t n = 0; n < lanes && n < keys.start + m - query; ++n) scores[m * lanes + n] = never;
}

/* scores -> p, changes -> p (dS - c); m, l, r and c move on; decay: what sums so far are worth now. */
template <class T, int C>
void soften(const Panel<T> &panel, int64_t count, T *scores, T *changes, Vector<T> (&decay)[C]) {
    constexpr int64_t L = C * WIDE<T>;
    const Vector<T> zero = {}, never = zero - (T)__builtin_inf();
    Vector<T> highest[C], total[C] = {}, mean[C] = {}, shift[C] = {}, centre[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) highest[c] = get(panel.highest + c * WIDE<T>);
    for (int64_t m = 0; m < count; ++m)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const Vector<T> s = get(scores + m * L + c * WIDE<T>);
            highest[c] = s > highest[c] ? s : highest[c];
        }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
        const Vector<T> before = get(panel.highest + c * WIDE<T>);
        put(panel.highest + c * WIDE<T>, highest[c]);
        highest[c] = highest[c] == never ? zero : highest[c];
        decay[c] = exponential<T>(before - highest[c]);
    }
    for (int64_t m = 0; m < count; ++m)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            T *at = scores + m * L + c * WIDE<T>;
            const Vector<T> p = exponential<T>(get(at) - highest[c]);
            put(at, p);
            total[c] += p;
            if (changes) mean[c] += p * get(changes + m * L + c * WIDE<T>);
        }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
        T *l = panel.total + c * WIDE<T>;
        centre[c] = get(panel.centre + c * WIDE<T>);
        const Vector<T> found = total[c] > zero ? mean[c] / total[c] : zero;
        centre[c] = get(l) == zero ? found : centre[c];
        put(panel.centre + c * WIDE<T>, centre[c]);
        put(l, get(l) * decay[c] + total[c]);
    }
    if (!changes) return;
    for (int64_t m = 0; m < count; ++m)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            T *at = changes + m * L + c * WIDE<T>;
            const Vector<T> w = get(scores + m * L + c * WIDE<T>) * (get(at) - centre[c]);
            put(at, w);
            shift[c] += w;
        }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) put(panel.shift + c * WIDE<T>, get(panel.shift + c * WIDE<T>) * decay[c] + shift[c]);
}

template <class T, int R, int C>
inline void accumulate(T *to, const Vector<T> (&decay)[C], const Vector<T> (&total)[R][C]) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            T *at = to + (r * C + c) * WIDE<T>;
            put(at, get(at) * decay[c] + total[r][c]);
        }
}

template <class T, int C>
void step(const AttentionTile &tile, const Panel<T> &panel, const KeyTile<T> &keys, T *scores, T *changes, T *row) {
    constexpr int64_t L = C * WIDE<T>;
    score<T, C>(tile, panel, keys, scores, changes);
    const bool edge = tile.causal && keys.start + keys.count - 1 > tile.first + panel.first;
    if (tile.mask.data || edge) cover<T>(tile, panel, keys, L, scores, row);
    Vector<T> decay[C];
    soften<T, C>(panel, keys.count, scores, changes, decay);
    pieces(tile.value_width, [&](auto r, int64_t e) __attribute__((always_inline)) {
        constexpr int R = decltype(r)::value;
        Vector<T> total[R][C] = {};
        multiply<T, R, C>(keys.v.at + e, 1, keys.v.stride, scores, keys.count, total);
        accumulate<T, R, C>(panel.out + e * L, decay, total);
        Vector<T> moved[R][C] = {};
        if (changes) multiply<T, R, C>(keys.v.at + e, 1, keys.v.stride, changes, keys.count, moved);
        if (keys.tv.at) multiply<T, R, C>(keys.tv.at + e, 1, keys.tv.stride, scores, keys.count, moved);
        accumulate<T, R, C>(panel.tangent + e * L, decay, moved);
    });
}

/* out = O / l, d_out = (T - r out) / l, turned back; zero, and -inf as log-sum-exp, where nothing was attended. */
template <class T>
void finish(const AttentionTile &tile, const Panel<T> &panel, T *row) {
    const int64_t size = item_size(tile.dtype), width = tile.value_width, lanes = panel.columns * WIDE<T>;
    const bool there = tile.dtype == dtype_of<T>();
    for (int64_t n = 0; n < panel.rows; ++n) {
        const T l = panel.total[n], unit = l == 0 ? (T)0 : 1 / l, shift = panel.shift[n] * unit;
        ((T *)tile.lse)[panel.first + n] = l == 0 ? -(T)__builtin_inf() : panel.highest[n] + (T)__builtin_log((double)l);
        char *const out = (char *)tile.out + (panel.first + n) * width * size, *const tangent = (char *)tile.tangent + (out - (char *)tile.out);
        T *const y = there ? (T *)out : row, *const ty = there ? (T *)tangent : row + width;
        for (int64_t e = 0; e < width; ++e) {
            y[e] = panel.out[e * lanes + n] * unit;
            ty[e] = panel.tangent[e * lanes + n] * unit - shift * y[e];
        }
        if (!there) store(y, out, tile.dtype, width), store(ty, tangent, tile.dtype, width);
    }
}

/* Rows where they lie, or converted into scratch. */
template <class T>
Rows<T> rows_of(const AttentionTile &tile, const fewstep_rows &from, int64_t start, int64_t count, int64_t width, T *scratch) {
    if (!from.data) return {};
    const char *at = (const char *)from.data + start * from.row_stride * item_size(tile.dtype);
    if (tile.dtype == dtype_of<T>()) return {(const T *)at, from.row_stride};
    for (int64_t m = 0; m < count; ++m) load(at + m * from.row_stride * item_size(tile.dtype), tile.dtype, scratch + m * width, width);
    return {scratch, width};
}

template <class T>
void attend(const AttentionTile &tile) {
    T *scratch = (T *)tile.scratch;
    const int64_t width = tile.width, value_width = tile.value_width;
    T *const scores = floats(scratch, KEYS * QUERIES), *const changes = tile.tq.data || tile.tk.data ? floats(scratch, KEYS * QUERIES) : nullptr;
    Panel<T> panels[QUERIES / WIDE<T>];
    int count = 0;
    for (int64_t first = 0; first < tile.rows; first += panels[count - 1].rows) {
        Panel<T> &panel = panels[count++];
        const int64_t left = tile.rows - first;
        panel.columns = COLUMNS == 4 && left > 3 * WIDE<T> ? 4 : left > WIDE<T> ? 2 : 1;
        const int64_t lanes = panel.columns * WIDE<T>;
        panel.first = first, panel.rows = left < lanes ? left : lanes;
        panel.q = floats(scratch, width * lanes), panel.tq = tile.tq.data ? floats(scratch, width * lanes) : nullptr;
        panel.out = floats(scratch, value_width * lanes), panel.tangent = floats(scratch, value_width * lanes);
        panel.highest = floats(scratch, lanes), panel.total = floats(scratch, lanes);
        panel.shift = floats(scratch, lanes), panel.centre = floats(scratch, lanes);
        memset(panel.out, 0, (scratch - panel.out) * sizeof(T));
        for (int64_t n = 0; n < lanes; ++n) panel.highest[n] = -(T)__builtin_inf();
    }
    T *const row = floats(scratch, KEYS + 2 * (width > value_width ? width : value_width));
    for (int i = 0; i < count; ++i) {
        turn(tile, tile.q, panels[i], (T)tile.scale, panels[i].q, row);
        if (tile.tq.data) turn(tile, tile.tq, panels[i], (T)tile.scale, panels[i].tq, row);
    }
    T *const converted[4] = {scratch, scratch + KEYS * width, scratch + 2 * KEYS * width, scratch + KEYS * (2 * width + value_width)};
    const int64_t end = tile.causal && tile.first + tile.rows < tile.keys ? tile.first + tile.rows : tile.keys;
    for (int64_t start = 0; start < end; start += KEYS) {
        KeyTile<T> keys;
        keys.start = start, keys.count = end - start < KEYS ? end - start : KEYS;
        keys.k = rows_of<T>(tile, tile.k, start, keys.count, width, converted[0]);
        keys.tk = rows_of<T>(tile, tile.tk, start, keys.count, width, converted[1]);
        keys.v = rows_of<T>(tile, tile.v, start, keys.count, value_width, converted[2]);
        keys.tv = rows_of<T>(tile, tile.tv, start, keys.count, value_width, converted[3]);
        for (int i = 0; i < count; ++i) {
            if (COLUMNS == 4 && panels[i].columns == 4) step<T, COLUMNS>(tile, panels[i], keys, scores, changes, row);
            else if (panels[i].columns == 2) step<T, 2>(tile, panels[i], keys, scores, changes, row);
            else step<T, 1>(tile, panels[i], keys, scores, changes, row);
        }
    }
    for (int i = 0; i < count; ++i) finish(tile, panels[i], row);
}

} // namespace

extern const AttentionFunctions FEWSTEP_CHUNK = {attend<float>, attend<double>};
