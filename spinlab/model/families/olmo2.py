"""OLMo-2 and 3: Llama's linears, which read the stream itself, with norms behind both blocks.

A block adds norm(y)·diag(g) to the stream s, y what its last linear writes. With s R1 in its place
that would have to be norm(y)·diag(g) R1, of some y M: norm(y M) = norm(y) M for an orthogonal M
alone, and M diag(g') = diag(g) R1 has one only where R1 mixes channels of one gain. So R1 is not
possible. R2, the rotation across heads, R4 and their scales act between linears, R3 on queries and
keys behind their norms, and transforms of the stream run where it is read. Most layers of OLMo-3
have sliding windows, and a RoPE of their own.
"""

from dataclasses import replace
from functools import partial

from spinlab.model.families import llama
from spinlab.model.families.decoder import POST_NORM, read_decoder
from spinlab.model.map import Family

NAMES = replace(
    llama.NAMES,
    attention_norm=None,
    mlp_norm=None,
    behind_attention="post_attention_layernorm",
    behind_mlp="post_feedforward_layernorm",
)

OLMO2 = Family(partial(read_decoder, names=NAMES, cannot={"r1": POST_NORM}))
