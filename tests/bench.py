"""bench.py: the speed and memory that the README's table states, printed by one command.

    python tests/bench.py                    all of it, about ten minutes on two cores
    python tests/bench.py step item          some of it: help count item step loader memory linear

Times are medians of interleaved repetitions (A B A B ...), so that a machine that slows down slows both; what is worth
quoting is the ratio. Nothing here is a test: a busy machine must not fail a build. Weights are random, of CLIP RN50's shape:
speed does not depend on their values.
"""

import argparse
import contextlib
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from clip.model import ModifiedResNet
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import ppar  # noqa: E402
import prototypes  # noqa: E402
import train  # noqa: E402

PARTS = ("help", "count", "item", "step", "loader", "memory", "linear")


def interleaved(functions, repeats):
    """{name: function} -> {name: median seconds}; one unmeasured round first."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def rn50(method, amp="fp32", crop=512, batch=2):
    """(PPAR on random RN50 weights, Config, one training step as a function, past the ramp: all terms on)."""
    config = train.configure(dict(source=("gta5",), method=method, amp=amp, crop=crop, batch=batch, steps=100))
    torch.manual_seed(0)
    net = model.SegmentationNet(ModifiedResNet((3, 4, 6, 3), 1024, 32, 224, 64))
    net.encoder.freeze(config.freeze)
    vtp = prototypes.VisualTextPrototypes(1024, 2 * net.arch["width"]) if config.w_vtp else None
    module = ppar.PPAR(net, prototypes.random_prototypes(19, 1024), vtp).train()
    bf16, autocast = checkpoint.precision(config.amp, torch.device("cpu"))
    layout = torch.channels_last if bf16 else torch.contiguous_format
    image = torch.randn(batch, 3, crop, crop).contiguous(memory_format=layout)
    label = torch.randint(0, len(data.CLASSES), (batch, crop // 32, crop // 32))
    label = label.repeat_interleave(32, 1).repeat_interleave(32, 2)
    return module, config, a_step(module.to(memory_format=layout), config, image, label, autocast)


def a_step(module, config, image, label, autocast=contextlib.nullcontext):
    """One training step as a function, without its data and its schedule."""
    optimizer = train.make_optimizer(module, config)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6

    def step():
        optimizer.zero_grad(set_to_none=True)
        row, _ = train.backward(module, image, label, config, 50, autocast)
        optimizer.step()
        return row["loss"]

    return step


def bench_help():
    for name in ("train.py", "evaluate.py"):
        command = [sys.executable, str(ROOT / name), "--help"]
        times = interleaved({name: lambda command=command: subprocess.run(command, check=True, capture_output=True)}, 5)
        print(f"{name} --help: {times[name]:.2f} s")


def bench_count():
    rng = np.random.default_rng(0)
    label = rng.choice([*range(19), data.VOID], (1024, 2048)).astype(np.uint8)
    pred = rng.integers(0, 19, (1024, 2048)).astype(np.uint8)
    p, t = torch.from_numpy(pred).long(), torch.from_numpy(label).long()

    def masked():
        keep = t != data.VOID
        return torch.bincount(19 * t[keep] + p[keep], minlength=361).view(19, 19)

    assert torch.equal(masked(), evaluate.confusion_matrix(pred, label, 19))
    times = interleaved({"ours": lambda: evaluate.confusion_matrix(pred, label, 19), "masked": masked}, 11)
    print(f"confusion matrix of 2 megapixels: {1000 * times['ours']:.1f} ms; masked torch.bincount takes "
          f"{times['masked'] / times['ours']:.1f} times as long")


def gta5_sized(folder, pairs):
    """Items of GTA5's size and layout: smooth shapes with noise, so that the PNG compresses as a rendered frame does."""
    rng, size = np.random.default_rng(0), (1914, 1052)
    for i in range(pairs):
        coarse = Image.fromarray(rng.integers(0, 255, (33, 60, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        image = np.clip(np.asarray(coarse, np.int16) + rng.integers(-4, 5, (1052, 1914, 3)), 0, 255).astype(np.uint8)
        label = Image.fromarray(rng.choice([7, 8, 11, 21, 23, 24, 26], (33, 60)).astype(np.uint8)).resize(size, Image.NEAREST)
        label.putpalette(bytes(range(256)) * 3)
        for sub, picture in (("images", Image.fromarray(image)), ("labels", label)):
            os.makedirs(f"{folder}/gta5/{sub}", exist_ok=True)
            picture.save(f"{folder}/gta5/{sub}/{i + 1:05d}.png")
    return data.list_items("gta5", folder, "train")


def bench_item():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        items = gta5_sized(folder, 1)
        stream, count = data.TrainingStream([items], 512, seed=0), iter(range(10 ** 6))
        content = Path(items[0].image).read_bytes()
        times = interleaved({"item": lambda: stream[next(count)], "decode": lambda: Image.open(io.BytesIO(content)).load()}, 30)
    torch.set_num_threads(os.cpu_count())
    print(f"training item of a 1914 x 1052 PNG: {1000 * times['item']:.0f} ms, {times['item'] / times['decode']:.2f} times "
          f"decoding its image alone")


def bench_step():
    steps = {name: rn50(*flags)[2] for name, flags in
             {"erm": ("erm",), "full": ("ppar",), "erm bf16": ("erm", "bf16"), "full bf16": ("ppar", "bf16")}.items()}
    losses = {name: step() for name, step in steps.items()}
    times = interleaved(steps, 5)
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
        wait_for_data(f"RN50, crop {config.crop}, batch {config.batch}, bf16", gta5_sized(folder, 4), config, step, 12)
    config = train.configure(dict(method="erm"))  # of `python train.py`, again the faster of the two
    image, label = torch.randn(8, 3, config.crop, config.crop), torch.randint(0, 18, (8, config.crop, config.crop))
    step = a_step(ppar.build(config)[0].train(), config, image, label)
    items = data.list_items("toy-gta5", None, "train")  # 45 steps: within the first epoch, when every scene has still to be drawn
    wait_for_data(f"drawn world, batch {config.batch}", items, config, step, 45)


def wait_for_data(name, items, config, step, steps):
    """Print how long `steps` steps wait for the batches of these items, and how long they take with that."""
    workers, stream = os.cpu_count(), data.TrainingStream([items], config.crop, seed=0)
    loader = torch.utils.data.DataLoader(stream, batch_size=config.batch, sampler=range(config.batch * (steps + 1)),
                                         num_workers=workers, worker_init_fn=checkpoint.outlive_signals)
    batches, waits = iter(loader), []
    next(batches)  # the first one waits for the processes to start
    began = time.perf_counter()
    step()
    for _ in range(steps):
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        step()
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

    def predict():
        evaluate.predict(evaluate.make_scorer(module, config), torch.randn(3, 1024, 2048), (1024, 2048))

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, and what a parent process handed down
    before = resident("VmRSS")
    for _ in range(2):
        predict() if what.startswith("evaluate") else step()
    print(f"{resident('VmHWM') - before:.0f} MiB above weights and imports")


def resident(key):
    """MiB of this process's memory: VmRSS now, VmHWM at its peak (Linux)."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def bench_linear():
    """Seconds of the same command at three lengths, and at three numbers of scenes to score: linear if the slopes agree."""
    code = "import data, train; data.TOY_SCENES['val'] = {}; " \
           "train.main(train.parse('--targets toy-fog --steps {} --out {}'.split()))"
    for key, values in (("steps", (10, 40, 100)), ("images", (10, 70, 190))):
        seconds = []
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                scenes, steps = (1, value) if key == "steps" else (value, 1)
                began = time.perf_counter()
                subprocess.run([sys.executable, "-c", code.format(scenes, steps, folder)], check=True, capture_output=True, cwd=ROOT)
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
