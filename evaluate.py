"""evaluate.py: what a trained network is worth on domains that it has never seen: mIoU per target, and how it was taken.

Every pixel of a target is counted once, in one K x K table per data set (rows: truth, columns: prediction), and the
scores are read off that table. So a data set's mIoU is not the mean over its images, every image counts by its labelled
pixels, and memory does not grow with the number of images.

    conf[t, p]    pixels of truth t that were predicted as p; void (255) is not counted
    IoU_c         conf[c, c] / (row sum c + column sum c - conf[c, c])      nan if c is in neither truth nor prediction
    mIoU          mean of IoU_c over the classes that have one
    q(c | x)      ~ q_decoder(c | x) ^ (1 - gamma) * q_text(c | x) ^ gamma,   q_text = softmax_c(<z, p^O_c> / tau)

A number means nothing without how it was taken, so each result row says it: predictions are scored at the label's own
full size, with which input scale, whole or by windows, in which precision and Mapillary convention, from the last checkpoint.

Shapes
    image   (3, H, W)    CLIP-normalised            pred, label  (H, W) uint8, train ids, 255 = void (labels only)
    prob    (1, K, H, W)                            conf         (K, K) int64

Not here: figures (figures.py), the terms of the bound (bound.py), training (train.py).
`python evaluate.py RUN` scores a finished run again; `python evaluate.py` prints
    conf [[93, 1], [4, 2]]: IoU 93/98 and 2/7, mIoU 0.617
    one table for two images: mIoU 0.667; the mean of their mIoUs would say 0.750
    Notice: a data set has one table, so its score is not the mean over its images.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import sys
from pathlib import Path

import checkpoint

PROTOCOL = dict(scale=1.0, size=None, height=0, slide=0, slide_stride=0, flip=False)  # how a score is taken, unless told otherwise
# SYNTHIA draws no terrain, truck and train: the field then reports 16 classes, and 13 without the thin ones. Here is what is left out.
LEFT_OUT = {16: ("terrain", "truck", "train"), 13: ("terrain", "truck", "train", "wall", "fence", "pole")}


def parse(arguments):
    """The command line; None stands for "as the run was configured"."""
    p = checkpoint.run_flags("Score a finished run on its unseen targets: RUN/results.json, or with other flags a file named after them.")
    p.add_argument("--scale", type=float, default=1.0, help="resize the input by this factor; scores return to the label's size")
    p.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="or to this size, e.g. 1024 2048")
    p.add_argument("--height", type=int, default=0, metavar="H", help="or to this height, its proportions kept, e.g. 1536")
    p.add_argument("--slide", type=int, default=0, metavar="PIXELS", help="side of a sliding window (less memory); 0: whole image")
    p.add_argument("--slide-stride", type=int, default=0, metavar="PIXELS", help="step of the window (default: 2/3 of --slide)")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False, help="average with the mirrored image")
    p.add_argument("--mapillary", choices=("A", "B"), help="Mapillary's 66 ids to 19 classes; A and B do not compare")
    p.add_argument("--workers", type=int, default=2, help="processes that decode images while the network works")
    p.add_argument("--compare", metavar="RUN", help="a second run, e.g. the baseline: its scores are shown beside")
    return p.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a misspelt flag answer at once
    ARGS = parse(sys.argv[1:])

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import ppar
from data import VOID, UserError, require
from model import pad


def confusion_matrix(pred, label, num_classes):
    """Pixels by (truth, prediction): (K, K) int64, rows truth. Arrays or tensors of any one shape; label 255 is void.

    One count over the 16-bit index 256 * label + pred. 16 bits, because K * label + pred overflows uint8 without a word; all 256 x 256
    cells, because then void needs no mask (it is row 255) and an id that is no class shows up in a row or column where nothing may be.
    """
    pred, label = _ids(pred), _ids(label)
    require(pred.shape == label.shape, f"a prediction of shape {pred.shape} cannot answer a label of shape {label.shape}.")
    index = label.astype(np.uint16) << 8 | pred
    count = np.bincount(index.ravel(), minlength=1 << 16).reshape(256, 256)
    for name, stray in (("prediction", count[:, num_classes:].any(0)), ("label", count[num_classes:VOID].any(1))):
        if stray.any():
            raise UserError(f"{name} {num_classes + stray.argmax()} is none of the classes 0..{num_classes - 1} (and "
                            f"only a label may be void, {VOID}): were raw ids passed in place of train ids?")
    return torch.from_numpy(count[:num_classes, :num_classes].astype(np.int64))


def _ids(array):
    """Integers of any type as uint8, so that a -1 or 256 is an error and does not wrap round to a class."""
    array = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    low, high = array.min(initial=0), array.max(initial=0)
    require(array.dtype.kind in "iu" and low >= 0 and high <= 255, f"class ids are integers in 0..255, not {array.dtype} in {low}..{high}.")
    return array.astype(np.uint8, copy=False)


def iou(conf):
    """IoU of every class, (K,) float64; nan for a class that is in neither truth nor prediction."""
    conf = torch.as_tensor(conf).double()
    hit = conf.diagonal()
    return hit / (conf.sum(0) + conf.sum(1) - hit)  # 0 / 0 = nan: a class that does not occur has no score


def mean_iou(conf):
    """Mean of iou over the classes that have one; a class predicted where it never is counts, with 0."""
    return iou(conf).nanmean().item()


def make_scorer(module, config):
    """score(image (B, 3, H, W), any size) -> log-probabilities (B, K, H, W), from a ppar.PPAR and its flags."""
    torch.backends.cudnn.benchmark = False  # pictures have many sizes
    _, autocast, layout = checkpoint.precision(config.amp, module.otp.device)
    net = module.net.to(memory_format=layout)

    @torch.no_grad()
    def score(image):
        padded = pad(image, net.encoder.multiple).contiguous(memory_format=layout)
        with autocast():
            out = net(padded)
        logits = ppar.prediction(out.logits, out.emb, module.otp, tau=config.tau, text_weight=config.text_weight)
        logits = logits.contiguous()  # in channels_last, a softmax over classes copies it all
        logits = F.interpolate(logits, size=padded.shape[2:], mode="bilinear", align_corners=False)
        return logits[..., :image.shape[2], :image.shape[3]].log_softmax(1)

    return score


def predict(score, image, shape, scale=1.0, size=None, height=0, slide=0, slide_stride=0, flip=False):
    """The class of every pixel, uint8 (H, W) of `shape`: image (3, H', W'), score from make_scorer.

    scale         factor on the input; its probabilities are resized to `shape`, and only then is the maximum taken
    size, height  or the size that the input is brought to, or its height alone
    slide         side of a window; 0 = whole image. Windows lie flush with the border and do not leave the image
    slide_stride  from window to window; 0 = two thirds of it (341 for 512)
    flip          each window is also seen mirrored
    Where several views see a pixel, the mean of their probabilities decides.
    """
    require(0 < scale < math.inf and min(size or (1,)) > 0 and height >= 0 and slide >= 0 and 0 <= slide_stride <= slide,
            f"--scale {scale} --size {size} --height {height} --slide {slide} --slide-stride {slide_stride}: the input must have a "
            f"positive size, and the stride be at most the window, or pixels between windows go unseen.")
    require((scale != 1) + bool(size) + bool(height) <= 1, "--scale, --size and --height say the same thing in three ways: give one.")
    image, factor = image[None], height / image.shape[1] if height else scale
    resized = size or [max(1, round(side * factor)) for side in image.shape[2:]]
    if tuple(resized) != tuple(image.shape[2:]):
        image = F.interpolate(image, size=resized, mode="bilinear", align_corners=False, antialias=True)
    height, width = image.shape[2:]
    window = min(slide or height, height), min(slide or width, width)
    stride = slide_stride or max(1, slide * 2 // 3)
    prob, seen = None, image.new_zeros(height, width)
    for here in _windows((height, width), window, stride):
        part = score(image[here]).exp_()
        if flip:
            part.add_(score(image[here].flip(3)).exp_().flip(3)).div_(2)
        # The only full-size scores are one sum: memory does not depend on the number of windows.
        prob = part.new_zeros(1, part.shape[1], height, width) if prob is None else prob
        prob[here] += part
        seen[here] += 1
    prob /= seen
    if tuple(prob.shape[2:]) != tuple(shape):
        prob = F.interpolate(prob, size=tuple(shape), mode="bilinear", align_corners=False)
    best, pred = prob[0].max(dim=0)
    require(best.sum().isfinite(),  # max hands on a nan
            "the network's scores are not finite: this checkpoint is broken, not a bad segmenter; train it again.")
    return pred.byte().cpu().numpy()


def _windows(size, window, stride):
    """Slices of windows that cover the image: every stride, the last one moved back until it ends at the border."""
    rows, columns = ([min(start, length - side) for start in range(0, length - side + stride, stride)]
                     for length, side in zip(size, window))
    return [(..., slice(top, top + window[0]), slice(left, left + window[1])) for top in rows for left in columns]


def _load(mapillary, item):
    image, label = data.load_pair(item, mapillary)
    return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(label)  # bytes: normalised on the device


def evaluate_dataset(score, items, mapillary="A", protocol=PROTOCOL, device="cpu", workers=0, title=None):
    """The confusion matrix (K, K) of a list of items. Tables of disjoint lists add up, on one machine or several.

    A file that cannot be read ends the evaluation: a score that silently skips images is a score on another data set.
    """
    # A generator of its own: a loader's seed must not move the global random numbers of training.
    room = data.shared_memory() // (3 * 4 * 24 * 2 ** 20)  # each process keeps two pictures ready, of up to 24 megapixels
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, collate_fn=functools.partial(_load, mapillary), generator=torch.Generator(),
        num_workers=int(min(workers, len(items), room)), pin_memory=torch.device(device).type == "cuda")
    conf = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)
    for image, label in tqdm(loader, title, unit="image", disable=not title):
        pred = predict(score, data.normalise(image.to(device, non_blocking=True)), label.shape, **protocol)
        conf += confusion_matrix(pred, label, len(conf))
    return conf


def evaluation_size(protocol):
    """Size, windows and views of a protocol in words."""
    (slide, size, height), scale = (protocol.get(name) for name in ("slide", "size", "height")), float(protocol["scale"])
    seen = f"{size[0]} x {size[1]}" if size else f"height {height}" if height else f"scale {scale}"
    view = f"slide {slide}/{protocol['slide_stride'] or slide * 2 // 3}" if slide else "whole image"
    return f"label's full size; input {seen}, {view}" + ", flip averaged" * protocol["flip"]


def how_taken(run, protocol):
    """What two scores must share to be compared, in words: part of every result row."""
    return dict(evaluation_size=evaluation_size(protocol), mapillary=run.config.mapillary,
                precision=checkpoint.precision(run.config.amp, run.ppar.otp.device)[0])


def file_name(args):
    """`results`, and the flags that make a score another one than the training's, which stays in results.json."""
    own, words = parse([]), ["results"]
    for name in (*PROTOCOL, "targets", "mapillary", "holdout"):
        if (value := getattr(args, name)) != getattr(own, name):
            words += [name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value] * (value is not True))]
    return "-".join(words)


def write_results(run, confs, images, protocol=PROTOCOL, name="results"):
    """NAME.json and NAME.csv from the confusion matrix and the number of images of each data set -> what is in the first.

    Per cent throughout; a class that does not occur is null, never 0. A data set that the run was trained on may be
    among confs (its held-out images); it is shown and stays out of the mean, for the mean speaks of unseen domains.
    """
    config = run.config
    taken = dict(how_taken(run, protocol),
                 # never the best on a target, for that would be training on it
                 checkpoint="last" if run.step == config.steps else f"unfinished, step {run.step} of {config.steps}")
    targets, fewer = {}, LEFT_OUT if "synthia" in config.source else {}
    for target, conf in confs.items():
        score = [None if math.isnan(c) else 100 * c for c in (*iou(conf).tolist(), mean_iou(conf))]
        row = targets[target] = dict(miou=score[-1], unseen=target not in config.source, images=images[target],
                                     pixels=int(conf.sum()), **taken, iou=dict(zip(data.CLASSES, score)))
        row.update({f"miou_{n}": _mean(row["iou"][c] for c in data.CLASSES if c not in out) for n, out in fewer.items()})
    unseen = [target for target, row in targets.items() if row["unseen"] and row["miou"] is not None]
    results = dict(run=run.path.name, method=config.method, source=list(config.source), targets=targets,
                   mean=_mean(targets[target]["miou"] for target in unseen), mean_over=unseen,
                   mean_rule="mean of the miou of the unseen targets; data sets of the source are left out", **taken)

    heads = ["miou", *(f"miou_{n}" for n in fewer), "unseen", "images", *taken]
    lines = [["target", *heads, *data.CLASSES]]
    lines += [[target, *(row[head] for head in heads), *row["iou"].values()] for target, row in targets.items()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)  # None becomes an empty cell
    checkpoint.write_atomically(run.path / f"{name}.csv", lambda file: file.write(text.getvalue().encode()))
    checkpoint.write_json(run.path / f"{name}.json", results)
    return results


def _mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def print_table(results, compare=None):
    """Classes by data sets and the mean over the unseen ones. compare: results of a second run; its means and the difference follow.

    The corner, the mean of the means, is the mean of the mIoUs beside it and not of the classes above it: the two
    differ where a class does not occur in every target, and the field reports the first.
    """
    targets, unseen = results["targets"], results["mean_over"]
    columns = {name: {**row["iou"], "mean": row["miou"]} | {f"mean of {n}": row[f"miou_{n}"] for n in LEFT_OUT if f"miou_{n}" in row}
               for name, row in targets.items()}
    lines = [*columns[next(iter(targets))]]
    columns["mean"] = {line: _mean(columns[name][line] for name in unseen) for line in lines}
    heads = [*(name if row["unseen"] else name + "*" for name, row in targets.items()), "mean"]
    widths = [max(8, len(head) + 2) for head in heads]

    def line(title, values, form=".1f"):
        cells = ["-" if value is None else value if isinstance(value, str) else format(value, form) for value in values]
        print(f"{title[:13]:14}" + "".join(cell.rjust(width) for cell, width in zip(cells, widths)))

    line("IoU in %", heads)
    for name in lines:
        if name in (data.CLASSES[0], "mean"):
            print("-" * (14 + sum(widths)))
        line(name, [column[name] for column in columns.values()])
    if compare:
        known = compare["targets"]  # a score of other images is none, and a mean without it neither
        other = {name: known[name]["miou"] if known.get(name, {}).get("images") == row["images"] else None for name, row in targets.items()}
        same = set(unseen) <= set(compare["mean_over"]) and None not in [other[name] for name in unseen]
        other["mean"] = _mean(other[name] for name in unseen) if same else None
        pairs = [(columns[name]["mean"], other[name]) for name in columns]
        line(compare["run"], other.values())
        line("difference", [None if None in pair else pair[0] - pair[1] for pair in pairs], "+.1f")
    line("images", [str(row["images"]) for row in targets.values()])
    if not all(row["unseen"] for row in targets.values()):
        print("* a source of this run: not part of the mean over unseen targets")
    print(f"{results['evaluation_size']}, {results['precision']}; checkpoint: {results['checkpoint']}; Mapillary convention "
          f"{results['mapillary']}; a class that does not occur (-) is left out of the means")


def evaluate_targets(run, protocol=PROTOCOL, rank=0, processes=1, compare=None, name="results"):
    """Score a checkpoint.Run on its targets, print the table, write results into its folder -> what results.json holds.

    compare  folder of a second run, whose file of this name is shown beside
    Of several processes, each scores its share of the images of every target; the sum of their tables is the table.
    """
    config, device, targets = run.config, run.ppar.otp.device, find_targets(run)
    other = _read_results(compare, how_taken(run, protocol), name) if compare else None
    score, confs = make_scorer(run.ppar, config), {}
    for target, items in targets.items():
        mine, title = items[rank::processes], None if rank else target
        conf = evaluate_dataset(score, mine, config.mapillary, protocol, device, config.workers, title)
        if processes > 1:
            torch.distributed.all_reduce(conf := conf.to(device))  # where the processes' backend can add
        confs[target] = conf.cpu()
    if rank:
        return None
    results = write_results(run, confs, {target: len(items) for target, items in targets.items()}, protocol, name)
    print_table(results, other)
    return results


def find_targets(run):
    """Target -> its validation items, all of them before any work: a folder that is missing is missed now."""
    config, targets = run.config, {}
    for name in config.targets:
        holdout = getattr(config, "holdout_unseen", 0) or config.holdout
        if name in config.source:  # of a source, only what its training left out may be scored
            holdout = config.holdout
        withheld = run.withheld.get(name)  # the names, for the files may have changed since
        targets[name] = data.list_items(name, config.data_root, "val", holdout, withheld=withheld)
    return targets


def _read_results(run, taken, name):
    """NAME.json of a run to compare with, if it was taken in the same way."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        results = json.loads((Path(run) / f"{name}.json").read_text())
        if {key: results[key] for key in taken} == taken and {"run", "targets", "mean_over"} <= set(results):
            return results
    raise UserError(f"{run} has no {name}.json that was taken in this way ({taken['evaluation_size']}; Mapillary "
                    f"{taken['mapillary']}; {taken['precision']}): run `python evaluate.py {run}` with the flags of here.")


def main(args):
    """Score a finished run; without arguments, the demonstration."""
    if args == parse([]):
        return _demo()
    with checkpoint.one_sentence(args.run):
        protocol = {name: getattr(args, name) for name in PROTOCOL}
        evaluate_targets(checkpoint.open_run(args), protocol, compare=args.compare, name=file_name(args))


def _demo():
    conf = torch.tensor([[93, 1], [4, 2]])
    print(f"conf {conf.tolist()}: IoU 93/98 and 2/7, mIoU {mean_iou(conf):.3f}")
    assert abs(mean_iou(conf) - (93 / 98 + 2 / 7) / 2) < 1e-12
    images = [([0, 0, 0, 0], [0, 0, 0, 0]), ([1, 0, 0, 0], [1, 1, 0, VOID])]  # (prediction, label)
    tables = [confusion_matrix(pred, label, 2) for pred, label in images]
    apart = sum(mean_iou(table) for table in tables) / 2
    print(f"one table for two images: mIoU {mean_iou(sum(tables)):.3f}; the mean of their mIoUs would say {apart:.3f}")
    print("Notice: a data set has one table, so its score is not the mean over its images.")


if __name__ == "__main__":
    main(ARGS)
