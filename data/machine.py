"""The machine: device, number type, threads, and several processes that train one model."""
import collections, contextlib, datetime, math, os, re, statistics, sys, time

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import UserError

try:
    from data import native
except ImportError:                                   # a copy without native.py and kernels.c: PyTorch does it all
    native = None

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Machine = collections.namedtuple("Machine", "device dtype rank size threads")       # threads: sample.Threads


def matmul_rate(device, dtype, size, seconds=0.2):
    """Multiplications and additions a second of a square product on this device: the median of what fits the time."""
    a, times = torch.randn(size, size, device=device).to(dtype), []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / statistics.median(times)


def products_rate(machine):
    """matmul_rate of a machine, by a product that is large enough not to time its launch alone."""
    emulated = machine.device.type == "cpu" and machine.dtype != torch.float32           # there 1024 takes seconds
    return matmul_rate(machine.device, machine.dtype, 4096 if machine.device.type == "cuda" else
                       256 if emulated else 1024)


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def set_up(cfg):
    """Joins the processes torchrun started and picks device and, of a GPU, number type; says so."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % size:
        fitting = ", ".join(str(n) for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0)
        raise UserError(f"--batch-size {cfg.batch_size} does not divide by the {size} processes: start {fitting} of "
                        f"them, or give a multiple of {size}")
    device = pick_device(cfg.device)
    if size > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))     # torchrun's next try meets in it the dead of the last
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size,
                                timeout=datetime.timedelta(hours=2))         # the first prepares data, the others wait
    dtype, why = DTYPES[cfg.dtype] or torch.float32, "as asked"
    if cfg.dtype == "auto" and device.type == "cuda":
        # Not torch.cuda.is_bf16_supported(): it counts emulation, and Turing and Volta are slow at it.
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        why = f"this GPU has {'' if dtype == torch.bfloat16 else 'no '}bfloat16 units"
    elif cfg.dtype == "auto":
        why = "the safe choice on mps, which is experimental here"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    machine = Machine(device, from_first(dtype), rank, size, Threads([torch.get_num_threads()]))
    if device.type != "cpu":                                     # of a CPU: see `tuned`
        say(machine, f"device {device}" + (f", {size} processes" if size > 1 else "") + f"; {str(dtype)[6:]} ({why})")
    return machine


def say(machine, text):
    if machine.rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


def in_dtype(machine):
    """A context whose products are made in the machine's number type; weights stay float32."""
    return torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32)


def to_device(batch, device):
    return type(batch)(*(None if t is None else t.to(device, non_blocking=True) for t in batch))


def all_sum(machine, tensor):
    """The sum of a tensor over all processes."""
    if machine.size > 1:
        tensor = tensor.to(machine.device)
        dist.all_reduce(tensor)
    return tensor


def from_first(value):
    """What the first process has for `value`."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def agree(machine, settings):
    """Raises UserError if the dict `settings` is not the same in all processes."""
    all_settings = [settings] * machine.size
    if machine.size > 1:
        dist.all_gather_object(all_settings, settings)
    values = {name: dict.fromkeys(str(s.get(name)) for s in all_settings) for name in settings}
    if differ := [f"{name} ({' and '.join(v)})" for name, v in values.items() if len(v) > 1]:
        raise UserError(f"the processes were started with different {', '.join(differ)}: give all the same command, "
                        "data and files")


@contextlib.contextmanager
def one_voice():
    """Several processes end with one message, exit code 2 and no traceback, be it that one of them is gone."""
    try:
        yield
    except (UserError, KeyboardInterrupt, RuntimeError) as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        if isinstance(error, RuntimeError):
            if not (isinstance(error, dist.DistError) or re.search("gloo|by peer", str(error))):
                raise
            error = UserError("another process of this run is gone: the same command with --resume goes on from the "
                              "last save")
        with contextlib.suppress(Exception):                                 # torchrun's store outlives the processes
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                  timeout=datetime.timedelta(seconds=5))
            if store.add("said in try " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), 1) > 1:
                time.sleep(1)                            # torchrun ends all when the first ends: let the other speak
                sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
        raise error from None


def launch():
    """Names a start of torchrun, the same in all its tries (--max-restarts); "" without it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"process {os.getppid()}" if run_id == "none" else run_id


def shard(forward, machine):
    """Leaves each process 1/size of every tensor (FSDP: Zhao et al., 2023). A block is whole while it runs; what is in
    no block, as the head that losses read, from the beginning of forward() to the end of its backward pass."""
    from torch.distributed.fsdp import fully_shard                           # here, as it takes most of a second
    mesh = dist.init_device_mesh(machine.device.type, (machine.size,))
    for module in (*forward.model.model.layers, forward):
        fully_shard(module, mesh=mesh)


def is_sharded(tensor):
    return hasattr(tensor, "placements")                                     # a DTensor


def part(tensor):
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_like(p, tensor):
    """A tensor that every process holds, sharded as p is."""
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def gathered(x, machine):
    """x, a tensor or a dict that has some, with sharded ones whole: on the first process's CPU; for others None."""
    if isinstance(x, dict):
        return {k: gathered(v, machine) for k, v in x.items()}
    if not is_sharded(x):
        return x
    x = x.full_tensor()                                                      # all processes take part
    return x.cpu() if machine.rank == 0 else None


def on_whole_matrices(function, rows, shape, mesh):
    """function(matrices (n, rows, columns) = shape), where each process of a mesh holds some rows of each matrix.

    The rows change hands, so that each process has some matrices whole, and back. The work is shared, too.
    """
    from torch.distributed.tensor import DTensor, Shard

    def turned(parts, dim):
        stride = (shape[1] * shape[2], shape[2], 1)
        whole = DTensor.from_local(parts.contiguous(), mesh, [Shard(dim)], shape=torch.Size(shape), stride=stride)
        return whole.redistribute(placements=[Shard(1 - dim)]).to_local()
    return turned(function(turned(rows, 1)), 0)


def memory_of_machine():
    """Bytes of memory; infinite where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def pick_device(name="auto"):
    """The torch device a person named, or the best there is. Raises UserError if it is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d in have if have[d])
    if not have.get(name.split(":")[0], False):
        best = next(d for d in have if have[d])
        raise UserError(f"--device {name}: there is no such device here; use --device {best}")
    return torch.device(name)


class Threads:
    """The number of threads of a CPU with which steps, of training or a token each, are fastest now: while another
    program holds a core, two threads that wait for each other are slower than one alone.

    options  numbers to choose from, the largest first; a single one is never changed
    A trial runs the next steps with each option in turn. There is one when steps take twice as long as before, and now
    and then where fewer threads than the most are used.
    """
    STEPS, SECONDS, SLOW, AGAIN, MOST = 6, 0.005, 2.0, 60.0, 240.0   # of a trial; slower by; seconds between two trials

    def __init__(self, options, count=0):
        self.options, self.count = options, count if count in options else options[0]
        self.usual, self.wait, self.recent = math.inf, self.AGAIN, collections.deque(maxlen=20)
        self.trial, self.why, self.ended = None, "", time.perf_counter()

    def use(self, count):
        self.count = count
        torch.set_num_threads(count)
        if native:
            native.set_threads(count)

    def start_trial(self, why=""):
        """Begins one, unless there is nothing to choose. why: the beginning of the sentence at its end, or "": it ends
        silently."""
        if len(self.options) > 1:
            self.why, self.before, self.trial = why, self.count, {n: [] for n in self.options}
            self.use(self.options[0])

    def note(self, seconds):
        """Notes how long a step took, and says with how many threads the next is made. Returns a sentence, or ""."""
        if self.trial is not None:
            return self.tried(seconds)
        self.recent.append(seconds)
        if len(self.options) == 1 or len(self.recent) < self.recent.maxlen:
            return ""
        mean = statistics.fmean(self.recent)
        self.usual = min(self.usual, mean)
        if mean > self.SLOW * self.usual:
            self.start_trial(f"{mean / self.usual:.1f} x slower than before, as if another program were busy")
        elif self.count < self.options[0] and time.perf_counter() - self.ended > self.wait:
            self.start_trial()
        return ""

    def tried(self, seconds):
        """`note` during a trial; the first step with another number of threads is not counted."""
        times = self.trial[self.count]
        times.append(seconds)
        if len(times) < self.STEPS or sum(times[1:]) < self.SECONDS:
            return ""
        rest = self.options[self.options.index(self.count) + 1:]
        if rest:
            self.use(rest[0])
            return ""
        means = {n: statistics.fmean(times[1:]) for n, times in self.trial.items()}
        self.use(min(means, key=means.get))
        self.wait = self.AGAIN if self.count != self.before else min(2 * self.wait, self.MOST)
        self.usual, self.trial, self.ended = means[self.count], None, time.perf_counter()
        self.recent.clear()
        return f"{self.why}: {threads_of(self.count)} from now on" if self.why else ""

    def following(self, stream):
        """The items of an iterator, each a step. The first time there is a trial at once."""
        start = None
        if math.isinf(self.usual):
            self.start_trial()
        for item in stream:
            if start is not None:                                # the first item waits for the prompt to be read
                self.note(time.perf_counter() - start)
            yield item
            start = time.perf_counter()


def threads_of(n):
    return f"{n} thread{'s' * (n > 1)}"


def halvings(n):
    """n, n / 2, n / 4, ... 1."""
    return [n >> i for i in range(n.bit_length())]


def accelerate(model, wanted=True, functions=None):
    """Attaches data/native.py to a model, if it is there and wanted (--no-native). Returns the model."""
    return native.attach(model, functions) if native and wanted else model


def is_accelerated(model):
    return bool(native) and native.is_attached(model)


def threads_for(model, count, device):
    """Threads for generation: `count`; 0: the fastest, where kernels compute the same bits with any number of them."""
    most = torch.get_num_threads()
    follow = not count and device.type == "cpu" and is_accelerated(model)
    threads = Threads(halvings(most) if follow else [count or most])
    if device.type == "cpu":
        threads.use(threads.count)
    return threads


def how_quantized_layers_run(model):
    """Text: the arithmetic behind the figures of a model with quantized layers; None: it has none."""
    if not any(hasattr(m, "scales") for m in model.modules()):
        return None
    on_cpu = next(model.parameters()).device.type == "cpu" and model.dtype == torch.float32
    if on_cpu and is_accelerated(model):
        return "compiled C, activations rounded to 8 bits in groups of 32"
    return f"weights dequantized to {str(model.dtype)[6:]} at each use"
