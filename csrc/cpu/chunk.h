/* The inner loops, compiled once for each instruction set (chunk.cpp); entry.cpp picks one at load time. */
#pragma once
#include <stdint.h>

constexpr int64_t CHUNK = 1024;   /* elements a chunk function handles at most; a multiple of 4 */
constexpr int64_t MOST_INPUTS = 64;
constexpr int64_t MOST_OUTPUTS = 64;

struct LincombChunk {
    int64_t inputs, outputs, count;
    const void *in[MOST_INPUTS];
    void *out[MOST_OUTPUTS];
    int in_dtype[MOST_INPUTS], out_dtype[MOST_OUTPUTS];
    const void *coefficients; /* [outputs, inputs + noise], float or double as the accumulator */
    bool noise;
    uint64_t seed, group; /* group: first element / 4 */
    uint32_t stream;
    void *scratch; /* (inputs + 1 + outputs) CHUNK accumulators */
};

struct ChunkFunctions {
    void (*lincomb_float)(const LincombChunk &);
    void (*lincomb_double)(const LincombChunk &);
    void (*normal)(uint64_t seed, uint64_t group, uint32_t stream, int64_t count, void *out, int dtype);
    void (*uniform)(uint64_t seed, uint64_t group, uint32_t stream, int64_t count, void *out, int dtype);
};

extern const ChunkFunctions chunk_baseline;
#ifdef FEWSTEP_X86
extern const ChunkFunctions chunk_avx2, chunk_avx512;
#endif
