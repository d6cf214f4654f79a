/* Causal attention of one sequence and its derivative on a CPU, head by head; the formulas are in causal.py.

Compiled for one head size: -DSIZE=E, a multiple of 64, and -DIN_BF16=1 or 0 for the tensors' dtype. A block of queries
is multiplied with all keys it may see at once, so its scores are whole rows. All products are made by `multiply`, from
words: one fp32 number or, with AVX512-BF16, two bf16 numbers adjacent along the inner dimension. Sums are fp32.
`multiply` reads copies of a head, padded with zeros to whole blocks, in one of three layouts: lines, a row a token;
panels, transposed to (words, 64 tokens); woven, for products whose inner dimension is tokens: (words of one or two
tokens, E).
*/

#include <math.h>
#include <stdlib.h>

#include "vectors.h"

enum { BLOCK = 48, ROWS = 6, COLUMNS = 64, PARTS = 2 };
enum { WHOLE = 192 }; /* tokens that whole blocks and panels have in common */
enum { VECTORS = LANES == 8 ? 2 : 4 }; /* ROWS * VECTORS sums, and what is multiplied, stay in registers */

#if IN_BF16 && defined(__AVX512BF16__)
enum { PER_WORD = 2 };
typedef Stored Factor;

/* sums + a word of the left factor times LANES words of the right one */
static inline Floats plus(Floats sums, const float *left, const float *right) {
    __m512bh pair = (__m512bh)_mm512_set1_ps(*left), pairs = (__m512bh)_mm512_loadu_ps(right);
    return (Floats)_mm512_dpbf16_ps((__m512)sums, pair, pairs);
}

static inline void write_factors(Factor *to, Floats value) {
    _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh((__m512)value));
}

static inline Floats woven(Floats first, Floats second) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (Floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#else
enum { PER_WORD = 1 };
typedef float Factor;

static inline Floats plus(Floats sums, const float *left, const float *right) { return sums + *left * load(right); }

static inline void write_factors(Factor *to, Floats value) { store(to, value); }

static inline Floats woven(Floats first, Floats second) { return first; }
#endif
enum { LINE = SIZE / PER_WORD }; /* words of a token */

/* c (ROWS, COLUMNS) = a (ROWS, words) @ b (words, COLUMNS), or c += that. A row of a begins a_row after the one before
it, a word in the row a_step after the one before it; rows of b and c are b_row and c_row apart. */
static void multiply(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_step, const float *b,
                     int64_t b_row, int64_t words, int add) {
    for (int column = 0; column < COLUMNS; column += VECTORS * LANES) {
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < VECTORS; j++)
                sums[r][j] = add ? load(c + r * c_row + column + j * LANES) : (Floats){0};
        for (int64_t i = 0; i < words; i++)
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < VECTORS; j++)
                    sums[r][j] = plus(sums[r][j], a + r * a_row + i * a_step, b + i * b_row + column + j * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < VECTORS; j++) store(c + r * c_row + column + j * LANES, sums[r][j]);
    }
}

/* to (BLOCK, columns) = lines (BLOCK, E) @ panels; rows of `to` are to_row apart. */
static void times_panels(float *to, int64_t to_row, const float *lines, const float *panels, int64_t columns) {
    for (int64_t c = 0; c < columns; c += COLUMNS)
        for (int r = 0; r < BLOCK; r += ROWS)
            multiply(to + r * to_row + c, to_row, lines + r * LINE, LINE, 1, panels + c * LINE, COLUMNS, LINE, 0);
}

/* to (BLOCK, E) = weights (BLOCK, tokens) in lines @ woven tokens; in row r of the weights only the first seen + r + 1 are
not 0. */
static void times_woven(float *to, const float *weights, int64_t line, const float *tokens, int64_t seen) {
    for (int r = 0; r < BLOCK; r += ROWS)
        for (int e = 0; e < SIZE; e += COLUMNS)
            multiply(to + r * SIZE + e, SIZE, weights + r * line, line, 1, tokens + e, SIZE,
                     (seen + r + ROWS) / PER_WORD, 0);
}

/* to (count, E) += weights (BLOCK, count) transposed @ rows (BLOCK, E), both woven. */
static void add_turned_times(float *to, const float *weights, int64_t weights_row, const float *rows, int64_t count) {
    for (int64_t c = 0; c < count; c += ROWS)
        for (int e = 0; e < SIZE; e += COLUMNS)
            multiply(to + c * SIZE + e, SIZE, weights + c, 1, weights_row, rows + e, SIZE, BLOCK / PER_WORD, 1);
}

/* LANES numbers, from e on, of token t of a head, whose tokens are num_heads * E apart; zeros from token `count` on. */
static inline Floats numbers(const Stored *x, int64_t num_heads, int64_t count, int64_t t, int e) {
    return t < count ? wide(x + t * num_heads * SIZE + e) : (Floats){0};
}

static void copy_lines(float *to, const Stored *x, int64_t num_heads, int64_t count, int64_t whole) {
    for (int64_t t = 0; t < whole; t++)
        for (int e = 0; e < SIZE; e += LANES)
            write_factors((Factor *)(to + t * LINE) + e, numbers(x, num_heads, count, t, e));
}

static void copy_woven(float *to, const Stored *x, int64_t num_heads, int64_t count, int64_t whole) {
    for (int64_t t = 0; t < whole; t += PER_WORD, to += SIZE)
        for (int e = 0; e < SIZE; e += LANES)
            store(to + e, woven(numbers(x, num_heads, count, t, e), numbers(x, num_heads, count, t + PER_WORD - 1, e)));
}

static void copy_panels(float *to, const Stored *x, int64_t num_heads, int64_t count, int64_t whole) {
    float lines[COLUMNS][LINE];
    for (int64_t start = 0; start < whole; start += COLUMNS, to += COLUMNS * LINE) {
        copy_lines(lines[0], x + start * num_heads * SIZE, num_heads, count - start, COLUMNS);
        for (int w = 0; w < LINE; w++)
            for (int c = 0; c < COLUMNS; c++) to[w * COLUMNS + c] = lines[c][w];
    }
}

static void write_rows(Stored *x, const float *from, int64_t num_heads, int64_t count, const float *factors) {
    for (int64_t t = 0; t < count; t++)
        for (int e = 0; e < SIZE; e += LANES)
            narrow(x + t * num_heads * SIZE + e, load(from + t * SIZE + e) * factors[t]);
}

static float *room_for(int64_t count) { return aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64); }

/* q (n, H, E), k and v (n, K, E) -> out (n, H, E), and tops and shares (n, H): weights are 2^(score - top) * share. */
void attend(const Stored *q, const Stored *k, const Stored *v, Stored *out, float *tops, float *shares, int64_t n,
            int64_t num_heads, int64_t num_kv_heads, float scale) {
    int64_t whole = (n + WHOLE - 1) / WHOLE * WHOLE, num_blocks = (n + BLOCK - 1) / BLOCK, of_head = whole * LINE;
    float *panels = room_for(num_kv_heads * of_head), *values = room_for(num_kv_heads * of_head);
#pragma omp parallel
    {
        float *queries = room_for(BLOCK * LINE), *outs = room_for(BLOCK * SIZE), *weights = room_for(BLOCK * whole);
#pragma omp for
        for (int64_t head = 0; head < num_kv_heads; head++) {
            copy_panels(panels + head * of_head, k + head * SIZE, num_kv_heads, n, whole);
            copy_woven(values + head * of_head, v + head * SIZE, num_kv_heads, n, whole);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_blocks * num_heads; item++) { /* the last blocks, the longest, first */
            int64_t h = item % num_heads, start = (num_blocks - 1 - item / num_heads) * BLOCK, end = start + BLOCK;
            int64_t of_kv_head = h / (num_heads / num_kv_heads) * of_head;
            int64_t count = n - start < BLOCK ? n - start : BLOCK;
            copy_lines(queries, q + (start * num_heads + h) * SIZE, num_heads, count, BLOCK);
            times_panels(weights, whole, queries, panels + of_kv_head, end);
            float share[BLOCK];
            for (int r = 0; r < BLOCK; r++) {
                float *row = weights + r * whole;
                Factor *line = (Factor *)row; /* in place: writing stays behind reading */
                for (int64_t c = start + r + 1; c < end; c++) row[c] = -1e30f;
                Floats high = load(row), sums = {0};
                for (int64_t c = LANES; c < end; c += LANES) high = larger(high, load(row + c));
                float top = largest(high) * (scale * LOG2_E);
                for (int64_t c = 0; c < end; c += LANES) {
                    Floats some = power_of_2(load(row + c) * (scale * LOG2_E) - top);
                    write_factors(line + c, some);
                    sums += some;
                }
                for (int64_t c = start + r + 1; c < end; c++) line[c] = 0;
                share[r] = 1 / sum(sums);
                if (r < count) tops[(start + r) * num_heads + h] = top, shares[(start + r) * num_heads + h] = share[r];
            }
            times_woven(outs, weights, whole, values + of_kv_head, start);
            write_rows(out + (start * num_heads + h) * SIZE, outs, num_heads, count, share);
        }
        free(queries), free(outs), free(weights);
    }
    free(panels), free(values);
}

/* From out's grad (n, H, E): grad_q (n, H, E), grad_k and grad_v (n, K, E). Each head's queries are divided into PARTS for
the threads; every part of every head has its own sums of the gradients of k and v. */
void attend_backward(const Stored *q, const Stored *k, const Stored *v, const float *tops, const float *shares,
                     const Stored *grad, Stored *grad_q, Stored *grad_k, Stored *grad_v, int64_t n, int64_t num_heads,
                     int64_t num_kv_heads, float scale) {
    int64_t whole = (n + WHOLE - 1) / WHOLE * WHOLE, num_blocks = (n + BLOCK - 1) / BLOCK, of_head = whole * LINE;
    int64_t of_part = whole * SIZE, group = num_heads / num_kv_heads;
    float *keys = room_for(num_kv_heads * of_head), *key_panels = room_for(num_kv_heads * of_head);
    float *value_panels = room_for(num_kv_heads * of_head);
    float *grad_keys = room_for(num_heads * PARTS * of_part), *grad_values = room_for(num_heads * PARTS * of_part);
    float scales[BLOCK];
    for (int r = 0; r < BLOCK; r++) scales[r] = scale;
#pragma omp parallel
    {
        float *queries = room_for(BLOCK * LINE), *woven_queries = room_for(BLOCK * LINE);
        float *grads = room_for(BLOCK * LINE), *woven_grads = room_for(BLOCK * LINE), *sums = room_for(BLOCK * SIZE);
        float *weights = room_for(BLOCK * whole), *slopes = room_for(BLOCK * whole);
        float *lines = PER_WORD == 1 ? slopes : room_for(BLOCK * whole / PER_WORD);
#pragma omp for
        for (int64_t head = 0; head < num_kv_heads; head++) {
            copy_woven(keys + head * of_head, k + head * SIZE, num_kv_heads, n, whole);
            copy_panels(key_panels + head * of_head, k + head * SIZE, num_kv_heads, n, whole);
            copy_panels(value_panels + head * of_head, v + head * SIZE, num_kv_heads, n, whole);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_heads * PARTS; item++) {
            int64_t h = item / PARTS, part = item % PARTS, of_kv_head = h / group * of_head;
            float *grad_key = grad_keys + item * of_part, *grad_value = grad_values + item * of_part;
            memset(grad_key, 0, of_part * sizeof(float));
            memset(grad_value, 0, of_part * sizeof(float));
            /* The work is quadratic in the number of blocks. */
            int64_t last = num_blocks * sqrt((part + 1.) / PARTS);
            for (int64_t block = num_blocks * sqrt((double)part / PARTS); block < last; block++) {
                int64_t start = block * BLOCK, first = (start * num_heads + h) * SIZE, end = start + BLOCK;
                int64_t count = n - start < BLOCK ? n - start : BLOCK;
                copy_lines(queries, q + first, num_heads, count, BLOCK);
                copy_woven(woven_queries, q + first, num_heads, count, BLOCK);
                copy_lines(grads, grad + first, num_heads, count, BLOCK);
                copy_woven(woven_grads, grad + first, num_heads, count, BLOCK);
                times_panels(weights, whole, queries, key_panels + of_kv_head, end);
                times_panels(slopes, whole, grads, value_panels + of_kv_head, end);
                float mean[BLOCK];
                for (int r = 0; r < BLOCK; r++) {
                    float *row = weights + r * whole, *slope = slopes + r * whole;
                    int64_t of_row = (start + r) * num_heads + h;
                    float top = r < count ? tops[of_row] : 0, share = r < count ? shares[of_row] : 0;
                    for (int64_t c = start + r + 1; c < end; c++) row[c] = -1e30f;
                    Floats means = {0};
                    for (int64_t c = 0; c < end; c += LANES) {
                        Floats some = power_of_2(load(row + c) * (scale * LOG2_E) - top) * share;
                        store(row + c, some);
                        means += some * load(slope + c);
                    }
                    mean[r] = sum(means);
                    for (int64_t c = start + r + 1; c < end; c++) row[c] = 0;
                }
                /* The woven rows overwrite the first of the rows they are made of. */
                for (int r = 0; r < BLOCK; r += PER_WORD)
                    for (int64_t c = 0; c < end; c += LANES) {
                        float *row = weights + r * whole + c, *slope = slopes + r * whole + c;
                        Floats some[PER_WORD], steep[PER_WORD];
                        for (int i = 0; i < PER_WORD; i++) {
                            some[i] = load(row + i * whole);
                            steep[i] = some[i] * (load(slope + i * whole) - mean[r + i]);
                            write_factors((Factor *)lines + (r + i) * whole + c, steep[i]);
                        }
                        store(row, woven(some[0], some[PER_WORD - 1]));
                        store(slope, woven(steep[0], steep[PER_WORD - 1]));
                    }
                times_woven(sums, lines, whole / PER_WORD, keys + of_kv_head, start);
                write_rows(grad_q + first, sums, num_heads, count, scales);
                add_turned_times(grad_key, slopes, PER_WORD * whole, woven_queries, end);
                add_turned_times(grad_value, weights, PER_WORD * whole, woven_grads, end);
            }
        }
#pragma omp for
        for (int64_t t = 0; t < n; t++)
            for (int64_t head = 0; head < num_kv_heads; head++)
                for (int e = 0; e < SIZE; e += LANES) {
                    Floats of_key = {0}, of_value = {0};
                    for (int64_t item = head * group * PARTS; item < (head + 1) * group * PARTS; item++) {
                        of_key += load(grad_keys + item * of_part + t * SIZE + e);
                        of_value += load(grad_values + item * of_part + t * SIZE + e);
                    }
                    narrow(grad_k + (t * num_kv_heads + head) * SIZE + e, of_key * scale);
                    narrow(grad_v + (t * num_kv_heads + head) * SIZE + e, of_value);
                }
        free(queries), free(woven_queries), free(grads), free(woven_grads), free(sums);
        free(weights), free(slopes);
        if (PER_WORD > 1) free(lines);
    }
    free(keys), free(key_panels), free(value_panels), free(grad_keys), free(grad_values);
}
