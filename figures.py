"""figures.py: what a trained network sees, as pictures: files in the folder of its run.

A table says how much; a figure says what. Each of them asks one question of the method:

    predictions_TARGET.png   image, truth, prediction (beside a second run's), omega of Eq. 5        where does it fail?
    reliability.png          omega and w of Eq. 6 beside the pixels that really are harmful          does it find them?
    embedding.png            pixels and prototypes in two dimensions, before and after training      did they meet?
    curves.png               distance and loss to OTP and VTP over training, with lambda of Eq. 4    which goal is easy?
    overlay_NAME.png         the prediction laid over a picture of the user's own

    python figures.py RUN --compare RUN2                              of a finished run, beside another
    python figures.py RUN --images a.jpg b.png                        your own pictures
    python figures.py --gallery FILE.png                              the drawn domains, scenes beside their labels

Shapes
    image   (H, W, 3) uint8     label, pred   (H, W) uint8, train ids, 255 = void     omega   (H, W) in [0, 1]

Not here: scores (evaluate.py), the figure of the bound (bound.py). Run `python figures.py` for a demonstration in seconds.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import checkpoint


def parse(arguments):
    """The command line."""
    p = checkpoint.run_flags("Draw the figures of a finished run into its folder.")
    p.add_argument("--compare", metavar="RUN", help="a second run, e.g. the baseline: its predictions are drawn beside")
    p.add_argument("--images", nargs="+", metavar="FILE", help="segment your own pictures instead, overlays into RUN")
    p.add_argument("--gallery", metavar="FILE.png", help="draw the domains of the drawn world instead; needs no RUN")
    return p.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a misspelt flag answer at once
    ARGS = parse(sys.argv[1:])

import numpy as np
from PIL import Image, ImageOps

import data
import ppar
import reweight
import toy
from data import VOID, UserError, colours
from evaluate import find_targets, make_scorer, predict
from model import SegmentationNet, load_clip

SCENES = 64  # drawn training scenes on which reliability is scored; about 6 of them harmful by default
DPI = 150  # readable on a screen and in print


def _figure(width, height):
    from matplotlib.figure import Figure  # here: a second of import that most runs of this file do not need
    return Figure(figsize=(width, height), layout="constrained")  # no pyplot: no window, no global state


def _finish(fig, path, classes=(*range(len(data.CLASSES)), VOID)):
    """Legend of the classes, then the file, whole or not at all."""
    from matplotlib.patches import Patch
    patches = [Patch(fc=colours(c) / 255, ec="black", lw=0.4, label="void" if c == VOID else data.CLASSES[c])
               for c in classes]
    if patches:
        fig.legend(handles=patches, loc="outside lower center", ncols=min(10, int(1.1 * fig.get_figwidth())),
                   frameon=False, fontsize=8, handlelength=1.2)
    checkpoint.write_atomically(path, lambda file: fig.savefig(file, dpi=DPI, format="png"))
    return path


def figure_predictions(path, rows, title="", inches=3.2):
    """One line of panels per row. rows: dicts {panel title: array}, as many panels in each; inches: width of a panel.

    What an array is can be seen from it: uint8 (H, W, 3) a picture; uint8 (H, W) train ids, drawn in class colours;
    bool (H, W) a mask; float (H, W) a map in [0, 1] with a colour bar, nan (void) in grey.
    """
    from matplotlib import colormaps
    height, width = next(iter(rows[0].values())).shape[:2]
    fig = _figure(inches * len(rows[0]), (inches * height / width + 0.1) * len(rows) + 1.2)
    axes = fig.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(axes, rows):
        for ax, array in zip(line, row.values()):
            ax.set_axis_off()
            image = colours(array) if array.dtype == np.uint8 and array.ndim == 2 else array
            cmap = colormaps["gray" if array.dtype == bool else "viridis"].with_extremes(bad="0.6")
            ax.imshow(image, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")  # pictures in colour heed no cmap
    for column, (name, array) in zip(axes.T, rows[-1].items()):
        column[0].set_title(name, fontsize=10)
        if array.dtype.kind == "f":
            fig.colorbar(column[-1].images[0], ax=column, location="bottom", fraction=0.03, aspect=30)
    fig.suptitle(title, fontsize=11)
    return _finish(fig, path)


def figure_reliability(path, scenes, note=""):
    """Eq. 6 as a detector: scenes of (image, label as given, wrong (H, W) bool, omega, weight (H, W)) -> (found, mistaken).

    found     share of the harmful pixels that lose weight, of all labelled pixels of all scenes
    mistaken  share of the others that do
    """
    kept, wrong = (np.concatenate([scene[k][scene[1] != VOID] for scene in scenes]) for k in (4, 2))
    found, mistaken = (1 - kept[wrong]).mean(), (1 - kept[~wrong]).mean()
    shown = [scene for scene in scenes if scene[2].any()] or scenes  # there is something to find
    rows = [{"image": image, "label as given": label, "harmful (truth)": wrong & (label != VOID),
             "reliability omega, Eq. 5": np.where(label != VOID, omega, np.nan), "weight w, Eq. 6": np.where(label != VOID, weight, np.nan)}
            for image, label, wrong, omega, weight in shown[:5]]
    figure_predictions(path, rows, f"{found:.0%} of the harmful source pixels lose their weight, and {mistaken:.1%} of the others "
                                   f"({len(scenes)} scenes{note})")
    return found, mistaken


def figure_embedding(path, stages):
    """Pixels and prototypes in two dimensions, one line per stage, one column per group of domains.

    stages  {"before": (prototypes (K, D), {"source": (emb (n, D), label (n,)), "targets": ...}), "after": ...}
    Each stage has its own plane, the two main directions of its pixels and prototypes together, which its columns
    share: where source and targets lie in it can be compared by eye.
    """
    groups = list(next(iter(stages.values()))[1])
    fig = _figure(5.2 * len(groups), 4.4 * len(stages) + 0.8)
    axes = fig.subplots(len(stages), len(groups), squeeze=False, sharex="row", sharey="row")
    present = sorted({int(c) for _, parts in stages.values() for _, label in parts.values() for c in np.unique(label)})
    for line, (stage, (prototypes, parts)) in zip(axes, stages.items()):
        prototypes = np.asarray(prototypes, np.float64)[present]
        points = np.concatenate([prototypes, *(emb for emb, _ in parts.values())])
        centre = points.mean(0)
        _, strength, axis = np.linalg.svd(points - centre, full_matrices=False)  # rows of axis: directions, main first
        share = 100 * strength[:2] ** 2 / (strength ** 2).sum()
        for ax, (group, (emb, label)) in zip(line, parts.items()):
            ax.scatter(*axis[:2] @ (emb - centre).T, s=5, c=data.COLORS[label] / 255, alpha=0.6, linewidths=0, label="pixel")
            ax.scatter(*axis[:2] @ (prototypes - centre).T, s=130, c=data.COLORS[present] / 255, marker="*", edgecolors="black",
                       linewidths=0.8, label="text prototype (OTP)")
            ax.set_title(f"{stage}: {group}", fontsize=10)
            ax.set_xlabel(f"first direction ({share[0]:.0f} % of the variance)", fontsize=8)
        line[0].set_ylabel(f"second direction ({share[1]:.0f} %)", fontsize=8)
    for mark in axes[-1, -1].legend(fontsize=8, loc="best").legend_handles:
        mark.set_facecolor("0.6")  # of no class
    return _finish(fig, path, present)


def figure_curves(path, log):
    """Mean distance and mean loss of the pixels to the prototypes of their class, and lambda (Eq. 4), over training."""
    rows = [row for row in log if "radius_otp" in row]
    fig = _figure(7, 8)
    for ax, (kind, name) in zip(fig.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1)),
                                (("radius_", "distance"), ("loss_", "loss, Eq. 3"), ("lam", "lambda, Eq. 4"))):
        for key in (key for key in rows[0] if key.startswith(kind)):
            ax.plot([row["step"] for row in rows], [math.nan if row[key] is None else row[key] for row in rows],
                    label="to the " + key[-3:].upper(), color={"vtp": "C0", "otp": "C1"}.get(key[-3:], "0.3"))
        ax.set_ylabel(name)
        ax.legend(frameon=False) if "_" in kind else ax.set(xlabel="step", ylim=(-0.05, 1.05))
    return _finish(fig, path, classes=())


def draw_figures(run, compare=None):
    """Every figure that this run has the material for, into its folder. compare: a second checkpoint.Run."""
    config, out = run.config, Path(run.config.out)
    targets = find_targets(config)
    for name, items in targets.items():
        rows = [_prediction_row(run, item, compare) for item in data.evenly(items, 4)]
        title = name + " (unseen)" * (name not in config.source)
        print("figure:", figure_predictions(out / f"predictions_{name}.png", rows, title))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if (out / "log.jsonl").is_file() else []
    if any("radius_otp" in row for row in log):
        print("figure:", figure_curves(out / "curves.png", log))
    if drawn := [name for name in config.source if name.startswith("toy-")]:
        _draw_reliability(run, drawn[0], out / "reliability.png")
    _draw_embedding(run, targets, out / "embedding.png")


def _draw_reliability(run, source, path):
    """Only drawn scenes know which of their pixels are harmful."""
    drawn = [toy.draw(source, "train", index, harmful=run.config.harmful or 0.1) for index in range(SCENES)]
    scenes = [(image, label, wrong, *_trust(run, data.to_tensor(image), label)) for image, label, wrong in drawn]
    note = "" if run.config.harmful else ", spoilt for this figure alone: the run saw them clean"
    found, mistaken = figure_reliability(path, scenes, note)
    print(f"Eq. 6 in {len(scenes)} source scenes{note}: {found:.0%} of the harmful pixels lose their weight, {mistaken:.1%} of the others")
    print("figure:", path)


def _draw_embedding(run, targets, path):
    """Before training, pixels are still CLIP's; not drawn if CLIP's file is not at hand any more."""
    config = run.config
    try:
        visual = load_clip(config.clip)[0].visual
    except UserError as error:
        print(f"no figure of the embedding: {error}")
        return
    net = SegmentationNet(visual, stride=run.ppar.net.arch["stride"]).to(run.ppar.otp.device)
    before = ppar.PPAR(net, run.ppar.otp).eval()
    own = [data.list_items(name, config.data_root, "train", config.holdout) for name in config.source]
    groups = {"source": [item for items in own for item in data.evenly(items, 12)],
              "targets": [item for name, items in targets.items() if name not in config.source for item in data.evenly(items, 4)]}
    stages = {stage: (run.ppar.otp.cpu().numpy(), {group: _pixels(module, items, config.mapillary)
                                                   for group, items in groups.items() if items})
              for stage, module in (("before (CLIP)", before), ("after training", run.ppar))}
    print("figure:", figure_embedding(path, stages))


def _prediction_row(run, item, compare):
    image, label = data.load_pair(item, run.config.mapillary)
    tensor = data.to_tensor(image).to(run.ppar.otp.device)
    row = {"image": image, "truth": label}
    for who in filter(None, (compare, run)):
        title = f"compared: {who.path.name}" if who is compare else "prediction" + f": {who.path.name}" * bool(compare)
        row[title] = predict(make_scorer(who.ppar, who.config), tensor, label.shape)
    row["omega, Eq. 5"] = np.where(label != VOID, _trust(run, tensor, label)[0], np.nan)
    return row


def _trust(run, image, label):
    """Eq. 5 and Eq. 6 with the ramp at 1 for one picture: omega, weight (H, W)."""
    out, padded, _ = ppar.look(run.ppar, image, label)
    config = SimpleNamespace(**{**vars(run.config), "reweight": True})
    omega = reweight.reliability(ppar.prediction(out, run.ppar.otp, config), padded)
    weight = ppar.learning_weights(out, run.ppar.otp, padded, config, ramp=1.0)
    return [x[0, :label.shape[0], :label.shape[1]].cpu().numpy() for x in (omega, weight)]


def _pixels(module, items, mapillary, per_class=40):
    """Cells of some images and their labels, of each class as many as there are, to a limit: emb (n, D), label (n,)."""
    embs, labels = [], []
    for item in items:
        image, label = data.load_pair(item, mapillary)
        out, _, grid = ppar.look(module, data.to_tensor(image), label)
        embs.append(out.emb[0].flatten(1).T.cpu().numpy())
        labels.append(grid.flatten().byte().cpu().numpy())
    emb, label = np.concatenate(embs), np.concatenate(labels)
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(label == c))[:per_class] for c in range(len(data.CLASSES))])
    return emb[chosen], label[chosen]


def segment_pictures(run, files):
    """Predictions laid over pictures that have no label: RUN/overlay_NAME.png."""
    score, written = make_scorer(run.ppar, run.config), set()
    for file in files:
        try:
            image = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        except Exception as error:
            raise UserError(f"{file} is no picture that can be read ({type(error).__name__}); give a JPEG or PNG.") from None
        pred = predict(score, data.to_tensor(image).to(run.ppar.otp.device), image.shape[:2])
        path = run.path / f"overlay_{Path(file).stem}.png"
        while path in written:  # a.jpg and other/a.jpg
            path = path.with_stem(path.stem + "_2")
        over = (0.45 * image + 0.55 * colours(pred)).astype(np.uint8)
        written.add(figure_predictions(path, [{Path(file).name: image, "prediction": over}], inches=7))
        print("figure:", path)


def gallery(path, scenes=3):
    """The domains of the drawn world, a row each: scenes beside their labels."""
    rows = []
    for domain in toy.DOMAINS:
        drawn = [toy.draw(domain, "val", k)[:2] for k in range(scenes)]
        rows.append({f"{name} {k}": array for k, pair in enumerate(drawn) for name, array in zip(("scene", "label"), pair)})
    print("figure:", figure_predictions(path, rows, " / ".join(name.removeprefix("toy-") for name in toy.DOMAINS), inches=2))


def main(args):
    """The figures of a finished run, or of the drawn world; without arguments, the demonstration."""
    if args == parse([]):
        return _demo()
    with checkpoint.one_sentence(args.run or args.gallery):
        if args.gallery:
            return gallery(args.gallery)
        run = checkpoint.open_run(args)
        if args.images:
            return segment_pictures(run, args.images)
        draw_figures(run, checkpoint.load_run(args.compare, run.ppar.otp.device) if args.compare else None)


def _demo():
    """A made-up opinion that doubts just the harmful pixels of two drawn scenes, drawn and scored."""
    drawn = [toy.draw("toy-gta5", "train", index, harmful=1.0) for index in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reliability.png"
        found, mistaken = figure_reliability(path, [(*scene, np.where(scene[2], 0.2, 0.8), 1.0 - scene[2]) for scene in drawn])
        print(f"found {found:.0%}, mistaken {mistaken:.0%}, drawn on {Image.open(path).size} pixels")
    assert (found, mistaken) == (1, 0)


if __name__ == "__main__":
    main(ARGS)
