"""evaluate.py against independent counts, published evaluators, and the ways in which scores go wrong unnoticed."""

import csv
import io
import json
import math
import os
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
from PIL import Image
from workbench import scorer, small_net

import checkpoint
import data
import evaluate
import toy
from data import UserError
from evaluate import auroc, confusion_matrix, fast_argmax, iou, mean_iou, predict

torch.set_num_threads(1)
VOID = 255
ROOT = Path(evaluate.__file__).parent


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
    with pytest.raises(UserError, match="shape"):
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
    with pytest.raises(UserError, match=f"prediction {value} "):
        confusion_matrix(pred, label, 19)


@pytest.mark.parametrize("value", [19, 33, 254])
def test_a_label_that_is_neither_class_nor_void_is_an_error(value):
    pred, label = random_pair(19)
    label[3, 4] = value
    with pytest.raises(UserError, match=f"label {value} .*raw ids"):
        confusion_matrix(pred, label, 19)


@pytest.mark.parametrize("value", [-1, 256, 300])
def test_ids_beyond_a_byte_do_not_wrap_round_to_classes(value):
    good = np.zeros(4, np.int64)
    bad = np.array([0, 0, value, 0])
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match=str(value)):
            confusion_matrix(*pair, 19)
    with pytest.raises(UserError, match="integer"):
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
        with pytest.raises(UserError, match="not finite"):
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
    with pytest.raises(UserError, match="--scale"):
        predict(by_pixel, picture(), (50, 70), **flags)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("size", [(1, 1), (33, 70), (64, 96)])
def test_images_of_any_size_are_scored_at_their_own_size(kind, size, otp):
    net = small_net(kind)
    image = picture(*size)[None]
    score = scorer(net, otp)(image)
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
    score = scorer(net, otp, beta)(image)
    assert torch.allclose(score.exp(), prob, atol=1e-5)


def test_a_network_in_training_is_scored_as_in_eval_mode_and_left_as_it_was(net, otp):
    """Batch norm is frozen and nothing drops out: the mode makes no difference, and scoring leaves no trace."""
    image = picture(32, 32)[None]
    expected = scorer(net, otp)(image)
    score = scorer(net.train(), otp)(image)
    assert net.training and not score.requires_grad and all(p.grad is None for p in net.parameters())
    assert torch.equal(score, expected)
    net.eval()


# --------------------------------------------------------------------------------------------- a run and its results


def command(*words):
    """The command line, in this process."""
    evaluate.main(evaluate.parse([str(word) for word in words]))


def refused(*words):
    """The one sentence that the command line ends with."""
    with pytest.raises(SystemExit) as caught:
        command(*words)
    assert isinstance(caught.value.code, str)
    return caught.value.code


def test_one_table_counts_every_image_with_any_number_of_workers(run, net, otp):
    items = data.list_items("bdd", run[1]["data_root"], "val")
    score = scorer(net, otp)
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
    evaluate.evaluate_dataset(scorer(net, otp), items, workers=1, progress=False)
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
    with pytest.raises(UserError) as caught:
        evaluate.evaluate_dataset(scorer(net, otp), items, workers=workers, progress=False)
    assert str(broken) in str(caught.value) and "Traceback" not in str(caught.value)


def test_no_images_is_no_score():
    with pytest.raises(UserError, match="no images"):
        evaluate.evaluate_dataset(by_pixel, [])


def written(folder, confs, images=None, step=400, protocol=evaluate.PROTOCOL, **flags):
    """write_results for a run of these flags, in this folder."""
    config = SimpleNamespace(**{**dict(source=(), method="ppar", mapillary="A", steps=400, out=str(folder)), **flags})
    return evaluate.write_results(checkpoint.Run(None, config, step, folder), confs, protocol, images)


def three_tables():
    a, b, c = (torch.zeros(19, 19, dtype=torch.int64) for _ in range(3))
    a[0, 0], a[1, 1], a[1, 0] = 50, 30, 20  # IoU 50/70, 30/50
    b[0, 0], b[0, 1] = 90, 10  # IoU 90/100, 0
    c[0, 0] = 1  # IoU 1, of the source
    return dict(bdd=a, cityscapes=b, gta5=c)


def test_the_results_file_holds_what_others_script_against(tmp_path):
    returned = written(tmp_path, three_tables(), dict(bdd=3, cityscapes=4, gta5=5), source=("gta5",), mapillary="B",
                       protocol=dict(scale=0.5, slide=512, slide_stride=0, flip=True))

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
    def found(**flags):
        config = dict(targets=("gta5", "synthia"), source=("gta5",), data_root=str(tmp_path), holdout=2, holdout_unseen=3)
        return {name: len(items) for name, items in evaluate.find_targets(SimpleNamespace(**{**config, **flags})).items()}

    assert found() == {"gta5": 2, "synthia": 3}
    with pytest.raises(UserError, match="gta5 has no val split"):
        found(holdout=0)
    with pytest.raises(UserError, match="synthia has no val split"):
        found(holdout=0, holdout_unseen=0, targets=("synthia",))


def test_an_unfinished_run_is_called_one_and_a_target_without_pixels_is_in_no_mean(tmp_path):
    tables = {**three_tables(), "acdc": torch.zeros(19, 19, dtype=torch.int64)}
    results = written(tmp_path, tables, source=("gta5",), step=150)
    assert results["targets"]["bdd"]["checkpoint"] == results["checkpoint"] == "unfinished, step 150 of 400"
    assert results["targets"]["acdc"]["miou"] is None and results["mean_over"] == ["bdd", "cityscapes"]
    assert written(tmp_path, tables)["checkpoint"] == "last"


def test_the_default_protocol_is_said_in_words():
    assert evaluate.evaluation_size(evaluate.PROTOCOL) == "label's full size; input scale 1.0, whole image"
    other = evaluate.evaluation_size(dict(scale=2, slide=100, slide_stride=50, flip=False))
    assert other == "label's full size; input scale 2.0, slide 100/50"


def test_every_row_of_the_csv_says_how_it_was_taken(tmp_path):
    written(tmp_path, three_tables(), dict(bdd=3, cityscapes=4, gta5=5), source=("gta5",))
    rows = {row["target"]: row for row in csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text()))}
    assert list(rows) == ["bdd", "cityscapes", "gta5"]
    assert {row["evaluation_size"] for row in rows.values()} == {"label's full size; input scale 1.0, whole image"}
    assert {(row["checkpoint"], row["mapillary"]) for row in rows.values()} == {("last", "A")}
    assert float(rows["bdd"]["road"]) == pytest.approx(100 * 50 / 70) and rows["bdd"]["sky"] == ""
    assert float(rows["cityscapes"]["miou"]) == pytest.approx(45) and rows["cityscapes"]["images"] == "4"
    assert [row["unseen"] for row in rows.values()] == ["True", "True", "False"]


def test_the_mean_of_the_means_is_the_mean_of_the_mious_and_not_of_the_classes(tmp_path):
    a, b = torch.zeros(2, 19, 19, dtype=torch.int64)
    a[0, 0] = 1  # one class, mIoU 100
    b[0, 0], b[1, 0] = 1, 1  # two classes, 50 and 0
    results = written(tmp_path, dict(bdd=a, acdc=b))
    columns = evaluate.table(results)
    assert columns["mean"]["mean"] == results["mean"] == pytest.approx(62.5)
    assert columns["mean"]["road"] == pytest.approx(75)
    assert columns["mean"]["sidewalk"] == 0 and columns["mean"]["sky"] is None


def test_a_run_without_unseen_targets_has_no_mean(tmp_path, capsys):
    results = written(tmp_path, dict(gta5=three_tables()["gta5"]), source=("gta5",))
    assert results["mean"] is None and results["mean_over"] == []
    evaluate.print_table(results)
    printed = capsys.readouterr().out
    assert "gta5*" in printed and "not part of the mean" in printed


def test_the_printed_table_has_classes_as_rows_and_targets_and_their_mean_as_columns(tmp_path, capsys):
    evaluate.print_table(written(tmp_path, three_tables(), dict(bdd=3, cityscapes=4, gta5=5), source=("gta5",)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["IoU", "in", "%", "bdd", "cityscapes", "gta5*", "mean"]
    assert [line[:14].strip() for line in lines[2:21]] == list(data.CLASSES)
    by_name = {line[:14].strip(): line[14:].split() for line in lines}
    assert by_name["road"] == ["71.4", "90.0", "100.0", "80.7"] and by_name["sky"] == ["-"] * 4
    assert by_name["mean"] == ["65.7", "45.0", "100.0", "55.4"] and by_name["images"] == ["3", "4", "5"]
    assert "input scale 1.0" in lines[-1] and "Mapillary convention A" in lines[-1] and "last" in lines[-1]


def test_the_difference_to_a_second_run_is_taken_over_the_same_targets_only(tmp_path, capsys):
    tables = three_tables()
    ours = written(tmp_path, tables, source=("gta5",))
    for kept, mean in ((("bdd", "cityscapes"), "+0.0"), (("bdd",), "-")):
        evaluate.print_table(ours, written(tmp_path, {name: tables[name] for name in kept}, source=("gta5",)))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("difference"))
        assert line.split()[1] == "+0.0" and line.split()[-1] == mean


# ------------------------------------------------------------------------------------------------ the command line


def test_a_finished_run_is_scored_again_by_command(run, net, otp, capsys):
    command(run[0], "--device", "cpu", "--workers", 0, "--slide", 32, "--flip")
    results = json.loads((run[0] / "results.json").read_text())
    items = data.list_items("bdd", run[1]["data_root"], "val")
    score = scorer(net, otp, 0.25)
    conf = evaluate.evaluate_dataset(score, items, protocol=dict(slide=32, flip=True), progress=False)
    assert results["targets"]["bdd"]["miou"] == pytest.approx(100 * mean_iou(conf))
    assert results["targets"]["bdd"]["images"] == 3
    assert results["evaluation_size"] == "label's full size; input scale 1.0, slide 32/21, flip averaged"
    assert results["run"] == "run" and "bicycle" in capsys.readouterr().out
    assert sorted(path.name for path in run[0].iterdir()) == ["last.pt", "results.csv", "results.json"]


def test_a_second_runs_scores_are_shown_beside_if_they_were_taken_in_the_same_way(run, capsys):
    assert "no results.json" in refused(run[0], "--compare", run[0], "--device", "cpu")
    command(run[0], "--device", "cpu", "--workers", 0)
    assert "scored otherwise" in refused(run[0], "--compare", run[0], "--scale", 0.5, "--device", "cpu")
    command(run[0], "--device", "cpu", "--workers", 0, "--compare", run[0])
    assert "+0.0" in capsys.readouterr().out


def test_mistakes_of_the_user_end_in_one_sentence(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, reason in (
        ((tmp_path / "nowhere",), "no such run folder"), ((tmp_path / "empty",), "no last.pt"),
        ((run[0], "--targets", "kitti"), "kitti.*choose from.*cityscapes"),
        ((run[0], "--targets", "acdc"), "acdc.*rgb_anon"),
        ((run[0], "--data-root", tmp_path / "gone"), "gone"), ((run[0], "--device", "abacus"), "--device abacus"),
        ((run[0], "--slide", 32, "--slide-stride", 64), "--slide-stride 64"), (("--flip",), "[Gg]ive the folder"),
        ((run[0], "--workers", -1), "--workers -1"), ((run[0], "--holdout", -1), "--holdout -1"),
    ):
        message = refused(*words, *(() if "--device" in words else ("--device", "cpu")))
        assert message.startswith("error: ") and re.search(reason, message, re.DOTALL), message
    assert not (run[0] / "results.json").exists()


def test_flags_are_never_abbreviated_and_wrong_values_are_refused():
    for words in (["run", "--slid", "3"], ["run", "--fli"], ["run", "--mapillary", "C"], ["run", "--scale", "big"]):
        with pytest.raises(SystemExit):
            evaluate.parse(words)


@pytest.mark.parametrize("door", ["evaluate.py", "figures.py", "bound.py"])
def test_help_and_a_misspelt_flag_are_answered_before_torch_is_imported(door, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported too early')")
    for flag, status in (("--help", 0), ("--targ", 2)):
        done = subprocess.run([sys.executable, ROOT / door, flag], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode == status and "usage" in done.stdout + done.stderr


def test_without_arguments_the_demonstration_runs(capsys):
    command()
    assert "0.6173" in capsys.readouterr().out
