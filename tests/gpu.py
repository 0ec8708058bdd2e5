"""gpu.py: what a GPU does with this code: is it right, and how fast? For the first ten minutes of a day on one.

    python tests/gpu.py --out runs/gpu               a line PASS or FAIL for each check, then the tables; gpu.json into the folder
    python tests/gpu.py --device cpu                 the same functions in miniature: what can be known without a GPU

No data and no network is needed: images are noise or drawn, weights are random, of the shapes of OpenAI's CLIPs. Exit
status 1 if a check fails. Each check raises AssertionError or says in a line what it measured; tests/test_gpu.py runs them
as tests. Times are medians of interleaved repetitions (A B A B ...), so that a machine that slows down slows both.
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
IMPORTED = {"clip-anytorch": "clip", "setuptools<81": "pkg_resources", "Pillow": "PIL"}  # where a package has another name


def missing_wheels(needed=None):
    """"" or the sentence that names what to bring to a machine without a network."""
    needed = needed or [line.split()[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    modules = {wheel: IMPORTED.get(wheel, re.split("[<>=]", wheel)[0]) for wheel in needed}
    wheels = " ".join(f"'{wheel}'" for wheel, module in modules.items() if importlib.util.find_spec(module) is None)
    return wheels and (f"error: missing here: {wheels}. Where there is a network and the same Python: pip download -d wheels {wheels}; "
                       f"bring the folder, then: pip install --no-index --find-links wheels {wheels}")


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
FULL = dict(towers=("RN50", "RN101", "ViT-B/16", "ViT-L/14"), few=("RN50", "ViT-B/16"), flags={}, parity=dict(crop=224, batch=2),
            drawn="--targets toy-fog toy-night", steps=60, repeats=7, together=3, workers=(4, 8, 16),
            pictures=((1024, 2048), (3024, 4032), (3936, 5248)), window=512)
SMALL = dict(towers=("small ResNet", "small ViT"), few=("small ResNet", "small ViT"), flags=dict(crop=64, batch=2, amp="fp32"),
             parity=dict(crop=64, batch=2), drawn="--targets toy-fog --crop 32 --batch 2 --workers 0 --lr 1e-3", steps=12, repeats=1,
             together=1, workers=(0, 1), pictures=((64, 96),), window=32)
SYNCHRONISING = "item tolist __bool__ __int__ __float__ cpu numpy nonzero new_tensor tensor as_tensor".split()

# ------------------------------------------------------------------------------------------------------------- checks


def parity(device, folder, sizes):
    """A step in float32 is the same on the CPU and on the device, before, within and after the ramp, ResNet and ViT."""
    said = []
    for name in sizes["few"]:
        module, config, _ = bench.network(name, "ppar", amp="fp32", **sizes["parity"])
        config.ramp, config.tau, module.tau = (0, 1), 0.03, 0.03  # at which some labels lose their weight, not all
        other = copy.deepcopy(module).to(device, memory_format=torch.channels_last)
        image, label = bench.random_batch(config)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # matrices are multiplied without it by default
            for step in (0, 50, 100):
                said.append(compare(answers(module, config, image, label, step),
                                    answers(other, config, image.to(device), label.to(device), step)))
    return "largest differences: terms {:.0e}, gradients {:.0e}, mean weight {:.0e}, predictions {:.3%}".format(*map(max, zip(*said)))


def answers(module, config, image, label, step):
    """(terms, gradients, weights of Eq. 6, predictions) of one step, on the CPU."""
    row, grads, _ = workbench.one_step(config, image, label, step, module)
    with torch.no_grad():
        out = module(image)
        weight = ppar.learning_weights(out, module.otp, label, tau=config.tau, judge_text=config.judge_text, ramp=step / config.steps)
        best = ppar.prediction(out.logits, out.emb, module.otp, tau=config.tau, text_weight=config.text_weight).argmax(dim=1)
    assert step == 0 or 0.01 < (weight < 1).float().mean() < 0.99, "Eq. 6 has nothing to decide here"
    return row, {name: grad.cpu() for name, grad in grads.items()}, weight.cpu(), best.cpu()


def compare(ours, theirs):
    """Largest differences of two answers, asserted to be rounding. At the threshold of Eq. 6 single pixels may fall either way."""
    assert ours[0].keys() == theirs[0].keys() and ours[1].keys() == theirs[1].keys()
    terms = max(abs(ours[0][name] - theirs[0][name]) / max(1, theirs[0][name]) for name in ours[0])
    grads = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item()
                for a, b in ((grad, theirs[1][name]) for name, grad in ours[1].items()))
    weights, wrong = (ours[2] - theirs[2]).abs().mean().item(), (ours[3] != theirs[3]).float().mean().item()
    assert terms < 1e-4 and grads < 1e-3 and weights < 1e-4 and wrong < 1e-4, (terms, grads, weights, wrong)
    return terms, grads, weights, wrong


def bf16(device, folder, sizes):
    """The first loss in bfloat16 is within 2 % of float32's."""
    losses = [[bench.network(name, "ppar", device, **sizes["parity"], amp=amp)[2]().item() for amp in ("bf16", "fp32")]
              for name in sizes["few"]]
    gaps = [abs(half / full - 1) for half, full in losses]
    assert 0 < max(gaps) < 0.02, gaps
    return f"first loss off by {max(gaps):.1e} of it"


def drawn(sizes, device, folder, *flags, scored=False):
    """train.py on the drawn world in this process, without pictures -> None, or the sentence that it ended with."""
    new = [] if "--resume" in flags else [*sizes["drawn"].split(), "--steps", sizes["steps"], "--out", folder]
    sentence = workbench.main(*new, "--no-figures", "--device", device, *flags, scored=scored, every=10)
    torch.use_deterministic_algorithms(False)  # a run on a CPU asks for it, for all of its process
    return sentence


class HostWaits(torch.overrides.TorchFunctionMode):
    """On a CPU: warns at calls from Python that on a GPU would make the host wait for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in SYNCHRONISING:
            warnings.warn("synchronizing", stacklevel=2)
        return function(*args, **(kwargs or {}))


def synchronisations(device, folder, sizes):
    """In a step that is neither the first nor logged, the host never waits for the device."""
    marks, rate = [], train.learning_rate

    def begin(step, steps):
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
        assert drawn(sizes, device, folder / "run", "--steps", 12) is None
    counts = [sum("synchronizing" in str(warning.message) for warning in seen[a:b]) for a, b in zip(marks, marks[1:])]
    assert counts[0] > 0 and counts[9] > 0 and not any(counts[1:9]), f"{counts} in steps 1 to {len(counts)}"  # the logged one must show
    return f"0 in a step, {counts[9]} in one that is logged"


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
            sentence = drawn(sizes, device, folder, *(("--resume", folder) if leg else ()))
        assert checkpoint.read(folder)["step"] == stop and (sentence is None) == (stop == steps), sentence
    return folder


def resume(device, folder, sizes):
    """Stopped and resumed, here and by way of the CPU, a run goes where the undisturbed one goes; on a CPU to the same bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        calm, *others = (journey(folder / str(len(way)), way, sizes) for way in ([device], [device, device], [device, "cpu", device]))
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
    gap = max(abs(row["miou"] - again["targets"][name]["miou"]) for name, row in closing["targets"].items())
    assert gap < 0.005 and closing["precision"] == again["precision"], gap
    return f"mean {closing['mean']:.2f}, each target within {gap:.0e}"


def compiled(device, folder, sizes):
    """--compile makes one graph of the network, without a break, and never a second one."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    backend = "inductor" if device.type == "cuda" else "eager"  # on a CPU the graph alone: its code takes a compiler and a minute
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        assert drawn(sizes, device, folder / "run", "--compile", "--steps", 10) is None
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    assert (breaks, graphs) == (0, 1), f"{breaks} graph breaks, {graphs} graphs: {[*counters['graph_break']]}"
    return "one graph in 10 steps"


def processes(device, folder, sizes):
    """torchrun on as many GPUs as there are (two processes on a CPU) has the losses of one process."""
    number = torch.cuda.device_count() if device.type == "cuda" else 2
    flags = ["--batch", number * max(1, 8 // number), "--steps", 20]
    assert drawn(sizes, device, folder / "one", *flags) is None
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    flags = [*sizes["drawn"].split(), *flags, "--no-figures", "--device", device.type, "--out", folder / "many"]
    done = subprocess.run(command(flags, launcher), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    gap = workbench.largest_difference(folder / "one", folder / "many")
    assert f"{number} process(es)" in done.stdout and gap < 1e-2, gap
    return f"{number} process(es), losses differ by {gap:.1e} at most"


CHECKS = dict(parity=parity, bf16=bf16, synchronisations=synchronisations, resume=resume, closing_score=closing_score,
              compiled=compiled, processes=processes)

# ------------------------------------------------------------------------------------------------------------- tables


def busy(function, device):
    """Seconds that the device computes in a call, by torch's profiler; 0 where it may not look."""
    gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as seen:
        function()
        if gpu:
            torch.cuda.synchronize(device)
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    on = [event for event in seen.key_averages() if (event.device_type != torch.autograd.DeviceType.CPU) == gpu]
    return sum(getattr(event, own) for event in on) / 1e6


def step_table(device, sizes):
    """A training step of baseline and method for each CLIP, with the flags of its recipe."""
    rows = []
    for name in sizes["towers"]:
        step, peak = {}, {}
        for method in ("erm", "ppar"):
            before = bench.allocated(device)
            _, config, step[method] = bench.network(name, method, device, **sizes["flags"])
            step[method]()  # makes the optimiser's moments
            peak[method] = bench.peak(step[method], device) - before
        several = {method: lambda one=one: [one() for _ in range(sizes["together"])] for method, one in step.items()}
        seconds = {method: s / sizes["together"] for method, s in bench.interleaved(several, sizes["repeats"], device).items()}
        rows += [dict(clip=name, method=method, ms=1000 * seconds[method], ratio=seconds[method] / seconds["erm"],
                      images_per_s=config.batch / seconds[method], peak_gib=peak[method], busy=busy(several[method], device)
                      / sizes["together"] / seconds[method]) for method in step]
    return rows


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
    parts = {"the batch to the device, as floats": lambda: data.normalise(bytes_.to(device, non_blocking=True)),
             "network, forward": forward, "network, both ways": lambda: torch.autograd.backward(forward(), [x.detach() for x in out[:2]]),
             "CLIP's look (Eq. 2)": look,
             "loss (Eq. 3 to 7), both ways": loss,
             "optimiser": optimizer.step, "the whole step": step}
    return [dict(part=name, ms=1000 * s) for name, s in bench.interleaved(parts, sizes["repeats"], device).items()]


def loader_table(device, sizes):
    """What the loader gives of GTA5-sized pairs: decoding, crop, augmentation, batch."""
    rows, config = [], train.configure(dict(source=("gta5",), **sizes["flags"]))
    with tempfile.TemporaryDirectory() as folder:
        stream = data.TrainingStream([bench.gta5_sized(folder)], config.crop, seed=0)
        for workers in sizes["workers"]:
            count = 4 * max(1, workers)
            loader = torch.utils.data.DataLoader(stream, config.batch, sampler=range(2 * count * config.batch), num_workers=workers,
                                                 pin_memory=device.type == "cuda", worker_init_fn=machine.outlive_signals)
            times = [time.perf_counter() for _ in loader]  # of the first half, the processes start and fill their queues
            rows.append(dict(workers=workers, images_per_s=count * config.batch / (times[-1] - times[count - 1])))
    return rows


def evaluation_table(device, sizes):
    """Seconds for an image, whole and by windows, at the sizes of Cityscapes and of Mapillary."""
    rows = []
    for name, size in itertools.product(sizes["few"], sizes["pictures"]):
        module, config, _ = bench.network(name, "erm", device, **sizes["flags"])
        before = bench.allocated(device)
        score, image = evaluate.make_scorer(module.eval(), config), torch.randn(3, *size, device=device)
        for slide in (0, sizes["window"]):
            once = functools.partial(evaluate.predict, score, image, size, slide=slide)
            row = dict(clip=name, image=f"{size[0]} x {size[1]}", windows=slide or "whole", s=None, peak_gib=None)
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                row.update(peak_gib=bench.peak(once, device) - before, s=bench.interleaved({"": once}, 2, device)[""])
            rows.append(row)
    return rows


TABLES = dict(step=step_table, part=part_table, loader=loader_table, evaluation=evaluation_table)


def show(title, rows):
    """A list of dicts with the same keys as a table."""
    print(f"\n{title}")
    cells = [[*rows[0]]] + [["-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def hours(tables):
    """The last line: how long the recipes take, by the step and by the loader."""
    own = {(row["clip"], row["method"]): row["ms"] / 3.6e6 * REAL.steps for row in tables["step"]}
    fastest = max(tables["loader"], key=lambda row: row["images_per_s"])
    return (f"hours for {REAL.steps} steps, baseline and method: "
            + ", ".join(f"{name} {own[name, 'erm']:.1f} and {own[name, 'ppar']:.1f}" for name in dict.fromkeys(n for n, _ in own))
            + f"; no less than {REAL.steps * REAL.batch / fastest['images_per_s'] / 3600:.1f} with {fastest['workers']} loader processes")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="runs/gpu", help="folder for gpu.json (default: runs/gpu)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one; cpu: all in miniature")
    given = parser.parse_args(arguments)
    with checkpoint.one_sentence(given.out):
        device = machine.choose_device(given.device)
        Path(given.out).mkdir(parents=True, exist_ok=True)
    sizes, began = SMALL if device.type == "cpu" else FULL, time.perf_counter()
    report = dict(checkpoint.describe(train.configure(dict(device=str(device)))), checks={}, tables={})
    print(f"{report['device']}, torch {report['versions']['torch']}, CUDA {report['cuda']}, {machine.CORES} cores")
    for name, check in CHECKS.items():
        silence, passed = io.StringIO(), False
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            try:
                said, passed = check(device, Path(folder), sizes), True
            except (Exception, SystemExit) as error:
                said = f"{type(error).__name__}: {str(error)[-600:]}"
        report["checks"][name] = dict(passed=passed, said=said)
        print(f"{'PASS' if passed else 'FAIL'} {name}: {check.__doc__} {said}", flush=True)
    for name, table in TABLES.items():
        report["tables"][name] = table(device, sizes)
        show(table.__doc__, report["tables"][name])
    report.update(hours=hours(report["tables"]), seconds=round(time.perf_counter() - began))
    checkpoint.write_json(Path(given.out) / "gpu.json", report)
    print(f"\n{report['seconds']} s; {given.out}/gpu.json\n{report['hours']}")
    return 0 if all(check["passed"] for check in report["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
