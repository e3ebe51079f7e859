/* Reads Python's tensors where they lie, knowing nothing of torch: by the function that their type offers to C code in DLPack's
 * exchange table (dlpack.h, version 1). Looking at nine tensors from Python costs the host more than a small lincomb. */
#include "overlap.h"
#include "team.h"

namespace {

struct View { /* DLTensor */
    char *data;
    int32_t device_type, device, ndim;
    uint8_t kind, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct Exchange { /* DLPackExchangeAPI */
    uint32_t major, minor;
    const void *older, *allocate, *own, *give_back;
    int (*view)(void *object, View *to); /* 0, or -1 and Python's error is set */
    const void *stream;
};

int (*view_of)(void *object, View *to) = nullptr;

constexpr int32_t MOST_DIMENSIONS = 16, CPU = 1; /* DLDeviceType */
constexpr uint8_t INTEGER = 0, FLOAT = 2, BFLOAT = 4; /* DLDataTypeCode */

/* FEWSTEP_FLOAT32 .. FEWSTEP_FLOAT64, or -1. */
int64_t float_of(const View &x) {
    if (x.lanes != 1) return -1;
    if (x.kind == BFLOAT) return x.bits == 16 ? FEWSTEP_BFLOAT16 : -1;
    if (x.kind != FLOAT) return -1;
    return x.bits == 32 ? FEWSTEP_FLOAT32 : x.bits == 64 ? FEWSTEP_FLOAT64 : x.bits == 16 ? FEWSTEP_FLOAT16 : -1;
}

bool on_one_device(const View &x, const View &y) { return x.device_type == y.device_type && x.device == y.device; }

/* Whether elements lie in the usual order and fill one stretch of memory, from dimension `from` on. */
bool row_major(const View &x, int32_t from) {
    int64_t expected = 1;
    for (int32_t d = x.ndim - 1; d >= from; --d) {
        if (x.shape[d] != 1 && x.strides[d] != expected) return false;
        expected *= x.shape[d];
    }
    return true;
}

/* The same for any order of dimensions. */
bool dense(const View &x, int32_t from) {
    int64_t expected = 1;
    int32_t left = 0;
    for (int32_t d = from; d < x.ndim; ++d) left += x.shape[d] != 1;
    while (left--) {
        int32_t next = -1;
        for (int32_t d = from; d < x.ndim; ++d)
            if (x.shape[d] != 1 && x.strides[d] == expected) next = d;
        if (next < 0) return false;
        expected *= x.shape[next];
    }
    return true;
}

bool same_shape(const View &x, const View &y) {
    if (x.ndim != y.ndim || !on_one_device(x, y)) return false;
    for (int32_t d = 0; d < x.ndim; ++d)
        if (x.shape[d] != y.shape[d]) return false;
    return true;
}

bool same_strides(const View &x, const View &y, int32_t from) {
    for (int32_t d = from; d < x.ndim; ++d)
        if (x.strides[d] != y.strides[d] && x.shape[d] != 1) return false;
    return true;
}

bool read_coefficients(const View &c, const View &first, int64_t rows, int64_t columns, fewstep_coefficients *to) {
    const int64_t dtype = float_of(c);
    if (c.ndim < 2 || c.ndim > 3 || !c.data || !on_one_device(c, first)) return false;
    if (dtype != FEWSTEP_FLOAT32 && dtype != FEWSTEP_FLOAT64) return false;
    const int32_t row = c.ndim - 2, column = c.ndim - 1;
    if (c.shape[row] != rows || c.shape[column] != columns || (row && c.shape[0] != first.shape[0])) return false;
    *to = {(int64_t)(c.data + c.byte_offset), row ? c.strides[0] : 0, c.strides[row], c.strides[column], dtype};
    return true;
}

bool read_seeds(const View &s, const View &first, int64_t *to) {
    if (s.kind != INTEGER || s.bits != 64 || s.lanes != 1 || s.ndim != 1 || !s.data || !on_one_device(s, first)) return false;
    if (s.shape[0] != first.shape[0] || (s.strides[0] != 1 && s.shape[0] != 1)) return false;
    *to = (int64_t)(s.data + s.byte_offset);
    return true;
}

} // namespace

int fewstep_cpu_exchange(const void *api) {
    const Exchange *const given = (const Exchange *)api;
    view_of = given && given->major == 1 ? given->view : nullptr;
    return view_of ? 0 : 1;
}

int fewstep_cpu_look(const fewstep_objects *given, fewstep_lincomb *job, int64_t small) {
    const int64_t inputs = given->inputs, outputs = given->outputs, noise = given->noise;
    const int64_t *object = given->objects;
    View first, x;
    if (!view_of || inputs < 1 || outputs < 1 || given->noise_stream < 0 || given->noise_stream > UINT32_MAX) return FEWSTEP_NOT_PLAIN;
    for (int64_t i = 0; i < inputs + outputs; ++i) {
        if (view_of((void *)*object++, &x)) return FEWSTEP_NOT_PLAIN;
        if (i == 0) {
            first = x;
            if (x.ndim < 1 || x.ndim > MOST_DIMENSIONS || !(row_major(x, 1) || (!noise && dense(x, 1)))) return FEWSTEP_NOT_PLAIN;
            job->batch = x.shape[0], job->count = 1;
            for (int32_t d = 1; d < x.ndim; ++d) job->count *= x.shape[d];
        }
        const int64_t dtype = float_of(x);
        if (dtype < 0 || !x.data || !same_shape(x, first) || !same_strides(x, first, 1)) return FEWSTEP_NOT_PLAIN;
        /* A negated view, which its owner resolves before it computes, steps over real parts: such a stride is refused. */
        if (job->count == 1 && x.strides[0] != 1) return FEWSTEP_NOT_PLAIN;
        job->tensors[i] = {(int64_t)(x.data + x.byte_offset), x.strides[0], dtype};
    }
    if (job->batch * job->count < 2) return FEWSTEP_NOT_PLAIN;
    if (view_of((void *)*object++, &x) || !read_coefficients(x, first, outputs, inputs + noise, &job->coefficients)) return FEWSTEP_NOT_PLAIN;
    job->seeds = 0;
    if (noise && (view_of((void *)*object, &x) || !read_seeds(x, first, &job->seeds))) return FEWSTEP_NOT_PLAIN;
    job->inputs = inputs, job->outputs = outputs, job->noise_stream = given->noise_stream;
    if (first.device_type == CPU && !noise && job->batch * job->count * inputs * outputs <= small) {
        const int code = fewstep_cpu_lincomb(job, 1);
        return code ? code : FEWSTEP_DONE;
    }
    return fewstep_cpu_overlaps(job);
}

int fewstep_cpu_overlaps(const fewstep_lincomb *job) { return fewstep_overlaps(*job) ? FEWSTEP_OVERLAP : 0; }

int fewstep_cpu_look_at_averages(int64_t tensors, int64_t profiles, const int64_t *objects, const int64_t *origins, int64_t *table) {
    int64_t origin = 0;
    View first, parameter, average;
    if (!view_of) return FEWSTEP_NOT_PLAIN;
    for (int64_t i = 0; i < tensors; ++i) {
        if (view_of((void *)objects[i], &parameter)) return FEWSTEP_NOT_PLAIN;
        if (i == 0) first = parameter;
        int64_t dtype = float_of(parameter), count = 1;
        for (int32_t d = 0; d < parameter.ndim; ++d) count *= parameter.shape[d];
        if (dtype < 0 || !on_one_device(parameter, first) || !dense(parameter, 0)) return FEWSTEP_NOT_PLAIN;
        *table++ = (int64_t)(parameter.data + parameter.byte_offset), *table++ = dtype;
        *table++ = count, *table++ = origins ? origins[i] : origin;
        origin += (count + 7) / 8 * 8;
        for (int64_t p = 1; p <= profiles; ++p) {
            if (view_of((void *)objects[p * tensors + i], &average)) return FEWSTEP_NOT_PLAIN;
            dtype = float_of(average);
            if (dtype < 0 || !same_shape(average, parameter) || !same_strides(average, parameter, 0)) return FEWSTEP_NOT_PLAIN;
            *table++ = (int64_t)(average.data + average.byte_offset), *table++ = dtype;
        }
    }
    return 0;
}
