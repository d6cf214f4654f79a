/* Causal attention of one sequence and its derivative, on a CPU: causal.py's formulas, for one head after another.

Compiled for one head size: -DSIZE=E, a multiple of 64, -DWHOLE=tokens that whole blocks and panels have in common, and
-DIN_BF16=1 or 0 for the tensors' dtype; all that is made of them is fp32. A block of queries meets all keys that it may see at once, so its scores are whole rows. Every product is
`multiply`'s. It reads copies: a head's rows, filled up with zeros to whole blocks, or its panels, which are 64 tokens
turned to (E, 64) each.
*/

#include <stdlib.h>

#include "vectors.h"

enum { BLOCK = 48, ROWS = 6, COLUMNS = 64 };
_Static_assert(WHOLE % BLOCK == 0 && WHOLE % COLUMNS == 0, "WHOLE");
enum { VECTORS = LANES == 8 ? 2 : 4 }; /* ROWS * VECTORS sums, and what is multiplied, stay in registers */

/* c (ROWS, COLUMNS) = a (ROWS, inner) @ b (inner, COLUMNS), or c += that. A row of a begins a_row after the one before
it, a number in the row a_step after the one before it; rows of b and c are b_row and c_row apart. */
static void multiply(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_step, const float *b,
                     int64_t b_row, int64_t inner, int add) {
    for (int column = 0; column < COLUMNS; column += VECTORS * LANES) {
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < VECTORS; j++)
                sums[r][j] = add ? load(c + r * c_row + column + j * LANES) : (Floats){0};
        for (int64_t i = 0; i < inner; i++)
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < VECTORS; j++)
                    sums[r][j] += a[r * a_row + i * a_step] * load(b + i * b_row + column + j * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < VECTORS; j++) store(c + r * c_row + column + j * LANES, sums[r][j]);
    }
}

/* to (BLOCK, columns) = rows (BLOCK, E) @ panels; rows of `to` are to_row apart. */
static void times_panels(float *to, int64_t to_row, const float *rows, const float *panels, int64_t columns) {
    for (int64_t c = 0; c < columns; c += COLUMNS)
        for (int r = 0; r < BLOCK; r += ROWS)
            multiply(to + r * to_row + c, to_row, rows + r * SIZE, SIZE, 1, panels + c * SIZE, COLUMNS, SIZE, 0);
}

/* to (BLOCK, E) = weights (BLOCK, ...) @ rows; of row r of the weights only the first seen + r are not 0. */
static void times_rows(float *to, const float *weights, int64_t weights_row, const float *rows, int64_t seen) {
    for (int r = 0; r < BLOCK; r += ROWS) {
        const float *some = weights + r * weights_row;
        for (int e = 0; e < SIZE; e += COLUMNS)
            multiply(to + r * SIZE + e, SIZE, some, weights_row, 1, rows + e, SIZE, seen + r + ROWS, 0);
    }
}

/* to (count, E) += the turned weights (BLOCK, count) @ rows (BLOCK, E). */
static void add_turned_times(float *to, const float *weights, int64_t weights_row, const float *rows, int64_t count) {
    for (int64_t c = 0; c < count; c += ROWS)
        for (int e = 0; e < SIZE; e += COLUMNS)
            multiply(to + c * SIZE + e, SIZE, weights + c, 1, weights_row, rows + e, SIZE, BLOCK, 1);
}

/* `count` tokens of a head, num_heads * E apart, times a factor, and zeros after them: to (whole, E). */
static void copy_rows(float *to, const Stored *x, int64_t num_heads, int64_t count, int64_t whole, float factor) {
    for (int64_t t = 0; t < count; t++)
        for (int e = 0; e < SIZE; e += LANES)
            store(to + t * SIZE + e, wide(x + t * num_heads * SIZE + e) * factor);
    memset(to + count * SIZE, 0, (whole - count) * SIZE * sizeof *to);
}

/* The same turned, a panel after the other. */
static void copy_panels(float *to, const Stored *x, int64_t num_heads, int64_t count, int64_t whole) {
    float panel[COLUMNS][SIZE];
    for (int64_t start = 0; start < whole; start += COLUMNS, to += COLUMNS * SIZE) {
        int64_t some = count - start < 0 ? 0 : count - start < COLUMNS ? count - start : COLUMNS;
        copy_rows(panel[0], x + start * num_heads * SIZE, num_heads, some, COLUMNS, 1);
        for (int e = 0; e < SIZE; e++)
            for (int c = 0; c < COLUMNS; c++) to[e * COLUMNS + c] = panel[c][e];
    }
}

static void write_rows(Stored *x, const float *from, int64_t num_heads, int64_t count, const float *factors) {
    for (int64_t t = 0; t < count; t++)
        for (int e = 0; e < SIZE; e += LANES)
            narrow(x + t * num_heads * SIZE + e, load(from + t * SIZE + e) * factors[t]);
}

/* Of a row of scores or weights, the tokens that come after its own. */
static inline void hide(float *row, int64_t from, int64_t end, float value) {
    for (int64_t c = from; c < end; c++) row[c] = value;
}

static float *room_for(int64_t count) { return aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64); }

/* q (n, H, E), k and v (n, K, E) -> out (n, H, E), and tops and shares (n, H): weights are 2^(score - top) * share. */
void attend(const Stored *q, const Stored *k, const Stored *v, Stored *out, float *tops, float *shares, int64_t n,
            int64_t num_heads, int64_t num_kv_heads, float scale) {
    int64_t whole = (n + WHOLE - 1) / WHOLE * WHOLE, num_blocks = (n + BLOCK - 1) / BLOCK, of_head = whole * SIZE;
    float *panels = room_for(num_kv_heads * of_head), *values = room_for(num_kv_heads * of_head);
#pragma omp parallel
    {
        float *queries = room_for(BLOCK * SIZE), *outs = room_for(BLOCK * SIZE), *weights = room_for(BLOCK * whole);
#pragma omp for
        for (int64_t head = 0; head < num_kv_heads; head++) {
            copy_panels(panels + head * of_head, k + head * SIZE, num_kv_heads, n, whole);
            copy_rows(values + head * of_head, v + head * SIZE, num_kv_heads, n, whole, 1);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_blocks * num_heads; item++) { /* the last blocks, the longest, first */
            int64_t h = item % num_heads, start = (num_blocks - 1 - item / num_heads) * BLOCK, end = start + BLOCK;
            int64_t of_kv_head = h / (num_heads / num_kv_heads) * of_head;
            int64_t count = n - start < BLOCK ? n - start : BLOCK;
            copy_rows(queries, q + (start * num_heads + h) * SIZE, num_heads, count, BLOCK, scale * LOG2_E);
            times_panels(weights, whole, queries, panels + of_kv_head, end);
            float share[BLOCK];
            for (int r = 0; r < BLOCK; r++) {
                float *row = weights + r * whole;
                hide(row, start + r + 1, end, -1e30f);
                Floats high = load(row), sums = {0};
                for (int64_t c = LANES; c < end; c += LANES) high = larger(high, load(row + c));
                float top = largest(high);
                for (int64_t c = 0; c < end; c += LANES) {
                    Floats some = power_of_2(load(row + c) - top);
                    store(row + c, some);
                    sums += some;
                }
                hide(row, start + r + 1, end, 0);
                share[r] = 1 / sum(sums);
                if (r < count) tops[(start + r) * num_heads + h] = top, shares[(start + r) * num_heads + h] = share[r];
            }
            times_rows(outs, weights, whole, values + of_kv_head, start);
            write_rows(out + (start * num_heads + h) * SIZE, outs, num_heads, count, share);
        }
        free(queries), free(outs), free(weights);
    }
    free(panels), free(values);
}

/* And grad (n, H, E), out's -> grad_q (n, H, E); grad_k and grad_v (H, whole, E), one for every query head. */
void attend_backward(const Stored *q, const Stored *k, const Stored *v, const float *tops, const float *shares,
                     const Stored *grad, Stored *grad_q, float *grad_k, float *grad_v, int64_t n, int64_t num_heads,
                     int64_t num_kv_heads, float scale) {
    int64_t whole = (n + WHOLE - 1) / WHOLE * WHOLE, of_head = whole * SIZE;
    float scales[BLOCK];
    for (int r = 0; r < BLOCK; r++) scales[r] = scale;
#pragma omp parallel
    {
        float *keys = room_for(of_head), *panels = room_for(of_head), *value_panels = room_for(of_head);
        float *queries = room_for(BLOCK * SIZE), *grads = room_for(BLOCK * SIZE), *grad_rows = room_for(BLOCK * SIZE);
        float *weights = room_for(BLOCK * whole), *slopes = room_for(BLOCK * whole);
#pragma omp for schedule(dynamic)
        for (int64_t h = 0; h < num_heads; h++) {
            int64_t head = h / (num_heads / num_kv_heads);
            float *grad_keys = grad_k + h * of_head, *grad_values = grad_v + h * of_head;
            copy_rows(keys, k + head * SIZE, num_kv_heads, n, whole, 1);
            copy_panels(panels, k + head * SIZE, num_kv_heads, n, whole);
            copy_panels(value_panels, v + head * SIZE, num_kv_heads, n, whole);
            memset(grad_keys, 0, of_head * sizeof(float));
            memset(grad_values, 0, of_head * sizeof(float));
            for (int64_t start = 0; start < n; start += BLOCK) {
                int64_t first = (start * num_heads + h) * SIZE, end = start + BLOCK;
                int64_t count = n - start < BLOCK ? n - start : BLOCK;
                copy_rows(queries, q + first, num_heads, count, BLOCK, scale * LOG2_E);
                copy_rows(grads, grad + first, num_heads, count, BLOCK, 1);
                times_panels(weights, whole, queries, panels, end);
                times_panels(slopes, whole, grads, value_panels, end);
                for (int r = 0; r < BLOCK; r++) {
                    float *row = weights + r * whole, *slope = slopes + r * whole;
                    int64_t of_row = (start + r) * num_heads + h;
                    float top = r < count ? tops[of_row] : 0, share = r < count ? shares[of_row] : 0;
                    hide(row, start + r + 1, end, -1e30f);
                    Floats means = {0};
                    for (int64_t c = 0; c < end; c += LANES) {
                        Floats some = power_of_2(load(row + c) - top) * share;
                        store(row + c, some);
                        means += some * load(slope + c);
                    }
                    float mean = sum(means);
                    hide(row, start + r + 1, end, 0);
                    for (int64_t c = 0; c < end; c += LANES)
                        store(slope + c, load(row + c) * (load(slope + c) - mean));
                }
                times_rows(grad_rows, slopes, whole, keys, start);
                write_rows(grad_q + first, grad_rows, num_heads, count, scales);
                add_turned_times(grad_keys, slopes, whole, queries, end);
                add_turned_times(grad_values, weights, whole, grads, end);
            }
            for (int64_t i = 0; i < of_head; i++) grad_keys[i] *= LOG_2;
        }
        free(keys), free(panels), free(value_panels);
        free(queries), free(grads), free(grad_rows);
        free(weights), free(slopes);
    }
}
