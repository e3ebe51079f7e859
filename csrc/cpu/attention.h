/* What attention.cpp asks of the inner loops that attention_chunk.cpp compiles for each instruction set. */
#pragma once
#include "fewstep_kernels.h"

constexpr int64_t QUERIES = 64; /* of a tile at most */
constexpr int64_t KEYS = 96;    /* taken at a time */

/* One tile of queries of one head. Everything is counted from its own first element: q, tq, mask, out, tangent and lse from the tile's first
 * query, the rest from its head's first key. Addresses that are 0 are not there. */
struct AttentionTile {
    int64_t rows, first; /* first: the query's place among all, for causal */
    int64_t keys, width, value_width;
    int dtype;
    bool causal;
    double scale;
    fewstep_rows q, k, v, tq, tk, tv;
    fewstep_mask mask;
    void *out, *tangent, *lse; /* contiguous; lse in what sums are in */
    void *scratch;             /* attention_scratch() numbers, aligned to 64 bytes */
};

/* Scores and their tangents; queries, both results, four numbers a query; rows; keys, values and their tangents where they are converted. */
inline int64_t attention_scratch(int64_t width, int64_t value_width) {
    const int64_t each = 2 * (width + value_width);
    return QUERIES * (2 * KEYS + each + 4) + KEYS + each + KEYS * each;
}

struct AttentionFunctions {
    void (*attend_float)(const AttentionTile &), (*attend_double)(const AttentionTile &);
};

extern const AttentionFunctions attention_chunk_baseline;
#ifdef FEWSTEP_X86
extern const AttentionFunctions attention_chunk_avx2, attention_chunk_avx512;
#endif
