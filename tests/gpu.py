"""gpu.py: is this code right on a GPU, and how fast is it there? For the first ten minutes of a day on one.

    python tests/gpu.py --out runs/gpu               checks, then tables: under six minutes on one GPU
    python tests/gpu.py --parts step compile         some parts; gpu.json keeps the others
    python tests/gpu.py --device cpu                 the same functions in miniature, without a GPU

No data and no network is needed. Images are noise or drawn. Weights are random,
of the shapes of OpenAI's CLIPs.

A GPU is lent for minutes, so nothing that was measured may be lost:

    each part       has its name printed before it starts. If it fails, the next one starts all the same
    gpu.json        is written again after each part, and after each row of a table
    a stop          (Ctrl-C, SIGTERM, a closed terminal) ends the program; gpu.json holds what was done
    --budget        seconds for all. A part that does not fit is cut, and so is one that runs over
    the order       first the checks, then the tables that the README needs, then the rest

Exit status 1 if a check or a table failed, or was stopped. Each check raises AssertionError, or returns in
a line what it measured; tests/test_gpu.py runs them as tests. Times are medians of interleaved repetitions
(A B A B ...), so that a machine that slows down slows both.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# The module of a package, where it has another name. And what a package needs, apart from torch and
# torchvision.
IMPORTED = {
    "clip-anytorch": "clip",
    "setuptools": "pkg_resources",
    "Pillow": "PIL",
    "python-dateutil": "dateutil",
    "fonttools": "fontTools",
    "Pygments": "pygments",
}
BRINGS = {
    "clip-anytorch": "ftfy regex tqdm wcwidth",
    "matplotlib": "contourpy cycler fonttools kiwisolver numpy packaging Pillow pyparsing python-dateutil "
    "six tzdata",
    "pytest": "iniconfig packaging pluggy Pygments",
}


def missing_wheels(needed=None):
    """An empty string, or the sentence that names what to bring to a machine without a network.

    pip download fetches what a package requires, even if it is here: for clip-anytorch, 3 GB of torch. So
    it is told to fetch no requirements (--no-deps), and the small ones are named. Only a missing torch
    comes with all of its own.
    """
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = needed or [line.split()[0] for line in lines if line[:1] not in ("", "#")]
    missing = [wheel for wheel in needed if is_missing(wheel)]
    if not missing:
        return ""
    brought = []
    for wheel in missing:
        brought += [other for other in BRINGS.get(name_of(wheel), "").split() if is_missing(other)]
    large = [wheel for wheel in missing if wheel.startswith("torch")]
    small = [wheel for wheel in dict.fromkeys(missing + brought) if wheel not in large]
    commands = []
    if large:
        commands.append("pip download -d wheels " + shlex.join(large))
    if small:
        commands.append("pip download --no-deps -d wheels " + shlex.join(small))
    return (f"error: missing here: {shlex.join(missing)}. Where there is a network and the same Python: "
            f"{'; '.join(commands)}; bring the folder, then: "
            f"pip install --no-index --find-links wheels {shlex.join(large + small)}")


def name_of(wheel):
    """The package of a requirement: setuptools of `setuptools>=71,<82`."""
    return re.split("[<>=]", wheel)[0]


def is_missing(wheel):
    return importlib.util.find_spec(IMPORTED.get(name_of(wheel), name_of(wheel))) is None


if __name__ == "__main__" and missing_wheels():
    sys.exit(missing_wheels())

import torch  # noqa: E402

import bench  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import machine  # noqa: E402
import ppar  # noqa: E402
import train  # noqa: E402
import workbench  # noqa: E402
from kill_and_resume import command  # noqa: E402

REAL = train.configure(dict(source=("gta5",)))
# How long the parts take on one GPU, in seconds. These are estimates: from the FLOPs and bytes of a step on
# an A100 with 16 cores, and guesses for the compiler and for new processes. No GPU has measured them yet.
SECONDS = dict(
    parity=20,
    bf16=8,
    synchronisations=6,
    synchronisations_bf16=15,
    resume=20,
    closing_score=12,
    processes=22,
    compiled=30,
    step=40,
    loader=20,
    protocol=35,
    checkpoint=20,
    part=6,
    evaluation=20,
    shared=20,
    compile=60,
)
FULL = dict(
    towers=("RN50", "RN101", "ViT-B/16", "ViT-L/14"),
    few=("RN50", "ViT-B/16"),
    saved=("RN50", "ViT-B/16", "ViT-L/14"),
    flags={},
    parity=dict(crop=224, batch=2),
    drawn="--targets toy-fog toy-night",
    steps=30,
    repeats=7,
    together=3,
    workers=(4, 8, 16),
    pictures=((1024, 2048), (3024, 4032), (3936, 5248)),
    window=512,
    files=dict(pairs=4),
    protocols=(
        "--slide 0",
        "--slide 512",
        "--height 1536",
        "--size 512 1024",
        "--flip --slide 512",
        "--height 1024 --slide 512 --slide-stride 341",
    ),
    seconds=SECONDS,
)
SMALL = dict(
    towers=("small ResNet", "small ViT"),
    few=("small ResNet", "small ViT"),
    saved=("small ResNet",),
    flags=dict(crop=64, batch=2, amp="fp32"),
    parity=dict(crop=64, batch=2),
    drawn="--targets toy-fog --crop 32 --batch 2 --workers 0 --lr 1e-3",
    steps=12,
    repeats=1,
    together=1,
    workers=(0, 1),
    pictures=((64, 96),),
    window=32,
    files=dict(pairs=2, cityscapes=(64, 128), mapillary=(96, 128)),
    protocols=("--slide 0", "--height 48 --slide 32"),
    seconds={},
)
SYNCHRONISING = (
    "item tolist __bool__ __int__ __float__ cpu numpy nonzero new_tensor tensor as_tensor".split()
)
# Largest relative difference of a gradient, in 2-norms, that counts as rounding. Measured on a CPU at 224
# pixels: another memory layout makes 4.8e-4 (RN50) and 1.1e-6 (ViT-B/16). An offset of 0.01 on one bias
# makes 5.2e-3 and 8.4e-3.
ROUNDING = 2e-3


class Stopped(BaseException):
    """Somebody asked the program to end. No `except Exception` of a check may keep it."""


class OverBudget(BaseException):
    """The seconds of --budget are over."""


# --------------------------------------------------------------------------------------------------- checks


def parity(device, folder, sizes):
    """A step in float32 is the same on the CPU and on the device: before, within and after the ramp."""
    said = []
    for name in sizes["few"]:
        module, config, _ = bench.network(name, "ppar", amp="fp32", **sizes["parity"])
        config.ramp = (0, 1)
        config.tau = module.tau = 0.03  # at which some labels lose their weight, not all
        other = copy.deepcopy(module).to(device, memory_format=torch.channels_last)
        image, label = bench.random_batch(config)
        moved = image.to(device), label.to(device)
        # Convolutions round to TF32 unless they are told not to. Products of matrices do not.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for step in (0, 50, 100):
                ours = answers(module, config, image, label, step)
                theirs = answers(other, config, *moved, step)
                said.append(compare(ours, theirs))
    words = "largest differences: terms {:.0e}, gradients {:.0e}, mean weight {:.0e}, predictions {:.3%}"
    return words.format(*map(max, zip(*said)))


def answers(module, config, image, label, step):
    """(terms, gradients, weights of Eq. 6, predictions) of one step, on the CPU."""
    row, grads, _ = workbench.one_step(config, image, label, step, module)
    with torch.no_grad():
        out = module(image)
        weight = ppar.learning_weights(
            out,
            module.otp,
            label,
            tau=config.tau,
            judge_text=config.judge_text,
            ramp=step / config.steps,
        )
        best = ppar.prediction(
            out.logits, out.emb, module.otp, tau=config.tau, text_weight=config.text_weight
        ).argmax(dim=1)
    assert step == 0 or 0.01 < (weight < 1).float().mean() < 0.99, "Eq. 6 has nothing to decide here"
    return row, {name: grad.cpu() for name, grad in grads.items()}, weight.cpu(), best.cpu()


def compare(ours, theirs):
    """Largest differences of two answers, asserted to be rounding.

    Gradients are compared parameter by parameter: the 2-norm of the difference over the 2-norm of the
    gradient. The largest single entry would say less. Where the input of a ReLU is almost 0, rounding
    decides whether a path counts, and then one entry of millions is off by far. In the same way single
    pixels may fall to either side of Eq. 6.
    """
    assert ours[0].keys() == theirs[0].keys() and ours[1].keys() == theirs[1].keys()
    terms = max(abs(ours[0][name] - theirs[0][name]) / max(1, theirs[0][name]) for name in ours[0])
    grads = max(
        ((grad - theirs[1][name]).norm() / theirs[1][name].norm().clamp_min(1e-3)).item()
        for name, grad in ours[1].items()
    )
    weights, wrong = (
        (ours[2] - theirs[2]).abs().mean().item(),
        (ours[3] != theirs[3]).float().mean().item(),
    )
    found = terms, grads, weights, wrong
    assert terms < 1e-4 and grads < ROUNDING and weights < 1e-4 and wrong < 1e-4, found
    return found


def bf16(device, folder, sizes):
    """The first loss in bfloat16 is within 2 % of float32's."""
    losses = [
        [
            bench.network(name, "ppar", device, **sizes["parity"], amp=amp)[2]().item()
            for amp in ("bf16", "fp32")
        ]
        for name in sizes["few"]
    ]
    gaps = [abs(half / full - 1) for half, full in losses]
    assert 0 < max(gaps) < 0.02, gaps
    return f"first loss off by {max(gaps):.1e} of it"


def drawn(sizes, device, folder, *flags, scored=False, stops=False):
    """train.py on the drawn world in this process, without pictures -> None, or the sentence of its end.

    stops   whether the caller stops the run by a signal. If not, a signal came from outside: Stopped.
    """
    new = (
        []
        if "--resume" in flags
        else [*sizes["drawn"].split(), "--steps", sizes["steps"], "--out", folder]
    )
    threads = torch.get_num_threads()
    try:
        sentence = workbench.main(
            *new, "--no-figures", "--device", device, *flags, scored=scored, every=10
        )
    finally:
        # A run on a CPU asks for deterministic operations, and a drawn one for a single thread, in all of its
        # process. The next parts must have neither.
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    if sentence and "stopped by a signal" in sentence and not stops:
        raise Stopped
    return sentence


class HostWaits(torch.overrides.TorchFunctionMode):
    """On a CPU: warns at calls from Python that on a GPU would make the host wait for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in SYNCHRONISING:
            warnings.warn("synchronizing", stacklevel=2)
        return function(*args, **(kwargs or {}))


def waits(device, run):
    """How often the host waits for the device in each step of run(), which calls train.train -> a list."""
    marks, rate = [], train.learning_rate

    def begin(step, steps):  # the loop asks for it once in each step
        marks.append(len(seen))
        return rate(step, steps)

    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(mock.patch.object(train, "learning_rate", begin))
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            stack.enter_context(HostWaits())
        sentence = run()
        assert sentence is None, sentence
    return [
        sum("synchronizing" in str(warning.message) for warning in seen[a:b])
        for a, b in zip(marks, marks[1:])
    ]


def none_in_a_step(counts):
    """Asserts that only the first step and the tenth, which is logged, wait.

    In these two the waits must show.
    """
    assert counts[0] > 0 and counts[9] > 0 and not any(counts[1:9]), (
        f"{counts} in steps 1 to {len(counts)}"
    )
    return f"0 in a step, {counts[9]} in one that is logged"


def synchronisations(device, folder, sizes):
    """In a step that is neither the first nor logged, the host never waits for the device."""
    return none_in_a_step(waits(device, lambda: drawn(sizes, device, folder / "run", "--steps", 12)))


def synchronisations_bf16(device, folder, sizes):
    """The same for the first real CLIP at its recipe's crop and batch, in bfloat16."""
    name = sizes["few"][0]
    own = train.configure(dict(source=("gta5",), clip=name, **sizes["flags"]))
    flags = ["--clip", name, "--amp", "bf16", "--steps", 12]
    for flag in ("crop", "batch", "stride", "lr"):  # drawn scenes would have presets of their own
        flags += [f"--{flag}", getattr(own, flag)]

    def build(config):  # no file of CLIP is needed
        return bench.random_ppar(name, config), "random weights"

    with mock.patch.object(train, "build", build):
        return none_in_a_step(waits(device, lambda: drawn(sizes, device, folder / "run", *flags)))


def journey(folder, devices, sizes):
    """A run that is stopped by SIGTERM, and resumed on the next device, until it ends on the last one."""
    rate, steps = train.learning_rate, sizes["steps"]
    for leg, device in enumerate(devices):
        stop = steps * (leg + 1) // len(devices)

        def stopping(step, total, stop=stop):
            if step == stop - 1 and stop < steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return rate(step, total)

        with mock.patch.object(train, "learning_rate", stopping):
            sentence = drawn(sizes, device, folder, *(("--resume", folder) if leg else ()), stops=True)
        step = checkpoint.read(folder)["step"]
        if sentence and step < stop:  # before our own signal another one came
            raise Stopped
        assert step == stop and (sentence is None) == (stop == steps), sentence
    return folder


def resume(device, folder, sizes):
    """A run that was stopped and resumed, here or by way of the CPU, ends as the undisturbed one."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        calm, *others = (
            journey(folder / str(len(way)), way, sizes)
            for way in ([device], [device, device], [device, "cpu", device])
        )
    gaps = [workbench.largest_difference(calm, other) for other in others]
    assert max(gaps) <= (0 if device.type == "cpu" else 0.01), gaps
    return f"losses differ by {gaps[0]:.1e} at most, with a third of the way on the CPU by {gaps[1]:.1e}"


def closing_score(device, folder, sizes):
    """evaluate.py repeats the score that closed the training."""
    assert drawn(sizes, device, folder / "run", scored=True) is None
    file = folder / "run" / "results.json"
    closing = json.loads(file.read_text())
    file.unlink()
    evaluate.main(evaluate.parse([str(folder / "run"), "--device", str(device)]))
    again = json.loads(file.read_text())
    gap = max(
        abs(row["miou"] - again["targets"][name]["miou"]) for name, row in closing["targets"].items()
    )
    assert gap < 0.005 and closing["precision"] == again["precision"], gap
    return f"mean {closing['mean']:.2f}, each target within {gap:.0e}"


def compiled(device, folder, sizes):
    """--compile makes one graph of the network, without a break, and never a second one."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    backend = (
        "inductor" if device.type == "cuda" else "eager"
    )  # on a CPU the graph alone: its code takes a compiler and a minute
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        assert drawn(sizes, device, folder / "run", "--compile", "--steps", 10) is None
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    assert (breaks, graphs) == (0, 1), (
        f"{breaks} graph breaks, {graphs} graphs: {[*counters['graph_break']]}"
    )
    return "one graph in 10 steps"


def torchrun(sizes, number, *flags):
    """train.py on the drawn world in several processes -> CompletedProcess. They end with this program."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    words = command([*sizes["drawn"].split(), *flags, "--no-figures"], launcher)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=300)
        except BaseException:
            os.killpg(
                process.pid, signal.SIGKILL
            )  # torchrun's own processes, too, or they would keep the GPU
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def processes(device, folder, sizes):
    """torchrun on as many GPUs as there are (two processes on a CPU) has the losses of one process."""
    number = torch.cuda.device_count() if device.type == "cuda" else 2
    flags = ["--batch", number * max(1, 8 // number), "--steps", 20]
    assert (sentence := drawn(sizes, device, folder / "one", *flags)) is None, sentence
    done = torchrun(sizes, number, *flags, "--device", device.type, "--out", folder / "many")
    assert done.returncode == 0, done.stderr[-1500:]
    gap = workbench.largest_difference(folder / "one", folder / "many")
    assert f"{number} process(es)" in done.stdout and gap < 1e-2, gap
    return f"{number} process(es), losses differ by {gap:.1e} at most"


CHECKS = dict(
    parity=parity,
    bf16=bf16,
    synchronisations=synchronisations,
    synchronisations_bf16=synchronisations_bf16,
    resume=resume,
    closing_score=closing_score,
    processes=processes,
    compiled=compiled,
)

# --------------------------------------------------------------------------------------------------- tables


def busy(function, device):
    """Seconds that the device computes in a call, by torch's profiler; 0 where it may not look."""
    gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as seen:
        function()
        if gpu:
            torch.cuda.synchronize(device)
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    on = [
        event
        for event in seen.key_averages()
        if (event.device_type != torch.autograd.DeviceType.CPU) == gpu
    ]
    return sum(getattr(event, own) for event in on) / 1e6


def step_table(device, sizes):
    """A training step of baseline and method for each CLIP, with the flags of its recipe."""
    for name in sizes["towers"]:
        yield from step_rows(name, device, sizes)


def step_rows(name, device, sizes):
    step, peak, held = {}, {}, {}
    for method in ("erm", "ppar"):
        bench.forget(device)
        before, held_before = bench.allocated(device), bench.reserved(device)
        _, config, step[method] = bench.network(name, method, device, **sizes["flags"])
        step[method]()  # makes the optimiser's moments
        peak[method] = bench.peak(step[method], device) - before
        held[method] = None if held_before is None else bench.reserved(device) - held_before
    several = {
        method: lambda one=one: [one() for _ in range(sizes["together"])] for method, one in step.items()
    }
    times = bench.interleaved(several, sizes["repeats"], device)
    seconds = {method: s / sizes["together"] for method, s in times.items()}
    for method in step:
        yield dict(
            clip=name,
            method=method,
            ms=1000 * seconds[method],
            ratio=seconds[method] / seconds["erm"],
            images_per_s=config.batch / seconds[method],
            peak_gib=peak[method],
            reserved_gib=held[method],
            busy=busy(several[method], device) / sizes["together"] / seconds[method],
        )


def part_table(device, sizes):
    """Where a step of the first CLIP spends its time."""
    module, config, step = bench.network(sizes["towers"][0], "ppar", device, **sizes["flags"])
    _, autocast, layout = checkpoint.precision(config.amp, device)
    optimizer, (image, label) = train.make_optimizer(module, config), bench.random_batch(config, device)
    bytes_ = torch.zeros(image.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    image = image.contiguous(memory_format=layout)

    def forward():
        with autocast():
            return module.net(image)

    def look():
        with autocast():
            return module.ask_frozen_clip(image)

    def loss():
        sum(ppar.objective(out, module.otp, label, **workbench.numbers(config, 50)).values()).backward()

    out = ppar.Output(*(x.detach().requires_grad_() for x in forward()), *look())
    parts = {
        "the batch to the device, as floats": lambda: data.normalise(
            bytes_.to(device, non_blocking=True)
        ),
        "network, forward": forward,
        "network, both ways": lambda: torch.autograd.backward(forward(), [x.detach() for x in out[:2]]),
        "CLIP's look (Eq. 2)": look,
        "loss (Eq. 3 to 7), both ways": loss,
        "optimiser": optimizer.step,
        "the whole step": step,
    }
    for name, seconds in bench.interleaved(parts, sizes["repeats"], device).items():
        yield dict(part=name, ms=1000 * seconds)


def loader_table(device, sizes):
    """What the loader gives of GTA5-sized pairs: decoding, crop, augmentation, batch."""
    config = train.configure(dict(source=("gta5",), **sizes["flags"]))
    with tempfile.TemporaryDirectory() as folder:
        stream = data.TrainingStream([bench.gta5_sized(folder)], config.crop, seed=0)
        for workers in sizes["workers"]:
            count = 4 * max(1, workers)
            loader = torch.utils.data.DataLoader(
                stream,
                config.batch,
                sampler=range(2 * count * config.batch),
                num_workers=workers,
                pin_memory=device.type == "cuda",
                worker_init_fn=machine.outlive_signals,
            )
            times = [
                time.perf_counter() for _ in loader
            ]  # of the first half, the processes start and fill their queues
            yield dict(
                workers=workers, images_per_s=count * config.batch / (times[-1] - times[count - 1])
            )


def scorer(name, device, sizes):
    """evaluate.make_scorer of the baseline, random weights. The evaluation of both methods costs the same."""
    module, config, _ = bench.network(name, "erm", device, **sizes["flags"])
    return evaluate.make_scorer(module.eval(), config)


def evaluation_table(device, sizes):
    """Seconds for an image, whole and by windows, at the sizes of the data sets, without decoding."""
    for name in sizes["few"]:
        score = scorer(name, device, sizes)
        for size, slide in itertools.product(sizes["pictures"], (0, sizes["window"])):
            yield dict(
                clip=name,
                image=f"{size[0]} x {size[1]}",
                windows=slide or "whole",
                **one_picture(score, size, slide, device),
            )


def one_picture(score, size, slide, device):
    """A function of its own: when it returns, its picture is freed, and the next one's memory is its own."""
    bench.forget(device)
    before = bench.allocated(device)  # the weights
    once = functools.partial(
        evaluate.predict, score, torch.randn(3, *size, device=device), size, slide=slide
    )
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        peak = bench.peak(once, device) - before
        return dict(s=bench.interleaved({"": once}, 2, device)[""], peak_gib=peak)
    return dict(s=None, peak_gib=None)  # does not fit


def protocol_table(device, sizes):
    """Seconds for an image as evaluate.py takes it, decoded from disk, by each protocol of the README."""
    with tempfile.TemporaryDirectory(dir=sizes.get("out")) as folder:
        targets = bench.targets_sized(folder, **sizes["files"])
        for name in sizes["few"]:
            score = scorer(name, device, sizes)
            for flags, target in itertools.product(sizes["protocols"], targets):
                yield dict(
                    clip=name,
                    target=target,
                    flags=flags,
                    **one_protocol(score, flags, targets[target], device),
                )


def one_protocol(score, flags, items, device):
    """Seconds for an image, and GiB above what was in use before."""
    given = vars(evaluate.parse(["RUN", *flags.split()]))
    protocol = evaluate.PROTOCOL | {
        key: given[key] for key in evaluate.PROTOCOL if given[key] is not None
    }

    def scored(some):
        workers = min(8, machine.CORES)
        conf = evaluate.evaluate_dataset(score, some, protocol=protocol, device=device, workers=workers)
        assert conf.sum() > 0, "no pixel was scored"

    bench.forget(device)
    before = bench.allocated(device)
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        scored(items[:1])  # loads the kernels for this size
        seconds = []
        peak = bench.peak(lambda: seconds.append(bench.timed(lambda: scored(items))), device) - before
        return dict(s=seconds[0] / len(items), peak_gib=peak)
    return dict(s=None, peak_gib=None)  # does not fit


def checkpoint_table(device, sizes):
    """A checkpoint on the disk of --out: its size, seconds to write it and flush it, seconds to read it."""
    for name in sizes["saved"]:
        with tempfile.TemporaryDirectory(dir=sizes.get("out")) as folder:
            module, config, step = bench.network(name, "ppar", device, **sizes["flags"])
            config.out = folder
            step()  # leaves gradients
            optimizer = train.make_optimizer(module, config)
            optimizer.step()  # makes the moments, two numbers for each trained weight
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            write = bench.timed(lambda: checkpoint.save(module, optimizer, config, 1))  # noqa: B023
            read = bench.timed(lambda: checkpoint.read(folder))  # noqa: B023
            yield dict(
                clip=name,
                gib=(Path(folder) / "last.pt").stat().st_size / 2**30,
                write_s=write,
                read_s=read,
            )


def compile_table(device, sizes):
    """What --compile gains: a step of the method as it is, and compiled. The first step compiles."""
    backend = (
        "inductor" if device.type == "cuda" else "eager"
    )  # on a CPU, code takes a compiler and a minute
    for name in sizes["few"]:
        torch._dynamo.reset()
        with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
            steps = {
                kind: bench.network(name, "ppar", device, compile=kind == "compiled", **sizes["flags"])[
                    2
                ]
                for kind in ("plain", "compiled")
            }
        plain = steps["plain"]().item()
        first = bench.timed(lambda: steps["compiled"]().item())  # noqa: B023
        gap = abs(
            steps["compiled"]().item() / plain - 1
        )  # after one step more, at a learning rate of 1e-6
        seconds = bench.interleaved(steps, sizes["repeats"], device)
        yield dict(
            clip=name,
            plain_ms=1000 * seconds["plain"],
            compiled_ms=1000 * seconds["compiled"],
            gain=seconds["plain"] / seconds["compiled"],
            first_step_s=first,
            loss_differs=gap,
        )


def shared_table(device, sizes):
    """Two processes on one GPU, a rehearsal of several GPUs: how far their losses are from one process's."""
    place = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        flags = ["--batch", 8, "--steps", 20]
        assert (sentence := drawn(sizes, device, one, *flags)) is None, sentence
        done = torchrun(sizes, 2, *flags, "--device", place, "--out", two)
        if done.returncode:  # NCCL refuses it; what the last process said is the reason
            words = [line for line in done.stderr.splitlines() if "rror" in line]
            yield dict(processes=2, place=place, loss_differs=None, why_not=" ".join(words[:1])[:300])
            return
        gap = workbench.largest_difference(one, two)
        assert gap < 1e-2, gap
        yield dict(processes=2, place=place, loss_differs=gap, why_not=None)


# First what the README's table needs, then what explains it.
TABLES = dict(
    step=step_table,
    loader=loader_table,
    protocol=protocol_table,
    checkpoint=checkpoint_table,
    part=part_table,
    evaluation=evaluation_table,
    shared=shared_table,
    compile=compile_table,
)
PARTS = CHECKS | TABLES

# -------------------------------------------------------------------------------------------------- the day


def show(title, rows):
    """A list of dicts with the same keys as a table; rows may be a generator."""
    print(f"\n{title}")
    rows = [*rows]
    if not rows:
        return print("  no row")
    cells = [[*rows[0]]] + [
        ["-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def hours(tables):
    """The last line: how long the recipes take, by step and by loader, as far as these were measured."""
    steps, loads = (tables.get(name, {}).get("rows", []) for name in ("step", "loader"))
    words = []
    if steps:
        own = {(row["clip"], row["method"]): row["ms"] / 3.6e6 * REAL.steps for row in steps}
        names = dict.fromkeys(name for name, method in own if method == "ppar")
        each = ", ".join(f"{name} {own[name, 'erm']:.2f} and {own[name, 'ppar']:.2f}" for name in names)
        words.append(f"baseline and method: {each}")
    if loads:
        fastest = max(loads, key=lambda row: row["images_per_s"])
        least = REAL.steps * REAL.batch / fastest["images_per_s"] / 3600
        words.append(f"no less than {least:.2f} with {fastest['workers']} loader processes")
    return f"hours for {REAL.steps} steps, {'; '.join(words) or 'not measured'}"


def measure(name, device, sizes, keep):
    """One part -> {status, seconds, said, rows of a table}. After each row it calls keep(outcome).

    status   passed; failed (said holds the reason); cut (the budget ended); stopped (a signal came)
    An error of the part ends here: it must not cost the next part.
    """
    began, silence, outcome = (
        time.perf_counter(),
        io.StringIO(),
        dict(status="passed", seconds=0.0, said=""),
    )
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            if name in CHECKS:
                outcome["said"] = CHECKS[name](device, Path(folder), sizes)
            else:
                outcome["rows"] = []
                for row in TABLES[name](device, sizes):
                    json.dumps(
                        row, allow_nan=False
                    )  # a row that gpu.json cannot hold is a fault of the table
                    outcome["rows"].append(row)
                    keep(outcome)
    except OverBudget:
        outcome.update(status="cut", said="it ran over --budget")
    except Stopped:
        outcome.update(status="stopped", said="a signal came")
    except (Exception, SystemExit) as error:
        outcome.update(status="failed", said=f"{type(error).__name__}: {str(error)[-600:]}")
    outcome["seconds"] = round(time.perf_counter() - began, 1)
    bench.forget(device)  # what a failed part left on the GPU
    return outcome


@contextlib.contextmanager
def raising(number, error):
    """While this lasts, a signal raises the error in the main thread."""

    def handle(number, frame):
        raise error

    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


def begin_report(given, device):
    """What gpu.json says of device and code, with what it holds of other parts if only some are asked for."""
    file = Path(given.out) / "gpu.json"
    report = dict(checkpoint.describe(train.configure(dict(device=str(device)))), checks={}, tables={})
    if not file.exists():
        return report
    if not given.parts:
        os.replace(
            file, Path(given.out) / "gpu-before.json"
        )  # of an earlier call: out of the way, and not lost
        return report
    old = json.loads(file.read_text())
    for key in ("device", "commit", "versions"):
        data.require(
            old.get(key) == report[key],
            f"{file} is of another {key} ({old.get(key)}), so that its parts cannot stand beside "
            f"new ones: give another --out.",
        )
    return report | dict(checks=old["checks"], tables=old["tables"])


def run_parts(names, device, sizes, budget, report, write):
    """Measure the parts in turn into the report; write() after each. Ends early after a signal."""
    began = time.perf_counter()
    for number, name in enumerate(names, 1):
        left, guess = budget - (time.perf_counter() - began), sizes["seconds"].get(name, 0)
        print(f"\n[{number}/{len(names)}] {name}: {PARTS[name].__doc__.splitlines()[0]}", flush=True)
        group = report["checks" if name in CHECKS else "tables"]

        def keep(outcome, group=group, name=name):
            group[name] = outcome
            write()

        if guess > left or left <= 0:
            outcome = dict(
                status="cut",
                seconds=0.0,
                said=f"it takes about {guess} s, and {max(0, left):.0f} s of --budget are left",
            )
        else:
            signal.setitimer(signal.ITIMER_REAL, left)
            try:
                outcome = measure(name, device, sizes, keep)
            except OverBudget:  # it came between two lines of measure
                outcome = dict(status="cut", seconds=round(left, 1), said="it ran over --budget")
            signal.setitimer(signal.ITIMER_REAL, 0)
        keep(outcome)
        if outcome.get("rows"):
            show("", outcome["rows"])
        words = {"passed": "PASS" if name in CHECKS else "DONE", "failed": "FAIL"}.get(
            outcome["status"], outcome["status"].upper()
        )
        print(f"{words} {name}, {outcome['seconds']:.0f} s. {outcome['said']}".rstrip(), flush=True)
        if outcome["status"] == "stopped":
            break


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="runs/gpu", help="folder for gpu.json (default: runs/gpu)")
    parser.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, ...; default: cuda where there is one; cpu: all in miniature",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=360,
        metavar="SECONDS",
        help="for all parts together (default: 360)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*PARTS],
        metavar="NAME",
        help=f"only these, of: {', '.join(PARTS)}",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    given, began = parse(arguments), time.perf_counter()
    with checkpoint.one_sentence(given.out):
        data.require(given.budget > 0, f"--budget {given.budget:g} must be positive.")
        device = machine.choose_device(given.device)
        Path(given.out).mkdir(parents=True, exist_ok=True)
        report = begin_report(given, device)
        names = [name for name in PARTS if name in (given.parts or PARTS)]
        sizes = (SMALL if device.type == "cpu" else FULL) | dict(out=given.out)

        def write():
            report.update(hours=hours(report["tables"]), seconds=round(time.perf_counter() - began))
            checkpoint.write_json(Path(given.out) / "gpu.json", report)

        versions = f"torch {report['versions']['torch']}, CUDA {report['cuda']}"
        print(f"{report['device']}, {versions}, {machine.CORES} cores")
        guess = sum(sizes["seconds"].get(name, 0) for name in names)
        print(f"{len(names)} parts, about {guess} s by the estimate", flush=True)
        with contextlib.ExitStack() as stack:
            for number in machine.stop_signals():
                stack.enter_context(raising(number, Stopped))
            stack.enter_context(raising(signal.SIGALRM, OverBudget))
            with contextlib.suppress(Stopped):  # between two parts: all that was done is written
                run_parts(names, device, sizes, given.budget, report, write)
        write()
    done = report["checks"] | report["tables"]
    told = {
        status: [name for name in names if done.get(name, dict(status="cut"))["status"] == status]
        for status in ("failed", "cut", "stopped")
    }
    print(f"\n{report['seconds']} s; {given.out}/gpu.json\n{report['hours']}")
    for status, which in told.items():
        if which:
            print(f"{status}: {' '.join(which)}")
    if again := " ".join(name for name in names if any(name in which for which in told.values())):
        print(f"these parts again: python tests/gpu.py --out {given.out} --parts {again}")
    return 1 if told["failed"] or told["stopped"] else 0


if __name__ == "__main__":
    sys.exit(main())
