/* What every route of the int8 linear shares: its arguments, rows of x, and the epilogue of 16 outputs.
 *
 * Legend: M rows, I input channels, O output channels, N outlier columns.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { F32, BF16, F16 };
enum { EDGE = 16 }; /* outputs that are finished together */

typedef struct {
    const void *x;
    const int8_t *codes;
    const float *scale, *bias; /* bias may be null */
    const int64_t *columns;
    const float *slice; /* (O, N) */
    void *y;
    int64_t rows, inputs, outputs, outliers, stride_x;
    int dtype, quantize, vnni, bf16, threads; /* vnni, bf16: whether their instructions are there */
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

/* `values` holds EDGE numbers, of which the first `count` are stored. */
static void store_row(const Linear *l, int64_t m, int64_t o, int count, const float *values) {
    uint16_t short_values[EDGE];
    if (l->dtype == F32) {
        memcpy((float *)l->y + m * l->outputs + o, values, count * sizeof(float));
        return;
    }
    for (int i = 0; i < EDGE; i++) {
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

/* Scales, bias and outlier weights (N, EDGE) of EDGE outputs from `o`, zero past the end. */
static void load_edge(const Linear *l, int64_t o, float scale[EDGE], float bias[EDGE], float *slice) {
    for (int j = 0; j < EDGE; j++) {
        scale[j] = o + j < l->outputs ? l->scale[o + j] : 0.0f;
        bias[j] = l->bias && o + j < l->outputs ? l->bias[o + j] : 0.0f;
        for (int64_t n = 0; n < l->outliers; n++)
            slice[n * EDGE + j] = o + j < l->outputs ? l->slice[(o + j) * l->outliers + n] : 0.0f;
    }
}

/* Epilogue of EDGE outputs of one row: scales, outliers, bias, and the cast to y's dtype. */
static void finish_row(const Linear *l, float y[EDGE], int64_t m, int64_t o, const float scale[EDGE], const float bias[EDGE],
                       const float *slice, float x_scale, const float *kept) {
    int count = (int)(l->outputs - o < EDGE ? l->outputs - o : EDGE);
    for (int j = 0; j < EDGE; j++) y[j] = y[j] * x_scale * scale[j] + bias[j];
    __m256 left = _mm256_loadu_ps(y), right = _mm256_loadu_ps(y + 8);
    for (int64_t n = 0; n < l->outliers; n++) {
        __m256 x = _mm256_broadcast_ss(kept + n);
        left = _mm256_fmadd_ps(x, _mm256_loadu_ps(slice + n * EDGE), left);
        right = _mm256_fmadd_ps(x, _mm256_loadu_ps(slice + n * EDGE + 8), right);
    }
    _mm256_storeu_ps(y, left);
    _mm256_storeu_ps(y + 8, right);
    store_row(l, m, o, count, y);
}
