"""Tests of checkpoint.py: a run comes back as it was saved, hostile files are refused, no crash costs the old file."""

import json
import os
import pickle

import pytest
import torch

import checkpoint
from data import UserError

torch.set_num_threads(1)


def test_a_run_is_loaded_as_it_was_saved(run, net, otp):
    loaded = checkpoint.load_run(run[0])
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.ppar(image).logits, net(image).logits)
    state = torch.load(run[0] / "last.pt", weights_only=True)
    assert all(torch.equal(loaded.ppar.vtp.state_dict()[name], tensor) for name, tensor in state["vtp"].items())
    assert torch.equal(loaded.ppar.otp, otp) and loaded.step == 7 and vars(loaded.config) == run[1] and loaded.path == run[0]
    assert not loaded.ppar.training and not any(p.requires_grad for p in loaded.ppar.parameters())
    torch.save({**state, "vtp": None}, run[0] / "last.pt")
    assert checkpoint.load_run(run[0]).ppar.vtp is None


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
        with pytest.raises(UserError, match="nothing in it was executed"):
            checkpoint.load_run(run[0])
        assert not (tmp_path / "pwned").exists()


def test_truncated_foreign_and_unfitting_checkpoints_end_in_one_sentence(run):
    file = run[0] / "last.pt"
    whole, state = file.read_bytes(), torch.load(file, weights_only=True)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", whole[:100], whole[:len(whole) // 2], whole[:-30], b"hello", bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(UserError, match="last.pt is no checkpoint that can be read"):
            checkpoint.load_run(run[0])
    for foreign, reason in ((state["model"], "not written by train.py"), ([1, 2], "no checkpoint|not written"),
                            ({**state, "arch": {"visual": 3}}, "does not hold"),
                            ({**state, "model": dict(list(state["model"].items())[1:])}, "does not hold"),
                            ({**state, "vtp": {"gamma": torch.ones(3)}}, "does not hold")):
        torch.save(foreign, file)
        with pytest.raises(UserError, match=reason) as caught:
            checkpoint.load_run(run[0])
        assert "\n" not in str(caught.value)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "run.json", []
    checkpoint.write_json(path, dict(step=1))
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (events.append(json.loads(path.read_text())["step"]), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    checkpoint.write_json(path, dict(step=2))
    assert events == [1, "replace"]  # while it was written, the old one was there whole
    assert json.loads(path.read_text()) == dict(step=2) and os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 1 vs 0")])
def test_a_crash_while_writing_leaves_the_old_file_and_says_so(error, tmp_path):
    path = tmp_path / "results.json"
    checkpoint.write_json(path, dict(mean=1.0))

    def crash(file):
        file.write(b"{")
        raise error

    with pytest.raises(UserError, match="could not be written .*untouched"):
        checkpoint.write_atomically(path, crash)
    assert json.loads(path.read_text()) == dict(mean=1.0) and os.listdir(tmp_path) == ["results.json"]
    with pytest.raises(ValueError):
        checkpoint.write_json(path, dict(mean=float("nan")))  # NaN is no JSON
    assert json.loads(path.read_text()) == dict(mean=1.0)


def test_the_doors_of_a_run_share_their_flags(run, tmp_path):
    parser = checkpoint.run_flags("A door.")
    opened = checkpoint.open_run(parser.parse_args([str(run[0]), "--targets", "toy-bdd", "--data-root", "there", "--device", "cpu"]))
    assert (opened.config.targets, opened.config.data_root, opened.config.out) == (["toy-bdd"], "there", str(run[0]))
    opened = checkpoint.open_run(parser.parse_args([str(run[0]), "--device", "cpu"]))
    assert opened.config.targets == ("bdd",) and opened.config.data_root == str(tmp_path / "data")
    with pytest.raises(SystemExit) as end, checkpoint.one_sentence("RUN"):
        raise PermissionError(13, "Permission denied", "RUN/x.png")
    assert end.value.code == "error: RUN/x.png: Permission denied; what was written before stays."


def test_the_demonstration_shows_the_old_file_after_a_crash(capsys):
    checkpoint._demo()
    assert "untouched" in capsys.readouterr().out
