/* Rows of logits on a CPU: the C version of logits.py's Triton kernel. -DIN_BF16=1 or 0: the logits' dtype. */

#include <math.h>

#define SIZE 16
#include "vectors.h"

/* LANES logits from column v on; -inf beyond the row's end. */
static inline Floats logits_at(const Stored *row, int64_t v, int64_t num_columns) {
    if (v + LANES <= num_columns) return wide(row + v);
    Stored end[LANES];
    narrow(end, (Floats){0} - INFINITY);
    memcpy(end, row + v, (num_columns - v) * sizeof *row);
    return wide(end);
}

/* Store the first `count` values, or all. */
static inline void put(Stored *x, Floats values, int64_t count) {
    Stored all[LANES];
    narrow(count < LANES ? all : x, values);
    if (count < LANES) memcpy(x, all, count * sizeof *x);
}

/* logits (n, num_columns), their rows stride apart, targets (n,) -> logps, entropies (n,); with weights (n,) the logits
are overwritten by the gradient, weight * (onehot(target) - softmax). All is NaN if the target is not a column. */
void logprobs(Stored *logits, int64_t stride, const int64_t *targets, const float *weights, float *logps,
              float *entropies, int64_t n, int64_t num_columns) {
#pragma omp parallel for
    for (int64_t t = 0; t < n; t++) {
        Stored *row = logits + t * stride;
        int64_t y = targets[t];
        double target = NAN;
        if (y >= 0 && y < num_columns) {
            target = wide_one(row + y);
            put(row + y, (Floats){0} - INFINITY, 1);
        }
        Floats high = (Floats){0} - 3e38f, sums = {0}, moments = {0}; /* finite where the target is the only column, too */
        for (int64_t v = 0; v < num_columns; v += LANES) high = larger(high, logits_at(row, v, num_columns));
        float top = largest(high);
        for (int64_t v = 0; v < num_columns; v += LANES) {
            Floats below = larger((Floats){0} - 87, logits_at(row, v, num_columns) - top), power = power_of_e(below);
            sums += power;
            moments += power * below;
        }
        double total = sum(sums), gap = top + log(total) - target, tail = exp(-fabs(gap));
        double logp = -fmax(gap, 0) - log1p(tail), one_minus_p = (gap > 0 ? 1 : tail) / (1 + tail);
        float lse = target - logp;
        logps[t] = logp;
        entropies[t] = log1p(tail) + fabs(gap) * tail / (1 + tail) + one_minus_p * (log(total) - sum(moments) / total);
        if (!weights) continue;
        for (int64_t v = 0; v < num_columns; v += LANES)
            put(row + v, power_of_e(logits_at(row, v, num_columns) - lse) * -weights[t], num_columns - v);
        if (y >= 0 && y < num_columns) put(row + y, (Floats){0} + weights[t] * (float)one_minus_p, 1);
    }
}
