"""Tests of figures.py: what a figure is asked to show, that it shows just that, and the doors that draw them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
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
from data import VOID, UserError

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Every matplotlib figure that is saved, in few pixels: most of the time goes into them."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda fig, file, **_: kept.append(fig) or save(fig, file, dpi=30, format="png"))
    return kept


@pytest.fixture
def asked(monkeypatch):
    """{file name: what its figure is asked to show}; nothing is drawn."""
    kept = {}
    for kind in ("predictions", "reliability", "embedding"):
        def record(path, *what, answer=0.5 if kind == "reliability" else None, **_):
            kept[Path(path).name] = what
            return answer or path
        monkeypatch.setattr(figures, f"figure_{kind}", record)
    monkeypatch.setattr(figures, "SCENES", 8)
    monkeypatch.setattr(figures, "load_clip", lambda name: (make_clip(dim=24, layers=(1,) * 4, vocabulary=9, context=8), ""))
    return kept


def command(*words):
    figures.main(figures.parse([str(word) for word in words]))


def refused(*words):
    with pytest.raises(SystemExit) as caught:
        command(*words)
    return caught.value.code


def loaded(run, **config):
    """The checkpoint.Run of a fixture's folder, its figures to be drawn into that folder."""
    found = checkpoint.load_run(run[0])
    vars(found.config).update(out=str(run[0]), **config)
    return found


def shown(ax):
    """Colours (H, W, 3) uint8 of a panel's picture."""
    return ax.images[0].to_rgba(ax.images[0].get_array(), bytes=True)[..., :3]


def words(legend):
    return [text.get_text() for text in legend.get_texts()]


# ------------------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("titles", [True, False])
def test_a_panel_shows_its_array_as_picture_classes_mask_or_map(tmp_path, drawn, titles):
    rng = np.random.default_rng(0)
    ids = rng.choice([*range(19), VOID], (20, 30)).astype(np.uint8)
    omega = np.where(ids == VOID, np.nan, rng.uniform(0.3, 0.6, ids.shape))
    row = dict(picture=rng.integers(0, 256, (20, 30, 3), np.uint8), truth=ids, mask=ids == 2, omega=omega)
    figures.figure_predictions(tmp_path / "p.png", [row, row], "a title", inches=2.5, titles=titles)
    fig, = drawn
    want = [row["picture"], data.colours(ids), np.repeat(255 * (ids == 2)[..., None], 3, 2),
            np.where((ids == VOID)[..., None], 153, colormaps["viridis"](omega, bytes=True)[..., :3])]
    for ax, colours in zip(fig.axes[:8], want * 2, strict=True):
        assert (shown(ax) == colours).all() and not ax.axison
    assert [ax.get_title() for ax in fig.axes[:4]] == ([*row] if titles else [""] * 4) and not fig.axes[4].get_title()
    assert len(fig.axes) == 9 and fig.get_suptitle() == "a title"  # the ninth: one colour bar for both maps
    assert words(fig.legends[0]) == [*data.CLASSES, "void"]
    assert [patch.get_facecolor()[:3] for patch in fig.legends[0].get_patches()] == [*map(tuple, data.colours([*range(19), VOID]) / 255)]
    width, height = fig.get_size_inches()
    assert width == 10 and 2 * 2.5 * 20 / 30 < height < 5.5
    assert 0.5 * fig.bbox.width < fig.legends[0].get_window_extent().width < fig.bbox.width
    assert Image.open(tmp_path / "p.png").size == (300, int(30 * height))


def test_the_reliability_figure_scores_one_minus_omega_over_all_labelled_pixels_and_shows_spoilt_scenes(tmp_path, drawn):
    rng = np.random.default_rng(0)
    scenes = [(rng.integers(0, 256, (20, 30, 3), np.uint8), rng.choice([0, 2, VOID], (20, 30)).astype(np.uint8),
               rng.random((20, 30)) < 0.2, rng.integers(0, 9, (20, 30)) / 9) for _ in range(8)]
    scenes[0][2][:] = False
    scenes[4][2][:] = scenes[4][1] == VOID  # nothing to find
    label, wrong, omega = (np.stack([scene[k] for scene in scenes]) for k in (1, 2, 3))
    bad, good = omega[wrong & (label != VOID)][:, None], omega[~wrong & (label != VOID)]
    area = figures.figure_reliability(tmp_path / "r.png", scenes, ", a note")
    assert area == pytest.approx(((bad < good) + 0.5 * (bad == good)).mean(), abs=1e-12)  # harmful: the lower omega
    fig, = drawn
    assert f"AUROC {area:.3f} (8 scenes, a note)" in fig.get_suptitle() and len(fig.axes) == 21
    for line, k in enumerate((1, 2, 3, 5, 6)):
        panels = [shown(ax) for ax in fig.axes[4 * line:4 * line + 4]]
        assert (panels[0] == scenes[k][0]).all() and (panels[1] == data.colours(label[k])).all()
        assert (panels[2][..., 0] == 255 * (wrong[k] & (label[k] != VOID))).all()
        assert ((panels[3] == 153).all(-1) == (label[k] == VOID)).all()
    figures.figure_reliability(tmp_path / "r.png", [scenes[0], scenes[4]])
    assert len(drawn[1].axes) == 5 and (shown(drawn[1].axes[0]) == scenes[0][0]).all()


def test_an_embedding_is_seen_in_the_plane_of_the_largest_variance_of_pixels_and_present_prototypes(tmp_path, drawn):
    rng, stages = np.random.default_rng(0), {}
    for stage in ("before", "after"):
        parts = {group: (rng.normal(size=(30, 5)) * (1, 3, 0.1, 2, 0.2), rng.choice(classes, 30))
                 for group, classes in (("source", [0, 2]), ("targets", [2, 13]))}
        stages[stage] = rng.normal(size=(19, 5)), parts
    figures.figure_embedding(tmp_path / "e.png", stages)
    fig, = drawn
    assert words(fig.legends[0]) == ["road", "building", "car"]
    for line, (stage, (prototypes, parts)) in enumerate(stages.items()):
        points = np.concatenate([prototypes[[0, 2, 13]], *(emb for emb, _ in parts.values())])
        variance, axis = np.linalg.eigh(np.cov(points.T))
        axes = fig.axes[2 * line:2 * line + 2]
        assert f"({100 * variance[-1] / variance.sum():.0f} %" in axes[0].get_xlabel()
        assert f"({100 * variance[-2] / variance.sum():.0f} %" in axes[0].get_ylabel()
        anchors = (prototypes[[0, 2, 13]] - points.mean(0)) @ axis[:, :-3:-1]
        sign = np.sign(anchors[0] * axes[0].collections[1].get_offsets()[0])  # a direction has none of its own
        for ax, (group, (emb, label)) in zip(axes, parts.items()):
            pixels, stars = ax.collections
            assert ax.get_title() == f"{stage}: {group}" and ax.get_xlim() == axes[0].get_xlim()
            assert np.allclose(pixels.get_offsets(), (emb - points.mean(0)) @ axis[:, :-3:-1] * sign)
            assert np.allclose(stars.get_offsets(), anchors * sign)
            assert np.allclose(pixels.get_facecolors()[:, :3], data.COLORS[label] / 255)
            assert np.allclose(stars.get_facecolors()[:, :3], data.COLORS[[0, 2, 13]] / 255)
    assert "text prototype (OTP)" in words(fig.axes[3].get_legend())


def test_curves_are_drawn_over_the_logged_steps_with_gaps_where_a_method_has_no_number(tmp_path, drawn):
    log = [dict(step=0, loss=1.0), dict(step=10, radius_otp=1.0, radius_vtp=None), dict(step=20, radius_otp=0.9, radius_vtp=0.8, lam=0.5)]
    figures.figure_curves(tmp_path / "c.png", log)
    figures.figure_curves(tmp_path / "c.png", [dict(step=5, radius_otp=1.0, lam=1.0)])
    (top, bottom), (alone, _) = (fig.axes for fig in drawn)
    assert [list(line.get_xdata()) for line in top.lines + bottom.lines] == [[10, 20]] * 3
    found = {line.get_label().split(",")[0]: line.get_ydata() for line in top.lines}
    assert np.allclose(found["to VTP"], [np.nan, 0.8], equal_nan=True) and np.allclose(found["to OTP"], [1, 0.9])
    assert np.allclose(bottom.lines[0].get_ydata(), [np.nan, 0.5], equal_nan=True)
    assert [line.get_label() for line in alone.lines] == ["to OTP, the second goal"] and not drawn[0].legends
