/* AdamW, averages and the working copy of one share. Compiled once for each instruction set with
 * -DFEWSTEP_CHUNK=adamw_ema_chunk_<name>. */
#include "average.h"

namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

template <class T>
void adamw(T *parameter, const T *gradient, T *first, T *second, const AdamwShare &share, int64_t count) {
    const T keep = (T)share.keep, scale = (T)share.gradient_scale, weight1 = (T)(1 - share.beta1), beta2 = (T)share.beta2;
    const T weight2 = (T)(1 - share.beta2), size = (T)share.step_size, correction = (T)share.correction, epsilon = (T)share.epsilon;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        const T g = gradient[i] * scale, m = first[i] + weight1 * (g - first[i]), v = second[i] * beta2 + weight2 * g * g;
        first[i] = m;
        second[i] = v;
        parameter[i] = parameter[i] * keep - size * m / (root(v) * correction + epsilon);
    }
}

/* A tile of a tensor: in place where its dtype is the accumulator's, else a converted copy. */
template <class T>
struct Tile {
    T part[TILE];
    T *values;
    char *place;
    int dtype;
    int64_t count;

    Tile(const void *data, int dtype, int64_t start, int64_t count) : place((char *)data + start * item_size(dtype)), dtype(dtype), count(count) {
        values = (T *)place;
        if (dtype != dtype_of<T>()) {
            values = part;
            load(place, dtype, part, count);
        }
    }
    void write() const {
        if (values == part) store(part, place, dtype, count);
    }
};

template <class T>
void step(const AdamwShare &share) {
    for (int64_t start = 0; start < share.count; start += TILE) {
        const int64_t count = share.count - start < TILE ? share.count - start : TILE;
        if (share.gradient) {
            Tile<T> parameter(share.parameter, share.parameter_dtype, start, count);
            Tile<T> gradient(share.gradient, share.gradient_dtype, start, count);
            Tile<T> first(share.exp_avg, share.exp_avg_dtype, start, count), second(share.exp_avg_sq, share.exp_avg_sq_dtype, start, count);
            adamw(parameter.values, (const T *)gradient.values, first.values, second.values, share, count);
            first.write();
            second.write();
            parameter.write();
            if (share.working) store(parameter.values, (char *)share.working + start * item_size(share.working_dtype), share.working_dtype, count);
        }
        for (int64_t p = 0; p < share.averages; ++p)
            follow_in_precision(share.parameter, share.parameter_dtype, start, count, share.average[p]);
    }
}

void step_in_its_precision(const AdamwShare &share) {
    if (share.parameter_dtype == FEWSTEP_FLOAT64) step<double>(share);
    else step<float>(share);
}

} // namespace

extern const AdamwFunction FEWSTEP_CHUNK = step_in_its_precision;
