/* Vectors of floats as wide as the instruction set, and sums in them: for the files compiled once for each set. A body is written once, for a
 * vector and for the single float at the end of a line, and may be contracted: such a file promises no bits across processors. */
#pragma once
#include "element.h"

namespace {

constexpr int W = WIDTH / 4; /* floats in a vector */
constexpr int64_t STRETCH = 4096; /* elements that one float sum takes at most; beyond, sums go on in double */
typedef float Vector __attribute__((vector_size(WIDTH)));
typedef float Unaligned __attribute__((vector_size(WIDTH), aligned(4), may_alias));

template <class T>
struct At;
template <>
struct At<Vector> {
    typedef uint32_t Bits __attribute__((vector_size(WIDTH)));
    static inline Vector get(const float *p) { return *(const Unaligned *)p; }
    static inline void put(float *p, Vector x) { *(Unaligned *)p = x; }
};
template <>
struct At<float> {
    typedef uint32_t Bits;
    static inline float get(const float *p) { return *p; }
    static inline void put(float *p, float x) { *p = x; }
};

inline float across(Vector x) {
    typedef float Four __attribute__((vector_size(16)));
    Four part[W / 4], sum;
    memcpy(part, &x, sizeof(x));
    sum = part[0];
    for (int j = 1; j < W / 4; ++j) sum += part[j];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* Four running sums, so that additions need not wait for each other. */
struct Sum {
    Vector lanes[4] = {};
    float rest = 0;

    inline void add(int k, Vector x) { lanes[k] += x; }
    inline void add(int, float x) { rest += x; }
    inline float total() const { return across((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + rest; }
};

/* exp within 2e-7 of its value for |x| < 16 and within 1e-6 up to 87, where x is clamped. A NaN stays one. Least squares of degree 6: 4e-9. */
template <class T>
inline T exponential(T x) {
    const T high = T{} + 87.0f, low = T{} - 87.0f;
    x = x > high ? high : x < low ? low : x;
    const T shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
#ifdef __FMA__
    const T r = x - n * 0.69314718f;
#else
    const T r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* in two parts, the first exact */
#endif
    T p = r * 1.38991962e-3f + 8.36889759e-3f;
    p = p * r + 4.16668504e-2f;
    p = p * r + 1.66665187e-1f;
    p = p * r + 5.00000000e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    typename At<T>::Bits bits;
    memcpy(&bits, &shifted, sizeof(x));
    bits = (bits << 23) + 0x3F800000u; /* 2^n: the low bits of shifted hold n */
    T power;
    memcpy(&power, &bits, sizeof(x));
    return p * power;
}

template <class T>
inline T sigmoid(T u) { return 1.0f / (1.0f + exponential(-u)); }

/* body(T{}, i, k) over [first, last): T a Vector or, at the end, a float; k: which of four sums to add to. */
template <class Body>
inline void along(int64_t first, int64_t last, const Body &body) {
    int64_t i = first;
    for (; i + 4 * W <= last; i += 4 * W) body(Vector{}, i, 0), body(Vector{}, i + W, 1), body(Vector{}, i + 2 * W, 2), body(Vector{}, i + 3 * W, 3);
    for (; i + W <= last; i += W) body(Vector{}, i, 0);
    for (; i < last; ++i) body(0.0f, i, 0);
}

} // namespace
