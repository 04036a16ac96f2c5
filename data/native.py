"""kernels.c, compiled for this CPU and attached to a model from outside.

    model = native.attach(load("out"))         # the same numbers, faster; --no-native leaves it out

model.py is plain PyTorch and does not know this file. `attach` gives each layer that kernels.c
knows a subclass of the layer's own class, with a method or two in C. Each method proves itself:
the first call computes both ways. Where the results differ, one sentence says so and PyTorch
stays. So a changed line in model.py is what runs.

A C compiler is needed, once, for a few seconds. Without one nothing is attached.
"""
import contextlib, ctypes, functools, hashlib, os, platform, shutil, tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from data.compiled import build_library, built_library
from data.console import say_once
from data.rotary import ENDING
from data.structure import has_quantized, hooks_of

SOURCE = Path(__file__).with_name("kernels.c")
EXACT, NARROW, BLOCKS = 1e-3, 0.05, 0.2          # how far two ways may differ, as a share of the norm: see `agrees`
FEW = 8                                # rows: from here on, products of PyTorch are faster
PARTS = 32                             # rows of partial sums that the backward passes in C write


# ---------------------------------------------------------------------------------------------------------------------
# The compiled library

@functools.cache
def library():
    """(kernels.c compiled for this CPU, or None; why there is none).

    The library is kept in the user's cache directory: never in a model's, so that a stranger's model cannot bring
    machine code along. It is trusted only in a directory that nobody else can write.
    """
    compilers = dict.fromkeys(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "cc", "gcc", "clang"))))
    if os.name != "posix" or not compilers:
        return None, "there is no C compiler"
    source = SOURCE.read_text(encoding="utf-8")
    cpu = [platform.machine(), platform.processor()]               # what -march=native depends on
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    key = hashlib.sha256(repr((source, cpu)).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "small-language-models"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if cache.stat().st_uid != os.getuid() or cache.stat().st_mode & 0o022 or not os.access(cache, os.W_OK):
            raise PermissionError
        scratch = contextlib.nullcontext(cache)
    except (OSError, RuntimeError):                                # RuntimeError: a user without a home
        scratch = tempfile.TemporaryDirectory()
    with scratch as directory:
        built = built_library(Path(directory), key) or build_library(Path(directory), key, source, compilers)
    if built is None:
        return None, f"{next(iter(compilers))} could not build the kernels"
    if not checks_itself(built):
        return None, "the compiled kernels failed their check on this CPU"
    return built, ""


def checks_itself(built):
    """Whether a library multiplies as it should: an instruction set we could not test on must not go unnoticed.

    All numbers are small integers and halves of them, and each group of 32 activations has a 127: nothing is rounded,
    neither here nor there. The shapes leave rests of rows, of groups and of vectors; tokens are few and many.
    """
    counted = functools.partial(torch.arange, device="cpu", dtype=torch.float32)
    for bits, k, group in ((32, 37, 37), (8, 160, 160), (8, 33, 33), (4, 96, 32), (4, 320, 64), (4, 384, 128)):
        integers = counted(37 * k).view(37, k) * 7 % 2 ** min(bits, 8) - 2 ** min(bits - 1, 7)
        scales = counted(37 * (k // group)).view(37, -1) % 3 / 2 - 1                              # -1, -0.5, 0
        weight = integers * scales.repeat_interleave(group, 1)
        x = counted(9 * k).view(9, k) * 11 % 255 - 127
        x[:, ::32] = 127
        packed = (weight if bits == 32 else integers.to(torch.int8) if bits == 8
                  else (integers[:, 0::2] + 8 + 16 * (integers[:, 1::2] + 8)).to(torch.uint8))
        halves = scales.half()
        layer = struct_of(packed, halves, None, 37, k, group, bits)
        if not all(torch.equal(multiply(built, layer, rows), rows @ weight.T) for rows in (x[:1], x[:3], x)):
            return False
    return True


def call(name, *args):
    """The result of a function of kernels.c for tensors (contiguous, float32), sizes and numbers."""
    return getattr(library()[0], name)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args))


def set_threads(count):
    """Makes the kernels, if they are loaded, compute with `count` threads, as PyTorch does."""
    if library.cache_info().currsize and hasattr(built := library()[0], "omp_set_num_threads"):
        built.omp_set_num_threads(count)              # some builds of PyTorch have an OpenMP of their own


# ---------------------------------------------------------------------------------------------------------------------
# When C applies, and that it does what PyTorch does

def applies(x, parameter=None):
    """Whether kernels.c takes x and a parameter of a layer: float32, on a CPU."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and (parameter is None or parameter.dtype == x.dtype)
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing())


def widened(x):
    """x as float32 where autocast on a CPU has made it bfloat16: sums of squares are in float32."""
    narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return x.float() if narrow else x


def agrees(found, expected, tolerance=EXACT):
    """Whether the result of C is that of PyTorch.

    Floats agree to 1e-6 (EXACT). Activations rounded to 8 bits, or bfloat16, give NARROW. Behind several quantized
    layers an ulp may flip a rounding, and later layers amplify that (BLOCKS).
    """
    return bool((found - expected).norm() <= tolerance * expected.norm())


PROVEN = {}                            # functions of model.py: whether C gave their result


def note_proof(key, name, agreed):
    """Notes whether C gave the result of a function; one sentence says where PyTorch stays."""
    PROVEN[key] = agreed
    if not agreed:
        say_once(f"PyTorch computes {name}, not the C kernels: it computes something else")


def proven(plain, fast, *args, also=None, tolerance=EXACT):
    """fast(), if its first result was that of plain(*args), a method of a class in model.py; else plain(*args).

    also: another function whose work is done in C
    """
    key = plain.__func__, also
    if key not in PROVEN:
        with torch.no_grad():
            expected = plain(*args)
            if not expected.isfinite().all():         # said elsewhere; the next call may prove it
                return plain(*args)
            note_proof(key, plain.__qualname__, agrees(fast(), expected, tolerance))
    return fast() if PROVEN[key] else plain(*args)


# ---------------------------------------------------------------------------------------------------------------------
# Operations with gradients

class NormInC(torch.autograd.Function):
    """RMSNorm of x (..., n)."""
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
        grad_x, sums = torch.empty_like(x), x.new_zeros(PARTS, n)
        call("rms_norm_backward", x, weight, *ctx.sizes, grad.contiguous(), grad_x, sums)
        return grad_x, sums.sum(0), None


class HeadsInC(torch.autograd.Function):
    """Heads x (B, T, H, D): RMSNorm if there is a weight, turned by cos and sin, as (B, H, T, D)."""
    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        (B, T, H, D), x = x.shape, x.contiguous()
        y = x.new_empty(B, H, T, D)
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps, ctx.sizes = eps, (*x.shape, cos.shape[-1], len(cos))
        call("to_heads", x, weight, eps, cos, sin, (ctypes.c_int64 * 6)(*ctx.sizes), y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight, cos, sin), grad = ctx.saved_tensors, grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_x, sums = torch.empty_like(x), x.new_zeros(PARTS, x.shape[-1])
        call("to_heads_backward", x, weight, ctx.eps, cos, sin,
             (ctypes.c_int64 * 9)(*ctx.sizes, *grad.stride()[:3]), grad, grad_x, sums)
        return grad_x, None if weight is None else sums.sum(0), None, None, None


class SwiGLUInC(torch.autograd.Function):
    """silu(gate) * up."""
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
# Layers: each class below becomes the first base of the class in model.py that has its name in LAYERS

class Accelerated:
    """Marks a layer that has methods in C."""


class NativeNorm(Accelerated):
    """RMSNorm."""
    def forward(self, x):
        x = widened(x)
        if not applies(x, self.weight):
            return super().forward(x)
        return proven(super().forward, lambda: NormInC.apply(x, self.weight, self.eps), x)


class NativeAttention(Accelerated):
    """Normalization, rotary positions and transposition of queries and keys in one pass."""
    def to_heads(self, x, norm, rotary):
        x, weight = widened(x), getattr(norm, "weight", None)
        unknown = type(norm).__name__ in ("LayerNorm", "OffsetNorm") or self.norm_first
        if rotary is None or unknown or not applies(x, weight):
            return super().to_heads(x, norm, rotary)
        return proven(
            super().to_heads, lambda: HeadsInC.apply(x.unflatten(-1, (-1, self.head_dim)), weight,
                                                     getattr(norm, "eps", 0.0), *rotary), x, norm, rotary,
            also=type(norm).forward)


class NativeMLP(Accelerated):
    """SwiGLU."""
    def inner(self, x):
        if self.gate_proj is None or self.act is not F.silu:
            return super().inner(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not applies(widened(gate)):
            return super().inner(x)
        return proven(super().inner, lambda: SwiGLUInC.apply(widened(gate), widened(up)), x,
                      tolerance=EXACT if gate.dtype == torch.float32 else NARROW)


class NativeQuantLinear(Accelerated):
    """A product of integers: activations are rounded to 8 bits, in groups of 32 with a scale each."""
    struct = None                      # of kernels.c: see kept_struct

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.struct = None             # the tensors have moved
        return self

    def forward(self, x):
        if x.requires_grad or not applies(x, self.bias):
            return super().forward(x)
        return proven(super().forward, lambda: multiply(library()[0], kept_struct(self), x), x, tolerance=NARROW)


class NativeTransformer(Accelerated):
    """Few tokens, from ids to logits, in one call of C. The first pass over a text is PyTorch's, and proves it."""
    def forward(self, ids, cache=None, segments=None, last=0, head=True, hidden=None):
        plain = cache is None or segments is not None or hidden is not None or not head
        if plain or torch.is_grad_enabled() or self.training:
            return super().forward(ids, cache, segments, last, head, hidden)
        last, decoder = last or ids.shape[1], vars(cache).get("decoder")
        if decoder is None:                           # not yet decided; False: C does not know this model
            return self.prove(ids, cache, last)
        takes = decoder and decoder.takes(self, ids)
        return decoder.step(ids, last) if takes else super().forward(ids, cache, last=last)

    def prove(self, ids, cache, last):
        """Logits (B, last, V) by PyTorch. They decide whether the cache gets a Decoder."""
        again = max(1, (FEW - 1) // len(ids))         # C reads no more than these again
        logits = super().forward(ids, cache, last=max(last, min(again, ids.shape[1])))       # (B, last or more, V)
        if applies(logits) and len(ids) == len(cache.keys[0]):
            read = vars(cache).get("read") or (ids[:, :0], logits[:, :0])
            cache.read = tuple(torch.cat(pair, 1)[:, -again:] for pair in zip(read, (ids, logits)))
            if cache.read[0].shape[1] > 1:            # one token says too little of a gate that depends on it
                cache.decoder, cache.read = decoder_of(self, cache, *cache.read), None
        return logits[:, -last:]


LAYERS = {"RMSNorm": NativeNorm, "Attention": NativeAttention, "MLP": NativeMLP, "Int8Linear": NativeQuantLinear,
          "Int4Linear": NativeQuantLinear, "Transformer": NativeTransformer}


@functools.cache
def with_native(layer_class, native):
    """A subclass of a layer's class with the methods in C; it keeps the name."""
    return type(layer_class.__name__, (native, layer_class), {"__module__": layer_class.__module__})


def attach_layer(module):
    """Gives one layer the methods in C of its row in LAYERS, in place. Returns the layer."""
    native = LAYERS.get(type(module).__name__)
    if native and not isinstance(module, Accelerated):
        module.__class__ = with_native(type(module), native)
    return module


def attach(model, functions=None):
    """Attaches kernels.c to the layers of a model, in place, and returns the model; without a compiler nothing changes.

    functions  globals() of train.py: `softmax_gradient` there is replaced too
    """
    if next(model.parameters()).device.type != "cpu" or library()[0] is None:
        return model
    for module in model.modules():
        attach_layer(module)
    if functions is not None:
        functions["softmax_gradient"] = fast_softmax_gradient(functions["softmax_gradient"])
    return model


def is_attached(model):
    """Whether a layer of the model has methods in C."""
    return any(isinstance(module, Accelerated) for module in model.modules())


@functools.cache
def fast_softmax_gradient(plain):
    """train.py's softmax_gradient(logits, targets), in C where it applies."""
    if hasattr(plain, "__wrapped__"):
        return plain

    @functools.wraps(plain)
    def softmax_gradient(logits, targets):
        logits = logits.float()
        if not applies(logits):
            return plain(logits, targets)
        if plain not in PROVEN:
            results = in_c(logits.clone(), targets), plain(logits.clone(), targets)
            note_proof(plain, "softmax_gradient", all(map(agrees, *results)))
        return in_c(logits, targets) if PROVEN[plain] else plain(logits, targets)

    def in_c(logits, targets):
        losses = logits.new_empty(len(logits))
        if call("cross_entropy", logits, targets.contiguous(), *logits.shape, losses):
            raise IndexError(f"targets are not all ids below {logits.shape[1]}")
        return losses.sum(), logits
    return softmax_gradient


# ---------------------------------------------------------------------------------------------------------------------
# The structs of kernels.c

def struct_of(q, scales, bias, n_out, n_in, group, bits):
    """`struct layer` of kernels.c, as an array of 8 integers; the tensors must stay alive."""
    pointers = (0 if t is None else t.data_ptr() for t in (q, scales, bias))
    return (ctypes.c_int64 * 8)(*pointers, n_out, n_in, group, bits, 0)


def c_struct(m):
    """An nn.Linear, nn.Embedding, QuantLinear or LowRankLinear as `struct layer`."""
    if hasattr(m, "down"):
        layer, inner = c_struct(m.up), c_struct(m.down)
        layer[7], layer.kept = ctypes.addressof(inner), inner
        return layer
    if hasattr(m, "scales"):
        return struct_of(m.q, m.scales, m.bias, m.out_features, m.in_features, m.in_features // m.scales.shape[1],
                         m.bits)
    return struct_of(m.weight, None, getattr(m, "bias", None), *m.weight.shape, m.weight.shape[1], 32)


def kept_struct(m):
    """c_struct of a NativeQuantLinear, made anew when a tensor has been replaced."""
    struct, bias = m.struct, m.bias
    if struct is None or struct[0] != m.q.data_ptr() or bias is not None and struct[2] != bias.data_ptr():
        struct = m.struct = c_struct(m)
    return struct


def multiply(built, layer, x):
    """x (..., in) float32 @ weight^T + bias, (..., out); layer: see c_struct."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], layer[3])
    if built.linear(layer, x.data_ptr(), x.numel() // layer[4], y.data_ptr()):
        raise MemoryError("no memory for the activations of a layer")
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

PROJECTIONS = (("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")), ("mlp", ("gate_proj", "up_proj", "down_proj")))
KNOWN = ("Linear", "Int8Linear", "Int4Linear", "LowRankLinear")          # kinds of layers that kernels.c has


# Switches of Config that kernels.c lacks, as it takes them.
USUAL = dict(layer_norm=False, learned_positions=False, gated=True, hidden_act="silu", no_rope_layers=None,
             qk_norm_whole=False, unit_offset=False, norms="before", parallel=0, embedding_multiplier=1.0,
             residual_multiplier=1.0, attention_multiplier=0.0, logits_scaling=1.0)


def knows(model, cache):
    """Whether kernels.c has a model like this: the usual kind, float32, contiguous, on a CPU."""
    c, body = model.config, model.model
    table, quantized = table_of(body), [m for m in (*body.layers.modules(), model.lm_head) if hasattr(m, "scales")]
    layers = [model.lm_head, *(getattr(getattr(block, part), name) for block in body.layers
                               for part, names in PROJECTIONS for name in names)]
    return (all(getattr(c, name) == usual for name, usual in USUAL.items()) and "local_theta" not in c.rope
            and all(type(m).__name__ in KNOWN for m in layers)         # a subclass computes what C does not know
            and type(table).__name__ in ("Embedding", "Int8Linear", "Int4Linear")
            and all(t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu"
                    for t in (cache.keys[0], *model.parameters()))
            and not any(m.in_features % 32 for m in quantized))


def table_of(body):
    """The embedding table of a Body: nn.Embedding, or the table of a QuantEmbedding."""
    return getattr(body.embed_tokens, "table", body.embed_tokens)


class Decoder:
    """A Transformer for a few tokens in C, behind the tokens that a KVCache holds.

    Layers that are replaced in the middle of a text are not seen.
    """
    def __init__(self, model, cache):
        self.model, self.cache, self.hooks = model, cache, hooks_of(model)
        body, c, first, table = model.model, model.config, cache.keys[0], []
        ends = c_struct(table_of(body)), c_struct(model.lm_head)
        self.kept = [list(model.parameters()), list(model.buffers()), ends]    # what the pointers below point to
        for i, block in enumerate(body.layers):
            a = block.self_attn
            norms = [m.weight.data_ptr() if hasattr(m, "weight") else 0
                     for m in (block.input_layernorm, a.q_norm, a.k_norm, block.post_attention_layernorm)]
            structs = [c_struct(getattr(getattr(block, part), name)) for part, names in PROJECTIONS for name in names]
            self.kept.append(structs)
            table += [*norms, *map(ctypes.addressof, structs), cache.keys[i].data_ptr(), cache.values[i].data_ptr(),
                      c.window(i)]
        self.table = (ctypes.c_int64 * len(table))(*table)
        leaves = [m for m in model.modules() if hasattr(m, "in_features")]
        widest = max(n for m in leaves for n in (m.in_features, m.out_features) if m is not model.lm_head)
        fields = [0, 0, 0, len(first), first.shape[2], *map(ctypes.addressof, ends), body.norm.weight.data_ptr(),
                  body.frequencies.data_ptr(), ctypes.addressof(self.table), len(body.layers), c.hidden_size,
                  c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size, len(body.frequencies),
                  -(-widest // 32) * 32]
        self.struct = (ctypes.c_int64 * len(fields))(*fields)                  # `struct model` of kernels.c

    def takes(self, model, ids):
        """Whether C applies to the next tokens ids (B, T): few rows, room in the cache, no hook."""
        (B, T), end = ids.shape, self.cache.length + ids.shape[1]
        outside = model.config.rope["rope_type"] in ENDING and end > model.config.max_position_embeddings
        return (model is self.model and B * T < FEW and B == len(self.cache.keys[0])
                and end <= self.cache.keys[0].shape[2] and not outside and not any(self.hooks)
                and not torch.compiler.is_compiling() and not torch.jit.is_tracing())

    def step(self, ids, last):
        """The logits (B, last, V) of the last tokens of ids (B, T); the cache is extended by ids."""
        logits = self.read(ids, self.cache.length, last)
        self.cache.length += ids.shape[1]
        return logits

    def read(self, ids, start, last):
        """The logits (B, last, V) of the last tokens of ids (B, T), which are at positions from `start` on."""
        self.struct[:3] = ids.shape[1], start, last
        body, ids = self.model.model, ids.contiguous()
        logits = torch.empty(len(ids), last, self.model.lm_head.out_features)
        failed = library()[0].decode(self.struct, body.rotary_scale, body.norm.eps, ids.data_ptr(), logits.data_ptr())
        if failed == 2:
            raise IndexError(f"ids {ids.tolist()} are not all below {logits.shape[2]}")
        if failed:
            raise MemoryError("no memory for the activations of a token")
        return logits


def decoder_of(model, cache, ids, expected):
    """A Decoder that finds what the model itself found, or False.

    ids (B, T): the last tokens read, for which the cache has keys and values already; expected (B, T, V): the logits
    that model.py, changed or not, made of them. C reads these tokens once more.
    """
    if not expected.isfinite().all():                 # said elsewhere
        return False
    hooked, known = any(hooks_of(model)), knows(model, cache)
    if known and not hooked:
        decoder, T = Decoder(model, cache), ids.shape[1]
        kept = [(t, t[:, :, cache.length - T:cache.length].clone()) for t in (*cache.keys, *cache.values)]
        found = decoder.read(ids, cache.length - T, T)
        for t, values in kept:
            t[:, :, cache.length - T:cache.length] = values
        if agrees(found, expected, BLOCKS if has_quantized(model) else EXACT):
            return decoder
    if known or hooked:
        why = "a hook is registered on it" if hooked else "its forward computes something else"
        say_once(f"PyTorch generates, not the C kernels: they do not know this model ({why})")
    return False
