/* What norm.cpp asks of the inner loops that norm_chunk.cpp and norm_rows_chunk.cpp compile for each instruction set. */
#pragma once
#include <stdint.h>

constexpr int64_t NORM_TILE = 1024; /* elements in a line at most */

/* Consecutive lines of `count` elements: xhat = (x - mean) rstd, u = xhat a + b. Within a line the statistics, and the coefficients, are one value
 * or vary; from line to line they advance by a step of 0 or 1. */
struct NormTile {
    int64_t lines, count;
    const void *x, *moved; /* moved: the gradient of y, or the tangent of x */
    void *out;
    int dtype, moved_dtype;
    bool statistics_vary, coefficients_vary, silu, tangent, keep; /* keep: pair leaves v, in float, in out */
    int64_t statistics_step, coefficients_step;
    const float *mean, *rstd, *a, *b;
    const float *first, *second;          /* means of v and of v xhat over what is normalised: as mean */
    const float *added, *ta, *tb, *tadded; /* what is added to x, and tangents of a, b and of that: as a */
};

/* v is the gradient of u, or the tangent of z. */
struct NormFunctions {
    void (*load)(const void *from, int dtype, float *to, int64_t count);
    void (*moments)(const NormTile &, double *sums, int64_t step); /* adds z and z^2 of line l to sums[l * step], sums[l * step + 1] */
    void (*columns)(const NormTile &, double *sum, double *square); /* adds x and x^2 to two numbers a column */
    void (*apply)(const NormTile &);
    /* Adds v xhat and v to two numbers a line (times a where it varies in a line and v is a gradient), and a column, where not null. */
    void (*pair)(const NormTile &, double *sums, float *column_vx, float *column_v);
    void (*project)(const NormTile &); /* dx, or the tangent of y */
};

extern const NormFunctions norm_chunk_baseline;
#ifdef FEWSTEP_X86
extern const NormFunctions norm_chunk_avx2, norm_chunk_avx512;
#endif

constexpr int64_t ROWS_TOGETHER = 16; /* short rows taken at a time, so that their sums do not wait for each other */

namespace {
inline int64_t rows_together(int64_t width) { return width <= 128 ? ROWS_TOGETHER : width <= 512 ? 4 : 1; } /* three times as many fit the first cache */
} // namespace

/* Consecutive rows; a, b: what xhat is multiplied by and what is added, a value a column, `step` apart from row to row (0: the same for all). */
struct NormRows {
    int64_t count, width, step;
    const void *x, *moved; /* moved: the gradient of y, or the tangent of x */
    void *out;
    int dtype, moved_dtype;
    bool centred, silu;
    double eps;
    float *mean, *rstd;  /* a value a row: forward writes them, backward reads them, tangent makes its own */
    const float *a, *b, *ta, *tb;
    float *da, *db;      /* backward adds to them: as a */
    float *scratch;      /* three times the rows taken together */
};

struct RowFunctions {
    void (*forward)(const NormRows &), (*backward)(const NormRows &), (*tangent)(const NormRows &);
};

extern const RowFunctions norm_rows_chunk_baseline;
#ifdef FEWSTEP_X86
extern const RowFunctions norm_rows_chunk_avx2, norm_rows_chunk_avx512;
#endif
