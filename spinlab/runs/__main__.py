"""The runs on this disk: python -m spinlab.runs [seed=0 ppl/wiki/fake=..20 --sort learn.lr.r1]"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from spinlab.config import PathsConfig
from spinlab.errors import InputError
from spinlab.held import is_held
from spinlab.report.formats import markdown
from spinlab.runs import clean, compare
from spinlab.runs.found import Run, find, one
from spinlab.runs.listing import Filter, chosen, in_order, table
from spinlab.streams import ending, keep_streams

_COMMANDS = ("list", "show", "compare", "clean")
_PARTS = ("runs", "stages")

Left = Mapping[Path, str]  # files that are left out, and why


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; exit status 2 and one sentence for what a user can mend."""
    words = list(sys.argv[1:] if words is None else words)
    if not any(word in (*_COMMANDS, "-h", "--help") for word in words[:1]):
        words.insert(0, "list")
    arguments = _parser().parse_args(words)
    with ending("spinlab.runs"):
        runs, left = find(Path(arguments.runs))
        for path, reason in left.items():
            print(f"{path} is left out: {reason}", file=sys.stderr)
        arguments.run(arguments, runs, left)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spinlab.runs",
        description="List, show, compare and clear away runs. Without a command: list.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--runs", default=PathsConfig().runs, help="their folder (%(default)s)")

    told = "table of runs, the latest last"
    listed = commands.add_parser("list", parents=[places], help=told)
    listed.add_argument(
        "filters",
        nargs="*",
        metavar="NAME=VALUE",
        help="a setting or metric: seed=0,1  ppl/wiki/fake=..20  model.name='smo*'",
    )
    listed.add_argument("--sort", metavar="NAME", help="setting or metric, the smallest first")
    listed.add_argument("--reverse", action="store_true", help="turn the order round")
    listed.add_argument("--columns", metavar="NAMES", help="settings and metrics, by commas")
    listed.set_defaults(run=_list)

    key = "the key of a run, or its first digits"
    show = commands.add_parser("show", parents=[places], help="settings, stages, metrics of a run")
    show.add_argument("key", metavar="KEY", help=key)
    show.set_defaults(run=_show)

    both = commands.add_parser("compare", parents=[places], help="in what two runs differ")
    both.add_argument("keys", nargs=2, metavar="KEY", help=key)
    both.set_defaults(run=_compare)

    told = "remove runs that did not end well, and cached stages that no other run of --runs names"
    away = commands.add_parser("clean", parents=[places], help=told, description=told)
    away.add_argument("parts", nargs="*", metavar="runs|stages", help="which of them (both)")
    away.add_argument("--cache", default=PathsConfig().cache, help="its folder (%(default)s)")
    away.add_argument("--yes", action="store_true", help="do not ask")
    away.set_defaults(run=_clean)
    return parser


def _list(arguments: argparse.Namespace, runs: list[Run], _: Left) -> None:
    found = chosen(runs, [Filter.read(word) for word in arguments.filters])
    if not found:
        print(f"{arguments.runs} holds {len(runs)} runs, and none to list")
        return
    columns = arguments.columns.split(",") if arguments.columns else []
    print(table(in_order(found, arguments.sort, arguments.reverse), columns))


def _show(arguments: argparse.Namespace, runs: list[Run], _: Left) -> None:
    print(compare.shown(one(runs, arguments.key)))


def _compare(arguments: argparse.Namespace, runs: list[Run], _: Left) -> None:
    print(compare.compared(*(one(runs, key) for key in arguments.keys)))


def _clean(arguments: argparse.Namespace, runs: list[Run], left: Left) -> None:
    """Say what would go, and let it go once that is agreed to."""
    if unknown := set(arguments.parts) - set(_PARTS):
        raise InputError(f"clean {min(unknown)}: clean runs, stages, or both without a word")
    parts, cache = arguments.parts or _PARTS, Path(arguments.cache)
    away = clean.unfinished(runs) if "runs" in parts else []
    stages, in_use = [], False
    if "stages" in parts:
        _check_known(runs, left, arguments.runs)
        if in_use := is_held(cache):
            print(f"{cache} is in use, and its stages are not looked at")
        else:
            gone = {waste.folder for waste in away}
            going = [run for run in runs if run.folder in gone]
            staying = [run for run in runs if run.folder not in gone]
            stages = clean.unnamed(cache, staying, going)
    if not away and not stages:
        print("there is nothing else to clean" if in_use else "there is nothing to clean")
        return
    rows = [[str(w.folder), w.reason, _mebibytes(w.size)] for w in (*away, *stages)]
    total = _mebibytes(sum(waste.size for waste in (*away, *stages)))
    print(markdown([["folder", "why", "MiB"], *rows]))
    print(f"{len(away)} runs and {len(stages)} stages, {total} MiB")
    if not arguments.yes and not _agreed():
        raise InputError("nothing was removed: agree, or add --yes")
    kept = clean.remove_runs(away)
    kept += clean.remove_stages(cache, stages, Path(arguments.runs)) if stages else []
    if kept:
        raise InputError(f"not removed: {'; '.join(kept)}")


def _check_known(runs: list[Run], left: Left, folder: str) -> None:
    """Raise InputError unless it is known which stages the records of a folder name."""
    cure = "`clean runs` leaves the stages alone"
    if left:
        raise InputError(f"{min(left)} may name stages, and is not read: mend or remove it; {cure}")
    if not runs:
        raise InputError(
            f"{folder} holds no record, and all stages would go: name the folder of the runs that "
            f"the cache serves, as --runs=…; {cure}"
        )


def _agreed() -> bool:
    return sys.stdin.isatty() and input("remove them? [y/N] ").strip().lower() in ("y", "yes")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


if __name__ == "__main__":
    keep_streams()
    main()
