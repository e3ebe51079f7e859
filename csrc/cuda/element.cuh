/* Loads and stores of eight neighbouring elements of any of the four dtypes. */
#pragma once
#include "fewstep_kernels.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

constexpr int EIGHT = 8;      /* elements a thread holds: 16 bytes of bfloat16, two Philox groups */
constexpr int THREADS = 256;

__host__ __device__ __forceinline__ int64_t item_size(int dtype) {
    return dtype == FEWSTEP_FLOAT64 ? 8 : dtype == FEWSTEP_FLOAT32 ? 4 : 2;
}
__host__ __forceinline__ bool known(int64_t dtype) { return dtype >= FEWSTEP_FLOAT32 && dtype <= FEWSTEP_FLOAT64; }

template <class From, class T>
__device__ __forceinline__ void read(const From *from, T *to, int count, bool vector) {
    alignas(16) From part[EIGHT];
    if (vector) {
        const uint4 *words = (const uint4 *)from;
#pragma unroll
        for (int i = 0; i < (int)(sizeof(part) / 16); ++i) ((uint4 *)part)[i] = words[i];
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) to[i] = (T)part[i];
    } else {
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) to[i] = i < count ? (T)from[i] : (T)0;
    }
}

template <class T>
__device__ __forceinline__ void load_eight(const void *from, int dtype, T *to, int count, bool vector) {
    switch (dtype) {
    case FEWSTEP_FLOAT32: read((const float *)from, to, count, vector); break;
    case FEWSTEP_FLOAT64: read((const double *)from, to, count, vector); break;
    case FEWSTEP_BFLOAT16: {
        float part[EIGHT];
        read((const __nv_bfloat16 *)from, part, count, vector);
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) to[i] = (T)part[i];
        break;
    }
    default: {
        float part[EIGHT];
        read((const __half *)from, part, count, vector);
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) to[i] = (T)part[i];
    }
    }
}

template <class T> __device__ __forceinline__ void convert(T from, float *to) { *to = (float)from; }
template <class T> __device__ __forceinline__ void convert(T from, double *to) { *to = (double)from; }
template <class T> __device__ __forceinline__ void convert(T from, __nv_bfloat16 *to) { *to = __float2bfloat16_rn((float)from); }
template <class T> __device__ __forceinline__ void convert(T from, __half *to) { *to = __float2half_rn((float)from); }

template <class To, class T>
__device__ __forceinline__ void write(const T *from, To *to, int count, bool vector) {
    alignas(16) To part[EIGHT];
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) convert(from[i], &part[i]);
    if (vector) {
#pragma unroll
        for (int i = 0; i < (int)(sizeof(part) / 16); ++i) ((uint4 *)to)[i] = ((const uint4 *)part)[i];
    } else {
#pragma unroll
        for (int i = 0; i < EIGHT; ++i)
            if (i < count) to[i] = part[i];
    }
}

template <class T>
__device__ __forceinline__ void store_eight(const T *from, void *to, int dtype, int count, bool vector) {
    switch (dtype) {
    case FEWSTEP_FLOAT32: write(from, (float *)to, count, vector); break;
    case FEWSTEP_FLOAT64: write(from, (double *)to, count, vector); break;
    case FEWSTEP_BFLOAT16: write(from, (__nv_bfloat16 *)to, count, vector); break;
    default: write(from, (__half *)to, count, vector);
    }
}
