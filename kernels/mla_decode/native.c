/* MLA decode for x86-64 with AVX2 and FMA, fp32: attention over latent rows, each read once for all heads.
 *
 * Every thread takes a part of the tokens, tile after tile, with a running softmax; parts are merged at the end.
 * A tile stays in the second-level cache between its scores and its sum.
 *
 * Legend: B batch, M rows (heads x queries), S queries, T tokens, L latent rank (a multiple of 32), R rotary numbers
 * (a multiple of 8). Rows are taken three at a time: 3 x 4 sums fill the registers.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 3, TOKENS = 4, TILE = 64 };
static const float HIDDEN = -1e30f; /* finite: a row that sees nothing gives a mean, as on the other routes */

typedef struct {
    const float *q, *qr, *latent, *rope; /* (B, M, L), (B, M, R), rows with strides */
    const uint8_t *mask;                 /* (B or 1, S, T) with strides, or null */
    float *out;                          /* (B, M, L) */
    int64_t batch, rows, queries, tokens, rank, width;
    int64_t latent_b, latent_t, rope_b, rope_t, mask_b, mask_s, mask_t;
    float scale;
    int parts, threads;
} Decode;

/* One part of one sequence: queries padded to whole blocks of rows, and the state of the running softmax. */
typedef struct {
    float *acc, *score, *top, *total;
} State;

static int64_t padded(const Decode *d) { return (d->rows + ROWS - 1) / ROWS * ROWS; }

static size_t state_floats(const Decode *d) { return padded(d) * (d->rank + TILE + 2); }

static State state_at(const Decode *d, float *memory) {
    int64_t m = padded(d);
    return (State){memory, memory + m * d->rank, memory + m * (d->rank + TILE), memory + m * (d->rank + TILE + 1)};
}

/* e^x for x <= 0, relative error about 2e-7: x = n ln 2 + r, a polynomial of degree 6 in r. */
static __m256 exp_negative(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), x); /* in this order NaN stays */
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), nearest);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.0f / 720);
    const float terms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 6; i++) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(terms[i]));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

/* The sums of four vectors, in one. */
static __m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

static inline __attribute__((always_inline)) void products(
    __m256 sum[ROWS][TOKENS], const float *q, int64_t q_stride, const float *const keys[TOKENS], int64_t width) {
    for (int64_t i = 0; i < width; i += 8) {
        __m256 key[TOKENS];
        for (int t = 0; t < TOKENS; t++) key[t] = _mm256_loadu_ps(keys[t] + i);
        for (int m = 0; m < ROWS; m++) {
            __m256 query = _mm256_loadu_ps(q + m * q_stride + i);
            for (int t = 0; t < TOKENS; t++) sum[m][t] = _mm256_fmadd_ps(query, key[t], sum[m][t]);
        }
    }
}

/* Scores of ROWS rows and TOKENS tokens from `token` on; beyond `last`, tokens repeat the last one. */
static void score_block(
    const Decode *d, int64_t b, const float *q, const float *qr, int64_t token, int64_t last, float *score) {
    const float *latent[TOKENS], *rope[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
        int64_t at = token + t < last ? token + t : last - 1;
        latent[t] = d->latent + b * d->latent_b + at * d->latent_t;
        rope[t] = d->rope + b * d->rope_b + at * d->rope_t;
    }
    __m256 sum[ROWS][TOKENS];
    for (int m = 0; m < ROWS; m++)
        for (int t = 0; t < TOKENS; t++) sum[m][t] = _mm256_setzero_ps();
    products(sum, q, d->rank, latent, d->rank);
    products(sum, qr, d->width, rope, d->width);
    for (int m = 0; m < ROWS; m++) {
        __m128 four = sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
        _mm_storeu_ps(score + m * TILE, _mm_mul_ps(four, _mm_set1_ps(d->scale)));
    }
}

/* Turn one row's scores of a tile into weights; returns what earlier sums shrink by. */
static float soften(float *score, int count, float *top, float *total) {
    float highest = *top;
    for (int t = 0; t < count; t++) highest = score[t] > highest ? score[t] : highest;
    for (int t = count; t < TILE; t++) score[t] = -INFINITY;
    __m256 sum = _mm256_setzero_ps();
    for (int t = 0; t < TILE; t += 8) {
        __m256 x = _mm256_loadu_ps(score + t);
        __m256 seen = _mm256_cmp_ps(x, _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        __m256 weight = _mm256_and_ps(exp_negative(_mm256_sub_ps(x, _mm256_set1_ps(highest))), seen);
        _mm256_storeu_ps(score + t, weight);
        sum = _mm256_add_ps(sum, weight);
    }
    float lanes[8], tile = 0, shrink = *top == -INFINITY ? 0 : expf(*top - highest);
    _mm256_storeu_ps(lanes, sum);
    for (int i = 0; i < 8; i++) tile += lanes[i];
    *total = *total * shrink + tile;
    *top = highest;
    return shrink;
}

/* acc = acc * shrink + weights x latent rows, for ROWS rows and 32 latent numbers. */
static void sum_block(
    const float *latent, int64_t stride, int count, const float *weight, const float *shrink, float *acc, int64_t rank) {
    __m256 sum[ROWS][4];
    for (int m = 0; m < ROWS; m++)
        for (int i = 0; i < 4; i++)
            sum[m][i] = _mm256_mul_ps(_mm256_loadu_ps(acc + m * rank + 8 * i), _mm256_set1_ps(shrink[m]));
    for (int t = 0; t < count; t++) {
        __m256 row[4];
        for (int i = 0; i < 4; i++) row[i] = _mm256_loadu_ps(latent + t * stride + 8 * i);
        for (int m = 0; m < ROWS; m++) {
            __m256 w = _mm256_broadcast_ss(weight + m * TILE + t);
            for (int i = 0; i < 4; i++) sum[m][i] = _mm256_fmadd_ps(w, row[i], sum[m][i]);
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int i = 0; i < 4; i++) _mm256_storeu_ps(acc + m * rank + 8 * i, sum[m][i]);
}

static void hide(const Decode *d, int64_t b, int64_t m, int64_t token, int count, float *score) {
    const uint8_t *seen = d->mask + b * d->mask_b + (m % d->queries) * d->mask_s + token * d->mask_t;
    for (int t = 0; t < count; t++)
        if (!seen[t * d->mask_t]) score[t] = HIDDEN;
}

static void tile(const Decode *d, int64_t b, const float *q, const float *qr, int64_t token, int64_t last, State s) {
    int count = last - token < TILE ? (int)(last - token) : TILE;
    const float *latent = d->latent + b * d->latent_b + token * d->latent_t;
    for (int64_t m = 0; m < padded(d); m += ROWS) {
        float shrink[ROWS];
        for (int t = 0; t < count; t += TOKENS)
            score_block(d, b, q + m * d->rank, qr + m * d->width, token + t, last, s.score + m * TILE + t);
        for (int i = 0; i < ROWS; i++) {
            float *score = s.score + (m + i) * TILE;
            if (d->mask && m + i < d->rows) hide(d, b, m + i, token, count, score);
            shrink[i] = soften(score, count, s.top + m + i, s.total + m + i);
        }
        for (int64_t l = 0; l < d->rank; l += 32)
            sum_block(latent + l, d->latent_t, count, s.score + m * TILE, shrink, s.acc + m * d->rank + l, d->rank);
    }
}

static void part(const Decode *d, int64_t b, int p, const float *q, const float *qr, State s) {
    int64_t tiles = (d->tokens + TILE - 1) / TILE;
    int64_t first = tiles * p / d->parts * TILE, last = tiles * (p + 1) / d->parts * TILE;
    last = last < d->tokens ? last : d->tokens;
    memset(s.acc, 0, padded(d) * d->rank * sizeof(float));
    for (int64_t m = 0; m < padded(d); m++) s.top[m] = -INFINITY, s.total[m] = 0;
    for (int64_t token = first; token < last; token += TILE) tile(d, b, q, qr, token, last, s);
}

static void merge(const Decode *d, int64_t b, float *states) {
    for (int64_t m = 0; m < d->rows; m++) {
        float top = -INFINITY, total = 0, *out = d->out + (b * d->rows + m) * d->rank;
        for (int p = 0; p < d->parts; p++) top = fmaxf(top, state_at(d, states + p * state_floats(d)).top[m]);
        memset(out, 0, d->rank * sizeof(float));
        for (int p = 0; p < d->parts; p++) {
            State s = state_at(d, states + p * state_floats(d));
            float weight = expf(s.top[m] - top);
            total += weight * s.total[m];
            for (int64_t l = 0; l < d->rank; l++) out[l] += weight * s.acc[m * d->rank + l];
        }
        for (int64_t l = 0; l < d->rank; l++) out[l] /= total;
    }
}

/* Copy (B, M, width) to (B, padded M, width); rows that were added are zero. */
static void pad(const Decode *d, const float *from, int64_t width, float *to) {
    for (int64_t b = 0; b < d->batch; b++) {
        memcpy(to + b * padded(d) * width, from + b * d->rows * width, d->rows * width * sizeof(float));
        memset(to + (b * padded(d) + d->rows) * width, 0, (padded(d) - d->rows) * width * sizeof(float));
    }
}

/* Returns 1 where there is no memory. At least one tile of tokens per part. */
int reattend_mla_decode(const Decode *d) {
    int64_t jobs = d->batch * d->parts, m = d->batch * padded(d);
    float *memory = malloc((m * (d->rank + d->width) + jobs * state_floats(d)) * sizeof(float));
    if (!memory) return 1;
    float *q = memory, *qr = q + m * d->rank, *states = qr + m * d->width;
    pad(d, d->q, d->rank, q);
    pad(d, d->qr, d->width, qr);
#pragma omp parallel for num_threads(d->threads) schedule(static)
    for (int64_t job = 0; job < jobs; job++) {
        int64_t b = job / d->parts;
        const float *own = q + b * padded(d) * d->rank, *own_rope = qr + b * padded(d) * d->width;
        part(d, b, job % d->parts, own, own_rope, state_at(d, states + job * state_floats(d)));
    }
    for (int64_t b = 0; b < d->batch; b++) merge(d, b, states + b * d->parts * state_floats(d));
    free(memory);
    return 0;
}
