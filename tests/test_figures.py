"""Tests of figures.py: what a figure is asked to show, that it shows just that, and the doors that draw them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_png, write_tiny
from make_clip import make_clip
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from workbench import scorer, small_net

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
