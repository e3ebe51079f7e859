/* What the files that add up tiles share (gram_chunk.cpp, distance_chunk.cpp): RUNNING sums of a result whatever the instruction set, so that
 * its order of additions does not depend on it. */
#pragma once
#include "element.h"
#include "reductions.h"

namespace {

template <class T>
struct Lanes {
    static constexpr int64_t COUNT = WIDTH / sizeof(T), PARTS = RUNNING / COUNT;
    typedef T Vector __attribute__((vector_size(WIDTH)));
};

inline int64_t padded(int64_t count) { return (count + RUNNING - 1) / RUNNING * RUNNING; }

/* The elements as T, where they lie or converted into tile, with zeros up to a multiple of RUNNING. */
template <class T>
const T *fetch(const void *from, int dtype, int64_t start, int64_t count, T *tile) {
    const char *place = (const char *)from + start * item_size(dtype);
    const int64_t whole = padded(count);
    if (dtype == dtype_of<T>() && whole == count) return (const T *)place;
    load(place, dtype, tile, count);
    for (int64_t i = count; i < whole; ++i) tile[i] = 0;
    return tile;
}

template <class Vector>
inline Vector magnitude(Vector x) {
    typedef decltype(x < x) Bits;
    return (Vector)((Bits)x & ~(Bits)-Vector{}); /* all but the sign, which is what -0 has */
}

/* Running sums of one tile go on in double. */
template <class T>
void add(const typename Lanes<T>::Vector *total, double *lanes) {
    T found[RUNNING];
    memcpy(found, total, sizeof(found));
    for (int j = 0; j < RUNNING; ++j) lanes[j] += (double)found[j];
}

inline double total_of(const double *lanes) {
    double total = 0;
    for (int j = 0; j < RUNNING; ++j) total += lanes[j];
    return total;
}

} // namespace
