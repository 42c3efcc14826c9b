/* Products with AVX512 VNNI: vpdpbusd adds four products of an unsigned and a signed byte, without saturation.
 *
 * Codes of W become unsigned by + 128; what that adds to a row's sums, 128 times the sum of its codes of x, is where
 * they start from. Sums wrap around in between and come out exact, as the true ones fit into 32 bits.
 */
enum { VM = 12, VO = 32 }; /* rows of x and of W in a panel, interleaved along I in fours */

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))

VNNI static void transpose_words(__m512i r[16]) { /* 16 x 16 of 32 bits */
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            b[i + 2 * k] = _mm512_unpacklo_epi64(a[i + k], a[i + 2 + k]);
            b[i + 2 * k + 1] = _mm512_unpackhi_epi64(a[i + k], a[i + 2 + k]);
        }
    for (int k = 0; k < 4; k++) { /* now the 4 x 4 blocks of 128 bits */
        a[k] = _mm512_shuffle_i32x4(b[k], b[4 + k], 0x88);
        a[4 + k] = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0x88);
        a[8 + k] = _mm512_shuffle_i32x4(b[k], b[4 + k], 0xdd);
        a[12 + k] = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0xdd);
    }
    for (int k = 0; k < 4; k++) {
        r[k] = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x88);
        r[8 + k] = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xdd);
        r[4 + k] = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x88);
        r[12 + k] = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xdd);
    }
}

/* VO rows of W from `first`, as [I / 4][VO] fours; past the ends of W are zeros. */
VNNI static void pack_bytes(const Linear *l, int64_t first, uint8_t *panel) {
    const __m512i to_unsigned = _mm512_set1_epi32((int)0x80808080);
    for (int half = 0; half < VO; half += 16)
        for (int64_t i = 0; i < l->inputs; i += 64) {
            int64_t left = l->inputs - i, fours = left >= 64 ? 16 : (left + 3) / 4;
            __mmask64 inside = left >= 64 ? ~0ull : (1ull << left) - 1;
            __m512i r[16];
            for (int j = 0; j < 16; j++) {
                int64_t o = first + half + j;
                r[j] = _mm512_maskz_loadu_epi8(o < l->outputs ? inside : 0, l->codes + o * l->inputs + i);
            }
            transpose_words(r);
            for (int64_t k = 0; k < fours; k++)
                _mm512_storeu_si512(panel + (i / 4 + k) * 4 * VO + half * 4, _mm512_xor_si512(r[k], to_unsigned));
        }
}

/* Codes of one row of x (zeros up to a multiple of 16) into a panel of VM rows; returns their sum. */
static int32_t place_bytes(const int16_t *codes, int64_t inputs, int32_t *to) {
    int32_t sum = 0;
    for (int64_t i = 0; i < inputs; i += 8, to += 2 * VM) {
        __m128i bytes = _mm_packs_epi16(_mm_loadu_si128((const __m128i *)(codes + i)), _mm_setzero_si128());
        to[0] = _mm_cvtsi128_si32(bytes), to[VM] = _mm_extract_epi32(bytes, 1);
    }
    for (int64_t i = 0; i < inputs; i++) sum += codes[i];
    return sum;
}

/* For every row of a panel of x, as in avx2.h; `bf16.h` uses it too. */
#define EACH_ROW(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)

VNNI static void tile_bytes(const int32_t *a, const uint8_t *b, int64_t fours, const int32_t sums[VM], float *out) {
#define START(r) __m512i left##r = _mm512_set1_epi32((int32_t)(-128u * (uint32_t)sums[r])), right##r = left##r;
#define STEP(r)                                            \
    four = _mm512_set1_epi32(a[r]);                        \
    left##r = _mm512_dpbusd_epi32(left##r, b0, four);      \
    right##r = _mm512_dpbusd_epi32(right##r, b1, four);    \
    __asm__("" : "+v"(left##r), "+v"(right##r));
#define SAVE(r)                                                     \
    _mm512_storeu_ps(out + r * VO, _mm512_cvtepi32_ps(left##r));    \
    _mm512_storeu_ps(out + r * VO + 16, _mm512_cvtepi32_ps(right##r));
    EACH_ROW(START)
    do {
        __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64), four;
        EACH_ROW(STEP)
        a += VM, b += 4 * VO;
    } while (--fours);
    EACH_ROW(SAVE)
#undef START
#undef STEP
#undef SAVE
}
