"""figures.py: what a trained network sees, as pictures: files in the folder of its run.

A table says how much; a figure says what. Each of them asks one question of the method:

    predictions_TARGET.png   image, truth, prediction (beside a second run's), omega of Eq. 5        where does it fail?
    reliability.png          omega and w of Eq. 6 beside the pixels that really are harmful          does it find them?
    embedding.png            pixels, OTP and VTP in two dimensions, before and after training        did they meet?
    curves.png               distance and loss to OTP and VTP over training, with lambda of Eq. 4    which goal is easy?
    overlay_NAME.png         the prediction laid over a picture of the user's own

    python figures.py RUN --compare RUN2                              of a finished run, beside another
    python figures.py RUN --images a.jpg b.png                        your own pictures

Shapes    image (H, W, 3) uint8     label, pred (H, W) uint8, train ids, 255 = void     omega, w (H, W) in [0, 1]

Not here: scores (evaluate.py), the bound (bound.py). `python figures.py` prints
    Source pixels that lose their weight (2 scenes): 100.0% of the harmful ones, 0.0% of the others
    figure: ...reliability.png
    Notice: so it would be if the network doubted just the harmful pixels.
"""

import sys
import tempfile
from pathlib import Path

import checkpoint


def parse(arguments):
    """The command line."""
    p = checkpoint.run_flags("Draw the figures of a finished run into its folder.")
    p.add_argument("--compare", metavar="RUN", help="a second run, e.g. the baseline: its predictions are drawn beside")
    p.add_argument("--images", nargs="+", metavar="FILE", help="segment your own pictures instead, overlays into RUN")
    return p.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a misspelt flag answer at once
    ARGS = parse(sys.argv[1:])

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # no pyplot: no window, no global state
from matplotlib.patches import Patch
from PIL import Image, ImageOps

import data
import ppar
import toy
from data import VOID, UserError, colours
from evaluate import find_targets, make_scorer, predict
from model import SegmentationNet, load_clip

SCENES = 64  # drawn training scenes on which reliability is scored; about 6 of them harmful by default


def _finish(fig, path, title, classes=range(len(data.CLASSES) + 1)):  # void is the last one
    """Title, legend of the classes, then the file, whole or not at all."""
    fig.suptitle(title, fontsize=11)
    patches = [Patch(fc=colours(c) / 255, ec="black", lw=0.4, label=[*data.CLASSES, "void"][c]) for c in classes]
    fig.legend(handles=patches, loc="outside lower center", ncols=min(10, int(1.1 * fig.get_figwidth())),
               frameon=False, fontsize=8, handlelength=1.2)
    checkpoint.write_atomically(path, lambda file: fig.savefig(file, dpi=150, format="png"))
    print("figure:", path)


def figure_predictions(path, rows, title="", inches=3.2):
    """One line of panels per row. rows: dicts {panel title: array}, as many panels in each; inches: width of a panel.

    What an array is can be seen from it: uint8 (H, W, 3) a picture; uint8 (H, W) train ids, drawn in class colours;
    bool (H, W) a mask; float (H, W) a map in [0, 1] with a colour bar, nan (void) in grey.
    """
    height, width = next(iter(rows[0].values())).shape[:2]
    fig = Figure((inches * len(rows[0]), (inches * height / width + 0.1) * len(rows) + 1.2), layout="constrained")
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
    _finish(fig, path, title)


def figure_reliability(path, scenes, note=""):
    """Eq. 6 as a detector: the share of the harmful pixels that lose weight, and of the others; None where there are none.

    scenes: (image, label as given, wrong (H, W) bool, omega, weight (H, W)). Shares are of all their labelled pixels.
    """
    wrong, kept = (np.concatenate([scene[k][scene[1] != VOID] for scene in scenes]) for k in (2, 4))
    shares = [(1 - kept[those]).mean() if those.any() else None for those in (wrong, ~wrong)]
    said = [f"there are no {name}" if share is None else f"{share:.1%} of the {name}"
            for share, name in zip(shares, ("harmful ones", "others"))]
    title = f"Source pixels that lose their weight ({len(scenes)} scenes{note}): {', '.join(said)}"
    print(title)
    shown = [scene for scene in scenes if scene[2].any()] or scenes  # there is something to find
    panels = ("image", "label as given", "harmful (truth)", "reliability omega, Eq. 5", "weight w, Eq. 6")
    figure_predictions(path, [dict(zip(panels, scene)) for scene in shown[:5]], title)
    return shares


def figure_embedding(path, otp, stages):
    """Pixels and prototypes otp (K, D) in two dimensions, one line per stage, one column per group of domains.

    stages  {"before": {"source": (emb (n, D), label (n,), vtp (K, D), the mean over images, or None), "targets": ...}, "after": ...}
    Each stage has its own plane, the two main directions of its pixels and prototypes together, which its columns
    share: where source and targets lie in it can be compared by eye.
    """
    groups = next(iter(stages.values()))
    fig = Figure((5.2 * len(groups), 4.4 * len(stages) + 0.8), layout="constrained")
    axes = fig.subplots(len(stages), len(groups), squeeze=False, sharex="row", sharey="row")
    present = np.unique(np.concatenate([label for parts in stages.values() for _, label, _ in parts.values()]))
    stars, far = np.asarray(otp, np.float64)[present], []
    for line, (stage, parts) in zip(axes, stages.items()):
        points = np.concatenate([stars, *(emb for emb, _, _ in parts.values())])
        centre = points.mean(0)
        _, strength, axis = np.linalg.svd(points - centre, full_matrices=False)  # rows of axis: directions, main first
        share = 100 * strength ** 2 / (strength ** 2).sum()
        for ax, (group, (emb, label, vtp)) in zip(line, parts.items()):
            ax.scatter(*axis[:2] @ (emb - centre).T, c=data.COLORS[label] / 255, s=5, alpha=0.6, linewidths=0)
            for at, marker, size in ((stars, "*", 130), *([] if vtp is None else [(vtp[present], "D", 30)])):
                ax.scatter(*axis[:2] @ (at - centre).T, c=data.COLORS[present] / 255, s=size, marker=marker, edgecolors="black")
            far.append(np.linalg.norm(emb - np.asarray(otp)[label], axis=1).mean())
            ax.set(title=f"{stage}: {group}", xlabel=f"first direction ({share[0]:.0f} % of the variance)")
        line[0].set_ylabel(f"second direction ({share[1]:.0f} %)")
    _finish(fig, path, "from source pixels to OTPs (star; diamond: VTP): " + ", then ".join(f"{x:.2f}" for x in far[::len(parts)]), present)


def figure_curves(path, rows):
    """How training went, from the rows of log.jsonl: one panel for each question, steps from left to right.

    Mean distance and mean loss of the cells to the prototypes of their class. The share of the trusted cells to which
    the VTP is nearer, and for which it is easier, than the OTP (a run without a VTP has no such panel). And lambda.
    """
    panels = {"radius_": "distance", "loss_": "loss, Eq. 3", "_vtp": "share of trusted cells", "lam": "lambda, Eq. 4"}
    keys = {kind: [key for key in rows[0] if key.startswith(kind)] for kind in panels}
    keys["_vtp"] = [key for key in ("nearer_vtp", "easier_vtp") if key in rows[0]]
    shown = [kind for kind in panels if keys[kind]]
    heights = [1 if kind == "lam" else 3 for kind in shown]
    fig = Figure((7, 0.6 + sum(heights)), layout="constrained")
    steps = [row["step"] for row in rows]
    for ax, kind in zip(fig.subplots(len(shown), 1, sharex=True, height_ratios=heights), shown):
        values = np.array([[row[key] for key in keys[kind]] for row in rows], float)  # None becomes nan, a gap
        ax.plot(steps, values, label=keys[kind])
        ax.set_ylabel(panels[kind])
        if kind in ("_vtp", "lam"):
            ax.set_ylim(-0.05, 1.05)
        ax.legend(frameon=False)
    ax.set_xlabel("step")
    late = rows[-len(rows) // 4:]  # the last quarter
    nearest, easiest = (min(keys[kind], key=lambda key: sum(row[key] for row in late)) for kind in ("radius_", "loss_"))
    _finish(fig, path, f"the nearest goal in the last quarter: {nearest}; the easiest on average: {easiest}", classes=())


def draw_figures(run, compare=None):
    """Every figure that this run has the material for, into its folder. compare: a second checkpoint.Run."""
    config, out = run.config, Path(run.config.out)
    targets = find_targets(run)
    scorers = {f"{title}: {who.path.name}": make_scorer(who.ppar, who.config)
               for title, who in (("compared", compare), ("prediction", run)) if who}
    for name, items in targets.items():
        rows = []
        for item in data.evenly(items, 4):
            image, label = data.load_pair(item, config.mapillary)
            tensor = data.to_tensor(image).to(run.ppar.otp.device)
            predictions = {title: predict(score, tensor, label.shape) for title, score in scorers.items()}
            rows.append({"image": image, "truth": label, **predictions, "omega, Eq. 5": _trust(run, tensor, label)[0]})
        right = np.mean([(row[[*scorers][-1]] == row["truth"])[row["truth"] != VOID].mean() for row in rows])
        said = f"{name}{' (unseen)' * (name not in config.source)}: {right:.0%} of the pixels are right"
        figure_predictions(out / f"predictions_{name}.png", rows, said)
    if log := checkpoint.read_log(out):
        figure_curves(out / "curves.png", log)
    for source in [name for name in config.source if name.startswith("toy-")][:1]:  # drawn scenes know what is harmful
        drawn = [toy.draw(source, "train", index, harmful=config.harmful or 0.1) for index in range(SCENES)]
        scenes = [(*scene, *_trust(run, data.to_tensor(scene[0]), scene[1])) for scene in drawn]
        note = "" if config.harmful else ", spoilt for this figure alone: the run saw them clean"
        figure_reliability(out / "reliability.png", scenes, note)
    _draw_embedding(run, targets, out / "embedding.png")


def _draw_embedding(run, targets, path):
    """Before training, pixels are still CLIP's; not drawn if CLIP's file is not at hand any more."""
    config, otp = run.config, run.ppar.otp
    try:
        net = SegmentationNet(load_clip(config.clip)[0].visual, stride=run.ppar.net.arch["stride"])
    except UserError as error:
        print(f"no figure of the embedding: {error}")
        return
    before = ppar.PPAR(net, otp, run.ppar.clip, config.tau_assign, config.beta).to(otp.device).eval()
    modules = {"before (CLIP)": before, "after training": run.ppar}
    own = [data.list_items(name, config.data_root, "train", config.holdout, withheld=run.withheld.get(name))
           for name in config.source]
    unseen = [items for name, items in targets.items() if name not in config.source]
    groups = {group: [data.load_pair(item, config.mapillary) for items in lists for item in data.evenly(items, number)]
              for group, lists, number in (("source", own, 12), ("targets", unseen, 4)) if lists}
    figure_embedding(path, otp.cpu(), {stage: {group: _pixels(module, pairs) for group, pairs in groups.items()}
                                       for stage, module in modules.items()})


def _trust(run, image, label):
    """Eq. 5 and Eq. 6 with the ramp at 1 for one picture: omega, weight (H, W), nan on void."""
    out, padded, _ = ppar.look(run.ppar, image, label)
    judge = dict(tau=run.config.tau, judge_text=run.config.judge_text)
    omega = ppar.reliability(out, run.ppar.otp, padded, **judge)
    weight = ppar.learning_weights(out, run.ppar.otp, padded, ramp=1.0, **judge)
    return [np.where(label != VOID, x[0, :label.shape[0], :label.shape[1]].cpu(), np.nan) for x in (omega, weight)]


def _pixels(module, pairs, per_class=40):
    """Cells of some images and their labels, so many of each class at most: emb (n, D), label (n,), mean VTP."""
    looks = [ppar.look(module, data.to_tensor(image), label) for image, label in pairs]
    emb = np.concatenate([out.emb[0].flatten(1).T.cpu() for out, _, _ in looks])
    label = np.concatenate([grid.flatten().cpu() for _, _, grid in looks])
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(label == c))[:per_class] for c in range(len(data.CLASSES))])
    vtp = None if looks[0][0].vtp is None else np.mean([out.vtp[0].cpu().numpy() for out, _, _ in looks], axis=0)
    return emb[chosen], label[chosen], vtp


def segment_pictures(run, files):
    """Predictions laid over pictures that have no label: RUN/overlay_NAME.png."""
    score, written = make_scorer(run.ppar, run.config), set()
    for file in files:
        try:
            image = np.asarray(data.to_rgb(ImageOps.exif_transpose(Image.open(file)), file))
        except UserError:  # to_rgb says what it refuses, and why
            raise
        except Exception as error:
            raise UserError(f"{file} is no picture that can be read ({type(error).__name__}); give a JPEG or PNG.") from None
        pred = predict(score, data.to_tensor(image).to(run.ppar.otp.device), image.shape[:2])
        path = run.path / f"overlay_{Path(file).stem}.png"
        while path in written:  # a.jpg and other/a.jpg
            path = path.with_stem(path.stem + "_2")
        over = (0.45 * image + 0.55 * colours(pred)).astype(np.uint8)
        written.add(path)
        figure_predictions(path, [{Path(file).name: image, "prediction": over}], inches=7)


def main(args):
    """The figures of a finished run; without arguments, the demonstration."""
    if args == parse([]):
        return _demo()
    with checkpoint.one_sentence(args.run):
        run = checkpoint.open_run(args)
        if args.images:
            return segment_pictures(run, args.images)
        draw_figures(run, checkpoint.load_run(args.compare, run.ppar.otp.device) if args.compare else None)


def _demo():
    drawn = [toy.draw("toy-gta5", "train", index, harmful=1.0) for index in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        scenes = [(*scene, np.where(scene[2], 0.2, 0.8), 1.0 - scene[2]) for scene in drawn]
        shares = figure_reliability(Path(folder) / "reliability.png", scenes)
    print("Notice: so it would be if the network doubted just the harmful pixels.")
    assert shares == [1, 0], "all that is harmful is found, and nothing else"


if __name__ == "__main__":
    main(ARGS)
