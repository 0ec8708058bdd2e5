"""evaluate.py against independent counts, published evaluators, and the ways in which scores go wrong unnoticed."""

import argparse
import csv
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny
from make_clip import make_clip
from PIL import Image

import data
import evaluate
import figures
import model
import prototypes
import toy
from evaluate import EvaluationError, auroc, confusion_matrix, fast_argmax, iou, mean_iou, predict

torch.set_num_threads(1)
VOID = 255
ROOT = Path(evaluate.__file__).parent


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 30)  # most of their time goes into pixels


def random_pair(classes, shape=(40, 60), seed=0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, shape).astype(np.uint8)
    label[rng.random(shape) < 0.1] = VOID
    return rng.integers(0, classes, shape).astype(np.uint8), label


@pytest.fixture(scope="module")
def scenes():
    """(prediction, label) of drawn street scenes; the prediction is the label moved a little, or another scene's."""
    labels = [toy.draw("toy-bdd", "val", index)[1].copy() for index in range(5)]
    rng = np.random.default_rng(0)
    pairs = []
    for label, other in zip(labels, labels[1:]):
        pred = np.where(rng.random(label.shape) < 0.8, np.roll(label, 3, axis=1), other)
        label[-6:] = VOID  # the bonnet of the camera's own car
        pairs.append((np.where(pred == VOID, 0, pred).astype(np.uint8), label))
    return pairs


# ------------------------------------------------------------------------------------------------------ counting


def test_the_published_case_has_the_published_scores():
    conf = torch.tensor([[93, 1], [4, 2]])
    assert iou(conf).tolist() == pytest.approx([93 / 98, 2 / 7], abs=1e-15)
    assert mean_iou(conf) == pytest.approx((93 / 98 + 2 / 7) / 2, abs=1e-15)


def test_rows_are_truth_and_columns_prediction():
    assert confusion_matrix(np.array([1, 1, 0]), np.array([0, 0, 1]), 2).tolist() == [[0, 2], [1, 0]]


@pytest.mark.parametrize("classes", [2, 19, 128, 255])
def test_counts_equal_plain_loops_for_any_number_of_classes_that_fits(classes):
    pred, label = random_pair(classes)
    expected = np.zeros((classes, classes), int)
    for p, t in zip(pred.ravel().tolist(), label.ravel().tolist()):
        if t != VOID:
            expected[t, p] += 1
    conf = confusion_matrix(pred, label, classes)
    assert conf.dtype == torch.int64 and (conf.numpy() == expected).all()


def test_iou_equals_a_count_with_sets(scenes):
    truth, guess = [set() for _ in range(19)], [set() for _ in range(19)]
    for image, (pred, label) in enumerate(scenes):
        for pixel in zip(*np.nonzero(label != VOID)):
            truth[label[pixel]].add((image, *pixel))
            guess[pred[pixel]].add((image, *pixel))
    expected = [len(t & g) / len(t | g) if t | g else math.nan for t, g in zip(truth, guess)]
    found = iou(sum(confusion_matrix(p, t, 19) for p, t in scenes)).tolist()
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_arrays_and_tensors_of_any_shape_and_integer_type_count_alike():
    pred, label = random_pair(19)
    expected = confusion_matrix(pred, label, 19)
    assert (confusion_matrix(torch.from_numpy(pred).long(), label, 19) == expected).all()
    flat = confusion_matrix(pred.astype(np.int32).reshape(1, -1), torch.from_numpy(label).view(1, -1), 19)
    assert (flat == expected).all()
    assert confusion_matrix(pred[:0], label[:0], 19).sum() == 0
    with pytest.raises(EvaluationError, match="shape"):
        confusion_matrix(pred, label.T, 19)


def test_tables_of_two_halves_add_up():
    pred, label = random_pair(19)
    halves = confusion_matrix(pred[:13], label[:13], 19) + confusion_matrix(pred[13:], label[13:], 19)
    assert (halves == confusion_matrix(pred, label, 19)).all()


def test_renaming_the_classes_permutes_the_scores():
    pred, label = random_pair(19)
    rename = np.append(np.random.default_rng(1).permutation(19), np.full(237, VOID)).astype(np.uint8)
    before, after = (iou(confusion_matrix(p, t, 19)) for p, t in ((pred, label), (rename[pred], rename[label])))
    assert torch.equal(after[torch.from_numpy(rename[:19]).long()], before)


def test_void_pixels_count_for_nothing_whatever_is_predicted_there():
    pred, label = random_pair(19)
    other = np.where(label == VOID, (pred + 1) % 19, pred).astype(np.uint8)
    assert (confusion_matrix(pred, label, 19) == confusion_matrix(other, label, 19)).all()
    assert math.isnan(mean_iou(confusion_matrix(pred, np.full_like(label, VOID), 19)))


def test_a_class_in_neither_has_no_score_and_one_predicted_for_nothing_scores_zero():
    conf = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]), 4)
    assert iou(conf).tolist() == pytest.approx([1, 0.5, 0, math.nan], nan_ok=True)
    assert mean_iou(conf) == pytest.approx(0.5)


@pytest.mark.parametrize("where", [0, VOID])
@pytest.mark.parametrize("value", [VOID, 19, 254])
def test_a_prediction_that_is_no_class_is_an_error_on_void_too(value, where):
    pred, label = random_pair(19)
    label[3, 4], pred[3, 4] = where, value
    with pytest.raises(EvaluationError, match=f"prediction {value} "):
        confusion_matrix(pred, label, 19)


@pytest.mark.parametrize("value", [19, 33, 254])
def test_a_label_that_is_neither_class_nor_void_is_an_error(value):
    pred, label = random_pair(19)
    label[3, 4] = value
    with pytest.raises(EvaluationError, match=f"label {value} .*raw ids"):
        confusion_matrix(pred, label, 19)


@pytest.mark.parametrize("value", [-1, 256, 300])
def test_ids_beyond_a_byte_do_not_wrap_round_to_classes(value):
    good = np.zeros(4, np.int64)
    bad = np.array([0, 0, value, 0])
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(EvaluationError, match=str(value)):
            confusion_matrix(*pair, 19)
    with pytest.raises(EvaluationError, match="integer"):
        confusion_matrix(good.astype(float), good, 19)


def test_scores_equal_torchmetrics(scenes):
    JaccardIndex = pytest.importorskip("torchmetrics").JaccardIndex
    metrics = [JaccardIndex(task="multiclass", num_classes=19, ignore_index=VOID, average=average)
               for average in (None, "macro")]
    for pred, label in scenes:
        for metric in metrics:
            metric.update(torch.from_numpy(pred), torch.from_numpy(label))
    conf = sum(confusion_matrix(p, t, 19) for p, t in scenes)
    assert (metrics[0].confmat == conf).all()
    each = metrics[0].confmat.double()  # its own formula, but in float64: compute() rounds to float32
    each = each.diagonal() / (each.sum(0) + each.sum(1) - each.diagonal())
    assert iou(conf).tolist() == pytest.approx(each.tolist(), abs=1e-9, nan_ok=True)
    assert iou(conf).nan_to_num().tolist() == pytest.approx(metrics[0].compute().tolist(), abs=1e-6)
    assert mean_iou(conf) == pytest.approx(metrics[1].compute().item(), abs=1e-6)


def test_scores_equal_those_of_the_cityscapes_scripts(scenes, tmp_path):
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    to_id = np.zeros(256, np.uint8)  # void becomes `unlabeled`, which the scripts ignore
    for label in official.labels:
        if 0 <= label.trainId < 19:
            to_id[label.trainId] = label.id
    official.args.evalInstLevelScore = False
    table = official.generateMatrix(official.args)
    for pred, label in scenes:
        for name, ids in (("pred", pred), ("truth", label)):
            Image.fromarray(to_id[ids]).save(tmp_path / f"{name}.png")
        official.evaluatePair(str(tmp_path / "pred.png"), str(tmp_path / "truth.png"), table, {}, {}, official.args)
    theirs = {label.name: official.getIouScoreForLabel(label.id, table, official.args)
              for label in official.labels if 0 <= label.trainId < 19}
    conf = sum(confusion_matrix(p, t, 19) for p, t in scenes)
    assert dict(zip(data.CLASSES, iou(conf).tolist())) == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    assert mean_iou(conf) == pytest.approx(official.getScoreAverage(theirs, official.args), abs=1e-9)


def test_auroc_equals_the_count_of_all_pairs_with_ties_half():
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        score, wrong = rng.integers(0, levels, 80) / levels, rng.random(80) < 0.3
        pairs = [(p > n) + 0.5 * (p == n) for p in score[wrong] for n in score[~wrong]]
        assert auroc(score, wrong) == pytest.approx(np.mean(pairs), abs=1e-12)
        assert auroc(-score, wrong) == pytest.approx(1 - np.mean(pairs), abs=1e-12)
    assert auroc([1, 2, 3], [0, 0, 1]) == 1 and auroc(np.ones((2, 2)), np.eye(2)) == 0.5
    assert math.isnan(auroc([1, 2], [1, 1]))


# ---------------------------------------------------------------------------------------------------- predicting


def by_pixel(image):
    """A scorer that looks at single pixels: three classes, the colours."""
    return image.log_softmax(1)


def by_window(image):
    """A scorer whose answer depends on the whole window and on the place in it."""
    ramp = torch.linspace(0, 2, image.shape[3]) + image.mean() + torch.linspace(0, 1, image.shape[2])[:, None]
    return torch.stack([ramp, image[0, 0], 1.5 - ramp])[None].log_softmax(1)


def picture(height=50, width=70, seed=0):
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 4, 5), (19, 7, 9), (255, 6, 6)])
def test_the_fast_maximum_is_argmax_and_the_first_of_equals(shape):
    score = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0)).float()
    pred = fast_argmax(score)
    assert pred.dtype == torch.uint8 and (pred.numpy() == score.numpy().argmax(0)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error_and_not_class_zero(bad):
    for k in (0, 1, 2):
        score = torch.zeros(3, 4, 5)
        score[k, 2, 2] = bad
        with pytest.raises(EvaluationError, match="not finite"):
            fast_argmax(score)


def test_windows_cover_every_pixel_lie_inside_and_end_at_the_border():
    for length in range(1, 30):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                starts = evaluate._starts(length, window, stride)
                assert starts[0] == 0 and starts[-1] == length - window and sorted(set(starts)) == starts
                assert {p for s in starts for p in range(s, s + window)} == set(range(length))
                assert starts[:-1] == [k * stride for k in range(len(starts) - 1)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("slide, stride", [(32, 20), (32, 32), (50, 7), (64, 0), (200, 0), (0, 0)])
def test_every_pixel_gets_the_mean_of_the_probabilities_of_the_windows_that_see_it(slide, stride, flip):
    image = picture()
    height, width = min(slide or 50, 50), min(slide or 70, 70)
    step = stride or max(1, slide * 2 // 3)

    def starts(length, window):
        found = list(range(0, length - window + 1, step))
        return found if found[-1] == length - window else [*found, length - window]

    total, seen = np.zeros((3, 50, 70)), np.zeros((50, 70))
    for top in starts(50, height):
        for left in starts(70, width):
            window = image[None, :, top:top + height, left:left + width]
            views = [by_window(window)] + ([by_window(window.flip(3)).flip(3)] if flip else [])
            for view in views:
                total[:, top:top + height, left:left + width] += view[0].double().exp().numpy()
                seen[top:top + height, left:left + width] += 1
    expected = total / seen
    margin = np.sort(expected, 0)[-1] - np.sort(expected, 0)[-2]
    pred = predict(by_window, image, (50, 70), slide=slide, slide_stride=stride, flip=flip)
    clear = margin > 1e-5
    assert pred.dtype == np.uint8 and (pred == expected.argmax(0))[clear].all() and clear.mean() > 0.99
    caught = []
    original = evaluate.fast_argmax
    try:
        evaluate.fast_argmax = lambda prob: caught.append(prob) or original(prob)
        predict(by_window, image, (50, 70), slide=slide, slide_stride=stride, flip=flip)
    finally:
        evaluate.fast_argmax = original
    assert np.abs(caught[0].numpy() - expected).max() < 1e-5  # exact, and not merely the same winner


def test_a_scorer_of_single_pixels_gives_the_same_classes_whole_by_windows_and_mirrored():
    image = picture()
    whole = predict(by_pixel, image, (50, 70))
    assert (whole == image.argmax(0).numpy()).all()
    assert (predict(by_pixel, image, (50, 70), slide=32, flip=True) == whole).all()


def test_the_default_stride_of_512_is_the_fields_341():
    widths = []

    def counting(window):
        widths.append(window.shape[3])
        return by_pixel(window)

    predict(counting, picture(512, 512 + 341), (512, 853), slide=512)
    assert widths == [512, 512]
    predict(counting, picture(512, 512 + 342), (512, 854), slide=512)
    assert widths == [512] * 5


def test_the_scale_acts_on_the_input_and_the_scores_return_to_the_labels_size():
    image, sizes = picture(40, 60), []

    def watching(window):
        sizes.append(tuple(window.shape[2:]))
        return by_pixel(window)

    pred = predict(watching, image, (80, 90), scale=0.5)
    assert sizes == [(20, 30)] and pred.shape == (80, 90)
    small = F.interpolate(image[None], size=(20, 30), mode="bilinear", antialias=True)
    prob = F.interpolate(small.softmax(1), size=(80, 90), mode="bilinear")[0]
    assert (pred == prob.argmax(0).numpy()).mean() > 0.999  # the probabilities are resized, not the classes


@pytest.mark.parametrize("flags", [dict(scale=0.0), dict(scale=-1.0), dict(slide=-1), dict(slide=32, slide_stride=33),
                                   dict(slide_stride=5)])
def test_settings_that_would_leave_pixels_unseen_are_refused(flags):
    with pytest.raises(EvaluationError, match="--scale"):
        predict(by_pixel, picture(), (50, 70), **flags)


def small_net(kind="resnet", seed=0):
    torch.manual_seed(seed)
    net = model.SegmentationNet(make_clip(kind, dim=24, layers=(1, 1, 1, 1) if kind == "resnet" else 2,
                                          vocabulary=100, context=8).visual, stride=16)
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return small_net()


@pytest.fixture(scope="module")
def otp():
    return prototypes.random_prototypes(19, 24)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("size", [(1, 1), (33, 70), (64, 96)])
def test_images_of_any_size_are_scored_at_their_own_size(kind, size, otp):
    net = small_net(kind)
    image = picture(*size)[None]
    score = evaluate.make_scorer(net, otp, 0.07)(image)
    multiple = net.encoder.multiple
    rows = [min(y, size[0] - 1) for y in range(math.ceil(size[0] / multiple) * multiple)]  # border pixels go on
    cols = [min(x, size[1] - 1) for x in range(math.ceil(size[1] / multiple) * multiple)]
    padded = image[:, :, rows][:, :, :, cols]
    with torch.no_grad():
        expected = F.interpolate(net(padded).logits, size=padded.shape[2:], mode="bilinear").log_softmax(1)
    assert score.shape == (1, 19, *size)
    assert torch.allclose(score, expected[..., :size[0], :size[1]], atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_text_score_enters_as_the_weighted_geometric_mean_of_probabilities(net, otp, beta):
    image = picture(64, 96)[None]
    with torch.no_grad():
        out = net(image)
    size = out.logits.shape[2:]
    text = F.interpolate(torch.einsum("bdhw,kd->bkhw", out.emb, otp) / 0.07, size=size, mode="bilinear")
    low = (1 - beta) * out.logits.log_softmax(1) + beta * text.log_softmax(1)
    prob = F.interpolate(low, size=(64, 96), mode="bilinear").softmax(1)
    score = evaluate.make_scorer(net, otp, 0.07, beta)(image)
    assert torch.allclose(score.exp(), prob, atol=1e-5)
    with pytest.raises(EvaluationError, match="text-weight"):
        evaluate.make_scorer(net, otp, 0.07, beta + 1.1)


def test_scoring_leaves_a_network_in_training_as_it_was(net, otp):
    net.train()
    score = evaluate.make_scorer(net, otp, 0.07)(picture(32, 32)[None])
    assert net.training and not score.requires_grad and all(p.grad is None for p in net.parameters())
    net.eval()
    evaluate.make_scorer(net, otp, 0.07)(picture(32, 32)[None])
    assert not net.training


# --------------------------------------------------------------------------------------------- a run and its results


def write_bdd(root, number=3):
    """A tiny data set in BDD's layout, 40 x 72 pixels."""
    rng = np.random.default_rng(0)
    images, labels = (root / "bdd100k" / part for part in ("images/10k/val", "labels/sem_seg/masks/val"))
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for k in range(number):
        label = np.kron(rng.choice([0, 2, 8, 10, 13, VOID], (5, 9)), np.ones((8, 8))).astype(np.uint8)
        Image.fromarray(rng.integers(0, 256, (40, 72, 3), np.uint8)).save(images / f"{k:04d}.jpg")
        Image.fromarray(label).save(labels / f"{k:04d}.png")
    return images, labels


@pytest.fixture
def run(tmp_path, net, otp):
    """A run folder as train.py leaves it, and a data root: (path of the run, config)."""
    write_bdd(tmp_path / "data")
    torch.manual_seed(0)
    vtp = prototypes.VisualTextPrototypes(24, width=32, layers=2)
    config = dict(source=("toy-gta5",), targets=("bdd",), data_root=str(tmp_path / "data"), mapillary="A", holdout=0,
                  tau=0.07, tau_w=0.07, method="ppar", text_weight=0.25, harmful=0.1, scale=1.0, slide=0,
                  slide_stride=0, flip=False, clip="toy", out="elsewhere", workers=8, steps=7)
    (tmp_path / "run").mkdir()
    state = dict(model=net.state_dict(), vtp=vtp.state_dict(), otp=otp, arch=net.arch, config=config, step=7)
    torch.save(state, tmp_path / "run" / "last.pt")
    return tmp_path / "run", config


def command(*words):
    """The command line, in this process."""
    evaluate.main(evaluate.parser().parse_args([str(word) for word in words]))


def refused(*words):
    """The one sentence that the command line ends with."""
    with pytest.raises(SystemExit) as caught:
        command(*words)
    assert isinstance(caught.value.code, str)
    return caught.value.code


def test_a_run_is_loaded_as_it_was_saved(run, net, otp):
    loaded = evaluate.load_run(run[0])
    image = picture(64, 64)[None]
    with torch.no_grad():
        assert torch.equal(loaded.net(image).logits, net(image).logits)
    state = torch.load(run[0] / "last.pt", weights_only=True)
    assert all(torch.equal(loaded.vtp.state_dict()[name], tensor) for name, tensor in state["vtp"].items())
    assert torch.equal(loaded.otp, otp) and loaded.step == 7 and loaded.config == run[1] and loaded.path == run[0]
    for module in (loaded.net, loaded.vtp):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    torch.save({**state, "vtp": None}, run[0] / "last.pt")
    assert evaluate.load_run(run[0]).vtp is None


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(run, tmp_path):
    state = torch.load(run[0] / "last.pt", weights_only=True)
    for write in (lambda bad, f: torch.save({**state, "extra": bad}, f), pickle.dump,
                  lambda bad, f: torch.save({**state, "extra": bad}, f, _use_new_zipfile_serialization=False)):
        with open(run[0] / "last.pt", "wb") as file:
            write(Malicious(str(tmp_path / "pwned")), file)
        with pytest.raises(EvaluationError, match="nothing in it was executed"):
            evaluate.load_run(run[0])
        assert not (tmp_path / "pwned").exists()


def test_truncated_foreign_and_unfitting_checkpoints_end_in_one_sentence(run):
    file = run[0] / "last.pt"
    whole, state = file.read_bytes(), torch.load(file, weights_only=True)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", whole[:100], whole[:len(whole) // 2], whole[:-30], b"hello", bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(EvaluationError, match="last.pt is no checkpoint that can be read"):
            evaluate.load_run(run[0])
    for foreign, reason in ((state["model"], "not written by train.py"), ([1, 2], "no checkpoint|not written"),
                            ({**state, "arch": {"visual": 3}}, "does not hold"),
                            ({**state, "model": dict(list(state["model"].items())[1:])}, "does not hold"),
                            ({**state, "vtp": {"gamma": torch.ones(3)}}, "does not hold")):
        torch.save(foreign, file)
        with pytest.raises(EvaluationError, match=reason) as caught:
            evaluate.load_run(run[0])
        assert "\n" not in str(caught.value)


def test_one_table_counts_every_image_with_any_number_of_workers(run, net, otp):
    items = data.list_items("bdd", run[1]["data_root"], "val")
    score = evaluate.make_scorer(net, otp, 0.07)
    expected = 0
    for item in items:
        label = data.load_label(item)
        pred = predict(score, data.to_tensor(data.load_image(item)), label.shape)
        expected = expected + confusion_matrix(pred, label, 19)
    for workers in (0, 2):
        assert (evaluate.evaluate_dataset(score, items, workers=workers, progress=False) == expected).all()
    shares = [evaluate.evaluate_dataset(score, items[rank::2], progress=False) for rank in (0, 1)]
    assert (sum(shares) == expected).all()  # several processes
    assert expected.sum() == sum((data.load_label(item) != VOID).sum() for item in items)


def test_scoring_does_not_move_the_random_numbers_of_training(run, net, otp):
    items = data.list_items("bdd", run[1]["data_root"], "val")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    evaluate.evaluate_dataset(evaluate.make_scorer(net, otp, 0.07), items, workers=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("spoil", ["image", "label", "ids", "size"])
def test_a_broken_target_file_ends_the_evaluation_by_its_name(run, net, otp, spoil, workers):
    items = data.list_items("bdd", run[1]["data_root"], "val")
    broken = Path(items[1].image if spoil == "image" else items[1].label)
    if spoil in ("image", "label"):
        broken.write_bytes(broken.read_bytes()[:60])
    else:
        Image.fromarray(np.full((40, 72 if spoil == "ids" else 70), 77 if spoil == "ids" else 0, np.uint8)).save(broken)
    with pytest.raises(data.DataError) as caught:
        evaluate.evaluate_dataset(evaluate.make_scorer(net, otp, 0.07), items, workers=workers, progress=False)
    assert str(broken) in str(caught.value) and "Traceback" not in str(caught.value)


def test_no_images_is_no_score():
    with pytest.raises(EvaluationError, match="no images"):
        evaluate.evaluate_dataset(by_pixel, [])


def three_tables():
    a, b, c = (torch.zeros(19, 19, dtype=torch.int64) for _ in range(3))
    a[0, 0], a[1, 1], a[1, 0] = 50, 30, 20  # IoU 50/70, 30/50
    b[0, 0], b[0, 1] = 90, 10  # IoU 90/100, 0
    c[0, 0] = 1  # IoU 1, of the source
    return dict(bdd=a, cityscapes=b, gta5=c)


def test_the_results_file_holds_what_others_script_against(tmp_path):
    config = dict(source=("gta5",), method="ppar", mapillary="B", scale=0.5, slide=512, slide_stride=0, flip=True)
    returned = evaluate.write_results(tmp_path, three_tables(), config, dict(bdd=3, cityscapes=4, gta5=5))

    def no_nan(name):
        raise AssertionError(name)

    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=no_nan)
    assert results == returned
    bdd = results["targets"]["bdd"]
    assert list(bdd["iou"]) == list(data.CLASSES)
    assert bdd["iou"]["road"] == pytest.approx(100 * 50 / 70) and bdd["iou"]["sky"] is None
    assert bdd["miou"] == pytest.approx(50 * (50 / 70 + 30 / 50)) and bdd["images"] == 3 and bdd["unseen"] is True
    assert (bdd["checkpoint"], bdd["mapillary"]) == ("last", "B")
    assert bdd["evaluation_size"] == "label's full size; input scale 0.5, slide 512/341, flip averaged"
    assert results["targets"]["cityscapes"]["miou"] == pytest.approx(45)
    assert results["mean"] == pytest.approx((bdd["miou"] + 45) / 2)
    assert results["mean_over"] == ["bdd", "cityscapes"] and results["targets"]["gta5"]["unseen"] is False
    assert "unseen" in results["mean_rule"]


def test_holdout_serves_a_target_without_a_split_and_never_uncovers_what_a_source_was_trained_on(tmp_path):
    for name in ("gta5", "synthia"):
        write_tiny(tmp_path, name, n=6)
    config = dict(targets=("gta5", "synthia"), source=("gta5",), data_root=str(tmp_path), holdout=2, holdout_unseen=3)
    assert {name: len(items) for name, items in evaluate.find_targets(config).items()} == {"gta5": 2, "synthia": 3}
    with pytest.raises(data.DataError, match="gta5 has no val split"):
        evaluate.find_targets({**config, "holdout": 0})
    with pytest.raises(data.DataError, match="synthia has no val split"):
        evaluate.find_targets({**config, "holdout": 0, "holdout_unseen": 0, "targets": ("synthia",)})


def test_an_unfinished_run_is_called_one_and_a_target_without_pixels_is_in_no_mean(tmp_path):
    tables = {**three_tables(), "acdc": torch.zeros(19, 19, dtype=torch.int64)}
    results = evaluate.write_results(tmp_path, tables, dict(source=("gta5",), steps=400), step=150)
    assert results["targets"]["bdd"]["checkpoint"] == results["checkpoint"] == "unfinished, step 150 of 400"
    assert results["targets"]["acdc"]["miou"] is None and results["mean_over"] == ["bdd", "cityscapes"]
    assert evaluate.write_results(tmp_path, tables, dict(steps=400), step=400)["checkpoint"] == "last"


def test_the_default_protocol_is_said_in_words():
    assert evaluate.evaluation_size({}) == "label's full size; input scale 1.0, whole image"
    other = evaluate.evaluation_size(dict(scale=2, slide=100, slide_stride=50))
    assert other == "label's full size; input scale 2.0, slide 100/50"


def test_every_row_of_the_csv_says_how_it_was_taken(tmp_path):
    evaluate.write_results(tmp_path, three_tables(), dict(source=("gta5",)), dict(bdd=3, cityscapes=4, gta5=5))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == 4 * 20  # (three data sets and the mean) x (19 classes and the mean)
    assert {row["evaluation_size"] for row in rows} == {"label's full size; input scale 1.0, whole image"}
    assert {(row["checkpoint"], row["mapillary"]) for row in rows} == {("last", "A")}
    cells = {(row["target"], row["class"]): row["iou"] for row in rows}
    assert float(cells["bdd", "road"]) == pytest.approx(100 * 50 / 70) and cells["bdd", "sky"] == ""
    assert float(cells["mean", "road"]) == pytest.approx(50 * (50 / 70 + 0.9))  # without gta5's 100
    assert {row["images"] for row in rows if row["target"] == "cityscapes"} == {"4"}


def test_the_mean_of_the_means_is_the_mean_of_the_mious_and_not_of_the_classes(tmp_path):
    a, b = torch.zeros(2, 19, 19, dtype=torch.int64)
    a[0, 0] = 1  # one class, mIoU 100
    b[0, 0], b[1, 0] = 1, 1  # two classes, 50 and 0
    results = evaluate.write_results(tmp_path, dict(bdd=a, acdc=b), {})
    columns = evaluate.table(results)
    assert columns["mean"]["mean"] == results["mean"] == pytest.approx(62.5)
    assert columns["mean"]["road"] == pytest.approx(75)
    assert columns["mean"]["sidewalk"] == 0 and columns["mean"]["sky"] is None


def test_a_run_without_unseen_targets_has_no_mean(tmp_path):
    results = evaluate.write_results(tmp_path, dict(gta5=three_tables()["gta5"]), dict(source=("gta5",)))
    assert results["mean"] is None and results["mean_over"] == []
    out = io.StringIO()
    evaluate.print_table(results, file=out)
    assert "gta5*" in out.getvalue() and "not part of the mean" in out.getvalue()


def test_the_printed_table_has_classes_as_rows_and_targets_and_their_mean_as_columns(tmp_path):
    counts = dict(bdd=3, cityscapes=4, gta5=5)
    results = evaluate.write_results(tmp_path, three_tables(), dict(source=("gta5",)), counts)
    out = io.StringIO()
    evaluate.print_table(results, file=out)
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["IoU", "in", "%", "bdd", "cityscapes", "gta5*", "mean"]
    assert [line[:14].strip() for line in lines[2:21]] == list(data.CLASSES)
    by_name = {line[:14].strip(): line[14:].split() for line in lines}
    assert by_name["road"] == ["71.4", "90.0", "100.0", "80.7"] and by_name["sky"] == ["-"] * 4
    assert by_name["mean"] == ["65.7", "45.0", "100.0", "55.4"] and by_name["images"] == ["3", "4", "5"]
    assert "input scale 1.0" in lines[-1] and "Mapillary convention A" in lines[-1] and "last" in lines[-1]


def test_the_difference_to_a_second_run_is_taken_over_the_same_targets_only(tmp_path):
    tables = three_tables()
    ours = evaluate.write_results(tmp_path, tables, dict(source=("gta5",)))
    for kept, mean in ((("bdd", "cityscapes"), "+0.0"), (("bdd",), "-")):
        theirs = evaluate.write_results(tmp_path, {name: tables[name] for name in kept}, dict(source=("gta5",)))
        out = io.StringIO()
        evaluate.print_table(ours, theirs, file=out)
        line = next(line for line in out.getvalue().splitlines() if line.startswith("difference"))
        assert line.split()[1] == "+0.0" and line.split()[-1] == mean


def test_a_crash_while_writing_leaves_the_old_results(tmp_path, monkeypatch):
    evaluate.write_results(tmp_path, three_tables(), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, text):
        path.write_bytes(text.encode()[:9])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        evaluate.write_results(tmp_path, dict(bdd=three_tables()["gta5"]), {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 2


# ------------------------------------------------------------------------------------------------ the command line


def test_a_finished_run_is_scored_again_by_command(run, net, otp, capsys):
    command(run[0], "--device", "cpu", "--workers", 0, "--slide", 32, "--flip")
    results = json.loads((run[0] / "results.json").read_text())
    items = data.list_items("bdd", run[1]["data_root"], "val")
    score = evaluate.make_scorer(net, otp, 0.07, 0.25)
    conf = evaluate.evaluate_dataset(score, items, slide=32, flip=True, progress=False)
    assert results["targets"]["bdd"]["miou"] == pytest.approx(100 * mean_iou(conf))
    assert results["targets"]["bdd"]["images"] == 3
    assert results["evaluation_size"] == "label's full size; input scale 1.0, slide 32/21, flip averaged"
    assert results["run"] == "run" and "bicycle" in capsys.readouterr().out
    assert sorted(path.name for path in run[0].iterdir()) == ["last.pt", "results.csv", "results.json"]


def test_figures_are_drawn_beside_a_second_run(run, tmp_path, net, monkeypatch, capsys):
    log = [json.dumps(dict(step=step, loss=1.0, lam=step / 9, radius_otp=1.0)) for step in range(9)]
    (run[0] / "log.jsonl").write_text("\n".join(log) + "\n")
    clip = make_clip(dim=24, layers=(1, 1, 1, 1), vocabulary=9, context=8)
    monkeypatch.setattr(model, "load_clip", lambda name: (clip, ""))
    monkeypatch.setattr(figures, "SCENES", 8)
    message = refused(run[0], "--compare", run[0], "--device", "cpu")
    assert "no results.json" in message
    command(run[0], "--device", "cpu", "--workers", 0)
    assert "scored otherwise" in refused(run[0], "--compare", run[0], "--scale", 0.5, "--device", "cpu")
    capsys.readouterr()
    command(run[0], "--device", "cpu", "--workers", 0, "--compare", run[0], "--figures")
    printed = capsys.readouterr().out
    assert "+0.0" in printed and "AUROC" in printed
    for name in ("predictions_bdd", "curves", "reliability", "embedding"):
        image = np.asarray(Image.open(run[0] / f"{name}.png").convert("RGB"))
        assert image.min() < 100 and image.max() == 255 and min(image.shape[:2]) > 80, name
    assert not list(run[0].glob(".*"))


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


def test_the_bound_is_measured_by_command_with_the_flags_of_the_command(run, monkeypatch):
    asked = {}
    import bound

    monkeypatch.setattr(bound, "measure_run", lambda run, data_root, device: asked.update(run=run, data_root=data_root))
    command(run[0], "--bound", "--targets", "toy-bdd", "--data-root", "there", "--device", "cpu")
    assert asked["run"].config["targets"] == ["toy-bdd"] and asked["data_root"] == "there"


def test_mistakes_of_the_user_end_in_one_sentence(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, reason in (
        ((tmp_path / "nowhere",), "no such run folder"), ((tmp_path / "empty",), "no last.pt"),
        ((run[0], "--targets", "kitti"), "kitti.*choose from.*cityscapes"),
        ((run[0], "--targets", "acdc"), "acdc.*rgb_anon"),
        ((run[0], "--data-root", tmp_path / "gone"), "gone"), ((run[0], "--device", "abacus"), "--device abacus"),
        ((run[0], "--slide", 32, "--slide-stride", 64), "--slide-stride 64"), (("--flip",), "[Gg]ive the folder"),
    ):
        message = refused(*words, *(() if "--device" in words else ("--device", "cpu")))
        assert message.startswith("error: ") and re.search(reason, message, re.DOTALL), message
    assert not (run[0] / "results.json").exists()


def test_flags_are_spelled_as_in_training_and_never_abbreviated(capsys):
    import train

    own = {"help", "run", "compare", "figures", "bound", "images"}
    ours = {action.dest for action in evaluate.parser()._actions} - own
    assert ours <= {field.name for field in train.dataclasses.fields(train.Config)}
    assert {"scale", "slide", "slide_stride", "flip", "mapillary", "targets", "data_root", "device", "workers"} <= ours
    for words in (["run", "--slid", "3"], ["run", "--fig"], ["run", "--mapillary", "C"], ["run", "--scale", "big"]):
        with pytest.raises(SystemExit):
            evaluate.parser().parse_args(words)


def test_help_and_a_misspelt_flag_are_answered_before_torch_is_imported(tmp_path):
    for name in ("torch", "numpy", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported too early')")
    for flag, status in (("--help", 0), ("--slid", 2)):
        done = subprocess.run([sys.executable, ROOT / "evaluate.py", flag], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode == status and "usage" in done.stdout + done.stderr


def test_without_arguments_the_demonstration_runs(capsys):
    command()
    assert "0.6173" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- figures


def test_classes_have_the_colours_of_the_field_and_void_is_black():
    drawn = figures.colours(np.array([[0, 18, VOID]], np.uint8))
    assert drawn.tolist() == [[[128, 64, 128], [119, 11, 32], [0, 0, 0]]]


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
    loaded = evaluate.load_run(run[0])
    item = data.list_items("bdd", run[1]["data_root"], "val")[0]
    image, label = data.to_tensor(data.load_image(item)), torch.from_numpy(data.load_label(item))
    omega = figures._omega(loaded, loaded.config, "cpu", image, label)
    with torch.no_grad():
        emb = net(evaluate.pad(image[None], 32)).emb[0]
    for y, x in ((0, 0), (17, 40), (39, 71)):
        prob = (emb[:, y // 16, x // 16] @ otp.T / 0.07).softmax(0)
        expected = 0 if label[y, x] == VOID else prob[int(label[y, x])].item()
        assert omega[y, x] == pytest.approx(expected, abs=1e-5)
    both = figures._omega(loaded, loaded.config, "cpu", image, label, both=True)
    with torch.no_grad():
        out = net(evaluate.pad(image[None], 32))
        vtp = loaded.vtp(otp, out.emb, out.pooled)[0]
    for y, x in zip(*np.nonzero(label.numpy() != VOID)):
        near = (emb[:, y // 16, x // 16] @ vtp.T / 0.07).softmax(0)[int(label[y, x])].item()
        assert both[y, x] == pytest.approx((omega[y, x] + near) / 2, abs=1e-5)
        if x > 20:
            break
    loaded.vtp = None
    assert (figures._omega(loaded, loaded.config, "cpu", image, label, both=True) == omega).all()
