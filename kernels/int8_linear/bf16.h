/* Products of bf16 rows and codes with AVX512 BF16: vdpbf16ps adds two products to a sum in fp32.
 *
 * Every code is a bf16 number, so only x was rounded, by its owner. Panels are those of `vnni.h`, of pairs instead of
 * fours. Left out for compilers that don't know the instruction.
 */
#if defined(__clang__) || __GNUC__ >= 11
#define HAS_BF16 1
#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")))

BF16_TARGET static __m256i upper_halves(__m128i codes) { /* 16 codes as bf16: the upper halves of their fp32 */
    __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

/* VO rows of W from `first`, as [I / 2][VO] pairs; past the ends of W are zeros. */
BF16_TARGET static void pack_halves(const Linear *l, int64_t first, uint8_t *panel) {
    for (int half = 0; half < VO; half += 16)
        for (int64_t i = 0; i < l->inputs; i += 32) {
            int64_t left = l->inputs - i, pairs = left >= 32 ? 16 : (left + 1) / 2;
            __mmask32 inside = left >= 32 ? ~0u : (1u << left) - 1;
            __m512i r[16];
            for (int j = 0; j < 16; j++) {
                int64_t o = first + half + j;
                __m256i codes = _mm256_maskz_loadu_epi8(o < l->outputs ? inside : 0, l->codes + o * l->inputs + i);
                __m256i low = upper_halves(_mm256_castsi256_si128(codes));
                r[j] = _mm512_inserti64x4(_mm512_castsi256_si512(low), upper_halves(_mm256_extracti128_si256(codes, 1)), 1);
            }
            transpose_words(r);
            for (int64_t k = 0; k < pairs; k++)
                _mm512_storeu_si512(panel + (i / 2 + k) * 4 * VO + half * 4, r[k]);
        }
}

/* A row of x, bf16 numbers in fp32 with zeros up to a multiple of 2, into a panel of VM rows. */
static void place_halves(const float *row, int64_t inputs, int32_t *to) {
    const uint32_t *bits = (const uint32_t *)row;
    for (int64_t i = 0; i < inputs; i += 2, to += VM) *to = (int32_t)(bits[i] >> 16 | (bits[i + 1] & 0xffff0000));
}

BF16_TARGET static void tile_halves(const int32_t *a, const uint8_t *b, int64_t pairs, float *out) {
#define START(r) __m512 left##r = _mm512_setzero_ps(), right##r = left##r;
#define STEP(r)                                                    \
    pair = (__m512bh)_mm512_set1_epi32(a[r]);                      \
    left##r = _mm512_dpbf16_ps(left##r, b0, pair);                 \
    right##r = _mm512_dpbf16_ps(right##r, b1, pair);               \
    __asm__("" : "+v"(left##r), "+v"(right##r));
#define SAVE(r)                              \
    _mm512_storeu_ps(out + r * VO, left##r); \
    _mm512_storeu_ps(out + r * VO + 16, right##r);
    EACH_ROW(START)
    do {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 64), pair;
        EACH_ROW(STEP)
        a += VM, b += 4 * VO;
    } while (--pairs);
    EACH_ROW(SAVE)
#undef START
#undef STEP
#undef SAVE
}

#else
#define HAS_BF16 0
static void pack_halves(const Linear *l, int64_t first, uint8_t *panel) { (void)l, (void)first, (void)panel; }
static void place_halves(const float *row, int64_t inputs, int32_t *to) { (void)row, (void)inputs, (void)to; }
static void tile_halves(const int32_t *a, const uint8_t *b, int64_t pairs, float *out) {
    (void)a, (void)b, (void)pairs, (void)out;
}
#endif
