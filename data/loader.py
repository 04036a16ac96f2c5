"""Batches from a prepared data directory, memory-mapped: the corpus may be larger than memory.

Row n of a run is a pure function of (seed, n), and step s of batch size B takes rows s * B to
s * B + B - 1. So there is nothing to store for resuming, and ranks or accumulation only choose
which of a step's rows they read.
"""
import bisect, copy
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import UserError
from data.files import read_json
from data.values import check_values

IGNORE = -100           # target of a position that is not learned: padding, prompts (torch's ignore_index)
LEARNED, FIRST = 1, 2   # bits of *.mask.bin: this token is learned; this token begins an example

Batch = namedtuple("Batch", "ids targets segments")     # (B, T) int64 each; segments None unless examples are packed

# Fields of meta.json that are used: see data/values.py.
META = {"name": (str,), "kind": (str,), "dtype": (str,), "vocab_size": (int, 1, 2 ** 31), "tokenizer_hash": (str,),
        "sha256": (str,), "splits": (dict,)}
ADDED = {"repetition": (float, 0, 1e6)}                 # not of all data
SPLITS = dict.fromkeys(("train", "val"), (dict,))
COUNTS = {"tokens": (int, 0, 2 ** 48)}


def read_meta(directory):
    """meta.json of a prepared directory. Raises UserError for a missing or impossible field."""
    path = Path(directory) / "meta.json"
    try:
        meta = read_json(path)
        check_values(meta, {**META, **ADDED}, path, needed=META)
        check_values(meta["splits"], SPLITS, f"{path}: splits", needed=SPLITS)
        for split in SPLITS:
            check_values(meta["splits"][split], COUNTS, f"{path}: splits: {split}", needed=COUNTS)
        for name, known in (("dtype", ("uint16", "uint32")), ("kind", ("text", "examples"))):
            if meta[name] not in known:
                raise UserError(f"{path}: {name} is {meta[name]!r}; it must be one of {', '.join(known)}")
    except UserError as error:
        raise UserError(f"{error}: prepare the data anew") from None
    return meta


def open_split(directory, split):
    """(meta.json as a dict, tokens of the split, mask of the split or None), memory-mapped.

    Raises UserError if the files contradict meta.json. All ids are read once (0.02 s for 100
    million in memory): an id that the tokenizer does not have would end a run in the middle.
    """
    directory, meta = Path(directory), read_meta(directory)
    count, ids = meta["splits"][split]["tokens"], meta["vocab_size"]

    def mapped(name, dtype):
        file, wanted = directory / name, count * np.dtype(dtype).itemsize
        size = file.stat().st_size if file.is_file() else None
        if size != wanted:
            state = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(f"{file} {state}, and meta.json says {wanted:,}: the file was cut or replaced; prepare the "
                            "data anew")
        return np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)
    tokens = mapped(f"{split}.bin", meta["dtype"])
    mask = mapped(f"{split}.mask.bin", np.uint8) if meta["kind"] == "examples" else None
    for i in range(0, len(tokens) if ids <= np.iinfo(tokens.dtype).max else 0, 2 ** 24):
        if (largest := int(tokens[i:i + 2 ** 24].max())) >= ids:
            raise UserError(f"{directory / split}.bin holds the id {largest:,}, and meta.json says that there are only "
                            f"{ids:,}: the file is damaged; prepare the data anew")
    return meta, tokens, mask


class Windows:
    """Windows of `context` tokens, and the token after each, that cover one split of prepared data.

    Plain text is cut every `context` tokens. Each epoch has a new order, and a shift of all cuts,
    so all tokens are learned about equally often; the shift costs one window:

        tokens  0 1 2 3 4 5 6 7 8 ...    context 4, shift 1: ids [1 2 3 4] [5 6 7 8] ...

    Examples (prompts and responses, conversations): a window holds whole ones, as many as fit. A
    longer one is read in pieces that overlap by half a window; a piece in which nothing new is
    learned is left out. Training learns the overlap twice, which costs nothing (1.124 against 1.138
    bits per byte of MedQuAD); evaluation scores each token once:

        example 0 1 2 3 4 5 6 7 8        context 4: ids [0 1 2 3] [3 4 5 6] [6 7]

    pieces   (n, 3) int64, each (start, fresh, end): tokens start ... end - 1 are read; those before
             `fresh` are in the piece before, too
    windows  the numbers of the pieces in each window
    long     number of examples longer than the window
    unread   number of examples whose first response does not see the beginning of the prompt
    Raises UserError if the split is shorter than one window.
    """
    def __init__(self, directory, split, context):
        self.meta, tokens, mask = open_split(directory, split)
        if mask is None and len(tokens) < context + 1:
            raise UserError(f"the {split} split of {Path(directory).name} has {len(tokens)} tokens, less than one "
                            f"window of {context} and the token after it: give it more text or lower --context")
        self._lay_out(tokens, mask, context)

    @classmethod
    def of(cls, examples, context):
        """Windows of examples in memory: a list of (ids, mask) as data/prepare.py encodes them."""
        windows = cls.__new__(cls)
        windows._lay_out(*map(np.concatenate, zip(*examples)), context)
        return windows

    def _lay_out(self, tokens, mask, context):
        self.tokens, self.mask, self.context, self.long, self.unread = tokens, mask, context, 0, 0
        self._epoch, length = None, len(tokens)
        if mask is not None:
            self.pieces = self._cut(np.flatnonzero(mask & FIRST), length)
            self.windows = packed((self.pieces[:, 2] - self.pieces[:, 0] - 1).tolist(), context)
            self.per_epoch, self.max_shift = len(self.windows), 0
        else:
            starts = np.arange(0, length - 1, context)
            self.pieces = np.stack((starts, starts, np.minimum(starts + context + 1, length)), 1)
            self.windows = np.arange(len(starts))[:, None]
            self.per_epoch = max(1, (length - 1) // context - 1)
            self.max_shift = length - 1 - self.per_epoch * context

    def subset(self, count, seed):
        """A fixed random subset of `count` windows (at most all), identical in every epoch."""
        subset = copy.copy(self)
        chosen = np.sort(np.random.default_rng(seed).permutation(self.per_epoch)[:max(1, count)])
        subset.windows, subset._epoch = [self.windows[w] for w in chosen], None
        subset.per_epoch, subset.max_shift = len(chosen), 0
        return subset

    def _cut(self, firsts, length):
        bounds = np.append(firsts, length)
        if len(firsts) == 0:
            raise UserError("the split has no examples: prepare it anew with more data, or --val-fraction")
        learned = np.append(np.flatnonzero(self.mask & LEARNED), length)
        starts = learned[np.searchsorted(learned, firsts)]                                # of each first response
        self.long = int((np.diff(bounds) > self.context + 1).sum())
        self.unread = int((starts - firsts > self.context).sum())
        pieces = []
        for start, last in zip(firsts.tolist(), bounds[1:].tolist()):
            fresh = start
            while last - start > self.context + 1:
                end = start + self.context + 1
                if np.subtract(*np.searchsorted(learned, (end, fresh))):     # tokens learned from `fresh` on
                    pieces.append((start, fresh, end))
                start, fresh = end - max(1, self.context // 2), end
            pieces.append((start, fresh, last))
        return np.array(pieces)

    def _rows(self, windows, shift=0, once=True):
        B, T = len(windows), self.context
        ids, targets = np.zeros((B, T), np.int64), np.full((B, T), IGNORE, np.int64)
        segments = np.zeros((B, T), np.int64) if self.mask is not None else None
        for row, window in enumerate(windows):
            n = 0
            for segment, piece in enumerate(window, 1):
                start, fresh, end = self.pieces[piece] + shift
                tokens, here, n = self.tokens[start:end], slice(n, n + end - start - 1), n + end - start - 1
                ids[row, here], targets[row, here] = tokens[:-1], tokens[1:]
                if self.mask is not None:
                    not_learned = self.mask[start + 1:end] & LEARNED == 0
                    if once:
                        not_learned[:max(0, fresh - start - 1)] = True
                    targets[row, here][not_learned] = IGNORE
                    segments[row, here] = segment
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets),
                     None if segments is None else torch.from_numpy(segments))

    def window_of(self, seed, n):
        """(number of the window, shift in tokens) of row n of the shuffled stream of `seed`."""
        epoch, place = divmod(n, self.per_epoch)
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            random = np.random.default_rng((seed, epoch))
            self._epoch = ((seed, epoch), random.permutation(self.per_epoch), random.integers(self.max_shift + 1))
        _, order, shift = self._epoch
        return order[place], shift

    def training_rows(self, seed, first, count):
        """Rows first ... first + count - 1 of the endless, shuffled stream of `seed`: a Batch."""
        rows = []
        for n in range(first, first + count):
            window, shift = self.window_of(seed, n)
            rows.append(self._rows([self.windows[window]], shift, once=False))
        return Batch(*(None if t[0] is None else torch.cat(t) for t in zip(*rows)))

    def evaluation_batches(self, batch_size, max_tokens=None, once=True):
        """Yields a Batch for every `batch_size` windows of the split, in order.

        max_tokens  only as many windows as hold them, spread evenly over the split
        once        each token is a target once; False: the targets of training
        """
        chosen = np.arange(len(self.windows))
        if max_tokens and len(chosen) * self.context > max_tokens:
            chosen = np.linspace(0, len(chosen) - 1, max(1, max_tokens // self.context)).astype(int)
        for i in range(0, len(chosen), batch_size):
            yield self._rows([self.windows[w] for w in chosen[i:i + batch_size]], once=once)


def packed(sizes, room):
    """Packs pieces into windows of `room` tokens: a list of lists of piece numbers.

    Best-fit decreasing: each piece, the largest first, goes where it leaves the least room (for
    language models Ding et al., 2024).
    """
    windows, rooms = [], []                                  # rooms: (tokens left, window), sorted
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (sizes[piece],))
        left, window = rooms.pop(at) if at < len(rooms) else (room, len(windows))
        if window == len(windows):
            windows.append([])
        windows[window].append(piece)
        bisect.insort(rooms, (left - sizes[piece], window))
    return windows


def stream_batches(ids, context):
    """Yields a stream of ids (N,) as a Batch of windows: each id but the first is a target once.

    The last window is padded with targets that are ignored.
    """
    ids, rows = torch.as_tensor(np.asarray(ids, np.int64)), max(1, 8192 // context)
    for i in range(0, len(ids) - 1, rows * context):
        piece = ids[i:i + rows * context + 1]
        fill = (0, -(len(piece) - 1) % context)
        targets = F.pad(piece[1:], fill, value=IGNORE).view(-1, context)               # (windows, context)
        yield Batch(F.pad(piece[:-1], fill).view(-1, context), targets, None)
