"""fight.py: the fair fight. Every method gets the same settings to choose from, and meets the targets with new seeds.

    python results/fight.py              search: 16 settings x 6 methods x 2 seeds, judged on development looks (search.csv)
    python results/fight.py --final      then each method at its own best setting, with five new seeds, on the targets (fight.csv)
    python results/fight.py --clips      the full method and its best rivals once more, with two other miniature CLIPs (fight.csv)
    python results/fight.py --table      train nothing, write the tables into results/README.md

A method's setting is the one with the highest mean over seeds and looks, among the settings that every method has finished
with every seed. --final refuses to start before all are, because a target that was looked at cannot be unseen again. Beside the
settings stands train.py's own recipe, chosen by hand with the full method in view: it is shown once all its runs are made, and
no method may choose it.
"""

import argparse
import random
import statistics
import subprocess
import sys

import ablate
from ablate import HERE, ROWS, TARGETS

sys.path.insert(0, str(HERE.parent))

import train  # noqa: E402

LOOKS = ("toy-dev", "toy-dev-2", "toy-dev-3", "toy-dev-4")  # for choosing; no reported target is among them
SEEDS, NEW_SEEDS = (0, 1), (5, 6, 7, 8, 9)
METHODS = {"erm": "--method erm", **{name: ROWS[name][1] for name in ("vote", "otp", "no-reweight", "only-reweight", "full")}}
GRID = {"--lr": (1e-3, 2e-3, 3e-3, 5e-3), "--lr-clip": (0.01, 0.03, 0.1, 0.3), "--freeze": (0, 1, 2, 3, 4, 5),
        "--balance": (0.0, 0.5, 1.0), "--steps": (400, 800), "--text-weight": (0.3, 0.5, 0.7)}
BASELINES = ("erm", "vote")  # without any of the paper's ideas
CLIPS = (1, 2)  # seeds of two other miniature CLIPs; training one takes an hour
DRAW = random.Random(0)
SETTINGS = [{flag: DRAW.choice(values) for flag, values in GRID.items()} for _ in range(16)]


def flags(method, number):
    """The flags of a method at a setting. The baseline has no text score, so its share is none of its flags."""
    own = [f"{flag} {value}" for flag, value in SETTINGS[number].items() if method != "erm" or flag != "--text-weight"]
    return f"{METHODS[method]} {' '.join(own)}"


def search_jobs(seeds=SEEDS):
    """(row, seed, flags), seeds and settings first, so that a search that is cut off has tried the same for all methods."""
    drawn = [(f"{method}-{n}", seed, flags(method, n)) for seed in seeds for n in range(len(SETTINGS)) for method in METHODS]
    return drawn + [(f"{method}-recipe", seed, METHODS[method]) for seed in seeds for method in METHODS]


def clip_jobs(best):
    """(row, seed, flags) of the headline rows with other CLIPs; a CLIP that is not there is made."""
    jobs = []
    for number in CLIPS:
        file = f"runs/clip-{number}.pt"
        if not (HERE.parent / file).exists():
            (HERE.parent / "runs").mkdir(exist_ok=True)
            subprocess.run([sys.executable, "toy_clip.py", "--train", "--seed", str(number), "--out", file], cwd=HERE.parent, check=True)
        jobs += [(f"{method}-{best[method][0]}-clip{number}", seed, f"{flags(method, best[method][0])} --clip {file}")
                 for seed in NEW_SEEDS for method in headline(best)]
    return jobs


def headline(best):
    """The full method, and by the search: the better of the baselines, and the best of the five others."""
    by_search = sorted(best, key=lambda method: -best[method][1])
    return "full", next(m for m in by_search if m in BASELINES), next(m for m in by_search if m != "full")


def scores(lines, seeds=SEEDS):
    """{method: {setting: mean over looks and seeds}}, of the settings that all methods have finished with all seeds."""
    found = {method: {n: ablate.column(lines, f"{method}-{n}") for n in range(len(SETTINGS))} for method in METHODS}
    whole = [n for n in range(len(SETTINGS)) if all(set(seeds) <= set(found[method][n]) for method in METHODS)]
    return {method: {n: statistics.mean(found[method][n][seed] for seed in seeds) for n in whole} for method in METHODS}


def complete(lines):
    return len(scores(lines)["full"]) == len(SETTINGS)


def chosen(lines):
    """{method: (its best setting, the mean score there)}."""
    return {method: max(by_setting.items(), key=lambda pair: pair[1]) for method, by_setting in scores(lines).items() if by_setting}


def search_table(lines):
    """Markdown: one line a setting, one column a method; the best of each method in bold, once both seeds of all settings are there."""
    whole = complete(lines)
    seeds, best = (SEEDS, chosen(lines)) if whole else (SEEDS[:1], {})
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    table = [f"Made by `python results/fight.py`: mean over the four development domains, {len(seeds)} seed(s), commit {commits}.", "",
             f"| | {' | '.join(f'`{flag}`' for flag in GRID)} | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + len(GRID) + 1) + "|"]
    by_method = scores(lines, seeds)
    for n in by_method["full"]:
        means = [f"{by_method[m][n]:.1f}" for m in METHODS]
        means = [f"**{mean}**" if m in best and best[m][0] == n else mean for m, mean in zip(METHODS, means)]
        table.append(f"| {n} | {' | '.join(str(SETTINGS[n][flag]) for flag in GRID)} | {' | '.join(means)} |")
    if whole:
        source = [statistics.mean(ablate.column(lines, f"{method}-{n}", "toy-gta5")[seed] for n in by_method[method] for seed in seeds)
                  for method in METHODS]
        first = [max(METHODS, key=lambda method: by_method[method][n]) for n in by_method["full"]]
        table += [f"| mean {'| ' * len(GRID)}| {' | '.join(f'{statistics.mean(by_method[m].values()):.1f}' for m in METHODS)} |",
                  f"| held-out source, mean {'| ' * len(GRID)}| {' | '.join(f'{mean:.1f}' for mean in source)} |",
                  f"| first in {'| ' * len(GRID)}| {' | '.join(str(first.count(method)) for method in METHODS)} |"]
    recipe = [ablate.column(lines, f"{method}-recipe") for method in METHODS]
    if all(set(seeds) <= set(own) for own in recipe):
        means = [f"{statistics.mean(own[seed] for seed in seeds):.1f}" for own in recipe]
        own = train.configure({})
        values = (str(getattr(own, flag[2:].replace("-", "_"))) for flag in GRID)
        table += [f"| recipe | {' | '.join(values)} | {' | '.join(means)} |", "",
                  "`recipe` is train.py's own, chosen by hand with the full method in view; no method may choose it."]
    return table


def final_table(lines, best):
    """Markdown: the methods at their own settings on the targets, full minus each of the others at equal seed, and the verdict."""
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    table = ["Made by `python results/fight.py --final` and, with two other CLIPs, `--clips`: the targets, seeds "
             f"{NEW_SEEDS[0]} to {NEW_SEEDS[-1]}, commit {commits}.", "",
             "| method | setting | n | development | unseen | held-out source | full minus it | 95 % interval | over the targets |",
             "|---" * 9 + "|"]
    (full, *rivals), said = headline(best), []
    for method, clip in [*((method, "") for method in best), *((method, f"-clip{number}") for number in CLIPS for method in rivals)]:
        def column(name, key="unseen", clip=clip):
            return ablate.column(lines, f"{name}-{best[name][0]}{clip}", key)

        unseen, name, gain = column(method), ROWS[method][0], " | | "
        if not unseen or not column(full):
            continue
        if clip:
            name = f"{name}; both with CLIP {clip[-1]}, where full has {ablate.spread([*column(full).values()])}"
        if method != full and (paired := ablate.paired(column(full), unseen)):
            n, lead, half, _ = paired
            leads = [(ablate.paired(column(full, target), column(method, target))[1], target[4:]) for target in TARGETS]
            ends = " to ".join(f"{least:+.1f} ({target})" for least, target in (min(leads), max(leads)))
            gain = f"{lead:+.2f} | {lead - half:+.2f} to {lead + half:+.2f} | {ends}"
            if method == rivals[1] and not clip and n == len(NEW_SEEDS):
                verdict = "holds" if lead > half else "is refuted" if lead < 0 else "is open"
                reached = "reached" if lead >= 3 and lead > half else "not reached"
                said = [f"Best of the five others, by the search: {name}. The primary claim {verdict}; the aim of +3 is {reached}."]
        table.append(f"| {name} | {best[method][0]} | {len(unseen)} | {'-' if clip else f'{best[method][1]:.1f}'} "
                     f"| {ablate.spread([*unseen.values()])} | {ablate.spread([*column(method, 'toy-gta5').values()])} | {gain} |")
    return [*table, "", *said]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--final", action="store_true", help="the targets")
    what.add_argument("--clips", action="store_true", help="the headline rows with two other CLIPs")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the search")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    what.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    failed, search, fight = 0, HERE / "search.csv", HERE / "fight.csv"
    if args.final or args.clips:
        if not complete(ablate.read(search)):
            sys.exit("The search is not complete: run python results/fight.py first.")
        best = chosen(ablate.read(search))
        final = [(f"{method}-{best[method][0]}", seed, flags(method, best[method][0])) for seed in NEW_SEEDS for method in METHODS]
        jobs = final if args.final else clip_jobs(best)
        failed = ablate.train(jobs, fight, TARGETS, args.jobs, "fight")
    elif not args.table:
        failed = ablate.train(search_jobs(args.seeds), search, LOOKS, args.jobs, "search")
    content = search_table(ablate.read(search))
    if ablate.read(fight) and complete(ablate.read(search)):
        content += ["", *final_table(ablate.read(fight), chosen(ablate.read(search)))]
    ablate.put(HERE / "README.md", "fight", "\n".join(content))
    if failed:
        sys.exit(f"{failed} runs failed; what they said stands above. The same command tries them again.")


if __name__ == "__main__":
    main()
