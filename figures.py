"""figures.py: what a trained network sees, as pictures: files in the folder of its run.

A table says how much; a figure says what. Each of them asks one question of the method:

    predictions_TARGET.png   image, truth, prediction (beside a second run's), agreement with the OTP       where does it fail?
    reliability.png          omega of Eq. 5 beside the pixels that really are harmful, with its AUROC       does it find them?
    embedding.png            pixels and prototypes in two dimensions, before and after training             did they meet?
    curves.png               the alignment radii to VTP and OTP over training, with lambda of Eq. 4         in which order?
    overlay_NAME.png         the prediction laid over a picture of the user's own

Shapes
    image   (H, W, 3) uint8     label, pred   (H, W) uint8, train ids, 255 = void     omega   (H, W) in [0, 1]

Not here: scores (evaluate.py, which calls this file for --figures and --images), the figure of the bound (bound.py).
Run `python figures.py` for a demonstration in seconds.
"""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import data
import model
from evaluate import PROTOCOL, EvaluationError, auroc, make_scorer, pad, predict, replace_file
from reweight import reliability

VOID = data.VOID
SCENES = 64  # drawn training scenes on which reliability is scored; about 6 of them harmful by default
DPI = 150  # readable on a screen and in print


def colours(ids):
    """Train ids (H, W) -> colours (H, W, 3) as Cityscapes draws them; void is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(data.COLORS)] = data.COLORS
    return palette[ids]


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
    replace_file(path, lambda part: fig.savefig(part, dpi=DPI))
    return path


def figure_predictions(path, rows, title="", inches=3.2):
    """One line of panels per row. rows: dicts {panel title: array}, all with the same titles; inches: width of a panel.

    What an array is can be seen from it: uint8 (H, W, 3) a picture; uint8 (H, W) train ids, drawn in class colours;
    bool (H, W) a mask; float (H, W) a map in [0, 1] with a colour bar, nan (void) in grey.
    """
    from matplotlib import colormaps

    shape = rows[0][next(iter(rows[0]))].shape
    fig = _figure(inches * len(rows[0]), (inches * shape[0] / shape[1] + 0.1) * len(rows) + 1.2)
    axes = fig.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(axes, rows):
        for ax, array in zip(line, row.values()):
            ax.set_axis_off()
            if array.dtype == np.uint8:
                ax.imshow(colours(array), interpolation="nearest") if array.ndim == 2 else ax.imshow(array)
            else:
                cmap = colormaps["gray" if array.dtype == bool else "viridis"].with_extremes(bad="0.6")
                ax.imshow(array, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    for column, (name, array) in enumerate(rows[-1].items()):
        axes[0, column].set_title(name, fontsize=10)
        if array.dtype.kind == "f":
            fig.colorbar(axes[-1, column].images[0], ax=axes[:, column], location="bottom", fraction=0.03, aspect=30)
    fig.suptitle(title, fontsize=11)
    fig.get_layout_engine().set(h_pad=0.06)
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
    from matplotlib.lines import Line2D

    groups = list(next(iter(stages.values()))[1])
    fig = _figure(5.2 * len(groups), 4.4 * len(stages) + 0.8)
    axes = fig.subplots(len(stages), len(groups), squeeze=False, sharex="row", sharey="row")
    present = sorted({int(c) for _, parts in stages.values() for _, label in parts.values() for c in np.unique(label)})
    for line, (stage, (prototypes, parts)) in zip(axes, stages.items()):
        prototypes = np.asarray(prototypes, np.float64)[present]
        points = np.concatenate([prototypes, *(np.asarray(emb, np.float64) for emb, _ in parts.values())])
        centre = points.mean(0)
        _, strength, axis = np.linalg.svd(points - centre, full_matrices=False)  # rows of axis: directions, main first
        share = 100 * strength[:2] ** 2 / (strength ** 2).sum()
        anchor = (prototypes - centre) @ axis[:2].T
        for ax, (group, (emb, label)) in zip(line, parts.items()):
            where = (np.asarray(emb, np.float64) - centre) @ axis[:2].T
            ax.scatter(*where.T, s=5, c=data.COLORS[label] / 255, alpha=0.6, linewidths=0)
            ax.scatter(*anchor.T, s=130, c=data.COLORS[present] / 255, marker="*", edgecolors="black", linewidths=0.8)
            ax.set_title(f"{stage}: {group}", fontsize=10)
            ax.set_xlabel(f"first direction ({share[0]:.0f} % of the variance)", fontsize=8)
            ax.tick_params(labelsize=7)
        line[0].set_ylabel(f"second direction ({share[1]:.0f} %)", fontsize=8)
    marks = [Line2D([], [], marker=".", ls="", color="0.4", label="pixel"),
             Line2D([], [], marker="*", ls="", ms=11, mfc="0.8", mec="black", label="text prototype (OTP)")]
    line[-1].legend(handles=marks, fontsize=8, loc="best")
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


def draw_figures(run, config, device, targets, compare=None):
    """Every figure that this run has the material for, into its folder; yields the paths."""
    out, sources = Path(config["out"]), config["source"]
    for name, items in targets.items():
        rows = [_prediction_row(run, config, device, item, compare) for item in _spread(items, 4)]
        yield figure_predictions(out / f"predictions_{name}.png", rows, name + " (unseen)" * (name not in sources))
    log = out / "log.jsonl"
    if log.is_file():
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        if any("radius_otp" in row for row in rows):
            yield figure_curves(out / "curves.png", rows)
    if drawn := [name for name in sources if name.startswith("toy-")]:
        import toy  # only drawn scenes know which of their pixels are harmful

        scenes = []
        for index in range(SCENES):
            image, label, wrong = toy.draw(drawn[0], "train", index, harmful=config.get("harmful") or 0.1)
            omega = _omega(run, config, device, data.to_tensor(image), torch.from_numpy(label), both=True)
            scenes.append((image, label, wrong, omega))
        note = "" if config.get("harmful") else ", spoilt for this figure alone: the run saw them clean"
        area = figure_reliability(out / "reliability.png", scenes, note)
        print(f"reliability (Eq. 5) as a detector of harmful pixels in {len(scenes)} source scenes{note}: AUROC {area:.3f}")
        yield out / "reliability.png"
    before = _initial_network(run, config, device)
    if before is not None:
        groups = {"source": [i for n in sources for i in _spread(data.list_items(n, config["data_root"], "train",
                                                                                 config.get("holdout", 0)), 12)],
                  "targets": [i for n, items in targets.items() if n not in sources for i in _spread(items, 4)]}
        stages = {stage: (run.otp.cpu().numpy(), {group: _pixels(net, items, config, device)
                                                  for group, items in groups.items() if items})
                  for stage, net in (("before (CLIP)", before), ("after training", run.net))}
        yield figure_embedding(out / "embedding.png", stages)


def _spread(items, number):
    """So many items, evenly spaced: neighbours in a list are often frames of one drive."""
    number = min(number, len(items))
    return [items[k * len(items) // number] for k in range(number)]


def _prediction_row(run, config, device, item, compare):
    image, label = data.load_image(item), data.load_label(item, config.get("mapillary", "A"))
    tensor, truth = data.to_tensor(image).to(device), torch.from_numpy(label)
    how = {key: config[key] for key in PROTOCOL[1:] if key in config}

    def predicted(who, flags):
        score = make_scorer(who.net, who.otp, flags["tau"], flags.get("text_weight", 0.0))
        return predict(score, tensor, label.shape, **how)

    row = {"image": image, "truth": label}
    if compare:
        row[f"compared: {compare.path.name}"] = predicted(compare, compare.config)
    row["prediction" + f": {Path(config['out']).name}" * bool(compare)] = predicted(run, config)
    omega = _omega(run, config, device, tensor, truth)
    row["agreement with OTP, Eq. 5"] = np.where(label != VOID, omega, np.nan)
    return row


@torch.no_grad()
def _omega(run, config, device, image, label, both=False):
    """Eq. 5 at every pixel of one picture, (H, W); from OTP alone or, as training weighs, from OTP and VTP together."""
    out = run.net.eval()(pad(image[None].to(device), run.net.encoder.multiple))
    padded = _pad_label(label, out.emb, run.net.encoder.stride).to(device)
    omega = reliability(out.emb, padded, run.otp, config["tau_w"])
    if both and run.vtp is not None:
        omega = (omega + reliability(out.emb, padded, run.vtp(run.otp, out.emb, out.pooled), config["tau_w"])) / 2
    return omega[0, :label.shape[0], :label.shape[1]].cpu().numpy()


def _pad_label(label, emb, stride):
    """(H, W) -> (1, h * stride, w * stride) int64: void where the image was padded."""
    bottom, right = emb.shape[2] * stride - label.shape[0], emb.shape[3] * stride - label.shape[1]
    return F.pad(label.long()[None], (0, right, 0, bottom), value=VOID)


def _initial_network(run, config, device):
    """The network of step 0, in which the pixels are still CLIP's; None if CLIP's file is not at hand any more."""
    name = config.get("clip")
    if name == "toy":
        import toy

        name = toy.CLIP_FILE
    try:
        visual = model.load_clip(name)[0].visual
    except model.ModelError as error:
        print(f"no figure of the embedding: {error}")
        return None
    return model.SegmentationNet(visual, stride=run.net.arch["stride"]).to(device).eval()


@torch.no_grad()
def _pixels(net, items, config, device, per_class=40):
    """Cells of some images and their labels, of each class as many as there are, to a limit: emb (n, D), label (n,)."""
    embs, labels = [], []
    for item in items:
        label = torch.from_numpy(data.load_label(item, config.get("mapillary", "A")))
        emb = net(pad(data.to_tensor(data.load_image(item))[None].to(device), net.encoder.multiple)).emb
        grid = _pad_label(label, emb, net.encoder.stride)[:, None].float()
        embs.append(emb[0].flatten(1).T.cpu().numpy())
        labels.append(F.interpolate(grid, size=emb.shape[2:], mode="nearest-exact").flatten().byte().numpy())
    emb, label = np.concatenate(embs), np.concatenate(labels)
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(label == c))[:per_class] for c in range(len(data.CLASSES))])
    return emb[chosen], label[chosen]


def segment_pictures(run, config, device, files):
    """Predictions laid over pictures that have no label: RUN/overlay_NAME.png."""
    score = make_scorer(run.net, run.otp, config["tau"], config.get("text_weight", 0.0))
    written = set()
    for file in files:
        try:
            image = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        except Exception as error:
            raise EvaluationError(f"{file} is no picture that can be read ({type(error).__name__}); "
                                  f"give a JPEG or PNG.") from None
        pred = predict(score, data.to_tensor(image).to(device), image.shape[:2],
                       **{key: config[key] for key in PROTOCOL[1:] if key in config})
        path = run.path / f"overlay_{Path(file).stem}.png"
        while path in written:  # a.jpg and other/a.jpg
            path = path.with_stem(path.stem + "_2")
        over = (0.45 * image + 0.55 * colours(pred)).astype(np.uint8)
        written.add(figure_predictions(path, [{Path(file).name: image, "prediction": over}], inches=7))
        print(f"figure: {path}")


def _demo():
    """A made-up opinion that suspects just the harmful pixels of two drawn scenes, drawn and scored."""
    import toy

    scenes = []
    for index in range(2):
        image, label, wrong = toy.draw("toy-gta5", "train", index, harmful=1.0)
        scenes.append((image, label, wrong, np.where(wrong, 0.2, 0.8)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reliability.png"
        area = figure_reliability(path, scenes)
        print(f"AUROC {area:.1f}, drawn on {Image.open(path).size} pixels")
    assert area == 1


if __name__ == "__main__":
    _demo()
