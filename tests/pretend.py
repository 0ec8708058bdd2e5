"""pretend.py: does a training step mix devices, or wait for the GPU? Known without a GPU.

A GPU works on its own, and Python runs ahead of it. Two mistakes cost a day on a machine with a GPU:

    a mix of devices     an operation gets one tensor on the GPU and one on the host. On a GPU this is an error.
    a synchronisation    an operation brings a value from the GPU to the host, as `.item()` does. Python waits
                         until the GPU has done all of its work. Then the GPU waits for Python.

torch has a device without any numbers, "meta". A tensor on it has a shape and a type, and no memory. So it
can stand for a GPU. The real loop of train.py runs on it, and a spy looks at each operation, forward and
backward.

What this cannot see: kernels of CUDA, autocast to bfloat16 (meta has none), pinned memory, the fused
optimiser (it is left out), NCCL, and a list as an index, `x[[0, 1]]`. tests/gpu.py checks these where there
is a GPU.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import bench
import checkpoint
import data
import machine
import train

DEVICE = torch.device("meta")
# Operations whose result is a number, or has a size that depends on the values. The host must wait for them.
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}


class Spy(TorchDispatchMode):
    """Counts in `found`: {(phase, "sync NAME" or "mix NAME"): times}. The caller sets the phase.

    Every operation of torch passes here, those of autograd's backward as well. The pretended device has no
    numbers. Who asks for one gets 1, or 0 for an integer: so the loop goes on, and its checks for finite
    values hold.
    """

    def __init__(self):
        super().__init__()
        self.phase = "before the first step"
        self.found = Counter()
        self.seen = (
            Counter()
        )  # operations on the pretended device in each phase: 0 would mean that nothing was looked at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        goal = kwargs.get("device")
        if name in ("_to_copy", "copy_") and (goal is not None or len(devices) == 2):
            return self._copy(name, function, args, kwargs)
        if DEVICE.type not in devices:
            return function(*args, **kwargs)
        self.seen[self.phase] += 1
        # x[mask] is a `nonzero` of the mask on a GPU, and has as many rows as the mask has ones.
        masked = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        if name in WAITING or masked:
            self.note(f"sync {name}")
            return _answer(name, function, args, kwargs)
        if len(devices) > 1:
            # torch allows a single number on the host in sums and products. This project has none: each one
            # counts.
            self.note(f"mix {name}")
            args, kwargs = tree_map_only(
                torch.Tensor, lambda x: x.to(DEVICE, non_blocking=True), (args, kwargs)
            )
        return function(*args, **kwargs)

    def note(self, what):
        self.found[self.phase, what] += 1

    def _copy(self, name, function, args, kwargs):
        """A copy between host and device.

        To the device, it goes on by itself if it is told so (`non_blocking`).
        """
        source = args[1] if name == "copy_" else args[0]
        to = args[0].device if name == "copy_" else torch.device(kwargs["device"])
        if source.device.type == to.type:
            return function(*args, **kwargs)
        self.seen[self.phase] += 1
        by_itself = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if to.type != DEVICE.type:
            self.note(
                "sync copy to the host"
            )  # with non_blocking, too: the host would read what is not there yet
        elif not by_itself:
            self.note("sync copy to the device")
        if to.type == DEVICE.type:
            return function(*args, **kwargs)
        ones = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return args[0].copy_(ones) if name == "copy_" else ones


def _answer(name, function, args, kwargs):
    """What the operation gives for tensors of ones on the host, brought back to the pretended device."""
    if name == "_local_scalar_dense" and args[0].dtype == torch.int64:
        return 0  # the loop asks how many signals came: none
    args, kwargs = tree_map_only(
        torch.Tensor, lambda x: torch.ones(x.shape, dtype=x.dtype), (args, kwargs)
    )
    return tree_map_only(
        torch.Tensor, lambda x: x.to(DEVICE, non_blocking=True), function(*args, **kwargs)
    )


class Constants(TorchFunctionMode):
    """Tells the spy of `torch.tensor([1.0], device=...)`.

    On a GPU this is a copy; on "meta" torch makes none.
    """

    def __init__(self, spy):
        super().__init__()
        self.spy = spy

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        made = name in ("tensor", "as_tensor", "new_tensor") and result.device.type == DEVICE.type
        if made and not (
            name == "as_tensor" and isinstance(args[0], torch.Tensor)
        ):  # that one makes nothing
            self.spy.note(f"sync {name}")
        return result


class Samples:
    """In the place of data.TrainingStream: empty crops. The shapes are what counts here."""

    def __init__(self, sources, crop, *args):
        self.sources, self.crop = sources, crop

    def __getitem__(self, number):
        return (
            torch.zeros(3, self.crop, self.crop, dtype=torch.uint8),
            torch.zeros(self.crop, self.crop, dtype=torch.uint8),
        )


def rehearse(tower, folder, **flags):
    """train.train on the pretended device for three steps -> the Spy, whose phases are the steps 0, 1, 2.

    tower   a name of bench.TOWERS; its weights are random
    flags   of train.py, as fields of Config
    The first step and the last, which is logged, may synchronise. The one between them may not.
    """
    spy = Spy()
    preset = dict(
        source=("toy-gta5",),
        targets=(),
        clip=tower,
        stride=16,
        steps=3,
        batch=4,
        crop=64,
        workers=0,
        ramp=(0, 1),
        align_ramp=(0, 1),
        amp="fp32",
    )
    config = train.configure(preset | dict(out=str(folder), figures=False) | flags)
    rate, adam, cast = train.learning_rate, torch.optim.AdamW, torch.autocast

    def begin(step, steps):  # the loop asks for it once in each step
        spy.phase = step
        return rate(step, steps)

    def precision(amp, device):  # torch has no autocast for this device
        return "fp32", contextlib.nullcontext, torch.channels_last

    def autocast(kind, *args, **kwargs):  # nor one that could be switched off
        return contextlib.nullcontext() if kind == DEVICE.type else cast(kind, *args, **kwargs)

    def optimiser(
        groups, **more
    ):  # torch has no fused one for this device; any other one says nothing of it
        optimizer = adam(groups, **more | dict(fused=False))
        optimizer.step = lambda: None
        return optimizer

    replaced = [
        (train, "build", lambda config: (bench.random_ppar(tower, config), "random weights")),
        (data, "TrainingStream", Samples),
        (checkpoint, "precision", precision),
        (machine, "precision", precision),
        (torch, "autocast", autocast),
        (torch.optim, "AdamW", optimiser),
        (checkpoint, "save", lambda *args, **kwargs: None),
        (train, "learning_rate", begin),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, new in replaced:
            stack.enter_context(mock.patch.object(where, name, new))
        stack.enter_context(spy)
        stack.enter_context(Constants(spy))
        train.train(config, None, 0, 1, DEVICE)
    return spy
