"""Tests of figures.py: what a figure is asked to show, that it shows just that, and the doors that draw them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny
from make_clip import make_clip
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from workbench import scorer

import checkpoint
import data
import evaluate
import figures
import model
import ppar
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


def test_the_reliability_figure_scores_one_minus_omega_and_shows_spoilt_scenes_grey_on_void(tmp_path, drawn):
    rng, shape = np.random.default_rng(0), (8, 20, 30)
    image, label = rng.integers(0, 256, (*shape, 3), np.uint8), rng.choice([0, 2, VOID], shape).astype(np.uint8)
    wrong, omega, valid = rng.random(shape) < 0.2, rng.integers(1, 9, shape) / 10, label != VOID
    wrong[0], wrong[4] = False, ~valid[4]  # nothing to find there
    area = figures.figure_reliability(tmp_path / "r.png", [*zip(image, label, wrong, omega)], ", a note")
    bad, good = omega[wrong & valid][:, None], omega[~wrong & valid]
    assert area == pytest.approx(((bad < good) + 0.5 * (bad == good)).mean(), abs=1e-12)  # harmful: the lower omega
    assert f"AUROC {area:.3f} (8 scenes, a note)" in drawn[0].get_suptitle()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [*data.CLASSES, "void"]
    assert drawn[0].get_figheight() > 5 * drawn[0].get_figwidth() / 4 * 20 / 30  # room for every panel and the legend
    panels = [ax.images[0].to_rgba(ax.images[0].get_array(), bytes=True)[..., :3] for ax in drawn[0].axes[:20]]
    found = np.array(panels).reshape(5, 4, 20, 30, 3).swapaxes(0, 1)
    k = [1, 2, 3, 5, 6]
    assert (found[0] == image[k]).all() and (found[1] == data.colours(label[k])).all()
    assert (found[2] == 255 * (wrong & valid)[k, ..., None]).all()
    map_colours = np.where(valid[..., None], colormaps["viridis"](omega, bytes=True)[..., :3], 153)
    assert (found[3] == map_colours[k]).all() and len(drawn[0].axes) == 21  # the last: one colour bar


def test_an_embedding_is_seen_in_the_plane_of_the_largest_variance_of_pixels_and_present_prototypes(tmp_path, drawn):
    rng = np.random.default_rng(0)
    otp, emb = rng.normal(size=(19, 5)), rng.normal(size=(2, 30, 5)) * (1, 3, 0.1, 2, 0.2)
    label = np.stack([rng.choice([0, 2], 30), rng.choice([2, 13], 30)])
    figures.figure_embedding(tmp_path / "e.png", {"before": (otp, {"source": (emb[0], label[0]), "targets": (emb[1], label[1])})})
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


def test_curves_have_a_gap_where_a_method_has_no_number(tmp_path, drawn):
    log = [dict(step=0), dict(step=10, radius_otp=1.0, radius_vtp=None), dict(step=20, radius_otp=0.9, radius_vtp=0.8, lam=0.5)]
    figures.figure_curves(tmp_path / "c.png", log)
    figures.figure_curves(tmp_path / "c.png", log[:2])
    lines = [line for ax in drawn[0].axes for line in ax.lines]
    assert np.array_equal([line.get_xydata() for line in lines], [[(10, y), (20, z)] for y, z in (
        (np.nan, 0.8), (1, 0.9), (np.nan, 0.5))], equal_nan=True)
    assert [line.get_label() for line in drawn[1].axes[0].lines] == ["to OTP, the second goal"]


def omegas(ppar, image, label):
    """Eq. 5 (H, W), 0 on void, every pixel in the cell that holds it: of the OTP alone, and mean with the VTP if any."""
    with torch.no_grad():
        _, emb, vtp = ppar(model.pad(data.to_tensor(image)[None], 32))
    z = emb[0].repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :label.shape[0], :label.shape[1]]
    asked = (ppar.otp,) if vtp is None else (ppar.otp, vtp[0])
    own = [(torch.einsum("dhw,kd->khw", z, p) / 0.07).softmax(0).numpy() for p in asked]
    own = [np.take_along_axis(omega, label[None] % VOID, 0)[0] * (label != VOID) for omega in own]
    return own[0], sum(own) / len(own)


@pytest.mark.parametrize("harmful", [0.4, 0.0])
def test_figures_of_a_run_show_its_targets_beside_a_second_runs_its_scenes_and_cells(run, net, otp, asked, capsys, harmful):
    write_tiny(run[1]["data_root"], "bdd", n=9, size=(40, 72), split="val")
    (run[0] / "log.jsonl").write_text(json.dumps(dict(step=0, radius_otp=1.0)))
    state = torch.load(run[0] / "last.pt")
    state["vtp"] = state["vtp"] if harmful else None  # as a method without one leaves it
    for name, change in (("run", dict(harmful=harmful)), ("other", dict(text_weight=1.0))):
        (run[0].parent / name).mkdir(exist_ok=True)
        torch.save({**state, "config": {**run[1], **change}}, run[0].parent / name / "last.pt")
    command(run[0], "--targets", "bdd", "toy-gta5", "--device", "cpu", "--compare", run[0].parent / "other")
    names = [line.split("/")[-1] for line in capsys.readouterr().out.splitlines() if line.startswith(f"figure: {run[0]}")]
    assert names == [f"{name}.png" for name in ("predictions_bdd", "predictions_toy-gta5", "curves", "reliability", "embedding")]
    assert {path.name for path in run[0].iterdir()} == {*names, "last.pt", "log.jsonl"}
    items = data.list_items("bdd", run[1]["data_root"], "val")[:8:2]  # four of nine
    module = checkpoint.load_run(run[0]).ppar
    rows, title = asked["predictions_bdd.png"]
    assert title == "bdd (unseen)" and asked["predictions_toy-gta5.png"][1] == "toy-gta5"
    for item, row in zip(items, rows, strict=True):
        image, label = data.load_pair(item)
        preds = [evaluate.predict(scorer(net, otp, beta), data.to_tensor(image), label.shape) for beta in (1.0, 0.25)]
        omega = np.where(label == VOID, np.nan, omegas(module, image, label)[0])
        assert list(row) == ["image", "truth", "compared: other", "prediction: run", "omega from the OTP, Eq. 5"]
        assert all(np.allclose(a, b, atol=1e-5, equal_nan=True) for a, b in zip(row.values(), (image, label, *preds, omega)))
    scenes, note = asked["reliability.png"]
    assert len(scenes) == 8 and ("spoilt" in note) == (not harmful)  # a run without any has some for the figure alone
    for k, scene in enumerate(scenes):
        want = toy.draw("toy-gta5", "train", k, harmful=harmful or 0.1)
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(scene, (*want, omegas(module, *want[:2])[1]), strict=True))

    clip = ppar.PPAR(model.SegmentationNet(CLIP.visual, stride=net.arch["stride"]).eval(), otp)
    groups = data.evenly(data.list_items("toy-gta5", "", "train"), 12), items
    for (_, parts), stage in zip(asked["embedding.png"][0].values(), (clip, module), strict=True):
        for (emb, label), group in zip(parts.values(), groups, strict=True):
            pairs = map(data.load_pair, group)
            looks = [ppar.look(stage, data.to_tensor(image), torch.from_numpy(truth)) for image, truth in pairs]
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
    for words, reason in (((run[0], "--images", __file__), "test_figures.py is no picture"), ((tmp_path,), "no last.pt"),
                          ((run[0], "--images", tmp_path / "gone.png"), "gone.png is no picture")):
        with pytest.raises(SystemExit, match=reason):
            command(*words, "--device", "cpu")


def test_the_gallery_and_the_demonstration_need_no_run(tmp_path, asked, capsys):
    command("--gallery", tmp_path / "gallery.png")
    for domain, row in zip(toy.DOMAINS, asked["gallery.png"][0], strict=True):
        want = [array for k in range(3) for array in toy.draw(domain, "val", k)[:2]]
        assert all((a == b).all() for a, b in zip(row.values(), want, strict=True)), domain
    command()
    assert "AUROC 1.0" in capsys.readouterr().out
