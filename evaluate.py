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

    windows    A ResNet sees the whole picture. A ViT sees windows of its training size: attention compares every patch
               with every other, so a picture of 12 megapixels at once would cost eight times as much, at a size never seen.
    in turn    The device works on one picture, the host counts the one before, and other processes decode the next ones.
    on disk    The results are written after every target. One that cannot be scored costs its own score alone.

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
import gc
import io
import json
import math
import sys
from pathlib import Path

import checkpoint
import machine

# How a score is taken, unless told otherwise. The flags of the same names are defined in checkpoint.py.
PROTOCOL = {name: flag.default for name, flag in checkpoint.PROTOCOL.items()} | dict(slide=0)
INPUT_SIZE = ("scale", "size", "height")  # three ways to say one thing
# Pixels that go through the network at once, where a GPU takes several windows of one picture: eight of 512 x 512.
AT_ONCE = 8 * 512 ** 2
# SYNTHIA draws no terrain, truck and train: the field then reports 16 classes, and 13 without the thin ones. Here is what is left out.
LEFT_OUT = {16: ("terrain", "truck", "train"), 13: ("terrain", "truck", "train", "wall", "fence", "pole")}


def parse(arguments):
    """The command line; None stands for "as the run was configured"."""
    p = checkpoint.run_flags("Score a finished run on its unseen targets: RUN/results.json, or with other flags a file named after them.")
    for name, flag in checkpoint.PROTOCOL.items():
        word, text = "--" + name.replace("_", "-"), flag.help.removeprefix("evaluation: ") + " (default: the run's own)"
        if flag.kind is bool:
            p.add_argument(word, action=argparse.BooleanOptionalAction, help=text)
        elif name == "size":
            p.add_argument(word, type=flag.kind, nargs=2, metavar=("H", "W"), help=text)
        else:
            p.add_argument(word, type=flag.kind, help=text)
    p.add_argument("--mapillary", choices=("A", "B"), help="Mapillary's 66 ids to 19 classes; A and B do not compare")
    p.add_argument("--workers", type=int, default=machine.LOADERS,
                   help=f"processes that decode images while the network works (default: {machine.LOADERS}, the cores that are here)")
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

    One count over the index 256 * label + pred. Not in 8 bits, where K * label + pred overflows without a word. All 256 x 256
    cells are counted. So void needs no mask (it is row 255), and an id that is no class shows up where nothing may be.
    """
    pred, label = _ids(pred), _ids(label)
    require(pred.shape == label.shape, f"a prediction of shape {pred.shape} cannot answer a label of shape {label.shape}.")
    pred, label = pred.ravel(), label.ravel()
    count = np.zeros(1 << 16, np.int64)
    for start in range(0, len(pred), 1 << 18):  # in parts that stay in the processor's cache: 0.63 of the time
        part = slice(start, start + (1 << 18))
        index = label[part].astype(np.intp) << 8 | pred[part]  # intp, or bincount would make a copy of this type
        count += np.bincount(index, minlength=1 << 16)
    count = count.reshape(256, 256)
    for name, stray in (("prediction", count[:, num_classes:].any(0)), ("label", count[num_classes:VOID].any(1))):
        if stray.any():
            raise UserError(f"{name} {num_classes + stray.argmax()} is none of the classes 0..{num_classes - 1} (and "
                            f"only a label may be void, {VOID}): were raw ids passed in place of train ids?")
    return torch.from_numpy(count[:num_classes, :num_classes].copy())


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
    _, autocast, layout = machine.precision(config.amp, module.otp.device)
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


def make_look(module, config):
    """look(image (3, H, W), label (H, W)) -> what ppar.look says, in the precision and memory layout of the run's scores."""
    _, autocast, layout = machine.precision(config.amp, module.otp.device)
    module.to(memory_format=layout)

    def look(image, label):
        with autocast():
            return ppar.look(module, image, label)

    return look


def protocol_of(run, given=None):
    """How a run is scored: its own flags, replaced by those that are given -> a dict with the keys of PROTOCOL.

    given   {flag: value}, None where a flag is not given. A checkpoint of before these flags has their defaults.
    Where nothing says a window, a ViT has windows of its training crop and a ResNet none.
    """
    protocol = {name: getattr(run.config, name, flag.default) for name, flag in checkpoint.PROTOCOL.items()}
    given = {name: value for name, value in (given or {}).items() if value is not None}
    if set(INPUT_SIZE) & set(given):  # --height on a run of --scale 0.5 takes the place of --scale
        protocol.update((name, PROTOCOL[name]) for name in INPUT_SIZE)
    if "slide" in given:  # another window has its own stride
        protocol["slide_stride"] = 0
    protocol.update(given)
    if protocol["slide"] is None:
        is_vit = run.ppar.net.arch["visual"]["kind"] == "vit"
        protocol["slide"] = getattr(run.config, "crop", 0) if is_vit else 0
    checkpoint.check_protocol(**protocol)
    return protocol


def predict(score, image, shape, scale=1.0, size=None, height=0, slide=0, slide_stride=0, flip=False, together=None):
    """The class of every pixel, uint8 (H, W) of `shape`: image (3, H', W'), score from make_scorer.

    scale         factor on the input; its probabilities are resized to `shape`, and only then is the maximum taken
    size, height  or the size that the input is brought to, or its height alone
    slide         side of a window; 0 = whole image. Windows lie flush with the border and do not leave the image
    slide_stride  from window to window; 0 = two thirds of it (341 for 512)
    flip          each window is also seen mirrored
    together      windows that go through the network at once. None: on a GPU as many as have AT_ONCE pixels, else one
    Where several views see a pixel, the mean of their probabilities decides.
    """
    return _start_prediction(score, image, shape, scale, size, height, slide, slide_stride, flip, together)()


def _start_prediction(score, image, shape, scale=1.0, size=None, height=0, slide=0, slide_stride=0, flip=False, together=None):
    """As predict, but -> a function that waits for the prediction and returns it.

    A GPU has only been told what to do when this returns. The host is free to do other work until it calls the function.
    """
    checkpoint.check_protocol(scale, size, height, slide, slide_stride)
    image, factor = image[None], height / image.shape[1] if height else scale
    resized = size or [max(1, round(side * factor)) for side in image.shape[2:]]
    if tuple(resized) != tuple(image.shape[2:]):
        image = F.interpolate(image, size=tuple(resized), mode="bilinear", align_corners=False, antialias=True)
    height, width = image.shape[2:]
    window = min(slide or height, height), min(slide or width, width)
    stride = slide_stride or max(1, slide * 2 // 3)
    windows = _windows((height, width), window, stride)
    if together is None:  # a CPU gains nothing by several at once
        together = max(1, AT_ONCE // (window[0] * window[1])) if image.is_cuda else 1
    prob, seen = None, image.new_zeros(height, width)
    for first in range(0, len(windows), together):
        group = windows[first:first + together]
        # A batch is a copy. One window alone is a view: the whole picture is not held twice.
        views = torch.cat([image[here] for here in group]) if len(group) > 1 else image[group[0]]
        parts = score(views).exp_()
        if flip:
            parts.add_(score(views.flip(3)).exp_().flip(3)).div_(2)
        if prob is None:
            # The only full-size scores are one sum: memory does not depend on the number of windows.
            prob = parts.new_zeros(1, parts.shape[1], height, width)
        for here, part in zip(group, parts):
            prob[here] += part
            seen[here] += 1
    del views, parts, part  # as large as the sum, where the picture is seen as a whole
    prob /= seen
    if tuple(prob.shape[2:]) != tuple(shape):
        prob = F.interpolate(prob, size=tuple(shape), mode="bilinear", align_corners=False)
    best, pred = prob[0].max(dim=0)
    return _fetch(pred.byte(), best.sum().isfinite())  # max hands on a nan


def _fetch(pred, finite):
    """Two tensors on their way to the host -> a function that waits for them and returns pred as an array."""
    arrived = None
    if pred.is_cuda:
        # Without non_blocking, each copy would make the host wait for all that the GPU has still to do.
        stream = torch.cuda.current_stream(pred.device)
        pred, finite = pred.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)
        arrived = stream.record_event()

    def wait():
        if arrived is not None:
            arrived.synchronize()
        require(finite.item(), "the network's scores are not finite: this checkpoint is broken, not a bad segmenter; train it again.")
        return pred.cpu().numpy()

    return wait


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
    room = data.shared_memory() // (3 * 4 * 24 * 2 ** 20)  # each process keeps two pictures ready, of up to 24 megapixels
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, collate_fn=functools.partial(_load, mapillary),
        generator=torch.Generator(),  # of its own: a loader's seed must not move the global random numbers of training
        num_workers=int(min(workers, len(items), room)), pin_memory=torch.device(device).type == "cuda")
    conf = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)

    def count(pred, label):
        conf.add_(confusion_matrix(pred(), label, len(conf)))

    before = None  # the picture before this one: its prediction, which a GPU may still be working on, and its label
    for image, label in tqdm(loader, title, unit="image", disable=not title):
        pred = _start_prediction(score, data.normalise(image.to(device, non_blocking=True)), label.shape, **protocol)
        if before:
            count(*before)  # the GPU works on this picture meanwhile
        before = pred, label
    if before:
        count(*before)
    return conf


def evaluation_size(protocol):
    """Size, windows and views of a protocol in words."""
    slide, size, height = (protocol.get(name) for name in ("slide", "size", "height"))
    seen = f"{size[0]} x {size[1]}" if size else f"height {height}" if height else f"scale {float(protocol['scale'])}"
    view = f"slide {slide}/{protocol['slide_stride'] or slide * 2 // 3}" if slide else "whole image"
    return f"label's full size; input {seen}, {view}" + ", flip averaged" * protocol["flip"]


def how_taken(run, protocol):
    """What two scores must share to be compared, in words: part of every result row."""
    return dict(evaluation_size=evaluation_size(protocol), mapillary=run.config.mapillary,
                precision=machine.precision(run.config.amp, run.ppar.otp.device)[0])


def file_name(run, args):
    """Where the scores go: `results` if they are taken as the closing evaluation of the run takes them, else `results-FLAGS`.

    args   what parse returned. Flags that say what the run does anyway do not change the name.
    """
    given = {name: getattr(args, name) for name in PROTOCOL}
    changed = protocol_of(run, given) != protocol_of(run)
    flags = {name: value for name, value in given.items() if value is not None and changed}
    flags.update((name, getattr(args, name)) for name in ("targets", "mapillary") if getattr(args, name) is not None)
    if args.holdout:
        flags["holdout"] = args.holdout
    words = ["results"]
    for name, value in flags.items():
        words.append("no-" * (value is False) + name.replace("_", "-"))
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return "-".join(words)


def summarise(run, confs, images, protocol=PROTOCOL, not_scored=()):
    """What NAME.json holds, a dict, from the confusion matrix and the number of images of each data set.

    Per cent throughout; a class that does not occur is null, never 0. A data set that the run was trained on may be
    among confs (its held-out images); it is shown and stays out of the mean, for the mean speaks of unseen domains.
    not_scored   targets that have no score yet, or could not get one. While there are any, there is no mean: it would
                 be one over other targets than a reader takes it for.
    """
    config = run.config
    taken = dict(how_taken(run, protocol), checkpoint=_which_checkpoint(run))
    targets, fewer = {}, LEFT_OUT if "synthia" in config.source else {}
    for target, conf in confs.items():
        score = [None if math.isnan(c) else 100 * c for c in (*iou(conf).tolist(), mean_iou(conf))]
        row = targets[target] = dict(miou=score[-1], unseen=target not in config.source, images=images[target],
                                     pixels=int(conf.sum()), **taken, iou=dict(zip(data.CLASSES, score)))
        row.update({f"miou_{n}": _mean(row["iou"][c] for c in data.CLASSES if c not in out) for n, out in fewer.items()})
    mean_over = [target for target, row in targets.items() if row["unseen"] and row["miou"] is not None and not not_scored]
    return dict(run=run.path.name, method=config.method, source=list(config.source), targets=targets, not_scored=list(not_scored),
                mean=_mean(targets[target]["miou"] for target in mean_over), mean_over=mean_over,
                mean_rule="mean of the miou of the unseen targets; data sets of the source are left out; none before all targets "
                          "are scored", **taken)


def _which_checkpoint(run):
    """Never the best one on a target, for that would be training on it."""
    return "last" if run.step == run.config.steps else f"unfinished, step {run.step} of {run.config.steps}"


def write_results(run, confs, images, protocol=PROTOCOL, name="results", not_scored=()):
    """NAME.json and NAME.csv of what `summarise` says -> that. A target without a score is a row of empty cells in the second."""
    results = summarise(run, confs, images, protocol, not_scored)
    rows = results["targets"]
    first = next(iter(rows.values()))
    heads = [key for key in first if key not in ("iou", "pixels") and not key.startswith("miou_")]
    heads[1:1] = [key for key in first if key.startswith("miou_")]
    lines = [["target", *heads, *data.CLASSES]]
    lines += [[target, *(row[head] for head in heads), *row["iou"].values()] for target, row in rows.items()]
    lines += [[target, *[None] * (len(lines[0]) - 1)] for target in not_scored]
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
    targets, unseen = results["targets"], results["mean_over"]  # empty where a target has no score
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
    if results["not_scored"]:
        print(f"not scored: {', '.join(results['not_scored'])}; so there is no mean over the targets")
    if not all(row["unseen"] for row in targets.values()):
        print("* a source of this run: not part of the mean over unseen targets")
    print(f"{results['evaluation_size']}, {results['precision']}; checkpoint: {results['checkpoint']}; Mapillary convention "
          f"{results['mapillary']}; a class that does not occur (-) is left out of the means")


def evaluate_targets(run, protocol=None, rank=0, processes=1, compare=None, name="results"):
    """Score a checkpoint.Run on its targets, print the table, write results into its folder -> what results.json holds.

    protocol  a dict like PROTOCOL; None: the run's own
    compare   folder of a second run, whose file of this name is shown beside
    Of several processes, each scores its share of the images of every target; the sum of their tables is the table.
    The files are written after every target. A target with a broken file, or too large for the memory, gets no score; the
    others get theirs, and a UserError at the end names it. Ctrl-C and SIGTERM end in a UserError, too.
    """
    targets, protocol = find_targets(run), protocol or protocol_of(run)
    other = _read_results(compare, how_taken(run, protocol), name) if compare else None
    images = {target: len(items) for target, items in targets.items()}
    score, file = make_scorer(run.ppar, run.config), run.path / f"{name}.json"
    # Scores of before, of this very network and taken in this way, are as good as new ones: they stay until all are there.
    before = _is_whole(file, dict(how_taken(run, protocol), checkpoint=_which_checkpoint(run)))
    confs, problems, results = {}, {}, None

    def kept():
        if before:
            return f"{file} keeps the complete scores of before"
        return f"{file} keeps the scores of {', '.join(confs)}, without a mean" if confs else "no target was scored"

    again = f"score all targets with `python evaluate.py {run.path}`, then draw with `python figures.py {run.path}`."
    with machine.stop_with(lambda: f"{kept()}; {again}"):
        for target, items in targets.items():
            conf, problem = _score_target(run, score, target, items, protocol, rank, processes)
            if problem:
                problems[target] = problem
            else:
                confs[target] = conf
            missing = [other for other in targets if other not in confs]
            if rank == 0 and confs and not (before and missing):
                write_results(run, confs, images, protocol, name, missing)
    if rank:
        return None
    if confs:
        results = summarise(run, confs, images, protocol, list(problems))
        print_table(results, other)
    told = " ".join(f"{target}: {problem}" for target, problem in problems.items())
    require(not problems, f"{len(problems)} of {len(targets)} targets could not be scored. {told} {kept()[0].upper()}{kept()[1:]}. "
                          f"When that is mended, {again}")
    return results


def _score_target(run, score, target, items, protocol, rank, processes):
    """(confusion matrix over all processes, "") of a target, or (None, the sentence that says why it has none)."""
    conf, problem = None, ""
    smaller = f"python evaluate.py {run.path} --slide {max(32, protocol['slide'] // 2) if protocol['slide'] else 512}"
    remedy = f"score by smaller windows (`{smaller}`) or a smaller input (--size H W); this was {evaluation_size(protocol)}"
    try:
        with machine.say_why(remedy):
            conf = evaluate_dataset(score, items[rank::processes], run.config.mapillary, protocol, run.ppar.otp.device,
                                    run.config.workers, None if rank else target)
    except UserError as error:
        problem = checkpoint.sentence(error)
    if problem:
        gc.collect()  # the error's traceback holds the loader's processes and the device's memory: the next target needs both
    if processes > 1:  # a process that has a problem must come here, too, or the others would wait for ever
        told = [None] * processes
        torch.distributed.all_gather_object(told, (conf, problem))
        problem = next((problem for _, problem in told if problem), "")
        conf = None if problem else sum(conf for conf, _ in told)
    return conf, problem


def _is_whole(file, taken):
    """Whether a results file has a score for all of its targets, taken in this way."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        results = json.loads(file.read_text())
        return not results.get("not_scored") and bool(results["targets"]) and {key: results[key] for key in taken} == taken
    return False


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
        run = checkpoint.open_run(args)
        protocol = protocol_of(run, {name: getattr(args, name) for name in PROTOCOL})
        evaluate_targets(run, protocol, compare=args.compare, name=file_name(run, args))


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
