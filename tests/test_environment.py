"""test_environment.py: an older Python, another package called clip, other setuptools: a sentence each; threads."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from test_documents import MODULES, ROOT, read

import checkpoint
import machine
import model
import train

# Without the first three, which import torch alone and can be lifted out, and toy.py, which data.py imports.
DOORS = sorted(set(MODULES) - {"prototypes", "align", "reweight", "toy"})


def say(*words, **environment):
    """A command that must end with status 1 and one sentence -> the sentence."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# -------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("door", DOORS)
def test_an_older_python_is_refused_in_a_sentence_before_anything_else_is_missed(door):
    """-S: no package is installed there. An older one lacks torch, or has one that this project was never run with."""
    old = f"""import runpy, sys
sys.version_info = (3, 10, 14, 'final', 0)
sys.path.insert(0, '.')
sys.argv = ['{door}.py']
runpy.run_path('{door}.py', run_name='__main__')"""
    said = say(sys.executable, "-S", "-c", old)
    assert "Python 3.11 or later is needed" in said and "is Python 3.10: make an environment of a later one" in said


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_an_older_python_that_is_here_says_so_itself(version):
    python = shutil.which(f"python{version}")
    if not python or subprocess.run([python, "-V"], capture_output=True, check=False).returncode:
        pytest.skip(f"no Python {version} here")
    for door in DOORS:
        assert f"is Python {version}: make an environment" in say(python, "-S", f"{door}.py")


@pytest.mark.parametrize("name", MODULES)
def test_every_file_is_written_in_words_that_an_older_python_can_read(name):
    """Or it would end in a SyntaxError, before the sentence."""
    ast.parse(read(f"{name}.py"), feature_version=(3, 8))


def test_the_readme_and_the_check_ask_for_the_same_python():
    asked = re.search(r"sys.version_info < \((\d+), (\d+)\)", read("data.py"))
    assert re.search(r"Python (\d+)\.(\d+) or newer", read("README.md")).groups() == asked.groups()


@pytest.mark.parametrize("name", ["torch", "numpy", "Pillow", "matplotlib", "setuptools"])
def test_what_is_installed_is_not_below_the_floor_that_was_tried(name):
    floor = re.search(rf"^{name}>=([\d.]+)", read("requirements.txt"), re.M)[1]
    assert numbers(metadata.version(name)) >= numbers(floor)


def numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


# ---------------------------------------------------------------------------------------------------------------- CLIP


@pytest.mark.parametrize("words", [["train.py", "--steps", "1"], ["evaluate.py", "RUN"], ["model.py"], ["toy_clip.py"]],
                         ids=lambda words: words[0])
def test_another_package_called_clip_is_refused_in_a_sentence_with_the_command_that_mends_it(words, tmp_path):
    (tmp_path / "clip.py").write_text("def paste():\n    pass\n")
    said = say(sys.executable, *words, PYTHONPATH=str(tmp_path))
    assert f"the module `clip` that Python finds in {tmp_path}/clip.py is not CLIP's code" in said
    assert "pip uninstall -y clip && pip install --force-reinstall --no-deps clip-anytorch" in said


ABSENT = "raise ModuleNotFoundError('No module named {0}', name='{0}')"  # a module that is as if it were not installed
PACKAGES = {  # files -> words of the sentence
    "a package": ({"clip/__init__.py": ""}, "clip/__init__.py is not CLIP's code"),
    "for Python 2": ({"clip/__init__.py": "print 'hello'"}, "clip/__init__.py is not CLIP's code"),
    "a folder": ({"clip/notes.txt": ""}, None),  # no module: what is installed is found behind it
    "setuptools 82": ({"pkg_resources.py": ABSENT.format("pkg_resources")},
                      "no pkg_resources.packaging here.*pip install 'setuptools>=71,<82'"),
    "setuptools 70": ({"pkg_resources.py": ""}, "no pkg_resources.packaging here.*pip install 'setuptools>=71,<82'"),
    "half of CLIP": ({"ftfy.py": ABSENT.format("ftfy")},
                     "CLIP's code in .* cannot be used .*No module named ftfy.*pip install --force-reinstall -r req"),
}


@pytest.mark.parametrize("kind", PACKAGES)
def test_what_keeps_clips_code_from_being_imported_is_named_with_its_remedy(kind, tmp_path):
    files, words = PACKAGES[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    if words is None:
        done = subprocess.run([sys.executable, "model.py"], cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(tmp_path)),
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Notice: " in done.stdout, done.stderr
    else:
        said = say(sys.executable, "model.py", PYTHONPATH=str(tmp_path))
        assert re.search(words, said), said


def test_without_clip_the_sentence_says_so(monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    missing = ModuleNotFoundError("No module named 'clip'", name="clip")
    assert model._explain_import(missing) == "CLIP's code is not installed: pip install -r requirements.txt"


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("given", [{}, {"OMP_NUM_THREADS": "3"}, {"MKL_NUM_THREADS": "3"}], ids=str)
@pytest.mark.parametrize("sources", [("toy-gta5",), ("toy-gta5", "toy-dev"), ("gta5",), ("toy-gta5", "gta5")], ids=str)
def test_the_drawn_world_uses_one_thread_real_data_all_cores_and_a_number_that_is_given_wins(sources, given, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    machine.choose_threads(sources)
    assert asked == ([] if given or "gta5" in sources else [1])


def test_training_and_the_doors_of_a_finished_run_choose_their_threads_before_they_begin(run, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "choose_threads", asked.append)
    monkeypatch.setattr(checkpoint, "choose_threads", asked.append)
    monkeypatch.delenv("RANK", raising=False)
    machine.setup_processes(train.configure(dict(source=("toy-dev",), device="cpu")))
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    checkpoint.open_run(checkpoint.run_flags("").parse_args([str(run[0])]))
    assert asked == [("toy-dev",), ("toy-gta5",)]
