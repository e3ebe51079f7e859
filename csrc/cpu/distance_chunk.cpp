/* Distances of REDUCED elements of one sample and their derivatives: a tile's terms add up in T, tiles in double. Products and sums may be
 * contracted: the distances promise no bits across processors. */
#pragma GCC optimize("fp-contract=fast")
#include "running_sums.h"

namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

/* The square root of a vector; within one unit in the last place where it is estimated, for a division at its side is slow enough. */
template <class V>
inline V root(V x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(x[0]) == 4) {
        const V inverse = (V)_mm512_maskz_rsqrt14_ps(_mm512_test_epi32_mask((__m512i)x, (__m512i)x), (__m512)x), estimate = x * inverse;
        return estimate + 0.5f * inverse * (x - estimate * estimate);
    }
#endif
    for (unsigned j = 0; j < sizeof(x) / sizeof(x[0]); ++j) x[j] = root(x[j]); /* one instruction: GCC has no square root of its vectors */
    return x;
}

/* phi(d): d^2, |d|, or sqrt(d^2 + c^2) - c written without its cancellation. */
template <int KIND, class V, class T>
inline V value(V d, T c) {
    if (KIND == DISTANCE_SQUARE) return d * d;
    if (KIND == DISTANCE_ABSOLUTE) return magnitude(d);
    return d * d / (root(d * d + c * c) + c);
}

template <int KIND, class V, class T>
inline V slope(V d, T c) {
    if (KIND == DISTANCE_SQUARE) return d + d;
    if (KIND == DISTANCE_ABSOLUTE) return d > 0 ? V{} + 1 : d < 0 ? V{} - 1 : d; /* 0 and NaN themselves */
    return d / root(d * d + c * c);
}

enum { VALUES, WEIGHTED_VALUES, SLOPES };

/* lanes += phi(a - b), times factor where asked, or phi'(a - b) factor; count is a multiple of RUNNING. */
template <int KIND, int FORM, class T>
void pass(const T *a, const T *b, const T *factor, T c, int64_t count, double *lanes) {
    typedef typename Lanes<T>::Vector Vector;
    constexpr int64_t STEP = Lanes<T>::COUNT, PARTS = Lanes<T>::PARTS;
    Vector total[PARTS] = {};
    for (int64_t i = 0; i < count; i += RUNNING)
        for (int64_t p = 0; p < PARTS; ++p) {
            Vector x, y, f;
            memcpy(&x, a + i + p * STEP, WIDTH), memcpy(&y, b + i + p * STEP, WIDTH);
            Vector term = FORM == SLOPES ? slope<KIND>(x - y, c) : value<KIND>(x - y, c);
            if (FORM != VALUES) memcpy(&f, factor + i + p * STEP, WIDTH), term *= f;
            total[p] += term;
        }
    add<T>(total, lanes);
}

template <class T>
using Pass = void (*)(const T *, const T *, const T *, T, int64_t, double *);

template <class T>
constexpr Pass<T> PASSES[3][3] = {
    {pass<0, VALUES, T>, pass<0, WEIGHTED_VALUES, T>, pass<0, SLOPES, T>},
    {pass<1, VALUES, T>, pass<1, WEIGHTED_VALUES, T>, pass<1, SLOPES, T>},
    {pass<2, VALUES, T>, pass<2, WEIGHTED_VALUES, T>, pass<2, SLOPES, T>},
};

template <class T>
double sum_of(const DistanceChunk &chunk) {
    const bool derivative = chunk.tangent_a || chunk.tangent_b;
    const Pass<T> add_up = PASSES<T>[chunk.kind][derivative ? SLOPES : chunk.weight ? WEIGHTED_VALUES : VALUES];
    double lanes[RUNNING] = {0};
    alignas(64) T a_room[TILE], b_room[TILE], factor_room[TILE];
    for (int64_t start = 0; start < chunk.count; start += TILE) {
        const int64_t count = chunk.count - start < TILE ? chunk.count - start : TILE, whole = padded(count);
        const T *factor = chunk.weight ? fetch(chunk.weight, chunk.weight_dtype, start, count, factor_room) : nullptr;
        if (derivative) {
            const T *p = chunk.tangent_a ? fetch(chunk.tangent_a, chunk.tangent_a_dtype, start, count, a_room) : nullptr;
            const T *q = chunk.tangent_b ? fetch(chunk.tangent_b, chunk.tangent_b_dtype, start, count, b_room) : nullptr;
            for (int64_t i = 0; i < whole; ++i) {
                const T along = (p ? p[i] : (T)0) - (q ? q[i] : (T)0);
                factor_room[i] = factor ? factor[i] * along : along;
            }
            factor = factor_room;
        }
        const T *a = fetch(chunk.a, chunk.a_dtype, start, count, a_room), *b = fetch(chunk.b, chunk.b_dtype, start, count, b_room);
        add_up(a, b, factor, (T)chunk.c, whole, lanes);
    }
    return total_of(lanes);
}

/* out = scale phi'(a - b), times the weight where there is one; count need not be a multiple of anything. */
template <int KIND, class T>
void slopes(const T *a, const T *b, const T *weight, T scale, T c, int64_t count, T *out) {
    if (weight) for (int64_t i = 0; i < count; ++i) out[i] = slope<KIND>(a[i] - b[i], c) * weight[i] * scale;
    else for (int64_t i = 0; i < count; ++i) out[i] = slope<KIND>(a[i] - b[i], c) * scale;
}

template <class T>
void gradients_of(const DistanceChunk &chunk) {
    constexpr void (*SLOPES_OF[3])(const T *, const T *, const T *, T, T, int64_t, T *) = {slopes<0, T>, slopes<1, T>, slopes<2, T>};
    alignas(64) T a_room[TILE], b_room[TILE], weight_room[TILE], term_room[TILE];
    const bool of_a = chunk.gradient_a;
    void *const first = of_a ? chunk.gradient_a : chunk.gradient_b, *const second = of_a ? chunk.gradient_b : nullptr;
    const int first_dtype = of_a ? chunk.gradient_a_dtype : chunk.gradient_b_dtype;
    for (int64_t start = 0; start < chunk.count; start += TILE) {
        const int64_t count = chunk.count - start < TILE ? chunk.count - start : TILE;
        const T *a = fetch(chunk.a, chunk.a_dtype, start, count, a_room), *b = fetch(chunk.b, chunk.b_dtype, start, count, b_room);
        const T *weight = chunk.weight ? fetch(chunk.weight, chunk.weight_dtype, start, count, weight_room) : nullptr;
        const bool in_place = first_dtype == dtype_of<T>();
        T *term = in_place ? (T *)first + start : term_room;
        SLOPES_OF[chunk.kind](a, b, weight, (T)(of_a ? chunk.scale : -chunk.scale), (T)chunk.c, count, term);
        if (!in_place) store(term, (char *)first + start * item_size(first_dtype), first_dtype, count);
        if (!second) continue;
        if (chunk.gradient_b_dtype == dtype_of<T>())
            for (int64_t i = 0; i < count; ++i) ((T *)second)[start + i] = -term[i];
        else {
            for (int64_t i = 0; i < count; ++i) term_room[i] = -term[i];
            store(term_room, (char *)second + start * item_size(chunk.gradient_b_dtype), chunk.gradient_b_dtype, count);
        }
    }
}

double sum(const DistanceChunk &chunk) { return chunk.wide ? sum_of<double>(chunk) : sum_of<float>(chunk); }
void gradient(const DistanceChunk &chunk) { chunk.wide ? gradients_of<double>(chunk) : gradients_of<float>(chunk); }

} // namespace

extern const DistanceFunctions FEWSTEP_CHUNK = {sum, gradient};
