"""bench.py: the speed and memory that results/README.md states, printed by one command.

    python tests/bench.py                    all of it, about ten minutes on two cores
    python tests/bench.py step item          some of it: help item step loader memory linear

Times are medians of interleaved repetitions (A B A B ...), so that a machine that slows down slows both; what is worth
quoting is the ratio. Nothing here is a test: a busy machine must not fail a build. Weights are random, of CLIP RN50's shape:
speed does not depend on their values.
"""

import argparse
import contextlib
import copy
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image

import checkpoint
import data
import evaluate
import model
import ppar
import prototypes
import train

PARTS = ("help", "item", "step", "loader", "memory", "linear")


def interleaved(functions, repeats):
    """{name: function} -> {name: median seconds}; one unmeasured round first."""
    times = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if round_:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def rn50(method, amp="fp32", crop=512, batch=2):
    """(PPAR on random RN50 weights, Config, one training step as a function, past the ramp: all terms on)."""
    config = train.configure(dict(source=("gta5",), method=method, amp=amp, crop=crop, batch=batch, steps=100))
    torch.manual_seed(0)
    net = model.SegmentationNet(model.ModifiedResNet((3, 4, 6, 3), 1024, 32, 224, 64))
    original = None if method == "erm" else copy.deepcopy(net.encoder).requires_grad_(False)  # which Eq. 2 asks
    net.encoder.freeze(config.freeze)
    module = ppar.PPAR(net, prototypes.random_prototypes(19, 1024), original).train()
    _, autocast, layout = checkpoint.precision(config.amp, torch.device("cpu"))
    image = torch.randn(batch, 3, crop, crop)
    label = torch.randint(0, len(data.CLASSES), (batch, crop // 32, crop // 32)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    module, image = module.to(memory_format=layout), image.contiguous(memory_format=layout)
    return module, config, a_step(module, config, image, label, autocast)


def a_step(module, config, image, label, autocast):
    """One training step as a function, without its data and its schedule."""
    optimizer = train.make_optimizer(module, config)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6

    def step():
        optimizer.zero_grad(set_to_none=True)
        terms, _, _ = train.backward(module, image, label, config, 50, autocast)
        optimizer.step()
        return sum(terms.values()).item()

    return step


def bench_help():
    times = interleaved({name: lambda name=name: subprocess.run([sys.executable, str(ROOT / name), "--help"], check=True,
                                                                capture_output=True) for name in ("train.py", "evaluate.py")}, 5)
    for name, seconds in times.items():
        print(f"{name} --help: {seconds:.2f} s")


def gta5_sized(folder, pairs=2):
    """GTA5-sized pairs in GTA5's layout: smooth shapes with noise, so that the PNG compresses as a rendered frame does."""
    rng = np.random.default_rng(0)
    for sub in ("images", "labels"):
        os.makedirs(Path(folder) / "gta5" / sub, exist_ok=True)
    for i in range(pairs):
        coarse = Image.fromarray(rng.integers(0, 255, (33, 60, 3), dtype=np.uint8)).resize((1914, 1052), Image.BICUBIC)
        image = np.clip(np.asarray(coarse, np.int16) + rng.integers(-4, 5, (1052, 1914, 3)), 0, 255).astype(np.uint8)
        ids = np.array([7, 8, 11, 21, 23, 24, 26], np.uint8)[rng.integers(0, 7, (33, 60))]
        label = Image.fromarray(ids).resize((1914, 1052), Image.NEAREST)
        label.putpalette(bytes(range(256)) * 3)
        Image.fromarray(image).save(Path(folder) / "gta5" / "images" / f"{i + 1:05d}.png")
        label.save(Path(folder) / "gta5" / "labels" / f"{i + 1:05d}.png")


def bench_item():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        gta5_sized(folder, 1)
        items = data.list_items("gta5", folder, "train")
        stream = data.TrainingStream([items], 512, seed=0)
        content = Path(items[0].image).read_bytes()
        count = iter(range(10 ** 6))
        times = interleaved({"item": lambda: stream[next(count)], "decode": lambda: Image.open(io.BytesIO(content)).load()}, 30)
    torch.set_num_threads(os.cpu_count())
    print(f"training item of a 1914 x 1052 PNG: {1000 * times['item']:.0f} ms, {times['item'] / times['decode']:.2f} times "
          f"decoding its image alone")


def bench_step(repeats=5):
    steps = {name: rn50(*flags)[2] for name, flags in
             {"erm": ("erm",), "full": ("ppar",), "erm bf16": ("erm", "bf16"), "full bf16": ("ppar", "bf16")}.items()}
    losses = {name: step() for name, step in steps.items()}
    times = interleaved(steps, repeats)
    print(f"training step, RN50, crop 512, batch 2, {torch.get_num_threads()} threads: "
          + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items()))
    print(f"full method / baseline: {times['full'] / times['erm']:.2f} in fp32, "
          f"{times['full bf16'] / times['erm bf16']:.2f} in bf16")
    print(f"bf16 with channels_last / fp32: baseline {times['erm bf16'] / times['erm']:.2f}, full "
          f"{times['full bf16'] / times['full']:.2f}; first loss differs by "
          f"{abs(losses['full bf16'] / losses['full'] - 1):.1e} of it")


def bench_loader():
    """The real loader feeding a step: how long the step stands still for want of a batch."""
    _, config, step = rn50("erm", "bf16")  # the fastest step, and the slowest items
    with tempfile.TemporaryDirectory() as folder:
        gta5_sized(folder, 4)
        wait_for_data(f"RN50, crop {config.crop}, batch {config.batch}, bf16", data.list_items("gta5", folder, "train"), config, step, 12)
    config = train.configure(dict(method="erm"))  # `python train.py`'s baseline, the faster of the two
    image, label = torch.randn(8, 3, config.crop, config.crop), torch.randint(0, 18, (8, config.crop, config.crop))
    step = a_step(ppar.build(config)[0].train(), config, image, label, contextlib.nullcontext)
    # 45 steps: within the first epoch, when every scene has still to be drawn
    wait_for_data(f"drawn world, batch {config.batch}", data.list_items("toy-gta5", None, "train"), config, step, 45)


def wait_for_data(name, items, config, step, steps):
    """Print how long `steps` steps wait for the batches of these items, and how long they take with that."""
    workers, stream = os.cpu_count(), data.TrainingStream([items], config.crop, seed=0)
    loader = torch.utils.data.DataLoader(stream, batch_size=config.batch, sampler=range(config.batch * (steps + 1)),
                                         num_workers=workers, worker_init_fn=checkpoint.outlive_signals)
    batches, waits = iter(loader), []
    next(batches)  # the first one waits for the processes to start
    began = time.perf_counter()
    for _ in range(steps):
        step()
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
    total = time.perf_counter() - began
    print(f"loader with {workers} processes, {name}: of {total / steps:.2f} s a step, "
          f"{1000 * statistics.median(waits):.1f} ms wait for data (most {1000 * max(waits):.0f} ms)")


def bench_memory():
    for what in ("erm", "ppar", "evaluate-erm", "evaluate-ppar"):
        done = subprocess.run([sys.executable, __file__, "--peak", what], check=True, capture_output=True, text=True)
        print(f"peak memory, {what}: {done.stdout.strip()}")


def peak(what):
    """In a process of its own: peak resident memory above what the imports and the weights take."""
    module, config, step = rn50(what.split("-")[-1])
    score = evaluate.make_scorer(module, config)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, and what a parent process handed down
    before = resident("VmRSS")
    for _ in range(2):
        if what.startswith("evaluate"):
            evaluate.predict(score, torch.randn(3, 1024, 2048), (1024, 2048))
        else:
            step()
    print(f"{resident('VmHWM') - before:.0f} MiB above weights and imports")


def resident(key):
    """MiB of this process's memory: VmRSS now, VmHWM at its peak (Linux)."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def bench_linear():
    """Seconds of the same command at three lengths, and at three numbers of scenes to score: linear if the slopes agree."""
    for key, values in (("steps", (10, 40, 100)), ("images", (10, 70, 190))):
        seconds = []
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                code = f"import data, train; data.TOY_SCENES['val'] = {value if key == 'images' else 1}; train.main(train.parse(" \
                       f"['--targets', 'toy-fog', '--steps', '{value if key == 'steps' else 1}', '--out', '{folder}/run']))"
                began = time.perf_counter()
                subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
                seconds.append(time.perf_counter() - began)
        each = [(seconds[k + 1] - seconds[k]) / (values[k + 1] - values[k]) for k in (0, 1)]
        print(f"{key}: {', '.join(f'{v} in {s:.1f} s' for v, s in zip(values, seconds))}; each more "
              f"{each[0]:.3f} s, then {each[1]:.3f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if given.peak:
        peak(given.peak)
    else:
        for part in given.parts or PARTS:
            globals()[f"bench_{part}"]()
