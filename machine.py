"""machine.py: one run on any machine: its devices, its precision, its processes, and how it is stopped.

Training needs a picture, a label, a network and a loss. A machine adds its own questions. Is there a GPU, and can it
compute in bfloat16? Is the batch split over several processes? Does the batch fit into memory at once? Has somebody
pressed Ctrl-C? The answers must not change what is learned. They stand here, so that train.py reads straight down.

    device       the GPU that is here, or the CPU                                        choose_device
    precision    bfloat16 where the processor has it, the memory layout that is fast     precision
    threads      one where the maps are small, all cores where they are large            choose_threads
    processes    torchrun starts several; each has a share of every batch                setup_processes
    backend      NCCL between GPUs; gloo on CPUs, or where processes share a GPU         choose_backend
    sum          a mean over the batch is a sum over all processes, divided once         sum_over_processes
    parts        a batch that does not fit goes through the network in parts             backward_in_parts
    stop         a signal asks; the loop finishes its step, saves, and ends              catch_signals, stop_asked
                 before and after the loop it ends the program at once, in a sentence    stop_with
    trouble      memory that runs out, a loader's process that dies, no compiler         trouble, say_why
    pictures     matplotlib, whatever window system the environment asks for             import_matplotlib

Why parts and processes have the same gradient as the whole batch: the loss of a batch is a mean over its pixels, with
weights (Eq. 6) and class counts of the whole batch. Whoever takes the mean of the means of the parts gets another loss.

Not here: the loop (train.py), the files of a run (checkpoint.py). torch is imported inside the functions, so that
`--help` answers at once. `python machine.py` prints
    gradient of the whole batch: -2.800   in three parts: -2.800   mean of the parts' own: -2.333
    Notice: parts share one denominator, the whole batch's, so the gradient is the whole batch's, too.
"""

import contextlib
import datetime
import functools
import os
import re
import signal
import time

from data import CORES, UserError, require

# How long a process waits for another one. NCCL's own limit is ten minutes. The first process may need longer: it
# downloads CLIP (up to 0.9 GB), and it writes checkpoints (up to 4 GB), perhaps to a slow disk. In the closing
# evaluation one process may have the larger pictures. Two hours are more than any of these should take.
PATIENCE = datetime.timedelta(hours=2)
# Processes that decode pictures: the cores that this process has, when torchrun starts several on one machine.
LOADERS = min(16, max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def choose_device(name=None):
    """torch.device of a name, or of the best that is here; UserError if this machine does not have it.

    name   cpu, cuda:0, cuda:1, ...; cuda: the GPU that belongs to this process; None: cuda where there is one
    An Apple GPU ("mps") is not used, because it has no float64 (ppar.objective sums its weights in float64).
    """
    import torch
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    if name is None and not gpus and torch.backends.mps.is_available():
        _say_once("this machine has an Apple GPU, which is not used: it has no float64, in which the loss sums its "
                  "weights. The run uses the CPU.")
    require(str(name).split(":")[0] != "mps",
            f"--device {name} cannot be used: an Apple GPU has no float64, in which the loss sums its weights; "
            f"give --device cpu.")
    name = name or ("cuda" if gpus else "cpu")
    if name == "cuda" and gpus:
        # Each process of a machine takes a GPU of its own. Where there are more processes than GPUs, they share.
        name = gpus[int(os.environ.get("LOCAL_RANK", 0)) % len(gpus)]
    require(name in ["cpu", *gpus], f"--device {name} cannot be used here: choose from {', '.join(['cpu', *gpus])}.")
    return torch.device(name)


@functools.cache
def _say_once(sentence):
    """Print a sentence, however often it is asked for."""
    print(sentence)


def precision(amp, device):
    """(name of the precision, autocast context, memory layout), the same in training and evaluation.

    amp      bf16, fp32, or auto: bf16 where the processor computes in it, else fp32
    layout   channels_last (the channels of a pixel lie side by side) or contiguous (a channel's pixels do)

    bfloat16 has float32's range: no loss scaling, and no overflow to NaN. float16 has a smaller range. There the loss is
    multiplied by a scale, and a step whose gradient overflows is skipped. The skipped steps would differ from method to
    method, so float16 is not offered. GPUs without bfloat16 compute in float32.

    The layout is the one that the fastest convolutions read. Tensor cores read channels_last. They take bfloat16, and
    from compute capability 8.0 on (Ampere, 2020) they take float32 as well, rounded to TF32. Older GPUs (V100, T4,
    2080 Ti) compute float32 without tensor cores. There channels_last costs time and gains nothing: PyTorch's issue
    44943 measured 2.76 against 1.68 s on a V100.
    """
    import torch
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # without bf16 arithmetic, a processor emulates it, slower than float32
        able = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
        tf32 = False
    bf16 = amp == "bf16" or (amp == "auto" and able)
    layout = torch.channels_last if bf16 or tf32 else torch.contiguous_format
    return "bf16" if bf16 else "fp32", lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16), layout


def choose_threads(sources):
    """Let torch compute with one thread where the drawn world is the source, and else with all cores.

    Crops of 96 pixels have small maps, so a second thread gains little, and on a busy machine threads wait for each
    other in every layer. Measured on two cores, seconds a step:

                                           two loader processes     none
        real-time priority,   one thread   0.28                     0.41
                              two          0.28                     0.31
        load 13 to 17,        one thread   1.9                      2.9
                              two          stopped after 200 s      11 (one value)

    Real-time priority stands in for an idle machine, which was not at hand. The drawn world uses two loader processes.
    Pictures of real data are large, and there threads pay.
    Whoever sets OMP_NUM_THREADS or MKL_NUM_THREADS has chosen, and keeps that number.
    """
    import torch
    chosen = os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS")
    if not chosen and all(name.startswith("toy-") for name in sources):
        torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------- processes


def setup_processes(config):
    """(rank, number of processes, device) of this process. torchrun sets the variables, a plain `python` does not.

    With torchrun, `--device cuda` gives each process of a machine a GPU of its own; `--device cuda:1` gives all of them
    the same one. Processes that share a GPU rehearse a run on several.
    """
    import torch
    choose_threads(config.source)
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
    # A store is a table of words that all processes read and write. Each writes down where it computes.
    store, rank, processes = next(torch.distributed.rendezvous("env://", timeout=PATIENCE))
    store.set(f"place of {rank}", _place(device))
    places = [store.get(f"place of {other}").decode() for other in range(processes)]  # waits for the slowest
    backend, note = choose_backend(places)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    if rank == 0 and note:
        print(note)
    return rank, processes, device


def _place(device):
    """Where a process computes: "cpu", or the number that a GPU has in all the world."""
    import torch
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def choose_backend(places):
    """How processes exchange tensors -> (backend for init_process_group, sentence for the user or "").

    places   of every process: "cpu", or the number of its GPU. All processes have the same list, so all choose the same.

    NCCL is the fast way between GPUs, and it refuses two processes on one. gloo goes through the memory of the host. It
    takes tensors of a shared GPU, too. In all cases gloo exchanges what lies on the CPU.
    """
    gpus = set(places) - {"cpu"}
    if not gpus:
        return "gloo", ""
    require("cpu" not in places, f"{places.count('cpu')} of {len(places)} processes have no GPU, the others have one: "
                                 f"start processes on machines with GPUs alone, or give --device cpu.")
    if len(gpus) == len(places):
        return "cpu:gloo,cuda:nccl", ""
    return "cpu:gloo,cuda:gloo", (f"{len(places)} processes share {len(gpus)} GPU(s), so they exchange over gloo: "
                                  f"the same training, slower than one process for each GPU.")


def is_first():
    """Whether this is the first process of all. torchrun's variable says so before there is a group of processes."""
    return os.environ.get("RANK", "0") == "0"


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


def wait_for_others():
    """Return when all processes have come here. The tensor lies on the CPU, so no GPU waits and NCCL is not asked."""
    import torch
    sum_over_processes(torch.zeros(1))


def take_turns(rank, load):
    """load() in every process, one group after another -> its result.

    A CLIP by name is downloaded into a folder that processes share. So the first process of all goes first. Then the
    first process of every other machine goes. The rest find the file in its place.

    If load() raises a UserError in one process, the others do not wait for it in vain: they raise one as well.
    """
    import torch
    if count_processes() == 1:
        return load()
    local_rank = os.environ.get("LOCAL_RANK", "0")
    mine = 0 if rank == 0 else 1 if local_rank == "0" else 2
    result = mistake = None
    for turn in range(3):
        if turn == mine:
            try:
                result = load()
            except UserError as error:
                mistake = error
        failed = sum_over_processes(torch.tensor(0.0 if mistake is None else 1.0)).item()
        if mistake is not None:
            raise mistake
        require(not failed, f"process {rank} stops, because another one could not go on; that one says why.")
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
    The network is evaluated twice, so a step takes about 1.5 times as long. The gradient is the whole batch's.
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


def stop_signals():
    """The signals that ask a program to stop: SIGINT (Ctrl-C), SIGTERM (a scheduler), SIGHUP (its terminal was closed).

    `nohup` starts a program with SIGHUP ignored. Then it is none of them, and stays ignored.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    return numbers


def outlive_signals(worker):
    """A loader's process leaves the first stop to the loop: terminals and schedulers send it to all, and a step needs its
    batch. The loop ends its loaders' processes by SIGTERM, so a second one kills."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@contextlib.contextmanager
def _handled_by(handle):
    """While this lasts, handle(number, frame) answers the stop signals; afterwards, whatever did before."""
    before = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def catch_signals():
    """In the loop, a stop signal fills a list instead of killing: the loop finishes its step, saves, and stops.

    A second one kills, if it comes seconds later. Not at once, because a terminal, torchrun and a scheduler may each
    hand on the same stop.
    """
    received = []

    def handle(number, frame):
        received.append(time.monotonic())
        if received[-1] - received[0] > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with _handled_by(handle):
        yield received


@contextlib.contextmanager
def stop_with(words):
    """Outside of the loop, a stop signal ends what is inside at once, with a sentence. For work that can be done again.

    words   () -> the end of the sentence: what is kept and how to go on. It is called when the signal has come.
    Raises UserError "stopped by a signal: WORDS".

    The handler raises KeyboardInterrupt, as Ctrl-C does without us. No `except Exception` on the way out swallows it.
    """
    owner, received = os.getpid(), []

    def handle(number, frame):
        if os.getpid() != owner:
            # A loader's process is forked with this handler in place. It leaves the first stop to its owner, who ends it.
            signal.signal(number, signal.SIG_DFL)
            return
        received.append(time.monotonic())
        echo = len(received) > 1 and received[-1] - received[0] <= 2  # the same stop, handed on by torchrun
        if not echo:
            raise KeyboardInterrupt

    with _handled_by(handle):
        try:
            yield
        except KeyboardInterrupt:
            raise UserError(f"stopped by a signal: {words()}") from None


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


def trouble(error):
    """What went wrong with the machine -> ("memory", "loader", "compiler" or None, the reason in one line).

    torch has few exceptions of its own for this, so their texts are read. None: it is another kind of error.
    """
    text = " ".join(str(error).split())
    tried = re.search(r"[Tt]ried to allocate [\d.]+ \w+", text)
    reason = tried[0] if tried else text.split(". ")[0][:200] or type(error).__name__
    words = r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|_ALLOC_FAILED"
    kinds = {"MemoryError", "OutOfMemoryError"}  # the second is torch's
    memory = kinds & {kind.__name__ for kind in type(error).__mro__} or re.search(words, text)
    if died := re.search(r"DataLoader worker .*?(killed by signal: [\w ]+\w|exited unexpectedly)", text):
        return "loader", died[1]
    if memory:
        return ("loader", "out of memory") if "in DataLoader worker process" in text else ("memory", reason)
    compilers = ("torch._inductor", "torch._dynamo", "triton")
    if type(error).__module__.startswith(compilers) or re.search(r"C(\+\+)? compiler", text):
        return "compiler", reason
    return None, reason


@contextlib.contextmanager
def say_why(remedy):
    """Memory that runs out, and a loader's process that dies, as a UserError in one sentence. Other errors pass.

    remedy   what the user can do where memory runs out, "give ..."
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kind, _ = trouble(error)
        if kind == "memory":
            raise UserError(f"out of memory: {remedy}.") from None
        if kind != "loader":
            raise
        signals = re.search(r"killed by signal: ([\w ]+)", f"{error} {error.__cause__}")  # torch tells it in the cause
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
