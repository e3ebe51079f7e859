/* Multiplications with an addition in registers alone, as many and as wide as this processor can: the floor of arithmetic. attention_jvp.py
 * compiles it with -march=native. */
#include <omp.h>
#include <stdint.h>

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int CHAINS = 12; /* that do not wait for each other: more than two units of a latency of five can begin */
typedef float Vector __attribute__((vector_size(WIDTH)));

extern "C" float multiply_add(int64_t count, int64_t threads) {
    const int64_t turns = count / (threads * CHAINS * (WIDTH / 4)) + 1;
    float sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    {
        Vector chain[CHAINS], x = Vector{} + 0.999f, y = Vector{} + 1e-3f;
        for (int j = 0; j < CHAINS; ++j) chain[j] = Vector{} + (float)(j + 1);
        for (int64_t i = 0; i < turns; ++i) {
            asm volatile("" : "+x"(x), "+x"(y)); /* so that no turn is foreseen */
#pragma GCC unroll 12
            for (int j = 0; j < CHAINS; ++j) chain[j] = chain[j] * x + y;
        }
        for (int j = 0; j < CHAINS; ++j) sum += chain[j][0];
    }
    return sum;
}
