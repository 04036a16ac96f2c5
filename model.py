"""What a model is: config, layers, the transformer, its key-value cache, and how one is read and written.

A model is a Hugging Face directory (config.json, model.safetensors, tokenizer.json, ...). Field and tensor names are
the Hub's own, so a directory written here opens in `transformers`, and a Llama-, Mistral-, Qwen2- or Qwen3-family
directory opens here without renaming:

    from model import load
    model = load("out")                               # a training run: opens out/best
    logits = model(torch.tensor([[1, 2, 3]]))         # (1, 3, vocab_size)

Nothing here trains, samples or measures: see train.py and sample.py.
"""
import contextlib, ctypes, dataclasses, errno, functools, hashlib, json, math, os, platform, re, shutil
import stat, subprocess, sys, tempfile
from pathlib import Path

import data  # noqa: F401 - first, so that Ctrl-C is quiet while torch is imported
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import MODEL, UserError, beside, named, reading, replacing, sync, write_json
from data.values import check_values

FORMAT = 1                                  # of what we add to config.json; a newer one is refused by name
COMPRESSED = "slm-compressed"               # model_type of a directory with layers that only this code knows
SAMPLING = dict(do_sample=True, temperature=0.8, top_p=0.95)          # sample.py's own defaults
NOT_FOR = """Text it writes may be wrong, biased, or copied from its training data. It is not for decisions about
people, for medical, legal or financial advice, or for anything where a mistake does harm unless a person checks it."""


# ---------------------------------------------------------------------------------------------------------------------
# Config

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
SCALED = {"default": (), "linear": ("factor",),                # kinds of rotary positions, and what each needs to know
          "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
          "longrope": ("factor", "short_factor", "original_max_position_embeddings")}
GELU_TANH = functools.partial(F.gelu, approximate="tanh")
WINDOWS = ("full_attention", "sliding_attention")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH}

# What Config and its `rope` may hold: a type, and of numbers the smallest and the largest (see check_values). They come
# from files: a size that no model has must not take all memory, or begin a loop.
FIELDS = {**dict.fromkeys(SIZES, (int, 1, 2 ** 24)), "num_hidden_layers": (int, 1, 10_000),
          **dict.fromkeys(("tie_word_embeddings", "qk_norm", "qkv_bias", "o_bias", "mlp_bias", "gated", "layer_norm",
                           "learned_positions"), (bool,)),
          "rms_norm_eps": (float, 0, 1), "hidden_act": (str,), "sliding_window": (int, 0, 2 ** 40), "rope": (dict,)}
ROPE_FIELDS = {"rope_type": (str,), "rope_theta": (float, 1e-3, 1e30), "partial_rotary_factor": (float, 0, 1),
               **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), (float, 1e-3, 1e6)),
               "original_max_position_embeddings": (int, 2, 2 ** 24), "attention_factor": (float, 0, 1e6),
               **dict.fromkeys(("short_factor", "long_factor"), ([float], 1e-3, 1e6))}
LARGEST = 2 ** 31                           # elements of a tensor: Llama 3.1 405B's embedding has 2.1 billion


@dataclasses.dataclass
class Config:
    """Shapes and switches of a decoder-only transformer, in the Hub's names. The defaults are Qwen3's format."""
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
    rope: dict = dataclasses.field(default_factory=lambda: dict(ROPE))    # rotary positions: the Hub's rope_parameters
    sliding_window: int = 0                 # how far back sliding layers see, in tokens; 0: all the way
    layer_types: list = None                # which layers slide, by name; None: all of them
    # What the Hub's families differ in: one block carries them all.
    qk_norm: bool = True                    # RMSNorm on each head's query and key (Henry et al., 2020)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True                      # gate and up, or up alone
    layer_norm: bool = False                # LayerNorm with bias instead of RMSNorm
    learned_positions: bool = False         # a table added to the embedding instead of rotary positions
    hub: dict = dataclasses.field(default_factory=dict, repr=False)         # config.json as it was read

    def __post_init__(self):
        check_values(vars(self), FIELDS, "the model's shape")
        check_values(self.rope, ROPE_FIELDS, "rotary positions", needed=ROPE)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                            f"num_key_value_heads ({self.num_key_value_heads})")
        for name, value, known in (("hidden_act", self.hidden_act, ACTIVATIONS),
                                   ("rope_type", self.rope["rope_type"], SCALED)):
            if value not in known:
                raise UserError(f"{name} {value!r} is not supported; supported: {', '.join(known)}")
        kind, turned = self.rope["rope_type"], int(self.head_dim * self.rope["partial_rotary_factor"])
        if turned % 2 or not turned:
            raise UserError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs of channels")
        check_values(self.rope, ROPE_FIELDS, f"rope_type {kind!r}", needed=SCALED[kind])
        if kind == "llama3" and self.rope["low_freq_factor"] >= self.rope["high_freq_factor"]:
            raise UserError(f"low_freq_factor ({self.rope['low_freq_factor']}) must be below high_freq_factor "
                            f"({self.rope['high_freq_factor']})")
        for name in {"short_factor", "long_factor"} & self.rope.keys() if kind == "longrope" else ():
            if len(self.rope[name]) != turned // 2:
                raise UserError(f"{name} has {len(self.rope[name])} numbers; {turned} rotary channels need "
                                f"{turned // 2}")
        if self.layer_types is not None:
            check_values(vars(self), {"layer_types": ([str],)}, "the model's shape")
            if len(self.layer_types) < self.num_hidden_layers or set(self.layer_types) - set(WINDOWS):
                raise UserError(f"layer_types must name one of {', '.join(WINDOWS)} for each of "
                                f"{self.num_hidden_layers} layers")
        heads = self.num_attention_heads * self.head_dim
        rows = {"vocab_size": self.vocab_size, "intermediate_size": self.intermediate_size,
                "num_attention_heads * head_dim": heads}
        if self.learned_positions:
            rows["max_position_embeddings"] = self.max_position_embeddings
        for name, n in rows.items():
            if n * self.hidden_size > LARGEST:
                raise UserError(f"{name} ({n:,}) times hidden_size ({self.hidden_size:,}) is more than the {LARGEST:,} "
                                "numbers that a tensor may have: make one of them smaller")

    def window(self, layer):
        """How far back a layer sees, in tokens; 0: all the way."""
        slides = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else 0

    def frequencies(self):
        """Rotary frequencies in radians per position, (rotary channels / 2,) float32, and the factor of cos and sin."""
        r, channels = self.rope, int(self.head_dim * self.rope["partial_rotary_factor"])
        f = r["rope_theta"] ** (-torch.arange(0, channels, 2, dtype=torch.float32, device="cpu") / channels)
        if r["rope_type"] == "linear":
            return f / r["factor"], 1.0
        if r["rope_type"] == "llama3":                # slow turns are stretched, fast ones kept, those between blended
            low, high = r["low_freq_factor"], r["high_freq_factor"]
            turns = r["original_max_position_embeddings"] * f / (2 * math.pi)      # in the window of the first training
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return f * (keep + (1 - keep) / r["factor"]), 1.0
        if r["rope_type"] == "longrope":              # the short factors only: our window ends where they do
            stretch, scale = r["factor"], r.get("attention_factor")
            if scale is None:
                scale = math.sqrt(1 + math.log(max(1, stretch)) / math.log(r["original_max_position_embeddings"]))
            return f / torch.tensor(r["short_factor"], device="cpu"), scale
        return f, 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Quantized layers: weight = integer * scale (+ offset), with one float16 scale for each group of neighbours in a row

def absmax_scales(weight, bits, group):
    """Scales, float16 (out, in / group), that put the largest |weight| of each group at the last integer.

    They are rounded to float16 before the weights are rounded: nothing is lost when they are stored.
    A group of zeros has scale 1; one whose scale is too small for float16 has its smallest number, 2^-24.
    """
    largest = weight.detach().float().unflatten(1, (-1, group)).abs().amax(-1)
    scales = (largest / (2 ** (bits - 1) - 1)).half().clamp(min=2.0 ** -24)
    return torch.where(largest == 0, torch.ones_like(scales), scales)


def minmax_grid(weight, bits, group):
    """(scales, offsets), float16 (out, in / group) each, that put the smallest weight of each group at the first of
    2^bits integers and the largest at the last: the asymmetric form."""
    groups = weight.detach().float().unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2 ** bits - 1)).half().clamp(min=2.0 ** -24)
    return scales, (low + 2 ** (bits - 1) * scales.float()).half()


def rounded(weight, scales, bits, offsets=None):
    """The integers, int8 (out, in), that come nearest to a weight: -127..127 or -7..7, or with offsets -8..7."""
    last = 2 ** (bits - 1) - 1
    groups = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    if offsets is not None:
        groups = groups - offsets.float()[..., None]
    steps = groups / scales.float()[..., None]
    return steps.round().clamp(-last - (offsets is not None), last).flatten(1).to(torch.int8)


def dequantized(integers, scales, offsets=None):
    """float32 (..., in) of integers (..., in), scales and offsets (..., in / group). Without offsets it is exact: 8 and
    11 bits make at most 19."""
    groups = integers.unflatten(-1, (scales.shape[-1], -1)) * scales.float()[..., None]
    return (groups if offsets is None else groups + offsets.float()[..., None]).flatten(-2)


class QuantLinear(nn.Module):
    """What Int8Linear and Int4Linear share; they say how integers are stored and which spec they have.

    q       (out, in * bits / 8), the integers as `pack` stores them
    scales  (out, in / group) float16
    offsets (out, in / group) float16, or None: symmetric
    They are buffers and never cast. What a device's kernel wants in another form is made from them, never saved.
    """
    def __init__(self, q, scales, bias=None, offsets=None):
        super().__init__()
        self.out_features, self.in_features = len(q), q.shape[1] * 8 // self.bits
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", offsets)
        self.register_parameter("bias", bias)
        self.layer = None                             # what KERNELS call a layer

    @classmethod
    def empty(cls, n_in, n_out, bias=False, **spec):
        """A layer whose tensors are still to be filled. Raises UserError or TypeError for a spec that does not fit."""
        groups = n_in // cls.group(n_in, **spec)
        return cls(torch.empty(n_out, n_in * cls.bits // 8, dtype=cls.stored),
                   torch.empty(n_out, groups, dtype=torch.float16), nn.Parameter(torch.empty(n_out)) if bias else None,
                   torch.empty(n_out, groups, dtype=torch.float16) if spec.get("asymmetric") else None)

    @classmethod
    def from_dense(cls, layer, **spec):
        """The weights of an nn.Linear, or the table of an nn.Embedding, rounded to nearest. Raises as `empty` does."""
        group, offsets = cls.group(layer.weight.shape[1], **spec), None
        if spec.get("asymmetric"):
            scales, offsets = minmax_grid(layer.weight, cls.bits, group)
        else:
            scales = absmax_scales(layer.weight, cls.bits, group)
        integers = rounded(layer.weight, scales, cls.bits, offsets)
        return cls.from_integers(integers, scales, getattr(layer, "bias", None), offsets)

    @classmethod
    def from_integers(cls, integers, scales, bias=None, offsets=None):
        """From what another algorithm chose: integers int8 (out, in), scales and offsets float16 (out, in / group)."""
        return cls(cls.pack(integers), scales, bias, offsets)

    def integers(self):
        """(int8 (out, in), float16 scales (out, in / group))."""
        return self.unpack(self.q), self.scales

    def dense(self):
        """The weight, float32 (out, in)."""
        return dequantized(*self.integers(), self.offsets)

    def rows(self, ids):
        """Rows of the weight, float32 (*ids.shape, in)."""
        if ids.numel() < 8 and self.q.device.type == "cpu" and kernels()[0] is not None:
            ids, y = ids.contiguous(), torch.empty(*ids.shape, self.in_features)
            if kernels()[0].gather(self.described(), ids.data_ptr(), ids.numel(), y.data_ptr()):
                raise IndexError(f"ids {ids.tolist()} are not all rows of a table of {self.out_features}")
            return y
        offsets = None if self.offsets is None else self.offsets[ids]
        return dequantized(self.unpack(self.q[ids]), self.scales[ids], offsets)

    def forward(self, x):
        if not x.requires_grad and in_c(x, self.bias):
            return multiply(kernels()[0], self.described(), x)
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    def described(self):
        """What KERNELS call a layer; made anew when the tensors have moved."""
        if self.layer is None or self.layer[0] != self.q.data_ptr() or (self.bias is not None and
                                                                        self.layer[3] != self.bias.data_ptr()):
            self.layer = c_layer(self)
        return self.layer

    def _apply(self, fn, recurse=True):
        scales, offsets = self.scales, self.offsets
        super()._apply(fn, recurse)
        self.layer = None                             # its pointers are old
        self.scales = scales.to(self.q.device)        # model.to(bfloat16) would round them
        self.offsets = None if offsets is None else offsets.to(self.q.device)
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
    """4 bits: integers -7..7, two in a byte, one scale for each `group` of 32, 64 or 128 inputs; if asymmetric -8..7,
    with an offset beside each scale."""
    bits, stored, GROUPS = 4, torch.uint8, (32, 64, 128)

    @classmethod
    def group(cls, n_in, group=32, asymmetric=False):
        if group not in cls.GROUPS or n_in % group:
            fit = [str(g) for g in cls.GROUPS if n_in % g == 0]
            raise UserError(f"int4 in groups of {group} does not fit rows of {n_in}; "
                            + (f"groups that fit: {', '.join(fit)}" if fit else "none of 32, 64, 128 does: use int8"))
        return group

    @staticmethod
    def pack(integers):
        """int8 (..., in) in -8..7 to uint8 (..., in / 2): the even ones in the low nibble, each as integer + 8."""
        q = (integers + 8).to(torch.uint8)
        return q[..., 0::2] | q[..., 1::2] << 4

    @staticmethod
    def unpack(q):
        return torch.stack((q & 15, q >> 4), dim=-1).flatten(-2).to(torch.int8) - 8


class LowRankLinear(nn.Module):
    """A weight (out, in) as the product of two thin ones, `up` (out, rank) after `down` (rank, in): both are layers of
    their own, which may be quantized in turn."""
    def __init__(self, down, up):
        super().__init__()
        self.down, self.up = down, up

    @classmethod
    def empty(cls, n_in, n_out, bias=False, rank=0):
        """A layer whose tensors are still to be filled. Raises UserError for a rank that cannot be."""
        if type(rank) is not int or not 1 <= rank <= min(n_in, n_out):
            raise UserError(f"a weight of {n_out} x {n_in} has a rank from 1 to {min(n_in, n_out)}, not {rank!r}")
        return cls(nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=bias))

    @classmethod
    def from_factors(cls, up, down, bias=None):
        """From weights up (out, rank) and down (rank, in) that another algorithm chose."""
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


class QuantEmbedding(nn.Module):
    """Rows of a quantized table, gathered and dequantized: float32. A tied one's table is the head, the same object."""
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table.rows(ids)


# ---------------------------------------------------------------------------------------------------------------------
# What a CPU does faster in C: products with quantized weights, y = x @ weight^T + bias; what lies between products, for
# training too; and all blocks of a model for a few tokens, which is what generation needs. A compiler is not needed:
# without one the modules below do it all, and each use of a quantized layer dequantizes all of its weight, which is
# slower than the dense one.
#
# For quantized layers the activations are rounded too, to 8 bits with a scale for each 32 neighbours (as llama.cpp's
# Q8_0): products of integers are what a CPU is fast at. One scale for a whole token would be simpler and costs quality,
# as a few channels are a thousand times the rest. GNU vector types compile for any CPU; only `dot`, `widen` and
# `nibbles` have a faster form where there is one.

KERNELS = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
typedef int8_t  i8  __attribute__((vector_size(16)));
typedef int16_t i16 __attribute__((vector_size(32)));      /* 8 pairs of neighbours */
typedef int16_t s16 __attribute__((vector_size(16)));
typedef int32_t i32 __attribute__((vector_size(32)));
typedef float   f32 __attribute__((vector_size(32)));
typedef struct layer { const void *q; const uint16_t *scales, *offsets; const float *bias; int64_t n, k, group, bits;
                       const struct layer *first; } layer;       /* 32 bits: float; first: low rank's other half */
typedef struct { int16_t *q; float *scales, *sums; int64_t groups; } rounded;      /* x: (m, k), (m, k / 32) */
typedef struct { int16_t *q; float *scales, *offsets; } panel;   /* 16 rows of a weight: (k / 2, 16, 2), (k / 32, 16) */

INLINE i32 dot(i32 sum, i16 a, i16 b) {                    /* sum[i] + a[2i] b[2i] + a[2i+1] b[2i+1] */
#if defined __AVX512VNNI__ && defined __AVX512VL__
    return (i32)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined __AVX2__
    return sum + (i32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    i32 x = (i32)a, y = (i32)b;
    return sum + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

INLINE i16 load(const int16_t *p) { i16 v; memcpy(&v, p, 32); return v; }

INLINE i16 widen(const uint8_t *p) {                       /* 16 signed bytes */
    i8 v;
    memcpy(&v, p, 16);
#ifdef __AVX2__
    return (i16)_mm256_cvtepi8_epi16((__m128i)v);          /* one instruction; gcc makes four of the line below */
#else
    return __builtin_convertvector(v, i16);
#endif
}

INLINE float total(f32 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

INLINE float half(const uint16_t *p, const layer *l, int64_t row, int64_t g) {     /* float16 scale or offset, exact */
    uint16_t h = p[row * (l->k / l->group) + (l->bits == 8 ? 0 : g * 32 / l->group)];
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13 | (uint32_t)(h & 0x8000) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f * 0x1p112f;
}

/* A row of x: 8-bit integers and a scale for each group of 32. For a panel they are kept in 16 bits; otherwise, for
   4-bit weights, a group's even ones come first, as the low nibbles hold those. */
static void quantize(const float *x, const layer *l, rounded a, int64_t r, int panels) {
    for (int64_t g = 0; g < a.groups; g++) {
        f32 v[4] = {0}, sum = {0};
        if (l->k - 32 * g >= 32) memcpy(v, x + r * l->k + 32 * g, 128);
        else memcpy(v, x + r * l->k + 32 * g, 4 * (l->k - 32 * g));
        i32 top = {0};
        for (int j = 0; j < 4; j++) {                      /* without their sign, floats are ordered like integers */
            i32 bits = (i32)v[j] & 0x7fffffff, more = bits > top;
            top = (bits & more) | (top & ~more);
        }
        int32_t most = 0;
        for (int i = 0; i < 8; i++) most = top[i] > most ? top[i] : most;
        float largest, scale;
        memcpy(&largest, &most, 4);
        scale = largest / 127;
        int16_t q[32];
        int8_t *out = (int8_t *)a.q + (r * a.groups + g) * 32;
        for (int j = 0; j < 4; j++) {                      /* the last bits of 1.5 * 2^23 + v are round(v) */
            i32 near = (i32)(v[j] * (largest > 0 ? 127 / largest : 0) + 0x1.8p23f) - 0x4b400000;
            s16 narrow = __builtin_convertvector(near, s16);
            memcpy(q + 8 * j, &narrow, 16);
            sum += __builtin_convertvector(near, f32);
        }
        a.scales[r * a.groups + g] = scale;
        a.sums[r * a.groups + g] = scale * total(sum);
        if (panels) memcpy(a.q + (r * a.groups + g) * 32, q, sizeof q);
        else if (l->bits == 8) for (int i = 0; i < 32; i++) out[i] = q[i];
        else for (int i = 0; i < 16; i++) { out[i] = q[2 * i]; out[16 + i] = q[2 * i + 1]; }
    }
}

/* Scales or offsets of 8 groups of a row, from g on; past the last one anything. */
INLINE f32 halves(const uint16_t *p, const layer *l, int64_t row, int64_t g) {
    s16 v;
    int64_t in_row = l->k / l->group, at = row * in_row + g;
    if (l->group == 32 && at + 8 <= l->n * in_row) memcpy(&v, p + at, 16);
    else for (int64_t i = 0; i < 8; i++) v[i] = p[row * in_row + ((g + i) * 32 < l->k ? (g + i) * 32 / l->group : 0)];
    i32 bits = __builtin_convertvector(v, i32);
    return (f32)((bits & 0x7fff) << 13 | (bits & 0x8000) << 16) * 0x1p112f;
}

/* Of 32 weights and a group of x: sums of products of 4. A weight's low four bits count from -8 up here from 0. */
INLINE i32 nibbles(const uint8_t *w, const int8_t *x) {
#ifdef __AVX2__
    __m128i v = _mm_loadu_si128((const __m128i *)w);
    __m256i both = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
    __m256i pairs = _mm256_maddubs_epi16(both, _mm256_loadu_si256((const __m256i *)x));
    return (i32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    i16 v = widen(w);
    return dot(dot((i32){0}, v & 15, widen((const uint8_t *)x)), (v >> 4) & 15, widen((const uint8_t *)x + 16));
#endif
}

/* A row of x times `height` rows of the weight, as these lie in memory: generation, where reading them is the limit. */
INLINE void by_row(const layer *l, rounded a, int64_t r, int64_t n, int height, int bits, float *y, int add) {
    f32 sum[4] = {0}, offset[4] = {0};
    const float *scales = a.scales + r * a.groups, *sums = a.sums + r * a.groups;
    for (int64_t g = 0; g < a.groups; g += 8) {
        int64_t count = a.groups - g < 8 ? a.groups - g : 8;
        float scale[4][8];
        if (bits == 4) {
            f32 s, sum8;
            memcpy(&s, scales + g, 32), memcpy(&sum8, sums + g, 32);
            sum8 = (f32)((i32)sum8 & ((i32){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)count));
            UNROLL for (int c = 0; c < height; c++) {
                f32 its = halves(l->scales, l, n + c, g), product = its * s;
                memcpy(scale[c], &product, 32);
                offset[c] += (l->offsets ? halves(l->offsets, l, n + c, g) - 8 * its : -8 * its) * sum8;
            }
        }
        for (int64_t i = 0; i < count; i++) {
            const int8_t *x = (const int8_t *)a.q + (r * a.groups + g + i) * 32;
            i16 x0 = widen((const uint8_t *)x), x1 = widen((const uint8_t *)x + 16);
            UNROLL for (int c = 0; c < height; c++) {
                const uint8_t *w = (const uint8_t *)l->q + (n + c) * l->k * bits / 8 + (g + i) * 4 * bits;
                __builtin_prefetch(w + height * l->k * bits / 8);
                i32 products = bits == 4 ? nibbles(w, x) : dot(dot((i32){0}, widen(w), x0), widen(w + 16), x1);
                sum[c] += __builtin_convertvector(products, f32) * (bits == 4 ? scale[c][i] : scales[g + i]);
            }
        }
    }
    UNROLL for (int c = 0; c < height; c++)
        y[r * l->n + n + c] = total(sum[c]) * (bits == 8 ? half(l->scales, l, n + c, 0) : 1) + total(offset[c])
                              + (l->bias ? l->bias[n + c] : 0) + (add ? y[r * l->n + n + c] : 0);
}

INLINE void by_float_row(const layer *l, const float *x, int64_t n, int height, float *y, int add) {
    f32 sum[4] = {0}, more[4] = {0}, v, u;
    float rest[4] = {0};
    const float *w = (const float *)l->q + n * l->k;
    int64_t i = 0;
    for (; i + 16 <= l->k; i += 16) {
        memcpy(&v, x + i, 32);
        UNROLL for (int c = 0; c < height; c++) { memcpy(&u, w + c * l->k + i, 32); sum[c] += u * v; }
        memcpy(&v, x + i + 8, 32);
        UNROLL for (int c = 0; c < height; c++) { memcpy(&u, w + c * l->k + i + 8, 32); more[c] += u * v; }
    }
    for (; i < l->k; i++) for (int c = 0; c < height; c++) rest[c] += w[c * l->k + i] * x[i];
    for (int c = 0; c < height; c++)
        y[n + c] = total(sum[c] + more[c]) + rest[c] + (l->bias ? l->bias[n + c] : 0) + (add ? y[n + c] : 0);
}

/* m rows of x, or of what they are rounded to, times rows n ... end - 1 of the weight. Several rows of x share four
   that are loaded, and the scales of 4-bit ones are read for four; else memory is read fastest in one stream. */
static void by_rows(const layer *l, const float *x, rounded a, int64_t m, int64_t n, int64_t end, float *y, int add) {
    int64_t fours = m > 1 || l->bits == 4 ? n + (end - n) / 4 * 4 : n;
    for (; n < fours; n += 4) for (int64_t r = 0; r < m; r++)
        if (l->bits == 32) by_float_row(l, x + r * l->k, n, 4, y + r * l->n, add);
        else if (l->bits == 8) by_row(l, a, r, n, 4, 8, y, add);
        else by_row(l, a, r, n, 4, 4, y, add);
    for (; n < end; n++) for (int64_t r = 0; r < m; r++)
        if (l->bits == 32) by_float_row(l, x + r * l->k, n, 1, y + r * l->n, add);
        else if (l->bits == 8) by_row(l, a, r, n, 1, 8, y, add);
        else by_row(l, a, r, n, 1, 4, y, add);
}

static void fill(const layer *l, int64_t groups, int64_t n, panel p) {
    for (int64_t c = 0; c < 16; c++) {
        int64_t row = n + c < l->n ? n + c : l->n - 1;
        const uint8_t *w = (const uint8_t *)l->q + row * l->k * l->bits / 8;
        for (int64_t i = 0; i < groups * 16; i++) {        /* past the end of a row: zeros */
            int8_t low = 2 * i >= l->k ? 0 : l->bits == 4 ? (w[i] & 15) - 8 : (int8_t)w[2 * i];
            int8_t high = 2 * i + 1 >= l->k ? 0 : l->bits == 4 ? (w[i] >> 4) - 8 : (int8_t)w[2 * i + 1];
            int16_t pair[2] = {low, high};
            memcpy(p.q + (i * 16 + c) * 2, pair, 4);
        }
        for (int64_t g = 0; g < groups; g++) {
            p.scales[g * 16 + c] = half(l->scales, l, row, g);
            if (l->offsets) p.offsets[g * 16 + c] = half(l->offsets, l, row, g);
        }
    }
}

/* `height` rows of x times a panel: many rows share each weight that is loaded. */
INLINE void by_panel(const layer *l, rounded a, int64_t r, panel p, int64_t n, int height, float *y) {
    f32 out[6][2] = {0};
    for (int64_t g = 0; g < a.groups; g++) {
        i32 sum[6][2] = {0};
        _Pragma("GCC unroll 1") for (int i = 0; i < 16; i++) {
            i16 w0 = load(p.q + g * 512 + 32 * i), w1 = load(p.q + g * 512 + 32 * i + 16);
            UNROLL for (int h = 0; h < height; h++) {
                int32_t pair;
                memcpy(&pair, a.q + ((r + h) * a.groups + g) * 32 + 2 * i, 4);
                sum[h][0] = dot(sum[h][0], w0, (i16)(pair - (i32){0}));
                sum[h][1] = dot(sum[h][1], w1, (i16)(pair - (i32){0}));
            }
        }
        UNROLL for (int h = 0; h < height; h++) UNROLL for (int j = 0; j < 2; j++) {
            f32 scale = *(f32 *)(p.scales + g * 16 + 8 * j) * a.scales[(r + h) * a.groups + g];
            out[h][j] += __builtin_convertvector(sum[h][j], f32) * scale;
            if (l->offsets) out[h][j] += *(f32 *)(p.offsets + g * 16 + 8 * j) * a.sums[(r + h) * a.groups + g];
        }
    }
    for (int h = 0; h < height; h++) for (int c = 0; c < 16 && n + c < l->n; c++)
        y[(r + h) * l->n + n + c] = out[h][c / 8][c % 8] + (l->bias ? l->bias[n + c] : 0);
}

INLINE f32 take(const float *x, int64_t n, float rest) {                 /* 8 numbers; if n < 8, so many and `rest` */
    f32 v = rest - (f32){0};
    if (n >= 8) memcpy(&v, x, 32);
    else memcpy(&v, x, 4 * n);
    return v;
}

INLINE void put(float *y, int64_t n, f32 v) {
    if (n >= 8) memcpy(y, &v, 32);
    else memcpy(y, &v, 4 * n);
}

INLINE f32 exponential(f32 x) {              /* 2^whole * e^part: the sixth Taylor polynomial, |part| <= ln(2) / 2 */
    i32 large = x > 88;
    x = (f32)(((i32)x & ~large) | ((i32)(88 - (f32){0}) & large));
    f32 near = x * 0x1.715476p0f + 0x1.8p23f, whole = near - 0x1.8p23f;
    f32 part = x - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f, sum = part * (1 / 720.f) + 1 / 120.f;
    sum = ((((sum * part + 1 / 24.f) * part + 1 / 6.f) * part + 0.5f) * part + 1) * part + 1;
    i32 power = ((i32)near - 0x4b400000 + 127) << 23;
    return (f32)((i32)(sum * (f32)power) & ~(x <= -87));                                             /* NaN stays NaN */
}

/* y = x / rms(x) * weight, rows of n: PyTorch needs six operators, a third of the time of a small model's token. */
static void normalize(const float *x, const float *weight, float eps, int64_t n, float *y) {
    f32 squares = {0}, v;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) { memcpy(&v, x + i, 32); squares += v * v; }
    float sum = total(squares);
    for (; i < n; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / n + eps);
    for (i = 0; i < n; i += 8) put(y + i, n - i, take(x + i, n - i, 0) * scale * take(weight + i, n - i, 0));
}

void rms_norm(const float *x, const float *weight, float eps, int64_t m, int64_t n, float *y) {
    #pragma omp parallel for if (m * n > 100000)
    for (int64_t r = 0; r < m; r++) normalize(x + r * n, weight, eps, n, y + r * n);
}

/* Rows of a quantized table as floats, (m, k). Returns 1 if there is no such row. */
int gather(const layer *l, const int64_t *ids, int64_t m, float *y) {
    for (int64_t r = 0; r < m; r++) if (ids[r] < 0 || ids[r] >= l->n) return 1;
    for (int64_t r = 0; r < m; r++) for (int64_t i = 0, k = l->k; i < k; i++) {
        const uint8_t *w = (const uint8_t *)l->q + ids[r] * k * l->bits / 8;
        int integer = l->bits == 8 ? (int8_t)w[i] : (w[i / 2] >> i % 2 * 4 & 15) - 8;
        y[r * k + i] = integer * half(l->scales, l, ids[r], i / 32)
                       + (l->offsets ? half(l->offsets, l, ids[r], i / 32) : 0);
    }
    return 0;
}

/* y (m, n) = x (m, k) @ weight (n, k)^T + bias. Returns 1 if there is no memory. */
int linear(const layer *l, const float *x, int64_t m, float *y) {
    int64_t groups = (l->k + 31) / 32;
    if (!m) return 0;
    int panels = l->bits < 32 && (m >= 8 || l->k % 32), failed = 0;       /* by_row would read past an odd row's end */
    char *memory = aligned_alloc(64, (m * groups * 72 + 128) / 64 * 64);
    if (!memory) return 1;
    rounded a = {(int16_t *)memory, (float *)(memory + m * groups * 64), (float *)(memory + m * groups * 68), groups};
    #pragma omp parallel if (m * l->n * l->k > 100000)
    {
        #pragma omp for
        for (int64_t r = 0; r < (l->bits < 32 ? m : 0); r++) quantize(x, l, a, r, panels);
        char *buffer = panels ? aligned_alloc(64, groups * 1152) : NULL;
        panel p = {0};
        if (buffer) {
            p = (panel){(int16_t *)buffer, (float *)(buffer + groups * 1024), (float *)(buffer + groups * 1088)};
        } else if (panels) {
            #pragma omp atomic write
            failed = 1;
        }
        #pragma omp for
        for (int64_t n = 0; n < l->n; n += 16) {
            int64_t r = 0, end = n + 16 < l->n ? n + 16 : l->n;
            if (buffer) fill(l, groups, n, p);
            for (; buffer && r + 6 <= m; r += 6) by_panel(l, a, r, p, n, 6, y);
            for (; buffer && r < m; r++) by_panel(l, a, r, p, n, 1, y);
            if (!panels) by_rows(l, x, a, m, n, end, y, 0);
        }
        free(buffer);
    }
    free(memory);
    return failed;
}

/* All blocks for a few new tokens, by one team of threads: for one token, calling PyTorch's operators takes longer
   than their work. Threads meet at barriers; what each needs whole, a norm or rounded activations, it makes itself. */

typedef struct { const float *attention_norm, *q_norm, *k_norm, *mlp_norm;
                 const layer *q, *k, *v, *o, *gate, *up, *down; float *keys, *values; int64_t window; } block;
typedef struct { int64_t id, team, m, turn, size; const float *of; int64_t bits; rounded a;    /* of, rounded: a */
                 float *x, *scores, *shared; } own;

/* y (m, n) = or += x (m, k) @ weight^T + bias: this thread's part of the n. */
static void apply(const layer *l, const float *x, float *y, int add, own *w) {
    if (l->first) {
        float *h = w->shared + (w->turn ^= 1) * w->size;             /* a slow thread may still read the last one */
        apply(l->first, x, h, 0, w);
        #pragma omp barrier
        w->of = NULL;
        x = h;
    }
    if (l->bits < 32 && (w->of != x || w->bits != l->bits)) {
        w->a.groups = l->k / 32;
        for (int64_t r = 0; r < w->m; r++) quantize(x, l, w->a, r, 0);
        w->of = x, w->bits = l->bits;
    }
    int64_t fours = (l->n + 3) / 4, n = fours * w->id / w->team * 4, end = fours * (w->id + 1) / w->team * 4;
    by_rows(l, x, w->a, w->m, n, end < l->n ? end : l->n, y, add);
}

INLINE f32 gated(const float *gate, const float *up, int64_t n) {                 /* SwiGLU: silu(gate) * up */
    f32 g = take(gate, n, 0);
    return g / (1 + exponential(-g)) * take(up, n, 0);
}

/* A head's q or k (D): normalized, and channels i and i + R turned by the angles of its position. */
static void place(float *x, const float *weight, float eps, int64_t D, const float *cosines, const float *sines,
                  int64_t R) {
    if (weight) normalize(x, weight, eps, D, x);
    for (int64_t i = 0; i < R; i++) {
        float a = x[i], b = x[i + R];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + R] = b * cosines[i] + a * sines[i];
    }
}

/* q (D) = softmax(q k^T / sqrt(D)) v over `count` positions. */
static void attend(float *q, const float *keys, const float *values, int64_t count, int64_t D, float *scores) {
    layer l = {.q = keys, .k = D, .bits = 32};
    int64_t p = 0, i = 0;
    for (; p + 4 <= count; p += 4) by_float_row(&l, q, p, 4, scores, 0);
    for (; p < count; p++) by_float_row(&l, q, p, 1, scores, 0);
    float most = -INFINITY, scale = 1 / sqrtf(D), sum = 0;
    for (p = 0; p < count; p++) most = scores[p] > most ? scores[p] : most;
    for (p = 0; p < count; p += 8) {                       /* past the end: nobody reads it */
        f32 v;
        memcpy(&v, scores + p, 32);
        v = exponential((v - most) * scale);
        memcpy(scores + p, &v, 32);
        for (int64_t j = 0; j < 8 && p + j < count; j++) sum += v[j];
    }
    for (; i + 8 <= D; i += 8) {
        f32 y = {0}, v;
        for (p = 0; p < count; p++) { memcpy(&v, values + p * D + i, 32); y += v * scores[p]; }
        y /= sum;
        memcpy(q + i, &y, 32);
    }
    for (; i < D; i++) {
        float y = 0;
        for (p = 0; p < count; p++) y += values[p * D + i] * scores[p];
        q[i] = y / sum;
    }
}

/* x (rows, T, C), the embedded tokens at positions start ... start + T - 1, becomes the normalized hidden states; keys
   and values go into the caches (rows, K, capacity, D). Returns 1 if there is no memory. */
int run_body(const block *all, const int64_t *sizes, const float *frequencies, float rotary_scale, const float *norm,
             float eps, float *x) {
    const int64_t blocks = sizes[0], rows = sizes[1], T = sizes[2], start = sizes[3], capacity = sizes[4], C = sizes[5],
        H = sizes[6], K = sizes[7], D = sizes[8], I = sizes[9], R = sizes[10], widest = sizes[11], m = rows * T,
        shared = m * (H * D + 2 * K * D + 2 * I + 2 * widest) + 2 * T * R,
        private = m * (widest * 2 + widest / 16) + capacity + 64;
    int most = 1;
#ifdef _OPENMP
    most = omp_get_max_threads();
#endif
    float *memory = malloc((shared + most * private) * sizeof(float));
    if (!memory) return 1;
    float *q = memory, *k = q + m * H * D, *v = k + m * K * D, *gate = v + m * K * D, *up = gate + m * I,
        *halves = up + m * I, *cosines = halves + 2 * m * widest, *sines = cosines + T * R;
    for (int64_t i = 0; i < T * R; i++) {
        float angle = (start + i / R) * frequencies[i % R];
        cosines[i] = cosf(angle) * rotary_scale, sines[i] = sinf(angle) * rotary_scale;
    }
    #pragma omp parallel
    {
        own w = {.team = 1, .m = m, .size = m * widest, .shared = halves};
#ifdef _OPENMP
        w.id = omp_get_thread_num(), w.team = omp_get_num_threads();
#endif
        w.x = memory + shared + w.id * private, w.scores = w.x + m * widest;
        w.a = (rounded){(int16_t *)(w.scores + capacity + 8), w.scores + capacity + 8 + m * widest / 2};
        w.a.sums = w.a.scales + m * widest / 32;
        for (const block *b = all; b < all + blocks; b++) {
            for (int64_t r = 0; r < m; r++) normalize(x + r * C, b->attention_norm, eps, C, w.x + r * C);
            w.of = NULL;
            apply(b->q, w.x, q, 0, &w), apply(b->k, w.x, k, 0, &w), apply(b->v, w.x, v, 0, &w);
            #pragma omp barrier
            for (int64_t i = w.id; i < m * (H + K); i += w.team) {             /* i: a position's head of q, or of k */
                int64_t r = i / (H + K), h = i % (H + K), t = r % T;
                float *head = h < H ? q + (r * H + h) * D : k + (r * K + h - H) * D;
                place(head, h < H ? b->q_norm : b->k_norm, eps, D, cosines + t * R, sines + t * R, R);
                if (h < H) continue;
                int64_t to = ((r / T * K + h - H) * capacity + start + t) * D;
                memcpy(b->keys + to, head, D * sizeof(float));
                memcpy(b->values + to, v + (r * K + h - H) * D, D * sizeof(float));
            }
            #pragma omp barrier
            for (int64_t i = w.id; i < m * H; i += w.team) {
                int64_t r = i / H, end = start + r % T + 1, from = b->window && end > b->window ? end - b->window : 0;
                int64_t at = ((r / T * K + i % H / (H / K)) * capacity + from) * D;
                attend(q + i * D, b->keys + at, b->values + at, end - from, D, w.scores);
            }
            #pragma omp barrier
            w.of = NULL;
            apply(b->o, q, x, 1, &w);
            #pragma omp barrier
            for (int64_t r = 0; r < m; r++) normalize(x + r * C, b->mlp_norm, eps, C, w.x + r * C);
            w.of = NULL;
            apply(b->gate, w.x, gate, 0, &w), apply(b->up, w.x, up, 0, &w);
            #pragma omp barrier
            for (int64_t i = 0; i < m * I; i += 8) put(w.x + i, m * I - i, gated(gate + i, up + i, m * I - i));
            w.of = NULL;
            apply(b->down, w.x, x, 1, &w);
            #pragma omp barrier
        }
    }
    for (int64_t r = 0; r < m; r++) normalize(x + r * C, norm, eps, C, x + r * C);
    free(memory);
    return 0;
}

/* Training: what lies between the products, forward and backward, in one pass each. By PyTorch's operators, each a pass
   over the memory, it was a fifth of a small model's step; here it is a twentieth. */

/* From the gradient of y in normalize to that of x, and what it adds to that of the weight. */
static void normalize_backward(const float *x, const float *weight, float eps, const float *grad, int64_t n,
                               float *grad_x, float *grad_weight) {
    f32 squares = {0}, products = {0};
    for (int64_t i = 0; i < n; i += 8) {
        f32 v = take(x + i, n - i, 0);
        squares += v * v, products += v * take(grad + i, n - i, 0) * take(weight + i, n - i, 0);
    }
    float scale = 1 / sqrtf(total(squares) / n + eps), along = total(products) * scale * scale / n;
    for (int64_t i = 0; i < n; i += 8) {
        f32 v = take(x + i, n - i, 0), g = take(grad + i, n - i, 0);
        put(grad_weight + i, n - i, take(grad_weight + i, n - i, 0) + g * v * scale);
        put(grad_x + i, n - i, (g * take(weight + i, n - i, 0) - v * along) * scale);
    }
}

enum { PARTS = 32 };         /* of the rows: each sums its own gradient of a weight, so that threads change no bit */

/* sums: (PARTS, n) zeros */
void rms_norm_backward(const float *x, const float *weight, float eps, int64_t m, int64_t n, const float *grad,
                       float *grad_x, float *sums) {
    #pragma omp parallel for if (m * n > 100000)
    for (int64_t part = 0; part < PARTS; part++) for (int64_t r = m * part / PARTS; r < m * (part + 1) / PARTS; r++)
        normalize_backward(x + r * n, weight, eps, grad + r * n, n, grad_x + r * n, sums + part * n);
}

/* `place` for all heads of q or k: x (B, T, H, D) to y (B, H, T, D); cosines and sines (B or 1, T, R). */
void place_heads(const float *x, const float *weight, float eps, const float *cosines, const float *sines,
                 const int64_t *sizes, float *y) {
    const int64_t B = sizes[0], T = sizes[1], H = sizes[2], D = sizes[3], R = sizes[4], rows = sizes[5];
    #pragma omp parallel for if (B * T * H * D > 100000)
    for (int64_t r = 0; r < B * T; r++) for (int64_t h = 0; h < H; h++) {
        float *to = y + ((r / T * H + h) * T + r % T) * D;
        memcpy(to, x + (r * H + h) * D, D * sizeof(float));
        place(to, weight, eps, D, cosines + r % (rows * T) * R, sines + r % (rows * T) * R, R);
    }
}

/* grad is that of y, and the last three sizes are how far apart its B, H and T are. sums: (PARTS, D) zeros */
void place_heads_backward(const float *x, const float *weight, float eps, const float *cosines, const float *sines,
                          const int64_t *sizes, const float *grad, float *grad_x, float *sums) {
    const int64_t B = sizes[0], T = sizes[1], H = sizes[2], D = sizes[3], R = sizes[4], rows = sizes[5], m = B * T;
    #pragma omp parallel for if (m * H * D > 100000)
    for (int64_t part = 0; part < PARTS; part++)
        for (int64_t r = m * part / PARTS; r < m * (part + 1) / PARTS; r++) for (int64_t h = 0; h < H; h++) {
            const float *g = grad + r / T * sizes[6] + h * sizes[7] + r % T * sizes[8];
            const float *c = cosines + r % (rows * T) * R, *s = sines + r % (rows * T) * R;
            float *to = grad_x + (r * H + h) * D;
            for (int64_t i = 0; i < R; i++) to[i] = g[i] * c[i] + g[i + R] * s[i];
            for (int64_t i = 0; i < R; i++) to[i + R] = g[i + R] * c[i] - g[i] * s[i];
            memcpy(to + 2 * R, g + 2 * R, (D - 2 * R) * sizeof(float));
            if (weight) normalize_backward(x + (r * H + h) * D, weight, eps, to, D, to, sums + part * D);
        }
}

void swiglu(const float *gate, const float *up, int64_t n, float *y) {
    #pragma omp parallel for if (n > 100000)
    for (int64_t i = 0; i < n; i += 8) put(y + i, n - i, gated(gate + i, up + i, n - i));
}

void swiglu_backward(const float *gate, const float *up, int64_t n, const float *grad, float *grad_gate,
                     float *grad_up) {
    #pragma omp parallel for if (n > 100000)
    for (int64_t i = 0; i < n; i += 8) {
        f32 g = take(gate + i, n - i, 0), y = take(grad + i, n - i, 0), open = 1 / (1 + exponential(-g));
        put(grad_gate + i, n - i, y * take(up + i, n - i, 0) * open * (1 + g * (1 - open)));
        put(grad_up + i, n - i, y * g * open);
    }
}

INLINE f32 exponentials(float *x, int64_t n, float most) {
    f32 p = exponential(take(x, n, -INFINITY) - most);
    put(x, n, p);
    return p;
}

/* losses (m): -log p of each row's target, 0 where that is -100. The logits (m, V) become their gradient, p - one-hot,
   while a row is in the cache. Returns 1 if a target is no id. */
int cross_entropy(float *logits, const int64_t *targets, int64_t m, int64_t V, float *losses) {
    for (int64_t r = 0; r < m; r++) if (targets[r] != -100 && (targets[r] < 0 || targets[r] >= V)) return 1;
    #pragma omp parallel for if (m * V > 100000)
    for (int64_t r = 0; r < m; r++) {
        float *x = logits + r * V, most = -INFINITY;
        f32 top[4], v, sum = {0};
        int64_t i = 0;
        if (targets[r] == -100) { memset(x, 0, V * sizeof(float)), losses[r] = 0; continue; }
        for (int j = 0; j < 4; j++) top[j] = most - (f32){0};
        for (; i + 32 <= V; i += 32) UNROLL for (int j = 0; j < 4; j++) {
            memcpy(&v, x + i + 8 * j, 32);
            i32 more = v > top[j];
            top[j] = (f32)(((i32)v & more) | ((i32)top[j] & ~more));
        }
        for (; i < V; i++) most = fmaxf(most, x[i]);
        for (int j = 0; j < 32; j++) most = fmaxf(most, top[j / 8][j % 8]);
        float right = x[targets[r]];
        for (i = 0; i + 8 <= V; i += 8) sum += exponentials(x + i, 8, most);
        if (i < V) sum += exponentials(x + i, V - i, most);
        float all = total(sum), scale = 1 / all;
        for (i = 0; i < V; i++) x[i] *= scale;
        x[targets[r]] -= 1;
        losses[r] = logf(all) + most - right;
    }
    return 0;
}
"""


@functools.cache
def kernels():
    """(KERNELS compiled for this CPU, or None; how quantized layers multiply on it, as text).

    The library is built once, in about a second, and kept in the user's cache directory: never in a model's, so that a
    stranger's model cannot bring machine code along. It is trusted only in a directory that nobody else can write.
    """
    slow = "weights dequantized at each use: "
    compilers = dict.fromkeys(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "cc", "gcc", "clang"))))
    if os.name != "posix" or not compilers:
        return None, slow + "there is no C compiler"
    cpu = [platform.machine(), platform.processor()]               # what -march=native depends on
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    key = hashlib.sha256(repr((KERNELS, cpu)).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "small-language-models"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if cache.stat().st_uid != os.getuid() or cache.stat().st_mode & 0o022 or not os.access(cache, os.W_OK):
            raise PermissionError
        scratch = contextlib.nullcontext(cache)
    except (OSError, RuntimeError):                                # RuntimeError: a user without a home
        scratch = tempfile.TemporaryDirectory()
    with scratch as directory:
        library = built_library(Path(directory), key) or build_library(Path(directory), key, compilers)
    if library is None:
        return None, slow + f"{next(iter(compilers))} could not build the kernels"
    weight = torch.arange(20 * 64, device="cpu").view(20, 64) % 15 - 7
    probe = Int4Linear.from_integers(weight.to(torch.int8), torch.ones(20, 2, dtype=torch.float16, device="cpu"))
    x = torch.arange(8 * 64, dtype=torch.float32, device="cpu").sin().view(8, 64)
    for rows in (x[:1], x):                           # an instruction set we could not test on must not go unnoticed
        if not (multiply(library, c_layer(probe), rows) - rows @ probe.dense().T).abs().max() < 1:
            return None, slow + "the compiled kernels failed their check on this CPU"
    return library, "compiled C, activations rounded to 8 bits in groups of 32"


def built_library(directory, key):
    """The library that build_library left in a directory, or None. Its name holds a hash of its bytes: what a full disk
    or a power cut shortened is never loaded (that would end the process). Nor is a file that another user owns or can
    write."""
    for file in directory.glob(f"kernels-{key}-*.so"):
        with contextlib.suppress(OSError, AttributeError):
            about = file.lstat()                      # who else can write it could let it do anything
            if about.st_uid != os.getuid() or about.st_mode & 0o022 or not stat.S_ISREG(about.st_mode):
                continue
            if hashlib.sha256(file.read_bytes()).hexdigest()[:16] == file.stem.rpartition("-")[2]:
                return declare(ctypes.CDLL(str(file)))
    return None


def build_library(directory, key, compilers):
    """KERNELS by the first of `compilers` that can, left in a directory for the next time; None: none can."""
    print("compiling a few kernels for this CPU, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=directory) as build:
        source, built = Path(build) / "kernels.c", Path(build) / "kernels.so"
        source.write_text(KERNELS, encoding="utf-8")
        for compiler in compilers:
            for flags in (["-march=native", "-fopenmp"], ["-march=native"], []):                # not all have all
                with contextlib.suppress(OSError, AttributeError, subprocess.CalledProcessError):
                    subprocess.run([compiler, "-O3", "-fPIC", "-shared", *flags, source, "-o", built, "-lm"],
                                   check=True, capture_output=True)
                    library = declare(ctypes.CDLL(str(built)))
                    sync(built)
                    built.chmod(0o755)                # whatever the umask: see built_library
                    digest = hashlib.sha256(built.read_bytes()).hexdigest()[:16]
                    os.replace(built, directory / f"kernels-{key}-{digest}.so")
                    return library
    return None


def declare(library):
    """Tells ctypes what the functions of compiled KERNELS take."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.linear.argtypes = [pointer, pointer, integer, pointer]
    library.rms_norm.argtypes = [pointer, pointer, ctypes.c_float, integer, integer, pointer]
    library.gather.argtypes = [pointer, pointer, integer, pointer]
    library.rms_norm_backward.argtypes = [pointer, pointer, ctypes.c_float, integer, integer, *[pointer] * 3]
    library.place_heads.argtypes = [pointer, pointer, ctypes.c_float, *[pointer] * 4]
    library.place_heads_backward.argtypes = [pointer, pointer, ctypes.c_float, *[pointer] * 6]
    library.swiglu.argtypes = [pointer, pointer, integer, pointer]
    library.swiglu_backward.argtypes = [pointer, pointer, integer, *[pointer] * 3]
    library.cross_entropy.argtypes = [pointer, pointer, integer, integer, pointer]
    library.run_body.argtypes = [pointer, pointer, pointer, ctypes.c_float, pointer, ctypes.c_float, pointer]
    return library


def c_layer(m):
    """An nn.Linear, QuantLinear or LowRankLinear as the struct `layer` of KERNELS: an array of integers."""
    if isinstance(m, LowRankLinear):
        layer, first = c_layer(m.up), c_layer(m.down)
        layer[8], layer.kept = ctypes.addressof(first), first
        return layer
    quantized = isinstance(m, QuantLinear)
    tensors = (m.q, m.scales, m.offsets, m.bias) if quantized else (m.weight, None, None, m.bias)
    return (ctypes.c_int64 * 9)(*(0 if t is None else t.data_ptr() for t in tensors), m.out_features, m.in_features,
                                m.in_features // m.scales.shape[1] if quantized else m.in_features,
                                m.bits if quantized else 32)


def multiply(library, layer, x):
    """x (..., in) float32 @ weight^T + bias, (..., out), by KERNELS; `layer` is what c_layer made."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], layer[4])
    if library.linear(layer, x.data_ptr(), x.numel() // layer[5], y.data_ptr()):
        raise MemoryError("no memory for the activations of a layer")
    return y


LAYER_TYPES = (nn.Linear, Int8Linear, Int4Linear, LowRankLinear)


def c_blocks(body, cache):
    """Arguments of run_body of KERNELS for a Body and a KVCache, and the objects whose memory they name:
    ((table of blocks, sizes), kept). None if KERNELS have no such blocks."""
    c, first = body.config, cache.keys[0]
    parameters = list(body.parameters())
    layers = [getattr(part, name) for block in body.layers for part, names in (
        (block.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
        (block.mlp, ("gate_proj", "up_proj", "down_proj"))) for name in names]
    leaves = [m for m in body.layers.modules() if isinstance(m, (nn.Linear, QuantLinear))]
    if (c.layer_norm or c.learned_positions or not c.gated or c.hidden_act != "silu"
            or any(type(m) not in LAYER_TYPES for m in layers)             # a subclass computes what C does not know
            or any(t.dtype != torch.float32 or not t.is_contiguous() or t.device.type != "cpu"
                   for t in (first, *parameters))
            or any(m.in_features % 32 for m in leaves if isinstance(m, QuantLinear))):
        return None
    table, kept = [], [parameters, list(body.buffers())]
    for i, block in enumerate(body.layers):
        a = block.self_attn
        norms = [m.weight.data_ptr() if isinstance(m, RMSNorm) else 0
                 for m in (block.input_layernorm, a.q_norm, a.k_norm, block.post_attention_layernorm)]
        structs = [c_layer(m) for m in layers[7 * i:7 * i + 7]]
        kept.append(structs)
        table += [*norms, *map(ctypes.addressof, structs), cache.keys[i].data_ptr(), cache.values[i].data_ptr(),
                  c.window(i)]
    widest = -(-max(n for m in leaves for n in (m.in_features, m.out_features)) // 32) * 32
    sizes = [len(body.layers), len(first), 0, 0, first.shape[2], c.hidden_size, c.num_attention_heads,
             c.num_key_value_heads, c.head_dim, c.intermediate_size, len(body.frequencies), widest]
    return ((ctypes.c_int64 * len(table))(*table), (ctypes.c_int64 * len(sizes))(*sizes)), kept


def hooks_of(body):
    """The dicts in which PyTorch keeps hooks on the forward passes of a Body's modules: empty where there are none."""
    everywhere = nn.modules.module
    return [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks,
            *(hooks for m in body.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))]


def attach_c(body, cache, x, expected):
    """Lets KERNELS take over after the first pass over a text, if they find what the model's own blocks found.

    x         (B, 1, C) embedding of the last token read, for which the cache has keys and values already
    expected  (B, 1, C) hidden states that the blocks of this file, changed or not, made of it

    KERNELS read that token once more. Where they differ, or where a module has a hook, one sentence says so and PyTorch
    goes on alone: a change of Attention, MLP or Block is heard in each token.
    """
    if torch.is_grad_enabled() or body.training or not in_c(x, body.norm.weight) or len(x) != len(cache.keys[0]):
        return                                        # the next pass may ask again
    cache.in_c = False
    if not expected.isfinite().all():                 # said elsewhere
        return
    hooks, blocks, differs = hooks_of(body), c_blocks(body, cache), False
    if blocks is not None and not any(hooks):
        last = cache.length - 1
        kept = [(t, t[:, :, last].clone()) for t in (*cache.keys, *cache.values)]
        found = x.clone(memory_format=torch.contiguous_format)
        run_blocks(body, blocks, found, last)
        for t, values in kept:
            t[:, :, last] = values
        # Floats agree to 1e-6. An ulp may flip the rounding of an activation to 8 bits, and layers amplify that.
        quantized = any(isinstance(m, QuantLinear) for m in body.layers.modules())
        differs = not (found - expected).norm() <= (0.2 if quantized else 1e-3) * expected.norm()
    if any(hooks) or differs:
        why = "a hook is registered on it" if any(hooks) else "its blocks compute something else"
        say_once(f"PyTorch generates, not the C kernels: they do not know this model ({why})")
    elif blocks is not None:
        cache.in_c = body, blocks, hooks


@functools.cache
def say_once(text):
    print(text, file=sys.stderr)


def run_blocks(body, blocks, x, start):
    """Embedded tokens x (B, T, C) at positions from `start` on become, in place, the normalized hidden states."""
    (table, sizes), _ = blocks
    sizes[2:4] = x.shape[1], start
    if kernels()[0].run_body(table, sizes, body.frequencies.data_ptr(), body.rotary_scale, body.norm.weight.data_ptr(),
                             body.norm.eps, x.data_ptr()):
        raise MemoryError("no memory for the activations of a token")


def run_in_c(body, x, cache):
    """Runs all blocks and the final norm on x (B, T, C) in C, in place, behind what the cache holds. Returns False, and
    does nothing, where C does not apply: attach_c has not allowed it, 8 rows or more, gradients, a hook.
    Layers that are replaced in the middle of a text are not seen."""
    B, T, _ = x.shape
    if not cache.in_c or B * T >= 8 or torch.is_grad_enabled() or body.training or not in_c(x, None):
        return False
    its_body, blocks, hooks = cache.in_c
    if its_body is not body or B != len(cache.keys[0]) or cache.length + T > cache.keys[0].shape[2] or any(hooks):
        return False
    run_blocks(body, blocks, x, cache.length)
    return True


def in_c(x, parameter):
    """Whether KERNELS take x and a layer's parameter (or None): float32, on a CPU, and there are any."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and (parameter is None or parameter.dtype == x.dtype)
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and kernels()[0] is not None)


def widened(x):
    """x as float32 where autocast on a CPU has made it bfloat16: KERNELS, and sums of squares, are in float32."""
    narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return x.float() if narrow else x


def set_threads(count):
    """Makes PyTorch and KERNELS compute with `count` threads."""
    torch.set_num_threads(count)
    if hasattr(library := kernels()[0], "omp_set_num_threads"):      # some builds of PyTorch have their own OpenMP
        library.omp_set_num_threads(count)


def call(name, *args):
    """What a function of KERNELS returns for tensors (contiguous, float32), sizes and numbers."""
    return getattr(kernels()[0], name)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args))


class NormInC(torch.autograd.Function):
    """RMSNorm of x (..., n) by KERNELS."""
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        y = torch.empty_like(x)
        ctx.save_for_backward(x, weight)
        ctx.sizes = eps, x.numel() // len(weight), len(weight)
        call("rms_norm", x, weight, *ctx.sizes, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight), n = ctx.saved_tensors, ctx.sizes[2]
        grad_x, sums = torch.empty_like(x), x.new_zeros(32, n)                  # 32: PARTS
        call("rms_norm_backward", x, weight, *ctx.sizes, grad.contiguous(), grad_x, sums)
        return grad_x, sums.sum(0), None


class HeadsInC(torch.autograd.Function):
    """Heads x (B, T, H, D) by KERNELS: RMSNorm if there is a weight, turned by cos and sin as `rotate` does, as
    (B, H, T, D)."""
    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        (B, T, H, D), x = x.shape, x.contiguous()
        y = x.new_empty(B, H, T, D)
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps, ctx.sizes = eps, (*x.shape, cos.shape[-1], len(cos))
        call("place_heads", x, weight, eps, cos, sin, (ctypes.c_int64 * 6)(*ctx.sizes), y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight, cos, sin), grad = ctx.saved_tensors, grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_x, sums = torch.empty_like(x), x.new_zeros(32, x.shape[-1])
        call("place_heads_backward", x, weight, ctx.eps, cos, sin,
             (ctypes.c_int64 * 9)(*ctx.sizes, *grad.stride()[:3]), grad, grad_x, sums)
        return grad_x, None if weight is None else sums.sum(0), None, None, None


class SwiGLUInC(torch.autograd.Function):
    """silu(gate) * up by KERNELS."""
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        call("swiglu", gate, up, gate.numel(), y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", gate, up, grad.numel(), grad.contiguous(), grad_gate, grad_up)
        return grad_gate, grad_up


# ---------------------------------------------------------------------------------------------------------------------
# The transformer. B rows, T positions, C hidden_size, H query heads, K key-value heads, D head_dim, V vocab_size

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich, 2019)."""
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x = widened(x)
        if in_c(x, self.weight):
            return NormInC.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def norm(config, size=None):
    if config.layer_norm:
        return nn.LayerNorm(size or config.hidden_size, config.rms_norm_eps)
    return RMSNorm(size or config.hidden_size, config.rms_norm_eps)


def rotate(x, cos, sin):
    """Turns channel pairs (i, i + R/2) of x (B, T, heads, D) by their positions' angles; cos, sin: (B or 1, T, 1, R/2).

    Only the first R channels turn (R < D: partial rotary), in the Hub's half-and-half order.
    """
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half:2 * half]
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat(turned if 2 * half == x.shape[-1] else (*turned, x[..., 2 * half:]), dim=-1)


def placed(x, norm, rotary):
    """Heads of q or k (B, T, heads, D), normalized by `norm` and turned, as (B, heads, T, D)."""
    x, weight = widened(x), getattr(norm, "weight", None)
    if rotary is not None and not isinstance(norm, nn.LayerNorm) and in_c(x, weight):
        return HeadsInC.apply(x, weight, getattr(norm, "eps", 0.0), *rotary)
    x = norm(x)
    return (x if rotary is None else rotate(x, *rotary)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        c, self.layer, self.head_dim = config, layer, config.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = norm(c, c.head_dim) if c.qk_norm else nn.Identity()
        self.k_norm = norm(c, c.head_dim) if c.qk_norm else nn.Identity()

    def forward(self, x, rotary, mask, cache):
        B, T, _ = x.shape
        q = placed(self.q_proj(x).view(B, T, -1, self.head_dim), self.q_norm, rotary)              # (B, H, T, D)
        k = placed(self.k_proj(x).view(B, T, -1, self.head_dim), self.k_norm, rotary)              # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                                # (B, K, all positions so far, D)
        if T == 1 and mask is None:
            # One query sees every key, so the H/K queries that share a key-value head can be the rows of one product.
            y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.head_dim), k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                               enable_gqa=bool(q.shape[1] != k.shape[1]))
        y = y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020), or for GPT-2 one layer without a gate."""
    def __init__(self, config):
        super().__init__()
        c, self.act = config, ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias) if c.gated else None
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        gate, up = widened(self.gate_proj(x)), widened(self.up_proj(x))
        if self.act is F.silu and in_c(gate, None):
            return self.down_proj(SwiGLUInC.apply(gate, up))
        return self.down_proj(self.act(gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(0.0)                # train.py --dropout sets its rate; not part of the saved model

    def forward(self, x, rotary, mask, cache):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


def embedding(rows, size):
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

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.frequencies = self.frequencies.to(self.norm.weight.device)              # but it follows to another device
        return self

    def rotary(self, positions):
        """cos and sin of the rotation angles of positions (B or 1, T): (B or 1, T, 1, R/2) each."""
        angles = (positions[..., None].float() * self.frequencies)[:, :, None]
        dtype = self.norm.weight.dtype
        return (angles.cos() * self.rotary_scale).to(dtype), (angles.sin() * self.rotary_scale).to(dtype)

    def mask(self, T, start, window, segments):
        """Where the last T of start + T positions may look: bool (T, start + T) or (B, 1, T, T); None: all before."""
        if segments is None and (start == 0 or T == 1) and not (window and start + T > window):
            return None
        q = torch.arange(start, start + T, device=self.frequencies.device)[:, None]
        k = torch.arange(start + T, device=self.frequencies.device)
        mask = k <= q
        if window:
            mask &= k > q - window
        if segments is not None:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        return mask

    def forward(self, ids, cache=None, segments=None, hidden=None):
        T, start, c = ids.shape[1], cache.length if cache is not None else 0, self.config
        if start + T > c.max_position_embeddings and (c.learned_positions or c.rope["rope_type"] == "longrope"):
            raise UserError(f"{start + T} tokens are more than this model's window of {c.max_position_embeddings}")
        x = self.embed_tokens(ids).to(self.norm.weight.dtype)                    # (B, T, C)
        if cache is not None and segments is None and hidden is None and run_in_c(self, x, cache):
            cache.length += T
            return x
        first, embedded = cache is not None and cache.in_c is None, x[:, -1:]
        positions = torch.arange(start, start + T, device=ids.device)[None]
        if segments is not None:                      # packed examples: positions count from each one's first token
            new = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)                     # (B, T)
            positions = positions - (positions * new).cummax(dim=1).values
        if c.learned_positions:
            x, rotary = x + self.embed_positions(positions), None
        else:
            rotary = self.rotary(positions)
        masks = {w: self.mask(T, start, w, segments) for w in {c.window(i) for i in range(len(self.layers))}}
        for i, layer in enumerate(self.layers):
            if hidden is not None:
                hidden.append(x)
            if self.checkpoint and self.training:     # keeps x alone; the backward pass computes the layer again
                x = checkpoint(layer, x, rotary, masks[c.window(i)], cache, use_reentrant=False)
            else:
                x = layer(x, rotary, masks[c.window(i)], cache)
        if hidden is not None:
            hidden.append(x)
        x = self.norm(x)
        if cache is not None:
            cache.length += T
            if first and segments is None and hidden is None:
                attach_c(self, cache, embedded, x[:, -1:])
        return x


class Transformer(nn.Module):
    """A decoder-only language model: Qwen3's shape (Yang et al., 2025), or that of another family its config names."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.history = []                             # what made this model: written to config.json, oldest first
        self.exits = []                               # layers after which norm and head speak too (distill.py --exits)
        self.compression = []                         # its layers that are not dense, in the order they were replaced
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings and isinstance(self.model.embed_tokens, QuantEmbedding):
            self.lm_head = self.model.embed_tokens.table
        elif self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self):
        """That of activations: of the norms, which are never quantized."""
        return self.model.norm.weight.dtype

    def replace(self, entry, layer=None):
        """Puts a layer where entry, {"module": its name, "kind": of LAYERS, ...spec}, says; notes it in `compression`.

        layer  of that kind; None: one that fits, its tensors still to be filled. In place of an embedding it becomes a
               QuantEmbedding's table; a tied head goes with the embedding and has no entry of its own
        Raises UserError for an entry that does not fit this model.
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

        cache      KVCache holding the tokens before ids; it is extended by them
        segments   (B, T) integers, equal within one example: attention and positions restart where they change
        last       logits of so many last positions only: (B, last, V)
        head       False gives the final hidden states (B, T, C), for losses that never hold all the logits
        hidden     a list; the residual stream before each layer and after the last, (B, T, C) each, is appended to it
        """
        x = self.model(ids, cache, segments, hidden)
        x = x[:, -last:]
        if not head:
            return x
        if (1 < x.shape[0] * x.shape[1] < 8 and type(self.lm_head) is nn.Linear and not torch.is_grad_enabled()
                and not self.lm_head._forward_hooks and not self.lm_head._forward_pre_hooks
                and in_c(x, self.lm_head.weight) and self.lm_head.weight.is_contiguous()):    # read once for all rows
            return multiply(kernels()[0], c_layer(self.lm_head), x)
        return self.lm_head(x)

    @torch.no_grad()
    def initialize(self, generator=None):
        """Random weights: embeddings with std 1, matrices with std 1/sqrt(fan in), which keep the scale of their input.
        The head and the projections that write to the residual stream start at zero: loss ln V, blocks the identity.
        An embedding that is the head too starts small instead."""
        embedding = 0.02 if self.config.tie_word_embeddings else 1.0
        for name, p in self.named_parameters():
            if p.ndim < 2:                            # a vector of another name keeps what its module gave it
                if name.endswith(("norm.weight", "bias")):
                    p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                p.zero_()
            else:
                p.normal_(0.0, embedding if "embed" in name else p.shape[1] ** -0.5, generator=generator)
        return self

    # --- counts ---

    def parameters_count(self):
        """All parameters, tied ones once; quantized weights count, their scales do not."""
        quantized = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, QuantLinear))
        return sum(p.numel() for p in self.parameters()) + quantized

    def matmul_parameters(self):
        """Parameters that multiply each token: all matrices but the embedding table (a tied one works as the head)."""
        return sum(m.in_features * m.out_features for part in (self.model.layers, self.lm_head) for m in part.modules()
                   if isinstance(m, (nn.Linear, QuantLinear)))

    def resident_bytes(self):
        """Bytes of the weights and scales in memory, shared storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in (*self.parameters(), *self.buffers())}
        return sum(storages.values())

    def flops_per_token(self, context):
        """Multiplications and additions of a token's forward pass, the mean over a causal window of `context` tokens.
        Training costs 3 x (Kaplan et al., 2020)."""
        c = self.config
        attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (context + 1)   # qk, av: half full
        return 2 * self.matmul_parameters() + attention


class KVCache:
    """Keys and values of the tokens read so far. One buffer per layer, (B, K, capacity, D), filled up to `length`."""
    def __init__(self, config, batch, capacity, device=None, dtype=None):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.in_c = None                              # after the first pass what attach_c decided: False, or how

    def update(self, layer, k, v):
        """Writes k, v (B, K, T, D) behind what is there (Body moves `length` on) and returns all keys and values."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length:end] = k
        self.values[layer][:, :, self.length:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


# ---------------------------------------------------------------------------------------------------------------------
# The Hub's families: what their config.json and their tensors have of their own

@dataclasses.dataclass
class Family:
    architecture: str
    switches: callable                       # config.json (under our names) -> fields of Config
    renamed: dict = dataclasses.field(default_factory=dict)         # our name of a config field -> theirs
    unnamed: tuple = ()                      # config fields that follow from others there
    defaults: dict = dataclasses.field(default_factory=dict)        # what transformers takes where a field is absent
    rope_types: tuple = ("default", "linear", "llama3", "longrope")           # () for positions that are learned
    partial: bool = False                    # whether transformers turns only a part of each head's channels
    tensors: tuple = ()                      # (their module, our modules that are fused in it, stored transposed?)
    prefixes: tuple = ()                     # (ours, theirs) for the other tensors


def llama(h):
    bias = h.get("attention_bias", False)
    return dict(qk_norm=False, qkv_bias=bias, o_bias=bias, mlp_bias=h.get("mlp_bias", False))


def mistral(h):
    return dict(qk_norm=False, sliding_window=h.get("sliding_window", 0))


def qwen2(h):
    return dict(qk_norm=False, qkv_bias=True, **qwen_window(h))


def qwen3(h):
    bias = h.get("attention_bias", False)
    return dict(qkv_bias=bias, o_bias=bias, **qwen_window(h))


def qwen_window(h):
    if not h.get("use_sliding_window"):               # a window may be written, and off
        return {}
    slides = [i >= h.get("max_window_layers", 28) for i in range(h["num_hidden_layers"])]
    return dict(sliding_window=h.get("sliding_window", 0),
                layer_types=h.get("layer_types") or [WINDOWS[slide] for slide in slides])


def phi3(h):
    return dict(qk_norm=False, sliding_window=h.get("sliding_window", 0))


def gpt2(h):
    for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if h.get(name, usual) != usual:
            raise UserError(f"GPT-2 with {name} = {h[name]} is not supported")
    return dict(qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, layer_norm=True,
                learned_positions=True)


QWEN = dict(max_position_embeddings=32768, intermediate_size=22016, num_key_value_heads=32, sliding_window=4096)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qwen3, defaults=dict(QWEN, head_dim=128)),
    "qwen2": Family("Qwen2ForCausalLM", qwen2, defaults=QWEN),
    "llama": Family("LlamaForCausalLM", llama, defaults=dict(max_position_embeddings=2048, intermediate_size=11008)),
    "mistral": Family("MistralForCausalLM", mistral, defaults=dict(
        max_position_embeddings=131072, intermediate_size=14336, num_key_value_heads=8, sliding_window=4096)),
    "phi3": Family("Phi3ForCausalLM", phi3, rope_types=("default", "longrope"), partial=True, defaults=dict(
        max_position_embeddings=4096, original_max_position_embeddings=4096, intermediate_size=8192,
        rms_norm_eps=1e-5), tensors=(
        ("self_attn.qkv_proj", QKV, False), ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), False))),
    "gpt2": Family(
        "GPT2LMHeadModel", gpt2, unnamed=("num_key_value_heads", "head_dim"), rope_types=(),
        defaults=dict(max_position_embeddings=1024, tie_word_embeddings=True, hidden_act="gelu_new", rms_norm_eps=1e-5),
        renamed=dict(hidden_size="n_embd", intermediate_size="n_inner", num_hidden_layers="n_layer",
                     num_attention_heads="n_head", max_position_embeddings="n_positions",
                     rms_norm_eps="layer_norm_epsilon", hidden_act="activation_function"),
        tensors=(("attn.c_attn", QKV, True), ("attn.c_proj", ("self_attn.o_proj",), True),
                 ("mlp.c_fc", ("mlp.up_proj",), True), ("mlp.c_proj", ("mlp.down_proj",), True)),
        prefixes=(("model.layers.", "transformer.h."), ("input_layernorm.", "ln_1."),
                  ("post_attention_layernorm.", "ln_2."), ("model.embed_tokens.", "transformer.wte."),
                  ("model.embed_positions.", "transformer.wpe."), ("model.norm.", "transformer.ln_f."))),
}


# Other fields of config.json that are read; null is as good as absent.
HUB_FIELDS = {"slm_format": (int, 0, 2 ** 31), **dict.fromkeys(("model_type", "base_model_type"), (str,)),
              **dict.fromkeys(("switches", "rope_scaling", "rope_parameters"), (dict,)),
              "compression": (list,), "history": ([dict],), "exits": ([int], 1, 10_000),
              **dict.fromkeys(("use_sliding_window", "attention_bias", "mlp_bias", "scale_attn_weights",
                               "scale_attn_by_inverse_layer_idx"), (bool,)),
              "layer_types": ([str],), "max_window_layers": (int, 0, 2 ** 31), **ROPE_FIELDS, **FIELDS}
ENTRY = {**dict.fromkeys(("step", "data", "data_sha256", "tokenizer"), (str,)), "seed": (int,), "batch_size": (int,),
         "context": (int, 1, 2 ** 24), "val_bits_per_byte": (float,), **dict.fromkeys(("parent", "teacher"), (dict,))}


def read_config(directory):
    """config.json as a dict whose fields have the types and sizes that the scripts rely on. Raises UserError."""
    path = Path(directory) / "config.json"
    hub = read_json(path)
    family = FAMILIES.get(str(hub.get("base_model_type") or hub.get("model_type")))
    renamed = family.renamed if family else {}
    check_values({k: v for k, v in hub.items() if v is not None},
                 {renamed.get(k, k): rule for k, rule in HUB_FIELDS.items()}, path)
    for i, entry in enumerate(hub.get("history") or []):
        needed = ("step", "data") if "data_sha256" in entry else ("step",)
        check_values(entry, ENTRY, f"{path}: history, entry {i}", needed=needed)
    layers = hub.get(renamed.get("num_hidden_layers", "num_hidden_layers"))
    if hub.get("layer_types") and len(hub["layer_types"]) != layers:
        raise UserError(f"{path}: layer_types names {len(hub['layer_types'])} layers, but there are {layers}")
    method = hub.get("quantization_config") or hub.get("compression_config")
    if method:
        method = method.get("quant_method") if isinstance(method, dict) else None
        raise UserError(f"{path} has quantization_config{f' ({method})' if method else ''}: weights in that form are "
                        "not read here; take the model before it was quantized, or write it with transformers: "
                        "model.dequantize().save_pretrained(NEW_DIR)")
    return hub


def config_from_hub(hub):
    """The Config of a parsed config.json. Raises UserError for a family or a setting this code does not have."""
    switches = hub.get("switches") or {}              # what the family's format cannot say: see config_to_hub
    unknown = sorted(switches.keys() - ({f.name for f in dataclasses.fields(Config)} - {"hub", "model_type"}))
    if unknown:
        raise UserError(f"config.json sets {', '.join(unknown)}, which Config in this model.py does not have: the "
                        "model was written by a changed model.py, and only that one opens it")
    if hub.get("slm_format", FORMAT) > FORMAT:
        raise UserError(f"this model was written by a newer version (format {hub['slm_format']}, known: {FORMAT}); "
                        "update this code")
    if hub.get("model_type") == COMPRESSED:
        hub = {**hub, "model_type": hub.get("base_model_type")}
    hub = {k: v for k, v in hub.items() if k not in ("base_model_type", "compression", "switches")}
    name, supported = hub.get("model_type"), f"supported: {', '.join(FAMILIES)}"
    if "auto_map" in hub and name != "phi3":          # Phi-3's directories carry a copy of what transformers has
        raise UserError(f"the model brings its own code (auto_map in config.json), never run here; {supported}")
    if name not in FAMILIES:
        raise UserError(f"model_type {name!r} is not supported; {supported}")
    family = FAMILIES[name]
    ours = {theirs: k for k, theirs in family.renamed.items()}
    found = {ours.get(k, k): v for k, v in hub.items()}
    absent = {k: v for k, v in family.defaults.items() if k not in found}
    found = {**absent, **{k: v for k, v in found.items() if v is not None}}
    missing = [family.renamed.get(k, k) for k in SIZES[:4] if k not in found]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    usual = dict(num_key_value_heads=found["num_attention_heads"], intermediate_size=4 * found["hidden_size"],
                 head_dim=found["hidden_size"] // found["num_attention_heads"],
                 max_position_embeddings=family.defaults["max_position_embeddings"])
    fields = {**usual, **{k: found[k] for k in (*SIZES, "rms_norm_eps", "tie_word_embeddings", "hidden_act")
                          if k in found}}
    rope = dict(ROPE) if "rope" in switches else rope_from_hub(found, family, fields["max_position_embeddings"])
    if rope["rope_type"] == "longrope":               # its long factors begin behind the first window: we end there
        fields["max_position_embeddings"] = min(fields["max_position_embeddings"],
                                                rope["original_max_position_embeddings"])
    return Config(**{**fields, **family.switches(found), "model_type": name, "rope": rope, **switches}, hub=hub)


def rope_from_hub(found, family, window):
    """Config's `rope` of a config.json under our names, as transformers 5 reads it. Raises UserError for what the
    family's model there does not have: it is ignored, or computed in another way."""
    if not family.rope_types:
        return dict(ROPE)
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}                # transformers 4 and 5
    rope = {k: v for k, v in rope.items() if v is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = "longrope" if family.partial and kind in ("su", "yarn") else kind              # Phi-3's old names
    rope = {**ROPE, **{k: found[k] for k in ("rope_theta", "partial_rotary_factor") if k in found}, **rope,
            "rope_type": kind}
    if kind not in family.rope_types:
        raise UserError(f"rope_type {kind!r} is not supported in {family.architecture}; supported: "
                        f"{', '.join(family.rope_types)}")
    nested = [k for k, v in rope.items() if isinstance(v, dict)]
    if nested or rope["partial_rotary_factor"] != 1 and not family.partial:
        name = (nested or ["partial_rotary_factor"])[0]
        raise UserError(f"{family.architecture} has no rotary positions with {name}; take it out of config.json if the "
                        "model was trained without it")
    if kind in ("llama3", "longrope"):
        first = found if "original_max_position_embeddings" in family.defaults else rope
        rope["original_max_position_embeddings"] = first.get("original_max_position_embeddings", window)
    if kind == "longrope":
        check_values(rope, ROPE_FIELDS, "config.json")
        rope.setdefault("factor", window / rope["original_max_position_embeddings"])
    return rope


def config_to_hub(config):
    """config.json as a dict: what was read, with today's shapes. Fields of Config that would come back as another
    value, as the family's format has no word for them, stand as they are under "switches"."""
    hub = family_config(config)
    read = config_from_hub(hub)
    switches = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)
                if f.name != "hub" and getattr(config, f.name) != getattr(read, f.name)}
    return {**hub, "switches": switches} if switches else hub


def family_config(config):
    """config.json as a dict, in the family's own words."""
    family = FAMILIES[config.model_type]
    skip = (*family.unnamed, *(["max_position_embeddings"] if config.rope["rope_type"] == "longrope" else []))
    fields = {family.renamed.get(k, k): getattr(config, k)
              for k in (*SIZES, "rms_norm_eps", "tie_word_embeddings", "hidden_act") if k not in skip}
    rope = config.rope if (config.rope["rope_type"] in family.rope_types
                           and (family.partial or config.rope["partial_rotary_factor"] == 1)) else ROPE
    new = dict(rope_parameters=rope, rope_theta=rope["rope_theta"], attention_bias=False, use_cache=True)
    if config.model_type == "mistral":                # absent, it would be 4,096
        new["sliding_window"] = config.sliding_window or None
    kept = {k: v for k, v in config.hub.items() if k not in ("auto_map", "torch_dtype", "exits", "card", "sampling")}
    kept = kept or new
    return {"architectures": [family.architecture], "model_type": config.model_type, **kept, **fields,
            "slm_format": FORMAT}


def to_ours(tensors, family, shapes):
    """Tensors under the family's names to ours: fused ones are split by our `shapes`, transposed ones turned back."""
    result = {}
    for name, t in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue                                  # buffers that old checkpoints hold; not weights
        if family.prefixes and not name.startswith(("transformer.", "lm_head.")):
            name = "transformer." + name              # the first GPT-2 checkpoints leave it out
        for ours, theirs in family.prefixes:
            name = name.replace(theirs, ours)
        module, _, kind = name.rpartition(".")        # kind: weight or bias
        theirs, ours, transposed = next((f for f in family.tensors if module.endswith("." + f[0])), (module, (), False))
        names = [module.removesuffix(theirs) + o + "." + kind for o in ours] or [name]
        t = t.t().contiguous() if transposed and t.ndim == 2 else t
        rows = [shapes[n][0] if n in shapes else 0 for n in names]
        whole_one = len(names) == 1 or sum(rows) != len(t)          # a wrong sum is reported by name and shape later
        result.update(zip(names, (t,) if whole_one else t.split(rows)))
    return result


def to_theirs(tensors, family):
    """The inverse of to_ours."""
    result = dict(tensors)
    for theirs, ours, transposed in family.tensors:
        for name in [n for n in result if n.rpartition(".")[0].endswith("." + ours[0])]:
            module, _, kind = name.rpartition(".")
            base = module.removesuffix(ours[0])
            t = torch.cat([result.pop(base + o + "." + kind) for o in ours])
            result[base + theirs + "." + kind] = t.t().contiguous() if transposed and t.ndim == 2 else t
    for ours, theirs in family.prefixes:
        result = {name.replace(ours, theirs): t for name, t in result.items()}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing model directories

@contextlib.contextmanager
def disk_full(directory, wanted):
    """Turns what safetensors and torch.save raise where a file cannot be written into the OSError that it is."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from None
        if shutil.disk_usage(directory).free < wanted or "failed writing file" in str(error):
            raise OSError(errno.ENOSPC, f"no space left while writing ({error})") from None
        raise


def whole(path):
    """The directory that holds the model at `path`: itself, what an interrupted save left beside it, or, for a training
    run, its best/ or last/. Raises UserError if there is none."""
    path = named(path)
    for base in (path, path / "best", path / "last"):
        for candidate in (base, beside(base, "new"), beside(base, "old")):
            if (candidate / "config.json").is_file():      # it is written last
                return candidate
    refuse_beside(path)
    raise UserError(f"there is no model in {path}: no config.json in it, nor in its best/ or last/" if path.exists()
                    else f"there is no directory {path}")


def read_json(path):
    """A file's JSON object as a dict. Raises UserError."""
    try:
        with reading(path):
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")        # half a surrogate pair can be read, not written
    except (ValueError, OSError, RecursionError) as error:           # RecursionError: lists in lists without end
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


WRAPPER = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
BESIDE = {"an adapter": ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
          "settings of quantized weights": ("quantize_config.json", "quant_config.json", "hf_quant_config.json")}


def refuse_beside(directory):
    """Raises UserError for files beside the weights that change what these mean, and that are not read here."""
    for kind, names in BESIDE.items():
        for name in names:
            if (Path(directory) / name).exists():
                way = ("merge it: peft's model.merge_and_unload().save_pretrained(NEW_DIR)" if kind == "an adapter" else
                       "take the model before it was quantized")
                raise UserError(f"{directory} holds {name}, {kind}, which is not read here; {way}")


def read_tensors(directory):
    """All tensors of model.safetensors, or of the shards its index names, mapped from the files. Raises UserError."""
    names = ["model.safetensors"]
    if (directory / "model.safetensors.index.json").is_file() and not (directory / names[0]).is_file():
        shards = read_json(directory / "model.safetensors.index.json").get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(n)).name != n for n in shards.values()):
            raise UserError(f"{directory / 'model.safetensors.index.json'} has no weight_map of file names")
        names = sorted(set(shards.values()))
    tensors = {}
    for name in names:
        if not (directory / name).is_file():
            pickles = sorted(p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pt")))
            only = f", only {pickles[0]}: a pickle may run code and is not opened; convert it with transformers' " \
                   "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)" if pickles else ""
            raise UserError(f"{directory} has no {name}{only}")
        try:
            with safe_open(directory / name, framework="pt") as f:
                keys = {WRAPPER.sub("", key): key for key in f.keys()}
                found, count = {ours: f.get_tensor(key) for ours, key in keys.items()}, len(list(f.keys()))
        except Exception as error:                    # whatever a library finds wrong with bytes is the file's fault
            raise UserError(f"{directory / name} is truncated or not a safetensors file ({error})") from None
        if len(found) < count:
            raise UserError(f"{directory / name} holds a tensor twice, once behind module. or _orig_mod.: save it anew")
        tensors.update(found)
    return tensors


@contextlib.contextmanager
def config_to_blame(directory):
    """Turns errors inside into a UserError that names config.json."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{directory / 'config.json'} has a value that cannot be ({error!r})") from None


def empty(config, hub):
    """The model of a config, its compressed layers too, without memory for the tensors."""
    with torch.device("meta"):
        model = Transformer(config)
        for entry in hub.get("compression") or []:
            model.replace(entry)
    return model


def load(path, device="cpu", dtype=None, finite=True):
    """The model in a directory (or a training run's best/), in eval mode.

    Tensors are mapped from the file, not copied; dtype None keeps the stored one, and integers and scales of quantized
    layers keep theirs always. Strict: a missing, extra or misshapen tensor, a truncated file, an unknown family or kind
    of layer, a value that is not a number raise UserError. finite=False does not look for the latter: that reads all
    of the file, a fifth of the time to the first token; who asks for it looks at the first logits instead.
    """
    directory = whole(path)
    refuse_beside(directory)
    hub = read_config(directory)
    with config_to_blame(directory):
        config = config_from_hub(hub)
    tensors = read_tensors(directory)
    with config_to_blame(directory):
        if config.num_hidden_layers > len(tensors):
            raise UserError(f"there are {config.num_hidden_layers:,} layers, but the file of weights holds only "
                            f"{len(tensors):,} tensors")
        model = empty(config, hub)
        shapes = {name: t.shape for name, t in model.state_dict().items()}
        if not model.compression:
            tensors = to_ours(tensors, FAMILIES[config.model_type], shapes)
        head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if config.tie_word_embeddings and head is not None and table is not None:
            if head.dtype == table.dtype and torch.equal(head, table):
                del tensors["lm_head.weight"]
            else:                                     # as transformers 5 does
                say_once(f"{directory}: config.json ties the head to the embedding, but the file holds a head of its "
                         "own: that one is used")
                config.tie_word_embeddings = False
                model = empty(config, hub)
                shapes = {name: t.shape for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("lm_head.")}
    missing, unknown = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    for problem, names in (("lacks", missing), ("has an unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the model in {directory} {problem} tensor {min(names)}{more}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(f"{directory}: {name} is {tuple(tensors[name].shape)}, config.json says {tuple(shape)}")
    for name, t in model.named_buffers():                        # integers and scales: read, never converted
        if tensors[name].dtype != t.dtype:
            raise UserError(f"{directory}: {name} is {tensors[name].dtype}, config.json says {t.dtype}")
    for name in dict(model.named_parameters()).keys() & tensors.keys():
        if tensors[name].dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise UserError(f"{directory}: {name} is {tensors[name].dtype}, which is not read here: write the model as "
                            "float32, float16 or bfloat16")
    for name, t in tensors.items() if finite else ():
        if t.is_floating_point() and not t.sum(dtype=torch.float32).isfinite() and not t.isfinite().all():
            raise UserError(f"{directory}: {name} holds values that are infinite or not a number: its training "
                            "diverged, or the file is damaged; take an earlier checkpoint")
    model.load_state_dict(tensors, strict=False, assign=True)    # strict: see above
    model.tie_weights()
    model.history, model.exits = hub.get("history") or [], hub.get("exits") or []
    config.hub.update(card=front_matter(directory / "README.md"), sampling=sampling_settings(directory))
    return model.to(device=device, dtype=dtype).eval()


def save(model, directory, tokenizer=None, extra=None, state=None):
    """Writes a model directory, atomically. `extra(new_directory)` may add files (a training state); `state` are the
    tensors, if the model's own state dict does not hold them whole.

    Raises UserError if `directory` holds something that is not a model, which it would replace.
    """
    config = config_to_hub(model.config)
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
    if only_here(model):                              # or transformers would fill the layers with random numbers
        config.update(model_type=COMPRESSED, base_model_type=model.config.model_type)
        del config["architectures"]
    if model.compression:
        config.update(compression=model.compression)
    else:
        tensors = to_theirs(tensors, FAMILIES[model.config.model_type])
    with replacing(directory, MODEL) as new, disk_full(new, sum(t.nbytes for t in tensors.values())):
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(new, model_max_length=model.config.max_position_embeddings)
            write_json(new / "generation_config.json", {
                **(model.config.hub.get("sampling") or SAMPLING), "eos_token_id": sorted(tokenizer.eos_ids),
                "pad_token_id": tokenizer.eos_id})
        (new / "README.md").write_text(card(model), encoding="utf-8")
        if extra is not None:
            extra(new)
        for file in new.iterdir():                                 # on disk before config.json says that it is whole
            sync(file)
        shutil.copymode(new / "README.md", new / "model.safetensors")      # safetensors lets nobody else read it
        write_json(new / "config.json", config)


def model_name(path):
    """What a child calls its parent: the directory's name, or a run's."""
    directory = whole(path).resolve()
    return directory.parent.name if directory.name in ("best", "last") else directory.name


def checkpoint_hash(path):
    """sha256 of the weights (16 hex digits): how a child names its parent, wherever that lies."""
    digest = hashlib.sha256()
    for file in sorted(whole(path).glob("*.safetensors")):
        with open(file, "rb") as f:
            while block := f.read(2 ** 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def only_here(model):
    """Whether only this project opens the model's directory: it has layers or switches that its family does not."""
    return bool(model.compression) or "switches" in config_to_hub(model.config)


def front_matter(card):
    """Lines of a model card's front matter that say whose work a model is: they stay with all that is made of it."""
    if not card.is_file():
        return []
    _, _, text = card.read_text(encoding="utf-8", errors="replace")[:2 ** 16].partition("---\n")
    kept, keep = [], False
    for line in text.partition("\n---")[0].splitlines():
        if not line.startswith((" ", "-")):
            keep = line.startswith(("license", "base_model:", "language:"))
        kept += [line] * keep
    return kept


def sampling_settings(directory):
    """How a model's makers sample from it, by generation_config.json; {} if they do not say."""
    file = directory / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: settings[name] for name in names if name in settings}


def card(model):
    """The model card (README.md of a model directory): what it is, how it opens, what made it, what it is not for."""
    c, ours = model.config, only_here(model)
    library = [] if ours else ["library_name: transformers"]
    lines = ["---", *c.hub.get("card", []), *library, "pipeline_tag: text-generation", "---", "",
             "# A small language model", "",
             f"{model.parameters_count():,} parameters: {c.num_hidden_layers} layers of width {c.hidden_size}, "
             f"{c.num_attention_heads} heads, {c.vocab_size:,} ids, a window of {c.max_position_embeddings} tokens.",
             "", "## How to open it", "", "    python sample.py DIR                # DIR: this directory"]
    if not ours:
        lines += ["    AutoModelForCausalLM.from_pretrained(DIR)       # transformers"]
    if model.compression:
        lines += ["", "transformers does not know its layers. In a form for other programs:", "",
                  "    python compress.py DIR dequantize --out DIR2           # dense: transformers opens it",
                  "    python compress.py DIR gguf:q8_0 --out FILE.gguf       # llama.cpp; of int4 layers gguf:q4_0"]
    elif ours:
        lines += ["", f"Only the model.py that wrote it: {c.model_type} of transformers has not all of its switches."]
    lines += ["", "## What made it", ""]
    for entry in model.history:
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}
        lines.append("- " + "; ".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in shown.items()))
    return "\n".join(lines + ["", "## What it is not for", "", NOT_FOR, ""])
