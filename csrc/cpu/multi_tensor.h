/* The inner loops over many tensors, compiled once for each instruction set (average_chunk.cpp, adamw_ema_chunk.cpp, l2norm_chunk.cpp). */
#pragma once
#include <stdint.h>

constexpr int64_t SHARE = 8192; /* elements a thread takes at a time: a parameter stays in cache from one average to the next */
constexpr int64_t TILE = 1024;  /* elements converted at a time; a multiple of 8 */
constexpr int64_t MOST_AVERAGES = 4;

/* One average's part in a share: average += weight (parameter - average). */
struct AverageShare {
    void *data;
    int dtype;
    double weight;
    bool stochastic;  /* bfloat16 only: round up with the probability that makes rounding unbiased */
    uint64_t seed, element; /* element: number of the first one, a multiple of 8 */
    uint32_t update, profile;
};

struct AdamwShare {
    void *parameter, *exp_avg, *exp_avg_sq, *working; /* working: a copy of the new parameter, or null */
    const void *gradient;                             /* null: the parameter stays, its averages move */
    int parameter_dtype, exp_avg_dtype, exp_avg_sq_dtype, working_dtype, gradient_dtype;
    int64_t count, averages;
    double keep;       /* 1 - lr weight_decay */
    double beta1, beta2, epsilon, gradient_scale;
    double step_size;  /* lr / (1 - beta1^step) */
    double correction; /* 1 / sqrt(1 - beta2^step) */
    AverageShare average[MOST_AVERAGES];
};

typedef void (*AverageFunction)(const void *parameter, int parameter_dtype, int64_t count, const AverageShare &average);
typedef void (*AdamwFunction)(const AdamwShare &share);
typedef double (*SquaresFunction)(const void *values, int dtype, int64_t count);

#define FEWSTEP_DECLARE(set)                     \
    extern const AverageFunction ema_chunk_##set; \
    extern const AdamwFunction adamw_ema_chunk_##set; \
    extern const SquaresFunction l2norm_chunk_##set;
FEWSTEP_DECLARE(baseline)
#ifdef FEWSTEP_X86
FEWSTEP_DECLARE(avx2)
FEWSTEP_DECLARE(avx512)
#endif
#undef FEWSTEP_DECLARE
