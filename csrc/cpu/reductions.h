/* The inner loops of the per-sample reductions, compiled once for each instruction set (gram_chunk.cpp, distance_chunk.cpp). */
#pragma once
#include <stdint.h>

constexpr int64_t REDUCED = 4096; /* elements of one partial sum; the partial sums are added in order */
constexpr int64_t TILE = 512;     /* elements converted at a time; a multiple of RUNNING */
constexpr int64_t RUNNING = 32;   /* running sums of a result, enough to hide an addition's latency */
constexpr int64_t MOST_ROWS = 65;

/* z = combinations @ left and y = combinations @ right, or left and right themselves; without right, y is z. */
struct GramChunk {
    int64_t left, right, rows; /* rows of combinations; 0 for none */
    int64_t count;
    const double *combinations; /* [rows, left] */
    const void *in[2 * MOST_ROWS];
    int dtype[2 * MOST_ROWS];
    bool sums;
    double *tiles; /* (left + right + 2 rows) TILE */
    double *lanes; /* RUNNING a result */
    double *out;   /* z_i y_j, then with sums the sums of z_i, then of z_i sign(y_i) */
};

enum { DISTANCE_SQUARE = 0, DISTANCE_ABSOLUTE = 1, DISTANCE_PSEUDO_HUBER = 2 };

/* Pointers are null for what is not there. Arithmetic is in double when wide, else in float; sums are in double. */
struct DistanceChunk {
    const void *a, *b, *weight, *tangent_a, *tangent_b;
    int a_dtype, b_dtype, weight_dtype, tangent_a_dtype, tangent_b_dtype, gradient_a_dtype, gradient_b_dtype;
    void *gradient_a, *gradient_b;
    int64_t count;
    int kind;
    double c, scale;
    bool wide;
};

typedef void (*GramFunction)(const GramChunk &);
struct DistanceFunctions {
    double (*sum)(const DistanceChunk &);    /* of weight phi(a - b), or of weight phi'(a - b) (tangent_a - tangent_b) */
    void (*gradient)(const DistanceChunk &); /* gradient_a = scale weight phi'(a - b) = -gradient_b */
};

#define FEWSTEP_DECLARE(set)                    \
    extern const GramFunction gram_chunk_##set; \
    extern const DistanceFunctions distance_chunk_##set;
FEWSTEP_DECLARE(baseline)
#ifdef FEWSTEP_X86
FEWSTEP_DECLARE(avx2)
FEWSTEP_DECLARE(avx512)
#endif
#undef FEWSTEP_DECLARE
