/* FlashAttention-2 forward (arXiv 2307.08691) for x86-64 with AVX512 BF16: bf16 in and out, sums in fp32.
 *
 * Both products are vdpbf16ps on pairs of numbers: a row's pairs are broadcast, 16 columns of a packed panel are one
 * vector. Keys and values of one key head are packed once for all its queries. A block of queries meets KEYS keys at a
 * time; its scores and weights stay in the second-level cache.
 *
 * Legend: B batch, H query heads, G key heads, S queries, T keys, D head dim (even), V value dim.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__) || __GNUC__ >= 11
#define HAS_BF16 1
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define INLINE TARGET static inline __attribute__((always_inline))

enum { ROWS = 6, QUERIES = 48, KEYS = 256, LANES = 64 };
static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;

typedef struct {
    const uint16_t *q, *k, *v; /* bf16, last dimension contiguous */
    uint16_t *out;
    float *lse;            /* (B, H, S) or null */
    const int32_t *ranges; /* (B, 3): first key, end of keys, position of the first query */
    const float *sinks;    /* (H,) or null */
    int64_t batch, heads, groups, queries, tokens, width, values;
    int64_t q_b, q_h, q_s, k_b, k_g, k_t, v_b, v_g, v_t, o_b, o_h, o_s;
    int64_t window; /* 0: none */
    float scale;
    int causal, threads;
} Attention;

typedef struct {
    uint32_t *keys, *values; /* panels of one key head: [T / 64][D / 2][64], [V / 64][T / 2][up to 64] */
} Panels;

/* One thread's block of queries. Weights hold bf16 pairs; sums are padded to whole vectors. */
typedef struct {
    uint16_t *q;
    float *score, *acc, *top, *total, *shrink;
    uint16_t *weight;
} Scratch;

typedef struct {
    int64_t first, end;
} Span;

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* The keys that a query sees. */
static Span seen(const Attention *a, int64_t b, int64_t query) {
    const int32_t *range = a->ranges + 3 * b;
    int64_t position = range[2] + query;
    Span s = {most(0, range[0]), least(range[1], a->tokens)};
    if (a->causal) s.end = least(s.end, position + 1);
    if (a->window) s.first = most(s.first, position + 1 - a->window);
    if (s.end < s.first) s.end = s.first;
    return s;
}

/* 64 keys from `token` on, as [D / 2][64] pairs; past the end are zeros. */
TARGET static void pack_keys(const Attention *a, const uint16_t *k, int64_t token, uint32_t *panel) {
    for (int part = 0; part < LANES; part += 16) {
        int64_t left = a->tokens - token - part;
        __mmask16 inside = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512i at = _mm512_mullo_epi32(step, _mm512_set1_epi32((int)a->k_t));
        const uint16_t *row = k + (token + part) * a->k_t;
        for (int64_t pair = 0; pair < a->width / 2; pair++) {
            __m512i words = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), inside, at, row + 2 * pair, 2);
            _mm512_storeu_si512(panel + pair * LANES + part, words);
        }
    }
}

/* Values of tokens t and t + 1, interleaved; zeros where a token is outside of `kept`: there may be anything. */
TARGET static void pack_values(const Attention *a, const uint16_t *v, int64_t token, Span kept, uint32_t *panels) {
    int64_t pairs = up(a->tokens, 2) / 2;
    for (int64_t first = 0; first < a->values; first += LANES) {
        int64_t lanes = least(LANES, up(a->values - first, 16));
        uint32_t *to = panels + first * pairs + token / 2 * lanes;
        for (int64_t lane = 0; lane < lanes; lane += 16) {
            int64_t left = a->values - first - lane;
            __mmask16 inside = left >= 16 ? 0xffff : (1u << left) - 1;
            __m512i word[2];
            for (int i = 0; i < 2; i++) {
                __mmask16 take = token + i >= kept.first && token + i < kept.end ? inside : 0;
                const uint16_t *row = v + (token + i) * a->v_t + first + lane;
                word[i] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(take, row));
            }
            _mm512_storeu_si512(to + lane, _mm512_or_si512(word[0], _mm512_slli_epi32(word[1], 16)));
        }
    }
}

/* out = out * shrink + rows x panel, for ROWS rows of bf16 pairs and `columns` vectors; shrink null: out = rows x panel. */
INLINE void tile(const uint16_t *rows, int64_t stride, const uint32_t *panel, int64_t pairs, float *out,
                 int64_t out_stride, const float *shrink, const int columns) {
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++)
            sum[r][c] = shrink ? _mm512_mul_ps(_mm512_loadu_ps(out + r * out_stride + 16 * c), _mm512_set1_ps(shrink[r]))
                               : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh b[4];
        for (int c = 0; c < columns; c++) b[c] = (__m512bh)_mm512_loadu_si512(panel + (p * columns + c) * 16);
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, rows + r * stride + 2 * p, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < columns; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], b[c], both);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++) _mm512_storeu_ps(out + r * out_stride + 16 * c, sum[r][c]);
}

TARGET static void tiles(const uint16_t *rows, int64_t stride, const uint32_t *panel, int64_t pairs, float *out,
                         int64_t out_stride, const float *shrink, int64_t lanes) {
    for (int r = 0; r < QUERIES; r += ROWS) {
        const uint16_t *row = rows + r * stride;
        float *to = out + r * out_stride;
        const float *by = shrink ? shrink + r : NULL;
        if (lanes == 64) tile(row, stride, panel, pairs, to, out_stride, by, 4);
        else if (lanes == 48) tile(row, stride, panel, pairs, to, out_stride, by, 3);
        else if (lanes == 32) tile(row, stride, panel, pairs, to, out_stride, by, 2);
        else tile(row, stride, panel, pairs, to, out_stride, by, 1);
    }
}

/* 2^x for x <= 0, relative error about 1e-7; NaN stays. */
INLINE __m512 exp2_negative(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, n), y = _mm512_set1_ps(1.54035304e-4f);
    const float terms[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.0f};
    for (int i = 0; i < 6; i++) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(y, n);
}

INLINE __mmask16 lanes_in(int64_t lane, int64_t first, int64_t end) {
    int64_t from = most(first - lane, 0), to = least(end - lane, 16);
    return from < to ? (__mmask16)((0xffffu >> (16 - to)) & (0xffffu << from)) : 0;
}

/* Turn one row's scores of keys [first, end) of `count` into bf16 weights; returns what earlier sums shrink by. */
TARGET static float soften(const float *score, uint16_t *weight, Span s, int64_t count, float scale, float *top,
                           float *total) {
    __m512 by = _mm512_set1_ps(scale), high = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t i = s.first / 16 * 16; i < s.end; i += 16) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(score + i), by);
        high = _mm512_mask_max_ps(high, lanes_in(i, s.first, s.end), high, x);
    }
    float highest = fmaxf(*top, _mm512_reduce_max_ps(high));
    __m512 peak = _mm512_set1_ps(highest == -INFINITY ? 0 : highest);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 in = lanes_in(i, s.first, s.end);
        __m512 w = _mm512_setzero_ps();
        if (in) w = _mm512_maskz_mov_ps(in, exp2_negative(_mm512_fmsub_ps(_mm512_loadu_ps(score + i), by, peak)));
        sum = _mm512_add_ps(sum, w);
        _mm256_storeu_si256((__m256i *)(weight + i), (__m256i)_mm512_cvtneps_pbh(w));
    }
    float shrink = *top == -INFINITY ? 0 : exp2f(*top - highest);
    *total = *total * shrink + _mm512_reduce_add_ps(sum);
    *top = highest;
    return shrink;
}

/* Divide sums by totals, a sink's weight included, and write one row. */
TARGET static void finish(const Attention *a, const float *acc, float top, float total, int64_t b, int64_t h, int64_t s) {
    float sink = a->sinks ? a->sinks[h] * LOG2E : -INFINITY, highest = fmaxf(top, sink);
    float mine = top == -INFINITY ? 0 : exp2f(top - highest);
    float whole = total * mine + (sink == -INFINITY ? 0 : exp2f(sink - highest));
    __m512 by = _mm512_set1_ps(total == 0 ? 0 : mine / whole);
    uint16_t *to = a->out + b * a->o_b + h * a->o_h + s * a->o_s;
    for (int64_t i = 0; i < a->values; i += 16) {
        __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(acc + i), by));
        _mm256_mask_storeu_epi16(to + i, lanes_in(i, 0, a->values), halves);
    }
    if (a->lse) a->lse[(b * a->heads + h) * a->queries + s] = whole == 0 ? -INFINITY : (highest + log2f(whole)) * LN2;
}

/* Products of one block of queries with keys [token, token + count), added to its sums. */
TARGET static void meet(const Attention *a, const Panels *p, const Scratch *w, const Span *span, int64_t token,
                        int64_t count) {
    int64_t padded = up(a->values, 16), pairs = up(a->tokens, 2) / 2;
    for (int64_t i = 0; i < count; i += LANES)
        tiles(w->q, a->width, p->keys + (token + i) * (a->width / 2), a->width / 2, w->score + i, KEYS, NULL, LANES);
    int64_t wide = up(count, 16);
    for (int r = 0; r < QUERIES; r++) {
        Span s = {most(span[r].first - token, 0), least(span[r].end - token, count)};
        if (s.end <= s.first) s.first = s.end = 0;
        w->shrink[r] = soften(w->score + r * KEYS, w->weight + r * KEYS, s, wide, a->scale * LOG2E, w->top + r, w->total + r);
    }
    for (int64_t first = 0; first < a->values; first += LANES) {
        int64_t lanes = least(LANES, padded - first);
        const uint32_t *panel = p->values + first * pairs + token / 2 * lanes;
        tiles(w->weight, KEYS, panel, (count + 1) / 2, w->acc + first, padded, w->shrink, lanes);
    }
}

TARGET static void attend(const Attention *a, const Panels *p, const Scratch *w, int64_t b, int64_t h, int64_t query) {
    int64_t padded = up(a->values, 16), rows = least(QUERIES, a->queries - query);
    Span span[QUERIES], all = {a->tokens, 0};
    for (int r = 0; r < QUERIES; r++) {
        span[r] = r < rows ? seen(a, b, query + r) : (Span){0, 0};
        if (span[r].end > span[r].first)
            all = (Span){least(all.first, span[r].first), most(all.end, span[r].end)};
        uint16_t *to = w->q + r * a->width;
        if (r < rows) memcpy(to, a->q + b * a->q_b + h * a->q_h + (query + r) * a->q_s, a->width * sizeof *to);
        else memset(to, 0, a->width * sizeof *to);
        w->top[r] = -INFINITY, w->total[r] = 0;
    }
    memset(w->acc, 0, QUERIES * padded * sizeof *w->acc);
    for (int64_t token = all.first / LANES * LANES; token < all.end; token += KEYS)
        meet(a, p, w, span, token, least(KEYS, all.end - token));
    for (int64_t r = 0; r < rows; r++) finish(a, w->acc + r * padded, w->top[r], w->total[r], b, h, query + r);
}

static Scratch carve(const Attention *a, char *memory) {
    int64_t padded = up(a->values, 16);
    Scratch w = {.score = (float *)memory};
    w.acc = w.score + QUERIES * KEYS;
    w.top = w.acc + QUERIES * padded;
    w.total = w.top + QUERIES;
    w.shrink = w.total + QUERIES;
    w.weight = (uint16_t *)(w.shrink + QUERIES);
    w.q = w.weight + QUERIES * KEYS;
    return w;
}

static size_t scratch_bytes(const Attention *a) {
    size_t floats = QUERIES * (KEYS + up(a->values, 16) + 3), halves = QUERIES * (KEYS + a->width);
    return up(4 * floats + 2 * halves, 64);
}

/* Pack a key head, then take its query heads' blocks, the longest first. */
TARGET static void key_head(const Attention *a, const Panels *p, const Scratch *w, int64_t b, int64_t g) {
    const uint16_t *k = a->k + b * a->k_b + g * a->k_g, *v = a->v + b * a->v_b + g * a->v_g;
    Span kept = {a->ranges[3 * b], a->ranges[3 * b + 1]};
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < a->tokens; t += LANES) pack_keys(a, k, t, p->keys + t * (a->width / 2));
    kept.end = least(kept.end, a->tokens);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a->tokens; t += 2) pack_values(a, v, t, kept, p->values);
    int64_t shared = a->heads / a->groups, blocks = (a->queries + QUERIES - 1) / QUERIES;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks * shared; i++)
        attend(a, p, w, b, g * shared + i % shared, (blocks - 1 - i / shared) * QUERIES);
}

int reattend_has_bf16(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
}

/* Returns 0, or 1 where memory ran out. */
int reattend_attention(const Attention *a) {
    size_t key_words = up(a->tokens, LANES) * (a->width / 2), value_words = up(a->tokens, 2) / 2 * up(a->values, 16);
    size_t panels = up(4 * (key_words + value_words), 64), each = scratch_bytes(a);
    char *memory = aligned_alloc(64, panels + each * a->threads);
    if (!memory) return 1;
    Panels p = {(uint32_t *)memory, (uint32_t *)memory + key_words};
#pragma omp parallel num_threads(a->threads)
    {
        Scratch w = carve(a, memory + panels + each * omp_get_thread_num());
        for (int64_t i = 0; i < a->batch * a->groups; i++) key_head(a, &p, &w, i / a->groups, i % a->groups);
    }
    free(memory);
    return 0;
}

#else
int reattend_has_bf16(void) { return 0; }
int reattend_attention(const void *a) { return (void)a, 1; }
#endif
