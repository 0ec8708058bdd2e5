"""bench.py: what all timings share, and the speed and memory on a CPU that results/README.md states. On a GPU: tests/gpu.py.

    python tests/bench.py                    four minutes on two cores, more on slow ones
    python tests/bench.py --loader           its first minute: training samples by the storage of the files

Times are medians of interleaved repetitions (A B A B ...), so that a machine that slows down slows both; what is worth
quoting is the ratio. Weights are random, of the shapes of OpenAI's CLIPs: speed does not depend on their values.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
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


def reserved(device):
    """GiB that torch's allocator took from a GPU at most, since its statistics were reset; None on a CPU.

    It is what nvidia-smi shows, but for the half GiB of CUDA itself. It is more than what is in use: the
    allocator keeps what was freed. A GPU is large enough if this fits.
    """
    return torch.cuda.max_memory_reserved(device) / 2 ** 30 if device.type == "cuda" else None


def forget(device):
    """Give back what the allocator keeps, and reset its statistics: what was measured before does not count."""
    if device.type == "cuda":
        gc.collect()  # a network may lie in a cycle of references, and would be counted until Python looks for cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def random_ppar(name, config):
    """PPAR on the CPU as train.build makes it, but with random weights of this CLIP's shapes: no file is needed."""
    torch.manual_seed(config.seed)
    net = model.SegmentationNet(TOWERS[name](), stride=config.stride)
    # The copy of CLIP's image tower that Eq. 2 and Eq. 5 ask; the baseline has none.
    original = None if config.method == "erm" else copy.deepcopy(net.encoder).requires_grad_(False)
    net.encoder.freeze(config.freeze)
    otp = workbench.unit_rows(len(data.CLASSES), net.encoder.dim)
    return ppar.PPAR(net, otp, original, config.tau_assign, config.beta, config.mask_padding)


def network(name, method, device=CPU, **flags):
    """(PPAR on random weights of this CLIP's shape, Config, one training step as a function).

    The step is one past the ramp: all terms of the loss are on. With `compile=True` the network is compiled.
    """
    config = train.configure(dict(source=("gta5",), method=method, clip=name, steps=100, **flags))
    module = random_ppar(name, config).train()
    _, autocast, layout = checkpoint.precision(config.amp, device)
    module.to(device, memory_format=layout)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as in training (train.setup_processes); make_scorer ends it
    image, label = random_batch(config, device)
    image, optimizer = image.contiguous(memory_format=layout), train.make_optimizer(module, config)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6  # the weights hardly move: every repetition measures the same
    trained = torch.compile(module) if config.compile else module

    def step():
        optimizer.zero_grad(set_to_none=True)
        terms, _ = workbench.backward(trained, image, label, config, 50, autocast)
        optimizer.step()
        return sum(terms.values())  # still on the device: nobody waits for it

    return module, config, step


def random_batch(config, device=CPU):
    """Images of noise, and labels in blocks, as in a street there are more surfaces than borders."""
    image = torch.randn(config.batch, 3, config.crop, config.crop)
    cells = -(-config.crop // 32)
    label = torch.randint(0, len(data.CLASSES), (config.batch, cells, cells)).repeat_interleave(32, 1).repeat_interleave(32, 2)
    return image.to(device), label[:, :config.crop, :config.crop].to(device)


def frame(rng, width, height, ids):
    """(picture, label) as arrays: smooth shapes with noise, so that its PNG is as large as a rendered frame's.

    The label has blocks of 32 pixels, of the raw ids that are given.
    """
    cells = height // 32 + 1, width // 32 + 1
    colours = Image.fromarray(rng.integers(0, 255, (*cells, 3), dtype=np.uint8))
    coarse = colours.resize((width, height), Image.BICUBIC)
    noise = rng.integers(-4, 5, (height, width, 3), dtype=np.int16)
    image = np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8)
    blocks = np.array(ids, np.uint8)[rng.integers(0, len(ids), cells)]
    return image, np.asarray(Image.fromarray(blocks).resize((width, height), Image.NEAREST))


def gta5_sized(folder, pairs=4):
    """GTA5-sized pairs in GTA5's layout; labels in P mode, with a palette, as GTA5's are."""
    rng = np.random.default_rng(0)
    for sub in ("images", "labels"):
        os.makedirs(Path(folder) / "gta5" / sub, exist_ok=True)
    for i in range(pairs):
        image, ids = frame(rng, 1914, 1052, (7, 8, 11, 21, 23, 24, 26))
        label = Image.fromarray(ids)
        label.putpalette(official_palette("gta5"))
        Image.fromarray(image).save(Path(folder) / "gta5" / "images" / f"{i + 1:05d}.png")
        label.save(Path(folder) / "gta5" / "labels" / f"{i + 1:05d}.png")
    return data.list_items("gta5", folder, "train")


def targets_sized(folder, pairs, cityscapes=(1024, 2048), mapillary=(3024, 4032)):
    """{data set: validation pairs} of Cityscapes (PNG) and Mapillary (JPEG), in their layouts and sizes (h, w)."""
    rng, folder = np.random.default_rng(0), Path(folder)
    places = {"cityscapes": ("leftImg8bit/val/city", "gtFine/val/city"),
              "mapillary": ("validation/images", "validation/labels")}
    for name, subs in places.items():
        for sub in subs:
            os.makedirs(folder / name / sub, exist_ok=True)
    for i in range(pairs):
        image, ids = frame(rng, *reversed(cityscapes), (7, 8, 11, 21, 23, 24, 26))
        Image.fromarray(image).save(folder / f"cityscapes/leftImg8bit/val/city/city_{i:06d}_000000_leftImg8bit.png")
        Image.fromarray(ids).save(folder / f"cityscapes/gtFine/val/city/city_{i:06d}_000000_gtFine_labelIds.png")
        image, ids = frame(rng, *reversed(mapillary), (13, 15, 17, 30, 27, 19, 55))
        Image.fromarray(image).save(folder / f"mapillary/validation/images/{i:04d}.jpg")
        Image.fromarray(ids).save(folder / f"mapillary/validation/labels/{i:04d}.png")
    return {name: data.list_items(name, str(folder), "val") for name in places}


# What a picture file could be stored as: Pillow's format and its options. All but the first are made from it.
STORAGES = {
    "PNG, as downloaded": None,
    "PNG, level 1": ("png", dict(compress_level=1)),
    "PNG, level 0": ("png", dict(compress_level=0)),  # "uncompressed", yet filtered and check-summed
    "BMP": ("bmp", {}),
    "TIFF": ("tiff", {}),
    "PPM (--unpack)": None,  # written by data.unpack itself, labels included
}
# Data sets whose files differ in size and kind: (picture size, ending). Their content is gta5_sized's, enlarged.
SIZES = {"cityscapes": ((2048, 1024), "png"), "bdd": ((1280, 720), "jpg"), "mapillary": ((4032, 3024), "jpg")}


def stored(folder, items):
    """{storage: (the items stored so, MB a pair)} of the same pairs, written below `folder`."""
    answer = {}
    for number, (name, way) in enumerate(STORAGES.items()):
        own = items
        if name.startswith("PPM"):
            own = unpacked("gta5", folder, Path(folder) / "unpacked")
        elif way:
            kind, options = way
            place = Path(folder) / f"storage{number}"
            place.mkdir()
            own = [dataclasses.replace(item, image=str(place / f"{Path(item.image).stem}.{kind}")) for item in items]
            for old, new in zip(items, own):
                Image.open(old.image).save(new.image, kind, **options)
        answer[name] = own, megabytes(own)
    return answer


def unpacked(name, root, into):
    """The training pairs of a data set after `python data.py --unpack`, whose words are kept from the tables."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        data.unpack([name], str(root), str(into))
    return data.list_items(name, str(into), "train")


def megabytes(items):
    """MB of a pair: its picture and its label."""
    return sum(os.path.getsize(path) for item in items for path in (item.image, item.label)) / len(items) / 1e6


def sample_times(lists, crop, repeats):
    """{name: items} -> {name: median seconds of a core for a training sample}; all take the samples 0, 1, 2, ...

    Interleaved, and by the clock of the thread, which stands still while other programs have the core: a sample is
    made by one thread.
    """
    streams = {name: data.TrainingStream([items], crop, seed=0) for name, items in lists.items()}
    seconds = {name: [] for name in lists}
    for number in range(repeats + 1):
        for name, stream in streams.items():
            began = time.thread_time()
            stream[number]
            seconds[name].append(time.thread_time() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def per_second(items, crop, workers, samples):
    """Training samples a second that so many loader processes give, when they have started and filled their queues."""
    stream = data.TrainingStream([items], crop, seed=0)
    loader = torch.utils.data.DataLoader(stream, batch_size=2, sampler=range(2 * samples), num_workers=workers)
    times = [time.perf_counter() for _ in loader]
    half = len(times) // 2
    return 2 * (len(times) - half) / (times[-1] - times[half - 1])


def storage_table(workers=(1, 2), repeats=20, samples=24):
    """A training sample (crop 512) of GTA5-sized pairs by the storage of its files; ms of one core."""
    with tempfile.TemporaryDirectory() as folder:
        lists = stored(folder, gta5_sized(folder, 2))
        seconds = sample_times({name: items for name, (items, _) in lists.items()}, 512, repeats)
        first = seconds["PNG, as downloaded"]
        return [dict(storage=name, mb=size, ms=1000 * seconds[name], ratio=seconds[name] / first,
                     **{f"images_per_s_{n}_workers": per_second(items, 512, n, samples * n) for n in workers})
                for name, (items, size) in lists.items()]


def unpack_table(repeats=10):
    """A training sample (crop 512) of files as large as other data sets', before and after --unpack; ms of one core."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model_pair = gta5_sized(folder, 1)[0]
        for name, (size, ending) in SIZES.items():
            items = enlarged(model_pair, name, Path(folder) / "downloaded", size, ending)
            after = unpacked(name, Path(folder) / "downloaded", Path(folder) / "unpacked")
            lists = {"before": items, "after": after}
            seconds = sample_times(lists, 512, repeats)
            rows.append(dict(like=f"{name}: {size[0]} x {size[1]} {ending}",
                             mb_before=megabytes(items), mb_after=megabytes(lists["after"]),
                             ms_before=1000 * seconds["before"], ms_after=1000 * seconds["after"],
                             ratio=seconds["after"] / seconds["before"]))
    return rows


def enlarged(pair, name, root, size, ending):
    """One pair of another data set, in its layout, with this pair's content at another size -> its items."""
    image, label = {
        "cityscapes": ("leftImg8bit/train/a/a_leftImg8bit", "gtFine/train/a/a_gtFine_labelIds.png"),
        "bdd": ("images/10k/train/a", "labels/sem_seg/masks/train/a.png"),
        "mapillary": ("training/images/a", "training/labels/a.png")}[name]
    paths = [root / data.DATASETS[name].folder / path for path in (f"{image}.{ending}", label)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(pair.image).resize(size, Image.BICUBIC).save(paths[0])
    ids = np.asarray(Image.open(pair.label).resize(size, Image.NEAREST)) % 19  # ids that every table knows
    Image.fromarray(ids).save(paths[1])
    return data.list_items(name, str(root), "train")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--loader", action="store_true",
                        help="only what the loader gives by the storage of the files")
    only_loader = parser.parse_args().loader

    import gpu  # whose tables these are, at sizes for a CPU

    for table in (storage_table, unpack_table):
        gpu.show(table.__doc__, table())
    if only_loader:
        sys.exit()
    sizes = dict(towers=("RN50",), few=("RN50",), repeats=5, together=1, workers=(1, 2), pictures=((1024, 2048),), window=512)
    for amp in ("fp32", "bf16"):
        sizes["flags"] = dict(crop=512, batch=2, amp=amp)
        gpu.show(f"{gpu.step_table.__doc__} Here {amp}, batch 2.", gpu.step_table(CPU, sizes))
    for table in (gpu.part_table, gpu.loader_table, gpu.evaluation_table):
        gpu.show(table.__doc__, table(CPU, sizes))
