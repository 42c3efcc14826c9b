/* int8 linears for x86-64: y = quantised(x) W^T, or x W^T with int8 weights. AVX2 and FMA at least, AVX512 where it is.
 *
 * Few rows read W once, straight from its rows. For many, W is packed into panels, a panel at a time by each thread,
 * and multiplied tile by tile with panels of x.
 */
#include "linear.h"

#include "avx2.h"
#include "vnni.h"

#include "bf16.h"

/* What a panel holds, rows of x and of W in it, and bytes of a number. */
enum { FLOATS, HALVES, PAIRS, BYTES };
typedef struct {
    int kind, rows, outputs, bytes;
} Tiling;

enum { MOST_ROWS = VM, MOST_OUTPUTS = VO };
static const Tiling TILINGS[] = {{FLOATS, RM, RO, 4}, {HALVES, VM, VO, 2}, {PAIRS, RM, RO, 2}, {BYTES, VM, VO, 1}};

static Tiling choose(const Linear *l) {
    if (l->quantize) return TILINGS[l->vnni ? BYTES : PAIRS];
    return TILINGS[l->bf16 && l->dtype == BF16 ? HALVES : FLOATS];
}

/* What a call works with: x by row or by panel, and of each row its scale, sum of codes and outliers. */
typedef struct {
    Tiling tiling;
    int panels;
    int64_t width; /* I, up to a multiple of 16 */
    char *x, *scratch, *slabs;
    int32_t *sum;
    float *scale, *kept, *slices;
} Work;

/* Rows one by one, for few of them. */
static void few_rows(const Linear *l, const Work *w) {
    int64_t blocks = (l->outputs + EDGE - 1) / EDGE;
#pragma omp parallel for num_threads(l->threads) schedule(static) if (l->threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t o = block * EDGE, count = l->outputs - o < EDGE ? l->outputs - o : EDGE;
        float scale[EDGE], bias[EDGE];
        float *slice = w->slices + omp_get_thread_num() * l->outliers * MOST_OUTPUTS;
        load_edge(l, o, scale, bias, slice);
        for (int64_t m = 0; m < l->rows; m++) {
            float y[EDGE] = {0};
            for (int j = 0; j < count; j++) {
                const int8_t *codes = l->codes + (o + j) * l->inputs;
                y[j] = l->quantize ? (float)dot_codes((const int16_t *)w->x + m * l->inputs, codes, l->inputs)
                                   : dot_floats((const float *)w->x + m * l->inputs, codes, l->inputs);
            }
            finish_row(l, y, m, o, scale, bias, slice, w->scale[m], w->kept + m * l->outliers);
        }
    }
}

/* One row of x as it is read for few rows: codes or floats side by side. */
static void prepare_row(const Linear *l, const Work *w, int64_t m, float *row) {
    w->scale[m] = 1.0f;
    load_row(l, m, l->quantize ? row : (float *)w->x + m * l->inputs);
    if (l->quantize)
        w->scale[m] = quantize_row(l, row, w->kept + m * l->outliers, (int16_t *)w->x + m * l->inputs);
}

/* One row of x into its panel, interleaved with the other rows of it. */
static void place_row(const Linear *l, const Work *w, int64_t m, float *row) {
    int rows = w->tiling.rows;
    char *panel = w->x + m / rows * rows * w->width * w->tiling.bytes;
    int16_t *codes = (int16_t *)(row + w->width);
    load_row(l, m, row);
    w->scale[m] = 1.0f;
    int32_t *to = (int32_t *)panel + m % rows;
    if (w->tiling.kind == FLOATS) {
        for (int64_t i = 0; i < l->inputs; i++) memcpy(to + i * rows, row + i, 4);
        return;
    }
    if (w->tiling.kind == HALVES) {
        memset(row + l->inputs, 0, (w->width - l->inputs) * sizeof(float));
        place_halves(row, w->width, to);
        return;
    }
    memset(codes + l->inputs, 0, (w->width - l->inputs) * sizeof(int16_t));
    w->scale[m] = quantize_row(l, row, w->kept + m * l->outliers, codes);
    if (w->tiling.kind == BYTES)
        w->sum[m] = place_bytes(codes, w->width, to);
    else
        for (int64_t i = 0; i < (l->inputs + 1) / 2; i++) memcpy(to + i * rows, codes + 2 * i, 4);
}

static void pack(const Linear *l, const Work *w, int64_t first, void *panel) {
    if (w->tiling.kind == BYTES)
        pack_bytes(l, first, panel);
    else if (w->tiling.kind == HALVES)
        pack_halves(l, first, panel);
    else
        pack_weights(l, first, panel);
}

/* Rows of x from m times a panel of W. */
static void multiply(const Linear *l, const Work *w, int64_t m, const void *panel, float *out) {
    const void *x = w->x + m * w->width * w->tiling.bytes;
    if (w->tiling.kind == BYTES)
        tile_bytes(x, panel, (l->inputs + 3) / 4, w->sum + m, out);
    else if (w->tiling.kind == HALVES)
        tile_halves(x, panel, (l->inputs + 1) / 2, out);
    else if (w->tiling.kind == PAIRS)
        tile_codes(x, panel, (l->inputs + 1) / 2, out);
    else
        tile_floats(x, panel, l->inputs, out);
}

/* Many rows: threads share x, each packs its own panels of W. */
static void many_rows(const Linear *l, const Work *w) {
    int rows = w->tiling.rows, outputs = w->tiling.outputs;
#pragma omp parallel for num_threads(l->threads) schedule(dynamic, 1) if (l->threads > 1)
    for (int64_t o = 0; o < l->outputs; o += outputs) {
        void *panel = w->slabs + omp_get_thread_num() * w->width * outputs * w->tiling.bytes;
        float scale[MOST_OUTPUTS], bias[MOST_OUTPUTS], out[MOST_ROWS * MOST_OUTPUTS];
        float *slice = w->slices + omp_get_thread_num() * l->outliers * MOST_OUTPUTS;
        for (int e = 0; e < outputs; e += EDGE) load_edge(l, o + e, scale + e, bias + e, slice + e * l->outliers);
        pack(l, w, o, panel);
        for (int64_t m = 0; m < l->rows; m += rows) {
            multiply(l, w, m, panel, out);
            for (int r = 0; r < rows && m + r < l->rows; r++)
                for (int e = 0; e < outputs && o + e < l->outputs; e += EDGE)
                    finish_row(l, out + r * outputs + e, m + r, o + e, scale + e, bias + e, slice + e * l->outliers,
                               w->scale[m + r], w->kept + (m + r) * l->outliers);
        }
    }
}

/* One piece of the call's memory, on a cache line of its own. */
static void *take(char **memory, int64_t bytes) {
    void *piece = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return piece;
}

/* Lays the call's memory out from `start`; returns where it ends. */
static char *lay_out(const Linear *l, Work *w, char *start) {
    int64_t rows = (l->rows + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS, bytes = w->tiling.bytes;
    w->x = take(&start, rows * w->width * (w->panels ? bytes : l->quantize ? 2 : 4));
    w->scratch = take(&start, l->threads * (w->width * 6 + 64));
    w->slabs = take(&start, w->panels ? l->threads * w->width * w->tiling.outputs * bytes : 0);
    w->sum = take(&start, rows * 4);
    w->scale = take(&start, rows * 4);
    w->kept = take(&start, l->rows * l->outliers * 4);
    w->slices = take(&start, l->threads * l->outliers * MOST_OUTPUTS * 4);
    return start;
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

int reattend_has_vnni(void) {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

int reattend_has_bf16(void) {
#if HAS_BF16
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

/* Returns 0, or 1 where memory ran out. */
int reattend_int8_linear(const Linear *l, int64_t few) {
    Work w = {.tiling = choose(l), .panels = l->rows > few, .width = (l->inputs + 15) / 16 * 16};
    char *memory = malloc(lay_out(l, &w, NULL) - (char *)NULL + 64);
    if (!memory) return 1;
    lay_out(l, &w, (char *)(((uintptr_t)memory + 63) / 64 * 64));
    int64_t rows = w.tiling.rows, last = l->rows / rows * rows;
    if (w.panels && last < l->rows) { /* rows that a panel has beyond x */
        memset(w.x + last * w.width * w.tiling.bytes, 0, rows * w.width * w.tiling.bytes);
        memset(w.sum + last, 0, rows * 4);
    }
#pragma omp parallel for num_threads(l->threads) schedule(static) if (l->threads > 1 && w.panels)
    for (int64_t m = 0; m < l->rows; m++) {
        float *row = (float *)(w.scratch + (w.panels ? omp_get_thread_num() : 0) * (w.width * 6 + 64));
        (w.panels ? place_row : prepare_row)(l, &w, m, row);
    }
    (w.panels ? many_rows : few_rows)(l, &w);
    free(memory);
    return 0;
}
