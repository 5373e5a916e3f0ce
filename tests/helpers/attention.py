"""An interface to the attention op for tests. It takes the boundaries of samples as `Segments`."""

from m3ae_kernels import packed_attention
from m3ae_kernels.attention import Segments
from torch import Tensor


def attend(q: Tensor | None, kv: Tensor, queries: Segments, keys: Segments, **options) -> Tensor:
    """Return the attention output of the samples' queries, which are `q` or those contained in `kv`."""
    if q is not None:
        options |= {"q": q, "cu_queries": queries.cu_seqlens, "max_queries": queries.max_seqlen}
    return packed_attention(kv, keys.cu_seqlens, keys.max_seqlen, **options)
