"""Batches out of a prepared data directory, memory-mapped: training reads a corpus larger than memory.

Row n of a run is a pure function of (seed, n), and step s of batch size B takes rows s * B ... s * B + B - 1. So there
is nothing to store for resuming, and ranks or accumulation only choose which of a step's rows they read.
"""
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from data import UserError

IGNORE = -100           # target of a position that is not learned: padding, prompts (torch's ignore_index)
LEARNED, FIRST = 1, 2   # bits of *.mask.bin: this token is learned; this token begins an example

Batch = namedtuple("Batch", "ids targets segments")     # (B, T) int64 each; segments None unless examples are packed


class Windows:
    """One split cut into windows of `context` tokens and the token after each.

    Plain text: an epoch is all windows but one, which fit behind a shift; order and shift are new in each epoch, so all
    tokens are learned about equally often. Prompts and responses: whole examples, as many as fit; one longer than the
    window begins one and is cut (`truncated` counts them). Raises UserError if the split is shorter than one window.
    """
    def __init__(self, directory, split, context):
        directory = Path(directory)
        self.meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.context, self.truncated = context, 0
        self.tokens = np.memmap(directory / f"{split}.bin", dtype=self.meta["dtype"], mode="r")
        self.mask = None
        length = len(self.tokens)
        if self.meta["kind"] == "examples":
            self.mask = np.memmap(directory / f"{split}.mask.bin", dtype=np.uint8, mode="r")
            self._pack(np.flatnonzero(self.mask & FIRST), length)
        elif length < context + 1:
            raise UserError(f"the {split} split of {directory.name} has {length} tokens, less than one window of "
                            f"{context} and the token after it: give it more text or lower --context")
        else:
            self.starts, self.ends = np.arange(0, length - 1, context), None
        self.per_epoch = len(self.starts) if self.mask is not None else max(1, (length - 1) // context - 1)
        self.max_shift = 0 if self.mask is not None else length - 1 - self.per_epoch * context
        self._epoch = None

    def _pack(self, firsts, length):
        bounds = np.append(firsts, length)
        if len(firsts) == 0:
            raise UserError("the split has no examples: give it more data")
        starts, ends, i = [], [], 0
        while i < len(firsts):
            j = np.searchsorted(bounds, bounds[i] + self.context + 1, side="right") - 1   # examples i ... j - 1 fit
            self.truncated += int(j <= i)
            j = max(j, i + 1)
            starts.append(bounds[i])
            ends.append(min(bounds[j], bounds[i] + self.context + 1))
            i = j
        self.starts, self.ends = np.array(starts), np.array(ends)

    def _rows(self, starts, ends):
        B, T = len(starts), self.context
        ids, targets = np.zeros((B, T), np.int64), np.full((B, T), IGNORE, np.int64)
        segments = np.zeros((B, T), np.int64) if self.mask is not None else None
        for row, (start, end) in enumerate(zip(starts, ends)):
            window = self.tokens[start:end].astype(np.int64)
            ids[row, :len(window) - 1], targets[row, :len(window) - 1] = window[:-1], window[1:]
            if self.mask is not None:
                mask = self.mask[start:end]
                targets[row, :len(window) - 1][(mask[1:] & (LEARNED | FIRST)) != LEARNED] = IGNORE
                segments[row, :len(window) - 1] = np.cumsum(mask[:-1] & FIRST)
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets),
                     None if segments is None else torch.from_numpy(segments))

    def training_rows(self, seed, first, count):
        """Rows first ... first + count - 1 of the endless, shuffled stream that `seed` names."""
        starts, ends = [], []
        for n in range(first, first + count):
            epoch, w = divmod(n, self.per_epoch)
            if self._epoch is None or self._epoch[0] != (seed, epoch):
                random = np.random.default_rng((seed, epoch))
                self._epoch = ((seed, epoch), random.permutation(self.per_epoch), random.integers(self.max_shift + 1))
            _, order, shift = self._epoch
            start = self.starts[order[w]] + shift
            starts.append(start)
            ends.append(start + self.context + 1 if self.ends is None else self.ends[order[w]])
        return self._rows(starts, ends)

    def evaluation_batches(self, batch_size, max_tokens=None):
        """Every window of the split once, in order; or as many as hold max_tokens, spread over the split."""
        chosen = np.arange(len(self.starts))
        if max_tokens and len(chosen) * self.context > max_tokens:
            chosen = np.linspace(0, len(chosen) - 1, max(1, max_tokens // self.context)).astype(int)
        for i in range(0, len(chosen), batch_size):
            starts = self.starts[chosen[i:i + batch_size]]
            yield self._rows(starts, np.minimum(starts + self.context + 1, len(self.tokens)) if self.ends is None
                             else self.ends[chosen[i:i + batch_size]])
