"""Training rows from several prepared data sets: train.py --mix NAME_OR_DIR:SHARE."""
import collections
from fractions import Fraction

import torch

from data import UserError
from data.loader import IGNORE, Batch, Windows, read_meta
from data.prepare import find

Part = collections.namedtuple("Part", "name sha256 share train val")       # share: Fraction; Windows of both splits


class Mixture:
    """One endless stream of training rows: of each part as large a share as it names.

    windows   Windows of the main data, which has the rest
    parts     list of Part

    Row n belongs to a part of share s where floor(s * n) grows by one: any stretch of the stream
    has the share, to within one row (Bresenham's line, 1965). The next part divides the rows that
    are left. The k-th row of a part is row k of the part's own stream, so each text is read in
    whole epochs, and row n is still a pure function of (seed, n).
    """
    def __init__(self, windows, parts=()):
        self.sources, self.rates, left = [part.train for part in parts] + [windows], [], Fraction(1)
        for part in parts:
            self.rates.append(part.share / left)                 # of the rows that earlier parts leave
            left -= part.share
        self.shares = [part.share for part in parts] + [left]
        self.has_segments = any(source.mask is not None for source in self.sources)

    def source_of(self, n):
        """(Windows, number of a row of theirs) for row n."""
        for source, rate in zip(self.sources, self.rates):
            taken = int(n * rate)
            if int((n + 1) * rate) > taken:
                return source, taken
            n -= taken
        return self.sources[-1], n

    def training_rows(self, seed, first, count):
        """Rows first ... first + count - 1 of the stream of `seed`: a Batch."""
        if len(self.sources) == 1:
            return self.sources[0].training_rows(seed, first, count)
        rows = []
        for source, n in map(self.source_of, range(first, first + count)):
            row = source.training_rows(seed, n, 1)
            if self.has_segments and row.segments is None:
                row = row._replace(segments=torch.ones_like(row.ids))          # a window of text is one segment
            rows.append(row)
        return Batch(*(None if t[0] is None else torch.cat(t) for t in zip(*rows)))

    def readings(self):
        """{name: tokens of the stream in which that text is read once}, the main data first."""
        return {source.meta["name"]: float(source.per_epoch * source.context / share)
                for source, share in reversed(list(zip(self.sources, self.shares)))}

    def bytes_per_token(self, token_bytes, seed):
        """Mean bytes of a learned token, of the first 2^18 tokens of the stream. token_bytes: (V,)."""
        targets = self.training_rows(seed, 0, max(1, 2 ** 18 // self.sources[0].context)).targets
        targets = targets[targets != IGNORE].numpy()
        return float(token_bytes[targets].sum() / max(1, len(targets)))


def open_mix(cfg, directory, tokenizer):
    """The list of Parts that --mix names beside the main data in `directory`; [] without --mix.

    Raises UserError for shares out of range, and for data that is missing, too short, of another
    tokenizer, or of a name that another one has.
    """
    parts, names = [], {read_meta(directory)["name"]}
    for item in cfg.mix.split(",") if cfg.mix else ():
        wanted, share = named_share(item.strip())
        other = find(wanted, cfg.smoke, "--mix")
        if other is None:
            raise UserError(f"--mix {wanted} is not prepared yet: python data/prepare.py {wanted} --tokenizer "
                            f"{directory}")
        meta = read_meta(other)
        if meta["tokenizer_hash"] != tokenizer.hash:
            raise UserError(f"--mix {wanted} was prepared with another tokenizer than the data {cfg.data}: prepare it "
                            f"once more with data/prepare.py --tokenizer {directory} --out NEW_DIR, and mix NEW_DIR")
        if meta["name"] in names:
            raise UserError(f"--mix {wanted}: there is already data of the name {meta['name']}, under which figures "
                            "are logged: leave one out, or prepare it under another --name")
        names.add(meta["name"])
        parts.append(Part(meta["name"], meta["sha256"], share,
                          *(Windows(other, split, cfg.context) for split in ("train", "val"))))
    if (total := sum(part.share for part in parts)) >= 1:
        raise UserError(f"--mix {cfg.mix}: the shares make {float(total):g}, which leaves nothing for --data: together "
                        "they must be below 1")
    return parts


def named_share(item):
    """(name, share as a Fraction) of "stdlib:0.3". Raises UserError unless 0 < share < 1."""
    name, _, text = item.rpartition(":")
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not name or not 0 < share < 1:
        raise UserError(f"--mix {item} must be NAME_OR_DIR:SHARE with a share between 0 and 1, such as stdlib:0.3")
    return name, share
