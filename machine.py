"""machine.py: one run on any machine: its devices, its precision, its processes, and how it is stopped.

Training needs a picture, a label, a network and a loss. A machine adds its own questions. Is there a GPU, and can it
compute in bfloat16? Is the batch split over several processes? Does the batch fit into memory at once? Has somebody
pressed Ctrl-C? The answers must not change what is learned. They stand here, so that train.py reads straight down.

    device       the GPU that is here, or the CPU                                        choose_device
    precision    bfloat16 where the processor has it, the memory layout that is fast     precision
    processes    torchrun starts several; each has a share of every batch                setup_processes
    sum          a mean over the batch is a sum over all processes, divided once         sum_over_processes
    parts        a batch that does not fit goes through the network in parts             backward_in_parts
    stop         a signal asks; the loop finishes its step, saves, and ends              catch_signals, stop_asked
    trouble      memory that runs out, a helper that dies, Ctrl-C: one sentence each     say_why, stop_with
    pictures     matplotlib, whatever window system the environment asks for             import_matplotlib

Why parts and processes have the same gradient as the whole batch: the loss of a batch is a mean over its pixels, with
weights (Eq. 6) and class counts of the whole batch. Whoever takes the mean of the means of the parts gets another loss.

Not here: the loop (train.py), the files of a run (checkpoint.py). torch is imported inside the functions, so that
`--help` answers at once. `python machine.py` prints
    gradient of the whole batch: -2.800   in three parts: -2.800   mean of the parts' own: -2.333
    Notice: parts share one denominator, the whole batch's, so the gradient is the whole batch's, too.
"""

import contextlib
import os
import re
import signal
import time

from data import UserError, require

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
# Processes that decode pictures: the cores that this process has, when torchrun starts several on one machine.
LOADERS = min(16, max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def choose_device(name=None):
    """torch.device of a name, or of the best that is here; UserError if this machine does not have it."""
    import torch
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    name = name or ("cuda" if len(here) > 1 else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one GPU for each process of a machine
    require(name in here, f"--device {name} cannot be used here: choose from {', '.join(here)}.")
    return torch.device(name)


def precision(amp, device):
    """(name of the precision, autocast context, memory layout), the same in training and evaluation.

    bfloat16 has float32's range: no loss scaling, and no overflow to NaN. The layout is what fast convolutions read.
    """
    import torch
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # without bf16 arithmetic, a processor emulates it, slower than float32
        able = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    bf16 = amp == "bf16" or (amp == "auto" and able)
    layout = torch.channels_last if bf16 or device.type == "cuda" else torch.contiguous_format
    return "bf16" if bf16 else "fp32", lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16), layout


# ----------------------------------------------------------------------------------------------------------- processes


def setup_processes(config):
    """(rank, number of processes, device) of this process. torchrun sets the variables, a plain `python` does not."""
    import torch
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and all else that goes by the current device
        # cuDNN tries its kernels once for each size and keeps the fastest. All training steps have one size.
        # Pictures of the evaluation have many: evaluate.make_scorer switches it off again.
        torch.backends.cudnn.benchmark = True
    else:
        # Same seed, same bits. A GPU is not asked for this: its deterministic kernels are slower.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nobody reads it, and filling it takes time
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        return 0, 1, device
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def count_processes():
    """How many processes share this run; 1 without torchrun."""
    import torch
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def sum_over_processes(x):
    """The sum of a tensor over all processes; the tensor itself when there is one process."""
    import torch
    if not torch.distributed.is_initialized():
        return x
    x = x.clone()
    torch.distributed.all_reduce(x)
    return x


def wait_for_others(device):
    """Return when all processes have come here."""
    import torch
    sum_over_processes(torch.zeros(1, device=device))


def take_turns(rank, device, load):
    """load() in every process, one group after another -> its result.

    A CLIP by name is downloaded into a folder that processes share. So the first process of all goes first. Then the
    first process of every other machine goes. The rest find the file in its place.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    mine = 0 if rank == 0 else 1 if local_rank == "0" else 2
    result = None
    for turn in range(3):
        if turn == mine:
            result = load()
        wait_for_others(device)
    return result


def end_processes():
    """Leave the group of processes, if there is one."""
    import torch
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------- parts


def backward_in_parts(network, image, size, objective, autocast):
    """The gradient of a batch that does not fit into memory at once -> (terms, out) of the whole batch.

    network     image (b, 3, H, W) -> outputs, a NamedTuple of tensors (b, ...) or None; may be DistributedDataParallel
    image       (B, 3, H, W)
    size        images at a time
    objective   outputs of the whole batch -> {term: scalar}; it reads `logits` and `emb` with a gradient
    autocast    context of the forward passes

    Eq. 6 and the means of Eq. 7 need the outputs of the whole batch. Outputs are small; what fills the memory is what
    lies between image and output. So there are three passes:
        1. Forward, part by part, without a gradient. Keep the outputs alone.
        2. The loss of the whole batch, and its gradient at the outputs.
        3. Forward again, part by part, and hand each part its share of that gradient.
    The network is evaluated twice, so a step takes about 1.7 times as long. The gradient is the whole batch's.
    """
    import torch
    parts = image.split(size)  # views, in whatever memory layout the image has
    with autocast(), torch.no_grad():
        outputs = [network(part) for part in parts]
    kind = type(outputs[0])
    out = kind(*(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*outputs)))
    leaves = [out.logits.requires_grad_(), out.emb.requires_grad_()]
    terms = objective(out)
    sum(terms.values()).backward()
    # DistributedDataParallel takes the mean over the processes, where ours are to be summed. And it waits for a gradient
    # of every output: one that is in no term gets zeros.
    scale = count_processes()
    gradients = [scale * (torch.zeros_like(x) if x.grad is None else x.grad) for x in leaves]

    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        # Processes exchange gradients once a step, with the last part.
        alone = contextlib.nullcontext() if last or scale == 1 else network.no_sync()
        with alone:
            with autocast():
                again = network(part)
            share = slice(index * size, index * size + len(part))
            torch.autograd.backward([again.logits, again.emb], [gradient[share] for gradient in gradients])
    return terms, out


# ---------------------------------------------------------------------------------------------------------------- stop


def outlive_signals(worker):
    """A loader's process leaves the first stop to the loop: schedulers send it to all, and a step needs its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@contextlib.contextmanager
def catch_signals():
    """SIGTERM and Ctrl-C fill a list instead of killing: the loop finishes its step, saves, and stops.

    A second one kills, if it comes seconds later. Not at once, because a terminal, torchrun and a scheduler may each
    hand on the same stop.
    """
    received = []

    def handle(number, frame):
        received.append(time.monotonic())
        if received[-1] - received[0] > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_asked(signals, processes, together, device):
    """Whether the run is to stop after this step. signals: the list of catch_signals.

    One process answers for itself at every step. Several must all stop at the same step, or the others wait for ever.
    So they ask each other, and only at steps where `together` is true, because asking makes the host wait for the device.
    """
    import torch
    if processes == 1:
        return bool(signals)
    if not together:
        return False
    return bool(sum_over_processes(torch.tensor(len(signals), device=device)).item())


# ------------------------------------------------------------------------------------------------------------- trouble


@contextlib.contextmanager
def stop_with(words):
    """Ctrl-C or SIGTERM ends what is inside at once, with a sentence. For work that can be done again.

    words   () -> the end of the sentence: what is kept and how to go on. It is called when the signal has come.
    Training does not use this. It finishes its step first (catch_signals).
    """
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop(number, frame):
        for each in numbers:  # a terminal and torchrun may each hand on the same stop: the second changes nothing
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        raise UserError(f"stopped by a signal: {words()}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def say_why(remedy):
    """Memory that runs out, and a loader's process that dies, as a UserError in one sentence. Other errors pass.

    remedy   what the user can do where memory runs out, "give ..."
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = f"{error} {error.__cause__}"  # of a process that died, torch tells the signal in the cause
        # torch has no exception of its own for a CPU: Linux and Windows each have their words.
        words = ("can't allocate memory", "not enough memory", "CUDA out of memory")
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(w in text for w in words):
            raise UserError(f"out of memory: {remedy}.") from None
        if not re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", text):
            raise
        signals = re.search(r"killed by signal: ([\w ]+)", text)
        cause = f" ({signals[1]})" if signals else ""
        raise UserError(f"a process that reads pictures died{cause}: memory may have run out, so give fewer --workers, "
                        f"or --workers 0.") from None


# ------------------------------------------------------------------------------------------------------------ pictures


def import_matplotlib():
    """Import matplotlib, whatever the variable MPLBACKEND says. To be called before the first `from matplotlib import`.

    A notebook sets MPLBACKEND to a backend of its own, for every `!python train.py`, too. Where that backend is not
    installed beside matplotlib, the import itself fails. Our figures go into files and need no backend. So the variable
    is hidden during the import. Afterwards it counts again, for a caller who draws figures of his own.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib
    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):  # it names nothing that is here
            matplotlib.rcParams["backend"] = backend


def _demo():
    """Five pixels in three parts of unequal size: mean squared error of a weight times the pixel."""
    import torch
    from typing import NamedTuple

    class Out(NamedTuple):
        logits: torch.Tensor
        emb: torch.Tensor

    pixels = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    weight = torch.zeros((), requires_grad=True)

    def network(part):
        return Out(weight * part, 0 * weight * part)

    def objective(out):
        return {"seg": ((out.logits - pixels[:len(out.logits)]) ** 2).mean()}

    def gradient(function):
        weight.grad = None
        function()
        return weight.grad.item()

    whole = gradient(lambda: objective(network(pixels))["seg"].backward())
    parts = gradient(lambda: backward_in_parts(network, pixels, 2, objective, contextlib.nullcontext))
    naive = sum(-2 * (part ** 2).mean() for part in pixels.split(2)).item() / 3
    print(f"gradient of the whole batch: {whole:.3f}   in three parts: {parts:.3f}   mean of the parts' own: {naive:.3f}")
    print("Notice: parts share one denominator, the whole batch's, so the gradient is the whole batch's, too.")
    assert abs(whole - parts) < 1e-6 and abs(whole - naive) > 0.01


if __name__ == "__main__":
    _demo()
