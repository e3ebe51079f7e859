/* What the exported functions share: dtypes, threads, the instruction set chosen at load time. */
#pragma once
#include "fewstep_kernels.h"
#include <omp.h>

constexpr int64_t SERIAL = 32768; /* elements below which starting threads costs more than it saves */

/* 0 baseline, 1 avx2, 2 avx512: the best this processor has (FEWSTEP_INSTRUCTIONS asks for less), chosen once (entry.cpp). */
int instruction_set();

#ifdef FEWSTEP_X86
#define FEWSTEP_CHOOSE(stem) (instruction_set() == 2 ? stem##_avx512 : instruction_set() == 1 ? stem##_avx2 : stem##_baseline)
#else
#define FEWSTEP_CHOOSE(stem) (stem##_baseline)
#endif

namespace {

inline int64_t item_size(int64_t dtype) { return dtype == FEWSTEP_FLOAT64 ? 8 : dtype == FEWSTEP_FLOAT32 ? 4 : 2; }
inline bool known(int64_t dtype) { return dtype >= FEWSTEP_FLOAT32 && dtype <= FEWSTEP_FLOAT64; }
inline int team(int64_t elements, int64_t threads) { return elements < SERIAL || threads < 1 ? 1 : (int)threads; }

inline double read_scalar(const fewstep_scalar &scalar) {
    if (!scalar.address) return scalar.value;
    switch (scalar.dtype) {
    case FEWSTEP_FLOAT32: return *(const float *)scalar.address;
    case FEWSTEP_FLOAT64: return *(const double *)scalar.address;
    default: return (double)*(const int64_t *)scalar.address;
    }
}

/* part(first, last) over [0, total) in contiguous shares. */
template <class Part>
void share(int64_t total, int threads, const Part &part) {
    if (threads == 1) {
        part((int64_t)0, total);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
        part(total * t / n, total * (t + 1) / n);
    }
}

} // namespace
