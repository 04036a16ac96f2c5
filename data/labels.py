"""A teacher's labels on disk: their header, and a reader."""
import collections
from pathlib import Path

import numpy as np
import torch

from data import UserError
from data.files import read_json
from data.loader import IGNORE, Batch
from data.values import check_values

Taught = collections.namedtuple("Taught", (*Batch._fields, "labels", "weights", "sampled"), defaults=(None,) * 3)
HEADER = {**dict.fromkeys(("teacher", "tokenizer", "data", "labels", "id_type"), (str,)), "format": (int,),
          "context": (int, 1, 2 ** 24), "windows": (int, 1, 2 ** 40), "seed": (int, 0, 2 ** 63), "draws": (int, 0, 255),
          "tokens": (int, 0, 2 ** 48), **dict.fromkeys(("bytes_per_token", "seconds"), (float, 0, 1e9))}


def read_header(directory):
    """header.json of a cache, a dict. Raises UserError if a field is missing or cannot be."""
    path = Path(directory) / "header.json"
    header = read_json(path)
    try:
        check_values(header, HEADER, path, needed=HEADER)
        if header["id_type"] not in ("uint16", "uint32"):
            raise UserError(f"{path}: id_type is {header['id_type']!r}; it must be uint16 or uint32")
    except UserError as error:
        raise UserError(f"{error}: delete the cache and it is made again") from None
    return header


class Cache:
    """Labels that make_cache wrote, memory-mapped. Raises UserError if they are not what `wanted` says, or not whole,
    or if one is not below `vocab_size` (None: not looked at)."""
    def __init__(self, directory, wanted, vocab_size=None):
        self.header = read_header(directory)
        if stale := [n for n, value in wanted.items() if self.header.get(n) != value]:
            raise UserError(f"the cache in {directory} is stale: its {stale[0]} is {self.header.get(stale[0])!r}, this "
                            f"run's {wanted[stale[0]]!r}; delete it, or give another --cache-dir")
        n, T, labels = self.header["windows"], self.header["context"], lambda: int(self.offsets[-1])
        for name, dtype, size in (("offsets", "int64", lambda: n + 1), ("counts", "uint8", labels),
                                  ("ids", self.header["id_type"], labels), ("lengths", "uint8", lambda: n * T)):
            file = Path(directory) / f"{name}.bin"
            if not file.is_file() or not file.stat().st_size == size() * np.dtype(dtype).itemsize > 0:
                raise UserError(f"the cache in {directory} is cut short ({file.name}): delete it and it is made again")
            setattr(self, name, np.memmap(file, dtype, "r"))
        blocks = range(0, n, max(1, 2 ** 24 // T))                           # of windows: the files may not fit memory
        sums = [self.lengths[i * T:(i + blocks.step) * T].reshape(-1, T).sum(1, dtype=np.int64) for i in blocks]
        most = max(int(self.ids[i:i + 2 ** 24].max()) for i in range(0, len(self.ids), 2 ** 24))
        if (self.offsets[0] or (np.diff(self.offsets) != np.concatenate(sums)).any()
                or vocab_size is not None and most >= vocab_size):
            raise UserError(f"the cache in {directory} holds labels that cannot be: delete it and it is made again")

    def rows(self, windows, seed, first, count, hard_weight):
        """Rows first ... first + count - 1 of the training stream with labels and their weights (count, T, M)."""
        batches, T = [], windows.context
        ids, weights, most = np.zeros((count, T, 256), np.int64), np.zeros((count, T, 256), np.float32), 0
        for i, n in enumerate(range(first, first + count)):
            batches.append(windows.training_rows(seed, n, 1))
            w = windows._epoch[1][n % windows.per_epoch]                     # which window row n is
            lengths, (a, b) = self.lengths[w * T:(w + 1) * T].astype(np.int64), self.offsets[w:w + 2]
            column = 1 + np.arange(b - a) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            where = i, np.repeat(np.arange(T), lengths), column
            ids[where], weights[where], most = self.ids[a:b], self.counts[a:b], max(most, lengths.max())
        batch = Batch(*(None if t[0] is None else torch.cat(t) for t in zip(*batches)))
        weights *= (1 - hard_weight) / np.maximum(weights.sum(2, keepdims=True), 1)
        ids[:, :, 0], weights[:, :, 0] = batch.targets.clamp(min=0), hard_weight * (batch.targets != IGNORE)
        return Taught(*batch, *(torch.from_numpy(a[:, :, :most + 1].copy()) for a in (ids, weights)))
