/* Products of bf16 matrices on a CPU with AVX512-BF16, whose instruction multiplies 16 pairs of numbers by 16 others and
adds each pair's two products to an fp32 sum.

A pair, called a word, is two numbers adjacent along the inner dimension. The right factor is copied into panels of COLUMNS
columns, whose rows of words fill VECTORS registers; of the left factor one word at a time is broadcast to a register. The
sums, a tile of the result in ROWS x VECTORS registers, stay in place:

    tile (ROWS, COLUMNS) += rows (ROWS, inner) @ panel (inner, COLUMNS)

The inner dimension is split into parts of at most DEPTH. All threads make the panels of a block, which stays in the
shared cache; then each takes a GROUP of rows and FEW panels at a time.
*/

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t Half;
enum { ROWS = 8, VECTORS = 3, COLUMNS = 16 * VECTORS, DEPTH = 2048, BLOCK = 1 << 22 /* bytes */, GROUP = 32, FEW = 8 };

/* The left factor, or the right one transposed: (outer, inner), of bf16, or `wide`: of fp32, to be rounded. It is
contiguous along the inner dimension, which is even then, or else along the outer one; `step` is the other stride. */
typedef struct {
    const void *numbers;
    int64_t wide, step, along;
} Factor;

/* The strides of the rows of the result and of its sums, which are the result itself if that is fp32. */
typedef struct {
    Half *halves;
    float *sums;
    int64_t step;
    const Half *bias;
} Result;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* A mask of the numbers, of 16, that exist. */
static inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0; }

static void *room_for(int64_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* Prefetches a number of the next panel, which is too far away for the processor's own prefetcher. */
static inline void foresee(Factor x, int64_t at) {
    __builtin_prefetch((const char *)x.numbers + at * (x.wide ? sizeof(float) : sizeof(Half)), 0, 2);
}

static inline __m256i halves(Factor x, int64_t at, __mmask16 there) {
    if (x.wide) return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, (const float *)x.numbers + at));
    return _mm256_maskz_loadu_epi16(there, (const Half *)x.numbers + at);
}

/* 16 words, of which the first `count` exist. */
static inline __m512i words(Factor x, int64_t at, int64_t count) {
    if (!x.wide) return _mm512_maskz_loadu_epi32(first(count), (const Half *)x.numbers + at);
    const float *numbers = (const float *)x.numbers + at;
    __m512 low = _mm512_maskz_loadu_ps(first(2 * count), numbers);
    __m512 high = _mm512_maskz_loadu_ps(first(2 * count - 16), numbers + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Copy lines along the outer dimension, from number `at` on, to a panel (inner / 2, columns) of words, padded with zeros. */
static void weave(uint32_t *panel, int64_t columns, Factor x, int64_t at, int64_t inner, int64_t width) {
    for (int64_t i = 0; i < inner; i += 2, panel += columns, at += 2 * x.step)
        for (int64_t j = 0; j < columns; j += 16) {
            __mmask16 there = first(width - j);
            foresee(x, at + columns + j), foresee(x, at + x.step + columns + j);
            __m512i low = _mm512_cvtepu16_epi32(halves(x, at + j, there));
            __m512i high = _mm512_cvtepu16_epi32(halves(x, at + x.step + j, i + 1 < inner ? there : 0));
            _mm512_store_si512(panel + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* The same from lines along the inner dimension, (inner / 2, COLUMNS): 16 x 16 words at a time are transposed in four
steps, each of which exchanges parts of pairs of registers. */
static void turn(uint32_t *panel, Factor x, int64_t at, int64_t inner, int64_t width) {
    for (int64_t i = 0; i < inner / 2; i += 16)
        for (int64_t j = 0; j < COLUMNS; j += 16) {
            __m512i a[16], b[16];
            for (int c = 0; c < 16; c++) {
                int64_t line = at + (j + c) * x.step + 2 * i, next = line + COLUMNS * x.step;
                foresee(x, next), foresee(x, next + 16);
                a[c] = words(x, line, j + c < width ? inner / 2 - i : 0);
            }
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

/* Store rows t to t + count of a result, `columns` columns from c on. */
static inline void write_tile(__m512 sums[ROWS][VECTORS], Result result, int64_t t, int64_t c, int64_t count,
                              int64_t columns, int adds, int ends) {
    for (int j = 0; j < VECTORS; j++) {
        __mmask16 there = first(columns - 16 * j);
        __m512 more = _mm512_setzero_ps();
        if (result.bias) more = _mm512_cvtpbh_ps((__m256bh)_mm256_maskz_loadu_epi16(there, result.bias + c + 16 * j));
        int64_t at = t * result.step + c + 16 * j;
        for (int64_t r = 0; adds && r < count; r++)
            sums[r][j] += _mm512_maskz_loadu_ps(there, result.sums + at + r * result.step);
        for (int64_t r = 0; r < count; r++)
            if (ends && result.halves)
                _mm256_mask_storeu_epi16(result.halves + at + r * result.step, there,
                                         (__m256i)_mm512_cvtneps_pbh(sums[r][j] + more));
            else
                _mm512_mask_storeu_ps(result.sums + at + r * result.step, there, sums[r][j]);
    }
}

/* out (m, n) = a (m, inner) @ b (inner, n) + bias (n,), which may be NULL. The factors are as described above; a is bf16.
out, with rows out_step apart, is bf16 or, if wide, fp32 without a bias; to that the product is added if `add`. */
void product(const Half *a, int64_t a_step, int64_t a_along, const void *b, int64_t b_wide, int64_t b_step,
             int64_t b_along, const Half *bias, void *out, int64_t out_step, int64_t wide, int64_t add, int64_t m,
             int64_t n, int64_t inner) {
    Factor left = {a, 0, a_step, a_along}, right = {b, b_wide, b_step, b_along};
    int64_t depth = smaller(inner, DEPTH), room = (depth + 1) / 2 * COLUMNS; /* words of a panel */
    int64_t width = smaller((n + COLUMNS - 1) / COLUMNS, BLOCK / (room * 4)) * COLUMNS;
    uint32_t *panels = room_for(width / COLUMNS * room * 4);
    Result result = {wide ? NULL : out, wide ? out : inner > depth ? room_for(m * out_step * 4) : NULL, out_step, bias};
#pragma omp parallel
    {
        uint32_t *woven = a_along ? NULL : room_for((depth + 1) / 2 * GROUP * 4);
        for (int64_t start = 0; start < n; start += width)
            for (int64_t from = 0; from < inner; from += depth) {
                int64_t part = smaller(depth, inner - from), end = smaller(n, start + width);
                int adds = add || from, ends = from + part == inner;
#pragma omp for
                for (int64_t c = start; c < end; c += COLUMNS) {
                    uint32_t *panel = panels + (c - start) / COLUMNS * room;
                    if (b_along)
                        turn(panel, right, c * b_step + from, part, n - c);
                    else
                        weave(panel, COLUMNS, right, from * b_step + c, part, n - c);
                }
                int64_t few = a_along ? FEW * COLUMNS : width; /* rows that must be woven first take all panels at once */
#pragma omp for collapse(2) schedule(dynamic)
                for (int64_t some = start; some < end; some += few)
                    for (int64_t top = 0; top < m; top += GROUP) {
                        if (!a_along) weave(woven, GROUP, left, from * a_step + top, part, m - top);
                        for (int64_t c = some; c < smaller(end, some + few); c += COLUMNS)
                            for (int64_t t = top; t < smaller(m, top + GROUP); t += ROWS) {
                                int64_t count = smaller(ROWS, m - t);
                                const Half *rows[ROWS];
                                for (int r = 0; r < ROWS; r++)
                                    rows[r] = a_along ? a + smaller(t + r, m - 1) * a_step + from
                                                      : (const Half *)(woven + t - top + r);
                                for (int64_t r = 0; adds && r < count; r++)
                                    for (int j = 0; j < COLUMNS; j += 16)
                                        __builtin_prefetch(result.sums + (t + r) * out_step + c + j, 1);
                                __m512 sums[ROWS][VECTORS] = {0};
                                multiply(sums, rows, a_along ? 2 : 2 * GROUP, panels + (c - start) / COLUMNS * room,
                                         (part + 1) / 2);
                                write_tile(sums, result, t, c, count, smaller(COLUMNS, n - c), adds, ends);
                            }
                    }
            }
        free(woven);
    }
    free(panels);
    if (!wide) free(result.sums);
}
