"""commands.py: every command of every document, run in a fresh clone, and what it prints held against what the document says.

    python results/commands.py          half an hour on two cores; exit status 1 if anything failed or has drifted

Blocks of shell run as they stand, with their loops, in the order of the documents. Neither the released data sets nor CLIP by
name nor a second machine is at hand here, and nobody waits for hours. So a `python` and a `torchrun` of our own stand first in
PATH and change the words that `stand_in` names; all else of a command is as printed. Not run: what NOT_HERE names, with
its reason. `tests/test_documents.py` parses the commands in the headers of modules, and runs the demonstrations.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "results/README.md", "results/toy.md", "results/earlier.md", "exercises.md", "theory.md")
NAMES = {"RUN": "runs/ppar-gta5-seed0", "HOST": "localhost"}
NOT_HERE = {"--check mine": "needs the answer to exercise 8: tests/exercises/test_tutorial.py has one and checks it",
            "pytest tests/exercises": "fails until the exercise is solved: tests/exercises/test_tutorial.py proves both",
            "results/commands.py": "this script", "runs/ablation/": "needs the runs of results/ablate.py, hours",
            "git checkout": "would hide what has drifted"}
AS_WELL = tuple(f"python train.py {flags} --steps 100 --no-figures" for flags in ("--freeze 5", "--method erm"))  # "and the same with"
TOLERANCE = 0.3  # points of IoU, between machines: CPUs round in different ways


def commands(name):
    """[shell text] of a document: its blocks of shell, and the commands in its sentences, in their order."""
    words = r"```bash\n(.*?)```|`((?:python|torchrun|pytest|cp|git) [^`\n]+)`"
    found = re.findall(words, (ROOT / name).read_text(encoding="utf-8"), re.S)
    return [block or line for block, line in found]


def stand_in(words):
    """What is run in the place of `python words` -> list of words."""
    script = next((word for word in words if word.endswith(".py")), words[0])
    words = [NAMES.get(word, word) for word in words]
    if "train.py" == script and "--resume" not in words:
        given, line = words[1:], " ".join(words)
        flag = {name: (re.findall(rf"--{name} (\S+)", line) or [default])[0]
                for name, default in dict(method="ppar", source="toy-gta5", seed="0").items()}
        if "--source" in words:  # two steps of a small CLIP, on small pictures
            words += "--steps 2 --batch 8 --crop 64 --clip clip.pt --workers 0".split()
        elif "--out" in words:  # the run of another command under another name
            words += ["--steps", "20"]
        if "--out" not in words and Path("runs/{method}-{source}-seed{seed}".format(**flag)).exists():
            words += ["--out", "runs/" + ("-".join(given) or "again")]  # the commands of a page are alternatives
    if script == "-m":  # the suite itself is what .ci/run runs
        words += ["--collect-only"]
    if script in ("results/ablate.py", "results/fight.py", "results/bound_table.py"):  # hours: only what is done with their runs
        words = [script, "--table"]
    if script == "results/curves.py":
        words = [script, "--draw"]
    if script == "tests/gpu.py":
        words += ["--device", "cpu"]
    return words


def instead(program, words):
    """The `python` or `torchrun` of PATH: run the stand-in, and write into failed.txt what did not end with 0."""
    if program == "torchrun":
        at = words.index("train.py")
        ours = [*words[:at], *stand_in(words[at:])]
        ours = ["-m", "torch.distributed.run", *("2" if a == "--nproc_per_node" else NAMES.get(b, b) for a, b in zip(["", *ours], ours))]
        both = [ours, [*ours]] if "--node_rank" in ours else [ours]
        for rank, node in enumerate(both[1:], 1):
            node[node.index("--node_rank") + 1] = str(rank)
    else:
        both = [stand_in(words)]
    ended = [process.wait() for process in [subprocess.Popen([sys.executable, *ours]) for ours in both]]
    if any(ended):
        with open("failed.txt", "a", encoding="utf-8") as file:
            file.write(f"{program} {' '.join(words)}\n    as: {both}\n")
    return max(map(abs, ended))


def prepare(clone):
    """In the clone: small data sets in the official layouts, a small CLIP, two photographs, and PATH."""
    sys.path[:0] = [str(clone), str(clone / "tests")]
    import conftest  # noqa: PLC0415
    import make_clip  # noqa: PLC0415

    for name in ("gta5", "synthia", "cityscapes", "bdd", "mapillary", "idd", "acdc", "camvid"):
        for split in ("train", "val"):
            conftest.write_tiny(clone / "data", name, n=8, size=(96, 160), split=split, layout=int(name == "gta5"))
    make_clip.write_state_dict(make_clip.make_clip("resnet", layers=(1, 1, 1, 1)), clone / "clip.pt")
    for k, name in enumerate(("a.jpg", "b.png")):
        conftest.Image.fromarray(conftest.paint(conftest.np.full((64, 96), k, "uint8"))).save(clone / name)
    folder = clone / "bin"
    folder.mkdir()
    for program in ("python", "torchrun"):
        (folder / program).write_text(f"#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} --instead {program} \"$@\"\n")
        (folder / program).chmod(0o755)
    return dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}", PYTHONWARNINGS="ignore")


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def means(folder, classes=None):
    """Mean IoU over the unseen targets of a run: of all classes, or of some, a number each."""
    results = json.loads((folder / "results.json").read_text())
    rows = [row for row in results["targets"].values()]
    return [sum(row["iou"][c] for row in rows) / len(rows) for c in classes] if classes else [results["mean"]]


def said_and_measured(runs, printed):
    """[(where, numbers in the document, numbers of today)]."""
    text = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    full, erm, short = runs / "ppar-toy-gta5-seed0", runs / "erm-toy-gta5-seed0", runs / "--steps-100---no-figures"
    free, bare, frozen, unbalanced = (runs / f"{flags}-100---no-figures" for flags in (
        "--freeze-0---steps", "--method-erm---steps", "--freeze-5---steps", "--balance-0---steps"))
    block = re.search(r"```\n(IoU in %.*?)```", text["README.md"], re.S)[1].strip().split("\n")
    today = (re.search(rf"^{re.escape(line[:12])}.*", printed, re.M) for line in block[1:])
    found = [("README.md, what python train.py prints", numbers(line), numbers(match[0]) if match else [])
             for line, match in zip(block[1:], today)]
    number = r"(\d+\.\d+)"
    three, two = f"{number}, {number} and {number}", rf"{number} instead\s+of {number}"
    walk = re.search(rf"{number} % of the harmful pixels lose their weight, and {number} %", text["results/README.md"])
    found.append(("results/README.md, the walk", [*map(float, walk.groups())], found[-1][2]))
    cheap = re.search(rf"reaches {two}.*?baseline {two}", text["results/README.md"], re.S)
    found.append(("results/README.md, the cheap path", [*map(float, cheap.groups())],
                  means(short) + means(full) + means(bare) + means(erm)))
    order = re.search(rf"`--freeze 0`, 3 and 5 gave {three},", text["results/README.md"])
    found.append(("results/README.md, --freeze", [*map(float, order.groups())], means(free) + means(short) + means(frozen)))
    thin = re.search(rf"they were {three} without balance, and {three} with", text["exercises.md"])
    rare = ("pole", "traffic light", "traffic sign")
    return [*found, ("exercises.md, exercise 6", [*map(float, thin.groups())], means(unbalanced, rare) + means(short, rare))]


def main():
    if sys.argv[1:2] == ["--instead"]:
        return sys.exit(instead(sys.argv[2], sys.argv[3:]))
    wrong = 0

    def say(sentence):  # at once: what comes later may depend on it
        nonlocal wrong
        wrong += 1
        print(sentence, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        clone, printed, done = Path(scratch) / "clone", "", set()
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        environment = prepare(clone)
        for shell in [*(shell for name in DOCUMENTS for shell in commands(name)), *AS_WELL]:
            if shell in done or any(part in shell for part in NOT_HERE):
                continue
            done.add(shell)
            print("+", shell.strip(), flush=True)
            ran = subprocess.run(["bash", "-e", "-c", shell], cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True, errors="replace", check=False)
            printed += ran.stdout
            failed = clone / "failed.txt"
            if ran.returncode or failed.exists():
                say(f"failed: {shell.strip()}\n{failed.read_text() if failed.exists() else ''}{ran.stdout[-1500:]}")
                failed.unlink(missing_ok=True)
        changed = subprocess.run(["git", "diff", "--stat", "--", "*.md"], cwd=clone, capture_output=True, text=True, check=True).stdout
        if changed:
            say(f"drifted: the commands write other tables than those that are committed:\n{changed}")
        for where, said, now in said_and_measured(clone / "runs", printed):
            print(where, said, [round(x, 2) for x in now])
            if len(said) != len(now) or max(abs(a - b) for a, b in zip(said, now)) > TOLERANCE:
                say(f"drifted: {where}")
    sys.exit(f"{wrong} faults, told above." if wrong else None)


if __name__ == "__main__":
    main()
