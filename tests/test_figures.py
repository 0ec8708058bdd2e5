"""Tests of figures.py: every figure says what its numbers say, and the doors that draw them."""

import json

import numpy as np
import pytest
import torch
from make_clip import make_clip
from PIL import Image

import checkpoint
import data
import figures
import model
import ppar
from data import VOID

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 30)  # most of their time goes into pixels


def command(*words):
    figures.main(figures.parse([str(word) for word in words]))


def refused(*words):
    with pytest.raises(SystemExit) as caught:
        command(*words)
    return caught.value.code


def test_the_reliability_figure_scores_one_minus_omega_over_all_labelled_pixels(tmp_path):
    rng = np.random.default_rng(0)
    scenes = [(rng.integers(0, 256, (20, 30, 3), np.uint8), rng.choice([0, 2, VOID], (20, 30)).astype(np.uint8),
               rng.random((20, 30)) < 0.2, rng.integers(0, 9, (20, 30)) / 9) for _ in range(3)]
    valid = np.stack([label for _, label, _, _ in scenes]) != VOID
    wrong, omega = (np.stack([scene[k] for scene in scenes])[valid] for k in (2, 3))
    pairs = [(p < n) + 0.5 * (p == n) for p in omega[wrong] for n in omega[~wrong]]  # harmful: the lower omega
    assert figures.figure_reliability(tmp_path / "r.png", scenes) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert (tmp_path / "r.png").is_file()


def test_omega_of_the_figures_is_eq_5_at_every_pixel(run, net, otp):
    loaded = checkpoint.load_run(run[0])
    image, label = data.load_pair(data.list_items("bdd", run[1]["data_root"], "val")[0])
    image = data.to_tensor(image)
    omega, both = (figures._omega(loaded, image, label, both=both) for both in (False, True))
    with torch.no_grad():
        _, emb, vtp = loaded.ppar(model.pad(image[None], 32))
    checked = 0
    for y, x in zip(*(axis[::97] for axis in np.nonzero(label != VOID))):
        own = [(emb[0, :, y // 16, x // 16] @ p.T / 0.07).softmax(0)[int(label[y, x])].item() for p in (otp, vtp[0])]
        assert omega[y, x] == pytest.approx(own[0], abs=1e-5) and both[y, x] == pytest.approx(sum(own) / 2, abs=1e-5)
        checked += 1
    assert checked > 10 and (omega[label == VOID] == 0).all()
    loaded.ppar.vtp = None
    assert (figures._omega(loaded, image, label, both=True) == omega).all()


def test_figures_are_drawn_by_command_beside_a_second_run(run, tmp_path, monkeypatch, capsys):
    log = [json.dumps(dict(step=step, loss=1.0, lam=step / 9, radius_otp=1.0)) for step in range(9)]
    (run[0] / "log.jsonl").write_text("\n".join(log) + "\n")
    clip = make_clip(dim=24, layers=(1, 1, 1, 1), vocabulary=9, context=8)
    monkeypatch.setattr(figures, "load_clip", lambda name: (clip, ""))
    monkeypatch.setattr(figures, "SCENES", 8)
    command(run[0], "--device", "cpu", "--compare", run[0])
    printed = capsys.readouterr().out
    assert "AUROC" in printed
    for name in ("predictions_bdd", "curves", "reliability", "embedding"):
        assert f"figure: {run[0]}/{name}.png" in printed
        image = np.asarray(Image.open(run[0] / f"{name}.png").convert("RGB"))
        assert image.min() < 100 and image.max() == 255 and min(image.shape[:2]) > 80, name
    assert not list(run[0].glob("*.tmp"))


def test_a_row_of_predictions_holds_picture_truth_both_predictions_and_omega_grey_on_void(run):
    loaded = checkpoint.load_run(run[0])
    item = data.list_items("bdd", run[1]["data_root"], "val")[0]
    image, label = data.load_pair(item)
    row = figures._prediction_row(loaded, item, checkpoint.load_run(run[0]))
    assert list(row) == ["image", "truth", "compared: run", "prediction: run", "omega from the OTP, Eq. 5"]
    assert (row["image"] == image).all() and (row["truth"] == label).all()
    assert (np.isnan(row["omega from the OTP, Eq. 5"]) == (label == VOID)).all()
    alone = figures._prediction_row(loaded, item, None)
    assert list(alone) == ["image", "truth", "prediction", "omega from the OTP, Eq. 5"]


def test_the_pixels_of_the_embedding_are_cells_with_the_label_of_their_centre(run):
    loaded = checkpoint.load_run(run[0])
    items = data.list_items("bdd", run[1]["data_root"], "val")
    emb, label = figures._pixels(loaded.ppar, items, "A", per_class=2)
    assert len(emb) == len(label) and np.bincount(label).max() <= 2 and not (label == VOID).any()
    every = []
    for item in items:
        image, truth = data.load_pair(item)
        out, _, grid = ppar.look(loaded.ppar, data.to_tensor(image), torch.from_numpy(truth))
        every += list(zip(grid.flatten().tolist(), out.emb[0].flatten(1).T.tolist()))
    for z, c in zip(emb, label):
        assert any(c == y and np.allclose(z, e, atol=1e-6) for y, e in every)


def test_pictures_of_ones_own_get_overlays(run, tmp_path):
    files = [tmp_path / "a" / "street.png", tmp_path / "b" / "street.png", tmp_path / "a" / "indexed.png"]
    for file, size in zip(files, ((50, 37), (20, 90), (33, 31))):
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8)).save(file)
    Image.new("P", (33, 31)).save(files[2])
    command(run[0], "--images", *files, "--device", "cpu")
    written = sorted(path.name for path in run[0].glob("*.png"))
    assert written == ["overlay_indexed.png", "overlay_street.png", "overlay_street_2.png"]
    (tmp_path / "note.txt").write_text("hello")
    assert "note.txt is no picture" in refused(run[0], "--images", tmp_path / "note.txt", "--device", "cpu")
    assert "gone.png is no picture" in refused(run[0], "--images", tmp_path / "gone.png", "--device", "cpu")
    assert "no such run folder" in refused(tmp_path / "nowhere", "--device", "cpu")


def test_the_gallery_shows_every_domain_without_a_run(tmp_path):
    command("--gallery", tmp_path / "gallery.png")
    assert min(Image.open(tmp_path / "gallery.png").size) > 100


def test_the_demonstration_finds_all_harmful_pixels(capsys):
    command()
    assert "AUROC 1.0" in capsys.readouterr().out
