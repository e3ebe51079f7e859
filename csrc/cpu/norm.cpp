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
const RowFunctions &r = FEWSTEP_CHOOSE(norm_rows_chunk);

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
    std::vector<float> sums; /* of columns */

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

/* Whether the pass that sums v leaves it where dx will be, which spares the second exp of every element. */
bool keeps(const Job &job, Task task) { return task == BACKWARD && job.silu && job.dtype == FEWSTEP_FLOAT32; }

/* Groups of whole planes: row (b, g) is contiguous, its P channels are its lines. */
void planes(const Job &job, Task task, int64_t first_row, int64_t last_row) {
    const int64_t G = job.groups, P = job.channels / G, S = job.positions, C = job.channels;
    const double count = (double)(P * S);
    std::vector<float> means(P), rstds(P), firsts(P), seconds(P);
    std::vector<double> sums(2 * P);
    Run run(job, task);
    NormTile &tile = run.tile;
    tile.statistics_step = tile.coefficients_step = 1;
    const bool keep = keeps(job, task);
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

/* What rows are read, and with which coefficients. */
struct Rows {
    const Job &job;
    const Task task;
    Coefficients k;
    std::vector<float> scratch, columns;
    NormRows given = {};

    /* period: rows with coefficients of their own, one after another; 1 where they are a sample's */
    Rows(const Job &of, Task what, int64_t width, int64_t period = 1)
        : job(of), task(what), k(of, what), scratch(3 * width * rows_together(width)), columns(what == BACKWARD ? 2 * width * period : 0) {
        given.width = width, given.step = period == 1 ? 0 : width, given.dtype = (int)job.dtype, given.moved_dtype = (int)job.moved_dtype;
        given.silu = job.silu, given.centred = job.centred, given.eps = job.eps, given.scratch = scratch.data();
    }

    void take(int64_t row, int64_t count, const float *a, const float *b, const float *ta, const float *tb, float *da, float *db) {
        const int64_t start = row * given.width;
        given.count = count, given.a = a, given.b = b, given.ta = ta, given.tb = tb, given.da = da, given.db = db;
        given.x = (const char *)job.x + start * item_size(job.dtype), given.out = (char *)job.out + start * item_size(job.dtype);
        given.moved = (const char *)job.moved + start * item_size(job.moved_dtype);
        given.mean = job.mean + row, given.rstd = job.rstd + row;
        (task == FORWARD ? r.forward : task == BACKWARD ? r.backward : r.tangent)(given);
    }

    /* Rows of D, `positions` to a sample. sums: of v xhat and of v over these rows, [2, D], where they are wanted. */
    void run(int64_t first, int64_t last, double *sums) {
        std::fill(columns.begin(), columns.end(), 0.0f);
        for (int64_t row = first; row < last; row += given.count) {
            const int64_t b = row / job.positions, count = std::min(last, (b + 1) * job.positions) - row;
            k.read(b);
            float *da = columns.data(), *db = columns.empty() ? nullptr : da + given.width;
            take(row, count, k.a.data(), k.b.data(), k.ta.data(), k.tb.data(), da, db);
        }
        if (sums) std::copy(columns.begin(), columns.end(), sums);
    }
};

constexpr int64_t SMALL_PLANE = 64;

/* Groups of small planes as rows of all their elements, with every channel's coefficients repeated along its plane. */
void small_planes(const Job &job, Task task, int64_t first_row, int64_t last_row) {
    const int64_t G = job.groups, C = job.channels, S = job.positions, width = C / G * S;
    Rows rows(job, task, width, G);
    std::vector<float> spread[4]; /* a, b, ta, tb */
    int64_t sample = -1;
    for (int64_t row = first_row; row < last_row; row += rows.given.count) {
        const int64_t b = row / G, count = std::min(last_row, (b + 1) * G) - row, from = row % G * width;
        rows.k.read(b);
        if (rows.k.sample != sample) {
            sample = rows.k.sample;
            const std::vector<float> *each[] = {&rows.k.a, &rows.k.b, &rows.k.ta, &rows.k.tb};
            for (int j = 0; j < (task == TANGENT ? 4 : 2); ++j) {
                spread[j].resize(C * S);
                for (int64_t c = 0; c < C; ++c) std::fill_n(&spread[j][c * S], S, (*each[j])[c]);
            }
        }
        std::fill(rows.columns.begin(), rows.columns.end(), 0.0f);
        const bool moving = task == TANGENT, back = task == BACKWARD;
        float *da = back ? &rows.columns[from] : nullptr, *db = back ? da + C * S : nullptr;
        rows.take(row, count, &spread[0][from], &spread[1][from], moving ? &spread[2][from] : nullptr, moving ? &spread[3][from] : nullptr, da, db);
        for (int64_t c = from / S; back && c < from / S + count * (C / G); ++c) {
            double sums[2] = {0, 0};
            for (int64_t i = c * S; i < (c + 1) * S; ++i) sums[0] += rows.columns[i], sums[1] += rows.columns[C * S + i];
            job.da[b * C + c] = (float)sums[0], job.db[b * C + c] = (float)sums[1];
        }
    }
}

/* Elements, and lines at most, whose sums are taken together: fixed, so that no result depends on the threads. */
constexpr int64_t PIECE = 16384, LINES_EACH = 64, ROW_PIECE = 65536, ROWS_EACH = 256;

/* Two sums for every column of every piece of consecutive lines of C, added up in order into totals [B, 2, C]. */
template <class Sums>
std::vector<double> reduce(int64_t batch, int64_t lines, int64_t C, int64_t height, int threads, const Sums &sums) {
    const int64_t pieces = (lines + height - 1) / height;
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
    const int64_t B = job.batch, C = job.channels, G = job.groups, P = C / G, S = job.positions, piece = std::clamp<int64_t>(PIECE / C, 1, LINES_EACH);
    const double count = (double)(P * S);
    const bool keep = keeps(job, task);
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
        const std::vector<double> totals = reduce(B, S, C, piece, threads, pieces([&](Run &run, int64_t, int64_t line, int64_t lines, double *part) {
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
        const std::vector<double> totals = reduce(B, S, C, piece, threads, pieces([&](Run &run, int64_t b, int64_t line, int64_t lines, double *part) {
            run.sums.assign(2 * C, 0.0f);
            run.tile.keep = keep;
            run.tiles(line * C, lines, C, [&](int64_t, int64_t c) { at(run, b, c), f.pair(run.tile, nullptr, &run.sums[c], &run.sums[C + c]); });
            std::copy(run.sums.begin(), run.sums.end(), part);
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
    const int64_t across = (S + piece - 1) / piece;
    const auto last = pieces([&](Run &run, int64_t b, int64_t line, int64_t lines, double *) {
        if (keep) run.tile.silu = false, run.tile.moved_dtype = FEWSTEP_FLOAT32;
        run.tiles(line * C, lines, C, [&](int64_t, int64_t c) {
            at(run, b, c);
            if (keep) run.tile.moved = run.tile.out;
            (task == FORWARD ? f.apply : f.project)(run.tile);
        });
    });
    share(B * across, threads, [&](int64_t from, int64_t to) { last(from, to, across, piece, nullptr); });
}

int normalise(const Job &job, Task task, int64_t wanted) {
    const int64_t C = job.channels, S = job.positions, B = job.batch, G = job.groups;
    if (B < 0 || C < 1 || S < 0 || G < 0 || (G && C % G) || !known(job.dtype) || job.dtype == FEWSTEP_FLOAT64) return 1;
    if (task != FORWARD && (!known(job.moved_dtype) || job.moved_dtype == FEWSTEP_FLOAT64)) return 1;
    const int threads = team(B * C * S, wanted);
    if (B * S == 0) return 0;
    if (G && job.channels_last) {
        channels_last(job, task, threads);
    } else if (G && S <= SMALL_PLANE && !job.input_shift.data && !job.tadded.data) {
        share(B * G, threads, [&](int64_t first, int64_t last) { small_planes(job, task, first, last); });
    } else if (G) {
        share(B * G, threads, [&](int64_t first, int64_t last) { planes(job, task, first, last); });
    } else if (task == BACKWARD) {
        const int64_t rows_each = std::clamp<int64_t>(ROW_PIECE / C, 1, ROWS_EACH);
        const std::vector<double> totals =
            reduce(B, S, C, rows_each, threads, [&](int64_t first, int64_t last, int64_t pieces, int64_t height, double *parts) {
                Rows rows(job, task, C);
                for (int64_t i = first; i < last; ++i) {
                    const int64_t from = i / pieces * S + i % pieces * height, to = std::min(from + height, (i / pieces + 1) * S);
                    rows.run(from, to, parts + i * 2 * C);
                }
            });
        for (int64_t b = 0; b < B; ++b)
            for (int64_t c = 0; c < C; ++c) job.da[b * C + c] = (float)totals[b * 2 * C + c], job.db[b * C + c] = (float)totals[b * 2 * C + C + c];
    } else {
        share(B * S, threads, [&](int64_t first, int64_t last) { Rows(job, task, C).run(first, last, nullptr); });
    }
    return 0;
}

} // namespace

int fewstep_cpu_normalise(const fewstep_normalisation *job, int64_t threads) { return normalise(*job, FORWARD, threads); }
int fewstep_cpu_normalise_backward(const fewstep_normalisation *job, int64_t threads) { return normalise(*job, BACKWARD, threads); }
int fewstep_cpu_normalise_tangent(const fewstep_normalisation *job, int64_t threads) { return normalise(*job, TANGENT, threads); }
