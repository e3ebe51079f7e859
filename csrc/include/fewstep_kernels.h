/* Every function that libfewstep_cpu.so and libfewstep_cuda.so export.
 *
 * Plain C: raw pointers, sizes, a stream; no torch. Tables are arrays of int64 so that any caller can pack them.
 * Functions return 0, or a code: 1 for an argument outside its range, 2 to 4 as below, 1000 + cudaError_t for a CUDA failure.
 * Strides and counts are in elements. A sample's elements are contiguous; samples are batch_stride apart (0: one sample for all).
 */
#ifndef FEWSTEP_KERNELS_H
#define FEWSTEP_KERNELS_H

#include <stdint.h>

#define FEWSTEP_ABI 4

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

enum { FEWSTEP_FLOAT32 = 0, FEWSTEP_BFLOAT16 = 1, FEWSTEP_FLOAT16 = 2, FEWSTEP_FLOAT64 = 3, FEWSTEP_INT64 = 4, FEWSTEP_BOOL = 5 };
enum { FEWSTEP_OVERLAP = 2, FEWSTEP_NOT_PLAIN = 3, FEWSTEP_DONE = 4 };

typedef struct {
    int64_t data; /* address */
    int64_t batch_stride;
    int64_t dtype;
} fewstep_tensor;

/* coefficients[b * batch_stride + m * row_stride + k * column_stride] */
typedef struct {
    int64_t data;
    int64_t batch_stride;
    int64_t row_stride;
    int64_t column_stride;
    int64_t dtype; /* FEWSTEP_FLOAT32 or FEWSTEP_FLOAT64 */
} fewstep_coefficients;

/* A number given by value or, when address is not 0, read where it lies: float32, float64 or FEWSTEP_INT64. On a GPU the kernel reads it. */
typedef struct {
    double value;
    int64_t address;
    int64_t dtype;
} fewstep_scalar;

/* out[m][b] = sum_k c[b][m][k] in[k][b], tensors = the inputs, then the outputs. With seeds (int64 [batch]) the coefficients have
 * one more column, for standard normal noise. Accumulates in float64 when an input is float64, else in float32; products and sums round
 * separately, in the order of the inputs. An output may be an input (same address, stride and dtype); FEWSTEP_OVERLAP, and nothing written,
 * where one overlaps an input otherwise, another output, or itself. One table of int64, so that the call costs the host as little as may be. */
typedef struct {
    int64_t inputs, outputs, batch, count;
    int64_t seeds; /* address, or 0 */
    int64_t noise_stream;
    fewstep_coefficients coefficients;
    fewstep_tensor tensors[1]; /* inputs + outputs of them */
} fewstep_lincomb;

int fewstep_cpu_lincomb(const fewstep_lincomb *job, int64_t threads);
int fewstep_cpu_overlaps(const fewstep_lincomb *job); /* 0 or FEWSTEP_OVERLAP */

/* A lincomb of Python's tensors: the addresses of their objects, inputs, outputs, coefficients and, with noise = 1, seeds. */
typedef struct {
    int64_t inputs, outputs, noise, noise_stream;
    int64_t objects[1];
} fewstep_objects;

/* Writes the job (room for all its tensors) of tensors of any one device. FEWSTEP_NOT_PLAIN unless they have one shape [B, ...] of at least
 * two elements and one dense sample layout (row-major where noise is drawn), dtypes and sizes that fit, and memory; FEWSTEP_OVERLAP as
 * above. A job on the CPU without noise and with at most `small` products is run at once: then FEWSTEP_DONE.
 * Tensors are read by the table that fewstep_cpu_exchange was given: the DLPackExchangeAPI of their type, version 1; it returns 1 where it
 * cannot use that. Callers hold Python's lock; an error may be set where the answer is FEWSTEP_NOT_PLAIN. */
int fewstep_cpu_exchange(const void *api);
int fewstep_cpu_look(const fewstep_objects *given, fewstep_lincomb *job, int64_t small);

/* out [batch, count], contiguous: Philox4x32-10 keyed by seeds[b], counter (element / 4, stream). */
int fewstep_cpu_normal(const int64_t *seeds, int64_t batch, int64_t count, int64_t stream, void *out, int64_t dtype, int64_t threads);
int fewstep_cpu_uniform(const int64_t *seeds, int64_t batch, int64_t count, int64_t stream, void *out, int64_t dtype, int64_t threads);

/* table: for every tensor {parameter, its dtype, count, origin, then {average, its dtype} for every profile};
 * average += (1 - decay) (parameter - average), in float64 for float64 averages, else in float32. With a seed, bfloat16 averages are rounded
 * up with the probability that makes rounding unbiased: element e = origin + i (origin: a multiple of 8) of profile p takes 16 bits of
 * Philox4x32-10 keyed by seed, counter (e / 8, update, 1 + p): word e % 4, its low half where e % 8 < 4, else its high half. */
int fewstep_cpu_ema_update(int64_t tensors, int64_t profiles, const int64_t *table, const fewstep_scalar *decays, const int64_t *seed,
                           const fewstep_scalar *update, int64_t threads);

/* Writes that table of Python's tensors (objects: their addresses, the parameters, then every profile's averages), which all lie on one
 * device; FEWSTEP_NOT_PLAIN unless every average has its parameter's shape and dense layout. origins: null to number them one tensor after
 * another, each from a multiple of 8. Read as by fewstep_cpu_look. */
int fewstep_cpu_look_at_averages(int64_t tensors, int64_t profiles, const int64_t *objects, const int64_t *origins, int64_t *table);

/* sqrt of the sum of squares of all tensors; table: {address, dtype, count} for every tensor. Summed in float64, each stretch of
 * FEWSTEP_L2NORM_SHARE elements by itself into partials (room for sum of ceil(count / share)), then those in order: the result does not
 * depend on threads. out is float32 or float64. */
#define FEWSTEP_L2NORM_SHARE 8192
int fewstep_cpu_multi_tensor_l2norm(int64_t tensors, const int64_t *table, double *partials, void *out, int64_t out_dtype, int64_t threads);

/* AdamW with decoupled weight decay, at most four averages and a copy of the new parameter, in one pass.
 * table, one row a tensor: {count, origin, weight decay (the bits of a double), parameter, dtype, gradient or 0, dtype, exp_avg, dtype,
 * exp_avg_sq, dtype, step, dtype, copy or 0, dtype, then {average, dtype} for every profile}. step is one float32 or float64, advanced by one.
 * A tensor without a gradient keeps parameter, states and step; its averages move. scalars: {lr, beta1, beta2, epsilon, gradient scale,
 * guard, update, then every profile's decay}. Nothing at all is written when guard is not finite. Averages as in ema_update.
 * corrections: room for two doubles a tensor. */
int fewstep_cpu_adamw_ema_step(int64_t tensors, int64_t profiles, const int64_t *table, const fewstep_scalar *scalars, const int64_t *seed,
                               double *corrections, int64_t threads);

/* With z = combinations left and y = combinations right (combinations [rows, left] of doubles; rows = 0: z = left, y = right; right = 0
 * tensors: y = z), for every sample: products[b][i][j] = sum z_i y_j and, unless both are null, sums[b][i] = sum z_i and
 * signed_sums[b][i] = sum z_i sign(y_i), which is the sum of |z_i| when y = z. tensors = left, then right. Accumulated in float32 (float64
 * where a tensor is) over some hundred elements, then in float64, in an order that depends on count alone; written as out_dtype, float32 or
 * float64. At most 65 tensors a side. */
int fewstep_cpu_gram(int64_t left, int64_t right, int64_t rows, int64_t batch, int64_t count, const fewstep_tensor *tensors,
                     const double *combinations, void *products, void *sums, void *signed_sums, int64_t out_dtype, int64_t threads);

/* out[b] = s / divisor or, with norm > 0, sqrt(s + norm^2) - norm, where s = sum w phi(a - b) with phi(d) = d^2 (kind 0), |d| (1) or
 * sqrt(d^2 + c^2) - c (2) or, where a tangent is given, its derivative sum w phi'(a - b) (tangent_a - tangent_b). Added up as in gram.
 * tensors = a, b, w, tangent_a, tangent_b; data 0 for the last three that are not there. */
int fewstep_cpu_distance(int64_t kind, double c, int64_t batch, int64_t count, const fewstep_tensor *tensors, double divisor, double norm,
                         void *out, int64_t out_dtype, int64_t threads);
/* gradient_a = scales[b] w phi'(a - b) = -gradient_b; tensors = a, b, w, gradient_a, gradient_b; data 0 for the last three that are not there. */
int fewstep_cpu_distance_gradient(int64_t kind, double c, int64_t batch, int64_t count, const fewstep_tensor *tensors, const void *scales,
                                  int64_t scales_dtype, int64_t threads);

/* y = clamp(x, -s, s) / s, s = the magnitude of x at rank position (0 = least, count - 1 = greatest; linear between ranks), kept within
 * least and most; tensors = x, y. */
int fewstep_cpu_threshold(int64_t batch, int64_t count, const fewstep_tensor *tensors, double position, double least, double most,
                          int64_t threads);

/* xhat = (z - mean) rstd with z = x + input_shift; u = a xhat + b with a = weight (1 + scale), b = bias (1 + scale) + shift; y = silu(u) or u.
 * groups > 0: statistics over each group of channels, x is [batch, channels, positions] or, channels last, [batch, positions, channels].
 * groups = 0: over each row of x [batch, positions, channels]; centred = 0: RMS, mean 0. x is contiguous and not float64, the rest is
 * computed in float32 with sums in float64 that do not depend on threads. Parameters (data 0: absent) are batch_stride apart, 0 for one of all
 * samples. mean, rstd: [batch, groups or positions]; da, db: [batch, channels]. */
typedef struct {
    int64_t batch, channels, positions, groups, channels_last, centred, silu;
    double eps;
    const void *x;
    int64_t dtype;
    const void *moved; /* gradient of y in _backward, tangent of x in _tangent: laid out like x */
    int64_t moved_dtype;
    void *out; /* y, gradient of x, tangent of y: like x, in its dtype */
    float *mean, *rstd, *da, *db; /* mean, rstd: written forward, read by _backward */
    fewstep_tensor weight, bias, scale, shift, input_shift, ta, tb, tadded; /* the last three, tangents of a, b and input_shift, in _tangent */
} fewstep_normalisation;

int fewstep_cpu_normalise(const fewstep_normalisation *job, int64_t threads);
int fewstep_cpu_normalise_backward(const fewstep_normalisation *job, int64_t threads);
int fewstep_cpu_normalise_tangent(const fewstep_normalisation *job, int64_t threads);

/* [batch, heads, rows, columns] with neighbouring columns; strides in elements. */
typedef struct {
    int64_t data; /* address, or 0 */
    int64_t batch_stride, head_stride, row_stride;
} fewstep_rows;

typedef struct {
    int64_t data; /* address, or 0 */
    int64_t batch_stride, head_stride, row_stride, column_stride;
    int64_t dtype; /* FEWSTEP_BOOL (not 0: attends), or what is added */
} fewstep_mask;

/* With S = scale q k^T + mask, P = softmax(S) and dS = scale (tq k^T + q tk^T): out = P v, tangent = W v - rowsum(W) out + P tv, W = P dS, and
 * lse = log sum exp S; causal: query i attends keys 0..i; 0, and -inf in lse, where a query attends nothing. q, tq [batch, heads, rows, width];
 * k, tk [batch, key_heads, keys, width]; v, tv [batch, key_heads, keys, value_width]; all of dtype, and a tangent that is not there is zero.
 * Head h attends key head h / (heads / key_heads). out, tangent: contiguous [batch, heads, rows, value_width] of dtype; lse [batch, heads, rows],
 * float64 where dtype is, else float32, as all sums are. The result does not depend on threads. */
typedef struct {
    int64_t batch, heads, key_heads, rows, keys, width, value_width, dtype, causal;
    double scale;
    fewstep_rows q, k, v, tq, tk, tv;
    fewstep_mask mask;
    void *out, *tangent, *lse;
} fewstep_attention;

int fewstep_cpu_attention_jvp(const fewstep_attention *job, int64_t threads);

const char *fewstep_cpu_instructions(void); /* "avx512", "avx2" or "baseline": chosen once, from this processor */
int fewstep_cpu_abi(void);

/* The same on a CUDA device: every pointer inside tensors and coefficients is a device address; tables are read on the host.
 * Launched on stream; nothing synchronises. Noise as on the CPU. lincomb takes at most 16 inputs and 4 outputs. */
int fewstep_cuda_lincomb(const fewstep_lincomb *job, void *stream);
int fewstep_cuda_normal(const int64_t *seeds, int64_t batch, int64_t count, int64_t noise_stream, void *out, int64_t dtype, void *stream);
int fewstep_cuda_uniform(const int64_t *seeds, int64_t batch, int64_t count, int64_t noise_stream, void *out, int64_t dtype, void *stream);
int fewstep_cuda_ema_update(int64_t tensors, int64_t profiles, const int64_t *table, const fewstep_scalar *decays, const int64_t *seed,
                            const fewstep_scalar *update, void *stream);
int fewstep_cuda_multi_tensor_l2norm(int64_t tensors, const int64_t *table, double *partials, void *out, int64_t out_dtype, void *stream);
int fewstep_cuda_adamw_ema_step(int64_t tensors, int64_t profiles, const int64_t *table, const fewstep_scalar *scalars, const int64_t *seed,
                                double *corrections, void *stream);
int fewstep_cuda_abi(void);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
#endif
