"""Defines the model: config, attention, MLP, transformer, key-value cache, quantized layers, files.

A model is a Hugging Face directory (config.json, model.safetensors, tokenizer.json, ...). Field and
tensor names are the Hub's own. So a directory written here opens in `transformers`, and a directory
of a family in data/hub.py (Llama, Qwen, Gemma, ...) opens here:

    from model import load
    model = load("out")                               # a training run: opens out/best
    logits = model(torch.tensor([[1, 2, 3]]))         # (1, 3, vocab_size)

Everything here is plain PyTorch. data/native.py makes it faster on a CPU, attached from outside.

Shapes: B rows, T positions, S positions with those in the cache, C hidden_size, H query heads,
K key-value heads, D head_dim, V vocab_size.
"""
import dataclasses, functools, json, math, shutil

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
from safetensors.torch import save_file
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import UserError, adapters, checkpoints, hub
from data.console import say_once
from data.files import MODEL, disk_full, replacing, sync, write_json
from data.rotary import ENDING, ROPE, scaled_frequencies

GELU_TANH = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH}


# ---------------------------------------------------------------------------------------------------------------------
# Config

@dataclasses.dataclass
class Config:
    """Shapes and switches of a decoder-only transformer. Names are the Hub's, defaults Qwen3's.

    A field that a fork adds here is saved and loaded with the model. Raises UserError for
    impossible values.
    """
    model_type: str = "qwen3"
    vocab_size: int = 4096                  # rows of the embedding; ids beyond the tokenizer's are padding
    hidden_size: int = 256                  # width of the residual stream
    intermediate_size: int = 768            # neurons of each MLP
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4            # fewer than the query heads: grouped-query attention (Ainslie et al., 2023)
    head_dim: int = 64
    max_position_embeddings: int = 256      # the window: the most tokens the model reads at once
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: dict = dataclasses.field(default_factory=lambda: dict(ROPE))         # rotary positions: rope_parameters
    sliding_window: int = 0                 # how far back sliding layers see, in tokens; 0: all the way
    layer_types: list = None                # which layers slide, by name; None: all of them
    no_rope_layers: list = None             # the Hub's word: 1 where a layer has rotary positions, 0 where it has none
    # Switches by which the Hub's families differ: one Block serves all of them.
    qk_norm: bool = True                    # RMSNorm on each head's query and key (Henry et al., 2020)
    qk_norm_whole: bool = False             # that norm is one over the channels of all heads (OLMo 2)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True                      # gate and up, or up alone
    head_bias: bool = False                 # the output head has a bias (Phi)
    layer_norm: bool = False                # LayerNorm with bias instead of RMSNorm
    unit_offset: bool = False               # RMSNorm multiplies by 1 + weight (Gemma)
    norms: str = "before"                   # of attention and MLP: before, after (OLMo 2), or both (Gemma 3)
    parallel: int = 0                       # attention and MLP read one stream, behind 1 norm (Phi) or 2 (GPT-NeoX)
    learned_positions: bool = False         # a table added to the embedding instead of rotary positions
    embedding_multiplier: float = 1.0       # factor of the embedding's rows (Gemma, Granite)
    residual_multiplier: float = 1.0        # factor of all that a block adds to the stream (Granite)
    attention_multiplier: float = 0.0       # factor of the scores q k^T; 0: 1 / sqrt(head_dim)
    logits_scaling: float = 1.0             # divides the logits (Granite)
    hub: dict = dataclasses.field(default_factory=dict, repr=False)         # config.json as it was read

    def __post_init__(self):
        hub.check_config(self, ACTIVATIONS)

    def window(self, layer):
        """How far back a layer sees, in tokens; 0: all the way."""
        slides = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else 0

    def turns(self, layer):
        """The rotary positions of a layer: "global", "local" (Gemma 3, where a window slides), or None."""
        if self.learned_positions or self.no_rope_layers is not None and not self.no_rope_layers[layer]:
            return None
        return "local" if self.window(layer) and "local_theta" in self.rope else "global"

    def frequencies(self, kind="global"):
        """Rotary frequencies in radians per position, (R/2,) float32, and a factor for cos and sin.

        R of the D channels of a head turn, in pairs. Pair i turns by theta^(-2i/R) at each position
        (Su et al., 2021).
        """
        R = int(self.head_dim * self.rope["partial_rotary_factor"])
        pairs = torch.arange(0, R, 2, dtype=torch.float32, device="cpu")
        if kind == "local":
            return self.rope["local_theta"] ** (-pairs / R), 1.0
        return scaled_frequencies(self.rope["rope_theta"] ** (-pairs / R), self.rope)  # for long windows


# ---------------------------------------------------------------------------------------------------------------------
# The transformer

class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension (Zhang and Sennrich, 2019)."""
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # x / sqrt(mean(x^2) + eps) * weight, in one operation
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class OffsetNorm(RMSNorm):
    """RMSNorm with the factor 1 + weight, computed in float32 (Gemma)."""
    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


def norm(config, size=None):
    """The normalization that a config asks for, over `size` channels (default: C)."""
    kind = nn.LayerNorm if config.layer_norm else OffsetNorm if config.unit_offset else RMSNorm
    return kind(size or config.hidden_size, config.rms_norm_eps)


def rotate(x, cos, sin):
    """Rotary positions: turns channel pairs (i, i + R/2) of x (B, T, heads, D) by the angles of their positions.

    cos, sin: (B or 1, T, 1, R/2). The first R channels turn, in the half-and-half order of the Hub.
    """
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def attention_by_formula(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D), as Attention computes it without ever holding the scores.

    q (B, H, T, D); k, v (B, K, S, D): H/K neighbouring query heads share a key-value head. mask (T, S) or
    (B, 1, T, S) bool: True where a query may look.
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))    # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                        # (B, H, T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al., 2017) with rotary positions and grouped-query heads."""
    def __init__(self, config, layer):
        super().__init__()
        c, self.layer, self.head_dim = config, layer, config.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        # Queries and keys of length sqrt(D) keep the scores small: training stays stable at high learning rates.
        sizes = (self.q_proj.out_features, self.k_proj.out_features) if c.qk_norm_whole else (c.head_dim, c.head_dim)
        self.q_norm, self.k_norm = (norm(c, size) if c.qk_norm else nn.Identity() for size in sizes)
        self.norm_first = c.qk_norm_whole
        # Below, scores are always divided by sqrt(D): another factor of the scores is a factor of the queries.
        self.query_factor = c.attention_multiplier * math.sqrt(c.head_dim) if c.attention_multiplier else 1.0

    def to_heads(self, x, norm, rotary):
        """Queries or keys x (B, T, heads * D), normalized and turned by their positions: (B, heads, T, D)."""
        heads = -1, self.head_dim
        x = norm(x).unflatten(-1, heads) if self.norm_first else norm(x.unflatten(-1, heads))        # (B, T, heads, D)
        return (x if rotary is None else rotate(x, *rotary)).transpose(1, 2)

    def queries_keys(self, x, rotary):
        """Queries (B, H, T, D) and keys (B, K, T, D) of x (B, T, C)."""
        q, k = self.to_heads(self.q_proj(x), self.q_norm, rotary), self.to_heads(self.k_proj(x), self.k_norm, rotary)
        return (q if self.query_factor == 1 else q * self.query_factor), k

    def mix(self, x, rotary, mask, cache=None):
        """The input of o_proj, (B, T, H * D): values, mixed by the attention of each head.

        mask: bool (T, S) or (B, 1, T, S), True where a query may look; None: all positions before it.
        """
        B, T, _ = x.shape
        q, k = self.queries_keys(x, rotary)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)             # (B, K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                                    # (B, K, S, D)
        if T == 1 and (mask is None or mask.ndim == 2):     # the H/K queries of a key-value head are one product
            y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.head_dim), k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                               enable_gqa=bool(q.shape[1] != k.shape[1]))
        return y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1)

    def forward(self, x, rotary, mask, cache=None):
        return self.o_proj(self.mix(x, rotary, mask, cache))


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020), with another activation GeGLU (Gemma), or one layer without a gate (GPT-2)."""
    def __init__(self, config):
        super().__init__()
        c, self.act = config, ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias) if c.gated else None
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def inner(self, x):
        """The input of down_proj: the activations of the neurons, (B, T, intermediate_size)."""
        if self.gate_proj is None:
            return self.act(self.up_proj(x))
        return self.act(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x):
        return self.down_proj(self.inner(x))


class Block(nn.Module):
    """One layer: attention between positions, then an MLP at each; both add to the residual stream x (B, T, C)."""
    def __init__(self, config, layer):
        super().__init__()
        before, after = config.norms in ("before", "both"), config.norms in ("after", "both")
        self.input_layernorm = norm(config) if before else nn.Identity()
        self.self_attn = Attention(config, layer)
        self.attention_out_norm = norm(config) if after else nn.Identity()
        self.post_attention_layernorm = norm(config) if before and config.parallel != 1 else nn.Identity()
        self.mlp = MLP(config)
        self.mlp_out_norm = norm(config) if after else nn.Identity()
        self.parallel, self.factor = config.parallel, config.residual_multiplier
        self.dropout = nn.Dropout(0.0)                # train.py --dropout sets its rate; not part of the saved model

    def forward(self, x, rotary, mask, cache=None):
        h = self.input_layernorm(x)
        update = self.attention_out_norm(self.self_attn(h, rotary, mask, cache))
        y = x.add(self.dropout(update), alpha=self.factor)                           # x + factor * update
        if self.parallel != 1:
            h = self.post_attention_layernorm(x if self.parallel else y)
        return y.add(self.dropout(self.mlp_out_norm(self.mlp(h))), alpha=self.factor)


def embedding(rows, size):
    """A table of `rows` vectors, still to be filled."""
    # nn.Embedding's own normal_() imports torch's compiler when load() builds on the meta device: three seconds
    return nn.Embedding(rows, size, _weight=torch.empty(rows, size))


class Body(nn.Module):
    """Embedding, blocks and final norm: ids (B, T) to hidden states (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm(config)
        self.checkpoint = False                       # activation checkpointing: train.py --checkpoint-activations
        # Plain attributes: buffers would be rounded by model.to(bfloat16), and tables of cos and sin cost memory.
        self.frequencies, self.rotary_scale = config.frequencies()
        self.local_frequencies = config.frequencies("local")[0] if "local_theta" in config.rope else self.frequencies

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.frequencies = self.frequencies.to(self.norm.weight.device)              # but they follow to another device
        self.local_frequencies = self.local_frequencies.to(self.norm.weight.device)
        return self

    def rotary(self, positions, kind="global"):
        """cos and sin of the rotation angles of positions (B or 1, T): (B or 1, T, 1, R/2) each; kind: Config.turns."""
        if kind is None:
            return None
        frequencies, scale = (self.local_frequencies, 1.0) if kind == "local" else (self.frequencies, self.rotary_scale)
        angles = (positions[..., None].float() * frequencies)[:, :, None]
        dtype = self.norm.weight.dtype
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def mask(self, T, start, window, segments, fixed):
        """Where the last T of S = start + T positions may look: bool (T, S) or (B, 1, T, T); None: all before."""
        if not fixed and segments is None and (start == 0 or T == 1) and not (window and start + T > window):
            return None
        q = start + torch.arange(T, device=self.frequencies.device)[:, None]
        k = torch.arange(fixed or start + T, device=self.frequencies.device)
        mask = k <= q
        if window:
            mask &= k > q - window
        if segments is not None:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        return mask

    def prepare(self, ids, start=0, segments=None, fixed=0):
        """The inputs of the blocks for ids (B, T) behind `start` tokens: x (B, T, C), each layer's rotary and mask.

        fixed: S of a FixedCache (data/graphs.py), which gives all its positions, written or not; start is a tensor then
        """
        T, c, numbers = ids.shape[1], self.config, range(len(self.layers))
        S = fixed or start + T
        if S > c.max_position_embeddings and (c.learned_positions or c.rope["rope_type"] in ENDING):
            raise UserError(f"{S} tokens are more than this model's window of {c.max_position_embeddings}")
        x = self.embed_tokens(ids).to(self.norm.weight.dtype)                        # (B, T, C)
        if c.embedding_multiplier != 1:
            x = x * torch.tensor(c.embedding_multiplier, dtype=x.dtype, device="cpu")       # rounded first, as in Gemma
        positions = (start + torch.arange(T, device=ids.device))[None]               # (1, T)
        if segments is not None:                      # packed examples: positions count from each one's first token
            new = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)     # (B, T)
            positions = positions - (positions * new).cummax(dim=1).values
        masks = {w: self.mask(T, start, w, segments, fixed) for w in {c.window(i) for i in numbers}}
        rotaries = {kind: self.rotary(positions, kind) for kind in {c.turns(i) for i in numbers}}
        if c.learned_positions:
            x = x + self.embed_positions(positions)
        return x, [rotaries[c.turns(i)] for i in numbers], [masks[c.window(i)] for i in numbers]

    def finish(self, x):
        """The input of the head: the stream x (B, T, C), normalized. Divided here, the logits are, too."""
        return self.norm(x) if self.config.logits_scaling == 1 else self.norm(x) / self.config.logits_scaling

    def forward(self, ids, cache=None, segments=None, hidden=None):
        start, fixed = (cache.length, cache.fixed) if cache is not None else (0, 0)
        x, rotaries, masks = self.prepare(ids, start, segments, fixed)
        for layer, rotary, mask in zip(self.layers, rotaries, masks):
            if hidden is not None:
                hidden.append(x)
            if self.checkpoint and self.training:     # keeps x alone; the backward pass computes the layer again
                x = checkpoint(layer, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache)
        if hidden is not None:
            hidden.append(x)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.finish(x)


class Transformer(nn.Module):
    """A decoder-only language model with the architecture of Qwen3 (Yang et al., 2025).

    The switches of Config give the other families of data/hub.py.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.history = []                             # steps that made this model, oldest first, for config.json
        self.exits = []                               # early exits: layers after which the head was trained, too
        self.compression = []                         # layers that are not dense, in the order of replacement
        self.tie_weights()

    def tie_weights(self):
        """Makes the head the embedding table, if the config says so."""
        if self.config.tie_word_embeddings and isinstance(self.model.embed_tokens, QuantEmbedding):
            self.lm_head = self.model.embed_tokens.table
        elif self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self):
        """The type of activations, which is that of the norms: they are never quantized."""
        return self.model.norm.weight.dtype

    def replace(self, entry, layer=None):
        """Replaces a dense layer, and appends the entry to `compression`.

        entry  {"module": name of the layer, "kind": key of LAYERS, ...spec}
        layer  the new layer, of that kind; None: a layer whose tensors are still to be filled
        A layer in place of an embedding becomes the table of a QuantEmbedding. A tied head follows
        the embedding and has no entry. Raises UserError for an entry that does not fit this model.
        """
        try:
            name, kind, spec = entry["module"], entry["kind"], {k: entry[k] for k in entry.keys() - {"module", "kind"}}
            old = self.get_submodule(name)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"compression has {entry!r}, which names no kind or no layer of this model") from None
        if kind not in LAYERS:
            raise UserError(f"{name} is of kind {kind!r}, which is not supported; supported: {', '.join(LAYERS)}")
        if not isinstance(old, (nn.Linear, nn.Embedding)) or self.config.tie_word_embeddings and name == "lm_head":
            raise UserError(f"compression has {entry!r}, but {name} is not a dense layer of its own")
        if isinstance(old, nn.Embedding) and not issubclass(LAYERS[kind], QuantLinear):
            raise UserError(f"compression has {entry!r}, but an embedding can only be quantized")
        if layer is None:
            n_out, n_in = old.weight.shape
            try:
                layer = LAYERS[kind].empty(n_in, n_out, getattr(old, "bias", None) is not None, **spec)
            except (UserError, TypeError) as error:
                raise UserError(f"compression has {entry!r}: {error}") from None
        parent, _, child = name.rpartition(".")
        setattr(self.get_submodule(parent), child, QuantEmbedding(layer) if isinstance(old, nn.Embedding) else layer)
        self.compression.append(entry)
        self.tie_weights()

    def forward(self, ids, cache=None, segments=None, last=0, head=True, hidden=None):
        """Logits (B, T, V) for ids (B, T); position t predicts token t + 1.

        cache      KVCache with the tokens before ids; ids are added to it
        segments   (B, T) integers, equal within one example: where they change, attention and
                   positions start anew
        last       number of last positions whose logits are wanted: (B, last, V); 0: all
        head       False gives the final hidden states (B, T, C), for losses that never hold all logits
        hidden     a list, which receives the residual stream before each layer and after the last,
                   (B, T, C) each
        """
        x = self.model(ids, cache, segments, hidden)[:, -last:]
        return self.lm_head(x) if head else x

    @torch.no_grad()
    def initialize(self, generator=None):
        """Draws random weights and returns the model.

        Embeddings have std 1. Matrices have std 1 / sqrt(inputs): outputs have the scale of inputs. The
        head, and the projections that write to the residual stream, are zero: the loss begins at ln V,
        and each block as the identity. A tied embedding, which is the head, too, starts small.
        """
        embedding = 0.02 if self.config.tie_word_embeddings else 1.0
        for name, p in self.named_parameters():
            if p.ndim < 2:                            # other vectors keep the values of their module's __init__
                if name.endswith(("norm.weight", "bias")):
                    p.fill_(0.0 if name.endswith("bias") or self.config.unit_offset else 1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                p.zero_()
            else:
                p.normal_(0.0, embedding if "embed" in name else p.shape[1] ** -0.5, generator=generator)
        return self

    # --- counts ---

    def parameters_count(self):
        """Number of parameters: tied ones once, quantized weights without their scales."""
        quantized = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, QuantLinear))
        return sum(p.numel() for p in self.parameters()) + quantized

    def matmul_parameters(self):
        """Number of parameters that multiply each token: all but the embedding, unless it is the head."""
        return sum(m.in_features * m.out_features for part in (self.model.layers, self.lm_head) for m in part.modules()
                   if isinstance(m, (nn.Linear, QuantLinear)))

    def resident_bytes(self):
        """Bytes of weights and scales in memory, shared storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in (*self.parameters(), *self.buffers())}
        return sum(storages.values())

    def flops_per_token(self, context):
        """Multiplications and additions of a token's forward pass, mean over a window of `context`.

        A training step costs three times as much (Kaplan et al., 2020).
        """
        c = self.config
        attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (context + 1)   # qk, av: half full
        return 2 * self.matmul_parameters() + attention


class KVCache:
    """Keys and values of the tokens read so far: a buffer (B, K, capacity, D) for each layer."""
    def __init__(self, config, batch, capacity, device=None, dtype=None):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = 0                               # tokens in the buffers
        self.fixed = 0                                # update() gives what is written; FixedCache: all positions

    def update(self, layer, k, v):
        """Appends k, v (B, K, T, D) and returns all keys and values; Body then adds T to `length`."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length:end] = k
        self.values[layer][:, :, self.length:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


# ---------------------------------------------------------------------------------------------------------------------
# Quantized layers: weight = integer * scale, with one float16 scale for each group of neighbours in a row

def storable(scales):
    """Scales as float16. One that is too small for float16 becomes 2^-24, the smallest number there."""
    scales = scales.half()
    return torch.where(scales == 0, 2.0 ** -24, scales)


def group_scales(weight, bits, group, importance=None):
    """Scales, float16 (out, in / group), with the least squared error that was found for each group.

    8 bits: the largest |weight| of a group becomes 127. 4 bits: integers have no 8, only -8, so a
    scale takes the sign that makes the weight of largest size negative. That weight becomes -7, -8,
    or by clipping -9 or -10; each start is improved twice by least squares for its integers. Against
    a largest integer of 7, normal weights lose 29 % less error in groups of 32, 31 % in 128.

    importance (in,): the cost of a squared error; None: equal. Scales are rounded to float16 before
    the weights are rounded, so storing them loses nothing.
    """
    weight = weight.detach().float().unflatten(1, (-1, group))                       # (out, in / group, group)
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))[..., 0]       # (out, in / group), with its sign
    if bits == 8:
        return storable(largest.abs() / 127)
    cost = 1.0 if importance is None else importance.clamp(min=1e-30).view(-1, group)
    best, least = None, math.inf
    for integer in (-7, -8, -9, -10):
        scales = storable(largest / integer)
        for _ in range(2):
            q = rounded(weight.flatten(1), scales, bits).view(weight.shape).float()
            scales = storable((cost * q * weight).sum(-1) / (cost * q * q).sum(-1).clamp(min=1e-38))
        error = dequantized(rounded(weight.flatten(1), scales, bits), scales).view(weight.shape) - weight
        error = (cost * error.square()).sum(-1)                                      # (out, in / group)
        best = scales if best is None else torch.where(error < least, scales, best)
        least = error if least is math.inf else torch.minimum(least, error)
    return best


def rounded(weight, scales, bits):
    """The integers, int8 (out, in), that come nearest to a weight: -127..127 or -8..7."""
    steps = weight.detach().float().unflatten(1, (scales.shape[1], -1)) / scales.float()[..., None]
    return steps.round().clamp(*((-127, 127) if bits == 8 else (-8, 7))).flatten(1).to(torch.int8)


def dequantized(integers, scales):
    """The weight, float32 (..., in), of integers (..., in) and scales (..., in / group); exact."""
    return (integers.unflatten(-1, (scales.shape[-1], -1)) * scales.float()[..., None]).flatten(-2)


class QuantLinear(nn.Module):
    """A linear layer with integer weights. Its subclasses say how the integers are stored.

    q       (out, in * bits / 8), the integers as `pack` stores them
    scales  (out, in / group) float16
    Both are buffers and never cast.
    """
    def __init__(self, q, scales, bias=None):
        super().__init__()
        self.out_features, self.in_features = len(q), q.shape[1] * 8 // self.bits
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", bias)

    @classmethod
    def empty(cls, n_in, n_out, bias=False, **spec):
        """A layer with tensors to be filled. Raises UserError or TypeError for a wrong spec."""
        return cls(torch.empty(n_out, n_in * cls.bits // 8, dtype=cls.stored),
                   torch.empty(n_out, n_in // cls.group(n_in, **spec), dtype=torch.float16),
                   nn.Parameter(torch.empty(n_out)) if bias else None)

    @classmethod
    def from_dense(cls, layer, **spec):
        """Rounds the weights of an nn.Linear or nn.Embedding to nearest. Raises as `empty` does."""
        scales = group_scales(layer.weight, cls.bits, cls.group(layer.weight.shape[1], **spec))
        return cls.from_integers(rounded(layer.weight, scales, cls.bits), scales, getattr(layer, "bias", None))

    @classmethod
    def from_integers(cls, integers, scales, bias=None):
        """A layer of given integers, int8 (out, in), and scales, float16 (out, in / group)."""
        return cls(cls.pack(integers), scales, bias)

    def integers(self):
        """(int8 (out, in), float16 scales (out, in / group))."""
        return self.unpack(self.q), self.scales

    def dense(self):
        """The weight, float32 (out, in)."""
        return dequantized(*self.integers())

    def rows(self, ids):
        """Rows of the weight, float32 (*ids.shape, in)."""
        return dequantized(self.unpack(self.q[ids]), self.scales[ids])

    def forward(self, x):
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.q.device)        # model.to(bfloat16) would round them
        return self


class Int8Linear(QuantLinear):
    """8 bits: integers -127..127 as they are, one scale for each row."""
    bits, stored = 8, torch.int8

    @staticmethod
    def group(n_in):
        return n_in

    @staticmethod
    def pack(integers):
        return integers

    unpack = pack


class Int4Linear(QuantLinear):
    """4 bits: integers -8..7, two in a byte, one scale for each `group` of 32, 64 or 128 inputs.

        byte j of a row:    [ integer 2j+1, high four bits | integer 2j, low four bits ]    each as integer + 8
    """
    bits, stored, GROUPS = 4, torch.uint8, (32, 64, 128)

    @classmethod
    def group(cls, n_in, group=32, asymmetric=False):
        if asymmetric:
            raise UserError("int4 with an offset for each group (asymmetric) is no longer read: take the "
                            "dense model and quantize it anew, int4:32:gptq is as good")
        if group not in cls.GROUPS or n_in % group:
            fit = [str(g) for g in cls.GROUPS if n_in % g == 0]
            raise UserError(f"int4 in groups of {group} does not fit rows of {n_in}; "
                            + (f"groups that fit: {', '.join(fit)}" if fit else "none of 32, 64, 128 does: use int8"))
        return group

    @staticmethod
    def pack(integers):
        """int8 (..., in) in -8..7 to uint8 (..., in / 2)."""
        q = (integers + 8).to(torch.uint8)
        return q[..., 0::2] | q[..., 1::2] << 4

    @staticmethod
    def unpack(q):
        return torch.stack((q & 15, q >> 4), dim=-1).flatten(-2).to(torch.int8) - 8


class QuantEmbedding(nn.Module):
    """An embedding with a quantized table; its rows are float32. A tied table is the head itself."""
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table.rows(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Low rank

class LowRankLinear(nn.Module):
    """A weight (out, in) as the product of two thin matrices, `up` (out, rank) after `down` (rank, in).

    Both are layers of their own, which may be quantized in turn.
    """
    def __init__(self, down, up):
        super().__init__()
        self.down, self.up = down, up

    @classmethod
    def empty(cls, n_in, n_out, bias=False, rank=0):
        """A layer with tensors to be filled. Raises UserError for an impossible rank."""
        if type(rank) is not int or not 1 <= rank <= min(n_in, n_out):
            raise UserError(f"a weight of {n_out} x {n_in} has a rank from 1 to {min(n_in, n_out)}, not {rank!r}")
        return cls(nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=bias))

    @classmethod
    def from_factors(cls, up, down, bias=None):
        """A layer of given factors up (out, rank) and down (rank, in)."""
        with torch.device("meta"):
            layer = cls.empty(down.shape[1], len(up), bias is not None, len(down))
        layer.down.weight, layer.up.weight, layer.up.bias = nn.Parameter(down), nn.Parameter(up), bias
        return layer

    def dense(self):
        """The weight, float (out, in)."""
        up, down = (m.dense() if isinstance(m, QuantLinear) else m.weight for m in (self.up, self.down))
        return up @ down

    def forward(self, x):
        return self.up(self.down(x))


LAYERS = {"int8": Int8Linear, "int4": Int4Linear, "lowrank": LowRankLinear}


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing model directories

def empty(config, compression):
    """The model of a config and its compressed layers, on the meta device: without memory."""
    with torch.device("meta"):
        model = Transformer(config)
        for entry in compression or []:
            model.replace(entry)
    return model


def load(path, device="cpu", dtype=None, finite=True):
    """Loads the model in a directory (or in a training run's best/), in eval mode.

    Tensors are mapped from the file, not copied. dtype None keeps the stored type; integers and
    scales of quantized layers are never converted. finite=True refuses values that are infinite or
    not a number. For that the whole file is read, a fifth of the time to the first token; with
    finite=False the caller looks at the first logits. Raises UserError for a missing, unknown or
    misshapen tensor, a truncated file, an unknown family or kind of layer. An adapter (data/adapters.py)
    is merged into its base model.
    """
    given = checkpoints.find_model(path)
    directory = adapters.base_of(given)               # another one, if an adapter is given
    checkpoints.refuse_companions(directory)
    settings = hub.read_config(directory)
    with checkpoints.config_to_blame(directory):
        config = Config(**hub.config_from_hub(settings, Config))
    tensors, merged = adapters.merged(checkpoints.read_tensors(directory), given, config, settings)
    with checkpoints.config_to_blame(directory):
        if config.num_hidden_layers > len(tensors):
            raise UserError(f"there are {config.num_hidden_layers:,} layers, but the file of weights holds only "
                            f"{len(tensors):,} tensors")
        model = empty(config, settings.get("compression"))
        if not model.compression:
            tensors = hub.tensors_from_hub(tensors, config, model.state_dict())
        if config.tie_word_embeddings and not checkpoints.is_tied(tensors):          # as transformers 5 does
            say_once(f"{directory}: config.json ties the head to the embedding, but the file holds another head, "
                     "which is used")
            config.tie_word_embeddings = False
            model = empty(config, settings.get("compression"))
    checkpoints.check_tensors(model, tensors, directory, finite)
    model.load_state_dict(tensors, strict=False, assign=True)    # strict: check_tensors
    model.tie_weights()
    model.history, model.exits = (settings.get("history") or []) + merged, settings.get("exits") or []
    config.hub.update(card=checkpoints.front_matter(directory / "README.md"),
                      sampling=checkpoints.sampling_settings(directory))
    return model.to(device=device, dtype=dtype).eval()


def save(model, directory, tokenizer=None, extra=None, state=None):
    """Writes a model directory, atomically.

    extra(new_directory)  adds files, for example a training state
    state                 the tensors, where the model's state dict holds shards of them (FSDP)
    Raises UserError if `directory` holds something that is not a model, which would be replaced.
    """
    config = hub.config_to_hub(model.config)
    try:
        json.dumps(config)
    except TypeError as error:
        raise UserError(f"config.json cannot hold this model's Config ({error}): give its fields numbers, texts, lists "
                        "or dicts") from None
    if tokenizer is not None:
        config.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id)
    config.update(history=model.history, dtype=str(model.dtype)[6:], **({"exits": model.exits} if model.exits else {}))
    tensors = {name: t.detach().to("cpu").contiguous() for name, t in (state or model.state_dict()).items()
               if not (model.config.tie_word_embeddings and name.startswith("lm_head."))}
    if checkpoints.only_opens_here(model):                  # or transformers would fill the layers with random numbers
        config.update(model_type=hub.COMPRESSED, base_model_type=model.config.model_type)
        del config["architectures"]
    if model.compression:
        config.update(compression=model.compression)
    else:
        tensors = hub.tensors_to_hub(tensors, model.config)
    with replacing(directory, MODEL) as new, disk_full(new, sum(t.nbytes for t in tensors.values())):
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(new, model_max_length=model.config.max_position_embeddings)
            write_json(new / "generation_config.json", checkpoints.generation_config(model, tokenizer))
        (new / "README.md").write_text(checkpoints.card(model), encoding="utf-8")
        if extra is not None:
            extra(new)
        for file in new.iterdir():                                 # on disk before config.json says that it is whole
            sync(file)
        shutil.copymode(new / "README.md", new / "model.safetensors")      # safetensors lets nobody else read it
        write_json(new / "config.json", config)
