"""figures.py: what a trained network sees, as pictures: files in the folder of its run.

A table says how much; a figure says what. Each of them asks one question of the method:

    predictions_TARGET.png   image, truth, prediction (beside a second run's), omega (Eq. 5) from the OTP       where does it fail?
    reliability.png          omega of Eq. 5 beside the pixels that really are harmful, with its AUROC       does it find them?
    embedding.png            pixels and prototypes in two dimensions, before and after training             did they meet?
    curves.png               the alignment radii to VTP and OTP over training, with lambda of Eq. 4         in which order?
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
import torch
from PIL import Image, ImageOps

import data
import ppar
import toy
from data import VOID, UserError, colours
from evaluate import auroc, find_targets, make_scorer, predict
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
    """Eq. 5 as a detector: scenes of (image, label as given, wrong (H, W) bool, omega (H, W)); returns the AUROC.

    A pixel is suspected by 1 - omega. All labelled pixels of all scenes count; the first scenes are drawn.
    """
    valid = [label != VOID for _, label, _, _ in scenes]
    area = auroc(np.concatenate([1 - scene[3][v] for scene, v in zip(scenes, valid)]),
                 np.concatenate([scene[2][v] for scene, v in zip(scenes, valid)]))
    shown = [k for k, scene in enumerate(scenes) if (scene[2] & valid[k]).any()] or [0]  # there is something to find
    rows = [{"image": image, "label as given": label, "harmful (truth)": wrong & (label != VOID),
             "reliability, Eq. 5": np.where(label != VOID, omega, np.nan)}
            for image, label, wrong, omega in (scenes[k] for k in shown[:5])]
    figure_predictions(path, rows, f"Reliability as a detector of harmful source pixels: AUROC {area:.3f} "
                                   f"({len(scenes)} scenes{note})")
    return area


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
    """Alignment radii (mean distance of a pixel from the prototype of its class) and lambda (Eq. 4) over training."""
    rows = [row for row in log if "radius_otp" in row]
    step = [row["step"] for row in rows]
    fig = _figure(7, 5)
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for key, name in (("radius_vtp", "to VTP, the first goal"), ("radius_otp", "to OTP, the second goal")):
        if any(row.get(key) is not None for row in rows):
            top.plot(step, [math.nan if row.get(key) is None else row[key] for row in rows], label=name)
    top.set_ylabel("alignment radius")
    top.legend(frameon=False)
    bottom.plot(step, [math.nan if row.get("lam") is None else row["lam"] for row in rows], color="0.3")
    bottom.set(xlabel="step", ylabel="lambda (Eq. 4)", ylim=(-0.05, 1.05))
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
    scenes, harmful = [], run.config.harmful or 0.1
    for index in range(SCENES):
        image, label, wrong = toy.draw(source, "train", index, harmful=harmful)
        scenes.append((image, label, wrong, _omega(run, data.to_tensor(image), label, both=True)))
    note = "" if run.config.harmful else ", spoilt for this figure alone: the run saw them clean"
    area = figure_reliability(path, scenes, note)
    print(f"reliability (Eq. 5) as a detector of harmful pixels in {len(scenes)} source scenes{note}: AUROC {area:.3f}")
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
    row["omega from the OTP, Eq. 5"] = np.where(label != VOID, _omega(run, tensor, label), np.nan)
    return row


def _omega(run, image, label, both=False):
    """Eq. 5 at every pixel of one picture, (H, W); from OTP alone or, as training weighs, from OTP and VTP together."""
    device = run.ppar.otp.device
    out, padded, _ = ppar.look(run.ppar, image.to(device), torch.from_numpy(label).to(device))
    out = out if both else out._replace(vtp=None)
    omega = ppar.reliability(out, run.ppar.otp, padded, run.config.tau)
    return omega[0, :label.shape[0], :label.shape[1]].cpu().numpy()


def _pixels(module, items, mapillary, per_class=40):
    """Cells of some images and their labels, of each class as many as there are, to a limit: emb (n, D), label (n,)."""
    device, embs, labels = module.otp.device, [], []
    for item in items:
        image, label = data.load_pair(item, mapillary)
        out, _, grid = ppar.look(module, data.to_tensor(image).to(device), torch.from_numpy(label).to(device))
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
    """A made-up opinion that suspects just the harmful pixels of two drawn scenes, drawn and scored."""
    drawn = [toy.draw("toy-gta5", "train", index, harmful=1.0) for index in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reliability.png"
        area = figure_reliability(path, [(image, label, wrong, np.where(wrong, 0.2, 0.8)) for image, label, wrong in drawn])
        print(f"AUROC {area:.1f}, drawn on {Image.open(path).size} pixels")
    assert area == 1


if __name__ == "__main__":
    main(ARGS)
