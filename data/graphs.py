"""Generation on a GPU: one launch for each token, by CUDA graphs.

A token of a small model is some hundred kernels of a few microseconds, and Python launches each of
them in more time than it runs. A CUDA graph records the kernels once and launches all of them at
once (as gpt-fast does: https://github.com/meta-pytorch/gpt-fast). A graph repeats the same kernels
on the same memory, so nothing may depend on the number of tokens: a FixedCache has one shape, and
its length is a tensor.

model.py does not know this file. A graph proves itself: its first token is compared with the token
of the model as it is, and where they differ, or a graph cannot be recorded, one sentence says so
and the model goes on as it is.
"""
import contextlib, functools

import torch

from data.console import say_once
from data.structure import hooks_of

WORTH = 8                              # tokens: to record a graph takes the time of about five


def decoding(device):
    """A context for each token of generation: on a GPU, without cuDNN's attention.

    cuDNN makes a plan for each number of keys: a plan for each token, of 20 ms or more. Training
    keeps cuDNN. On a CPU there is nothing to switch, and switching would cost each token.
    """
    return without_cudnn() if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def without_cudnn():
    """A context in which attention is not cuDNN's."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class FixedCache:
    """The buffers of a KVCache (B, K, capacity, D), read whole: a mask hides what is not yet written.

    length  tokens in the buffers, a tensor (1,) on the device of the buffers
    fixed   positions in the buffers: each mask covers all of them
    """
    def __init__(self, cache):
        self.keys, self.values, self.fixed = cache.keys, cache.values, cache.keys[0].shape[2]
        self.length = torch.full((1,), cache.length, device=cache.keys[0].device)

    def update(self, layer, k, v):
        """Writes k, v (B, K, T, D) behind `length` and returns all keys and values."""
        positions = self.length + torch.arange(k.shape[2], device=k.device)                    # (T,)
        self.keys[layer].index_copy_(2, positions, k)
        self.values[layer].index_copy_(2, positions, v)
        return self.keys[layer], self.values[layer]


class Replay:
    """Logits (B, 1, V) of the next tokens, ids (B, 1), as one launch; `cache` is extended by them.

    cache: a KVCache that has read the prompt and has room. Raises RuntimeError where a graph cannot
    be recorded, or computes something else than the model.
    """
    def __init__(self, model, cache):
        self.cache, self.fixed, start = cache, FixedCache(cache), cache.length
        device = cache.keys[0].device
        self.ids = torch.zeros(len(cache.keys[0]), 1, dtype=torch.int64, device=device)        # (B, 1)
        expected = model(self.ids, cache=cache)                                                # (B, 1, V)
        cache.length = start                           # the next token overwrites the keys of this one
        aside = torch.cuda.Stream(device)              # as PyTorch's notes on CUDA graphs say: first runs elsewhere
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.fixed.length.fill_(start)
                model(self.ids, cache=self.fixed)
        torch.cuda.current_stream(device).wait_stream(aside)
        self.fixed.length.fill_(start)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model(self.ids, cache=self.fixed)
        self.graph.replay()
        self.fixed.length.fill_(start)
        if not (self.logits - expected).norm() <= 0.05 * expected.norm():      # 16 bits: other kernels round otherwise
            raise RuntimeError("the graph computes something else")

    def __call__(self, ids):
        self.ids.copy_(ids)
        self.graph.replay()
        self.cache.length += 1
        return self.logits


def one_launch(model, cache):
    """A function ids (B, 1) -> logits (B, 1, V) behind the tokens in a KVCache: a Replay, or the model.

    A graph is for a GPU, and for a model without hooks, which it would not call.
    """
    plain, device, room = functools.partial(model, cache=cache), cache.keys[0].device, cache.keys[0].shape[2]
    if (device.type != "cuda" or room - cache.length < WORTH or model.training or torch.is_autocast_enabled("cuda")
            or any(hooks_of(model))):
        return plain
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)):   # a failed recording would leave another stream on
            return Replay(model, cache)
    except RuntimeError as error:
        say_once(f"CUDA graphs do not work here ({str(error).splitlines()[0]}): each token is launched kernel by "
                 "kernel, which is slower")
        return plain
