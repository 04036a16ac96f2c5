"""One timed turn of generation, and its energy and memory, by the counters that a machine has."""
import collections, contextlib, ctypes, functools, json, math, os, subprocess, sys, time
from pathlib import Path

import torch

from data.machine import accelerate


Turn = collections.namedtuple("Turn", "first waits joules")      # seconds to the first token; to each later one, [...]


def random_ids(model, *shape):
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def one_turn(write, prompt, new_tokens, clock):
    """The Turn of one prompt, ids (B, T), continued by `write`."""
    counters = energy_counters(prompt.device)
    stamps, start = [clock()], None
    for new in write(prompt, new_tokens + 1, temperature=0):
        new.tolist()                                             # as a reader needs it: the device must have finished
        stamps.append(clock())
        if start is None:
            start = [read() for read, _, _ in counters]
    used = [(read() - before) % wraps for (read, wraps, _), before in zip(counters, start)]
    long_enough = stamps[-1] - stamps[1] >= max((seconds for _, _, seconds in counters), default=math.inf)
    return Turn(stamps[1] - stamps[0], [b - a for a, b in zip(stamps[1:], stamps[2:])],
                sum(used) if long_enough else None)


@functools.lru_cache
def energy_counters(device):
    """What counts the energy of a device, [(function that gives joules so far, joules at which it wraps, seconds below
    which it is too coarse), ...]; [] where there is none, or only root may read it. CPU: RAPL, whole packages (Linux).
    CUDA: NVML, the whole GPU; it moves every 0.1 s (https://docs.nvidia.com/deploy/nvml-api)."""
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
                 and (z / "name").read_text().startswith("package")]                     # AMD's are under that name too
        for zone in zones:
            (zone / "energy_uj").read_text()                                             # may we?
        return [(lambda z=z: int((z / "energy_uj").read_text()) / 1e6,
                 int((z / "max_energy_range_uj").read_text()) / 1e6, 0.1) for z in zones]
    except (OSError, AttributeError, ValueError):
        return []


def memory_peak(device):
    """The most memory of this process so far, in bytes: its resident set (CPU), or what torch allocated (CUDA). None
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "darwin":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError):                           # not ru_maxrss: on Linux a child inherits its parent's
        status = Path("/proc/self/status").read_text() if device.type == "cpu" else ""
        return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


def peak_alone(directory, model, prompt_tokens=256, new_tokens=64):
    """(peak bytes, of which were there before the model was loaded) of a fresh process that loads a directory as
    `model` was, device and dtype, and generates once: in one process the models would share one high-water mark.
    (None, None) if that failed or cannot be known."""
    settings = (str(Path(directory).resolve()), str(next(model.parameters()).device), str(model.dtype)[6:],
                torch.get_num_threads(), prompt_tokens, new_tokens)
    code = f"from data.speed import generate_alone; print(generate_alone(*{settings!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1], capture_output=True,
                          text=True, encoding="utf-8")
    try:
        before, peak = json.loads(done.stdout.splitlines()[-1])
        return peak, before
    except (IndexError, ValueError):
        return None, None


def generate_alone(directory, device, dtype, threads, prompt_tokens, new_tokens):
    """In the process that peak_alone starts: JSON of [bytes before, bytes at the most]."""
    from model import load                                       # here: this is the whole program of that process
    from sample import generate
    torch.set_num_threads(threads)
    device = torch.device(device)
    before = memory_peak(device)
    model = load(directory, device, getattr(torch, dtype), finite=False)       # to look would count as its memory
    accelerate(model)
    one_turn(functools.partial(generate, model), random_ids(model, 1, prompt_tokens), new_tokens,
             time.perf_counter)
    return json.dumps([before, memory_peak(device)])
