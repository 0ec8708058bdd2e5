"""bench.py: what all timings share, and the speed and memory on a CPU that results/README.md states. On a GPU: tests/gpu.py.

    python tests/bench.py                    three minutes on two cores, more on slow ones

Times are medians of interleaved repetitions (A B A B ...), so that a machine that slows down slows both; what is worth
quoting is the ratio. Weights are random, of the shapes of OpenAI's CLIPs: speed does not depend on their values.
"""

import copy
import io
import os
import re
import statistics
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
import model
import ppar
import train
import workbench
from conftest import official_palette

CPU = torch.device("cpu")
TOWERS = {
    "RN50": lambda: model.ModifiedResNet((3, 4, 6, 3), 1024, 32, 224, 64),
    "RN101": lambda: model.ModifiedResNet((3, 4, 23, 3), 512, 32, 224, 64),
    "ViT-B/16": lambda: model.VisionTransformer(224, 16, 768, 12, 12, 512),
    "ViT-L/14": lambda: model.VisionTransformer(224, 14, 1024, 24, 16, 768),
    "small ResNet": lambda: model.ModifiedResNet((1, 1, 1, 1), 64, 8, 64, 16),
    "small ViT": lambda: model.VisionTransformer(64, 16, 64, 2, 1, 64),
}


def timed(function, device=CPU):
    """Seconds of a call; on a GPU by its own clock, which runs from the first kernel to the end of the last."""
    if device.type == "cpu":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    function()
    ended.record()
    torch.cuda.synchronize(device)
    return began.elapsed_time(ended) / 1000


def interleaved(functions, repeats, device=CPU):
    """{name: function} -> {name: median seconds}; one unmeasured round first."""
    rounds = [{name: timed(function, device) for name, function in functions.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(one[name] for one in rounds[1:]) for name in functions}


def allocated(device, key="VmRSS"):
    """GiB in use now, of a GPU or of this process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2 ** 30
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 20


def peak(function, device):
    """GiB in use at most during a call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    function()
    return allocated(device, "VmHWM")


def network(name, method, device=CPU, **flags):
    """(PPAR on random weights of this CLIP's shape, Config, one training step as a function, past the ramp: all terms on)."""
    config = train.configure(dict(source=("gta5",), method=method, clip=name, steps=100, **flags))
    torch.manual_seed(0)
    net = model.SegmentationNet(TOWERS[name](), stride=config.stride)
    original = None if method == "erm" else copy.deepcopy(net.encoder).requires_grad_(False)  # which Eq. 2 asks
    net.encoder.freeze(config.freeze)
    module = ppar.PPAR(net, workbench.unit_rows(19, net.encoder.dim), original, config.tau_assign, config.beta).train()
    _, autocast, layout = checkpoint.precision(config.amp, device)
    module.to(device, memory_format=layout)
    image, label = random_batch(config, device)
    image, optimizer = image.contiguous(memory_format=layout), train.make_optimizer(module, config)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6

    def step():
        optimizer.zero_grad(set_to_none=True)
        terms, _ = workbench.backward(module, image, label, config, 50, autocast)
        optimizer.step()
        return sum(terms.values())  # still on the device: nobody waits for it

    return module, config, step


def random_batch(config, device=CPU):
    """Images of noise, and labels in blocks, as in a street there are more surfaces than borders."""
    image = torch.randn(config.batch, 3, config.crop, config.crop)
    cells = -(-config.crop // 32)
    label = torch.randint(0, len(data.CLASSES), (config.batch, cells, cells)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    return image.to(device), label[:, :config.crop, :config.crop].to(device)


def gta5_sized(folder, pairs=4):
    """GTA5-sized pairs in GTA5's layout: smooth shapes with noise, so that the PNG compresses as a rendered frame does."""
    rng = np.random.default_rng(0)
    for sub in ("images", "labels"):
        os.makedirs(Path(folder) / "gta5" / sub, exist_ok=True)
    for i in range(pairs):
        coarse = Image.fromarray(rng.integers(0, 255, (33, 60, 3), dtype=np.uint8)).resize((1914, 1052), Image.BICUBIC)
        image = np.clip(np.asarray(coarse, np.int16) + rng.integers(-4, 5, (1052, 1914, 3)), 0, 255).astype(np.uint8)
        ids = np.array([7, 8, 11, 21, 23, 24, 26], np.uint8)[rng.integers(0, 7, (33, 60))]
        label = Image.fromarray(ids).resize((1914, 1052), Image.NEAREST)
        label.putpalette(official_palette("gta5"))
        Image.fromarray(image).save(Path(folder) / "gta5" / "images" / f"{i + 1:05d}.png")
        label.save(Path(folder) / "gta5" / "labels" / f"{i + 1:05d}.png")
    return data.list_items("gta5", folder, "train")


def bench_item():
    with tempfile.TemporaryDirectory() as folder:
        items = gta5_sized(folder, 1)
        stream = data.TrainingStream([items], 512, seed=0)
        content = Path(items[0].image).read_bytes()
        count = iter(range(10 ** 6))
        times = interleaved({"item": lambda: stream[next(count)], "decode": lambda: Image.open(io.BytesIO(content)).load()}, 30)
    print(f"training item of a 1914 x 1052 PNG: {1000 * times['item']:.0f} ms, {times['item'] / times['decode']:.2f} times "
          f"decoding its image alone")


if __name__ == "__main__":
    import gpu  # whose tables these are, at sizes for a CPU

    bench_item()
    sizes = dict(towers=("RN50",), few=("RN50",), repeats=5, together=1, workers=(1, 2), pictures=((1024, 2048),), window=512)
    for amp in ("fp32", "bf16"):
        sizes["flags"] = dict(crop=512, batch=2, amp=amp)
        gpu.show(f"{gpu.step_table.__doc__} Here {amp}, batch 2.", gpu.step_table(CPU, sizes))
    for table in (gpu.part_table, gpu.loader_table, gpu.evaluation_table):
        gpu.show(table.__doc__, table(CPU, sizes))
