/* Dynamic thresholding: a quantile of |x| by counting the leading bits of its elements, then one pass that clamps and divides. */
#include "element.h"
#include "team.h"
#include <algorithm>
#include <vector>

namespace {

constexpr int64_t BINS = 4096, TILE = 1024;

template <class T> struct Bits;
template <> struct Bits<float> {
    typedef uint32_t Word;
    static constexpr int SHIFT = 19;
};
template <> struct Bits<double> {
    typedef uint64_t Word;
    static constexpr int SHIFT = 51;
};

template <class T, class Visit>
void each_tile(const void *from, int dtype, int64_t count, const Visit &visit) {
    T tile[TILE];
    for (int64_t start = 0; start < count; start += TILE) {
        const int64_t n = std::min(TILE, count - start);
        load((const char *)from + start * item_size(dtype), dtype, tile, n);
        visit(tile, start, n);
    }
}

/* The magnitude's bits: they order as the magnitudes do, NaN last. */
template <class T>
typename Bits<T>::Word magnitude(T x) {
    typename Bits<T>::Word word;
    memcpy(&word, &x, sizeof(x));
    return word & (~(typename Bits<T>::Word)0 >> 1);
}

/* The magnitude at rank position, linearly between its neighbours. */
template <class T>
T quantile(const void *from, int dtype, int64_t count, double position) {
    typedef typename Bits<T>::Word Word;
    const int64_t low = (int64_t)position, high = std::min(low + 1, count - 1);
    std::vector<int64_t> histogram(BINS);
    each_tile<T>(from, dtype, count, [&](const T *tile, int64_t, int64_t n) {
        for (int64_t i = 0; i < n; ++i) ++histogram[magnitude(tile[i]) >> Bits<T>::SHIFT];
    });
    int64_t below = 0, bin = 0;
    while (below + histogram[bin] <= low) below += histogram[bin++];
    int64_t last = bin, through = below + histogram[bin];
    while (through <= high) through += histogram[++last];
    std::vector<Word> near;
    near.reserve(through - below);
    each_tile<T>(from, dtype, count, [&](const T *tile, int64_t, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const Word word = magnitude(tile[i]);
            const int64_t at = (int64_t)(word >> Bits<T>::SHIFT);
            if (at == bin || at == last) near.push_back(word);
        }
    });
    const auto at = near.begin() + (low - below);
    std::nth_element(near.begin(), at, near.end());
    const Word words[2] = {*at, high > low ? *std::min_element(at + 1, near.end()) : *at};
    T values[2];
    memcpy(values, words, sizeof(values));
    return values[0] + (values[1] - values[0]) * (T)(position - (double)low);
}

template <class T>
void threshold(const fewstep_tensor &x, const fewstep_tensor &y, int64_t b, int64_t count, double position, double least, double most) {
    const void *from = (const char *)x.data + b * x.batch_stride * item_size(x.dtype);
    char *to = (char *)y.data + b * y.batch_stride * item_size(y.dtype);
    T s = quantile<T>(from, (int)x.dtype, count, position);
    s = s < (T)least ? (T)least : s;
    s = s > (T)most ? (T)most : s;
    each_tile<T>(from, (int)x.dtype, count, [&](T *tile, int64_t start, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const T value = tile[i] < -s ? -s : tile[i];
            tile[i] = (value > s ? s : value) / s;
        }
        store(tile, to + start * item_size(y.dtype), (int)y.dtype, n);
    });
}

} // namespace

int fewstep_cpu_threshold(int64_t batch, int64_t count, const fewstep_tensor *tensors, double position, double least, double most,
                          int64_t threads) {
    if (batch < 0 || count < 1 || !(position >= 0 && position <= (double)(count - 1))) return 1;
    if (!known(tensors[0].dtype) || !known(tensors[1].dtype)) return 1;
    share(batch, team(4 * batch * count, threads), [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b)
            if (tensors[0].dtype == FEWSTEP_FLOAT64) threshold<double>(tensors[0], tensors[1], b, count, position, least, most);
            else threshold<float>(tensors[0], tensors[1], b, count, position, least, most);
    });
    return 0;
}
