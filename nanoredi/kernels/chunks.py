"""How the kernels' callers walk over tokens x vocabulary: a chunk of rows at a time, in one buffer of logits."""

from collections.abc import Iterator

from torch import Tensor

from nanoredi.kernels.products import put_product

# A chunk's logits have at most this many elements, whatever the vocabulary. Smaller chunks read and write the gradient
# of lm_head more often, and their matrix products are slimmer; bench/kernels.py --chunks measures it.
MAX_CPU_ELEMENTS = 1 << 24  # 64 MiB in fp32
MAX_GPU_ELEMENTS = 192 << 20  # 384 MiB in bf16


def logits_by_chunks(hidden: Tensor, lm_head: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (chunk of rows (C,), hidden of these rows (C, D), their logits (C, V)); the next logits overwrite the last."""
    if not len(rows):
        return
    num_rows = (MAX_GPU_ELEMENTS if hidden.is_cuda else MAX_CPU_ELEMENTS) // lm_head.shape[0]
    chunks = rows.tensor_split(-(-len(rows) // max(1, num_rows)))  # as even as can be, the first the largest
    buffer = hidden.new_empty(len(chunks[0]), lm_head.shape[0])
    for chunk in chunks:
        x = hidden[chunk]
        yield chunk, x, put_product(buffer[: len(chunk)], x, lm_head.T)
