/* The inner loops over groups. Compiled once for each instruction set with -DFEWSTEP_CHUNK=norm_chunk_<name>. Products and sums may be
 * contracted: the normalisation pairs promise no bits across processors. */
#pragma GCC optimize("fp-contract=fast")
#include "lanes.h"
#include "norm.h"

namespace {

typedef const float *__restrict Floats;
constexpr int LANES = 16;

template <bool SILU>
inline float slope(float u) {
    if (!SILU) return 1.0f;
    const float gate = sigmoid(u);
    return gate * (1.0f + u * (1.0f - gate));
}

const float *floats(const void *from, int dtype, int64_t start, float *scratch, int64_t count) {
    from = (const char *)from + start * item_size(dtype);
    if (dtype == FEWSTEP_FLOAT32) return (const float *)from;
    load(from, dtype, scratch, count);
    return scratch;
}

/* Two sums in double, in an order that depends on the count alone. */
struct Lanes {
    double first[LANES] = {0}, second[LANES] = {0};

    void flush(double *sums) {
        for (int half = LANES / 2; half; half /= 2)
            for (int j = 0; j < half; ++j) first[j] += first[j + half], second[j] += second[j + half];
        sums[0] += first[0], sums[1] += second[0];
        for (int j = 0; j < LANES; ++j) first[j] = second[j] = 0;
    }
};

constexpr int WIDE = 4 * LANES; /* float lanes: each adds NORM_TILE / WIDE numbers of a line at most */

/* Sums of x and x^2 of the first count / WIDE * WIDE elements, added to sums: in float around their own mean, so that no digit is lost. */
int64_t centred_moments(Floats x, int64_t count, double added, double *sums) {
    float first[WIDE] = {0}, second[WIDE] = {0};
    const int64_t whole = count / WIDE * WIDE;
    for (int64_t i = 0; i < whole; i += WIDE)
        for (int j = 0; j < WIDE; ++j) first[j] += x[i + j];
    for (int half = WIDE / 2; half; half /= 2)
        for (int j = 0; j < half; ++j) first[j] += first[j + half];
    const float centre = first[0] / (float)whole;
    for (int j = 0; j < WIDE; ++j) first[j] = 0;
    for (int64_t i = 0; i < whole; i += WIDE)
        for (int j = 0; j < WIDE; ++j) {
            const float d = x[i + j] - centre;
            first[j] += d, second[j] += d * d;
        }
    double around[2] = {0, 0};
    Lanes lanes;
    for (int part = 0; part < WIDE; part += LANES)
        for (int j = 0; j < LANES; ++j) lanes.first[j] += (double)first[part + j], lanes.second[j] += (double)second[part + j];
    lanes.flush(around);
    const double shift = (double)centre + added;
    sums[0] += around[0] + shift * (double)whole, sums[1] += around[1] + 2 * shift * around[0] + shift * shift * (double)whole;
    return whole;
}

void moments(const NormTile &tile, double *sums, int64_t step) {
    float scratch[NORM_TILE];
    const int64_t count = tile.count;
    Lanes lanes;
    for (int64_t l = 0; l < tile.lines; ++l) {
        Floats x = floats(tile.x, tile.dtype, l * count, scratch, count);
        const double added = tile.added ? tile.added[l * tile.coefficients_step] : 0.0;
        int64_t i = count >= 4 * WIDE ? centred_moments(x, count, added, sums + l * step) : 0;
        for (; i + LANES <= count; i += LANES)
            for (int j = 0; j < LANES; ++j) {
                const double z = (double)x[i + j] + added;
                lanes.first[j] += z, lanes.second[j] += z * z;
            }
        for (int j = 0; i < count; ++i, ++j) {
            const double z = (double)x[i] + added;
            lanes.first[j] += z, lanes.second[j] += z * z;
        }
        if (step) lanes.flush(sums + l * step);
    }
    if (!step) lanes.flush(sums);
}

/* In float around the first line, of few lines, so that no digit is lost. */
void columns(const NormTile &tile, double *__restrict sum, double *__restrict square) {
    float scratch[NORM_TILE], pivot[NORM_TILE], first[NORM_TILE], second[NORM_TILE];
    const int64_t count = tile.count;
    load(tile.x, tile.dtype, pivot, count);
    for (int64_t i = 0; i < count; ++i) first[i] = second[i] = 0;
    for (int64_t l = 1; l < tile.lines; ++l) {
        Floats x = floats(tile.x, tile.dtype, l * count, scratch, count);
        for (int64_t i = 0; i < count; ++i) {
            const float d = x[i] - pivot[i];
            first[i] += d, second[i] += d * d;
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const double centre = pivot[i], along = first[i];
        sum[i] += along + centre * (double)tile.lines;
        square[i] += second[i] + 2 * centre * along + centre * centre * (double)tile.lines;
    }
}

/* VM: statistics vary within a line; VA: coefficients do. */
template <int VM, int VA, bool SILU>
void apply(const NormTile &tile) {
    float scratch[NORM_TILE], values[NORM_TILE];
    const int64_t count = tile.count;
    for (int64_t l = 0; l < tile.lines; ++l) {
        Floats x = floats(tile.x, tile.dtype, l * count, scratch, count);
        Floats mean = tile.mean + l * tile.statistics_step, rstd = tile.rstd + l * tile.statistics_step;
        Floats a = tile.a + l * tile.coefficients_step, b = tile.b + l * tile.coefficients_step;
        float *__restrict y = tile.dtype == FEWSTEP_FLOAT32 ? (float *)tile.out + l * count : values;
        for (int64_t i = 0; i < count; ++i) {
            const float u = (x[i] - mean[i * VM]) * rstd[i * VM] * a[i * VA] + b[i * VA];
            y[i] = SILU ? u * sigmoid(u) : u;
        }
        if (tile.dtype != FEWSTEP_FLOAT32) store(y, (char *)tile.out + l * count * item_size(tile.dtype), tile.dtype, count);
    }
}

template <int VM, int VA, bool SILU>
void pair(const NormTile &tile, double *sums, float *__restrict column_vx, float *__restrict column_v) {
    float scratch[2][NORM_TILE], vx[NORM_TILE], v[NORM_TILE];
    const int64_t count = tile.count;
    Lanes lanes;
    for (int64_t l = 0; l < tile.lines; ++l) {
        Floats x = floats(tile.x, tile.dtype, l * count, scratch[0], count);
        Floats moved = floats(tile.moved, tile.moved_dtype, l * count, scratch[1], count);
        Floats mean = tile.mean + l * tile.statistics_step, rstd = tile.rstd + l * tile.statistics_step;
        Floats a = tile.a + l * tile.coefficients_step, b = tile.b + l * tile.coefficients_step;
        if (tile.tangent) {
            Floats added = tile.tadded + l * tile.coefficients_step;
            for (int64_t i = 0; i < count; ++i) {
                v[i] = moved[i] + added[i * VA];
                vx[i] = v[i] * ((x[i] - mean[i * VM]) * rstd[i * VM]);
            }
        } else {
            for (int64_t i = 0; i < count; ++i) {
                const float xhat = (x[i] - mean[i * VM]) * rstd[i * VM];
                v[i] = moved[i] * slope<SILU>(xhat * a[i * VA] + b[i * VA]);
                vx[i] = v[i] * xhat;
            }
        }
        if (column_v) {
            for (int64_t i = 0; i < count; ++i) column_vx[i] += vx[i], column_v[i] += v[i];
        }
        if (tile.keep) memcpy((float *)tile.out + l * count, v, count * sizeof(float));
        if (!sums) continue;
        if (VA && !tile.tangent)
            for (int64_t i = 0; i < count; ++i) vx[i] *= a[i], v[i] *= a[i];
        int64_t i = 0;
        if (count >= 4 * WIDE) {
            float first[WIDE] = {0}, second[WIDE] = {0};
            for (; i + WIDE <= count; i += WIDE)
                for (int j = 0; j < WIDE; ++j) first[j] += vx[i + j], second[j] += v[i + j];
            for (int part = 0; part < WIDE; part += LANES)
                for (int j = 0; j < LANES; ++j) lanes.first[j] += (double)first[part + j], lanes.second[j] += (double)second[part + j];
        }
        for (; i + LANES <= count; i += LANES)
            for (int j = 0; j < LANES; ++j) lanes.first[j] += (double)vx[i + j], lanes.second[j] += (double)v[i + j];
        for (int j = 0; i < count; ++i, ++j) lanes.first[j] += (double)vx[i], lanes.second[j] += (double)v[i];
        lanes.flush(sums + 2 * l);
    }
}

template <int VM, int VA, bool SILU>
void project(const NormTile &tile) {
    float scratch[2][NORM_TILE], values[NORM_TILE];
    const int64_t count = tile.count;
    for (int64_t l = 0; l < tile.lines; ++l) {
        const int64_t statistics = l * tile.statistics_step, coefficients = l * tile.coefficients_step;
        Floats x = floats(tile.x, tile.dtype, l * count, scratch[0], count);
        const float *moved = floats(tile.moved, tile.moved_dtype, l * count, scratch[1], count); /* may be out */
        Floats mean = tile.mean + statistics, rstd = tile.rstd + statistics, first = tile.first + statistics;
        Floats second = tile.second + statistics, a = tile.a + coefficients, b = tile.b + coefficients;
        float *out = tile.dtype == FEWSTEP_FLOAT32 ? (float *)tile.out + l * count : values;
        if (tile.tangent) {
            Floats ta = tile.ta + coefficients, tb = tile.tb + coefficients, added = tile.tadded + coefficients;
#pragma GCC ivdep
            for (int64_t i = 0; i < count; ++i) {
                const float r = rstd[i * VM], xhat = (x[i] - mean[i * VM]) * r;
                const float change = r * (moved[i] + added[i * VA] - first[i * VM] - xhat * second[i * VM]);
                out[i] = slope<SILU>(xhat * a[i * VA] + b[i * VA]) * (a[i * VA] * change + ta[i * VA] * xhat + tb[i * VA]);
            }
        } else {
#pragma GCC ivdep
            for (int64_t i = 0; i < count; ++i) {
                const float r = rstd[i * VM], xhat = (x[i] - mean[i * VM]) * r;
                const float du = moved[i] * slope<SILU>(xhat * a[i * VA] + b[i * VA]);
                out[i] = r * (a[i * VA] * du - first[i * VM] - xhat * second[i * VM]);
            }
        }
        if (tile.dtype != FEWSTEP_FLOAT32) store(out, (char *)tile.out + l * count * item_size(tile.dtype), tile.dtype, count);
    }
}

#define FEWSTEP_VARIANT(function, ...)                                                                                                         \
    if (tile.statistics_vary) tile.silu ? function<1, 1, true>(__VA_ARGS__) : function<1, 1, false>(__VA_ARGS__);                              \
    else if (tile.coefficients_vary) tile.silu ? function<0, 1, true>(__VA_ARGS__) : function<0, 1, false>(__VA_ARGS__);                       \
    else tile.silu ? function<0, 0, true>(__VA_ARGS__) : function<0, 0, false>(__VA_ARGS__);

void any_apply(const NormTile &tile) { FEWSTEP_VARIANT(apply, tile) }
void any_project(const NormTile &tile) { FEWSTEP_VARIANT(project, tile) }
void any_pair(const NormTile &tile, double *sums, float *column_vx, float *column_v) {
    FEWSTEP_VARIANT(pair, tile, sums, column_vx, column_v)
}

} // namespace

extern const NormFunctions FEWSTEP_CHUNK = {load<float>, moments, columns, any_apply, any_pair, any_project};
