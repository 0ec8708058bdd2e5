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

A picture of real size has more pixels than a panel has dots: it is thinned before it is drawn. The network sees all of it.

Not here: scores (evaluate.py), the bound (bound.py). `python figures.py` prints
    Source pixels that lose their weight (2 scenes): 100.0% of the harmful ones, 0.0% of the others
    figure: ...reliability.png
    Notice: so it would be if the network doubted just the harmful pixels.
"""

import sys
import tempfile
from pathlib import Path

import checkpoint
import machine


def parse(arguments):
    """The command line."""
    p = checkpoint.run_flags("Draw the figures of a finished run into its folder.")
    p.add_argument("--compare", metavar="RUN", help="a second run, e.g. the baseline: its predictions are drawn beside")
    p.add_argument("--images", nargs="+", metavar="FILE", help="segment your own pictures instead, overlays into RUN")
    return p.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a misspelt flag answer at once
    ARGS = parse(sys.argv[1:])

import numpy as np
import torch
from PIL import Image, ImageOps

machine.import_matplotlib()
from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402, no pyplot: no window, no global state
from matplotlib.patches import Patch  # noqa: E402

import align  # noqa: E402
import data  # noqa: E402
import ppar  # noqa: E402
import toy  # noqa: E402
from data import VOID, UserError, colours  # noqa: E402
from evaluate import find_targets, make_look, make_scorer, predict, protocol_of  # noqa: E402
from model import SegmentationNet, load_clip  # noqa: E402

SCENES = 64  # drawn training scenes on which reliability is scored; about 6 of them harmful by default
DPI = 150  # dots an inch of every figure


def thin(array, inches):
    """Every n-th row and column of a picture or map (H, W, ...), so that a panel of this width has a pixel for every dot.

    Matplotlib would turn every pixel of 12 megapixels into colours first, and then leave out all but these.
    """
    step = max(1, max(array.shape[:2]) // int(inches * DPI))
    return array[::step, ::step]


def _finish(fig, path, title, classes=range(len(data.CLASSES) + 1)):  # void is the last one
    """Title, legend of the classes, then the file, whole or not at all."""
    fig.suptitle(title, fontsize=11, parse_math=False)  # a $ in the name of a run or picture is a $, and no formula
    patches = [Patch(fc=colours(c) / 255, ec="black", lw=0.4, label=[*data.CLASSES, "void"][c]) for c in classes]
    fig.legend(handles=patches, loc="outside lower center", ncols=min(10, int(1.1 * fig.get_figwidth())),
               frameon=False, fontsize=8, handlelength=1.2)
    checkpoint.write_atomically(path, lambda file: fig.savefig(file, dpi=DPI, format="png"))
    print("figure:", path)


def _printable(text):
    """A name as text that a font has: bytes that are no text become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


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
            array = thin(array, inches)
            image = colours(array) if array.dtype == np.uint8 and array.ndim == 2 else array
            cmap = colormaps["gray" if array.dtype == bool else "viridis"].with_extremes(bad="0.6")
            ax.imshow(image, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")  # pictures in colour heed no cmap
    for column, (name, array) in zip(axes.T, rows[-1].items()):
        column[0].set_title(_printable(name), fontsize=10, parse_math=False)
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
    """Every figure that this run has the material for, into its folder. compare: a second checkpoint.Run.

    Ctrl-C, SIGTERM and memory that runs out end in a UserError. The figures that are done stay.
    """
    again = f"scores and finished figures stay; draw the others with `python figures.py {run.path}`."
    remedy = (f"scores and finished figures stay; draw where there is more memory with `python figures.py {run.path}`, or train "
              f"with --no-figures")
    with machine.stop_with(lambda: again), machine.say_why(remedy):
        config, out = run.config, Path(run.config.out)
        targets = find_targets(run)
        for name, items in targets.items():
            _draw_predictions(run, compare, name, data.evenly(items, 4), out / f"predictions_{name}.png")
        if log := checkpoint.read_log(out):
            figure_curves(out / "curves.png", log)
        for source in [name for name in config.source if name.startswith("toy-")][:1]:  # drawn scenes know what is harmful
            drawn = [toy.draw(source, "train", index, harmful=config.harmful or 0.1) for index in range(SCENES)]
            look = make_look(run.ppar, config)
            scenes = [(*scene, *_trust(run, look, data.to_tensor(scene[0]), scene[1])) for scene in drawn]
            note = "" if config.harmful else ", spoilt for this figure alone: the run saw them clean"
            figure_reliability(out / "reliability.png", scenes, note)
        _draw_embedding(run, targets, out / "embedding.png")


def _draw_predictions(run, compare, name, items, path, inches=3.2):
    """Some pictures of a target: truth, predictions as they were scored, and where the network doubts the label."""
    scorers = {f"{title}: {who.path.name}": (make_scorer(who.ppar, who.config), protocol_of(who))
               for title, who in (("compared", compare), ("prediction", run)) if who}
    look, rows, right = make_look(run.ppar, run.config), [], []
    for item in items:
        image, label = data.load_pair(item, run.config.mapillary)
        tensor = data.to_tensor(image).to(run.ppar.otp.device)
        row = {"image": image, "truth": label}
        for title, (score, protocol) in scorers.items():
            row[title] = predict(score, tensor, label.shape, **protocol)
        right.append((row[title] == label)[label != VOID].mean())  # of the last one, this run's, and of all its pixels
        row["omega, Eq. 5"] = _doubt(run, look, tensor, label)
        rows.append({panel: thin(array, inches).copy() for panel, array in row.items()})  # a copy: the large ones may go
    said = f"{name}{' (unseen)' * (name not in run.config.source)}: {np.mean(right):.0%} of the pixels are right"
    figure_predictions(path, rows, said, inches=inches)


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
    looks = {stage: make_look(module, config) for stage, module in modules.items()}
    own = [data.list_items(name, config.data_root, "train", config.holdout, withheld=run.withheld.get(name))
           for name in config.source]
    unseen = [items for name, items in targets.items() if name not in config.source]
    groups = {group: [item for items in lists for item in data.evenly(items, number)]
              for group, lists, number in (("source", own, 12), ("targets", unseen, 4)) if lists}
    stages = {stage: {} for stage in looks}
    for group, items in groups.items():
        for stage, pixels in _pixels(looks, items, run.ppar.net.encoder, config.mapillary).items():
            stages[stage][group] = pixels
    figure_embedding(path, otp.cpu(), stages)


def _doubt(run, look, image, label):
    """Eq. 5 for one picture: omega (H, W) float32, nan on void."""
    out, padded, _ = look(image, label)
    omega = ppar.reliability(out, run.ppar.otp, padded, tau=run.config.tau, judge_text=run.config.judge_text)
    return _on_labelled(omega, label)


def _trust(run, look, image, label):
    """Eq. 5 and Eq. 6 with the ramp at 1 for one picture: omega, weight (H, W), nan on void."""
    out, padded, _ = look(image, label)
    judge = dict(tau=run.config.tau, judge_text=run.config.judge_text)
    omega = ppar.reliability(out, run.ppar.otp, padded, **judge)
    weight = ppar.learning_weights(out, run.ppar.otp, padded, ramp=1.0, **judge)
    return [_on_labelled(x, label) for x in (omega, weight)]


def _on_labelled(values, label):
    """values (1, H', W') of a padded picture -> (H, W) on the host, nan on void."""
    return np.where(label != VOID, values[0, :label.shape[0], :label.shape[1]].cpu(), np.nan)


def _pixels(looks, items, encoder, mapillary, per_class=40):
    """Cells of some pictures as several networks see them -> {stage: (emb (n, D), label (n,), mean VTP (K, D) or None)}.

    The cells are chosen by their labels alone, so many of each class, before a network is asked. So each picture's
    output is dropped as soon as its few cells are taken. All outputs together would be gigabytes.
    """
    grids = [_grid(data.load_pair(item, mapillary)[1], encoder) for item in items]
    label = np.concatenate([grid.flatten() for grid in grids])
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(label == c))[:per_class] for c in range(len(data.CLASSES))])
    emb, vtps = {stage: None for stage in looks}, {stage: [] for stage in looks}
    start = 0  # of the picture's cells, among those of all pictures
    for item, grid in zip(items, grids):
        image, truth = data.load_pair(item, mapillary)
        here = np.flatnonzero((chosen >= start) & (chosen < start + grid.size))  # places in `chosen`
        for stage, look in looks.items():
            out, _, _ = look(data.to_tensor(image), truth)
            cells = out.emb[0].flatten(1)[:, torch.from_numpy(chosen[here] - start).to(out.emb.device)].T.cpu().numpy()
            if emb[stage] is None:
                emb[stage] = np.empty((len(chosen), cells.shape[1]), cells.dtype)
            emb[stage][here] = cells
            vtps[stage] += [] if out.vtp is None else [out.vtp[0].cpu().numpy()]
        start += grid.size
    return {stage: (emb[stage], label[chosen], np.mean(vtps[stage], axis=0) if vtps[stage] else None) for stage in looks}


def _grid(label, encoder):
    """label (H, W) uint8 -> the labels of its cells (h, w), as ppar.look has them, without a network."""
    height, width = (-(-side // encoder.multiple) * encoder.multiple for side in label.shape)
    padded = np.full((1, height, width), VOID, label.dtype)
    padded[0, :label.shape[0], :label.shape[1]] = label
    cells = np.empty((1, 0, height // encoder.stride, width // encoder.stride))
    return align.labels_on_grid(padded, cells)[0]


def segment_pictures(run, files, inches=7):
    """Predictions laid over pictures that have no label: RUN/overlay_NAME.png."""
    score, protocol, written = make_scorer(run.ppar, run.config), protocol_of(run), set()
    again = f"the overlays that are done stay in {run.path}; give --images again, without those."
    with machine.stop_with(lambda: again), machine.say_why("give smaller pictures"):
        for file in files:
            try:
                image = np.asarray(data.to_rgb(ImageOps.exif_transpose(Image.open(file)), file))
            except UserError:  # to_rgb says what it refuses, and why
                raise
            except Exception as error:
                raise UserError(f"{file} is no picture that can be read ({type(error).__name__}); give a JPEG or PNG.") from None
            pred = predict(score, data.to_tensor(image).to(run.ppar.otp.device), image.shape[:2], **protocol)
            path = run.path / f"overlay_{Path(file).stem}.png"
            while path in written:  # a.jpg and other/a.jpg
                path = path.with_stem(path.stem + "_2")
            image, pred = thin(image, inches), thin(pred, inches)
            over = (0.45 * image + 0.55 * colours(pred)).astype(np.uint8)
            written.add(path)
            figure_predictions(path, [{Path(file).name: image, "prediction": over}], inches=inches)


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
