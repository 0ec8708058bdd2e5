"""Tests of figures.py: what a figure is asked to show, that it shows just that, and the doors that draw them."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_png, write_tiny
from make_clip import make_clip
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from workbench import scorer, small_net

import checkpoint
import data
import evaluate
import figures
import model
import ppar
import reweight
import toy
from data import VOID

torch.set_num_threads(1)
CLIP = make_clip(dim=24, layers=(1, 1, 1, 1), vocabulary=9, context=8)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Every matplotlib figure that is saved, in few pixels: most of the time goes into them."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda fig, file, **_: kept.append(fig) or save(fig, file, dpi=30, format="png"))
    monkeypatch.setattr(figures, "SCENES", 8)
    monkeypatch.setattr(figures, "load_clip", lambda name: (CLIP, ""))
    return kept


@pytest.fixture
def asked(monkeypatch):
    """{file name: what its figure is asked to show}; the files hold one grey picture."""
    kept = {}
    monkeypatch.setattr(Figure, "savefig", lambda fig, file, **_: Image.new("L", (9, 9)).save(file, "png"))
    for name in ("figure_predictions", "figure_reliability", "figure_embedding"):
        monkeypatch.setattr(figures, name, lambda path, *what, draw=getattr(figures, name), **keys:
                            kept.setdefault(Path(path).name, what) and draw(path, *what, **keys))
    return kept


def command(*words):
    figures.main(figures.parse([str(word) for word in words]))


def test_the_reliability_figure_counts_the_weight_that_is_lost_and_shows_spoilt_scenes_grey_on_void(tmp_path, drawn, capsys):
    rng, shape = np.random.default_rng(0), (8, 20, 30)
    image, label = rng.integers(0, 256, (*shape, 3), np.uint8), rng.choice([0, 2, VOID], shape).astype(np.uint8)
    wrong, valid, (omega, weight) = rng.random(shape) < 0.2, label != VOID, rng.integers(0, 9, (2, *shape)) / 8
    wrong[[0, 4]] = False  # nothing to find there
    omega[~valid] = weight[~valid] = np.nan
    shares = figures.figure_reliability(tmp_path / "r.png", [*zip(image, label, wrong, omega, weight)], ", a note")
    assert shares == pytest.approx([1 - weight[wrong & valid].mean(), 1 - weight[~wrong & valid].mean()], abs=1e-12)
    title = (f"Source pixels that lose their weight (8 scenes, a note): {shares[0]:.1%} of the harmful ones, "
             f"{shares[1]:.1%} of the others")
    assert drawn[0]._suptitle.get_text() == title and title in capsys.readouterr().out
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [*data.CLASSES, "void"]
    assert drawn[0].get_figheight() > 5 * drawn[0].get_figwidth() / 5 * 20 / 30  # room for every panel and the legend
    panels = [ax.images[0].to_rgba(ax.images[0].get_array(), bytes=True)[..., :3] for ax in drawn[0].axes[:-2]]  # two colour bars
    maps = [np.where(valid[..., None], colormaps["viridis"](x, bytes=True)[..., :3], 153) for x in (omega, weight)]
    want = np.stack([image, data.colours(label), 255 * wrong[..., None].repeat(3, 3), *maps], 1)
    assert (np.reshape(panels, (5, 5, 20, 30, 3)) == want[[1, 2, 3, 5, 6]]).all()


def test_where_no_pixel_is_harmful_the_reliability_figure_says_so_in_words(tmp_path, drawn):
    image, label, wrong = toy.draw("toy-gta5", "train", 0)
    scene = image, label, wrong, np.ones(label.shape), np.full(label.shape, 0.75)
    assert figures.figure_reliability(tmp_path / "r.png", [scene] * 2) == [None, 0.25]
    assert drawn[0]._suptitle.get_text().endswith("(2 scenes): there are no harmful ones, 25.0% of the others")


def test_an_embedding_is_seen_in_the_plane_of_the_largest_variance_of_pixels_and_present_prototypes(tmp_path, drawn):
    rng = np.random.default_rng(0)
    otp, emb = rng.normal(size=(19, 5)), rng.normal(size=(2, 30, 5)) * (1, 3, 0.1, 2, 0.2)
    label = np.stack([rng.choice([0, 2], 30), rng.choice([2, 13], 30)])
    figures.figure_embedding(tmp_path / "e.png", otp, {"before": {"source": (emb[0], label[0], None), "targets": (emb[1], label[1], None)}})
    source, targets = drawn[0].axes
    points = np.concatenate([otp[[0, 2, 13]], *emb])
    variance, axis = np.linalg.eigh(np.cov(points.T))
    want = (points - points.mean(0)) @ axis[:, :-3:-1]
    clouds = [source.collections[1], source.collections[0], targets.collections[0]]
    found = np.concatenate([cloud.get_offsets() for cloud in clouds])
    assert np.allclose(found, want * np.sign((found * want).sum(0)))  # a direction has no sign of its own
    colours = np.concatenate([cloud.get_facecolors()[:, :3] for cloud in clouds])
    assert np.allclose(colours, data.COLORS[[0, 2, 13, *label.flatten()]] / 255)
    for text, share in zip((source.get_xlabel(), source.get_ylabel()), variance[::-1] / variance.sum()):
        assert f"({100 * share:.0f} %" in text


def test_curves_are_distance_loss_and_lambda_with_a_gap_where_a_method_has_no_number(tmp_path, drawn):
    log = [dict(step=10, radius_otp=1.0, radius_vtp=0.7, loss_otp=3.0, loss_vtp=2.0, nearer_vtp=0.9, easier_vtp=0.6, lam=None),
           dict(step=20, radius_otp=0.9, radius_vtp=0.8, loss_otp=4.0, loss_vtp=1.0, nearer_vtp=1.0, easier_vtp=0.7, lam=0.5)]
    figures.figure_curves(tmp_path / "c.png", log)
    panels = [(1, 0.9), (0.7, 0.8)], [(3, 4), (2, 1)], [(0.9, 1), (0.6, 0.7)], [(np.nan, 0.5)]
    for ax, values in zip(drawn[0].axes, panels, strict=True):
        lines = [line.get_xydata() for line in ax.lines]
        assert np.array_equal(lines, [[(10, y), (20, z)] for y, z in values], equal_nan=True)
    legends = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in drawn[0].axes]
    assert legends[1:3] == [["loss_otp", "loss_vtp"], ["nearer_vtp", "easier_vtp"]]
    figures.figure_curves(tmp_path / "c.png", [{key: row[key] for key in row if "vtp" not in key} for row in log])  # alignment to the OTP
    assert [ax.get_ylabel() for ax in drawn[1].axes] == ["distance", "loss, Eq. 3", "lambda, Eq. 4"]


def trust(net, otp, image, label):
    """Eq. 5 and 6 at the end of the ramp, (2, H, W), nan on void. A place reaches a cell of 16 pixels to each side."""
    out, padded, _ = ppar.look(ppar.PPAR(net, otp, small_net(seed=1).encoder.eval()), data.to_tensor(image), label)
    log_q = ppar.prediction(out.logits, out.clip_emb, otp, tau=0.07, text_weight=0.25)  # frozen CLIP, as the run's folder has it
    omega = reweight.reliability(log_q, padded)
    weight = reweight.learning_weights(omega, reweight.place_reliability(omega, padded, 33), padded, ramp=1.0)
    return torch.where(padded == VOID, torch.nan, torch.cat([omega, weight]))[:, :label.shape[0], :label.shape[1]]


@pytest.mark.parametrize("harmful", [0.4, 0.0])
def test_figures_of_a_run_show_its_targets_beside_a_second_runs_its_scenes_and_cells(run, net, otp, asked, capsys, harmful):
    write_tiny(run[1]["data_root"], "bdd", n=9, size=(40, 72), split="val")
    (run[0] / "log.jsonl").write_text('{"step": 0, "radius_otp": 1, "loss_otp": 1, "lam": null}')
    state, score = torch.load(run[0] / "last.pt"), scorer(net, otp, 0.25)
    for name, change in (("run", dict(harmful=harmful, reweight=harmful > 0)), ("other", dict(text_weight=1.0))):
        (run[0].parent / name).mkdir(exist_ok=True)
        torch.save({**state, "config": {**run[1], **change}}, run[0].parent / name / "last.pt")
    command(run[0], "--targets", "bdd", "toy-gta5", "--device", "cpu", "--compare", run[0].parent / "other")
    names = [line.split("/")[-1] for line in capsys.readouterr().out.splitlines() if line.startswith(f"figure: {run[0]}")]
    assert names == [f"{name}.png" for name in ("predictions_bdd", "predictions_toy-gta5", "curves", "reliability", "embedding")]
    assert {path.name for path in run[0].iterdir()} == {*names, "last.pt", "log.jsonl"}
    items = data.list_items("bdd", run[1]["data_root"], "val")[:8:2]  # four of nine
    rows, title = asked["predictions_bdd.png"]
    assert re.fullmatch(r"bdd \(unseen\): \d+% of .*", title) and asked["predictions_toy-gta5.png"][1].startswith("toy-gta5: ")
    for item, row in zip(items, rows, strict=True):
        image, label = data.load_pair(item)
        preds = [evaluate.predict(look, data.to_tensor(image), label.shape) for look in (scorer(net, otp, 1.0), score)]
        want = image, label, *preds, trust(net, otp, image, label)[0]
        assert list(row) == ["image", "truth", "compared: other", "prediction: run", "omega, Eq. 5"]
        assert all(np.allclose(a, b, atol=1e-5, equal_nan=True) for a, b in zip(row.values(), want))
    scenes, note = asked["reliability.png"]
    assert len(scenes) == 8 and ("spoilt" in note) == (not harmful)  # a run without any has some for the figure alone
    for k, scene in enumerate(scenes):
        want = toy.draw("toy-gta5", "train", k, harmful=harmful or 0.1)
        assert all(np.allclose(a, b, atol=1e-5, equal_nan=True) for a, b in zip(scene, (*want, *trust(net, otp, *want[:2])), strict=True))

    nets = model.SegmentationNet(CLIP.visual, stride=net.arch["stride"]), net  # before training, and after
    groups = data.evenly(data.list_items("toy-gta5", "", "train"), 12), items
    for parts, stage in zip(asked["embedding.png"][1].values(), nets, strict=True):
        for (emb, label, _), group in zip(parts.values(), groups, strict=True):
            looks = [ppar.look(ppar.PPAR(stage, otp), data.to_tensor(image), truth) for image, truth in map(data.load_pair, group)]
            cells = np.concatenate([out.emb[0].flatten(1).T.numpy() for out, _, _ in looks])
            labels = np.concatenate([grid.flatten().numpy() for _, _, grid in looks])
            assert (np.bincount(label, minlength=19) == np.bincount(labels, minlength=19)[:19].clip(max=40)).all()
            assert all(np.abs(cells[labels == y] - z).max(1).min() < 1e-6 for z, y in zip(emb, label))


def test_pictures_of_ones_own_get_overlays(run, net, otp, tmp_path, asked):
    files = [tmp_path / folder / "street.png" for folder in "abc"]
    for file, size in zip(files, ((50, 37, 3), (20, 90), (33, 31))):
        file.parent.mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8)).save(file)
    command(run[0], "--images", *files, "--device", "cpu")
    for file, end in zip(files, ("", "_2", "_2_2")):
        image, over = asked[f"overlay_street{end}.png"][0][0].values()
        pred = evaluate.predict(scorer(net, otp, 0.25), data.to_tensor(image), image.shape[:2])
        assert (image == np.array(Image.open(file).convert("RGB"))).all()
        assert np.abs(over - 0.45 * image - 0.55 * data.colours(pred)).max() <= 1
        assert (run[0] / f"overlay_street{end}.png").is_file()
    with pytest.raises(SystemExit, match="test_figures.py is no picture"):
        command(run[0], "--images", __file__, "--device", "cpu")


def test_pictures_of_ones_own_are_read_as_those_of_data_sets_are(run, tmp_path, asked):
    file, shades = tmp_path / "deep.png", np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    write_png(file, shades, 16)
    command(run[0], "--images", file, "--device", "cpu")
    image, _ = asked["overlay_deep.png"][0][0].values()
    assert (image == (shades // 256)[..., None]).all()
    Image.fromarray(shades.astype(np.float32)).save(file, "TIFF")
    with pytest.raises(SystemExit, match="deep.png holds floating-point numbers of 32 bits, .* save it with 8 bits"):
        command(run[0], "--images", file, "--device", "cpu")


# ------------------------------------------------------------------------------------------- large pictures, small memory


@pytest.mark.parametrize("size, step", [((96, 192), 1), ((479, 1), 1), ((1052, 1914), 3), ((3024, 4032), 8), ((4032, 3024), 8)])
def test_a_panel_gets_at_least_one_pixel_for_every_dot_and_no_picture_of_the_drawn_world_is_thinned(size, step):
    array = np.arange(size[0] * size[1]).reshape(size)
    assert (figures.thin(array, 3.2) == array[::step, ::step]).all()
    assert max(figures.thin(array, 3.2).shape) >= min(max(size), 3.2 * figures.DPI)


def test_huge_pictures_are_thinned_before_they_are_drawn_and_scored_in_full(tmp_path, drawn, run, net, otp, monkeypatch):
    """Of a picture of 1000 x 1600, a panel of 3.2 inches shows every third row and column."""
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (1000, 1600, 3), np.uint8), rng.integers(0, 19, (1000, 1600), np.uint8)
    monkeypatch.setattr(data, "load_pair", lambda item, mapillary: (image, label))
    pred = rng.integers(0, 19, label.shape).astype(np.uint8)
    monkeypatch.setattr(figures, "predict", lambda score, tensor, shape, **protocol: pred)
    omega = rng.random(label.shape).astype(np.float32)
    monkeypatch.setattr(figures, "_doubt", lambda *words: omega)
    kept = []
    monkeypatch.setattr(figures, "figure_predictions", lambda path, rows, title, draw=figures.figure_predictions, **more:
                        kept.extend(rows) or draw(path, rows, title, **more))
    items = data.list_items("bdd", run[1]["data_root"], "val")[:2]
    figures._draw_predictions(checkpoint.load_run(run[0]), None, "bdd", items, tmp_path / "p.png")
    for row in kept:
        assert all(array.base is None for array in row.values()), "a view would keep the whole picture in memory"
        for array, whole in zip(row.values(), (image, label, pred, omega), strict=True):
            assert (array == whole[::3, ::3]).all()
    assert f"{(pred == label).mean():.0%} of the pixels are right" in drawn[0].get_suptitle()
    shown = [ax.images[0].get_array() for ax in drawn[0].axes[:4]]
    assert all(array.shape[:2] == (334, 534) for array in shown)
    figures.figure_predictions(tmp_path / "whole.png", [dict(image=image, truth=label)], "by a caller who thins nothing")
    assert all(ax.images[0].get_array().shape[:2] == (334, 534) for ax in drawn[1].axes)


def test_the_embedding_keeps_the_chosen_cells_alone_and_asks_each_network_one_picture_at_a_time(run, net, otp, monkeypatch):
    write_tiny(run[1]["data_root"], "bdd", n=5, size=(64, 96), split="val")
    items, alive, most = data.list_items("bdd", run[1]["data_root"], "val"), set(), []

    class Seen:  # stands for an output, and says when it is dropped
        def __init__(self, out):
            self.out = out
            alive.add(id(self))
            most.append(len(alive))

        def __getattr__(self, name):
            return getattr(self.out, name)

        def __del__(self):
            alive.discard(id(self))

    modules = {"a": ppar.PPAR(net, otp), "b": ppar.PPAR(small_net(seed=3), otp, small_net(seed=1).encoder)}
    looks = {stage: lambda image, label, module=module: (Seen((got := ppar.look(module, image, label))[0]), *got[1:])
             for stage, module in modules.items()}
    found = figures._pixels(looks, items, net.encoder, "A", per_class=3)
    assert max(most) <= 2 and len(most) == 2 * len(items)  # never more than one of each network
    for stage, module in modules.items():
        outs = [ppar.look(module, data.to_tensor(image), label) for image, label in map(data.load_pair, items)]
        emb = np.concatenate([out.emb[0].flatten(1).T for out, _, _ in outs])
        label = np.concatenate([grid.flatten() for _, _, grid in outs])
        order = np.random.default_rng(0)  # the cells that were drawn when all outputs were kept
        chosen = np.concatenate([order.permutation(np.flatnonzero(label == c))[:3] for c in range(19)])
        assert np.allclose(found[stage][0], emb[chosen], atol=1e-6) and (found[stage][1] == label[chosen]).all()
        assert (found[stage][2] is None) == (stage == "a")
        assert stage == "a" or np.allclose(found[stage][2], np.mean([out.vtp[0].numpy() for out, _, _ in outs], axis=0), atol=1e-6)


def test_figures_see_with_the_precision_of_the_run(run, monkeypatch):
    seen, look = [], ppar.look
    monkeypatch.setattr(ppar, "look", lambda *words: seen.append(torch.is_autocast_enabled("cpu")) or look(*words))
    module = checkpoint.load_run(run[0]).ppar
    image, label = torch.zeros(3, 40, 72), np.zeros((40, 72), np.uint8)
    for amp in ("fp32", "bf16"):
        out, _, _ = evaluate.make_look(module, SimpleNamespace(amp=amp))(image, label)
        assert out.logits.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32) and out.emb.dtype == torch.float32
        layout = torch.channels_last if amp == "bf16" else torch.contiguous_format
        assert module.net.encoder.visual.conv2.weight.is_contiguous(memory_format=layout)
    assert seen == [False, True]


def test_figures_of_a_vit_show_the_prediction_that_is_scored_by_windows(run, otp, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "predict", lambda score, image, shape, **protocol: seen.append(protocol) or np.zeros(shape, np.uint8))
    vit = small_net("vit")
    state = torch.load(run[0] / "last.pt", weights_only=True)
    torch.save({**state, "model": vit.state_dict(), "clip": small_net("vit", seed=1).encoder.state_dict(), "arch": vit.arch,
                "config": {**run[1], "crop": 32}}, run[0] / "last.pt")
    one = checkpoint.load_run(run[0])
    figures._draw_predictions(one, None, "bdd", data.list_items("bdd", run[1]["data_root"], "val"), run[0] / "p.png")
    figures.segment_pictures(one, [data.list_items("bdd", run[1]["data_root"], "val")[0].image])
    assert seen == 4 * [{**evaluate.PROTOCOL, "slide": 32}]


# --------------------------------------------------------------------------------------------------- when something ends it


def ended(*words):
    with pytest.raises(SystemExit) as caught:
        command(*words, "--device", "cpu")
    return caught.value.code


def test_a_disk_that_is_full_while_a_figure_is_drawn_gives_the_systems_reason_and_leaves_no_half_file(run):
    """A limit on the size of a file stands for the disk: the system refuses to write more."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        sentence = ended(run[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in sentence and "predictions_bdd.png" in sentence and "Traceback" not in sentence
    assert [path.name for path in run[0].iterdir()] == ["last.pt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_figures_are_drawn_says_what_is_kept_and_how_to_go_on(run, number, monkeypatch):
    monkeypatch.setattr(figures, "_draw_embedding", lambda *words: os.kill(os.getpid(), number))
    sentence = ended(run[0])
    assert sentence.startswith("error: stopped by a signal: ") and f"python figures.py {run[0]}`" in sentence and "stay" in sentence
    assert {path.name for path in run[0].iterdir()} == {"last.pt", "predictions_bdd.png", "reliability.png"}


def test_memory_that_runs_out_while_figures_are_drawn_is_a_sentence(run, monkeypatch):
    monkeypatch.setattr(figures, "_draw_embedding", lambda *words: torch.empty(2 ** 60, dtype=torch.uint8))
    sentence = ended(run[0])
    assert "out of memory" in sentence and "scores and finished figures stay" in sentence and "Traceback" not in sentence


# ------------------------------------------------------------------------------------------------------- names and windows


def test_names_with_dollars_and_bytes_are_shown_as_they_are(run, drawn, tmp_path, capsys):
    """Two $ make a formula in matplotlib, and an unfinished one is an error. Bytes that are no UTF-8 have no letters."""
    odd = os.fsdecode(b"a$x_{1$ \xff $\\frac.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "plain.png")
    os.rename(tmp_path / "plain.png", tmp_path / odd)
    folder = tmp_path / os.fsdecode(b"run$\\alpha$\xff")
    shutil.copytree(run[0], folder)
    command(folder, "--images", tmp_path / odd, "--device", "cpu")
    assert drawn[0].axes[0].get_title() == "a$x_{1$ \\udcff $\\frac.png" and not drawn[0].axes[0].title.get_parse_math()
    command(folder, "--compare", folder, "--device", "cpu")
    titles = [ax.get_title() for ax in drawn[1].axes]
    assert "prediction: run$\\alpha$\\udcff" in titles and "compared: run$\\alpha$\\udcff" in titles
    assert all(not ax.title.get_parse_math() for ax in drawn[1].axes[:5]) and not drawn[1]._suptitle.get_parse_math()
    assert "embedding.png" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such thing"])
def test_no_backend_of_the_environment_is_needed_and_no_window_is_opened(backend):
    """A notebook sets MPLBACKEND for every command. All doors import figures.py, with --no-figures, too."""
    code = ("import os, sys; import figures, bound_figure, pictures, curves; figures._demo(); "
            "assert 'matplotlib.pyplot' not in sys.modules; print(os.environ['MPLBACKEND'])")
    root = Path(figures.__file__).parent
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=root,
                          env=dict(os.environ, MPLBACKEND=backend, PYTHONPATH=f"{root}{os.pathsep}{root / 'results'}", OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and done.stdout.endswith(f"{backend}\n"), done.stderr
