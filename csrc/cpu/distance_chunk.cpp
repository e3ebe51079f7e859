/* Distances of REDUCED elements of one sample and their derivatives. The sum has 16 running sums whatever the instruction set. */
#include "element.h"
#include "reductions.h"

namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

/* phi(d): d^2, |d|, or sqrt(d^2 + c^2) - c written without its cancellation. */
template <int KIND, class T>
inline T value(T d, T c) {
    if (KIND == DISTANCE_SQUARE) return d * d;
    if (KIND == DISTANCE_ABSOLUTE) return d < 0 ? -d : d;
    return d * d / (root(d * d + c * c) + c);
}

template <int KIND, class T>
inline T slope(T d, T c) {
    if (KIND == DISTANCE_SQUARE) return d + d;
    if (KIND == DISTANCE_ABSOLUTE) return d != d ? d : (T)(d > 0) - (T)(d < 0);
    return d / root(d * d + c * c);
}

/* The elements as T: where they lie, or converted into room. */
template <class T>
const T *fetch(const void *from, int dtype, int64_t start, int64_t count, T *room) {
    if (dtype == dtype_of<T>()) return (const T *)from + start;
    load((const char *)from + start * item_size(dtype), dtype, room, count);
    return room;
}

/* phi(a - b), or phi'(a - b), times the weight. */
template <int KIND, class T>
void weighted(const DistanceChunk &chunk, bool derivative, int64_t start, int64_t count, T *out) {
    alignas(64) T a_room[TILE], b_room[TILE];
    const T c = (T)chunk.c;
    const T *a = fetch(chunk.a, chunk.a_dtype, start, count, a_room), *b = fetch(chunk.b, chunk.b_dtype, start, count, b_room);
    if (derivative)
        for (int64_t i = 0; i < count; ++i) out[i] = slope<KIND, T>(a[i] - b[i], c);
    else
        for (int64_t i = 0; i < count; ++i) out[i] = value<KIND, T>(a[i] - b[i], c);
    if (chunk.weight) {
        const T *weight = fetch(chunk.weight, chunk.weight_dtype, start, count, a_room);
        for (int64_t i = 0; i < count; ++i) out[i] *= weight[i];
    }
}

template <class T>
void terms(const DistanceChunk &chunk, bool derivative, int64_t start, int64_t count, T *out) {
    switch (chunk.kind) {
    case DISTANCE_SQUARE: return weighted<DISTANCE_SQUARE, T>(chunk, derivative, start, count, out);
    case DISTANCE_ABSOLUTE: return weighted<DISTANCE_ABSOLUTE, T>(chunk, derivative, start, count, out);
    default: return weighted<DISTANCE_PSEUDO_HUBER, T>(chunk, derivative, start, count, out);
    }
}

template <class T>
void accumulate(const T *from, int64_t count, double *lanes) {
    constexpr int64_t LANES = WIDTH / 8;
    typedef T Narrow __attribute__((vector_size(LANES * sizeof(T))));
    typedef double Vector __attribute__((vector_size(WIDTH)));
    Vector total[16 / LANES];
    memcpy(total, lanes, sizeof(total));
    for (int64_t i = 0; i < count; i += 16)
        for (int p = 0; p < 16 / LANES; ++p) {
            Narrow x;
            memcpy(&x, from + i + p * LANES, sizeof(x));
            total[p] += __builtin_convertvector(x, Vector);
        }
    memcpy(lanes, total, sizeof(total));
}

template <class T>
double sum_of(const DistanceChunk &chunk) {
    const bool derivative = chunk.tangent_a || chunk.tangent_b;
    double lanes[16] = {0}, total = 0;
    alignas(64) T term[TILE], room[TILE];
    for (int64_t start = 0; start < chunk.count; start += TILE) {
        const int64_t count = chunk.count - start < TILE ? chunk.count - start : TILE, whole = (count + 15) / 16 * 16;
        terms(chunk, derivative, start, count, term);
        if (derivative) {
            alignas(64) T along[TILE] = {0};
            if (chunk.tangent_a) {
                const T *x = fetch(chunk.tangent_a, chunk.tangent_a_dtype, start, count, room);
                for (int64_t i = 0; i < count; ++i) along[i] = x[i];
            }
            if (chunk.tangent_b) {
                const T *x = fetch(chunk.tangent_b, chunk.tangent_b_dtype, start, count, room);
                for (int64_t i = 0; i < count; ++i) along[i] -= x[i];
            }
            for (int64_t i = 0; i < count; ++i) term[i] *= along[i];
        }
        for (int64_t i = count; i < whole; ++i) term[i] = 0;
        accumulate(term, whole, lanes);
    }
    for (int j = 0; j < 16; ++j) total += lanes[j];
    return total;
}

template <class T>
void gradients_of(const DistanceChunk &chunk) {
    alignas(64) T term[TILE];
    const T scale = (T)chunk.scale;
    for (int64_t start = 0; start < chunk.count; start += TILE) {
        const int64_t count = chunk.count - start < TILE ? chunk.count - start : TILE;
        terms(chunk, true, start, count, term);
        for (int64_t i = 0; i < count; ++i) term[i] *= scale;
        if (chunk.gradient_a)
            store(term, (char *)chunk.gradient_a + start * item_size(chunk.gradient_a_dtype), chunk.gradient_a_dtype, count);
        if (chunk.gradient_b) {
            for (int64_t i = 0; i < count; ++i) term[i] = -term[i];
            store(term, (char *)chunk.gradient_b + start * item_size(chunk.gradient_b_dtype), chunk.gradient_b_dtype, count);
        }
    }
}

double sum(const DistanceChunk &chunk) { return chunk.wide ? sum_of<double>(chunk) : sum_of<float>(chunk); }
void gradient(const DistanceChunk &chunk) { chunk.wide ? gradients_of<double>(chunk) : gradients_of<float>(chunk); }

} // namespace

extern const DistanceFunctions FEWSTEP_CHUNK = {sum, gradient};
