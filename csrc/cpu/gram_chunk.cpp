/* Products and sums of REDUCED elements of one sample, in double. Every result has 16 running sums whatever the instruction set, so that it
 * does not depend on it. */
#include "element.h"
#include "reductions.h"

namespace {

constexpr int64_t LANES = WIDTH / 8, PARTS = 16 / LANES;
constexpr int MOST = LANES / 2; /* products at a time: as many running sums as the registers hold */
typedef double Vector __attribute__((vector_size(WIDTH)));

/* lanes[n] += a b[n], element by element; count is a multiple of 16. */
template <int N>
void dots(const double *a, const double *const *b, int64_t count, double *lanes) {
    Vector total[N][PARTS];
    memcpy(total, lanes, sizeof(total));
    for (int64_t i = 0; i < count; i += 16)
        for (int p = 0; p < PARTS; ++p) {
            Vector x, y;
            memcpy(&x, a + i + p * LANES, WIDTH);
            for (int n = 0; n < N; ++n) {
                memcpy(&y, b[n] + i + p * LANES, WIDTH);
                total[n][p] += x * y;
            }
        }
    memcpy(lanes, total, sizeof(total));
}

void some_dots(int64_t n, const double *a, const double *const *b, int64_t count, double *lanes) {
    for (; n >= MOST; n -= MOST, b += MOST, lanes += 16 * MOST) dots<MOST>(a, b, count, lanes);
    for (; n > 0; --n, ++b, lanes += 16) dots<1>(a, b, count, lanes);
}

/* lanes[0] += z, lanes[1] += z sign(y). */
void sums(const double *z, const double *y, int64_t count, double *lanes, double *signed_lanes) {
    const Vector zero = {}, one = zero + 1.0;
    Vector total[PARTS], signed_total[PARTS];
    memcpy(total, lanes, sizeof(total));
    memcpy(signed_total, signed_lanes, sizeof(total));
    for (int64_t i = 0; i < count; i += 16)
        for (int p = 0; p < PARTS; ++p) {
            Vector x, s;
            memcpy(&x, z + i + p * LANES, WIDTH);
            memcpy(&s, y + i + p * LANES, WIDTH);
            total[p] += x;
            signed_total[p] += x * ((s > zero ? one : zero) - (s < zero ? one : zero));
        }
    memcpy(lanes, total, sizeof(total));
    memcpy(signed_lanes, signed_total, sizeof(total));
}

/* The rows of one tile: inputs converted to double, combined, and filled with zeros up to a multiple of 16. */
void rows(const GramChunk &chunk, int64_t first, int64_t inputs, int64_t start, int64_t count, double *tiles, const double **row) {
    const int64_t whole = (count + 15) / 16 * 16;
    for (int64_t k = 0; k < inputs; ++k) {
        double *tile = tiles + k * TILE;
        const int dtype = chunk.dtype[first + k];
        load((const char *)chunk.in[first + k] + start * item_size(dtype), dtype, tile, count);
        for (int64_t i = count; i < whole; ++i) tile[i] = 0;
        row[k] = tile;
    }
    for (int64_t j = 0; j < chunk.rows; ++j) {
        double *tile = tiles + (inputs + j) * TILE;
        const double *weights = chunk.combinations + j * inputs;
        for (int64_t i = 0; i < whole; ++i) tile[i] = weights[0] * tiles[i];
        for (int64_t k = 1; k < inputs; ++k)
            for (int64_t i = 0; i < whole; ++i) tile[i] += weights[k] * tiles[k * TILE + i];
        row[j] = tile;
    }
}

void gram(const GramChunk &chunk) {
    const int64_t left = chunk.rows ? chunk.rows : chunk.left;
    const int64_t right = chunk.right ? (chunk.rows ? chunk.rows : chunk.right) : left;
    const int64_t results = left * right + (chunk.sums ? 2 * left : 0);
    for (int64_t i = 0; i < 16 * results; ++i) chunk.lanes[i] = 0;
    const double *z[MOST_ROWS], *other[MOST_ROWS], *const *y = chunk.right ? other : z;
    for (int64_t start = 0; start < chunk.count; start += TILE) {
        const int64_t count = chunk.count - start < TILE ? chunk.count - start : TILE, whole = (count + 15) / 16 * 16;
        rows(chunk, 0, chunk.left, start, count, chunk.tiles, z);
        if (chunk.right) rows(chunk, chunk.left, chunk.right, start, count, chunk.tiles + (chunk.left + chunk.rows) * TILE, other);
        for (int64_t i = 0; i < left; ++i) {
            const int64_t j = chunk.right ? 0 : i; /* of a symmetric table, half */
            some_dots(right - j, z[i], y + j, whole, chunk.lanes + 16 * (i * right + j));
        }
        double *lanes = chunk.lanes + 16 * left * right;
        if (chunk.sums)
            for (int64_t i = 0; i < left; ++i) sums(z[i], y[i], whole, lanes + 16 * i, lanes + 16 * (left + i));
    }
    for (int64_t r = 0; r < results; ++r) {
        double total = 0;
        for (int j = 0; j < 16; ++j) total += chunk.lanes[16 * r + j];
        chunk.out[r] = total;
    }
    if (!chunk.right)
        for (int64_t i = 0; i < left; ++i)
            for (int64_t j = 0; j < i; ++j) chunk.out[i * left + j] = chunk.out[j * left + i];
}

} // namespace

extern const GramFunction FEWSTEP_CHUNK = gram;
