"""evaluate.py against independent counts, published evaluators, and the ways in which scores go wrong unnoticed."""

import csv
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VOID, write_tiny
from PIL import Image
from workbench import main, scorer, small_net

import checkpoint
import data
import evaluate
import machine
import train
from data import UserError
from evaluate import confusion_matrix, iou, mean_iou, predict

torch.set_num_threads(1)


def random_pair(classes, seed=0):
    """(prediction, label): a tenth of the label is void, half of the prediction is right."""
    rng = np.random.default_rng(seed)
    label, guess = rng.integers(0, classes, (2, 40, 60)).astype(np.uint8)
    pred = np.where(rng.random(label.shape) < 0.5, label, guess)
    label[rng.random(label.shape) < 0.1] = VOID
    return pred, label


PAIRS = [random_pair(15, seed) for seed in range(4)]  # of 19 classes, four never occur


@pytest.mark.parametrize("classes", [2, 19, 128, 255])
def test_counts_equal_plain_loops_for_any_number_of_classes_that_fits_any_shape_and_integer_type(classes):
    pred, label = random_pair(classes)
    expected = np.zeros((classes, classes), int)  # rows: truth
    for p, t in zip(pred.ravel().tolist(), label.ravel().tolist()):
        if t != VOID:
            expected[t, p] += 1
    for pair in ((pred, label), (torch.from_numpy(pred).long(), label),
                 (pred.astype(np.int32).reshape(1, -1), torch.from_numpy(label).view(1, -1))):
        conf = confusion_matrix(*pair, classes)
        assert conf.dtype == torch.int64 and (conf.numpy() == expected).all()
    assert confusion_matrix(pred[:0], label[:0], classes).sum() == 0
    with pytest.raises(UserError, match="shape"):
        confusion_matrix(pred, label.T, classes)


def test_a_class_in_neither_has_no_score_and_one_predicted_for_nothing_has_zero():
    conf = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]), 4)
    assert iou(conf).tolist() == pytest.approx([1, 0.5, 0, math.nan], nan_ok=True)
    assert mean_iou(conf) == pytest.approx(0.5) and math.isnan(mean_iou(torch.zeros(3, 3)))


@pytest.mark.parametrize("pred, label, message", [
    *((value, where, f"prediction {value} ") for value in (VOID, 19, 254) for where in (0, VOID)),
    *((0, value, f"label {value} .*raw ids") for value in (19, 33, 254)),
    *((*pair, str(value)) for value in (-1, 256, 300) for pair in ((0, value), (value, 0))), (0.0, 0, "integer")])
def test_what_is_no_class_is_an_error_on_void_too_and_does_not_wrap_round_to_one(pred, label, message):
    with pytest.raises(UserError, match=message):
        confusion_matrix(np.array([0, 1, pred]), np.array([0, VOID, label]), 19)


def test_scores_equal_those_of_the_cityscapes_scripts(tmp_path):
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    known = {label.trainId: label for label in official.labels if 0 <= label.trainId < 19}
    to_id = np.array([known[i].id if i in known else 0 for i in range(256)], np.uint8)  # void is `unlabeled`, which they ignore
    official.args.evalInstLevelScore = False
    table = official.generateMatrix(official.args)
    for pred, label in PAIRS:
        for name, ids in (("pred", pred), ("truth", label)):
            Image.fromarray(to_id[ids]).save(tmp_path / f"{name}.png")
        official.evaluatePair(str(tmp_path / "pred.png"), str(tmp_path / "truth.png"), table, {}, {}, official.args)
    theirs = {label.name: official.getIouScoreForLabel(label.id, table, official.args) for label in known.values()}
    conf = sum(confusion_matrix(p, t, 19) for p, t in PAIRS)
    assert dict(zip(data.CLASSES, iou(conf).tolist())) == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    assert mean_iou(conf) == pytest.approx(official.getScoreAverage(theirs, official.args), abs=1e-9)


def by_window(image):
    """A scorer whose answer depends on the whole window and on the place in it."""
    ramp = torch.linspace(0, 2, image.shape[3]) + image.mean() + torch.linspace(0, 1, image.shape[2])[:, None]
    return torch.stack([ramp, image[0, 0], 1.5 - ramp])[None].log_softmax(1)


def picture(height=50, width=70):
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 4, 5), (19, 7, 9), (255, 6, 6)])
def test_the_class_of_the_largest_score_is_taken_but_a_score_that_is_no_number_is_an_error(shape):
    score = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def answer(score):
        return predict(lambda image: score[None].clone(), picture(*shape[1:]), shape[1:])

    assert answer(score).dtype == np.uint8 and (answer(score) == score.numpy().argmax(0)).all()
    for bad in (math.nan, math.inf):
        for k in {0, shape[0] // 2, shape[0] - 1}:
            broken = score.clone()
            broken[k, 2, 2] = bad
            with pytest.raises(UserError, match="not finite"):
                answer(broken)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("slide, stride", [(32, 20), (32, 32), (50, 7), (9, 4), (64, 0), (32, 0), (200, 0), (0, 0)])
def test_every_pixel_gets_the_mean_of_the_probabilities_of_the_windows_that_see_it(slide, stride, flip):
    rows, columns = (70, 50) if flip else (50, 70)  # a portrait, too
    image, height, width = picture(rows, columns), min(slide or rows, rows), min(slide or columns, columns)
    step = stride or max(1, slide * 2 // 3)

    def starts(length, window):  # the last window ends at the border
        return sorted({*range(0, length - window + 1, step), length - window})

    total, seen = np.zeros((3, rows, columns)), np.zeros((rows, columns))
    for top in starts(rows, height):
        for left in starts(columns, width):
            window = image[None, :, top:top + height, left:left + width]
            views = [by_window(window)] + ([by_window(window.flip(3)).flip(3)] if flip else [])
            total[:, top:top + height, left:left + width] += sum(view[0].double().exp().numpy() for view in views)
            seen[top:top + height, left:left + width] += len(views)
    for size in ((rows, columns), (5 * rows, 5 * columns)):  # enlarged, the scale of the probabilities shows, too
        want = F.interpolate(torch.from_numpy(total / seen)[None], size=size, mode="bilinear")[0].numpy()
        clear = np.diff(np.sort(want, 0)[-2:], axis=0)[0] > 1e-5
        pred = predict(by_window, image, size, slide=slide, slide_stride=stride, flip=flip)
        assert clear.mean() > 0.99 and (pred == want.argmax(0))[clear].all()


@pytest.mark.parametrize("rows, scale, size", [(40, 0.5, (20, 30)), (40, 2, (80, 120)), (3, 0.1, (1, 6))])
def test_the_scale_acts_on_the_input_and_the_scores_return_to_the_labels_size(rows, scale, size):
    image, sizes = picture(rows, 60), []

    def by_pixel(window):
        sizes.append(tuple(window.shape[2:]))
        return window.log_softmax(1)

    pred = predict(by_pixel, image, (80, 90), scale=scale)
    assert sizes == [size] and pred.shape == (80, 90)
    other = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)
    prob = F.interpolate(other.softmax(1), size=(80, 90), mode="bilinear")[0]
    assert (pred == prob.argmax(0).numpy()).mean() > 0.999  # the probabilities are resized, not the classes


@pytest.mark.parametrize("flags, seen", [(dict(size=(32, 48)), (32, 48)), (dict(height=64), (64, 96)), (dict(scale=1.0), (40, 60))])
def test_the_input_may_be_brought_to_a_size_or_height_and_windows_are_cut_from_that(flags, seen):
    sizes = []
    for slide in (0, 24):
        def by_pixel(window):
            sizes.append(tuple(window.shape[2:]))
            return window.log_softmax(1)

        assert predict(by_pixel, picture(40, 60), (80, 90), slide=slide, **flags).shape == (80, 90)
    assert sizes[0] == seen and set(sizes[1:]) == {(24, 24)}


@pytest.mark.parametrize("flags", [dict(scale=0.0), dict(scale=-1.0), dict(slide=-1), dict(slide=32, slide_stride=33), dict(slide_stride=5),
                                   dict(size=(0, 9)), dict(height=-1), dict(size=(9, 9), height=9), dict(scale=0.5, height=9)])
def test_settings_that_would_leave_pixels_unseen_are_refused(flags):
    with pytest.raises(UserError, match=f"--{'|--'.join(flags)}".replace("_", "-")):
        predict(by_window, picture(), (50, 70), **flags)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind, size", [("resnet", (1, 1)), ("resnet", (64, 96)), ("vit", (33, 70)), ("resnet", (33, 70))])
def test_the_text_enters_as_weighted_geometric_mean_of_probabilities_at_an_images_own_size_in_training_too(kind, size, beta, otp):
    net, image = small_net(kind), picture(*size)[None]
    rows, cols = (np.arange(-(-side // net.encoder.multiple) * net.encoder.multiple).clip(max=side - 1) for side in size)
    padded = image[:, :, rows][:, :, :, cols]  # border pixels go on
    with torch.no_grad():
        out = net(padded)
    text = F.interpolate(torch.einsum("bdhw,kd->bkhw", out.emb, otp) / 0.07, size=out.logits.shape[2:], mode="bilinear")
    low = (1 - beta) * out.logits.log_softmax(1) + beta * text.log_softmax(1)
    expected = F.interpolate(low, size=padded.shape[2:], mode="bilinear").softmax(1)[..., :size[0], :size[1]]
    score = scorer(net.train(), otp, beta)(image)  # batch norm is frozen: the mode makes no difference
    assert net.training and not score.requires_grad
    assert score.shape == (1, 19, *size) and torch.allclose(score.exp(), expected, atol=1e-5)


def test_one_table_counts_every_image_with_any_number_of_workers_and_draws_no_random_number(run, net, otp):
    items, score, expected = data.list_items("bdd", run[1]["data_root"], "val"), scorer(net, otp), 0
    for image, label in map(data.load_pair, items):
        expected = expected + confusion_matrix(predict(score, data.to_tensor(image), label.shape), label, 19)
    before = torch.get_rng_state()
    for workers in (0, 2):
        assert (evaluate.evaluate_dataset(score, items, workers=workers) == expected).all()
    shares = [evaluate.evaluate_dataset(score, items[rank::2]) for rank in (0, 1)]
    assert (sum(shares) == expected).all()  # several processes
    assert torch.equal(torch.get_rng_state(), before)  # those of training do not move


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part, content", [("image", None), ("label", None), ("label", np.full((40, 72), 77, np.uint8)),
                                           ("label", np.zeros((40, 70), np.uint8))], ids=["image", "label", "ids", "size"])
def test_a_broken_target_file_ends_the_evaluation_by_its_name(run, net, otp, part, content, workers):
    items = data.list_items("bdd", run[1]["data_root"], "val")
    broken = Path(getattr(items[1], part))
    if content is None:
        broken.write_bytes(broken.read_bytes()[:60])
    else:
        Image.fromarray(content).save(broken)
    with pytest.raises(SystemExit) as caught, checkpoint.one_sentence(run[0]):  # a worker's error comes in its traceback
        evaluate.evaluate_dataset(scorer(net, otp), items, workers=workers)
    assert caught.value.code.startswith("error: ") and str(broken) in caught.value.code and "Traceback" not in caught.value.code


def written(folder, confs=None, step=400, protocol=evaluate.PROTOCOL, mapillary="A", source=("gta5",)):
    """write_results in this folder for a run that was trained on gta5."""
    config = SimpleNamespace(source=source, method="ppar", mapillary=mapillary, steps=400, amp="bf16")
    images = dict(bdd=3, cityscapes=4, gta5=5, acdc=6)
    run = checkpoint.Run(SimpleNamespace(otp=torch.zeros(1)), config, step, folder)
    return evaluate.write_results(run, confs or three_tables(), images, protocol)


def three_tables():
    a, b, c = (torch.zeros(19, 19, dtype=torch.int64) for _ in range(3))
    a[0, 0], a[1, 1], a[1, 0] = 50, 30, 20  # IoU 50/70, 30/50
    b[0, 0], b[0, 1] = 90, 10  # IoU 90/100, 0
    c[0, 0] = 1  # IoU 1, of the source
    return dict(bdd=a, cityscapes=b, gta5=c)


def test_the_results_files_hold_what_others_script_against(tmp_path):
    results = written(tmp_path, mapillary="B", protocol=dict(scale=2, slide=512, slide_stride=100, flip=True))
    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail) == results  # a NaN is no JSON
    bdd, cityscapes, gta5 = (results["targets"][name] for name in ("bdd", "cityscapes", "gta5"))
    assert list(bdd["iou"]) == list(data.CLASSES) and bdd["iou"]["sky"] is None
    assert bdd["iou"]["road"] == pytest.approx(100 * 50 / 70) and bdd["miou"] == pytest.approx(50 * (50 / 70 + 30 / 50))
    assert (bdd["checkpoint"], bdd["mapillary"], bdd["precision"], bdd["images"], bdd["pixels"]) == ("last", "B", "bf16", 3, 100)
    assert bdd["evaluation_size"] == "label's full size; input scale 2.0, slide 512/100, flip averaged"
    assert (bdd["unseen"], cityscapes["unseen"], gta5["unseen"]) == (True, True, False)
    assert cityscapes["miou"] == pytest.approx(45) and results["mean"] == pytest.approx((bdd["miou"] + 45) / 2)
    assert results["mean_over"] == ["bdd", "cityscapes"] and "unseen" in results["mean_rule"]
    rows = [*csv.DictReader((tmp_path / "results.csv").read_text().splitlines())]
    assert [row["target"] for row in rows] == ["bdd", "cityscapes", "gta5"] and rows[0]["sky"] == ""
    assert float(rows[0]["miou"]) == pytest.approx(bdd["miou"])


def test_holdout_serves_a_target_without_a_split_and_never_uncovers_what_a_source_was_trained_on(tmp_path):
    for name in ("gta5", "synthia"):
        write_tiny(tmp_path, name, n=6)

    def found(**flags):
        config = dict(targets=("gta5", "synthia"), source=("gta5",), data_root=str(tmp_path), holdout=2)
        run = checkpoint.Run(None, SimpleNamespace(**config | flags), 0, tmp_path)
        return {name: len(items) for name, items in evaluate.find_targets(run).items()}

    assert (found(), found(holdout_unseen=3)) == (dict(gta5=2, synthia=2), dict(gta5=2, synthia=3))  # by train.py, by evaluate.py
    with pytest.raises(UserError, match="gta5 has no val split"):
        found(holdout=0, holdout_unseen=3)


def test_an_unfinished_run_is_called_one_and_a_target_without_pixels_is_in_no_mean(tmp_path):
    results = written(tmp_path, {**three_tables(), "acdc": torch.zeros(19, 19, dtype=torch.int64)}, step=150)
    assert results["targets"]["bdd"]["checkpoint"] == results["checkpoint"] == "unfinished, step 150 of 400"
    assert results["targets"]["acdc"]["miou"] is None and results["mean_over"] == ["bdd", "cityscapes"]
    assert results["evaluation_size"] == "label's full size; input scale 1.0, whole image"


def test_every_row_says_the_size_that_the_input_was_brought_to(tmp_path):
    for protocol, words in ((dict(size=(1024, 2048), slide=512), "1024 x 2048, slide 512/341"), (dict(height=9), "height 9, whole image")):
        results = written(tmp_path, protocol={**evaluate.PROTOCOL, **protocol})
        rows = [results, *results["targets"].values(), *csv.DictReader((tmp_path / "results.csv").read_text().splitlines())]
        assert {row["evaluation_size"] for row in rows} == {f"label's full size; input {words}"}


def test_a_run_that_was_trained_on_synthia_has_the_means_over_16_and_13_classes_too(tmp_path, capsys):
    conf = torch.diag(torch.ones(19, dtype=torch.int64))
    conf[3, 4], conf[14, 13], conf[9, 8] = 1, 3, 1  # wall, fence; truck, car; terrain, vegetation
    results = written(tmp_path, dict(bdd=conf), source=("synthia",))
    missed = dict(wall=1 / 2, fence=1 / 2, truck=1 / 4, car=1 / 4, terrain=1 / 2, vegetation=1 / 2)
    means = [100 * (n - sum(1 - missed[c] for c in kept)) / n for n, kept in (
        (19, missed), (16, ("wall", "fence", "car", "vegetation")), (13, ("car", "vegetation")))]
    assert [results["targets"]["bdd"][key] for key in ("miou", "miou_16", "miou_13")] == pytest.approx(means)
    rows = printed(capsys, results)[1]
    assert [rows[key] for key in ("mean", "mean of 16", "mean of 13")] == [[f"{mean:.1f}"] * 2 for mean in means]
    assert "miou_16" in (tmp_path / "results.csv").read_text() and "miou_16" not in written(tmp_path)["targets"]["bdd"]


def printed(capsys, *results):
    """(lines of the table, its cells by the name of the row)."""
    evaluate.print_table(*results)
    lines = capsys.readouterr().out.splitlines()
    return lines, {line[:14].strip(): line[14:].split() for line in lines}


def test_the_printed_table_has_classes_as_rows_and_targets_and_their_mean_as_columns(tmp_path, capsys):
    lines, rows = printed(capsys, written(tmp_path))
    assert lines[0] == "IoU in %           bdd  cityscapes   gta5*    mean" and lines[1] == lines[21] == "-" * len(lines[0])
    assert [line[:14].strip() for line in lines[2:21]] == list(data.CLASSES)
    assert rows["road"] == ["71.4", "90.0", "100.0", "80.7"] and rows["sky"] == ["-"] * 4 and rows["images"] == ["3", "4", "5"]
    assert "not part of the mean" in lines[-2] and "input scale 1.0" in lines[-1] and "last" in lines[-1]
    results = written(tmp_path, dict(gta5=three_tables()["gta5"]))  # no target is unseen: there is no mean
    assert results["mean"] is None and printed(capsys, results)[1]["mean"] == ["100.0", "-"]


def test_the_mean_of_the_means_is_the_mean_of_the_mious_and_not_of_the_classes(tmp_path, capsys):
    a, b = torch.zeros(2, 19, 19, dtype=torch.int64)
    a[0, 0] = 1  # one class, mIoU 100
    b[0, 0], b[1, 0] = 1, 1  # two classes, 50 and 0
    results = written(tmp_path, dict(bdd=a, acdc=b))
    lines, rows = printed(capsys, results)
    assert results["mean"] == pytest.approx(62.5) and rows["mean"] == ["100.0", "25.0", "62.5"] and "not part of" not in lines[-2]
    assert rows["road"] == ["100.0", "50.0", "75.0"] and rows["sidewalk"] == ["-", "0.0", "0.0"]


@pytest.mark.parametrize("kept, cells", [(("bdd", "cityscapes"), ["+30.0", "+0.0", "-", "+15.0"]), (("bdd",), ["+30.0", "-", "-", "-"])])
def test_the_difference_to_a_second_run_is_taken_over_the_same_targets_only(tmp_path, capsys, kept, cells):
    other = three_tables()
    other["bdd"][1, 1] = 0  # IoU 50/70 and 0, where ours are 50/70 and 30/50
    results = written(tmp_path, {name: other[name] for name in kept})
    rows = printed(capsys, written(tmp_path), results)[1]
    assert rows["difference"] == cells and rows[tmp_path.name[:13]][0] == "35.7"
    results["targets"]["bdd"]["images"] = 2  # other images: not to be compared
    assert printed(capsys, written(tmp_path), results)[1]["difference"] == ["-", *cells[1:3], "-"]


def command(*words):
    evaluate.main(evaluate.parse([str(word) for word in words]))


def name_of(folder, *words):
    """evaluate.file_name of a run folder and flags."""
    return evaluate.file_name(checkpoint.load_run(folder), evaluate.parse([str(folder), *map(str, words)]))


def refused(*words):
    with pytest.raises(SystemExit) as caught:
        command(*words, *(() if "--device" in words else ("--device", "cpu")))
    return caught.value.code


def test_a_finished_run_is_scored_again_by_command_and_another_protocol_leaves_its_results_alone(run, net, otp, capsys):
    (run[0] / "results.json").write_text("of the training")
    command(run[0], "--device", "cpu", "--workers", 0, "--slide", 32, "--flip")
    results = json.loads((run[0] / "results-slide-32-flip.json").read_text())
    assert (run[0] / "results.json").read_text() == "of the training"
    items = data.list_items("bdd", run[1]["data_root"], "val")
    conf = evaluate.evaluate_dataset(scorer(net, otp, 0.25), items, protocol=dict(slide=32, flip=True))
    assert results["targets"]["bdd"]["miou"] == pytest.approx(100 * mean_iou(conf)) and results["targets"]["bdd"]["images"] == 3
    assert results["evaluation_size"] == "label's full size; input scale 1.0, slide 32/21, flip averaged"
    assert results["run"] == "run" and "bicycle" in (said := capsys.readouterr()).out and "bdd: 100%" in said.err
    assert sorted(path.name for path in run[0].iterdir()) == ["last.pt", "results-slide-32-flip.csv", "results-slide-32-flip.json",
                                                                "results.json"]
    named = "--targets acdc idd --size 1024 2048 --mapillary B --workers 3 --device cpu --compare OTHER"
    assert name_of(run[0], *named.split()) == "results-size-1024-2048-targets-acdc-idd-mapillary-B"


def test_a_second_runs_scores_are_shown_beside_if_they_were_taken_in_the_same_way(run, capsys):
    assert "no results.json" in refused(run[0], "--compare", run[0])
    command(run[0], "--device", "cpu", "--workers", 0)
    for flags in (("--scale", 0.5), ("--mapillary", "B")):
        assert re.search(rf"taken in this way .*{flags[1]}.*evaluate.py {run[0]}", refused(run[0], "--compare", run[0], *flags))
    for other in ("[]", "{}", json.dumps(json.loads((run[0] / "results.json").read_text()) | dict(precision="bf16"))):
        (run[0].parent / "results.json").write_text(other)
        assert "taken in this way" in refused(run[0], "--compare", run[0].parent)
    command(run[0], "--device", "cpu", "--workers", 0, "--compare", run[0])
    assert "+0.0" in capsys.readouterr().out


def test_mistakes_of_the_user_end_in_one_sentence(run, tmp_path):
    for words, reason in (
        ((tmp_path / "nowhere",), "nowhere/last.pt does not exist"), ((run[0], "--targets", "kitti"), "kitti.*choose from.*cityscapes"),
        ((run[0], "--targets", "acdc"), "acdc.*rgb_anon"), ((run[0], "--data-root", tmp_path / "gone"), "gone"),
        ((run[0], "--device", "abacus"), "--device abacus"), ((run[0], "--scale", "inf"), "--scale inf"),
        ((run[0], "--slide", 32, "--slide-stride", 64), "--slide-stride 64"), (("--flip",), "[Gg]ive the folder"),
        ((run[0], "--workers", -1), "--workers -1"), ((run[0], "--holdout", -1), "--holdout -1"),
    ):
        message = refused(*words)
        assert message.startswith("error: ") and re.search(reason, message, re.DOTALL), message
    assert not (run[0] / "results.json").exists()
    nothing = dict.fromkeys(evaluate.PROTOCOL)  # the run's own
    assert vars(evaluate.parse(["run"])).items() >= dict(nothing, workers=machine.LOADERS).items()  # where nothing else is asked
    for words in (["run", "--slid", "3"], ["run", "--fli"], ["run", "--mapillary", "C"], ["run", "--scale", "big"]):
        with pytest.raises(SystemExit):  # no flag is abbreviated
            evaluate.parse(words)


@pytest.mark.parametrize("door", ["train.py", "evaluate.py", "figures.py", "bound.py", "data.py"])
def test_help_and_a_misspelt_flag_are_answered_before_torch_is_imported(door, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported too early')")
    for flag, status in (("--help", 0), ("--targ", 2)):
        done = subprocess.run([sys.executable, Path(evaluate.__file__).with_name(door), flag], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode == status and "usage" in done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- windows, device, host


def test_counting_in_parts_counts_every_pixel_once():
    pred, label = (np.random.default_rng(seed).integers(0, 19, (601, 907)).astype(np.uint8) for seed in (0, 1))
    label[0] = VOID
    expected = np.zeros((19, 19), int)
    np.add.at(expected, (label[1:].ravel(), pred[1:].ravel()), 1)
    assert pred.size > 2 * 2 ** 18 and (confusion_matrix(pred, label, 19).numpy() == expected).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("together", [2, 5, 99])
def test_windows_in_batches_give_the_prediction_of_windows_one_by_one(together, flip):
    """A scorer without rounding of its own: the same bits. A batch holds as many as asked for, the last one the rest."""
    batches = []

    def by_place(image):
        batches.append(len(image))
        return (image * torch.linspace(0.5, 2, image.shape[3])).log_softmax(1)

    one, several = (predict(by_place, picture(), (50, 70), slide=20, flip=flip, together=n) for n in (1, together))
    assert (one == several).all() and len(set(one.ravel().tolist())) == 3
    number = 4 * 5  # windows of 20 every 13 pixels, on 50 x 70
    sizes = [together] * (number // together) + [number % together] * (number % together > 0)
    views = 2 if flip else 1
    assert batches == [1] * number * views + [size for size in sizes for _ in range(views)]


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_network_scores_windows_in_a_batch_as_it_scores_them_alone_up_to_rounding(kind, otp):
    net = small_net(kind)
    score, windows = scorer(net, otp, 0.3), torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([score(window[None]) for window in windows])
    assert torch.allclose(score(windows), alone, atol=1e-4) and not torch.allclose(score(windows.flip(0)), alone, atol=1e-2)


def test_the_host_counts_a_picture_while_the_device_works_on_the_next(monkeypatch, run, net, otp):
    items, told, start = data.list_items("bdd", run[1]["data_root"], "val"), [], evaluate._start_prediction

    def watched(*words, **flags):
        number = sum("start" in line for line in told)
        told.append(f"start {number}")
        wait = start(*words, **flags)
        return lambda: told.append(f"wait {number}") or wait()

    monkeypatch.setattr(evaluate, "_start_prediction", watched)
    evaluate.evaluate_dataset(scorer(net, otp), items)
    assert told == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"]
    assert evaluate.evaluate_dataset(scorer(net, otp), []).sum() == 0


def test_on_a_gpu_eight_windows_of_512_go_together_and_the_host_does_not_wait_before_it_is_asked_to(monkeypatch):
    """A pretended GPU: FakeTensorMode computes shapes alone, and refuses whatever would need a number on the host."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    sizes, events = [], []

    def score(image):
        sizes.append(tuple(image.shape))
        return image.new_empty(len(image), 19, *image.shape[2:])

    stream = SimpleNamespace(record_event=lambda: events.append("recorded") or SimpleNamespace(synchronize=lambda: events.append("waited")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with FakeTensorMode():
        image = torch.empty(3, 1024, 2048, device="cuda")
        wait = evaluate._start_prediction(score, image, (1024, 2048), slide=512)
        assert sizes == [(8, 3, 512, 512), (8, 3, 512, 512), (2, 3, 512, 512)] and events == ["recorded"]  # 3 x 6 windows
        with pytest.raises(Exception, match="local_scalar_dense"):  # now the number is needed
            wait()
    assert events == ["recorded", "waited"]


# --------------------------------------------------------------------------------------------------- one protocol, twice


def like(kind="resnet", **flags):
    """A run of a ResNet or ViT with these flags, as far as protocol_of looks."""
    net = SimpleNamespace(arch=dict(visual=dict(kind=kind)))
    return SimpleNamespace(config=SimpleNamespace(**flags), ppar=SimpleNamespace(net=net))


@pytest.mark.parametrize("of, given, expected", [
    (like(), {}, {}), (like("vit", crop=504), {}, dict(slide=504)), (like("vit", crop=504, slide=0), {}, {}),
    (like("vit", crop=504), dict(slide=0), {}), (like("vit", crop=504), dict(slide_stride=99), dict(slide=504, slide_stride=99)),
    (like(scale=0.5, flip=True), {}, dict(scale=0.5, flip=True)), (like(scale=0.5, flip=True), dict(flip=False), dict(scale=0.5)),
    (like(scale=0.5), dict(height=9), dict(height=9)), (like(height=9), dict(size=[8, 7]), dict(size=[8, 7])),
    (like(size=(8, 7)), dict(scale=1.0), {}), (like(slide=64, slide_stride=60), dict(slide=32), dict(slide=32)),
    (like(slide=64, slide_stride=60), dict(slide_stride=9), dict(slide=64, slide_stride=9))])
def test_a_score_is_taken_as_the_run_says_or_as_the_flags_say_and_a_vit_has_windows_of_its_training_size(of, given, expected):
    assert evaluate.protocol_of(of, dict.fromkeys(evaluate.PROTOCOL) | given) == {**evaluate.PROTOCOL, **expected}


def test_train_and_evaluate_have_the_same_protocol_flags_with_one_definition():
    fields = {field.name: field for field in dataclasses.fields(train.Config)}
    for name, flag in checkpoint.PROTOCOL.items():
        assert (fields[name].default, fields[name].metadata["help"], fields[name].metadata["rule"]) == flag[1:]
    words = "--size 8 9 --slide 32 --slide-stride 20 --flip".split()
    given, config = vars(evaluate.parse(["RUN", *words])), train.configure(train.parse(words))
    assert all([*getattr(config, name)] == given[name] if name == "size" else getattr(config, name) in (given[name], flag.default)
               for name, flag in checkpoint.PROTOCOL.items())
    for wrong in ("--size 8", "--size 8 9 10", "--scale 0", "--scale 2 --height 9", "--slide 32 --slide-stride 33", "--height -1"):
        with pytest.raises(UserError, match="--s|--h"):
            train.configure(train.parse(wrong.split()))
    assert set(checkpoint.PROTOCOL) <= train.MAY_CHANGE_ON_RESUME  # they change no weight
    taken = subprocess.run([sys.executable, train.__file__, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"--{name.replace('_', '-')}" in taken for name in checkpoint.PROTOCOL)


def test_the_closing_evaluation_of_a_vit_goes_by_windows_and_a_later_one_repeats_it_or_sees_the_whole_image(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(*world["flags"], "--clip", world["vit"], "--steps", 1, "--flip", "--no-figures", "--out", out, scored=True) is None
    closing = json.loads((out / "results.json").read_text())
    assert closing["evaluation_size"] == "label's full size; input scale 1.0, slide 64/42, flip averaged"
    assert closing["evaluation_size"] in capsys.readouterr().out
    (out / "results.json").unlink()
    command(out, "--device", "cpu", "--workers", 0)
    assert json.loads((out / "results.json").read_text()) == closing
    for words, name in (((), "results"), (("--slide", 64), "results"), (("--flip",), "results"), (("--slide", 0), "results-slide-0"),
                        (("--no-flip",), "results-no-flip"), (("--height", 9, "--flip"), "results-height-9-flip")):
        assert name_of(out, *words) == name
    command(out, "--device", "cpu", "--workers", 0, "--slide", 0)
    whole = json.loads((out / "results-slide-0.json").read_text())
    assert whole["evaluation_size"] == "label's full size; input scale 1.0, whole image, flip averaged"
    assert "whole image" in capsys.readouterr().out and json.loads((out / "results.json").read_text()) == closing


# ------------------------------------------------------------------------------------------- what is done is on the disk


@pytest.fixture
def three(run):
    """(folder, data root) of a run with three targets, one picture each: cityscapes, bdd, idd."""
    folder, config = run
    for name in ("cityscapes", "idd"):
        write_tiny(config["data_root"], name, n=1, size=(40, 72), split="val")
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save({**state, "config": {**config, "targets": ("cityscapes", "bdd", "idd")}}, folder / "last.pt")
    return folder, config["data_root"]


def stored(folder):
    return json.loads((folder / "results.json").read_text())


def break_file(root, name, change=lambda file: file.write_bytes(file.read_bytes()[:60])):
    """Spoil the first picture of a target -> its path."""
    file = Path(data.list_items(name, root, "val")[0].image)
    change(file)
    return str(file)


@pytest.mark.parametrize("broken, workers", [("cityscapes", 2), ("bdd", 0), ("idd", 0)])
def test_a_broken_file_costs_its_own_target_alone_and_the_sentence_says_that_the_others_are_kept(three, broken, workers, capsys):
    file = break_file(three[1], broken)
    sentence = refused(three[0], "--workers", workers)
    kept = [name for name in ("cityscapes", "bdd", "idd") if name != broken]
    assert file in sentence and f"1 of 3 targets could not be scored. {broken}: " in sentence and "Traceback" not in sentence
    assert f"keeps the scores of {', '.join(kept)}, without a mean" in sentence and f"python evaluate.py {three[0]}`" in sentence
    results, said = stored(three[0]), capsys.readouterr().out
    assert list(results["targets"]) == kept and results["not_scored"] == [broken]
    assert results["mean"] is None and results["mean_over"] == []  # a mean over two would be taken for one over three
    assert f"not scored: {broken}; so there is no mean" in said and re.search(r"^mean .* -$", said, re.MULTILINE)
    rows = [*csv.DictReader((three[0] / "results.csv").read_text().splitlines())]
    assert [row["target"] for row in rows] == [*kept, broken] and {value for key, value in rows[-1].items() if key != "target"} == {""}


def test_a_target_that_fails_leaves_no_process_of_its_loader_behind_for_the_next_one(three, monkeypatch):
    """The error's traceback holds them, in a circle that only the garbage collector finds. Here it does not come by itself."""
    break_file(three[1], "cityscapes")
    alive, score = [], evaluate.evaluate_dataset
    monkeypatch.setattr(evaluate, "evaluate_dataset", lambda *words: alive.append(multiprocessing.active_children()) or score(*words))
    gc.disable()
    try:
        refused(three[0], "--workers", 2)
    finally:
        gc.enable()
    assert alive == [[], [], []]


def test_after_every_target_the_files_are_whole_and_say_what_is_not_in_them_yet(three, monkeypatch):
    seen, score = [], evaluate._score_target

    def watched(*words):
        seen.append(stored(three[0]) if (three[0] / "results.json").exists() else None)
        return score(*words)

    monkeypatch.setattr(evaluate, "_score_target", watched)
    command(three[0], "--device", "cpu", "--workers", 0)
    assert seen[0] is None and [(list(r["targets"]), r["not_scored"], r["mean"]) for r in seen[1:]] == [
        (["cityscapes"], ["bdd", "idd"], None), (["cityscapes", "bdd"], ["idd"], None)]
    assert stored(three[0])["not_scored"] == [] and stored(three[0])["mean"] is not None


def test_a_complete_file_stays_until_all_targets_are_scored_anew_but_one_of_another_network_does_not(three):
    command(three[0], "--device", "cpu", "--workers", 0)
    complete = stored(three[0])
    break_file(three[1], "idd")
    assert "results.json keeps the complete scores of before" in refused(three[0], "--workers", 0) and stored(three[0]) == complete
    for change in (dict(checkpoint="unfinished, step 3 of 7"), dict(precision="bf16"), dict(not_scored=["bdd"])):
        (three[0] / "results.json").write_text(json.dumps(complete | change))
        refused(three[0], "--workers", 0)
        assert stored(three[0])["not_scored"] == ["idd"]


def test_where_no_target_can_be_scored_the_sentence_names_each_reason_and_nothing_is_written(three):
    files = [break_file(three[1], name) for name in ("cityscapes", "bdd", "idd")]
    sentence = refused(three[0], "--workers", 0)
    assert all(file in sentence for file in files) and "3 of 3" in sentence and "No target was scored" in sentence
    assert not (three[0] / "results.json").exists()


def test_of_several_processes_one_that_meets_a_broken_file_tells_the_others_and_none_waits_for_ever(three):
    break_file(three[1], "idd")  # one picture: the first process has it, the second has none
    break_file(three[1], "bdd", lambda file: None)
    items = data.list_items("bdd", three[1], "val")
    Path(items[1].image).write_bytes(b"")  # the second process's
    context, results = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Queue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def rank_of_two(rank):
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        try:
            results.put((rank, str(evaluate.evaluate_targets(checkpoint.load_run(three[0]), rank=rank, processes=2))))
        except UserError as error:
            results.put((rank, str(error)))
        torch.distributed.destroy_process_group()

    ranks = [context.Process(target=rank_of_two, args=(rank,)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    answers = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert answers[1] == "None" and "2 of 3 targets could not be scored" in answers[0] and items[1].image in answers[0]
    assert list(stored(three[0])["targets"]) == ["cityscapes"] and stored(three[0])["not_scored"] == ["bdd", "idd"]


# ------------------------------------------------------------------------------------------- memory, processes, signals


def raise_out_of_memory(kind):
    if kind == "cpu":
        torch.empty(2 ** 60, dtype=torch.uint8)  # in torch's own words
    raise {"gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "numpy": MemoryError()}[kind]


@pytest.mark.parametrize("kind", ["cpu", "gpu", "numpy"])
@pytest.mark.parametrize("flags, half", [((), "--slide 512"), (("--slide", 128), "--slide 64")])
def test_memory_that_runs_out_is_a_sentence_with_the_flags_that_need_less(three, kind, flags, half, monkeypatch):
    predict, calls = evaluate._start_prediction, []

    def once(*words, **more):
        calls.append(1)
        if len(calls) == 1:
            raise_out_of_memory(kind)
        return predict(*words, **more)

    monkeypatch.setattr(evaluate, "_start_prediction", once)
    sentence = refused(three[0], "--workers", 0, *flags)
    assert "cityscapes: out of memory: " in sentence and half in sentence and "--size" in sentence and "Traceback" not in sentence
    assert "1 of 3" in sentence and "keeps the scores of bdd, idd" in sentence


def test_an_error_that_is_no_lack_of_memory_and_no_dead_process_is_not_called_one():
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ZeroDivisionError()):
        with pytest.raises(type(error)), machine.say_why("give less"):
            raise error


def test_a_loaders_process_that_is_killed_is_a_sentence_and_the_other_targets_are_scored(three, monkeypatch):
    load = data.load_pair

    def die(item, *rest):
        if item.dataset == "bdd" and "1-0a" in item.image:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
        return load(item, *rest)

    monkeypatch.setattr(data, "load_pair", die)
    sentence = refused(three[0], "--workers", 2)
    assert "bdd: a process that reads pictures died (Killed)" in sentence and "--workers 0" in sentence and "Traceback" not in sentence
    assert list(stored(three[0])["targets"]) == ["cityscapes", "idd"]


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_during_the_evaluation_ends_it_in_a_sentence_that_says_what_is_kept_and_how_to_go_on(three, number, workers, monkeypatch):
    start, handlers = evaluate._start_prediction, [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    calls = []

    def stop(*words, **flags):
        calls.append(1)
        if len(calls) == 2:  # in the second target
            os.kill(os.getpid(), number)
        return start(*words, **flags)

    monkeypatch.setattr(evaluate, "_start_prediction", stop)
    sentence = refused(three[0], "--workers", workers)
    assert sentence.startswith("error: stopped by a signal: ") and f"{three[0]}/results.json keeps the scores of cityscapes" in sentence
    assert f"python evaluate.py {three[0]}`" in sentence and f"python figures.py {three[0]}`" in sentence
    assert list(stored(three[0])["targets"]) == ["cityscapes"] and stored(three[0])["not_scored"] == ["bdd", "idd"]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_same_stop_handed_on_twice_is_one_stop():
    """By a terminal, torchrun and a scheduler: the second comes while the first is being dealt with."""
    def words():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return "all is kept."

    with pytest.raises(UserError, match="^stopped by a signal: all is kept.$"), machine.stop_with(words):
        os.kill(os.getpid(), signal.SIGINT)


# ----------------------------------------------------------------------------------------------------------------- names


def test_a_run_whose_name_is_no_text_is_scored_and_compared_on_a_terminal_that_knows_ascii_alone(run, tmp_path):
    """$ is no formula, \\xff no UTF-8, and neither ends a run."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/r$_\xff_\xc3\xa9$")
    shutil.copytree(run[0], folder)
    script = Path(evaluate.__file__)
    here = dict(os.environ, PYTHONIOENCODING="ascii", OMP_NUM_THREADS="1")
    for words in ([], ["--compare", folder]):
        done = subprocess.run([sys.executable, "-W", "ignore", script, folder, "--device", "cpu", "--workers", "0", *words],
                              capture_output=True, env=here, check=False)
        assert done.returncode == 0, done.stderr
    assert rb"r$_\udcff_\xe9$" in done.stdout and stored(Path(folder))["run"] == Path(folder).name
