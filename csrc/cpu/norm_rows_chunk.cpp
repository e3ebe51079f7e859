/* Rows of the normalisation pairs, a few at a time, while they are in the first cache. Compiled once for each instruction set with
 * -DFEWSTEP_CHUNK=norm_rows_chunk_<name>. */
#pragma GCC optimize("fp-contract=fast")
#include "lanes.h"
#include "norm.h"

namespace {

#define EACH [&](auto kind, int64_t i, [[maybe_unused]] int k) __attribute__((always_inline))
#define KIND typedef decltype(kind) T

/* Rows taken together: where they are read as floats, and where their results go before `leave` converts them. */
struct Block {
    const NormRows &rows;
    const int64_t first, count, size; /* size: elements of all rows together, the length of each part of scratch */

    Block(const NormRows &of, int64_t from)
        : rows(of), first(from), count(of.count - from < rows_together(of.width) ? of.count - from : rows_together(of.width)),
          size(of.width * rows_together(of.width)) {}

    const float *floats(const void *from, int dtype, float *room) const {
        from = (const char *)from + first * rows.width * item_size(dtype);
        if (dtype == FEWSTEP_FLOAT32) return (const float *)from;
        load(from, dtype, room, count * rows.width);
        return room;
    }
    const float *x() const { return floats(rows.x, rows.dtype, rows.scratch); }
    const float *moved() const { return floats(rows.moved, rows.moved_dtype, rows.scratch + size); }
    float *out() const { return rows.dtype == FEWSTEP_FLOAT32 ? (float *)rows.out + first * rows.width : rows.scratch + 2 * size; }
    void leave() const {
        if (rows.dtype != FEWSTEP_FLOAT32)
            store(rows.scratch + 2 * size, (char *)rows.out + first * rows.width * item_size(rows.dtype), rows.dtype, count * rows.width);
    }
};

template <class Body>
inline void stretches(int64_t n, const Body &body) {
    for (int64_t from = 0; from < n; from += STRETCH) body(from, from + STRETCH < n ? from + STRETCH : n);
}

/* Of short rows, a few at a time: the mean, then squares around it, so that no digit is lost. */
void short_statistics(const Block &block, const float *x, float *mean, float *rstd) {
    const int64_t n = block.rows.width;
    const bool centred = block.rows.centred;
    const float share = 1.0f / (float)n, eps = (float)block.rows.eps;
    float centre[ROWS_TOGETHER] = {}, sums[ROWS_TOGETHER] = {}, squares[ROWS_TOGETHER] = {};
    for (int64_t row = 0; centred && row < block.count; ++row, x += n) {
        Vector sum = {};
        float rest = 0;
        int64_t i = 0;
        for (; i + W <= n; i += W) sum += At<Vector>::get(x + i);
        for (; i < n; ++i) rest += x[i];
        sums[row] = across(sum) + rest;
    }
    x -= centred ? block.count * n : 0;
    for (int row = 0; row < ROWS_TOGETHER; ++row) centre[row] = sums[row] * share;
    for (int64_t row = 0; row < block.count; ++row, x += n) {
        Vector sum = {}, square = {};
        float rest = 0, rest_square = 0;
        int64_t i = 0;
        for (; i + W <= n; i += W) {
            const Vector d = At<Vector>::get(x + i) - centre[row];
            sum += d, square += d * d;
        }
        for (; i < n; ++i) {
            const float d = x[i] - centre[row];
            rest += d, rest_square += d * d;
        }
        sums[row] = across(sum) + rest, squares[row] = across(square) + rest_square;
    }
    for (int row = 0; row < ROWS_TOGETHER; ++row) {
        const float off = centred ? sums[row] * share : 0.0f, variance = squares[row] * share - off * off;
        mean[row] = centre[row] + off, rstd[row] = 1.0f / __builtin_sqrtf((variance > 0 ? variance : 0.0f) + eps);
    }
}

/* The same of one long row. */
void long_statistics(const NormRows &rows, const float *x, float *mean, float *rstd) {
    const int64_t n = rows.width;
    double total = 0, around = 0, squares = 0;
    if (rows.centred)
        stretches(n, [&](int64_t from, int64_t to) {
            Sum sum;
            along(from, to, EACH { KIND; sum.add(k, At<T>::get(x + i)); });
            total += sum.total();
        });
    const float centre = (float)(total / (double)n);
    stretches(n, [&](int64_t from, int64_t to) {
        Sum first, second;
        along(from, to, EACH {
            KIND;
            const T d = At<T>::get(x + i) - centre;
            first.add(k, d), second.add(k, d * d);
        });
        around += first.total(), squares += second.total();
    });
    around = rows.centred ? around / (double)n : 0.0;
    const double variance = squares / (double)n - around * around;
    *mean = (float)(centre + around), *rstd = (float)(1.0 / __builtin_sqrt((variance > 0 ? variance : 0.0) + rows.eps));
}

void statistics(const Block &block, const float *x, float *mean, float *rstd) {
    if (rows_together(block.rows.width) > 1) short_statistics(block, x, mean, rstd);
    else long_statistics(block.rows, x, mean, rstd);
}

template <class T>
inline T slope(T u) {
    const T gate = sigmoid(u);
    return gate * (1.0f + u * (1.0f - gate));
}

template <bool SILU>
void forward(const NormRows &rows) {
    const int64_t n = rows.width;
    for (int64_t first = 0; first < rows.count; first += rows_together(n)) {
        const Block block(rows, first);
        const float *x = block.x();
        float *y = block.out(), mean[ROWS_TOGETHER], rstd[ROWS_TOGETHER];
        statistics(block, x, mean, rstd);
        for (int64_t row = 0; row < block.count; ++row) {
            const float *a = rows.a + (first + row) * rows.step, *b = rows.b + (first + row) * rows.step, m = mean[row], r = rstd[row];
            along(0, n, EACH {
                KIND;
                const T u = (At<T>::get(x + row * n + i) - m) * r * At<T>::get(a + i) + At<T>::get(b + i);
                At<T>::put(y + row * n + i, SILU ? u * sigmoid(u) : u);
            });
            rows.mean[first + row] = m, rows.rstd[first + row] = r;
        }
        block.leave();
    }
}

/* dx; and v xhat and v added to the columns' sums, in float: rows.count is small. v: the gradient of u. */
template <bool SILU>
void backward(const NormRows &rows) {
    const int64_t n = rows.width;
    for (int64_t start = 0; start < rows.count; start += rows_together(n)) {
        const Block block(rows, start);
        const float *x = block.x(), *given = block.moved();
        float *dx = block.out(), *kept = rows.scratch + block.size;
        double of_x[ROWS_TOGETHER] = {}, alone[ROWS_TOGETHER] = {};
        for (int64_t row = 0; row < block.count; ++row) {
            const int64_t at = (start + row) * rows.step, place = row * n;
            const float *a = rows.a + at, *b = rows.b + at, m = rows.mean[start + row], r = rows.rstd[start + row];
            float *da = rows.da + at, *db = rows.db + at;
            stretches(n, [&](int64_t from, int64_t to) {
                Sum first, second;
                along(from, to, EACH {
                    KIND;
                    const T xhat = (At<T>::get(x + place + i) - m) * r, weight = At<T>::get(a + i);
                    T v = At<T>::get(given + place + i);
                    if (SILU) v *= slope(xhat * weight + At<T>::get(b + i)), At<T>::put(kept + place + i, v);
                    const T product = v * xhat;
                    At<T>::put(da + i, At<T>::get(da + i) + product), At<T>::put(db + i, At<T>::get(db + i) + v);
                    first.add(k, product * weight), second.add(k, v * weight);
                });
                of_x[row] += first.total(), alone[row] += second.total();
            });
        }
        const float *v = SILU ? kept : given;
        for (int64_t row = 0; row < block.count; ++row) {
            const float *a = rows.a + (start + row) * rows.step, m = rows.mean[start + row], r = rows.rstd[start + row];
            const float second = (float)(of_x[row] / (double)n), first = rows.centred ? (float)(alone[row] / (double)n) : 0.0f;
            along(0, n, EACH {
                KIND;
                const T xhat = (At<T>::get(x + row * n + i) - m) * r;
                At<T>::put(dx + row * n + i, r * (At<T>::get(v + row * n + i) * At<T>::get(a + i) - first - xhat * second));
            });
        }
        block.leave();
    }
}

template <bool SILU>
void tangent(const NormRows &rows) {
    const int64_t n = rows.width;
    for (int64_t start = 0; start < rows.count; start += rows_together(n)) {
        const Block block(rows, start);
        const float *x = block.x(), *v = block.moved();
        float *y = block.out(), mean[ROWS_TOGETHER], rstd[ROWS_TOGETHER];
        statistics(block, x, mean, rstd);
        for (int64_t row = 0; row < block.count; ++row) {
            const int64_t at = (start + row) * rows.step, place = row * n;
            const float *a = rows.a + at, *b = rows.b + at, *ta = rows.ta + at, *tb = rows.tb + at, m = mean[row], r = rstd[row];
            double of_x = 0, alone = 0;
            stretches(n, [&](int64_t from, int64_t to) {
                Sum first, second;
                along(from, to, EACH {
                    KIND;
                    const T given = At<T>::get(v + place + i);
                    first.add(k, given * ((At<T>::get(x + place + i) - m) * r)), second.add(k, given);
                });
                of_x += first.total(), alone += second.total();
            });
            const float second = (float)(of_x / (double)n), first = rows.centred ? (float)(alone / (double)n) : 0.0f;
            along(0, n, EACH {
                KIND;
                const T xhat = (At<T>::get(x + place + i) - m) * r, change = r * (At<T>::get(v + place + i) - first - xhat * second);
                const T image = At<T>::get(a + i) * change + At<T>::get(ta + i) * xhat + At<T>::get(tb + i);
                At<T>::put(y + place + i, SILU ? image * slope(xhat * At<T>::get(a + i) + At<T>::get(b + i)) : image);
            });
        }
        block.leave();
    }
}

void any_forward(const NormRows &rows) { rows.silu ? forward<true>(rows) : forward<false>(rows); }
void any_backward(const NormRows &rows) { rows.silu ? backward<true>(rows) : backward<false>(rows); }
void any_tangent(const NormRows &rows) { rows.silu ? tangent<true>(rows) : tangent<false>(rows); }

} // namespace

extern const RowFunctions FEWSTEP_CHUNK = {any_forward, any_backward, any_tangent};
