/* fewstep_cpu_normalise, _normalise_backward and _normalise_tangent: statistics, then a pass over each tile. */
#include "norm.h"
#include "team.h"
#include <algorithm>
#include <math.h>
#include <vector>

namespace {

typedef fewstep_normalisation Job;
enum Task { FORWARD, BACKWARD, TANGENT };

const NormFunctions &f = FEWSTEP_CHOOSE(norm_chunk);

/* a, b and what is added to x, with their tangents, for one sample. */
struct Coefficients {
    const Job &job;
    std::vector<float> a, b, added, ta, tb, tadded, part;
    int64_t sample = -1;
    bool same; /* for all samples */

    Coefficients(const Job &given, Task task) : job(given), a(given.channels), b(a), added(a), part(a) {
        if (task == TANGENT) ta = tb = tadded = added;
        same = true;
        for (const fewstep_tensor *p : {&job.scale, &job.shift, &job.input_shift, &job.ta, &job.tb, &job.tadded}) same &= !p->data || !p->batch_stride;
    }

    void fetch(const fewstep_tensor &p, std::vector<float> &to) {
        if (p.data) f.load((const char *)p.data + sample * p.batch_stride * item_size(p.dtype), (int)p.dtype, to.data(), job.channels);
    }

    void read(int64_t of) {
        if (of == sample || (same && sample >= 0)) return;
        sample = of;
        std::fill(a.begin(), a.end(), 1.0f), std::fill(b.begin(), b.end(), 0.0f);
        fetch(job.weight, a), fetch(job.bias, b);
        if (job.scale.data) {
            fetch(job.scale, part);
            for (int64_t c = 0; c < job.channels; ++c) a[c] *= 1.0f + part[c], b[c] *= 1.0f + part[c];
        }
        if (job.shift.data) {
            fetch(job.shift, part);
            for (int64_t c = 0; c < job.channels; ++c) b[c] += part[c];
        }
        fetch(job.input_shift, added);
        if (!ta.empty()) fetch(job.ta, ta), fetch(job.tb, tb), fetch(job.tadded, tadded);
    }
};

void statistics(const Job &job, double sum, double square, double count, double *mean, double *rstd) {
    *mean = job.centred ? sum / count : 0.0;
    *rstd = 1.0 / sqrt(std::max(square / count - *mean * *mean, 0.0) + job.eps);
}

struct Run {
    const Job &job;
    NormTile tile = {};
    Coefficients k;

    Run(const Job &given, Task task) : job(given), k(given, task) {
        tile.dtype = (int)job.dtype, tile.moved_dtype = (int)job.moved_dtype;
        tile.silu = job.silu, tile.tangent = task == TANGENT;
    }

    /* Lines of `width` elements from `start` on, as tiles: body(line, offset in the line) after the addresses are set. */
    template <class Body>
    void tiles(int64_t start, int64_t lines, int64_t width, const Body &body) {
        const bool whole = width <= NORM_TILE;
        tile.lines = whole ? lines : 1;
        for (int64_t line = 0; line < lines; line += tile.lines)
            for (int64_t i = 0; i < width; i += NORM_TILE) {
                const int64_t at = start + line * width + i;
                tile.count = std::min(NORM_TILE, width - i);
                tile.x = (const char *)job.x + at * item_size(job.dtype);
                tile.moved = (const char *)job.moved + at * item_size(job.moved_dtype);
                tile.out = (char *)job.out + at * item_size(job.dtype);
                body(line, i);
            }
    }

    void coefficients(int64_t c) {
        tile.a = &k.a[c], tile.b = &k.b[c];
        if (tile.tangent) tile.ta = &k.ta[c], tile.tb = &k.tb[c], tile.tadded = &k.tadded[c];
    }
};

/* Groups of whole planes: row (b, g) is contiguous, its P channels are its lines. */
void planes(const Job &job, Task task, int64_t first_row, int64_t last_row) {
    const int64_t G = job.groups, P = job.channels / G, S = job.positions, C = job.channels;
    const double count = (double)(P * S);
    std::vector<float> means(P), rstds(P), firsts(P), seconds(P);
    std::vector<double> sums(2 * P);
    Run run(job, task);
    NormTile &tile = run.tile;
    tile.statistics_step = tile.coefficients_step = 1;
    const bool keep = task == BACKWARD && job.silu && job.dtype == FEWSTEP_FLOAT32; /* spares the second exp of every element */
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / G, from = row % G * P, start = row * P * S;
        run.k.read(b);
        double mean, rstd;
        if (task == BACKWARD) {
            mean = job.mean[row], rstd = job.rstd[row];
        } else {
            double moments[2] = {0, 0};
            run.tiles(start, P, S, [&](int64_t c, int64_t) {
                tile.added = job.input_shift.data ? &run.k.added[from + c] : nullptr;
                f.moments(tile, moments, 0);
            });
            statistics(job, moments[0], moments[1], count, &mean, &rstd);
        }
        for (int64_t c = 0; c < P; ++c) means[c] = (float)(mean - run.k.added[from + c]), rstds[c] = (float)rstd;
        auto each = [&](auto function) {
            run.tiles(start, P, S, [&](int64_t c, int64_t) {
                run.coefficients(from + c);
                tile.mean = &means[c], tile.rstd = &rstds[c], tile.first = &firsts[c], tile.second = &seconds[c];
                function(c);
            });
        };
        if (task == FORWARD) {
            each([&](int64_t) { f.apply(tile); });
            job.mean[row] = (float)mean, job.rstd[row] = (float)rstd;
            continue;
        }
        std::fill(sums.begin(), sums.end(), 0.0);
        tile.keep = keep, tile.silu = job.silu;
        each([&](int64_t c) { f.pair(tile, &sums[2 * c], nullptr, nullptr); });
        double first = 0, second = 0;
        for (int64_t c = 0; c < P; ++c) {
            const double weight = task == BACKWARD ? run.k.a[from + c] : 1.0;
            second += weight * sums[2 * c], first += weight * sums[2 * c + 1];
            if (task == BACKWARD) job.da[b * C + from + c] = (float)sums[2 * c], job.db[b * C + from + c] = (float)sums[2 * c + 1];
        }
        std::fill(firsts.begin(), firsts.end(), (float)(first / count)), std::fill(seconds.begin(), seconds.end(), (float)(second / count));
        if (keep) tile.silu = false, tile.moved_dtype = FEWSTEP_FLOAT32;
        each([&](int64_t) {
            if (keep) tile.moved = tile.out;
            f.project(tile);
        });
        tile.moved_dtype = (int)job.moved_dtype;
    }
}

/* Rows of D, `positions` to a sample, a few at a time so that they stay in cache. */
void rows(const Job &job, Task task, int64_t first_row, int64_t last_row, double *column_vx, double *column_v) {
    const int64_t D = job.channels, block = std::clamp<int64_t>(4096 / D, 1, 64);
    float means[64], rstds[64], firsts[64], seconds[64];
    Run run(job, task);
    NormTile &tile = run.tile;
    tile.coefficients_vary = true, tile.statistics_step = 1;
    for (int64_t row = first_row; row < last_row;) {
        const int64_t b = row / job.positions, lines = std::min({block, last_row - row, (b + 1) * job.positions - row}), start = row * D;
        double sums[128] = {0};
        run.k.read(b);
        if (task != BACKWARD) {
            run.tiles(start, lines, D, [&](int64_t l, int64_t) { f.moments(tile, &sums[2 * l], 2); });
            for (int64_t l = 0; l < lines; ++l) {
                double mean, rstd;
                statistics(job, sums[2 * l], sums[2 * l + 1], (double)D, &mean, &rstd);
                means[l] = (float)mean, rstds[l] = (float)rstd;
            }
        } else {
            std::copy(job.mean + row, job.mean + row + lines, means), std::copy(job.rstd + row, job.rstd + row + lines, rstds);
        }
        auto each = [&](auto function) {
            run.tiles(start, lines, D, [&](int64_t l, int64_t c) {
                run.coefficients(c);
                tile.mean = &means[l], tile.rstd = &rstds[l], tile.first = &firsts[l], tile.second = &seconds[l];
                function(l, c);
            });
        };
        if (task == FORWARD) {
            each([&](int64_t, int64_t) { f.apply(tile); });
            std::copy(means, means + lines, job.mean + row), std::copy(rstds, rstds + lines, job.rstd + row);
        } else {
            std::fill(sums, sums + 2 * lines, 0.0);
            each([&](int64_t l, int64_t c) { f.pair(tile, &sums[2 * l], column_vx ? column_vx + c : nullptr, column_v ? column_v + c : nullptr); });
            for (int64_t l = 0; l < lines; ++l)
                seconds[l] = (float)(sums[2 * l] / (double)D), firsts[l] = job.centred ? (float)(sums[2 * l + 1] / (double)D) : 0.0f;
            each([&](int64_t, int64_t) { f.project(tile); });
        }
        row += lines;
    }
}

constexpr int64_t PIECE = 16384; /* elements whose sums are taken together: fixed, so that no result depends on the threads */

/* Two sums for every column of every piece of consecutive lines of C, added up in order into totals [B, 2, C]. */
template <class Sums>
std::vector<double> reduce(int64_t batch, int64_t lines, int64_t C, int threads, const Sums &sums) {
    const int64_t height = std::max<int64_t>(1, PIECE / C), pieces = (lines + height - 1) / height;
    std::vector<double> parts(batch * pieces * 2 * C);
    share(batch * pieces, threads, [&](int64_t first, int64_t last) { sums(first, last, pieces, height, parts.data()); });
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < pieces; ++i)
            for (int64_t j = 0; j < 2 * C; ++j) {
                const double part = parts[(b * pieces + i) * 2 * C + j];
                parts[b * 2 * C + j] = i ? parts[b * 2 * C + j] + part : part; /* b * 2C is behind what is still to be read */
            }
    parts.resize(batch * 2 * C);
    return parts;
}

/* Channels last: lines of C, `positions` to a sample; everything varies along a line. */
void channels_last(const Job &job, Task task, int threads) {
    const int64_t B = job.batch, C = job.channels, G = job.groups, P = C / G, S = job.positions;
    const double count = (double)(P * S);
    std::vector<float> mean(B * C), rstd(B * C), first(B * C), second(B * C);
    auto pieces = [&](auto body) {
        return [&job, task, S, body](int64_t from, int64_t to, int64_t pieces, int64_t height, double *parts) {
            Run run(job, task);
            run.tile.statistics_vary = run.tile.coefficients_vary = true;
            for (int64_t i = from; i < to; ++i) {
                const int64_t b = i / pieces, line = i % pieces * height;
                run.k.read(b);
                body(run, b, b * S + line, std::min(height, S - line), parts + i * 2 * job.channels);
            }
        };
    };
    auto at = [&](Run &run, int64_t b, int64_t c) {
        const int64_t i = b * C + c;
        run.coefficients(c);
        run.tile.mean = &mean[i], run.tile.rstd = &rstd[i], run.tile.first = &first[i], run.tile.second = &second[i];
    };
    Coefficients k(job, task);
    if (task != BACKWARD) {
        const std::vector<double> totals = reduce(B, S, C, threads, pieces([&](Run &run, int64_t, int64_t line, int64_t lines, double *part) {
            run.tiles(line * C, lines, C, [&](int64_t, int64_t c) { f.columns(run.tile, part + c, part + C + c); });
        }));
        for (int64_t b = 0; b < B; ++b) {
            k.read(b);
            const double *sums = &totals[b * 2 * C];
            for (int64_t g = 0; g < G; ++g) {
                double sum = 0, square = 0, m, r;
                for (int64_t c = g * P; c < (g + 1) * P; ++c) {
                    const double added = k.added[c];
                    sum += sums[c] + added * S, square += sums[C + c] + 2 * added * sums[c] + added * added * S;
                }
                statistics(job, sum, square, count, &m, &r);
                for (int64_t c = g * P; c < (g + 1) * P; ++c) mean[b * C + c] = (float)(m - k.added[c]), rstd[b * C + c] = (float)r;
                if (task == FORWARD) job.mean[b * G + g] = (float)m, job.rstd[b * G + g] = (float)r;
            }
        }
    } else {
        for (int64_t b = 0; b < B; ++b) {
            k.read(b);
            for (int64_t c = 0; c < C; ++c)
                mean[b * C + c] = (float)((double)job.mean[b * G + c / P] - k.added[c]), rstd[b * C + c] = job.rstd[b * G + c / P];
        }
    }
    if (task != FORWARD) {
        const std::vector<double> totals = reduce(B, S, C, threads, pieces([&](Run &run, int64_t b, int64_t line, int64_t lines, double *part) {
            run.tiles(line * C, lines, C, [&](int64_t, int64_t c) { at(run, b, c), f.pair(run.tile, nullptr, part + c, part + C + c); });
        }));
        k.sample = -1;
        for (int64_t b = 0; b < B; ++b) {
            k.read(b);
            const double *sums = &totals[b * 2 * C];
            for (int64_t g = 0; g < G; ++g) {
                double sum_v = 0, sum_vx = 0;
                for (int64_t c = g * P; c < (g + 1) * P; ++c) {
                    const double weight = task == BACKWARD ? k.a[c] : 1.0;
                    sum_vx += weight * sums[c], sum_v += weight * sums[C + c];
                    if (task == BACKWARD) job.da[b * C + c] = (float)sums[c], job.db[b * C + c] = (float)sums[C + c];
                }
                for (int64_t c = g * P; c < (g + 1) * P; ++c)
                    first[b * C + c] = (float)(sum_v / count), second[b * C + c] = (float)(sum_vx / count);
            }
        }
    }
    const int64_t height = std::max<int64_t>(1, PIECE / C), across = (S + height - 1) / height;
    const auto last = pieces([&](Run &run, int64_t b, int64_t line, int64_t lines, double *) {
        run.tiles(line * C, lines, C, [&](int64_t, int64_t c) { at(run, b, c), (task == FORWARD ? f.apply : f.project)(run.tile); });
    });
    share(B * across, threads, [&](int64_t from, int64_t to) { last(from, to, across, height, nullptr); });
}

int normalise(const Job &job, Task task, int64_t wanted) {
    const int64_t C = job.channels, S = job.positions, B = job.batch, G = job.groups;
    if (B < 0 || C < 1 || S < 0 || G < 0 || (G && C % G) || !known(job.dtype) || job.dtype == FEWSTEP_FLOAT64) return 1;
    if (task != FORWARD && (!known(job.moved_dtype) || job.moved_dtype == FEWSTEP_FLOAT64)) return 1;
    const int threads = team(B * C * S, wanted);
    if (B * S == 0) return 0;
    if (G && job.channels_last) {
        channels_last(job, task, threads);
    } else if (G) {
        share(B * G, threads, [&](int64_t first, int64_t last) { planes(job, task, first, last); });
    } else if (task == BACKWARD) {
        const std::vector<double> totals =
            reduce(B, S, C, threads, [&](int64_t first, int64_t last, int64_t pieces, int64_t height, double *parts) {
                for (int64_t i = first; i < last; ++i) {
                    const int64_t from = i / pieces * S + i % pieces * height, to = std::min(from + height, (i / pieces + 1) * S);
                    rows(job, task, from, to, parts + i * 2 * C, parts + i * 2 * C + C);
                }
            });
        for (int64_t b = 0; b < B; ++b)
            for (int64_t c = 0; c < C; ++c) job.da[b * C + c] = (float)totals[b * 2 * C + c], job.db[b * C + c] = (float)totals[b * 2 * C + C + c];
    } else {
        share(B * S, threads, [&](int64_t first, int64_t last) { rows(job, task, first, last, nullptr, nullptr); });
    }
    return 0;
}

} // namespace

int fewstep_cpu_normalise(const fewstep_normalisation *job, int64_t threads) { return normalise(*job, FORWARD, threads); }
int fewstep_cpu_normalise_backward(const fewstep_normalisation *job, int64_t threads) { return normalise(*job, BACKWARD, threads); }
int fewstep_cpu_normalise_tangent(const fewstep_normalisation *job, int64_t threads) { return normalise(*job, TANGENT, threads); }
