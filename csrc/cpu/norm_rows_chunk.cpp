/* Rows of the normalisation pairs, each whole, while it is in the first cache. Compiled once for each instruction set with
 * -DFEWSTEP_CHUNK=norm_rows_chunk_<name>. */
#pragma GCC optimize("fp-contract=fast")
#include "lanes.h"
#include "norm.h"

namespace {

#define EACH [&](auto kind, int64_t i, [[maybe_unused]] int k) __attribute__((always_inline))
#define KIND typedef decltype(kind) T

const float *floats(const void *from, int dtype, int64_t start, float *scratch, int64_t count) {
    from = (const char *)from + start * item_size(dtype);
    if (dtype == FEWSTEP_FLOAT32) return (const float *)from;
    load(from, dtype, scratch, count);
    return scratch;
}

/* Where a row's results go first: to their place, or to scratch, from where `leave` converts them. */
float *place(const NormRows &rows, int64_t row) {
    return rows.dtype == FEWSTEP_FLOAT32 ? (float *)rows.out + row * rows.width : rows.scratch + 2 * rows.width;
}

void leave(const NormRows &rows, int64_t row) {
    if (rows.dtype != FEWSTEP_FLOAT32)
        store(rows.scratch + 2 * rows.width, (char *)rows.out + row * rows.width * item_size(rows.dtype), rows.dtype, rows.width);
}

/* The mean, then squares around it, so that no digit is lost. */
void statistics(const NormRows &rows, const float *x, float *mean, float *rstd) {
    const int64_t n = rows.width;
    double total = 0, around = 0, squares = 0;
    for (int64_t from = 0; rows.centred && from < n; from += STRETCH) {
        Sum sum;
        along(from, from + STRETCH < n ? from + STRETCH : n, EACH { KIND; sum.add(k, At<T>::get(x + i)); });
        total += sum.total();
    }
    const float centre = (float)(total / (double)n);
    for (int64_t from = 0; from < n; from += STRETCH) {
        Sum first, second;
        along(from, from + STRETCH < n ? from + STRETCH : n, EACH {
            KIND;
            const T d = At<T>::get(x + i) - centre;
            first.add(k, d), second.add(k, d * d);
        });
        around += first.total(), squares += second.total();
    }
    around = rows.centred ? around / (double)n : 0.0;
    const double variance = squares / (double)n - around * around;
    *mean = (float)(centre + around), *rstd = (float)(1.0 / __builtin_sqrt((variance > 0 ? variance : 0.0) + rows.eps));
}

template <class T>
inline T slope(T u) {
    const T gate = sigmoid(u);
    return gate * (1.0f + u * (1.0f - gate));
}

template <bool SILU>
void forward(const NormRows &rows) {
    const float *a = rows.a, *b = rows.b;
    for (int64_t row = 0; row < rows.count; ++row) {
        const float *x = floats(rows.x, rows.dtype, row * rows.width, rows.scratch, rows.width);
        float *y = place(rows, row), m, r;
        statistics(rows, x, &m, &r);
        along(0, rows.width, EACH {
            KIND;
            const T u = (At<T>::get(x + i) - m) * r * At<T>::get(a + i) + At<T>::get(b + i);
            At<T>::put(y + i, SILU ? u * sigmoid(u) : u);
        });
        rows.mean[row] = m, rows.rstd[row] = r;
        leave(rows, row);
    }
}

/* dx; and v xhat and v added to the columns' sums, in float: rows.count is small. v: the gradient of u. */
template <bool SILU>
void backward(const NormRows &rows) {
    const int64_t n = rows.width;
    const float *a = rows.a, *b = rows.b;
    float *da = rows.da, *db = rows.db;
    for (int64_t row = 0; row < rows.count; ++row) {
        const float *x = floats(rows.x, rows.dtype, row * n, rows.scratch, n);
        const float *given = floats(rows.moved, rows.moved_dtype, row * n, rows.scratch + n, n);
        const float m = rows.mean[row], r = rows.rstd[row];
        float *dx = place(rows, row), *kept = rows.scratch + n;
        double totals[2] = {0, 0};
        for (int64_t from = 0; from < n; from += STRETCH) {
            Sum along_x, alone;
            along(from, from + STRETCH < n ? from + STRETCH : n, EACH {
                KIND;
                const T xhat = (At<T>::get(x + i) - m) * r, weight = At<T>::get(a + i);
                T v = At<T>::get(given + i);
                if (SILU) v *= slope(xhat * weight + At<T>::get(b + i)), At<T>::put(kept + i, v);
                const T product = v * xhat;
                At<T>::put(da + i, At<T>::get(da + i) + product), At<T>::put(db + i, At<T>::get(db + i) + v);
                along_x.add(k, product * weight), alone.add(k, v * weight);
            });
            totals[0] += along_x.total(), totals[1] += alone.total();
        }
        const float *v = SILU ? kept : given;
        const float second = (float)(totals[0] / (double)n), first = rows.centred ? (float)(totals[1] / (double)n) : 0.0f;
        along(0, n, EACH {
            KIND;
            const T xhat = (At<T>::get(x + i) - m) * r;
            At<T>::put(dx + i, r * (At<T>::get(v + i) * At<T>::get(a + i) - first - xhat * second));
        });
        leave(rows, row);
    }
}

template <bool SILU>
void tangent(const NormRows &rows) {
    const int64_t n = rows.width;
    const float *a = rows.a, *b = rows.b, *ta = rows.ta, *tb = rows.tb;
    for (int64_t row = 0; row < rows.count; ++row) {
        const float *x = floats(rows.x, rows.dtype, row * n, rows.scratch, n);
        const float *v = floats(rows.moved, rows.moved_dtype, row * n, rows.scratch + n, n);
        float *y = place(rows, row), m, r;
        statistics(rows, x, &m, &r);
        double totals[2] = {0, 0};
        for (int64_t from = 0; from < n; from += STRETCH) {
            Sum along_x, alone;
            along(from, from + STRETCH < n ? from + STRETCH : n, EACH {
                KIND;
                const T given = At<T>::get(v + i);
                along_x.add(k, given * ((At<T>::get(x + i) - m) * r)), alone.add(k, given);
            });
            totals[0] += along_x.total(), totals[1] += alone.total();
        }
        const float second = (float)(totals[0] / (double)n), first = rows.centred ? (float)(totals[1] / (double)n) : 0.0f;
        along(0, n, EACH {
            KIND;
            const T xhat = (At<T>::get(x + i) - m) * r, change = r * (At<T>::get(v + i) - first - xhat * second);
            const T image = At<T>::get(a + i) * change + At<T>::get(ta + i) * xhat + At<T>::get(tb + i);
            At<T>::put(y + i, SILU ? image * slope(xhat * At<T>::get(a + i) + At<T>::get(b + i)) : image);
        });
        leave(rows, row);
    }
}

void any_forward(const NormRows &rows) { rows.silu ? forward<true>(rows) : forward<false>(rows); }
void any_backward(const NormRows &rows) { rows.silu ? backward<true>(rows) : backward<false>(rows); }
void any_tangent(const NormRows &rows) { rows.silu ? tangent<true>(rows) : tangent<false>(rows); }

} // namespace

extern const RowFunctions FEWSTEP_CHUNK = {any_forward, any_backward, any_tangent};
