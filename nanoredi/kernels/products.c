/* Products of bf16 matrices on a CPU with AVX512-BF16, whose one instruction multiplies 32 pairs of numbers and adds every
two products to an fp32 sum.

That instruction takes numbers that follow each other along the inner dimension, two in a word. The right factor is
copied into panels of COLUMNS columns, a row of whose words is VECTORS registers; of the left one a word is spread over a
register at a time. ROWS x VECTORS registers of sums meet ROWS rows and a panel:

    sums (ROWS, COLUMNS) += left (ROWS, inner) @ panel (inner, COLUMNS)

`inner` is gone through in parts of at most DEPTH, so that what is read again is near. Panels are made a block at a time
by all threads, which then share the tiles of the result; a block stays in the cache that the cores share.
*/

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t Half;
enum { ROWS = 8, VECTORS = 3, COLUMNS = 16 * VECTORS, DEPTH = 2048, BLOCK = 1 << 22, GROUP = 32, FEW = 8 };

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Of 16 numbers those that there are. */
static inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0; }

static void *room_for(int64_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* 16 words of two rows' numbers. */
static inline __m512i woven(const Half *even, __mmask16 is_even, const Half *odd, __mmask16 is_odd) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_even, even));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_odd, odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* rows (inner, width), `step` apart, to a panel (inner / 2, columns) of words; zeros fill it up. */
static void weave(uint32_t *panel, int64_t columns, const Half *rows, int64_t step, int64_t inner, int64_t width) {
    for (int64_t i = 0; i < inner; i += 2, panel += columns)
        for (int64_t j = 0; j < columns; j += 16) {
            const Half *even = rows + i * step + j;
            __mmask16 there = first(width - j);
            _mm512_store_si512(panel + j, woven(even, there, even + step, i + 1 < inner ? there : 0));
        }
}

/* columns (width, inner), `step` apart, whose words are whole already, to a panel (inner / 2, COLUMNS): squares of
16 x 16 words are turned, by halves, quarters, eighths and sixteenths. inner is even. */
static void turn(uint32_t *panel, const Half *columns, int64_t step, int64_t inner, int64_t width) {
    for (int64_t i = 0; i < inner / 2; i += 16)
        for (int64_t j = 0; j < COLUMNS; j += 16) {
            __m512i a[16], b[16];
            for (int c = 0; c < 16; c++)
                a[c] = _mm512_maskz_loadu_epi32(j + c < width ? first(inner / 2 - i) : 0, columns + (j + c) * step + 2 * i);
            for (int c = 0; c < 16; c += 2) {
                b[c] = _mm512_unpacklo_epi32(a[c], a[c + 1]);
                b[c + 1] = _mm512_unpackhi_epi32(a[c], a[c + 1]);
            }
            for (int c = 0; c < 16; c += 4)
                for (int d = 0; d < 2; d++) {
                    a[c + 2 * d] = _mm512_unpacklo_epi64(b[c + d], b[c + d + 2]);
                    a[c + 2 * d + 1] = _mm512_unpackhi_epi64(b[c + d], b[c + d + 2]);
                }
            for (int c = 0; c < 16; c += 8)
                for (int d = 0; d < 4; d++) {
                    b[c + d] = _mm512_shuffle_i32x4(a[c + d], a[c + d + 4], 0x88);
                    b[c + d + 4] = _mm512_shuffle_i32x4(a[c + d], a[c + d + 4], 0xdd);
                }
            for (int d = 0; d < 8; d++) {
                a[d] = _mm512_shuffle_i32x4(b[d], b[d + 8], 0x88);
                a[d + 8] = _mm512_shuffle_i32x4(b[d], b[d + 8], 0xdd);
            }
            for (int c = 0; c < smaller(16, inner / 2 - i); c++) _mm512_store_si512(panel + (i + c) * COLUMNS + j, a[c]);
        }
}

/* sums += left @ panel, over `pairs` words. Word i of a row of the left factor begins i * step numbers after its first. */
static inline void multiply(__m512 sums[ROWS][VECTORS], const Half *const rows[ROWS], int64_t step,
                            const uint32_t *panel, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        __m512bh right[VECTORS];
        for (int j = 0; j < VECTORS; j++) right[j] = (__m512bh)_mm512_load_si512(panel + i * COLUMNS + 16 * j);
        for (int r = 0; r < ROWS; r++) {
            int32_t word;
            memcpy(&word, rows[r] + i * step, sizeof word);
            __m512bh left = (__m512bh)_mm512_set1_epi32(word);
            for (int j = 0; j < VECTORS; j++) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], left, right[j]);
        }
    }
}

/* The `count` rows of sums that are wanted, of `columns` each, lie `step` apart; of these words their place in the caches. */
static inline void fetch(const float *sums, int64_t step, int64_t count) {
    for (int64_t r = 0; r < count; r++)
        for (int j = 0; j < COLUMNS; j += 16) __builtin_prefetch(sums + r * step + j, 1);
}

static inline void take_up(__m512 sums[ROWS][VECTORS], const float *from, int64_t step, int64_t count, int64_t columns) {
    for (int64_t r = 0; r < count; r++)
        for (int j = 0; j < VECTORS; j++)
            sums[r][j] = _mm512_add_ps(sums[r][j], _mm512_maskz_loadu_ps(first(columns - 16 * j), from + r * step + 16 * j));
}

static inline void write_sums(__m512 sums[ROWS][VECTORS], float *to, int64_t step, int64_t count, int64_t columns) {
    for (int64_t r = 0; r < count; r++)
        for (int j = 0; j < VECTORS; j++)
            _mm512_mask_storeu_ps(to + r * step + 16 * j, first(columns - 16 * j), sums[r][j]);
}

static inline void write_halves(__m512 sums[ROWS][VECTORS], Half *to, int64_t step, const Half *bias, int64_t count,
                                int64_t columns) {
    for (int j = 0; j < VECTORS; j++) {
        __mmask16 there = first(columns - 16 * j);
        __m512 more = bias ? (__m512)woven(NULL, 0, bias + 16 * j, there) : _mm512_setzero_ps();
        for (int64_t r = 0; r < count; r++)
            _mm256_mask_storeu_epi16(to + r * step + 16 * j, there,
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums[r][j], more)));
    }
}

/* out (m, n) = a (m, inner) @ b (inner, n) + bias (n,), which may be missing.

A factor's numbers follow each other along the inner dimension, which is even then, or across it; step is from one such
line of them to the next. out, whose rows are out_step apart, is bf16 unless wide; then it is fp32, and the product is
added to it if `add`. */
void product(const Half *a, int64_t a_step, int64_t a_along, const Half *b, int64_t b_step, int64_t b_along,
             const Half *bias, void *out, int64_t out_step, int64_t wide, int64_t add, int64_t m, int64_t n,
             int64_t inner) {
    int64_t depth = smaller(inner, DEPTH), room = (depth + 1) / 2 * COLUMNS;
    int64_t num_panels = smaller((n + COLUMNS - 1) / COLUMNS, BLOCK / (room * 4));
    uint32_t *panels = room_for(num_panels * room * 4);
    float *sums_of = wide ? out : inner > depth ? room_for(m * n * 4) : NULL;
    int64_t sums_step = wide ? out_step : n;
#pragma omp parallel
    {
        uint32_t *woven_rows = a_along ? NULL : room_for((depth + 1) / 2 * GROUP * 4);
        for (int64_t start = 0; start < n; start += num_panels * COLUMNS)
            for (int64_t from = 0; from < inner; from += depth) {
                int64_t some = smaller(depth, inner - from), pairs = (some + 1) / 2;
                int64_t end = smaller(n, start + num_panels * COLUMNS), width = a_along ? FEW * COLUMNS : end - start;
                int adds = add || from, narrow = !wide && from + some == inner;
#pragma omp for
                for (int64_t c = start; c < end; c += COLUMNS) {
                    uint32_t *panel = panels + (c - start) / COLUMNS * room;
                    if (b_along)
                        turn(panel, b + c * b_step + from, b_step, some, n - c);
                    else
                        weave(panel, COLUMNS, b + from * b_step + c, b_step, some, n - c);
                }
#pragma omp for collapse(2) schedule(dynamic)
                for (int64_t left = start; left < end; left += width)
                    for (int64_t top = 0; top < m; top += GROUP) {
                        if (!a_along) weave(woven_rows, GROUP, a + from * a_step + top, a_step, some, m - top);
                        for (int64_t c = left; c < smaller(end, left + width); c += COLUMNS)
                            for (int64_t t = top; t < smaller(m, top + GROUP); t += ROWS) {
                                int64_t count = smaller(ROWS, m - t), columns = smaller(COLUMNS, n - c);
                                float *to = sums_of + t * sums_step + c;
                                const Half *rows[ROWS];
                                for (int r = 0; r < ROWS; r++)
                                    rows[r] = a_along ? a + smaller(t + r, m - 1) * a_step + from
                                                      : (Half *)woven_rows + 2 * (t - top + r);
                                __m512 sums[ROWS][VECTORS] = {0};
                                if (adds) fetch(to, sums_step, count);
                                multiply(sums, rows, a_along ? 2 : 2 * GROUP, panels + (c - start) / COLUMNS * room, pairs);
                                if (adds) take_up(sums, to, sums_step, count, columns);
                                if (narrow)
                                    write_halves(sums, (Half *)out + t * out_step + c, out_step, bias ? bias + c : NULL, count, columns);
                                else
                                    write_sums(sums, to, sums_step, count, columns);
                            }
                    }
            }
        free(woven_rows);
    }
    free(panels);
    if (!wide) free(sums_of);
}
