"""train.py: the plain loop that composes the ideas, from source images to a table of unseen targets.

    python train.py                                                              the drawn street world, minutes on a laptop
    python train.py --source gta5 --targets cityscapes bdd mapillary             the main job, on GPUs
    python train.py ... --method erm                                             the baseline: same network, every idea off
    torchrun --nproc_per_node 4 train.py ...                                     the same batch, split over four processes
    python train.py --resume runs/NAME                                           go on where it was stopped

One step, in the order of the code below:

    images, labels of step s            a function of (seed, s) alone                              data.py
    logits, emb, pooled = net(images)    dense CLIP and a decoder                                   model.py
    p^V = VTP(p^O, emb, pooled)         the text prototypes after a look at the images             prototypes.py, Eq. 1, 2
    w = weights(omega(emb, y, p))       what the prototypes think of each labelled pixel           reweight.py, Eq. 5, 6
    Eq. 7   L = L_seg(w) + w_align * L_align(w) + w_vtp * L(VTP)                                   align.py, Eq. 3, 4

Every mean in it is over the whole batch, whatever the number of processes and micro-batches: numerators are local,
denominators are global, so the sum of the parts is the loss that one process would have had.

No target image can be read here: before the last step only the names of their files are listed, to say early that a
folder is missing. The network that is evaluated is the last one; there is no picking of a best one.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

# ------------------------------------------------------------------------------------------------------ configuration


def option(default, help, choices=None):
    """A field of Config: its default, its help (with symbol and equation), and the values that it may take."""
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Config:
    """Every flag of a run, one line each. None means: by preset, real or toy (PRESETS below)."""

    # data
    source: tuple[str, ...] = option(("toy-gta5",), "labelled data sets to train on, mixed in equal parts")
    targets: tuple[str, ...] = option(None, "unseen data sets to evaluate on after the last step")
    data_root: str = option("data", "folder that holds one folder per data set")
    mapillary: str = option("A", "which 66-to-19 mapping Mapillary labels are read with", ("A", "B"))
    holdout: int = option(0, "pairs withheld from each source that has no validation split, to be one")
    harmful: float = option(None, "share of drawn source scenes with wrong regions (toy sources only)")
    # the method
    method: str = option("ppar", "ppar, or erm: L_seg with w = 1 alone, the baseline", ("ppar", "erm"))
    clip: str = option(None, "CLIP by name (RN50, RN101, ViT-B/16, ...), path of a checkpoint, or toy")
    prototypes: str = option("text", "OTP (Eq. 1), or a control: source means, random directions, the OTP with names swapped",
                             ("text", "source", "random", "shuffled"))
    align: str = option("progressive", "which goal when (Eq. 4): lambda's schedule",
                        ("progressive", "reversed", "otp", "vtp", "both", "none"))
    w_align: float = option(1.0, "weight of L_align in Eq. 7; 0: not computed")
    w_vtp: float = option(0.2, "weight of L(VTP; 1) in Eq. 7: trains the VTP, and pulls pixels to it; 0: not computed")
    tau: float = option(0.07, "temperature of Eq. 3")
    progress_start: float = option(0.1, "fraction of the run at which lambda (Eq. 4) and ramp (Eq. 6) leave 0")
    progress_end: float = option(0.6, "fraction of the run at which they reach 1")
    reweight: str = option("pixel", "what gets a learning weight (Eq. 6)", ("none", "pixel", "image"))
    reweight_per_class: bool = option(True, "means of Eq. 6 within each class, not over the batch")
    tau_w: float = option(0.07, "temperature of the reliability, Eq. 5")
    w_min: float = option(0.1, "floor of a learning weight before its last division, Eq. 6")
    balance: float = option(0.0, "a control, not of the paper: L_seg and L_align times n_c^-balance, n_c pixels of the class in the batch")
    text_weight: float = option(0.5, "share of the text score <z, OTP> / tau in the prediction, 0 to 1")
    # the network and its optimiser
    stride: int = option(None, "stride of a ResNet's dense embedding: 32, 16 or 8 (a ViT's is its patch)", (8, 16, 32))
    freeze: int = option(None, "how many of CLIP's 5 stages stay frozen")
    width: int = option(None, "channels of the decoder; the VTP's are twice as many")
    steps: int = option(None, "optimiser steps")
    batch: int = option(None, "images a step, over all processes")
    micro_batch: int = option(0, "images at a time in each process, gradients accumulated; 0: all at once")
    crop: int = option(None, "side of the training crop in pixels, a multiple of 32")
    lr: float = option(None, "learning rate of the decoder and the VTP")
    lr_clip: float = option(0.1, "factor on it for CLIP's own weights")
    weight_decay: float = option(0.01, "AdamW's, on matrices alone")
    warmup: float = option(0.05, "fraction of the run over which the learning rate rises")
    seed: int = option(0, "of initial weights, data order and augmentation")
    # the machine
    out: str = option(None, "run folder; default runs/METHOD-SOURCES-seedN")
    resume: str = option(None, "run folder to go on with; its own flags are used")
    device: str = option(None, "cpu, cuda, cuda:1, ...; default: cuda where there is one")
    amp: str = option(None, "bf16 autocast (losses stay fp32), fp32, or auto: bf16 where the processor has it",
                      ("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the network")
    workers: int = option(None, "loader processes; any number gives the same batches")
    save_every: int = option(500, "steps between checkpoints")
    log_every: int = option(10, "steps between rows of log.jsonl")
    # evaluation
    scale: float = option(1.0, "factor on the input's size at evaluation; labels keep their full size")
    slide: int = option(0, "side of a sliding window at evaluation; 0: whole image")
    slide_stride: int = option(0, "its stride; 0: two thirds of the window")
    flip: bool = option(False, "average with the mirrored image at evaluation")
    figures: bool = option(True, "draw the figures after the evaluation")


PRESETS = {
    # The nearest published recipes: crop 512, AdamW 1e-4, CLIP's own weights x 0.1, poly decay (README, "Train at scale").
    "real": dict(targets=("cityscapes", "bdd", "mapillary"), harmful=0.0, clip="RN50", stride=16, freeze=1, width=128,
                 steps=40000, batch=8, crop=512, lr=1e-4, amp="auto", workers=8),
    # fp32: the same bits on one kind of CPU with as many threads; elsewhere the committed numbers but for rounding.
    "toy": dict(targets=("toy-cityscapes", "toy-bdd", "toy-mapillary", "toy-night", "toy-fog", "toy-snow"), harmful=0.1,
                clip="toy", stride=8, freeze=0, width=48, steps=400, batch=8, crop=96, lr=3e-3, amp="fp32", workers=2),
}
# What --method erm switches off. All else stays, at the same seed to the bit: data, initial weights, optimiser.
ERM = dict(align="none", w_align=0.0, w_vtp=0.0, reweight="none", text_weight=0.0)
# What may differ between a run and its continuation. None of it changes a weight, but a device rounds in its own way.
HARMLESS = {"device", "workers", "save_every", "log_every", "data_root", "figures"}


class RunError(Exception):
    """Something the user can mend; the message is one sentence."""


def parse(arguments):
    """Command line -> dict of the flags that were given (only those; Config knows the rest)."""
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     description="Train on labelled source domains, evaluate on unseen ones.")
    for f in dataclasses.fields(Config):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.default is not None:
            shown = " ".join(f.default) if isinstance(f.default, tuple) else f.default
            text += f" (default: {shown})"
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif f.type == tuple[str, ...]:
            parser.add_argument(flag, nargs="+", metavar="NAME", help=text)
        else:
            parser.add_argument(flag, type=f.type, choices=f.metadata["choices"], help=text,
                                metavar=None if f.metadata["choices"] else f.type.__name__.upper())
    given = vars(parser.parse_args(arguments))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def configure(given):
    """Flags given -> complete, checked Config. RunError names the flag that cannot be."""
    config = Config(**given)
    preset = PRESETS["toy" if all(s.startswith("toy-") for s in config.source) else "real"]
    for name, value in preset.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.method == "erm":
        for name, value in ERM.items():
            if name in given and given[name] != value:
                raise RunError(f"--method erm switches every idea off, so --{name.replace('_', '-')} {given[name]} "
                               f"cannot be; leave one of the two away.")
            setattr(config, name, value)
    if config.align == "none":
        config.w_align = 0.0
    if config.out is None:
        config.out = os.path.join("runs", f"{config.method}-{'-'.join(config.source)}-seed{config.seed}")
    checks = [
        ("steps", config.steps >= 1, "at least 1"), ("batch", config.batch >= 1, "at least 1"),
        ("micro-batch", config.micro_batch >= 0, "at least 0"), ("workers", config.workers >= 0, "at least 0"),
        ("width", config.width >= 8 and config.width % 8 == 0, "a positive multiple of 8"),
        ("crop", config.crop >= 32, "at least 32"),
        ("lr", config.lr > 0, "positive"), ("lr-clip", config.lr_clip >= 0, "at least 0"),
        ("tau", config.tau > 0, "positive"), ("tau-w", config.tau_w > 0, "positive"),
        ("w-min", 0 <= config.w_min < 1, "in [0, 1)"), ("w-align", config.w_align >= 0, "at least 0"),
        ("w-vtp", config.w_vtp >= 0, "at least 0"), ("text-weight", 0 <= config.text_weight <= 1, "in [0, 1]"),
        ("harmful", 0 <= config.harmful <= 1, "in [0, 1]"), ("warmup", 0 <= config.warmup < 1, "in [0, 1)"),
        ("progress-start", 0 <= config.progress_start < config.progress_end <= 1,
         f"at least 0 and less than --progress-end {config.progress_end}, which must be at most 1"),
        ("save-every", config.save_every >= 1, "at least 1"), ("log-every", config.log_every >= 1, "at least 1"),
        ("scale", config.scale > 0, "positive"), ("slide", config.slide >= 0, "at least 0"),
        ("slide-stride", 0 <= config.slide_stride <= max(config.slide, 0), "between 0 and --slide"),
        ("balance", 0 <= config.balance <= 1, "in [0, 1]"),
        ("holdout", config.holdout >= 0, "at least 0"), ("seed", config.seed >= 0, "at least 0"),
        ("weight-decay", config.weight_decay >= 0, "at least 0"),
    ]
    for flag, right, rule in checks:
        if not right:
            raise RunError(f"--{flag} {getattr(config, flag.replace('-', '_'))} must be {rule}.")
    return config


if __name__ == "__main__":
    GIVEN = parse(sys.argv[1:])  # here, before torch is imported: --help and a mistyped flag are answered at once

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import align  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import prototypes  # noqa: E402
import reweight  # noqa: E402

# ----------------------------------------------------------------------------------------------------- several processes


def setup_processes(config):
    """(rank, processes, device) of this process: torchrun sets the variables, a plain `python` does not."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one GPU for each process of a machine
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("training is written for cpu and cuda")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # pinned memory and all else that goes by the current device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name} cannot be used here ({str(error).split('. ')[0][:120]}): this machine has cpu"
                       f"{' and cuda' * torch.cuda.is_available()}.") from None
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def sum_over_processes(x):
    """The sum of a tensor over all processes; itself when there is one."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


# ------------------------------------------------------------------------------------------------------ network and loss


class PPAR(nn.Module):
    """What is trained, in one module, because DistributedDataParallel wraps one: forward(image) -> logits, emb, vtp.

    otp (K, D) is a buffer: it moves with the module and is never trained. vtp is None where no loss asks for it.
    """

    def __init__(self, net, otp, vtp):
        super().__init__()
        self.net, self.vtp = net, vtp
        self.register_buffer("otp", otp)

    def forward(self, image):
        out = self.net(image)
        vtp = self.vtp(self.otp, out.emb, out.pooled) if self.vtp is not None else None
        return out.logits, out.emb, vtp


def uses_vtp(config):
    """Whether any loss of this configuration needs the VTP."""
    return config.w_vtp > 0 or (config.w_align > 0 and config.align != "otp")


def build(config):
    """Network and prototypes at step 0 -> (PPAR, one line about CLIP). The same initial net for every method."""
    import toy

    clip_model, report = model.load_clip(toy.CLIP_FILE if config.clip == "toy" else config.clip)
    torch.manual_seed(config.seed)  # fixes the decoder's initial weights; the VTP comes after it and cannot move them
    net = model.SegmentationNet(clip_model.visual, len(data.CLASSES), config.stride, config.width)
    net.encoder.freeze(config.freeze)
    otp = prototypes.original_text_prototypes(clip_model, data.CLASSES)
    if config.prototypes == "random":
        otp = prototypes.random_prototypes(*otp.shape, seed=config.seed)
    elif config.prototypes == "shuffled":
        otp = prototypes.shuffled_prototypes(otp, seed=config.seed)
    vtp = prototypes.VisualTextPrototypes(otp.shape[1], 2 * config.width) if uses_vtp(config) else None
    return PPAR(net, otp, vtp), report


def to_grid(label, stride):
    """Labels at the centres of the feature cells: (B, H, W) -> (B, h, w). Nearest, because a mean of ids is no id."""
    size = (label.shape[1] // stride, label.shape[2] // stride)
    return F.interpolate(label[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()


def batch_reliability(emb, label, otp, vtp, tau):
    """Eq. 5 from OTP and VTP together: the mean of what the two say."""
    rel = reweight.reliability(emb, label, otp, tau)
    return rel if vtp is None else (rel + reweight.reliability(emb, label, vtp, tau)) / 2


def batch_weights(rel, label, config, ramp):
    """Eq. 6 on the whole batch, over all processes. None stands for weight 1 everywhere."""
    if config.reweight == "image":
        rel = reweight.image_reliability(rel, label, sum_over_processes)
    return reweight.learning_weights(rel, label, ramp, config.w_min, config.reweight_per_class, sum_over_processes)


def balanced(weight, label, power):
    """Weights times n^-power, n the pixels of the class in the batch, over all processes. What weights of Eq. 6 must not be
    taken for: those leave the class shares as they are, these move them, and any method may have them."""
    count = sum_over_processes(torch.bincount(label.flatten(), minlength=256)).clamp_min(1)
    return count.float().pow(-power)[label] * (label != data.VOID) * (1.0 if weight is None else weight)


def loss_terms(logits, emb, vtp, otp, label, grid, weight, weight_grid, total, config, lam):
    """The terms of Eq. 7 on (a part of) the batch -> dict of name -> term with its weight, as shares of the whole batch.

    total: the denominators of the three terms over the whole batch. A part's mean times (its own denominator / the
    whole one), summed over the parts, is the mean of the whole batch, whatever the parts are.
    """
    logits = F.interpolate(logits.float(), size=label.shape[1:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(logits, label, ignore_index=data.VOID, reduction="none")
    terms = {"seg": (loss if weight is None else loss * weight).sum() / total[0]}
    labelled = (grid != data.VOID).sum()
    if config.w_align > 0:
        share = (labelled if weight_grid is None else weight_grid.sum()) / total[1]
        value = align.progressive_alignment_loss(emb, grid, otp, vtp, lam, config.tau, weight_grid)
        terms["align"] = config.w_align * share * value
    if config.w_vtp > 0:
        # Unweighted and not detached: trains the VTP, which Eq. 5 still asks when lambda = 1, and pulls pixels to it a little.
        terms["vtp"] = config.w_vtp * labelled / total[2] * align.alignment_loss(emb, grid, vtp, config.tau)
    elif vtp is not None and lam == 1:
        terms["vtp"] = 0.0 * vtp.sum()  # every parameter gets a gradient at every step: DDP waits for each of them
    return terms


def backward_batch(network, image, label, config, step, autocast):
    """Forward and backward of one step -> (numbers to log, what radii() looks at); gradients stay in the parameters.

    With micro-batches, Eq. 6 needs the reliabilities of the whole batch before the first loss, hence a first pass
    without gradient. That is the price of the same numbers at any micro-batch.
    """
    module = getattr(network, "module", network)  # DistributedDataParallel keeps ours inside
    processes = dist.get_world_size() if dist.is_initialized() else 1
    ramp = align.progress(step, config.steps, config.progress_start, config.progress_end)
    lam = align.SCHEDULES.get(config.align, align.SCHEDULES["otp"])(ramp)  # "none": any value, the term is not computed
    grid = to_grid(label, module.net.encoder.stride)  # (B, h, w)
    size = config.micro_batch or len(image)
    parts = [slice(i, i + size) for i in range(0, len(image), size)]  # slices: views, in whatever memory layout

    def forward(part):
        with autocast():
            return network(image[part])

    outputs = [forward(parts[0])] if len(parts) == 1 else None
    weight, weight_grid = None, None  # stands for weight 1 everywhere
    if config.reweight != "none" and ramp > 0:
        # Two sets of weights, each with mean 1 per class over its own pixels: one at label resolution for L_seg, one at the
        # feature cells for L_align. Both ask the same embeddings; only the label differs.
        with torch.no_grad():
            seen = outputs or [forward(part) for part in parts]
            weight, weight_grid = (
                batch_weights(torch.cat([batch_reliability(emb, y[part], module.otp, vtp, config.tau_w)
                                         for (_, emb, vtp), part in zip(seen, parts)]), y, config, ramp)
                for y in (label, grid))

    if config.balance:
        weight, weight_grid = balanced(weight, label, config.balance), balanced(weight_grid, grid, config.balance)

    def mass(weight, y):  # a denominator: the weight, or the number, of the labelled pixels of this process
        return ((y != data.VOID) if weight is None else weight).sum(dtype=torch.float64)

    total = torch.stack([mass(weight, label), mass(weight_grid, grid), mass(None, grid)])
    total = sum_over_processes(total).clamp_min(1e-8).float()
    logged = {}
    for part in parts:
        last = part is parts[-1]
        with contextlib.nullcontext() if last or processes == 1 else network.no_sync():
            logits, emb, vtp = outputs[0] if outputs else forward(part)
            terms = loss_terms(logits, emb, vtp, module.otp, label[part], grid[part],
                               *((None, None) if weight is None else (weight[part], weight_grid[part])),
                               total, config, lam)
            (processes * sum(terms.values())).backward()  # DDP takes the mean over processes; our parts are to be summed
        for name, value in terms.items():
            logged[name] = logged.get(name, 0.0) + value.detach()
    values = sum_over_processes(torch.stack(list(logged.values()))).tolist()
    row = dict(loss=sum(values), **dict(zip(logged, values)), lam=lam, ramp=ramp)
    return row, (emb, vtp, grid[part])


@torch.no_grad()
def radii(seen, otp):
    """Mean distance of the last micro-batch's pixels to the OTP and the VTP of their class: theory.md's A, as it moves."""
    emb, vtp, grid = seen
    valid = grid != data.VOID
    pixels, label = emb.permute(0, 2, 3, 1)[valid], grid[valid]  # (N, D), (N,)
    image = torch.nonzero(valid)[:, 0]
    row = dict(radius_otp=(pixels - otp[label]).norm(dim=1).mean().item()) if len(pixels) else {}
    if vtp is not None and len(pixels):
        row["radius_vtp"] = (pixels - vtp[image, label]).norm(dim=1).mean().item()
    return row


# ---------------------------------------------------------------------------------------------------------- optimiser


def learning_rate(step, steps, warmup):
    """Factor on the learning rate: linear warm-up, then polynomial decay of power 0.9, as the field trains. Pure."""
    first = max(int(warmup * steps), 1)
    return (step + 1) / first if step < first else (1 - (step - first) / max(steps - first, 1)) ** 0.9


def make_optimizer(module, config):
    """AdamW in four groups: CLIP's weights or new ones, with weight decay (matrices) or without (the rest)."""
    groups = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("net.encoder."), parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [dict(params=params, peak=config.lr * (config.lr_clip if is_clip else 1.0),
              weight_decay=config.weight_decay if is_matrix else 0.0)
         for (is_clip, is_matrix), params in sorted(groups.items())], fused=True)  # one pass over all weights, on a CPU too


def load_optimizer(optimizer, state):
    """Load a checkpoint's state, its moments laid out in memory as the weights are here.

    load_state_dict keeps the strides of the machine that saved; the fused kernel reads raw memory and would give each weight
    another one's moments, without an error, where a run goes on in the other layout (channels_last or not, see train()).
    """
    optimizer.load_state_dict(state)
    for p, moments in optimizer.state.items():
        moments.update({key: torch.empty_like(p).copy_(moments[key]) for key in ("exp_avg", "exp_avg_sq")})


def check_first_step(module, optimizer):
    """Guards that cost nothing: what should learn got a finite gradient, what is frozen got none, nothing is left out."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(p) for p in module.parameters() if p.requires_grad}
    if len(held) != len(set(held)) or set(held) != trainable:
        raise RunError("the optimiser does not hold exactly the trainable parameters, once each: a defect of make_optimizer.")
    for name, p in module.named_parameters():
        if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all()):
            raise RunError(f"parameter {name} got {'no' if p.grad is None else 'a non-finite'} gradient at the first step.")
        if not p.requires_grad and p.grad is not None:
            raise RunError(f"frozen parameter {name} got a gradient at the first step.")


# --------------------------------------------------------------------------------------------------------- run folder


def save_atomically(content, path):
    """Write a checkpoint so that `path` is at every moment either the old one or the new one, whole."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # the data must be on the disk before the name is
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        while error.__context__ is not None:  # torch reports a full disk as a position in its own source; the
            error = error.__context__  # system's reason lies below it
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise RunError(f"{path} could not be written ({' '.join(str(error).split())[:200]}): the checkpoint before it is "
                       f"untouched; make room, then go on with --resume {os.path.dirname(path)}.") from None


def write_json(content, path):
    """A JSON file, whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".tmp", path)


def describe_run(config):
    """What somebody needs to trust or repeat a number: flags, versions, commit."""
    import hashlib
    import importlib.metadata as metadata

    import toy

    def git(*words):
        try:
            answer = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), *words],
                                    capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    clip_file = toy.CLIP_FILE if config.clip == "toy" else config.clip
    digest = None  # of a CLIP by name, clip.load has checked the hash
    if os.path.isfile(clip_file):
        with open(clip_file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "pillow", "clip-anytorch")}
    return dict(command=" ".join(["python", *sys.argv]), config=dataclasses.asdict(config),
                clip_sha256=digest, versions=dict(python=sys.version.split()[0], **versions), commit=commit,
                changed_since_commit=None if changes is None else bool(changes), threads=torch.get_num_threads())


def prepare_folder(config, checkpoint):
    """Make the run folder; on resume, say so in run.json and drop the log rows of steps that will be done again."""
    log = os.path.join(config.out, "log.jsonl")
    if checkpoint is None:
        if os.path.exists(os.path.join(config.out, "last.pt")):  # there from step 0 on, see train()
            raise RunError(f"--out {config.out} holds another run: give another --out, or go on with that one by "
                           f"--resume {config.out}.")
        os.makedirs(config.out, exist_ok=True)
        write_json(describe_run(config), os.path.join(config.out, "run.json"))
        with contextlib.suppress(FileNotFoundError):
            os.remove(log)
        return log
    told = os.path.join(config.out, "run.json")  # another commit or machine may go on: its results are both's
    with contextlib.suppress(FileNotFoundError, ValueError), open(told, encoding="utf-8") as file:
        run, now = json.load(file), describe_run(config)
        parts = ("command", "versions", "commit", "changed_since_commit", "threads")
        run.setdefault("resumed", []).append(dict(step=checkpoint["step"], **{part: now[part] for part in parts}))
        write_json(run, told)
    if os.path.exists(log):
        with open(log, encoding="utf-8") as file:
            rows = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= checkpoint["step"]]
        with open(log + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(rows)
        os.replace(log + ".tmp", log)  # a kill between must not cost the rows that stay
    return log


# ----------------------------------------------------------------------------------------------------------- the loop


def precision(config, device):
    """(whether bf16 is used, autocast context). bfloat16 has float32's range: no loss scaling, and no overflow to NaN.

    `auto` asks the processor: one without bf16 arithmetic emulates it, slower than float32.
    """
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    bf16 = config.amp == "bf16" or (config.amp == "auto" and able)
    return bf16, lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def catch_signals():
    """SIGTERM and Ctrl-C fill a list instead of killing: the loop finishes its step, saves, and stops.

    -> (the list, a function that makes signals kill again). A second one means it, if it comes seconds later: a terminal,
    torchrun and a cluster's scheduler each may hand on one and the same stop.
    """
    received = []

    def handle(number, frame):
        received.append(time.monotonic())
        if received[-1] - received[0] > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    return received, lambda: [signal.signal(number, handler) for number, handler in before.items()]


def outlive_signals(worker):
    """A loader's process leaves the first stop to the loop: schedulers send it to all, and a step needs its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def source_means(module, stream, config, batches=32):
    """The prototypes that the abstract argues against: class means over source batches, in the initial CLIP's space."""
    module.eval()
    def pairs():
        for s in range(batches):
            image, label = (torch.stack(x) for x in zip(*(stream[s * config.batch + i] for i in range(config.batch))))
            with torch.no_grad():
                yield module.net(image).emb, to_grid(label, module.net.encoder.stride)
    return prototypes.source_mean_prototypes(pairs(), module.otp)


@contextlib.contextmanager
def refuse_misfit(config):
    """Turns what torch says of a state dict that does not fit into a sentence."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise RunError(f"{config.out}/last.pt does not hold the network that its flags describe "
                       f"({' '.join(str(error).split())[:200]}).") from None


def train(config, checkpoint, rank, processes, device):
    """Train from the checkpoint (None: from step 0) to the last step -> PPAR. Writes last.pt and log.jsonl."""
    if config.batch % processes:
        raise RunError(f"--batch {config.batch} cannot be split over {processes} processes: give a multiple.")
    start = checkpoint["step"] if checkpoint else 0
    sources = [data.list_items(name, config.data_root, "train", config.holdout, config.harmful) for name in config.source]
    for name in config.targets:  # names alone: is the folder there? No target file is opened before the last step.
        data.list_items(name, config.data_root, "val", config.holdout)
    if checkpoint is None:
        for items in sources:
            data.check_pairs(items, mapillary=config.mapillary)
    module, report = build(config)
    if config.crop % module.net.encoder.multiple:
        raise RunError(f"--crop {config.crop} must be a multiple of {module.net.encoder.multiple} for --clip {config.clip}.")
    stream = data.TrainingStream(sources, config.crop, config.seed, config.mapillary)
    if checkpoint:
        with refuse_misfit(config):
            module.net.load_state_dict(checkpoint["model"])
            module.otp.copy_(checkpoint["otp"])
            if module.vtp is not None:
                module.vtp.load_state_dict(checkpoint["vtp"])
    elif config.prototypes == "source":
        module.otp.copy_(source_means(module, stream, config))
    if rank == 0:
        log = prepare_folder(config, checkpoint)
        print(report)
        print(f"source {' + '.join(f'{n} ({len(i)} images)' for n, i in zip(config.source, sources))}, method "
              f"{config.method}, align {config.align}, reweight {config.reweight}, {processes} process(es) on {device.type}")

    bf16, autocast = precision(config, device)
    channels_last = bf16 or device.type == "cuda"  # the layout that both kinds of fast convolution read without a copy
    module.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    optimizer = make_optimizer(module, config)
    if checkpoint:
        with refuse_misfit(config):
            load_optimizer(optimizer, checkpoint["optimizer"])
    network = torch.compile(module) if config.compile else module
    if processes > 1:
        network = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    network.train()

    def save(step):
        if not all(torch.isfinite(t).all() for t in module.state_dict().values() if t.is_floating_point()):
            raise RunError(f"the weights are not finite after step {step}: the last good checkpoint stays in {config.out}; "
                           f"lower --lr, or look at the data (python data.py --check).")
        if rank == 0:
            save_atomically(dict(model=module.net.state_dict(), vtp=module.vtp and module.vtp.state_dict(), otp=module.otp,
                                 arch=module.net.arch, optimizer=optimizer.state_dict(), step=step,
                                 config=dataclasses.asdict(config)), os.path.join(config.out, "last.pt"))

    local = config.batch // processes  # this process's share of every batch; the union is the same for any number
    indices = [[s * config.batch + rank * local + i for i in range(local)] for s in range(start, config.steps)]
    loader = torch.utils.data.DataLoader(stream, batch_sampler=indices, num_workers=config.workers,
                                         worker_init_fn=outlive_signals, pin_memory=device.type == "cuda")
    signals, release_signals = catch_signals()
    with tqdm(total=config.steps, initial=start, disable=rank > 0, desc="train", unit="step", dynamic_ncols=True) as bar:
        if checkpoint is None:
            save(0)  # a full disk shows now and not in hour ten, and --resume works from the first step on
        began = time.perf_counter()
        for step, (image, label) in zip(range(start, config.steps), loader):
            image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, config.steps, config.warmup)
            optimizer.zero_grad(set_to_none=True)
            row, seen = backward_batch(network, image, label, config, step, autocast)
            for name, value in reversed(row.items()):
                if not math.isfinite(value):
                    raise RunError(f"the loss term `{name}` is {value} at step {step + 1}: the last good checkpoint, if one was "
                                   f"written, stays in {config.out}; lower --lr, or look at the data (python data.py --check).")
            if step == start:
                check_first_step(module, optimizer)
            optimizer.step()
            done = step + 1
            if rank == 0 and (done % config.log_every == 0 or done == config.steps):
                row = dict(step=done, **row, **radii(seen, module.otp), lr=config.lr * learning_rate(step, config.steps, config.warmup),
                           seconds=round(time.perf_counter() - began, 2))
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "seg", "align", "vtp", "lam") if k in row})
            bar.update()
            stopping = sum_over_processes(torch.tensor(float(len(signals)), device=device)).item() > 0
            if done % config.save_every == 0 or done == config.steps or stopping:
                save(done)
            if stopping:
                if processes > 1:
                    dist.barrier()  # torchrun kills the others when one leaves, and the first may still be writing
                raise RunError(f"stopped by a signal after step {done}, checkpoint written: go on with "
                               f"`python train.py --resume {config.out}`.")
    release_signals()
    return module


def continue_run(given):
    """--resume RUN -> (its Config, its checkpoint). Flags that would change the result are refused."""
    folder = given.pop("resume")
    checkpoint = evaluate.read_checkpoint(folder)
    try:
        own = dict(checkpoint["config"])
        config = configure({**own, **{name: value for name, value in given.items() if name in HARMLESS}, "out": folder})
        whole = {"vtp", "optimizer"} <= set(checkpoint) and 0 <= checkpoint["step"] <= config.steps
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise RunError(f"{folder}/last.pt was not written by this train.py: its flags or its parts are others.")
    for name, value in given.items():
        if name not in HARMLESS and value != own.get(name):
            raise RunError(f"--{name.replace('_', '-')} {value} differs from the run's own {own.get(name)}: a resumed run keeps "
                           f"its flags, only {', '.join('--' + n.replace('_', '-') for n in sorted(HARMLESS))} may change; "
                           f"start a new run with --out.")
    return config, checkpoint


def closing_words(config, results):
    """For the drawn world, the committed baseline beside the new row; for every run, the next command to try."""
    committed = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "toy.csv")
    own = {"method", "seed", "out", "targets", "prototypes", "tau", "tau_w", "w_min", "reweight_per_class",
           "progress_start", "progress_end", *ERM, *HARMLESS}  # what the baseline does not depend on
    plain = dataclasses.asdict(configure({}))
    like = all(value == plain[name] for name, value in dataclasses.asdict(config).items() if name not in own)
    if like and os.path.exists(committed):  # else its baseline is another one
        with open(committed, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["row"] == "erm"]
        names = [name for name in results["targets"] if rows and name in rows[0]]
        cells = [f"{name.removeprefix('toy-')} {sum(float(row[name]) for row in rows) / len(rows):.1f}" for name in names]
        if cells:
            print(f"baseline (--method erm), mean of {len(rows)} seeds, not trained now but read from results/toy.csv: "
                  f"{', '.join(cells)}; unseen mean {sum(float(row['unseen']) for row in rows) / len(rows):.1f}")
    if config.method == "ppar":
        print(f"next: the baseline on the same network, with the same flags and `--method erm --out OTHER`, then "
              f"`python evaluate.py {config.out} --compare OTHER --figures`")
    else:
        print(f"next: every term of the theorem for this run, `python evaluate.py --bound {config.out}`")


def main(given):
    """Train, evaluate every target once, write the run folder. Errors of the user end in one sentence and exit status 1."""
    try:
        config, checkpoint = continue_run(given) if "resume" in given else (configure(given), None)
        rank, processes, device = setup_processes(config)
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)  # same seed, same bits; a GPU is asked for speed instead
            torch.utils.deterministic.fill_uninitialized_memory = False  # nobody reads it, and filling it takes time
        module = train(config, checkpoint, rank, processes, device)
        results = evaluate.evaluate_targets(module, config, device, rank, processes, config.figures)
        if rank == 0:
            closing_words(config, results)
    except (RunError, data.DataError, model.ModelError, evaluate.EvaluationError) as error:
        # A loader's process wraps its error into its own traceback; the sentence is the end of it.
        sys.exit(f"error: {str(error).strip().rsplit('DataError: ', 1)[-1]}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error.filename or given.get('out', 'run folder')}: {error.strerror or error}; what was written before stays.")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(GIVEN)
