"""
Second pass of prepare: threads encode documents into files that can be continued after a kill.

A task is a list of (TRAIN or VAL, item). An item is a piece of text, an Example, or None at a
document's end. The tasks of the same sources are always the same, so a count says what is done.
"""
import contextlib, json, os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data import UserError, corpora
from data.files import sync, write_json
from data.loader import FIRST, LEARNED
from data.split import BOTH, TRAIN, VAL

TASK = 256 << 10  # bytes that a thread encodes at a time: few hand-overs, and a small queue
SAVE_EVERY = 256  # tasks (64 MB of text): the most work that a kill costs


def encode_examples(tokenizer, examples):
    """(ids uint32 (n,), mask uint8 (n,)) of each (prompt, response), in the chat template.

    An example is tokenized as one text, as a chat is. Special tokens are recognised in the template
    only. Text of the template after the end token is left out.
    """
    chats = []
    for prompt, response in examples:
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
        chats += [([user], True), ([user, assistant], False)]
    texts = tokenizer.render_all(chats)
    return [encode_texts(tokenizer, *texts[i:i + 2]) for i in range(0, len(texts), 2)]


def encode_texts(tokenizer, prompt, full):
    """(ids, mask) of a rendered prompt and the `full` text with a response, marked as LEARNED."""
    if not full.startswith(prompt):
        raise UserError("the tokenizer's chat template does not write an answer right after its generation prompt")
    rest, encoded = full[len(prompt):], lambda text: tokenizer.encode_array(text, special=True)
    head = encoded(prompt)
    # Where a token would span the border of prompt and response, the head stays as in a chat, and
    # the response is encoded behind a text with which it shares no token: SentencePiece would put a
    # space before a response alone.
    for before in (prompt, "") if tokenizer.pattern else (prompt, "\n", ".", ""):
        start, both = head if before == prompt else encoded(before), encoded(before + rest)
        if np.array_equal(both[:len(start)], start):
            break
    tail = both[len(start):]
    if tokenizer.bos_id is not None and head[:1].tolist() != [tokenizer.bos_id]:  # as in a chat
        head = np.append(np.uint32(tokenizer.bos_id), head)
    ends = np.flatnonzero(np.isin(tail, tokenizer.eos_ids))
    tail = tail[:ends[-1] + 1] if len(ends) else np.append(tail, np.uint32(tokenizer.eos_id))
    mask = np.zeros(len(head) + len(tail), np.uint8)
    mask[len(head):] = LEARNED
    mask[0] |= FIRST
    return np.concatenate([head, tail]), mask


def tasks(sources, kind, stats):
    """Yields (task, bytes of text), and adds documents and bytes to `stats`, a dict per split.

    Raises UserError if a file changed since the first pass.
    """
    task, waiting = [], 0
    for source in sources:
        for name, parts, side, size in source.documents(TRAIN, VAL, BOTH):
            read = 0
            try:
                for which, piece, data in source.pieces(parts, side, size):
                    read, waiting = read + len(data), waiting + len(data)
                    stats[which]["bytes"] += len(data)
                    task.append((which, parts if piece is None else piece))
                    if waiting > TASK:
                        yield task, waiting
                        task, waiting = [], 0
            except corpora.Skip:
                read = -1
            if read != size:
                raise UserError(f"{name} changed while it was read; run it again")
            for which in (TRAIN, VAL) if side == BOTH else (side,):
                stats[which]["documents"] += 1
                if kind == "text":
                    task.append((which, None))
            if kind == "examples":
                stats[which]["bytes"] -= 1  # the \0 between the two
                stats[which]["response_bytes"] += len(parts.response.encode("utf-8"))
    yield task, waiting


def encode(tokenizer, task, dtype):
    """Bytes that `task` adds to train.bin, val.bin, train.mask.bin and val.mask.bin: four."""
    added = [bytearray() for _ in range(4)]
    examples = [(item.prompt, item.response) for _, item in task if isinstance(item, tuple)]
    examples = iter(encode_examples(tokenizer, examples))
    for which, item in task:
        if isinstance(item, tuple):
            ids, mask = next(examples)
            added[2 + which] += mask.tobytes()
        else:
            ids = np.array([tokenizer.eos_id]) if item is None else tokenizer.encode_array(item)
        added[which] += ids.astype(dtype).tobytes()
    return added


class Output(contextlib.ExitStack):
    """The .bin files of a dataset under way; part/progress.json has the count of tasks and sizes.

    After a kill the files are cut to these sizes. If a file is shorter, all begin again.
    """

    def __init__(self, part, progress, kind):
        super().__init__()
        self.part, self.progress = part, progress
        names = ["train.bin", "val.bin"] + ["train.mask.bin", "val.mask.bin"] * (kind == "examples")
        sizes = [(part / name).stat().st_size if (part / name).is_file() else 0 for name in names]
        if "tasks" not in progress or any(size < saved for size, saved in zip(sizes, progress["sizes"])):
            progress.update(tasks=0, sizes=[0] * len(names), learned=[0, 0])
        self.files = [self.enter_context(open(part / name, "ab")) for name in names]
        for file, size in zip(self.files, progress["sizes"]):
            file.truncate(size)

    def append(self, added):
        """Appends the bytes of one task, as `encode` gives them."""
        for i, (file, data) in enumerate(zip(self.files, added)):
            file.write(data)
            self.progress["sizes"][i] += len(data)
            if i >= 2:
                self.progress["learned"][i - 2] += int((np.frombuffer(data, np.uint8) & LEARNED).sum())
        self.progress["tasks"] += 1

    def save(self):
        """Writes progress.json, after everything before is on disk."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        write_json(self.part / "progress.json", self.progress)


def write(part, progress, tokenizer, sources, kind):
    """Encodes `sources`, in order, into the .bin files. Returns (meta.json's "splits", dtype name).

    Tasks that an interrupted run has done are counted only.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 65536 else "<u4")
    keys = ("documents", "tokens", "bytes") + ("response_tokens", "response_bytes") * (kind == "examples")
    stats, pending, cores = [dict.fromkeys(keys, 0) for _ in range(2)], deque(), os.cpu_count() or 1
    total = sum(source.total_bytes() for source in sources)
    with (Output(part, progress, kind) as output, ThreadPoolExecutor(cores) as pool,
          tqdm(total=total, unit="B", unit_scale=True, desc="encode", disable=None, leave=False) as bar):
        done = progress["tasks"]
        for number, (task, size) in enumerate(tasks(sources, kind, stats), 1):
            bar.update(size)
            if number <= done:
                continue
            pending.append(pool.submit(encode, tokenizer, task, dtype))
            if len(pending) > 2 * cores:
                output.append(pending.popleft().result())
            if number % SAVE_EVERY == 0:
                output.save()
        for future in pending:
            output.append(future.result())
        output.save()
    for which, counts in enumerate(stats):
        counts["tokens"] = progress["sizes"][which] // dtype.itemsize
        if kind == "examples":
            counts["response_tokens"] = progress["learned"][which]
    return dict(zip(("train", "val"), stats)), dtype.name


def write_held_out(path, sources):
    """Writes the validation examples of `sources` with all their fields, a line each."""
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for source in sources:
            for _, example, _, _ in source.documents(VAL):
                out.write(corpora.clean(json.dumps(example.fields, ensure_ascii=False)) + "\n")
    sync(path)
