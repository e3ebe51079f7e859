/* Whether writing lincomb's outputs could disturb reading its inputs. Host code. */
#ifndef FEWSTEP_OVERLAP_H
#define FEWSTEP_OVERLAP_H

#include "fewstep_kernels.h"

static inline int64_t fewstep_item_size(int64_t dtype) { return dtype == FEWSTEP_FLOAT64 ? 8 : dtype == FEWSTEP_FLOAT32 ? 4 : 2; }

/* same: refuse sharing exactly too. */
static inline bool fewstep_clash(const fewstep_tensor &y, const fewstep_tensor &x, int64_t batch, int64_t count, bool same) {
    const int64_t y_stride = y.batch_stride * fewstep_item_size(y.dtype), x_stride = x.batch_stride * fewstep_item_size(x.dtype);
    const int64_t y_sample = count * fewstep_item_size(y.dtype), x_sample = count * fewstep_item_size(x.dtype);
    if (y.data + y_stride * (batch - 1) + y_sample <= x.data || x.data + x_stride * (batch - 1) + x_sample <= y.data) return false;
    if (y.data == x.data && y_sample == x_sample && (y_stride == x_stride || batch == 1)) return same || y.dtype != x.dtype;
    if (y_stride != x_stride || y_stride <= 0) return true;
    int64_t apart = (x.data - y.data) % y_stride; /* samples that alternate, such as neighbouring columns of one buffer */
    if (apart < 0) apart += y_stride;
    return apart < y_sample || apart > y_stride - x_sample;
}

static inline bool fewstep_overlaps(const fewstep_lincomb &job) {
    if (job.batch == 0 || job.count == 0) return false;
    const fewstep_tensor *const out = job.tensors + job.inputs;
    for (int64_t m = 0; m < job.outputs; ++m) {
        if (out[m].batch_stride < job.count && job.batch > 1) return true;
        for (int64_t k = 0; k < job.inputs; ++k)
            if (fewstep_clash(out[m], job.tensors[k], job.batch, job.count, false)) return true;
        for (int64_t other = 0; other < m; ++other)
            if (fewstep_clash(out[m], out[other], job.batch, job.count, true)) return true;
    }
    return false;
}

#endif
