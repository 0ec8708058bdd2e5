"""evaluate.py: what a trained network is worth on domains that it has never seen: mIoU per target, and how it was taken.

Every pixel of a target is counted once, in one K x K table per data set (rows: truth, columns: prediction), and the
scores are read off that table. So a data set's mIoU is not the mean over its images, every image counts by its labelled
pixels, and memory does not grow with the number of images.

    conf[t, p]    pixels of truth t that were predicted as p; void (255) is not counted
    IoU_c         conf[c, c] / (row sum c + column sum c - conf[c, c])      nan if c is in neither truth nor prediction
    mIoU          mean of IoU_c over the classes that have one
    p(c | x)      ~ p_decoder(c | x) ^ (1 - beta) * p_text(c | x) ^ beta,     p_text = softmax_c(<z, p^O_c> / tau)

A number means nothing without how it was taken, so each result row says it: predictions are scored at the label's own
full size, with which input scale, whole or by windows, with which Mapillary convention, from the last checkpoint.

Shapes
    image   (3, H, W)    CLIP-normalised            pred, label  (H, W) uint8, train ids, 255 = void (labels only)
    prob    (1, K, H, W)                            conf         (K, K) int64

Not here: the figures (figures.py, `--figures`), the terms of the bound (bound.py, `--bound`), training (train.py).
`python evaluate.py RUN` scores a finished run again. Run `python evaluate.py` for a demonstration in seconds.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace


def parser():
    """The command line; None stands for "as the run was configured"."""
    on_off = argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(description="Score a finished run on its unseen targets and write RUN/results.json.",
                                allow_abbrev=False)
    p.add_argument("run", nargs="?", metavar="RUN", help="folder that train.py wrote; none: a demonstration")
    p.add_argument("--targets", nargs="+", metavar="NAME", help="data sets to score (default: those of the run)")
    p.add_argument("--data-root", metavar="D", help="folder with one folder per data set")
    p.add_argument("--scale", type=float, help="resize the input by this factor; scores return to the label's size")
    p.add_argument("--slide", type=int, metavar="PIXELS", help="side of a sliding window (less memory); 0: whole image")
    p.add_argument("--slide-stride", type=int, metavar="PIXELS", help="step of the window (default: 2/3 of --slide)")
    p.add_argument("--flip", action=on_off, default=None, help="average with the mirrored image")
    p.add_argument("--mapillary", choices=("A", "B"), help="Mapillary's 66 ids to 19 classes; A and B do not compare")
    p.add_argument("--holdout", type=int, default=0, metavar="N",
                   help="of a target without a split of its own (gta5, synthia), N evenly spaced pairs; never of a source")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    p.add_argument("--workers", type=int, default=2, help="processes that decode images while the network works")
    p.add_argument("--compare", metavar="RUN", help="a second run, e.g. the baseline: scored beside, drawn beside")
    p.add_argument("--figures", action=on_off, default=False, help="draw the figures too")
    p.add_argument("--bound", action="store_true", help="measure every term of the theorem instead (theory.md)")
    p.add_argument("--images", nargs="+", metavar="FILE", help="segment your own pictures instead, overlays into RUN")
    return p


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a misspelt flag answer at once
    ARGS = parser().parse_args()

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
from prototypes import VisualTextPrototypes

VOID = data.VOID
PROTOCOL = ("mapillary", "scale", "slide", "slide_stride", "flip")  # the flags that a score depends on
CHECKPOINT = "last"  # the rule: never the best on a target, for that would be training on it


class EvaluationError(ValueError):
    """What cannot be scored; the message is one sentence for the user."""


# ------------------------------------------------------------------------------------------------------ counting


def confusion_matrix(pred, label, num_classes):
    """Pixels by (truth, prediction): (K, K) int64, rows truth. Arrays or tensors of any one shape; label 255 is void.

    One count over the 16-bit index 256 * label + pred. 16 bits, because K * label + pred overflows uint8 without a
    word; all 256 x 256 cells, because then void needs no mask (it is row 255) and an id that is no class shows up in
    a row or column where nothing may be. About 10 times as fast as torch.bincount behind a mask.
    """
    pred, label = _ids(pred, "prediction"), _ids(label, "label")
    if pred.shape != label.shape:
        raise EvaluationError(f"a prediction of shape {pred.shape} cannot answer a label of shape {label.shape}.")
    index = label.astype(np.uint16) << 8 | pred
    count = np.bincount(index.ravel(), minlength=1 << 16).reshape(256, 256)
    if (stray := count[:, num_classes:].any(0)).any():
        raise EvaluationError(f"prediction {num_classes + stray.argmax()} is none of the classes 0..{num_classes - 1}.")
    if (stray := count[num_classes:VOID].any(1)).any():
        raise EvaluationError(f"label {num_classes + stray.argmax()} is none of the classes 0..{num_classes - 1} nor "
                              f"void ({VOID}): were raw ids passed in place of train ids?")
    return torch.from_numpy(count[:num_classes, :num_classes].astype(np.int64))


def _ids(array, name):
    """Integers of any type as uint8, so that a -1 or 256 is an error and does not wrap round to a class."""
    array = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iu":
        raise EvaluationError(f"{name} must hold integer class ids, not {array.dtype}.")
    if array.size and not 0 <= array.min() <= array.max() <= 255:
        raise EvaluationError(f"{name} holds ids from {array.min()} to {array.max()}; class ids lie in 0..255.")
    return array.astype(np.uint8)


def iou(conf):
    """IoU of every class, (K,) float64; nan for a class that is in neither truth nor prediction."""
    conf = torch.as_tensor(conf).double()
    hit = conf.diagonal()
    return hit / (conf.sum(0) + conf.sum(1) - hit)  # 0 / 0 = nan: a class that does not occur has no score


def mean_iou(conf):
    """Mean of iou over the classes that have one; a class predicted where it never is counts, with 0."""
    return iou(conf).nanmean().item()


def auroc(score, positive):
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half. Any one shape."""
    score, positive = np.asarray(score, np.float64).ravel(), np.asarray(positive, bool).ravel()
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return math.nan
    _, group, size = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(size) - (size - 1) / 2  # tied scores share the mean of their ranks
    return float((rank[group][positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


# ---------------------------------------------------------------------------------------------------- predicting


def pad(image, multiple):
    """Continue the border pixels to the right and below until both sides are multiples: (B, 3, H, W), any H and W.

    The border's own colours, because a frame of constant grey is an edge that no street has; on two sides only, so
    that pixel (0, 0) stays where it is and scores are cropped back by a slice.
    """
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def make_scorer(net, otp, tau, text_weight=0.0):
    """score(image (B, 3, H, W), any size) -> log-probabilities (B, K, H, W): decoder and text, weighted by beta.

    Mixed before the resize and normalised once after it: the softmax at each pixel takes care of the two constants,
    and nothing but the last two arrays is ever made at full size. beta = 0 is the decoder alone; beta = 1 asks the
    text alone, which on an untrained network is CLIP's zero-shot segmentation.
    """
    if not 0 <= text_weight <= 1:
        raise EvaluationError(f"--text-weight {text_weight}: the weight of the text score lies in [0, 1].")

    @torch.no_grad()
    def score(image):
        training = net.training
        net.eval()
        try:
            padded = pad(image, net.encoder.multiple)
            logits, emb, _ = net(padded)
        finally:
            net.train(training)  # scoring in the middle of training must leave no trace
        logits = logits.float()
        if text_weight:
            text = torch.einsum("bdhw,kd->bkhw", emb.float(), otp.float()) / tau
            text = F.interpolate(text, size=logits.shape[2:], mode="bilinear", align_corners=False)
            logits = (1 - text_weight) * logits + text_weight * text
        logits = F.interpolate(logits, size=padded.shape[2:], mode="bilinear", align_corners=False)
        return logits[..., :image.shape[2], :image.shape[3]].log_softmax(1)

    return score


@torch.no_grad()
def predict(score, image, size, scale=1.0, slide=0, slide_stride=0, flip=False):
    """The class of every pixel, uint8 (H, W) of `size`: image (3, H', W'), score from make_scorer.

    scale         factor on the input; its probabilities are resized to `size`, and only then is the maximum taken
    slide         side of a window; 0 = whole image. Windows lie flush with the border and do not leave the image
    slide_stride  from window to window; 0 = two thirds of it (341 for 512)
    flip          each window is also seen mirrored
    Where several views see a pixel, the mean of their probabilities decides.
    """
    if not scale > 0 or slide < 0 or not 0 <= slide_stride <= slide:
        raise EvaluationError(f"--scale {scale} --slide {slide} --slide-stride {slide_stride}: the scale must be "
                              f"positive, and the stride at most the window, or pixels between windows go unseen.")
    image = image[None]
    if scale != 1:
        resized = [max(1, round(side * scale)) for side in image.shape[2:]]
        image = F.interpolate(image, size=resized, mode="bilinear", align_corners=False, antialias=True)
    height, width = image.shape[2:]
    window_h, window_w = min(slide or height, height), min(slide or width, width)
    stride = slide_stride or max(1, slide * 2 // 3)

    def view(window):
        prob = score(window).exp_()
        return prob.add_(score(window.flip(3)).exp_().flip(3)).div_(2) if flip else prob

    if (window_h, window_w) == (height, width):
        prob = view(image)
    else:  # the only full-size scores are this one sum: memory does not depend on the number of windows
        prob, seen = None, image.new_zeros(height, width)
        for top in _starts(height, window_h, stride):
            for left in _starts(width, window_w, stride):
                here = (..., slice(top, top + window_h), slice(left, left + window_w))
                part = view(image[here])
                prob = part.new_zeros(1, part.shape[1], height, width) if prob is None else prob
                prob[here] += part
                seen[here] += 1
        prob /= seen
    if tuple(prob.shape[2:]) != tuple(size):
        prob = F.interpolate(prob, size=tuple(size), mode="bilinear", align_corners=False)
    return fast_argmax(prob[0]).cpu().numpy()


def _starts(length, window, stride):
    """Where windows begin along one side: every stride, the last one moved back until it ends at the border."""
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def fast_argmax(score):
    """argmax over the classes: (K, H, W) -> uint8 (H, W), the first of equals.

    A running maximum reads memory in order, class plane by class plane, where argmax(0) jumps from plane to plane at
    every pixel. Measured at 19 x 1024 x 2048 on one core, times as fast as argmax(0): max(0) 3.5, argmax of a permuted
    copy 2, this 10. The winner's number only ever rises, so `maximum` stores it and no masked write is needed.
    """
    best, pred = score[0].clone(), torch.zeros(score.shape[1:], dtype=torch.uint8, device=score.device)
    for k in range(1, len(score)):
        torch.maximum(pred, (score[k] > best).to(torch.uint8) * k, out=pred)
        torch.maximum(best, score[k], out=best)  # unlike >, it hands on a nan
    if not best.sum().isfinite():  # one pass where isfinite(best).all() takes three
        raise EvaluationError("the network's scores are not finite: this checkpoint is broken, not a bad segmenter.")
    return pred


class _Pictures(torch.utils.data.Dataset):
    """Items as (image, label). A file that cannot be read comes back as the error, for a worker's own traceback would
    bury the one sentence that the user needs."""

    def __init__(self, items, mapillary):
        self.items, self.mapillary = items, mapillary

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        try:
            image, label = data.load_image(item), data.load_label(item, self.mapillary)
        except data.DataError as error:
            return error
        except Exception as error:
            return data.DataError(f"{item.image} or its label cannot be read ({error}); restore the file.")
        if image.shape[:2] != label.shape:
            return data.DataError(f"{item.label} is {label.shape[1]}x{label.shape[0]} but its image {item.image} is "
                                  f"{image.shape[1]}x{image.shape[0]}: fetch the pair again or remove it.")
        return data.to_tensor(image), torch.from_numpy(label)


def evaluate_dataset(score, items, mapillary="A", scale=1.0, slide=0, slide_stride=0, flip=False, device="cpu",
                     workers=0, progress=True):
    """The confusion matrix (K, K) of one data set. Tables of disjoint item lists add up, on one machine or several.

    A file that cannot be read ends the evaluation: a score that silently skips images is a score on another data set.
    """
    if not items:
        raise EvaluationError("no images to score: the list of items is empty.")
    loader = torch.utils.data.DataLoader(
        _Pictures(items, mapillary), batch_size=None, num_workers=min(workers, len(items)),
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator())  # its own: a loader's seed must not move the global random numbers of training
    conf = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)
    bar = tqdm(zip(items, loader), total=len(items), desc=items[0].dataset, unit="image", disable=not progress)
    try:
        for item, pair in bar:
            if isinstance(pair, Exception):
                raise pair
            image, label = pair
            image = image.to(device, non_blocking=True)
            pred = predict(score, image, label.shape, scale, slide, slide_stride, flip)
            conf += confusion_matrix(pred, label, len(conf))
    except EvaluationError as error:
        raise EvaluationError(f"{item.image}: {error}") from None
    finally:
        bar.close()
        del bar  # ends the workers now; left to the traceback of an error, they would linger for ten seconds
    return conf


# --------------------------------------------------------------------------------------------- a run and its results


def read_checkpoint(run):
    """RUN/last.pt as train.py saved it, a dict on the CPU.

    weights_only: a checkpoint is a pickle, and a pickle may hold code. Here code is refused before any of it runs.
    The check sums in the file are compared first, which torch.load does not: a flipped bit is a wrong weight.
    """
    file = Path(run) / "last.pt"
    if not Path(run).is_dir():
        raise EvaluationError(f"{run}: there is no such run folder; give the one that train.py wrote (--out).")
    if not file.is_file():
        raise EvaluationError(f"{run}: no last.pt in this folder; train.py writes it at its first save.")
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = {"model", "otp", "arch", "config", "step"} - set(state)
    except Exception as error:
        raise EvaluationError(f"{file} is no checkpoint that can be read ({type(error).__name__}): it is damaged or "
                              f"was not written by train.py; nothing in it was executed.") from None
    if missing:
        raise EvaluationError(f"{file} was not written by train.py: it has no {', '.join(sorted(missing))}.")
    return state


def load_run(run, device="cpu"):
    """A run folder -> net, vtp (None if the method has none), otp, config, step, path; frozen, in eval mode."""
    state, path = read_checkpoint(run), Path(run)
    try:
        net = model.SegmentationNet.from_arch(state["arch"])
        net.load_state_dict(state["model"])
        vtp = _build_vtp(state["vtp"]) if state.get("vtp") else None
        otp, config, step = state["otp"].float().to(device), dict(state["config"]), int(state["step"])
    except Exception as error:
        raise EvaluationError(f"{path / 'last.pt'} does not hold the network that it describes "
                              f"({' '.join(str(error).split())[:200]}).") from None
    for module in filter(None, (net, vtp)):
        module.eval().requires_grad_(False).to(device)
    return SimpleNamespace(net=net, vtp=vtp, otp=otp, config=config, step=step, path=path)


def _build_vtp(state):
    """The VTP decoder, its sizes read off its weights: no second place that could disagree with them."""
    width, dim = state["query.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.layers."))
    vtp = VisualTextPrototypes(dim, width=width, layers=layers)
    vtp.load_state_dict(state)
    return vtp


def evaluation_size(config):
    """How the numbers were taken, in words: part of every result row."""
    slide = config.get("slide", 0)
    view = f"slide {slide}/{config.get('slide_stride') or slide * 2 // 3}" if slide else "whole image"
    return (f"label's full size; input scale {float(config.get('scale', 1.0))}, {view}"
            + (", flip averaged" if config.get("flip") else ""))


def write_results(run_folder, confs, config, images=None, step=None):
    """results.json and results.csv from one confusion matrix per data set; returns what is in results.json.

    images  data set -> number of images scored;  step  of the checkpoint, so that an unfinished run is called one
    Per cent throughout; a class that does not occur is null, never 0.
    A data set that the run was trained on may be among confs (its held-out images); it is shown and stays out of
    every mean, for the mean speaks of unseen domains.
    """
    finished = step in (None, config.get("steps"))
    protocol = dict(evaluation_size=evaluation_size(config), mapillary=config.get("mapillary", "A"),
                    checkpoint=CHECKPOINT if finished else f"unfinished, step {step} of {config.get('steps')}")
    targets = {}
    for name, conf in confs.items():
        score = [None if math.isnan(c) else 100 * c for c in (*iou(conf).tolist(), mean_iou(conf))]
        targets[name] = dict(miou=score[-1], unseen=name not in config.get("source", ()),
                             images=(images or {}).get(name), pixels=int(conf.sum()), **protocol,
                             iou=dict(zip(data.CLASSES, score)))
    results = dict(run=Path(run_folder).name, method=config.get("method"), source=list(config.get("source", ())),
                   targets=targets, mean=None, mean_over=[name for name in targets if targets[name]["unseen"]
                                                          and targets[name]["miou"] is not None],
                   mean_rule="mean of the miou of the unseen targets; data sets of the source are left out", **protocol)
    columns = table(results)
    results["mean"] = columns["mean"]["mean"]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["target", "class", "iou", "unseen", "images", *protocol])
    for name, column in columns.items():
        row = targets.get(name, dict(unseen=True, images=None))
        rows.writerows([name, line, value, row["unseen"], row["images"], *protocol.values()]
                       for line, value in column.items())  # None becomes an empty cell
    replace_file(Path(run_folder) / "results.csv", lambda part: part.write_text(text.getvalue()))
    strict = json.dumps(results, indent=2, allow_nan=False)  # NaN is no JSON; half of the world's parsers refuse it
    replace_file(Path(run_folder) / "results.json", lambda part: part.write_text(strict + "\n"))
    return results


def table(results):
    """results -> {column: {line: per cent or None}}: data sets and the mean over unseen ones; 19 classes and the mean.

    The corner, the mean of the means, is the mean of the mIoUs above it and not of the classes beside it: the two
    differ where a class does not occur in every target, and the field reports the first.
    """
    columns = {name: {**row["iou"], "mean": row["miou"]} for name, row in results["targets"].items()}
    unseen = [columns[name] for name in results["mean_over"]]
    columns["mean"] = {line: _mean([column[line] for column in unseen]) for line in (*data.CLASSES, "mean")}
    return columns


def _mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def replace_file(path, write):
    """write(temporary path), then rename: whoever looks sees the old file or the new one, after a crash too."""
    part = Path(path).with_name(f".{os.getpid()}.{Path(path).name}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def print_table(results, compare=None, file=None):
    """The table, and how it was taken. compare: results of a second run; its means and the difference follow."""
    columns = table(results)
    heads = [name + "*" * (name != "mean" and not results["targets"][name]["unseen"]) for name in columns]
    widths = [max(8, len(head) + 2) for head in heads]
    rule = "-" * (14 + sum(widths))

    def line(title, values, form=".1f"):
        cells = ["-" if value is None else value if isinstance(value, str) else format(value, form) for value in values]
        print(f"{title[:13]:14}" + "".join(cell.rjust(width) for cell, width in zip(cells, widths)), file=file)

    line("IoU in %", heads)
    print(rule, file=file)
    for name in (*data.CLASSES, "mean"):
        if name == "mean":
            print(rule, file=file)
        line(name, [column[name] for column in columns.values()])
    if compare:
        means = [column["mean"] for column in columns.values()]
        others = [compare["targets"].get(name, {}).get("miou") for name in results["targets"]]
        unseen = [other for name, other in zip(columns, others) if name in results["mean_over"]]
        others.append(None if None in unseen else _mean(unseen))  # over the same data sets, or not at all
        line(compare["run"], others)
        line("difference", [None if None in pair else pair[0] - pair[1] for pair in zip(means, others)], "+.1f")
    line("images", [str(row["images"] or "-") for row in results["targets"].values()])
    if heads != list(columns):
        print("* a source of this run: not part of the mean over unseen targets", file=file)
    print(f"{results['evaluation_size']}; checkpoint: {results['checkpoint']}; Mapillary convention "
          f"{results['mapillary']}; a class that does not occur (-) is left out of the means", file=file)


def evaluate_targets(run, config, device, rank=0, processes=1, figures=True, compare=None):
    """Score a network on config's targets, print the table, write results and figures into config's `out` folder.

    run      anything with .net .otp .vtp: what load_run returns, or the module that train.py has just trained
    config   dict or dataclass of flags
    compare  a second run (load_run) whose results.json and predictions are shown beside
    Of several processes, each scores its share of the images of every target; the sum of their tables is the table.
    """
    config = dict(config if isinstance(config, dict) else vars(config))
    targets = find_targets(config)
    other = _read_results(compare, config) if compare else None
    score = make_scorer(run.net, run.otp, config["tau"], config.get("text_weight", 0.0))
    confs = {}
    for name, items in targets.items():
        conf = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)
        if mine := items[rank::processes]:
            conf = evaluate_dataset(score, mine, device=device, workers=config.get("workers", 0), progress=rank == 0,
                                    **{key: config[key] for key in PROTOCOL if key in config})
        if processes > 1:
            conf = conf.to(device)  # where the processes' backend can add
            torch.distributed.all_reduce(conf)
        confs[name] = conf.cpu()
    if rank:
        return None
    results = write_results(config["out"], confs, config, {n: len(items) for n, items in targets.items()},
                            getattr(run, "step", None))
    print_table(results, other)
    if figures:
        from figures import draw_figures  # here: it needs this file

        for path in draw_figures(run, config, device, targets, compare):
            print(f"figure: {path}")
    return results


def find_targets(config):
    """Target -> its validation items, all of them before any work: a folder that is missing is missed now."""
    own = config.get("holdout", 0)  # of a source, only what its training left out may be scored
    return {name: data.list_items(name, config["data_root"], "val",
                                  own if name in config["source"] else config.get("holdout_unseen") or own)
            for name in config["targets"]}


def _read_results(run, config):
    """results.json of a run to compare with, if it was taken in the same way as config asks."""
    try:
        results = json.loads((run.path / "results.json").read_text())
        same = (results["evaluation_size"], results["mapillary"]) == (evaluation_size(config), config["mapillary"])
    except (OSError, ValueError, KeyError):
        raise EvaluationError(f"{run.path} has no results.json to compare with: run `python evaluate.py {run.path}` "
                              f"first.") from None
    if not same:
        raise EvaluationError(f"{run.path} was scored otherwise ({results['evaluation_size']}, Mapillary "
                              f"{results['mapillary']}): score it again with the flags that you gave here.")
    return results


# ------------------------------------------------------------------------------------------------ the command line


def main(args):
    """What the command line asks for; a mistake of the user ends in one sentence and exit status 1."""
    given = {key: value for key, value in vars(args).items() if value != parser().get_default(key)}
    if not given:
        return _demo()
    try:
        if args.run is None:
            raise EvaluationError("which run? Give the folder that train.py wrote, before the flags.")
        if args.workers < 0 or args.holdout < 0:
            raise EvaluationError(f"--workers {args.workers} --holdout {args.holdout}: neither can be negative.")
        device = _device(args.device)
        run = load_run(args.run, device)
        flags = ("targets", "data_root", *PROTOCOL)
        config = {**run.config, "out": str(run.path), "workers": args.workers, "holdout_unseen": args.holdout,
                  **{key: getattr(args, key) for key in flags if getattr(args, key) is not None}}
        if args.slide is not None and args.slide_stride is None:
            config["slide_stride"] = 0  # the stride of another window is no default
        if args.bound:
            import bound

            run.config = config
            return bound.measure_run(run, data_root=config["data_root"], device=device)
        if args.images:
            from figures import segment_pictures

            return segment_pictures(run, config, device, args.images)
        evaluate_targets(run, config, device, figures=args.figures,
                         compare=load_run(args.compare, device) if args.compare else None)
    except (EvaluationError, data.DataError, model.ModelError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        sys.exit(f"error: {error.filename or args.run}: {error.strerror or error}; what was written before stays.")


def _device(name):
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if cuda else "cpu"))
        torch.empty(1, device=device)
        assert device.type in ("cpu", "cuda")
    except Exception:
        raise EvaluationError(f"--device {name}: not on this machine; it has cpu{' and cuda' * cuda}.") from None
    return device


def _demo():
    """Two classes and four numbers by hand, then a made-up scorer that windows, mirrors and all must not change."""
    conf = torch.tensor([[93, 1], [4, 2]])
    first, second = iou(conf).tolist()
    print(f"conf {conf.tolist()}: IoU {first:.4f} = 93/98 and {second:.4f} = 2/7, mIoU {mean_iou(conf):.4f}")
    assert abs(mean_iou(conf) - (93 / 98 + 2 / 7) / 2) < 1e-12

    images = [([0, 0, 0, 0], [0, 0, 0, 0]), ([1, 0, 0, 0], [1, 1, 0, VOID])]  # (prediction, label)
    tables = [confusion_matrix(np.array(pred), np.array(label), 2) for pred, label in images]
    apart = sum(mean_iou(table) for table in tables) / 2
    print(f"one table for two images: mIoU {mean_iou(sum(tables)):.3f}; the mean of their mIoUs would say {apart:.3f}")

    image = torch.randn(3, 50, 70, generator=torch.Generator().manual_seed(0))

    def by_colour(image):  # a network that looks at single pixels
        return image.log_softmax(1)

    whole = predict(by_colour, image, (50, 70))
    windows = predict(by_colour, image, (50, 70), slide=32, slide_stride=20, flip=True)
    print(f"whole image and {len(_starts(50, 32, 20)) * len(_starts(70, 32, 20))} mirrored windows agree on "
          f"{100 * (whole == windows).mean():.0f} % of the pixels")
    assert (whole == windows).all() and (whole == image.argmax(0).numpy()).all()


if __name__ == "__main__":
    import evaluate  # once more, under its own name: what figures.py and bound.py raise is then what main expects

    evaluate.main(ARGS)
