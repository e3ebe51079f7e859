/* fewstep_cpu_attention_jvp: argument checks, and tiles of queries shared among threads. */
#include "attention.h"
#include "team.h"
#include <algorithm>
#include <memory>

namespace {

const AttentionFunctions &functions = FEWSTEP_CHOOSE(attention_chunk);

fewstep_rows head(const fewstep_rows &x, int64_t b, int64_t h, int64_t row, int64_t size) {
    fewstep_rows found = x;
    if (x.data) found.data += (b * x.batch_stride + h * x.head_stride + row * x.row_stride) * size;
    return found;
}

} // namespace

int fewstep_cpu_attention_jvp(const fewstep_attention *job, int64_t threads) {
    const int64_t B = job->batch, H = job->heads, N = job->rows, M = job->keys, D = job->width, E = job->value_width, G = job->key_heads;
    if (B < 0 || H < 0 || N < 0 || M < 0 || D < 1 || E < 1 || G < 1 || H % G || !known(job->dtype)) return 1;
    if (job->mask.data && !known(job->mask.dtype) && job->mask.dtype != FEWSTEP_BOOL) return 1;
    const int64_t blocks = (N + QUERIES - 1) / QUERIES, tiles = B * H * blocks, size = item_size(job->dtype);
    const int64_t number = job->dtype == FEWSTEP_FLOAT64 ? 8 : 4;
    const int64_t mask_size = job->mask.dtype == FEWSTEP_BOOL ? 1 : item_size(job->mask.dtype);
    /* six products for each score and column: a sixteenth of them takes as long as one element of other operators */
    const int wanted = team(B * H * N * M * ((D + E) * 3 / 16 + 1), threads);
    share(tiles, (int)std::min<int64_t>(wanted, std::max<int64_t>(tiles, 1)), [&](int64_t from, int64_t to) {
        const std::unique_ptr<char[]> scratch(new char[attention_scratch(D, E) * number + 64]);
        AttentionTile tile;
        tile.keys = M, tile.width = D, tile.value_width = E, tile.dtype = (int)job->dtype, tile.causal = job->causal, tile.scale = job->scale;
        tile.scratch = (void *)(((uintptr_t)scratch.get() + 63) / 64 * 64);
        for (int64_t i = from; i < to; ++i) {
            const int64_t pair = i / blocks, turn = i % blocks, b = pair / H, h = pair % H, g = h / (H / G);
            const int64_t block = turn % 2 ? blocks - 1 - turn / 2 : turn / 2; /* short and long in turns where causal: fair shares */
            tile.first = block * QUERIES, tile.rows = std::min(QUERIES, N - tile.first);
            tile.q = head(job->q, b, h, tile.first, size), tile.tq = head(job->tq, b, h, tile.first, size);
            tile.k = head(job->k, b, g, 0, size), tile.tk = head(job->tk, b, g, 0, size);
            tile.v = head(job->v, b, g, 0, size), tile.tv = head(job->tv, b, g, 0, size);
            tile.mask = job->mask;
            if (tile.mask.data)
                tile.mask.data += (b * job->mask.batch_stride + h * job->mask.head_stride + tile.first * job->mask.row_stride) * mask_size;
            const int64_t row = pair * N + tile.first;
            tile.out = (char *)job->out + row * E * size, tile.tangent = (char *)job->tangent + row * E * size;
            tile.lse = (char *)job->lse + row * number;
            (number == 8 ? functions.attend_double : functions.attend_float)(tile);
        }
    });
    return 0;
}
