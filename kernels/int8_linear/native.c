/* int8 linears for x86-64 with AVX2 and FMA: y = quantised(x) W^T, or x W^T with int8 weights.
 *
 * Why not vpmaddubsw, as the libraries do: without VNNI its 16-bit pair sums saturate at full-range codes.
 * Codes widened to 16 bits and vpmaddwd do as many products per cycle, and every sum is exact.
 *
 * Legend: M rows, I input channels, O output channels, N outlier columns. A panel holds RM rows of x or RO
 * rows of W, interleaved along I (in pairs of 16-bit codes, or single floats), so that a tile reads it in order.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { F32, BF16, F16 };
enum { RM = 6, RO = 16 };

typedef struct {
    const void *x;
    const int8_t *codes;
    const float *scale, *bias; /* bias may be null */
    const int64_t *columns;
    const float *slice; /* (O, N) */
    void *y;
    int64_t rows, inputs, outputs, outliers, stride_x;
    int dtype, quantize, threads;
} Linear;

static void load_row(const Linear *l, int64_t m, float *row) {
    if (l->dtype == F32) {
        memcpy(row, (const float *)l->x + m * l->stride_x, l->inputs * sizeof(float));
        return;
    }
    const uint16_t *x = (const uint16_t *)l->x + m * l->stride_x;
    if (l->dtype == BF16) {
        uint32_t *bits = (uint32_t *)row;
        for (int64_t i = 0; i < l->inputs; i++) bits[i] = (uint32_t)x[i] << 16;
    } else {
        for (int64_t i = 0; i < l->inputs; i++) row[i] = _cvtsh_ss(x[i]);
    }
}

/* `values` holds RO numbers, of which the first `count` are stored. */
static void store_row(const Linear *l, int64_t m, int64_t o, int count, const float *values) {
    uint16_t short_values[RO];
    if (l->dtype == F32) {
        memcpy((float *)l->y + m * l->outputs + o, values, count * sizeof(float));
        return;
    }
    for (int i = 0; i < RO; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        if (l->dtype == F16)
            short_values[i] = _cvtss_sh(values[i], _MM_FROUND_TO_NEAREST_INT);
        else /* rounding could carry a NaN into an infinity */
            short_values[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
    }
    memcpy((uint16_t *)l->y + m * l->outputs + o, short_values, count * sizeof(uint16_t));
}

/* Codes of one row, and its scale: 0 for a zero row, NaN where x holds NaN or inf. Outliers move to `kept`. */
static float quantize_row(const Linear *l, float *row, float *kept, int16_t *codes) {
    for (int64_t n = 0; n < l->outliers; n++) {
        kept[n] = row[l->columns[n]];
        row[l->columns[n]] = 0.0f;
    }
    const uint32_t *bits = (const uint32_t *)row;
    uint32_t top = 0;
    for (int64_t i = 0; i < l->inputs; i++) {
        uint32_t magnitude = bits[i] & 0x7fffffff; /* ordered as the magnitudes are, NaN above inf */
        top = magnitude > top ? magnitude : top;
    }
    float absmax;
    memcpy(&absmax, &top, 4);
    if (top >= 0x7f800000 || absmax < 1e-30f) {
        memset(codes, 0, l->inputs * sizeof(int16_t));
        return top >= 0x7f800000 ? NAN : 0.0f;
    }
    float inverse = 127.0f / absmax;
    __m256 factor = _mm256_set1_ps(inverse);
    int64_t i = 0;
    for (; i + 16 <= l->inputs; i += 16) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row + i), factor));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row + i + 8), factor));
        __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256((__m256i *)(codes + i), packed);
    }
    for (; i < l->inputs; i++) codes[i] = (int16_t)_mm_cvtss_si32(_mm_set_ss(row[i] * inverse));
    return absmax / 127.0f;
}

static int32_t dot_codes(const int16_t *a, const int8_t *w, int64_t count) {
    __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i)));
        __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i + 16)));
        sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(w0, _mm256_loadu_si256((const __m256i *)(a + i))));
        sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(w1, _mm256_loadu_si256((const __m256i *)(a + i + 16))));
    }
    sum0 = _mm256_add_epi32(sum0, sum1);
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum0), _mm256_extracti128_si256(sum0, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    int32_t sum = _mm_cvtsi128_si32(half);
    for (; i < count; i++) sum += (int32_t)a[i] * w[i];
    return sum;
}

static float dot_floats(const float *x, const int8_t *w, int64_t count) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int j = 0; j < 4; j++) {
            __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + i + 8 * j)));
            sum[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), _mm256_loadu_ps(x + i + 8 * j), sum[j]);
        }
    __m256 all = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    float total = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    for (; i < count; i++) total += x[i] * (float)w[i];
    return total;
}

/* Scales, bias and outlier weights (N, RO) of RO outputs from `o`, zero past the end. */
static void load_edge(const Linear *l, int64_t o, float scale[RO], float bias[RO], float *slice) {
    for (int j = 0; j < RO; j++) {
        scale[j] = o + j < l->outputs ? l->scale[o + j] : 0.0f;
        bias[j] = l->bias && o + j < l->outputs ? l->bias[o + j] : 0.0f;
        for (int64_t n = 0; n < l->outliers; n++)
            slice[n * RO + j] = o + j < l->outputs ? l->slice[(o + j) * l->outliers + n] : 0.0f;
    }
}

/* Epilogue of RO outputs of one row: scales, outliers, bias, and the cast to y's dtype. */
static void finish_row(const Linear *l, float y[RO], int64_t m, int64_t o, const float scale[RO], const float bias[RO],
                       const float *slice, float x_scale, const float *kept) {
    int count = (int)(l->outputs - o < RO ? l->outputs - o : RO);
    for (int j = 0; j < RO; j++) y[j] = y[j] * x_scale * scale[j] + bias[j];
    __m256 left = _mm256_loadu_ps(y), right = _mm256_loadu_ps(y + 8);
    for (int64_t n = 0; n < l->outliers; n++) {
        __m256 x = _mm256_broadcast_ss(kept + n);
        left = _mm256_fmadd_ps(x, _mm256_loadu_ps(slice + n * RO), left);
        right = _mm256_fmadd_ps(x, _mm256_loadu_ps(slice + n * RO + 8), right);
    }
    _mm256_storeu_ps(y, left);
    _mm256_storeu_ps(y + 8, right);
    store_row(l, m, o, count, y);
}

/* Few rows: W is read once, straight from its rows. */
static void few_rows(const Linear *l, const float *x, const int16_t *a, const float *x_scale, const float *kept,
                     float *slices) {
    int64_t blocks = (l->outputs + RO - 1) / RO;
#pragma omp parallel for num_threads(l->threads) schedule(static) if (l->threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t o = block * RO, count = l->outputs - o < RO ? l->outputs - o : RO;
        float scale[RO], bias[RO];
        float *slice = slices + omp_get_thread_num() * l->outliers * RO;
        load_edge(l, o, scale, bias, slice);
        for (int64_t m = 0; m < l->rows; m++) {
            float y[RO] = {0};
            for (int j = 0; j < count; j++) {
                const int8_t *w = l->codes + (o + j) * l->inputs;
                y[j] = l->quantize ? (float)dot_codes(a + m * l->inputs, w, l->inputs)
                                   : dot_floats(x + m * l->inputs, w, l->inputs);
            }
            finish_row(l, y, m, o, scale, bias, slice, x_scale[m], kept + m * l->outliers);
        }
    }
}

static void transpose_pairs(__m128i r[8]) { /* 8 x 8 of 16 bits */
    __m128i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            b[4 * i + 2 * j] = _mm_unpacklo_epi32(a[4 * i + j], a[4 * i + 2 + j]);
            b[4 * i + 2 * j + 1] = _mm_unpackhi_epi32(a[4 * i + j], a[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        r[2 * i] = _mm_unpacklo_epi64(b[i], b[4 + i]);
        r[2 * i + 1] = _mm_unpackhi_epi64(b[i], b[4 + i]);
    }
}

/* RO rows of W as a panel: [I / 2][RO] pairs of 16-bit codes, or [I][RO] floats. I counts up to a multiple of 16. */
static void pack_weights(const Linear *l, int64_t first, void *panel) {
    for (int64_t i = 0; i < l->inputs; i += 16)
        for (int half = 0; half < RO; half += 8) {
            __m128i r[8];
            for (int j = 0; j < 8; j++) {
                int64_t o = first + half + j, left = l->inputs - i;
                const int8_t *w = l->codes + o * l->inputs + i;
                if (o >= l->outputs)
                    r[j] = _mm_setzero_si128();
                else if (left >= 16)
                    r[j] = _mm_loadu_si128((const __m128i *)w);
                else {
                    int8_t tail[16] = {0};
                    memcpy(tail, w, left);
                    r[j] = _mm_loadu_si128((const __m128i *)tail);
                }
            }
            transpose_pairs(r);
            for (int k = 0; k < 8; k++) {
                if (l->quantize) {
                    int16_t *to = (int16_t *)panel + ((i / 2 + k) * RO + half) * 2;
                    _mm256_storeu_si256((__m256i *)to, _mm256_cvtepi8_epi16(r[k]));
                    continue;
                }
                float *to = (float *)panel + (i + 2 * k) * RO + half;
                __m256i pairs = _mm256_cvtepi8_epi16(r[k]);
                __m256i even = _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16);
                _mm256_storeu_ps(to, _mm256_cvtepi32_ps(even));
                _mm256_storeu_ps(to + RO, _mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 16)));
            }
        }
}

/* The 2 x RM sums are named one by one, the loops test at the end (I > 0), and the empty asm pins each sum to
 * one register: without any of the three, gcc 12 keeps sums in memory, at half the speed. */
#define EACH_ROW(F) F(0) F(1) F(2) F(3) F(4) F(5)

static void tile_codes(const int32_t *a, const int16_t *b, int64_t pairs, float out[RM][RO]) {
#define START(r) __m256i left##r = _mm256_setzero_si256(), right##r = left##r;
#define STEP(r)                                                         \
    pair = _mm256_set1_epi32(a[r]);                                     \
    left##r = _mm256_add_epi32(left##r, _mm256_madd_epi16(pair, b0));   \
    right##r = _mm256_add_epi32(right##r, _mm256_madd_epi16(pair, b1));    \
    __asm__("" : "+x"(left##r), "+x"(right##r));
#define SAVE(r)                                              \
    _mm256_storeu_ps(out[r], _mm256_cvtepi32_ps(left##r));   \
    _mm256_storeu_ps(out[r] + 8, _mm256_cvtepi32_ps(right##r));
    EACH_ROW(START)
    do {
        __m256i b0 = _mm256_loadu_si256((const __m256i *)b), b1 = _mm256_loadu_si256((const __m256i *)(b + RO)), pair;
        EACH_ROW(STEP)
        a += RM, b += 2 * RO;
    } while (--pairs);
    EACH_ROW(SAVE)
#undef START
#undef STEP
#undef SAVE
}

static void tile_floats(const float *a, const float *b, int64_t count, float out[RM][RO]) {
#define START(r) __m256 left##r = _mm256_setzero_ps(), right##r = left##r;
#define STEP(r)                                   \
    x = _mm256_broadcast_ss(a + r);               \
    left##r = _mm256_fmadd_ps(x, b0, left##r);    \
    right##r = _mm256_fmadd_ps(x, b1, right##r);  \
    __asm__("" : "+x"(left##r), "+x"(right##r));
#define SAVE(r)                        \
    _mm256_storeu_ps(out[r], left##r); \
    _mm256_storeu_ps(out[r] + 8, right##r);
    EACH_ROW(START)
    do {
        __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8), x;
        EACH_ROW(STEP)
        a += RM, b += RO;
    } while (--count);
    EACH_ROW(SAVE)
#undef START
#undef STEP
#undef SAVE
}

/* One row of x into its place: quantised and interleaved with the other rows of its panel, or as floats. */
static void prepare_row(const Linear *l, int64_t m, int panels, float *row, int16_t *codes, void *x, float *x_scale,
                        float *kept) {
    int64_t width = (l->inputs + 15) / 16 * 16;
    x_scale[m] = 1.0f;
    if (!panels) {
        float *to = l->quantize ? row : (float *)x + m * l->inputs;
        load_row(l, m, to);
        if (l->quantize)
            x_scale[m] = quantize_row(l, row, kept + m * l->outliers, (int16_t *)x + m * l->inputs);
        return;
    }
    int64_t panel = m / RM * width * RM, r = m % RM;
    load_row(l, m, row);
    if (!l->quantize) {
        float *to = (float *)x + panel + r;
        for (int64_t i = 0; i < l->inputs; i++) to[i * RM] = row[i];
        return;
    }
    memset(codes + l->inputs, 0, (width - l->inputs) * sizeof(int16_t));
    x_scale[m] = quantize_row(l, row, kept + m * l->outliers, codes);
    int32_t *to = (int32_t *)((int16_t *)x + panel) + r;
    for (int64_t i = 0; i < (l->inputs + 1) / 2; i++) memcpy(to + i * RM, codes + 2 * i, 4);
}

/* Many rows: threads share x, each packs its own RO rows of W at a time. */
static void many_rows(const Linear *l, const void *x, const float *x_scale, const float *kept, char *panels,
                      float *slices) {
    int64_t width = (l->inputs + 15) / 16 * 16, item = l->quantize ? 2 : 4;
    int64_t blocks = (l->outputs + RO - 1) / RO;
#pragma omp parallel for num_threads(l->threads) schedule(dynamic, 1) if (l->threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        void *panel = panels + omp_get_thread_num() * width * RO * item;
        float scale[RO], bias[RO];
        float *slice = slices + omp_get_thread_num() * l->outliers * RO;
        load_edge(l, block * RO, scale, bias, slice);
        pack_weights(l, block * RO, panel);
        for (int64_t m = 0; m < l->rows; m += RM) {
            float out[RM][RO];
            const char *a = (const char *)x + m * width * item;
            if (l->quantize)
                tile_codes((const int32_t *)a, panel, (l->inputs + 1) / 2, out);
            else
                tile_floats((const float *)a, panel, l->inputs, out);
            for (int r = 0; r < RM && m + r < l->rows; r++)
                finish_row(l, out[r], m + r, block * RO, scale, bias, slice, x_scale[m + r],
                           kept + (m + r) * l->outliers);
        }
    }
}

/* Returns 0, or 1 where memory ran out. */
int reattend_int8_linear(const Linear *l, int64_t few) {
    int panels = l->rows > few;
    int64_t width = (l->inputs + 15) / 16 * 16, rows = (l->rows + RM - 1) / RM * RM;
    int64_t item = l->quantize ? 2 : 4, each = width * 6 + 64, slabs = width * RO * item;
    int64_t x_bytes = rows * width * item, row_bytes = rows * 4 + (l->rows + l->threads * RO) * l->outliers * 4;
    char *memory = malloc(x_bytes + row_bytes + l->threads * (each + (panels ? slabs : 0)) + 64);
    if (!memory) return 1;
    char *scratch = memory + x_bytes, *slab = scratch + l->threads * each;
    float *x_scale = (float *)(slab + (panels ? l->threads * slabs : 0)), *kept = x_scale + rows;
    float *slices = kept + l->rows * l->outliers;
    if (panels && l->rows % RM) memset(memory + (rows - RM) * width * item, 0, RM * width * item);
#pragma omp parallel for num_threads(l->threads) schedule(static) if (l->threads > 1 && panels)
    for (int64_t m = 0; m < l->rows; m++) {
        float *row = (float *)(scratch + (panels ? omp_get_thread_num() : 0) * each);
        prepare_row(l, m, panels, row, (int16_t *)(row + width), memory, x_scale, kept);
    }
    if (panels)
        many_rows(l, memory, x_scale, kept, slab, slices);
    else
        few_rows(l, (const float *)memory, (const int16_t *)memory, x_scale, kept, slices);
    free(memory);
    return 0;
}
