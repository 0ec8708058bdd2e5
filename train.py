"""train.py: from labelled source images to a table of unseen targets.

    python train.py                                                              the drawn street world, minutes on a laptop
    python train.py --source gta5 --targets cityscapes bdd mapillary             the main job, on GPUs
    python train.py ... --method erm                                             the baseline: same network, every idea off
    torchrun --nproc_per_node 4 train.py ...                                     the same batch, split over four processes
    python train.py --resume runs/NAME                                           go on where it was stopped

Read ppar.py first: network and loss. Here is what a run needs around it: flags and presets, set-up, one step, the loop.

No target image is read before training has ended: only the names of the files are listed, to say early that a folder is
missing. The network that is evaluated is the last one, never the best one.

Not here: the loss (ppar.py), the files of a run (checkpoint.py), the score (evaluate.py).
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import data  # first of ours: it refuses a Python that is too old
from checkpoint import PROTOCOL, check_protocol  # these files import no torch
from data import UserError, require
from machine import LOADERS

# ------------------------------------------------------------------------------------------------------ configuration

POSITIVE = ("positive", lambda x: 0 < x < math.inf)
AT_LEAST_0 = ("at least 0", lambda x: 0 <= x < math.inf)
SHARE = ("in [0, 1]", lambda x: 0 <= x <= 1)
RAMP = ("two fractions of the run, at least 0, rising, at most 1", lambda x: len(x) == 2 and 0 <= x[0] < x[1] <= 1)


# What may differ between a run and its continuation. None changes a number, beyond rounding. (CLIP's weights are
# in the checkpoint. Its file is read for a figure alone, and must be the same one.)
MAY_CHANGE_ON_RESUME = {
    "device", "workers", "save_every", "data_root", "figures", "micro_batch", "compile", "clip", *PROTOCOL}


def flags(names):
    """Fields of Config as their flags, in one line."""
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))


def option(default, help, rule=None, choices=None):
    """A field of Config: default, help (with symbol and equation), the rule that its value must keep, its choices."""
    return field(default=default, metadata=dict(help=help, rule=rule, choices=choices))


@dataclass
class Config:
    """Every flag of a run, one line each. None means: by preset, real or toy (PRESETS below)."""
    # data
    source: tuple[str, ...] = option(("toy-gta5",), "labelled data sets to train on, mixed in equal parts")
    targets: tuple[str, ...] = option(None, "unseen data sets to evaluate on after the last step")
    data_root: str = option("data", "folder that holds one folder per data set")
    mapillary: str = option("A", "which 66-to-19 mapping Mapillary labels are read with", choices=("A", "B"))
    holdout: int = option(0, "pairs withheld from each data set that has no validation split, to be one", AT_LEAST_0)
    harmful: float = option(None, "share of drawn source scenes with wrong regions (toy sources only)", SHARE)
    # the method
    method: str = option("ppar", "ppar, or erm: L_seg with w = 1 alone, the baseline", choices=("ppar", "erm"))
    clip: str = option(None, "CLIP by name (RN50, RN101, ViT-B/16, ...), toy, or a file: "
                       "towers of OpenAI's, computed as OpenAI does (QuickGELU, heads of width 64)")
    prototypes: str = option("text", "OTP (Eq. 1), or a control: other classes' text, or means of the source's pixels",
                             choices=("text", "shuffled", "source"))
    align: str = option("otp-to-vtp", "lambda's schedule (Eq. 4), a name in SCHEDULES of align.py; a wrong one lists them")
    w_align: float = option(1.0, "weight of L_align in Eq. 7", POSITIVE)
    align_ramp: tuple[float, ...] = option((0.05, 0.3), "fractions of the run between which the goal of Eq. 4 moves", RAMP)
    tau: float = option(0.07, "temperature of Eq. 3 and of the text score", POSITIVE)
    tau_assign: float = option(0.07, "temperature of Eq. 2, with which frozen CLIP assigns cells to classes", POSITIVE)
    beta: float = option(0.7, "of Eq. 2, the most that a VTP moves away from the text", SHARE)
    mask_padding: bool = option(False, "leave the padding of training crops out of Eq. 2")
    ramp: tuple[float, ...] = option((0.05, 0.3), "fractions of the run between which the ramp of Eq. 6 rises from 0 to 1", RAMP)
    reweight: bool = option(True, "learning weights of Eq. 6")
    balance: float = option(0.5, "not of the paper: weights times n_c^-balance, n_c the weight of the class in the batch", SHARE)
    judge_text: float = option(0.5, "share of the text score in the second opinion of Eq. 5", SHARE)
    text_weight: float = option(0.5, "share of the text score <z, OTP> / tau in the prediction", SHARE)
    # the network and its optimiser
    stride: int = option(None, "stride of a ResNet's dense embedding (a ViT's is its patch)", choices=(8, 16, 32))
    freeze: int = option(None, "how many of CLIP's 5 stages stay frozen", ("between 0 and 5", lambda x: 0 <= x <= 5))
    steps: int = option(None, "optimiser steps", POSITIVE)
    batch: int = option(None, "images a step, over all processes", POSITIVE)
    micro_batch: int = option(0, "images at a time in each process, for the same loss and gradient: 2 of 8 take half "
                                 "the memory and 1.5 times the time; 0: all at once", AT_LEAST_0)
    crop: int = option(None, "side of the training crop in pixels", ("at least 32", lambda x: x >= 32))
    lr: float = option(None, "learning rate of the decoder", POSITIVE)
    lr_clip: float = option(None, "factor on it for CLIP's own weights", AT_LEAST_0)
    seed: int = option(0, "of initial weights, data order and augmentation", AT_LEAST_0)
    # the evaluation that closes the run
    scale: float = option(*PROTOCOL["scale"][1:])
    size: tuple[int, ...] = option(*PROTOCOL["size"][1:])
    height: int = option(*PROTOCOL["height"][1:])
    slide: int = option(*PROTOCOL["slide"][1:])
    slide_stride: int = option(*PROTOCOL["slide_stride"][1:])
    flip: bool = option(*PROTOCOL["flip"][1:])
    # the machine
    out: str = option(None, "run folder; default runs/METHOD-SOURCES-seedN")
    resume: str = option(None, "run folder to go on with; its own flags are used, of which "
                               f"{flags(MAY_CHANGE_ON_RESUME)} may change")
    device: str = option(None, "cpu, cuda, cuda:1, ...; default: cuda where there is one (no Apple GPU: no float64)")
    amp: str = option(None, "bf16 autocast, or auto: where the processor has it, else fp32 (no fp16: it skips steps "
                            "whose gradient overflows, and not the same ones for every method)",
                      choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the network")
    workers: int = option(None, "loader processes; any number gives the same batches", AT_LEAST_0)
    save_every: int = option(0, "steps between checkpoints; 0: ten minutes between them", AT_LEAST_0)
    figures: bool = option(True, "draw the figures after the evaluation")


# our reading: the abstract names no recipe. Real data: the nearest published ones (README, "Train at scale").
PRESETS = {
    "real": dict(targets=("cityscapes", "bdd", "mapillary"), harmful=0.0, clip="RN50", stride=16, freeze=3,
                 steps=40000, batch=8, crop=512, lr=1e-4, lr_clip=0.1, amp="auto", workers=LOADERS),
    "toy": dict(targets=("toy-cityscapes", "toy-bdd", "toy-mapillary", "toy-night", "toy-fog", "toy-snow"), harmful=0.1,
                clip="toy", stride=8, freeze=3, steps=400, batch=8, crop=96, lr=3e-3, lr_clip=0.03, amp="fp32", workers=2),
}
# What --method erm switches off. All else stays, at the same seed to the bit: data, initial weights, optimiser.
ERM = dict(align="none", reweight=False, text_weight=0.0)
LOG_EVERY = 10  # steps between rows of log.jsonl
SAVE_SECONDS = 600  # between checkpoints: a crash costs ten minutes at most, and writing 4 GB takes few of them
LABELLED_WITHIN = 100  # batches of which at least one pixel must have a class


def typed(name, value):
    """A field of Config as its flag is typed."""
    flag, words = name.replace("_", "-"), " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"--{'no-' * (value is False)}{flag}" if isinstance(value, bool) else f"--{flag} {words}"


def parse(arguments):
    """Command line -> dict of the flags that were given (only those; Config knows the rest)."""
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     description="Train on labelled source domains, evaluate on unseen ones.")
    for f in dataclasses.fields(Config):
        default = "" if f.default is None else f" (default: {typed(f.name, f.default)})"
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%") + default
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind, number = (f.type, None) if isinstance(f.type, type) else (f.type.__args__[0], "+")
            parser.add_argument(flag, type=kind, nargs=number, choices=f.metadata["choices"], help=text)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(arguments)).items()}


def configure(given):
    """Flags given -> complete, checked Config. UserError names the flag that cannot be."""
    toy = all(name.startswith("toy-") for name in given.get("source", Config.source))
    off = ERM if given.get("method") == "erm" else {}
    for name, value in off.items():
        require(given.get(name, value) == value,
                f"--method erm switches every idea off, so {typed(name, given.get(name))} cannot be; leave one of the two away.")
    preset = PRESETS["toy" if toy else "real"] | (dict(crop=504) if str(given.get("clip")).startswith("ViT-L/14") else {})  # 36 patches
    config = Config(**{**preset, **off, **given})
    config.out = config.out or os.path.join("runs", f"{config.method}-{'-'.join(config.source)}-seed{config.seed}")
    # Here and not in `parse`, because align.py needs torch, and `--help` must answer before torch is imported.
    require(config.align in align.SCHEDULES,
            f"--align {config.align} is no schedule of align.py: give {', '.join(align.SCHEDULES)}.")
    for f in dataclasses.fields(Config):
        rule, value = f.metadata["rule"], getattr(config, f.name)
        require(not rule or rule[1](value), f"{typed(f.name, value)} must be {rule and rule[0]}.")
    check_protocol(**{name: getattr(config, name) for name in PROTOCOL})
    return config


if __name__ == "__main__":
    GIVEN = parse(sys.argv[1:])  # here, before torch is imported: --help and a mistyped flag are answered at once
    # Importing torch takes seconds. Ctrl-C in this time would show where in torch it was.
    signal.signal(signal.SIGINT, lambda *_: sys.exit("error: stopped by a signal: nothing was begun, "
                                                     "so give the same command again."))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import align  # noqa: E402
import checkpoint  # noqa: E402
import evaluate  # noqa: E402
import figures  # noqa: E402
import machine  # noqa: E402
import ppar  # noqa: E402
from machine import setup_processes, sum_over_processes  # noqa: E402

# ------------------------------------------------------------------------------------------------------------- set-up


def open_data(config, state):
    """The endless stream of training samples, and the names of pairs as checkpoint.save keeps them.

    Of the targets, only the names of the files are looked at.
    """
    sources, withheld = [], {}
    for name in config.source:
        withheld[name] = state["withheld"].get(name) if state else withheld_names(config, name)
        items = data.list_items(
            name, config.data_root, "train", config.holdout, config.harmful, withheld[name])
        if state:
            items = same_pairs(config, name, items, state["pairs"].get(name, []))
        else:
            data.check_pairs(items, mapillary=config.mapillary)  # broken files are found before step 0
        sources.append(items)
    for name in config.targets:
        data.list_items(name, config.data_root, "val", config.holdout, withheld=withheld.get(name))
    data.check_shared_memory(config.workers, config.batch * 4 * config.crop ** 2)
    stream = data.TrainingStream(sources, config.crop, config.seed, config.mapillary)
    pairs = {name: [item.name for item in items] for name, items in zip(config.source, sources)}
    return stream, dict(pairs=pairs, withheld=withheld)


def withheld_names(config, name):
    """Names of the pairs of a source that --holdout keeps out of training; [] if it has a val split."""
    if not config.holdout:
        return []
    every = data.list_items(name, config.data_root, "train", 0, config.harmful)
    trained = data.list_items(name, config.data_root, "train", config.holdout, config.harmful)
    trained = {item.name for item in trained}
    return [item.name for item in every if item.name not in trained]


def same_pairs(config, name, items, trained):
    """The items, in the order of the names that the run was trained on. Refuses a list with other names.

    Sample n is a place in this list. With one pair more or fewer, a resumed run would go on with other samples,
    and an interruption would change what is learnt. Folders may have moved: names do not contain them.
    """
    here = {item.name: item for item in items}
    gone = [pair for pair in trained if pair not in here]
    new = sorted(set(here) - set(trained))
    changes = [f"{len(names)} {verb} (the first is {names[0]})"
               for names, verb in ((gone, "went"), (new, "came")) if names]
    require(not changes,
            f"{name} in {config.data_root} is not the list of pairs that {config.out} was trained on: "
            f"{', '.join(changes)}; a resumed run needs the same pairs, so put the files back as they were, or "
            f"start a new run with another --out.")
    return [here[pair] for pair in trained]


def open_loader(stream, config, start, rank, processes, device):
    """The batches from step `start` on, as pairs (image (b, 3, crop, crop) uint8, label (b, crop, crop) uint8).

    Of every batch, this process gets its own b = batch / processes samples. Together they are the whole batch.
    """
    local = config.batch // processes
    batches = []
    for step in range(start, config.steps):
        first = step * config.batch + rank * local
        batches.append(range(first, first + local))
    return torch.utils.data.DataLoader(stream, batch_sampler=batches, num_workers=config.workers,
                                       pin_memory=device.type == "cuda", worker_init_fn=machine.outlive_signals)


def watch_labels(batches, config, start, processes, device):
    """Hand on the batches from step `start` on; end the run when no pixel of its first hundred has a class.

    Labels of a wrong kind may all be void. The loss is then 0 in every step, which looks like a good run.
    The labels are looked at on the host, before they go to the device. So no step waits for this.
    """
    last = min(start + LABELLED_WITHIN, config.steps) - 1
    labelled = False
    for step, (image, label) in enumerate(batches, start):
        labelled = labelled or bool((label != data.VOID).any())
        if step == last:
            anywhere = labelled
            if processes > 1:  # each process sees its share of a batch
                anywhere = sum_over_processes(torch.tensor(float(labelled), device=device)).item() > 0
            require(anywhere,
                    f"no pixel of {last + 1 - start} batches has a class, so there is nothing to learn from: are "
                    f"these the official labels? `python data.py --check {' '.join(config.source)} --data-root "
                    f"{config.data_root}` says what is in them.")
        yield image, label


def build(config):
    """PPAR at step 0, from the flags of a run -> (PPAR, one line that says what was loaded of CLIP)."""
    asks_clip = config.reweight or config.align not in ("otp", "none")  # Eq. 5 or Eq. 2
    return ppar.build(config.clip, seed=config.seed, stride=config.stride, freeze=config.freeze,
                      shuffle=config.prototypes == "shuffled", frozen_clip=asks_clip,
                      tau=config.tau_assign, beta=config.beta, mask_padding=config.mask_padding)


def open_network(config, state, rank, device, layout):
    """PPAR at step 0, or as the checkpoint `state` holds it; the first process says what was loaded of CLIP."""
    if state:  # all of CLIP that a run needs is in its checkpoint: the file may have moved
        module = checkpoint.rebuild(state, config.out)
        module.net.encoder.freeze(config.freeze)
        report = f"network and CLIP as in {config.out}/last.pt, step {state['step']}"
    else:
        module, report = machine.take_turns(rank, lambda: build(config))
    multiple = module.net.encoder.multiple
    require(config.crop % multiple == 0, f"--crop {config.crop} must be a multiple of {multiple} for --clip {config.clip}.")
    if rank == 0:
        print(report)
    return module.to(device, memory_format=layout).train()


def make_optimizer(module, config):
    """AdamW in four groups: CLIP's weights or new ones, with weight decay (matrices) or without (the rest)."""
    groups = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("net.encoder."), parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [dict(params=params, peak=config.lr * (config.lr_clip if is_clip else 1.0),
              weight_decay=0.01 if is_matrix else 0.0)
         for (is_clip, is_matrix), params in sorted(groups.items())], fused=True)  # one pass over all weights, on a CPU too


def learning_rate(step, steps, warmup=0.05):
    """Factor on the learning rate: a linear warm-up over a share of the run, then polynomial decay of power 0.9."""
    first = max(int(warmup * steps), 1)
    return (step + 1) / first if step < first else (1 - (step - first) / max(steps - first, 1)) ** 0.9


def set_learning_rate(optimizer, rate):
    """Each group at its own peak, times the factor of the step."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate


def schedule(config, step):
    """The two numbers that change with the step -> dict(lam=..., ramp=...).

    lam    lambda of Eq. 4, the share of the OTP in the goal; None: no alignment
    ramp   of Eq. 6; 0: all learning weights are 1
    """
    lam = align.SCHEDULES[config.align](align.progress(step, config.steps, *config.align_ramp))  # Eq. 4
    ramp = align.progress(step, config.steps, *config.ramp) if config.reweight else 0.0
    return dict(lam=lam, ramp=ramp)


def set_up(config, state, rank, processes, device, layout):
    """All that the loop needs -> (stream, names, module, network, optimizer), as in the checkpoint or at step 0.

    names are those of the pairs, for the checkpoint.
    module is our PPAR. network is what the loop calls: the module itself, or the module compiled, or the module within
    DistributedDataParallel, which sums the gradients of all processes.
    """
    require(config.batch % processes == 0, f"--batch {config.batch} cannot be split over {processes} processes: give a multiple.")
    if processes > 1:  # on several machines, one may see an older file than the others
        start = state["step"] if state else 0
        steps = sum_over_processes(torch.tensor(start, device=device)).item()
        require(steps == start * processes,
                f"the processes do not see the same checkpoint in {config.out}: start them again.")
    stream, names = open_data(config, state)
    module = open_network(config, state, rank, device, layout)
    if rank == 0:
        checkpoint.open_folder(config, state["step"] if state else None)
        print(f"source {' + '.join(f'{n} ({len(i)} images)' for n, i in zip(config.source, stream.sources))}, method "
              f"{config.method}, align {config.align}, reweight {config.reweight}, {processes} process(es) on {device.type} "
              f"in {machine.precision(config.amp, device)[0]}")
    optimizer = make_optimizer(module, config)
    if state:
        checkpoint.load_optimizer(optimizer, state, config.out)
    network = torch.compile(module) if config.compile else module
    if processes > 1:
        # The statistics of CLIP's BatchNorm and the prototypes are buffers: 331 with RN50. They are equal in all
        # processes at all times. By default the first process would send them to the others at every forward pass.
        network = torch.nn.parallel.DistributedDataParallel(
            network, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
    module.withheld = names["withheld"]  # for the evaluation after training
    return stream, names, module, network, optimizer


def check_first_step(module, optimizer):
    """Guards that cost nothing: what should learn got a finite gradient, what is frozen got none, nothing is left out."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    require(sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad),
            "the optimiser does not hold exactly the trainable parameters, once each: a defect of make_optimizer.")
    for name, p in module.named_parameters():
        got = "no" if p.grad is None else "a" if torch.isfinite(p.grad).all() else "a non-finite"
        require(got == ("a" if p.requires_grad else "no"),
                f"{'' if p.requires_grad else 'frozen '}parameter {name} got {got} gradient at the first step.")


@torch.no_grad()
def describe(terms, at, out, otp, label, config, done):
    """A row of log.jsonl: the terms, which goal is the easier one, by distance and by loss (Eq. 3, w = 1), mean omega (this process's
    pixels). All processes take part. Nowhere else in a step does the host wait for the device."""
    values = sum_over_processes(torch.stack([term.detach() for term in terms.values()])).tolist()
    row = dict(step=done, loss=sum(values), **dict(zip(terms, values)), **at)
    for name, value in reversed(row.items()):
        require(value is None or math.isfinite(value),
                f"the loss term `{name}` is {value} at step {done}: the last good checkpoint, if one was written, stays in "
                f"{config.out}; start anew with a lower --lr, or look at the data (python data.py --check).")
    row |= ppar.compare_goals(out, otp, label, tau=config.tau, judge_text=config.judge_text)
    if config.reweight:
        omega = ppar.reliability(out, otp, label, tau=config.tau, judge_text=config.judge_text)
        row["reliability"] = (omega.sum() / (label != data.VOID).sum().clamp_min(1)).item()
    return row


class Progress:
    """How far a run is, for checkpoints and for messages."""

    def __init__(self, config, start, rank):
        self.done = start  # steps
        self.saved = start or None  # step of the last checkpoint; None: there is none yet
        self.began = self.time = time.monotonic()  # of this process, and of the last checkpoint
        self.config, self.rank = config, rank

    def save_is_due(self):
        """Whether a checkpoint is due after step `done`.

        Processes have clocks of their own, and only the first one writes. So only the first one asks its clock.
        No agreement is needed, because the others wait for it at the next exchange of gradients.
        """
        if self.config.save_every:
            return self.done % self.config.save_every == 0
        return self.rank == 0 and time.monotonic() - self.time >= SAVE_SECONDS

    def save(self, module, optimizer, names):
        """Write the checkpoint of step `done`. The ten minutes begin when it is written, also on a slow disk."""
        checkpoint.save(module, optimizer, self.config, self.done, self.rank, names)
        self.saved, self.time = self.done, time.monotonic()

    def kept(self):
        """What the folder of the run holds, in words."""
        if self.saved is None:
            return "no step was trained yet"
        if self.rank > 0:
            return "the last checkpoint is kept"
        return f"the checkpoint of step {self.saved} is kept"


@contextlib.contextmanager
def explain_trouble(config, processes, progress):
    """Trouble of the machine ends a run in one sentence that says what is kept and how to go on."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        kind, reason = machine.trouble(error)
        if kind is None:
            raise
        where = f"in step {progress.done + 1} ({reason})"
        resume = f"python train.py --resume {config.out}"
        part = (config.micro_batch or config.batch // processes) // 2
        if kind == "loader":
            sentence = (f"a loader process ended {where}, often for lack of memory: go on with fewer, "
                        f"`{resume} --workers {config.workers // 2}`")
        elif kind == "compiler":
            sentence = (f"--compile failed {where}: install a C++ compiler (for a GPU also triton), or go on "
                        f"without it, `{resume} --no-compile`")
        elif part:
            sentence = (f"out of memory {where}: go on in smaller parts, with the same loss and gradient, by "
                        f"`{resume} --micro-batch {part}`, or start a new run with a smaller --crop")
        else:
            sentence = f"out of memory {where}: start a new run with a smaller --crop"
        raise UserError(f"{sentence}; {progress.kept()}.") from None


# ----------------------------------------------------------------------------------------------------------- the loop


def train(config, state, rank, processes, device):
    """Train from the checkpoint `state` (None: from step 0) to the last step -> PPAR. Writes last.pt and log.jsonl."""
    progress = Progress(config, state["step"] if state else 0, rank)
    with explain_trouble(config, processes, progress):
        return train_steps(config, state, rank, processes, device, progress)


def train_steps(config, state, rank, processes, device, progress):
    """The set-up and the loop of `train`."""
    start = progress.done
    _, autocast, layout = machine.precision(config.amp, device)
    stream, names, module, network, optimizer = set_up(config, state, rank, processes, device, layout)
    loader = open_loader(stream, config, start, rank, processes, device)
    # closing: whatever ends the loop also ends the loader's processes, at once.
    watched = contextlib.closing(watch_labels(loader, config, start, processes, device))
    bar = tqdm(total=config.steps, initial=start, disable=rank > 0, desc="train", unit="step", dynamic_ncols=True)
    with bar, watched as batches, machine.catch_signals() as signals:
        if state is None:
            # A full disk shows now and not in hour two, and --resume works from the first step on.
            progress.save(module, optimizer, names)
        for step, (image, label) in zip(range(start, config.steps), batches):
            image = data.normalise(image.to(device, non_blocking=True)).contiguous(memory_format=layout)
            label = label.to(device, non_blocking=True).long()
            rate = learning_rate(step, config.steps)
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
            at = schedule(config, step)

            def objective(out, label=label, at=at):
                if config.prototypes == "source":
                    module.follow_source(out.emb, label, sum_over_processes)
                return ppar.objective(out, module.otp, label, lam=at["lam"], ramp=at["ramp"], tau=config.tau,
                                      judge_text=config.judge_text, balance=config.balance, w_align=config.w_align,
                                      reduce=sum_over_processes)

            if config.micro_batch:
                terms, out = machine.backward_in_parts(network, image, config.micro_batch, objective, autocast)
            else:
                with autocast():
                    out = network(image)
                terms = objective(out)
                # Each process has a share of the loss, and the shares add up to it. DistributedDataParallel takes the mean
                # of the gradients, so the share is multiplied by the number of processes.
                loss = processes * sum(terms.values())
                loss.backward()
            if step == start:
                check_first_step(module, optimizer)
            done = step + 1
            logged = done % LOG_EVERY == 0 or done == config.steps
            if logged:
                row = describe(terms, at, out, module.otp, label, config, done)
                row |= dict(lr=config.lr * rate, seconds=round(time.monotonic() - progress.began, 2))
                if rank == 0:
                    checkpoint.log(config.out, row)
                shown = {k: f"{row[k]:.3f}" for k in ("loss", "seg", "align", "lam") if row.get(k) is not None}
                bar.set_postfix(shown, refresh=False)
            stopping = machine.stop_asked(signals, processes, logged, device)
            optimizer.step()
            progress.done = done
            if progress.save_is_due() or done == config.steps or stopping:
                progress.save(module, optimizer, names)
            bar.update()  # it writes to the terminal, and that may be gone (SIGHUP): so after the checkpoint
            if stopping:
                machine.wait_for_others()  # torchrun kills all when one leaves, and the first may still be writing
                raise UserError(f"stopped by a signal after step {done}, checkpoint written: go on with "
                                f"`python train.py --resume {config.out}`.")
    return module


def begin_run(given):
    """The Config of a new run. A folder that has an owner, or that holds training, is refused at once."""
    config = configure(given)
    if machine.is_first() and os.path.isdir(config.out):
        checkpoint.own(config.out)
        checkpoint.check_unused(config.out)
    return config


def continue_run(given):
    """--resume RUN -> (its Config, its checkpoint). Flags that would change the result are refused."""
    folder = given.pop("resume")
    if machine.is_first() and os.path.exists(os.path.join(folder, "last.pt")):
        checkpoint.own(folder)  # before it is read: while another process trains, it is about to change
    state = checkpoint.read(folder)
    try:
        own = dict(state["config"])
        missing = {f.name for f in dataclasses.fields(Config)} - set(own) - MAY_CHANGE_ON_RESUME
        require(not missing, f"{folder}/last.pt was written by an earlier train.py, which had no {flags(missing)}: go on with the "
                             f"commit that {folder}/run.json names, or start a new run with --out.")
        for name, value in given.items():
            require(name in MAY_CHANGE_ON_RESUME or value == own.get(name),
                    f"{typed(name, value)} differs from the run's own {typed(name, own.get(name))}: a resumed run keeps its "
                    f"flags, only {flags(MAY_CHANGE_ON_RESUME)} may change; start a new run with --out.")
        config = configure({**own, **given, "out": folder})
        if not 0 <= state["step"] <= config.steps:
            raise TypeError
        if not isinstance(state["pairs"], dict) or not isinstance(state["withheld"], dict):
            raise TypeError
    except TypeError:  # flags of another program, or values of another kind
        raise UserError(f"{folder}/last.pt was not written by this train.py: its flags or its parts are others.") from None
    if config.clip != own["clip"]:
        check_same_clip(config, own["clip"])
    return config, state


def check_same_clip(config, before):
    """A CLIP that has moved must be the same file, because the figure of the embedding reads it once more."""
    told = {}
    with contextlib.suppress(OSError, ValueError):  # no run.json, or none of ours
        told = json.loads((Path(config.out) / "run.json").read_text(encoding="utf-8"))
    digest = checkpoint.describe(config)["clip_sha256"]
    require(digest and digest == told.get("clip_sha256"),
            f"--clip {config.clip} is not the file that the run began with (--clip {before}): leave --clip "
            f"away, because the weights of CLIP are in the checkpoint.")


def closing_words(config, results):
    """What came out, which picture to open first, and the next command to try."""
    if results["mean"] is not None:
        print(f"mean IoU over the unseen domains: {results['mean']:.1f} %")
    pictures = [f"predictions_{name}.png" for name, row in results["targets"].items() if row["unseen"]]
    if any(name.startswith("toy-") for name in config.source):  # drawn scenes know which of their labels are wrong
        pictures.insert(0, "reliability.png")
    if config.figures and pictures:
        print(f"the picture to open first: {os.path.join(config.out, pictures[0])}")
    print(f"next: the baseline with the same flags, `--method erm --out OTHER`; then both predictions side by side, `python figures.py "
          f"{config.out} --compare OTHER`; every term of the theorem, `python bound.py {config.out}`")


def how_to_go_on(out):
    """What to do after a stop outside of the loop, which saves before it stops."""
    if (Path(out) / "last.pt").exists():
        return f"the checkpoint in {out} stays, go on with `python train.py --resume {out}`."
    return "no step was done yet, so give the same command again."


def main(given):
    """Train, evaluate every target once, draw the figures. Errors of the user end in one sentence and exit status 1."""
    try:
        with checkpoint.one_sentence(given.get("out", "run folder")):
            out = given.get("resume") or configure(given).out
            with machine.stop_with(lambda: how_to_go_on(out)):
                config, state = continue_run(given) if "resume" in given else (begin_run(given), None)
                rank, processes, device = setup_processes(config)
                module = train(config, state, rank, processes, device)
                run = checkpoint.Run(module.eval(), config, config.steps, Path(config.out), module.withheld)
                results = evaluate.evaluate_targets(run, rank=rank, processes=processes)
                if rank == 0 and config.figures:
                    figures.draw_figures(run)
                if rank == 0:
                    closing_words(config, results)
    finally:
        checkpoint.disown()
        machine.end_processes()


if __name__ == "__main__":
    main(GIVEN)
