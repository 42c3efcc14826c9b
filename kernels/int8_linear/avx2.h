/* Products with AVX2 and FMA.
 *
 * Why not vpmaddubsw, as the libraries do: without VNNI its 16-bit pair sums saturate at full-range codes.
 * Codes widened to 16 bits and vpmaddwd do as many products per cycle, and every sum is exact. A panel holds RM rows
 * of x or RO rows of W, interleaved along I (in pairs of 16-bit codes, or single floats), so that a tile reads it in
 * order.
 */
enum { RM = 6, RO = 16 };

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

static void tile_codes(const int32_t *a, const int16_t *b, int64_t pairs, float *out) {
#define START(r) __m256i left##r = _mm256_setzero_si256(), right##r = left##r;
#define STEP(r)                                                         \
    pair = _mm256_set1_epi32(a[r]);                                     \
    left##r = _mm256_add_epi32(left##r, _mm256_madd_epi16(pair, b0));   \
    right##r = _mm256_add_epi32(right##r, _mm256_madd_epi16(pair, b1));    \
    __asm__("" : "+x"(left##r), "+x"(right##r));
#define SAVE(r)                                              \
    _mm256_storeu_ps(out + r * RO, _mm256_cvtepi32_ps(left##r));   \
    _mm256_storeu_ps(out + r * RO + 8, _mm256_cvtepi32_ps(right##r));
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

static void tile_floats(const float *a, const float *b, int64_t count, float *out) {
#define START(r) __m256 left##r = _mm256_setzero_ps(), right##r = left##r;
#define STEP(r)                                   \
    x = _mm256_broadcast_ss(a + r);               \
    left##r = _mm256_fmadd_ps(x, b0, left##r);    \
    right##r = _mm256_fmadd_ps(x, b1, right##r);  \
    __asm__("" : "+x"(left##r), "+x"(right##r));
#define SAVE(r)                        \
    _mm256_storeu_ps(out + r * RO, left##r); \
    _mm256_storeu_ps(out + r * RO + 8, right##r);
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
#undef EACH_ROW
