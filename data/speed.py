"""One timed turn of generation: seconds, and energy and memory by the counters of the machine."""
import collections, contextlib, ctypes, functools, json, math, os, statistics, subprocess, sys, time
from pathlib import Path

import torch

from data.machine import accelerate, is_accelerated

# Seconds to the first token; a list of seconds to each later one; joules of decoding, or None.
Turn = collections.namedtuple("Turn", "first waits joules")


def random_ids(model, *shape):
    """Ids of the given shape, the same in every call, on the device of the model."""
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def one_turn(write, prompt, new_tokens, clock):
    """The Turn of one prompt, ids (B, T), continued by `write`, a function like sample.generate."""
    counters = energy_counters(prompt.device)
    stamps, start = [clock()], None
    for new in write(prompt, new_tokens + 1, temperature=0):
        new.tolist()                                             # waits for the device, as a reader of the text does
        stamps.append(clock())
        if start is None:
            start = [read() for read, _, _ in counters]
    used = [(read() - before) % wraps for (read, wraps, _), before in zip(counters, start)]
    long_enough = stamps[-1] - stamps[1] >= max((seconds for _, _, seconds in counters), default=math.inf)
    return Turn(stamps[1] - stamps[0], [b - a for a, b in zip(stamps[1:], stamps[2:])],
                sum(used) if long_enough else None)


def speed_figures(turns, prompt_tokens, new_tokens):
    """Figures of the Turns of one model, see measure.speed; tokens are those of the whole batch."""
    waits, median = sorted(wait for turn in turns for wait in turn.waits), statistics.median
    prefill = [prompt_tokens / turn.first for turn in turns]
    decode = [new_tokens / sum(turn.waits) for turn in turns]
    joules = [turn.joules for turn in turns]
    return {"first_token_ms": 1000 * median(turn.first for turn in turns), "token_p50_ms": 1000 * median(waits),
            "token_p95_ms": 1000 * waits[math.ceil(0.95 * len(waits)) - 1],
            "joules_per_token": None if None in joules else sum(joules) / (len(turns) * new_tokens),
            "prefill_tokens_per_s": median(prefill), "prefill_rounds": prefill,
            "decode_tokens_per_s": median(decode), "decode_rounds": decode}


@functools.lru_cache
def energy_counters(device):
    """Energy counters of a device: [(read, wrap, seconds), ...]; [] where none is readable.

    read() gives joules so far, which restart from 0 at `wrap` joules; a time below `seconds` is too
    short to measure. CPU: RAPL of whole packages (Linux). CUDA: NVML of the whole GPU, which moves
    every 0.1 s (https://docs.nvidia.com/deploy/nvml-api).
    """
    try:
        if device.type == "cuda":
            nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
            handle, joules = ctypes.c_void_p(), ctypes.c_ulonglong()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()

            def read():
                if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(joules)):
                    raise OSError("NVML has no energy counter for this GPU")
                return joules.value / 1000
            if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
                return []
            read()
            return [(read, math.inf, 1.0)]
        zones = [z for z in Path("/sys/class/powercap").glob("intel-rapl:*") if device.type == "cpu"
                 and (z / "name").read_text().startswith("package")]                     # of AMD processors, too
        for zone in zones:
            (zone / "energy_uj").read_text()                                             # on many systems only root may
        return [(lambda z=z: int((z / "energy_uj").read_text()) / 1e6,
                 int((z / "max_energy_range_uj").read_text()) / 1e6, 0.1) for z in zones]
    except (OSError, AttributeError, ValueError):
        return []


def memory_peak(device):
    """Peak bytes of this process: resident (CPU), allocated by torch (CUDA); None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "darwin":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError):                           # not ru_maxrss: a child on Linux inherits the parent's
        status = Path("/proc/self/status").read_text() if device.type == "cpu" else ""
        return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


def peak_alone(directory, model, prompt_tokens=256, new_tokens=64):
    """(peak bytes, bytes before loading) of a fresh process that loads a directory and generates.

    Device and dtype are those of `model`. In one process all models share one high-water mark.
    (None, None) if the process failed or the system has no figures.
    """
    settings = (str(Path(directory).resolve()), str(next(model.parameters()).device), str(model.dtype)[6:],
                torch.get_num_threads(), prompt_tokens, new_tokens, is_accelerated(model))
    code = f"from data.speed import generate_alone; print(generate_alone(*{settings!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1], capture_output=True,
                          text=True, encoding="utf-8")
    try:
        before, peak = json.loads(done.stdout.splitlines()[-1])
        return peak, before
    except (IndexError, ValueError):
        return None, None


def generate_alone(directory, device, dtype, threads, prompt_tokens, new_tokens, native):
    """The program of the process of peak_alone: returns JSON of [bytes before, peak bytes]."""
    from model import load                                       # here: this function is a program of its own
    from sample import generate
    torch.set_num_threads(threads)
    device = torch.device(device)
    before = memory_peak(device)
    model = load(directory, device, getattr(torch, dtype), finite=False)       # the check would take memory
    accelerate(model, native)
    one_turn(functools.partial(generate, model), random_ids(model, 1, prompt_tokens), new_tokens,
             time.perf_counter)
    return json.dumps([before, memory_peak(device)])
