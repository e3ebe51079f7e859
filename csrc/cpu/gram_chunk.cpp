/* Products and sums of REDUCED elements of one sample: a tile's terms add up in T (double where an input is double), tiles in double.
 * Products and sums may be contracted: no bits are promised across processors. */
#pragma GCC optimize("fp-contract=fast")
#include "running_sums.h"

namespace {

enum { NO_SUMS, ABSOLUTE, SIGNED };

/* lanes[n] += a b[n] for each b; sum += a and signed_sum += |a|, or a sign(s); count is a multiple of RUNNING. */
template <class T, int N, int SUMMED>
void pass(const T *a, const T *const *b, const T *s, int64_t count, double *lanes, double *sum, double *signed_sum) {
    typedef typename Lanes<T>::Vector Vector;
    constexpr int64_t STEP = Lanes<T>::COUNT, PARTS = Lanes<T>::PARTS;
    const Vector zero = {};
    Vector total[N + 2][PARTS] = {};
    for (int64_t i = 0; i < count; i += RUNNING)
        for (int p = 0; p < PARTS; ++p) {
            Vector x, y;
            memcpy(&x, a + i + p * STEP, WIDTH);
            for (int n = 0; n < N; ++n) {
                memcpy(&y, b[n] + i + p * STEP, WIDTH);
                total[n][p] += x * y;
            }
            if (SUMMED != NO_SUMS) total[N][p] += x;
            if (SUMMED == ABSOLUTE) total[N + 1][p] += magnitude(x);
            if (SUMMED == SIGNED) {
                memcpy(&y, s + i + p * STEP, WIDTH);
                total[N + 1][p] += y > zero ? x : y < zero ? -x : y != y ? y : zero;
            }
        }
    for (int n = 0; n < N; ++n) add<T>(total[n], lanes + n * RUNNING);
    if (SUMMED != NO_SUMS) add<T>(total[N], sum), add<T>(total[N + 1], signed_sum);
}

/* One row of the table: a with n others, and its sums. */
template <class T, int SUMMED>
void row_of(int64_t n, const T *a, const T *const *b, const T *s, int64_t count, double *lanes, double *sum, double *signed_sum) {
    constexpr int MOST = Lanes<T>::COUNT == 16 ? 8 : Lanes<T>::COUNT == 8 ? (WIDTH == 64 ? 4 : 2) : 1; /* products that the registers hold */
    int done = 1;
    if (MOST > 4 && n >= MOST) pass<T, MOST, SUMMED>(a, b, s, count, lanes, sum, signed_sum), done = MOST;
    else if (MOST >= 4 && n >= 4) pass<T, 4, SUMMED>(a, b, s, count, lanes, sum, signed_sum), done = 4;
    else if (MOST >= 2 && n >= 2) pass<T, 2, SUMMED>(a, b, s, count, lanes, sum, signed_sum), done = 2;
    else pass<T, 1, SUMMED>(a, b, s, count, lanes, sum, signed_sum);
    if (n > done) row_of<T, NO_SUMS>(n - done, a, b + done, s, count, lanes + done * RUNNING, sum, signed_sum);
}

/* Two rows of a symmetric table: z[0] and z[1] with each other and with N others, which are loaded once for both, and their sums. */
template <class T, int N, bool SUMS>
void two_rows(const T *const *z, int64_t count, double *lanes, double *lanes_below, double *sum, double *absolute) {
    typedef typename Lanes<T>::Vector Vector;
    constexpr int64_t STEP = Lanes<T>::COUNT, PARTS = Lanes<T>::PARTS;
    Vector total[2 + N][PARTS] = {}, below[1 + N][PARTS] = {}, sums[2][PARTS] = {}, absolutes[2][PARTS] = {};
    for (int64_t i = 0; i < count; i += RUNNING)
        for (int p = 0; p < PARTS; ++p) {
            Vector x[2], y;
            for (int k = 0; k < 2; ++k) {
                memcpy(&x[k], z[k] + i + p * STEP, WIDTH);
                if (SUMS) sums[k][p] += x[k], absolutes[k][p] += magnitude(x[k]);
            }
            total[0][p] += x[0] * x[0], total[1][p] += x[0] * x[1], below[0][p] += x[1] * x[1];
            for (int n = 0; n < N; ++n) {
                memcpy(&y, z[2 + n] + i + p * STEP, WIDTH);
                total[2 + n][p] += x[0] * y, below[1 + n][p] += x[1] * y;
            }
        }
    for (int n = 0; n < 2 + N; ++n) add<T>(total[n], lanes + n * RUNNING);
    for (int n = 0; n < 1 + N; ++n) add<T>(below[n], lanes_below + n * RUNNING);
    for (int k = 0; SUMS && k < 2; ++k) add<T>(sums[k], sum + k * RUNNING), add<T>(absolutes[k], absolute + k * RUNNING);
}

template <class T, bool SUMS>
void two_rows_of(int64_t n, const T *const *z, int64_t count, double *lanes, double *lanes_below, double *sum, double *absolute) {
    const int64_t most = n < 3 ? n : 3; /* others that the registers hold */
    if (most == 0) two_rows<T, 0, SUMS>(z, count, lanes, lanes_below, sum, absolute);
    else if (most == 1) two_rows<T, 1, SUMS>(z, count, lanes, lanes_below, sum, absolute);
    else if (most == 2) two_rows<T, 2, SUMS>(z, count, lanes, lanes_below, sum, absolute);
    else two_rows<T, 3, SUMS>(z, count, lanes, lanes_below, sum, absolute);
    if (n == most) return;
    row_of<T, NO_SUMS>(n - most, z[0], z + 2 + most, nullptr, count, lanes + (2 + most) * RUNNING, nullptr, nullptr);
    row_of<T, NO_SUMS>(n - most, z[1], z + 2 + most, nullptr, count, lanes_below + (1 + most) * RUNNING, nullptr, nullptr);
}

/* The rows of one tile: inputs where they lie or converted, combined, and filled with zeros up to a multiple of RUNNING. */
template <class T>
void rows(const GramChunk &chunk, int64_t first, int64_t inputs, int64_t start, int64_t count, T *tiles, const T **row) {
    const int64_t whole = padded(count);
    const T *given[MOST_ROWS];
    for (int64_t k = 0; k < inputs; ++k)
        row[k] = given[k] = fetch(chunk.in[first + k], chunk.dtype[first + k], start, count, tiles + k * TILE);
    for (int64_t j = 0; j < chunk.rows; ++j) {
        T *tile = tiles + (inputs + j) * TILE;
        const double *weights = chunk.combinations + j * inputs;
        int64_t terms = 0, last = 0;
        for (int64_t k = 0; k < inputs; ++k) {
            if (weights[k] == 0) continue;
            const T weight = (T)weights[k], *x = given[k];
            if (terms++)
                for (int64_t i = 0; i < whole; ++i) tile[i] += weight * x[i];
            else
                for (int64_t i = 0; i < whole; ++i) tile[i] = weight * x[i];
            last = k;
        }
        for (int64_t i = 0; !terms && i < whole; ++i) tile[i] = 0;
        row[j] = terms == 1 && weights[last] == 1 ? given[last] : tile;
    }
}

template <class T>
void gram_of(const GramChunk &chunk) {
    const int64_t left = chunk.rows ? chunk.rows : chunk.left;
    const int64_t right = chunk.right ? (chunk.rows ? chunk.rows : chunk.right) : left;
    const int64_t results = left * right + (chunk.sums ? 2 * left : 0);
    for (int64_t i = 0; i < RUNNING * results; ++i) chunk.lanes[i] = 0;
    T *tiles = (T *)chunk.tiles;
    const T *z[MOST_ROWS], *other[MOST_ROWS], *const *y = chunk.right ? other : z;
    for (int64_t start = 0; start < chunk.count; start += TILE) {
        const int64_t count = chunk.count - start < TILE ? chunk.count - start : TILE, whole = padded(count);
        rows(chunk, 0, chunk.left, start, count, tiles, z);
        if (chunk.right) rows(chunk, chunk.left, chunk.right, start, count, tiles + (chunk.left + chunk.rows) * TILE, other);
        double *sums = chunk.lanes + RUNNING * left * right, *signed_sums = sums + RUNNING * left;
        int64_t i = 0;
        for (; Lanes<T>::COUNT == 16 && !chunk.right && i + 2 <= left; i += 2, sums += 2 * RUNNING, signed_sums += 2 * RUNNING) {
            double *lanes = chunk.lanes + RUNNING * (i * right + i), *below = lanes + RUNNING * (right + 1);
            (chunk.sums ? two_rows_of<T, true> : two_rows_of<T, false>)(left - i - 2, z + i, whole, lanes, below, sums, signed_sums);
        }
        for (; i < left; ++i, sums += RUNNING, signed_sums += RUNNING) {
            const int64_t j = chunk.right ? 0 : i; /* of a symmetric table, half */
            double *lanes = chunk.lanes + RUNNING * (i * right + j);
            if (!chunk.sums) row_of<T, NO_SUMS>(right - j, z[i], y + j, nullptr, whole, lanes, nullptr, nullptr);
            else if (chunk.right) row_of<T, SIGNED>(right - j, z[i], y + j, y[i], whole, lanes, sums, signed_sums);
            else row_of<T, ABSOLUTE>(right - j, z[i], y + j, nullptr, whole, lanes, sums, signed_sums);
        }
    }
    for (int64_t r = 0; r < results; ++r) chunk.out[r] = total_of(chunk.lanes + RUNNING * r);
    if (!chunk.right)
        for (int64_t i = 0; i < left; ++i)
            for (int64_t j = 0; j < i; ++j) chunk.out[i * left + j] = chunk.out[j * left + i];
}

void gram(const GramChunk &chunk) {
    for (int64_t n = 0; n < chunk.left + chunk.right; ++n)
        if (chunk.dtype[n] == FEWSTEP_FLOAT64) return gram_of<double>(chunk);
    gram_of<float>(chunk);
}

} // namespace

extern const GramFunction FEWSTEP_CHUNK = gram;
