"""Batches out of a prepared data directory, memory-mapped: training reads a corpus larger than memory.

Row n of a run is a pure function of (seed, n), and step s of batch size B takes rows s * B ... s * B + B - 1. So there
is nothing to store for resuming, and ranks or accumulation only choose which of a step's rows they read.
"""
import bisect, json
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import UserError
from data.values import check_values

IGNORE = -100           # target of a position that is not learned: padding, prompts (torch's ignore_index)
LEARNED, FIRST = 1, 2   # bits of *.mask.bin: this token is learned; this token begins an example

Batch = namedtuple("Batch", "ids targets segments")     # (B, T) int64 each; segments None unless examples are packed


META = {"name": (str,), "kind": (str,), "dtype": (str,), "vocab_size": (int, 1, 2 ** 31), "tokenizer_hash": (str,),
        "sha256": (str,), "splits": (dict,)}


SPLITS = dict.fromkeys(("train", "val"), (dict,))
COUNTS = {"tokens": (int, 0, 2 ** 48)}


def read_meta(directory):
    """meta.json of a prepared directory, a dict. Raises UserError if a field that is used is missing or cannot be."""
    path = Path(directory) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        check_values({"meta": meta}, {"meta": (dict,)}, path)
        check_values(meta, META, path, needed=META)
        check_values(meta["splits"], SPLITS, f"{path}: splits", needed=SPLITS)
        for split in SPLITS:
            check_values(meta["splits"][split], COUNTS, f"{path}: splits: {split}", needed=COUNTS)
        for name, known in (("dtype", ("uint16", "uint32")), ("kind", ("text", "examples"))):
            if meta[name] not in known:
                raise UserError(f"{path}: {name} is {meta[name]!r}; it must be one of {', '.join(known)}")
    except UserError as error:
        raise UserError(f"{error}: prepare the data anew") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): prepare the data anew") from None
    return meta


def open_split(directory, split):
    """(meta.json as a dict, the split's tokens, its mask or None), mapped. Raises UserError if the files are not as
    meta.json says. All ids are looked at once, 0.02 s for 100 million in memory: one that the tokenizer does not have
    would end a run in the middle."""
    directory, meta = Path(directory), read_meta(directory)
    count, ids = meta["splits"][split]["tokens"], meta["vocab_size"]

    def mapped(name, dtype):
        file, wanted = directory / name, count * np.dtype(dtype).itemsize
        size = file.stat().st_size if file.is_file() else None
        if size != wanted:
            there = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(f"{file} {there}, and meta.json says {wanted:,}: the file was cut or replaced; prepare the "
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
    """One split cut into windows of `context` tokens and the token after each.

    Plain text: an epoch is all windows but one, which fit behind a shift; order and shift are new in each epoch, so all
    tokens are learned about equally often. Prompts and responses: whole examples, as many as fit. One longer than the
    window is taken in pieces, each read behind half a window of what came before it, as in generation; `long` counts
    those examples, `unread` those whose prompt alone is longer, so that its beginning is out of sight of the response.
    Training learns that half again, as it is computed anyway (1.124 against 1.138 bits per byte of MedQuAD after five
    minutes); evaluation scores each token once.
    pieces: (n, 3) int64, each (start, fresh, end): tokens start ... end - 1 are read, those from fresh on are new
    windows: the numbers of the pieces in each
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
        """Windows of examples in memory: a list of (ids, mask), as data/prepare.py encodes them."""
        windows = cls.__new__(cls)
        windows._lay_out(*map(np.concatenate, zip(*examples)), context)
        return windows

    def _lay_out(self, tokens, mask, context):
        self.tokens, self.mask, self.context, self.long, self.unread = tokens, mask, context, 0, 0
        length = len(tokens)
        if mask is not None:
            self.pieces = self._cut(np.flatnonzero(self.mask & FIRST), length)
            self.windows = packed((self.pieces[:, 2] - self.pieces[:, 0] - 1).tolist(), context)
        else:
            starts = np.arange(0, length - 1, context)
            self.pieces = np.stack((starts, starts, np.minimum(starts + context + 1, length)), 1)
            self.windows = np.arange(len(starts))[:, None]
        self.per_epoch = len(self.windows) if self.mask is not None else max(1, (length - 1) // context - 1)
        self.max_shift = 0 if self.mask is not None else length - 1 - self.per_epoch * context
        self._epoch = None

    def _cut(self, firsts, length):
        bounds = np.append(firsts, length)
        if len(firsts) == 0:
            raise UserError("the split has no examples: prepare it anew with more data, or --val-fraction")
        learned = np.append(np.flatnonzero(self.mask & LEARNED), length)
        answers = learned[np.searchsorted(learned, firsts)]                               # where each response begins
        self.long = int((np.diff(bounds) > self.context + 1).sum())
        self.unread = int((answers - firsts > self.context).sum())
        pieces = []
        for start, answer, last in zip(firsts.tolist(), answers.tolist(), bounds[1:].tolist()):
            fresh = start
            while last - start > self.context + 1:
                end = start + self.context + 1
                if end > answer:                             # or nothing of it is learned
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

    def training_rows(self, seed, first, count):
        """Rows first ... first + count - 1 of the endless, shuffled stream that `seed` names."""
        windows = []
        for n in range(first, first + count):
            epoch, w = divmod(n, self.per_epoch)
            if self._epoch is None or self._epoch[0] != (seed, epoch):
                random = np.random.default_rng((seed, epoch))
                self._epoch = ((seed, epoch), random.permutation(self.per_epoch), random.integers(self.max_shift + 1))
            _, order, shift = self._epoch
            windows.append(self._rows([self.windows[order[w]]], shift, once=False))
        return Batch(*(None if t[0] is None else torch.cat(t) for t in zip(*windows)))

    def evaluation_batches(self, batch_size, max_tokens=None, once=True):
        """Every window of the split once, in order; or as many as hold max_tokens, spread over the split. once=False:
        with the targets of training."""
        chosen = np.arange(len(self.windows))
        if max_tokens and len(chosen) * self.context > max_tokens:
            chosen = np.linspace(0, len(chosen) - 1, max(1, max_tokens // self.context)).astype(int)
        for i in range(0, len(chosen), batch_size):
            yield self._rows([self.windows[w] for w in chosen[i:i + batch_size]], once=once)


def packed(sizes, room):
    """Which of the pieces share a window of `room`, lists of their numbers: each, the largest first, goes where it
    leaves the least room (best-fit decreasing; for language models Ding et al., 2024)."""
    windows, rooms = [], []                                  # rooms: (what is left, window), sorted
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (sizes[piece],))
        left, window = rooms.pop(at) if at < len(rooms) else (room, len(windows))
        if window == len(windows):
            windows.append([])
        windows[window].append(piece)
        bisect.insort(rooms, (left - sizes[piece], window))
    return windows


def stream_batches(ids, context):
    """A stream of ids (N,) in windows of `context` and the one after each, which begins the next: each id but the first
    is predicted once. The last window is filled up with targets that are ignored."""
    ids, rows = torch.as_tensor(np.asarray(ids, np.int64)), max(1, 8192 // context)
    for piece in (ids[i:i + rows * context + 1] for i in range(0, len(ids) - 1, rows * context)):
        fill = (0, -(len(piece) - 1) % context)
        targets = F.pad(piece[1:], fill, value=IGNORE).view(-1, context)
        yield Batch(F.pad(piece[:-1], fill).view(-1, context), targets, None)
