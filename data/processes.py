"""Several processes that train one model (DDP, FSDP): sums, agreement, one voice, and sharded tensors."""
import contextlib, datetime, os, re, sys, time

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import UserError


def say(machine, text):
    """Prints a line, on the first process only."""
    if machine.rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


def all_sum(machine, tensor):
    """The sum of a tensor over all processes."""
    if machine.size > 1:
        tensor = tensor.to(machine.device)
        dist.all_reduce(tensor)
    return tensor


def from_first(value):
    """The first process's value, on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def agree(machine, settings):
    """Raises UserError if the dict `settings` differs between processes."""
    all_settings = [settings] * machine.size
    if machine.size > 1:
        dist.all_gather_object(all_settings, settings)
    values = {name: dict.fromkeys(str(s.get(name)) for s in all_settings) for name in settings}
    if differ := [f"{name} ({' and '.join(v)})" for name, v in values.items() if len(v) > 1]:
        raise UserError(f"the processes were started with different {', '.join(differ)}: give all the same command, "
                        "data and files")


@contextlib.contextmanager
def one_voice():
    """Ends several processes with one message and exit code 2, also when one of them died."""
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
        with contextlib.suppress(Exception):             # torchrun's store is still there when a process has died
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                  timeout=datetime.timedelta(seconds=5))
            if store.add("said in try " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), 1) > 1:
                time.sleep(1)                            # torchrun ends all processes with the first: let it print
                sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
        raise error from None


def leave(code):
    """Ends this process before Python shuts down, if it has joined a group.

    DDP and FSDP keep gloo's threads. A thread that lets go of a tensor while Python shuts down
    aborts the process (pytorch/pytorch, issue 190489), and a finished run would seem to fail.
    """
    if not dist.is_initialized():
        return
    if code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch():
    """A name for a start of torchrun, equal in all attempts (--max-restarts); "" without."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"process {os.getppid()}" if run_id == "none" else run_id


def join_processes(device, rank, size):
    """Joins torchrun's processes into a group. Returns the device of this process."""
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"torchrun started more processes than this machine has GPUs: --nproc_per_node {gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        # After a restart the store holds keys of the crashed attempt: each attempt has a prefix.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                device_id=device if cuda else None,
                                timeout=datetime.timedelta(hours=2))         # the others wait until the first has data
    return device


def summed_gradients(forward, last):
    """A context for a micro-batch: DDP sums gradients over processes at the last one only.

    FSDP sums them each time: to wait, each process would have to hold all gradients.
    """
    ddp = isinstance(forward, nn.parallel.DistributedDataParallel)
    return forward.no_sync() if ddp and not last else contextlib.nullcontext()


def clip_gradients(params, largest):
    """Scales gradients to a norm over all shards of at most `largest`. Returns the old norm, ()."""
    norm = nn.utils.clip_grad_norm_(params, largest)
    return norm.full_tensor() if is_sharded(norm) else norm


def shard(forward, machine):
    """Leaves each process 1/size of every tensor (FSDP: Zhao et al., 2023).

    A block is gathered while it runs. The tensors outside the blocks (embedding, head) stay
    gathered from forward() to the end of the backward pass.
    """
    from torch.distributed.fsdp import fully_shard       # here, as this import takes most of a second
    mesh = dist.init_device_mesh(machine.device.type, (machine.size,))
    for module in (*forward.model.model.layers, forward):
        fully_shard(module, mesh=mesh)


@contextlib.contextmanager
def unsharded(forward):
    """A context that gathers the parameters outside the blocks; FSDP gathers only the blocks."""
    fsdp = hasattr(forward, "unshard")
    if fsdp:
        forward.unshard()
    yield
    if fsdp:
        forward.reshard()


def is_sharded(tensor):
    """Whether a tensor is spread over processes (a DTensor)."""
    return hasattr(tensor, "placements")


def local_part(tensor):
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_like(p, tensor):
    """A tensor that every process holds, sharded if and as p is."""
    if not is_sharded(p):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def gathered(x, machine):
    """A tensor or nested dict with sharded tensors gathered on the first CPU; None elsewhere."""
    if isinstance(x, dict):
        return {k: gathered(v, machine) for k, v in x.items()}
    if not is_sharded(x):
        return x
    x = x.full_tensor()                                  # all processes take part
    return x.cpu() if machine.rank == 0 else None


def on_whole_matrices(function, parts, p):
    """function(matrices (n, rows, columns)), where this process may hold some rows only, as of p.

    With FSDP, processes exchange rows (all-to-all), so that each gets some of the matrices whole,
    and exchange the results back. So the processes share the work, too.
    """
    if not is_sharded(p):
        return function(parts)
    from torch.distributed.tensor import DTensor, Shard
    (rows, columns), n = p.shape, len(parts)

    def exchanged(parts, dim):
        """Split along `dim` -> split along 1 - dim."""
        whole = DTensor.from_local(parts.contiguous(), p.device_mesh, [Shard(dim)],
                                   shape=torch.Size((n, rows, columns)), stride=(rows * columns, columns, 1))
        return whole.redistribute(placements=[Shard(1 - dim)]).to_local()
    return exchanged(function(exchanged(parts, 1)), 0)
