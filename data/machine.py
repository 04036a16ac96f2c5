"""The machine: device, number type, speed, and the threads of a CPU."""
import collections, inspect, math, os, statistics, time

import torch
from torch import nn

from data import UserError
from data.processes import from_first, join_processes, say, shard
from data.structure import has_quantized

try:
    from data import native
except ImportError:                                   # a copy without native.py and kernels.c: PyTorch alone
    native = None

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Machine = collections.namedtuple("Machine", "device dtype rank size threads")       # threads: a Threads


# ---------------------------------------------------------------------------------------------------------------------
# Device and number type

def set_up(cfg):
    """The Machine: joins torchrun's processes, picks and prints device and, on a GPU, number type.

    The number type on a CPU is chosen later, by `fastest`. Raises UserError if --batch-size does
    not divide by the number of processes, or if --device is not there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % size:
        fitting = ", ".join(str(n) for n in range(1, cfg.batch_size + 1) if cfg.batch_size % n == 0)
        raise UserError(f"--batch-size {cfg.batch_size} does not divide by the {size} processes: start {fitting} of "
                        f"them, or give a multiple of {size}")
    device = pick_device(cfg.device)
    if size > 1:
        device = join_processes(device, rank, size)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    dtype, reason = number_type(cfg.dtype, device)
    machine = Machine(device, from_first(dtype), rank, size, Threads([torch.get_num_threads()]))
    if device.type != "cpu":
        say(machine, f"device {device}" + f", {size} processes" * (size > 1) + f"; {str(dtype)[6:]} ({reason})")
    return machine


def pick_device(name="auto"):
    """The torch device of this name, or the best one here. Raises UserError if it is missing."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [*["cuda"] * (gpus > 0), *(f"cuda:{i}" for i in range(gpus)), *["mps"] * torch.backends.mps.is_available(),
            "cpu"]
    name = here[0] if name == "auto" else name
    if name not in here:
        raise UserError(f"--device {name}: there is no such device here; use --device {' or '.join(here)}")
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)                    # kernels and graphs go where nothing else is said, too
    return device


def number_type(name, device):
    """(torch dtype for --dtype `name`, the reason in words)."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() counts emulation, which is slow on Turing and Volta.
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
        return (torch.bfloat16 if has_units else torch.float16,
                f"this GPU has {'' if has_units else 'no '}bfloat16 units")
    return torch.float32, "the safe choice on mps, which is experimental here"


def in_dtype(machine):
    """A context in which matrix products have the machine's number type; weights stay float32."""
    return torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32)


def to_device(batch, device):
    """A Batch with all tensors on the device."""
    return type(batch)(*(None if t is None else t.to(device, non_blocking=True) for t in batch))


def synchronize(device):
    """Waits until a GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def logits_at_once(device):
    """Logits that a loss computes in one go: what the cache of a CPU holds, or what fills a GPU.

    A divergence makes about ten float32 copies: 80 MB or 2.6 GB.
    """
    return 2 ** 21 if device.type == "cpu" else 2 ** 26


def memory_of_machine():
    """Bytes of memory; infinity where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def require_memory(machine, size, task, flags):
    """Raises UserError if a task on a CPU needs more memory than there is: Linux would kill it.

    size: bytes; task: the beginning of the message; flags: those to lower
    """
    if machine.device.type == "cpu" and size > memory_of_machine():
        raise UserError(f"{task} needs at least {size / 1e9:,.0f} GB, and this machine has "
                        f"{memory_of_machine() / 1e9:,.0f}: lower {flags}")


# ---------------------------------------------------------------------------------------------------------------------
# Speed

def matmul_rate(device, dtype, size, seconds=0.2):
    """Multiplications and additions per second of a square product: the median over `seconds`."""
    a, times = torch.randn(size, size, device=device).to(dtype), []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / statistics.median(times)


def products_rate(machine):
    """matmul_rate of a machine, with a product so large that the launch does not count."""
    size = 4096 if machine.device.type == "cuda" else 1024
    if machine.device.type == "cpu" and machine.dtype != torch.float32:      # may be emulated: 1024 takes seconds
        size = 256
    return matmul_rate(machine.device, machine.dtype, size)


def in_turns(step, machines, seconds, rounds):
    """{name: seconds of each step(machine)} for {name: Machine}: see train.timed_steps."""
    times, begin, very_first = {name: [] for name in machines}, time.perf_counter(), True
    while rounds > 0 or time.perf_counter() - begin < seconds:
        for name, machine in machines.items():
            if machine.device.type == "cpu":
                machine.threads.use(machine.threads.count)
            for counted in (False, True, True, True):
                start = time.perf_counter()
                step(machine)
                synchronize(machine.device)
                duration = time.perf_counter() - start
                if very_first and seconds and duration > 5:
                    return None
                very_first = False
                if counted:
                    times[name].append(duration)
        rounds -= 1
    return times


def fastest(machine, cfg, stored, tokens, time_steps):
    """The Machine with the threads and number type of the fastest steps on a CPU; prints them.

    stored       read_state of the run that is resumed, or {}: the choice of that run stays
    tokens       tokens of a timed step
    time_steps   {option: Machine} -> {option: seconds of each step}, or None: a step takes too long
    """
    if machine.device.type != "cpu":
        return machine
    threads, counts = thread_options(cfg, stored, machine)
    dtypes = dtype_options(cfg, stored, machine)
    best, note = (counts[0], dtypes[0]), " (as before)" if stored else ""
    if len(counts) * len(dtypes) > 1:
        options = {(n, dtype): machine._replace(dtype=dtype, rank=0, size=1, threads=Threads([n]))
                   for n in counts for dtype in dtypes}
        seconds, note = time_steps(options), " (a step takes too long to try others)"
        if seconds:
            rates = {option: tokens / statistics.fmean(seconds[option]) for option in options}
            best = max(rates, key=rates.get)
            note = " (steps were timed: " + "; ".join(f"{threads_of(n)}: " + ", ".join(
                f"{str(dtype)[6:]} {rates[n, dtype]:,.0f} tokens/s" for dtype in dtypes) for n in counts) + ")"
    count, dtype = from_first(best)
    threads.use(count)
    say(machine, f"device cpu, {threads_of(count)}" + f", {machine.size} processes" * (machine.size > 1) +
        f"; {str(dtype)[6:]}{note}")
    return machine._replace(dtype=dtype, threads=threads)


def thread_options(cfg, stored, machine):
    """(a Threads, the numbers of threads to time). Tests set SLM_TEST_THREADS for --threads."""
    most = torch.get_num_threads()
    count = cfg.threads or int(os.environ.get("SLM_TEST_THREADS") or 0) or (most if machine.size > 1 else 0)
    if count:
        return Threads([count]), [count]
    threads = Threads(halvings(most), stored.get("threads", 0))
    return threads, [threads.count] if stored.get("threads") else threads.options


def dtype_options(cfg, stored, machine):
    """The number types to time. Tests set SLM_TEST_DTYPE for --dtype."""
    name = cfg.dtype
    if name == "auto":
        name = os.environ.get("SLM_TEST_DTYPE") or stored.get("dtype") or "auto"
    if name != "auto":
        return [DTYPES[name]]
    rates = [matmul_rate(machine.device, dtype, 256) for dtype in (torch.float32, torch.bfloat16)]
    return [torch.float32, torch.bfloat16] if rates[1] > rates[0] else [torch.float32]       # else it is emulated


class Threads:
    """The number of CPU threads that makes steps, of training or of one token, fastest now.

    While another program holds a core, two threads that wait for each other are slower than one
    alone. A trial runs the next steps with each option in turn. A trial begins when steps take SLOW
    times as long as before, and now and then while fewer threads than the most are used.

    options   numbers to choose from, the largest first; a single number is never changed
    count     the number now
    """
    TRIAL_STEPS, TRIAL_SECONDS = 6, 0.005                # least steps, and least seconds, of an option in a trial
    SLOW = 2.0
    FIRST_WAIT, LONGEST_WAIT = 60.0, 240.0               # seconds between two trials

    def __init__(self, options, count=0):
        self.options, self.count = options, count if count in options else options[0]
        self.fastest_mean, self.wait, self.recent = math.inf, self.FIRST_WAIT, collections.deque(maxlen=20)
        self.trial, self.reason, self.trial_end = None, "", time.perf_counter()

    def use(self, count):
        """Sets the number of threads of PyTorch and of the C kernels."""
        self.count = count
        torch.set_num_threads(count)
        if native:
            native.set_threads(count)

    def start_trial(self, reason=""):
        """Begins a trial if there are options. reason: the sentence that `note` returns at the end.

        Without a reason the trial is silent.
        """
        if len(self.options) > 1:
            self.reason, self.count_before, self.trial = reason, self.count, {n: [] for n in self.options}
            self.use(self.options[0])

    def note(self, seconds):
        """Records a step's duration and sets the next step's threads. Returns a sentence or ""."""
        if self.trial is not None:
            return self.note_trial(seconds)
        self.recent.append(seconds)
        if len(self.options) == 1 or len(self.recent) < self.recent.maxlen:
            return ""
        mean = statistics.fmean(self.recent)
        self.fastest_mean = min(self.fastest_mean, mean)
        if mean > self.SLOW * self.fastest_mean:
            self.start_trial(f"{mean / self.fastest_mean:.1f} x slower than before, as if another program were busy")
        elif self.count < self.options[0] and time.perf_counter() - self.trial_end > self.wait:
            self.start_trial()
        return ""

    def note_trial(self, seconds):
        """`note` during a trial. The first step of an option is not counted."""
        times = self.trial[self.count]
        times.append(seconds)
        if len(times) < self.TRIAL_STEPS or sum(times[1:]) < self.TRIAL_SECONDS:
            return ""
        untried = self.options[self.options.index(self.count) + 1:]
        if untried:
            self.use(untried[0])
            return ""
        means = {n: statistics.fmean(times[1:]) for n, times in self.trial.items()}
        self.use(min(means, key=means.get))
        self.wait = self.FIRST_WAIT if self.count != self.count_before else min(2 * self.wait, self.LONGEST_WAIT)
        self.fastest_mean, self.trial, self.trial_end = means[self.count], None, time.perf_counter()
        self.recent.clear()
        return f"{self.reason}: {threads_of(self.count)} from now on" if self.reason else ""

    def following(self, stream):
        """Yields the items of an iterator, each a step. Starts a trial at the first use."""
        start = None
        if math.isinf(self.fastest_mean):
            self.start_trial()
        for item in stream:
            if start is not None:                        # the first item waits until the prompt is read
                self.note(time.perf_counter() - start)
            yield item
            start = time.perf_counter()


def threads_of(n):
    """"1 thread", "2 threads", ..."""
    return f"{n} thread{'s' * (n > 1)}"


def halvings(n):
    """n, n / 2, n / 4, ... 1."""
    return [n >> i for i in range(n.bit_length())]


def accelerate(model, wanted=True, functions=None):
    """Attaches the C kernels of data/native.py, if wanted and there. Returns the model.

    functions: globals() of train.py, whose softmax_gradient is attached or detached, too
    """
    if native and wanted:
        return native.attach(model, functions)
    if functions is not None:
        functions["softmax_gradient"] = inspect.unwrap(functions["softmax_gradient"])
    return model


def is_accelerated(model):
    """Whether C kernels are attached to the model."""
    return bool(native) and native.is_attached(model)


def is_fast_on_cpu(model):
    """Whether the C kernels are attached and read a layer faster than a GPU starts the layer's kernels.

    By arithmetic, not yet measured: a CUDA graph takes about 70 us a layer, 32 kernels of 2 us, in
    which one core reads 1 MB; the limit is twice that, as a GPU also takes seconds to start.
    """
    layers = model.model.layers
    size = 4 * sum(p.numel() for p in layers.parameters()) + sum(b.nbytes for b in layers.buffers())       # float32
    return is_accelerated(model) and size <= 2e6 * len(layers)


def threads_for(model, count, device):
    """The Threads for generation: `count`, or with 0 the fastest number.

    Only the C kernels compute the same bits with any number of threads; PyTorch alone keeps the
    most.
    """
    most = torch.get_num_threads()
    choose = not count and device.type == "cpu" and is_accelerated(model)
    threads = Threads(halvings(most) if choose else [count or most])
    if device.type == "cpu":
        threads.use(threads.count)
    return threads


def how_quantized_layers_run(model):
    """The arithmetic of a model's quantized layers, in words; None for a model that has none."""
    if not has_quantized(model):
        return None
    on_cpu = next(model.parameters()).device.type == "cpu" and model.dtype == torch.float32
    if on_cpu and is_accelerated(model):
        return "compiled C, activations rounded to 8 bits in groups of 32"
    return f"weights dequantized to {str(model.dtype)[6:]} at each use"


def prepared(forward, first_batch, cfg, machine, functions):
    """A ModelAndLoss with activation checkpointing, torch.compile, and DDP or FSDP.

    first_batch() gives a Batch for the first compilation; functions: globals() of train.py, whose
    softmax_gradient is compiled on a GPU. Where compilation fails, a sentence says so and nothing
    is compiled; with FSDP a UserError is raised.
    """
    body, fsdp = forward.model.model, cfg.fsdp and machine.size > 1
    body.checkpoint = cfg.checkpoint_activations
    if fsdp:
        shard(forward, machine)
    if cfg.compile:
        for block in body.layers:                        # one compilation for all blocks: a whole model's takes minutes
            block.compile()                              # in place: no prefix in the state dict
        if machine.device.type == "cuda":
            functions["softmax_gradient"] = torch.compile(inspect.unwrap(functions["softmax_gradient"]), dynamic=False)
        try:                                             # the compiler runs, and fails, at the first real step
            with in_dtype(machine):
                forward(to_device(first_batch(), machine.device))[0].backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            why = f"--compile does not work here ({type(error).__name__})"
            if fsdp:                                     # the other processes wait in the middle of a block
                raise UserError(f"{why}: leave it out, or install a C++ compiler that torch.compile finds") from None
            torch.compiler.set_stance("force_eager")     # from now on, what was compiled runs as it is written
            say(machine, f"{why}, so the run goes on without it: it needs a C++ compiler that torch.compile finds")
        forward.zero_grad(set_to_none=True)
    if machine.size > 1 and not fsdp:
        return nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)
    return forward
