"""A teacher's labels on disk: sampled once from its distributions, read in every step of a run.

A label is a sample from the teacher's distribution at one position: a few ids, and how often each
was drawn. A cache of labels is a directory with

    header.json   whose labels they are, of which windows, and what they cost
    offsets.bin   int64, where the labels of each window begin, and where the last ones end
    lengths.bin   uint8 (windows, T), the number of ids at each position; 0 where nothing is learned
    ids.bin       uint16 (from 65,537 ids on uint32), the ids of all positions one after another
    counts.bin    uint8, how often each id was drawn
"""
import collections, time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError
from data.files import LABELS, read_json, refuse_foreign, replacing, sync, write_json
from data.loader import IGNORE, Batch
from data.processes import all_sum, say
from data.values import check_values

# A Batch with labels and weights (B, T, M), or with `sampled` (B, T), True where the student wrote.
LabelledBatch = collections.namedtuple("LabelledBatch", (*Batch._fields, "labels", "weights", "sampled"),
                                       defaults=(None,) * 3)
HEADER = {**dict.fromkeys(("teacher", "tokenizer", "data", "labels", "id_type"), (str,)), "format": (int,),
          "context": (int, 1, 2 ** 24), "windows": (int, 1, 2 ** 40), "seed": (int, 0, 2 ** 63), "draws": (int, 0, 255),
          "tokens": (int, 0, 2 ** 48), **dict.fromkeys(("bytes_per_token", "seconds"), (float, 0, 1e9))}
BYTES_A_TOKEN = 40


def systematic(probs, draws, generator=None):
    """Systematic sampling: equally spaced points of the cumulative distribution, randomly shifted.

    Returns the distinct ids drawn from each row of probs (R, V), their counts, and the numbers of
    ids. The expected count of id i is draws * p_i, as of independent draws (random-sampling
    KD: Anshumann et al., 2025), at less variance: a count is draws * p_i rounded down or up.
    """
    cdf, (R, V) = probs.cumsum(1), probs.shape
    points = (torch.arange(draws) + torch.rand(R, 1, generator=generator)).to(cdf) / draws * cdf[:, -1:]
    ids = torch.searchsorted(cdf, points, right=True).clamp(max=V - 1)                 # (R, draws), sorted
    keys, counts = torch.unique_consecutive(ids + V * torch.arange(R, device=ids.device)[:, None], return_counts=True)
    return keys % V, counts, torch.bincount(keys // V, minlength=R)


def draws_that_fit(probs):
    """The largest number of draws from probs (R, V) whose expected storage fits BYTES_A_TOKEN.

    An id takes 3 bytes (2, and 1 for the count), a position 2 (length, share of an offset). The
    expected number of ids is the sum of min(1, draws * p). No bias: probs alone decide.
    """
    rows, low, high = probs[::max(1, len(probs) // 64)], 1, 255
    while low < high:
        draws = (low + high + 1) // 2
        fits = 3 * (draws * rows).clamp(max=1).sum(1).mean() + 2 <= BYTES_A_TOKEN
        low, high = (draws, high) if fits else (low, draws - 1)
    return low


def make_cache(directory, header, windows, distributions, vocab_size, tokens_at_once=2048):
    """Runs the teacher once over all windows, `tokens_at_once`, and writes labels and header.

    header                a dict, to which figures are added; header["seed"] seeds the draws
    distributions(batch)  yields the teacher's distributions (R, vocab_size) at the learned
                          positions of a Batch
    """
    start, random, T = time.perf_counter(), torch.Generator().manual_seed(header["seed"]), windows.context
    rows, id_type = max(1, tokens_at_once // T), "uint16" if vocab_size <= 2 ** 16 else "uint32"
    draws, offsets, tokens = [], [0], 0
    with replacing(directory, LABELS) as new:
        files = [open(new / f"{name}.bin", "wb") for name in ("lengths", "ids", "counts", "offsets")]
        for batch in tqdm(windows.evaluation_batches(rows, once=False), total=-(-len(windows.windows) // rows),
                          desc="teacher", unit="batch", disable=None, leave=False):
            labels = []
            for probs in distributions(batch):
                draws.append(draws_that_fit(probs))
                labels.append(systematic(probs, draws[-1], random))
            ids, counts, sizes = (torch.cat(t).cpu().numpy() for t in zip(*labels))
            learned = (batch.targets != IGNORE).numpy()                                # (rows, T)
            lengths = np.zeros(learned.shape, np.uint8)
            lengths[learned] = sizes
            tokens += len(sizes)
            offsets += (offsets[-1] + lengths.sum(1, dtype=np.int64).cumsum()).tolist()
            for file, array, dtype in zip(files, (lengths, ids, counts), ("uint8", id_type, "uint8")):
                file.write(array.astype(dtype).tobytes())
        files[-1].write(np.array(offsets, np.int64).tobytes())
        size = sum(file.tell() for file in files)
        for file in files:
            file.close()
            sync(file.name)
        write_json(new / "header.json", {
            **header, "draws": round(sum(draws) / max(1, len(draws))), "id_type": id_type, "tokens": tokens,
            "bytes_per_token": round(size / tokens, 2), "seconds": round(time.perf_counter() - start, 2)})
        sync(new / "header.json")


def read_header(directory):
    """header.json of a cache, a dict. Raises UserError if a field is missing or impossible."""
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
    """Labels that make_cache wrote, memory-mapped.

    Raises UserError if the header differs from the dict `expected`, if a file is cut, or if an id
    is not below `vocab_size` (None: not checked).
    """
    def __init__(self, directory, expected, vocab_size=None):
        self.directory, self.header = Path(directory), read_header(directory)
        if stale := [name for name, value in expected.items() if self.header.get(name) != value]:
            raise UserError(f"the cache in {directory} is stale: its {stale[0]} is {self.header.get(stale[0])!r}, this "
                            f"run's {expected[stale[0]]!r}; delete it, or give another --cache-dir")
        n, T = self.header["windows"], self.header["context"]
        self.offsets = self._mapped("offsets", "int64", n + 1)
        labels = int(self.offsets[-1])
        self.counts = self._mapped("counts", "uint8", labels)
        self.ids = self._mapped("ids", self.header["id_type"], labels)
        self.lengths = self._mapped("lengths", "uint8", n * T)
        blocks = range(0, n, max(1, 2 ** 24 // T))                   # of windows: the files may not fit memory
        sums = [self.lengths[i * T:(i + blocks.step) * T].reshape(-1, T).sum(1, dtype=np.int64) for i in blocks]
        largest = max(int(self.ids[i:i + 2 ** 24].max()) for i in range(0, len(self.ids), 2 ** 24))
        if (self.offsets[0] or (np.diff(self.offsets) != np.concatenate(sums)).any()
                or vocab_size is not None and largest >= vocab_size):
            raise UserError(f"the cache in {directory} holds labels that cannot be: delete it and it is made again")

    def _mapped(self, name, dtype, count):
        file = self.directory / f"{name}.bin"
        if not file.is_file() or not file.stat().st_size == count * np.dtype(dtype).itemsize > 0:
            raise UserError(f"the cache in {self.directory} is cut short ({file.name}): delete it and it is made again")
        return np.memmap(file, dtype, "r")

    def rows(self, windows, seed, first, count, hard_weight, device="cpu"):
        """Rows first ... first + count - 1 of the training stream, as a LabelledBatch on the device.

        Column 0 of a position holds the text's own id with weight hard_weight; the teacher's ids
        behind it share the rest by their counts. Labels travel as they are stored, 3 bytes each, and
        are spread on the device.
        """
        batch, T = windows.training_rows(seed, first, count), windows.context
        chosen = [windows.window_of(seed, first + i)[0] for i in range(count)]
        lengths = np.stack([self.lengths[w * T:(w + 1) * T] for w in chosen])          # (count, T)
        width = 1 + int(lengths.max())
        ids, counts = (np.concatenate([stored[self.offsets[w]:self.offsets[w + 1]] for w in chosen])
                       for stored in (self.ids, self.counts))                          # (n,): all labels of the rows
        batch = Batch(*(None if t is None else t.to(device) for t in batch))
        lengths, ids, counts = (torch.from_numpy(a).to(device) for a in (lengths.reshape(-1), ids, counts))
        lengths = lengths.long()
        position = torch.arange(count * T, device=device).repeat_interleave(lengths, output_size=len(ids))       # (n,)
        column = 1 + torch.arange(len(ids), device=device) - (lengths.cumsum(0) - lengths)[position]
        labels = torch.zeros(count * T, width, dtype=torch.int64, device=device)
        weights = torch.zeros(count * T, width, device=device)
        labels[position, column], weights[position, column] = ids.long(), counts.float()
        sums = weights.sum(1, keepdim=True).clamp(min=1)
        weights *= torch.full_like(sums, 1 - hard_weight) / sums
        labels[:, 0] = batch.targets.flatten().clamp(min=0)
        weights[:, 0] = hard_weight * (batch.targets.flatten() != IGNORE)
        return LabelledBatch(*batch, *(t.view(count, T, width) for t in (labels, weights)))


def label_seconds(distributions, windows):
    """Seconds that the label of one position costs, measured on 16 windows."""
    probe, start = next(windows.subset(16, 2).evaluation_batches(16)), time.perf_counter()
    for probs in distributions(probe):
        systematic(probs, draws_that_fit(probs))
    return (time.perf_counter() - start) / probe.ids.numel()


def open_cache(cfg, distributions, teacher_hash, windows, tokenizer, machine, step_seconds):
    """(Cache, the Windows it labels): an existing cache of this teacher and text, or a new one.

    Without --pool a new cache is as large as the run can read --passes times in its time;
    step_seconds() measures a step. The first process writes it. distributions: see make_cache.
    """
    directory, size = Path(cfg.cache_dir or Path(cfg.out) / "cache"), cfg.batch_size * cfg.context
    if machine.rank == 0:
        refuse_foreign(directory, LABELS, "--cache-dir")
    header = read_header(directory) if (directory / "header.json").is_file() else {}
    if not cfg.pool and not header:
        a_token = label_seconds(distributions, windows)
        reads = cfg.steps * size or 60 * cfg.minutes / (step_seconds() / size + a_token / cfg.passes)
        cfg.pool = int(all_sum(machine, torch.tensor(float(reads))) / machine.size / cfg.passes)
    pool = windows.subset(header.get("windows") or cfg.pool // cfg.context, header.get("seed", cfg.seed))
    expected = dict(format=2, teacher=teacher_hash, tokenizer=tokenizer.hash[:16], data=windows.meta["sha256"],
                    context=cfg.context, windows=pool.per_epoch, labels="sampled")
    if not header and machine.rank == 0:
        make_cache(directory, {**expected, "seed": cfg.seed}, pool, distributions, tokenizer.vocab_size,
                   2048 if machine.device.type == "cpu" else 16384)
    all_sum(machine, torch.zeros(()))                                # the other processes wait for the first
    cache = Cache(directory, expected, tokenizer.vocab_size)
    say(machine, "cache: {tokens:,} tokens, on average {draws} draws and {bytes_per_token} bytes each; the "
                 "teacher took {seconds:.0f} s".format(**cache.header))
    return cache, pool
