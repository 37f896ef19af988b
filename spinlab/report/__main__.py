"""Rebuild every table and file that pages have marks of, show a published table, or all records.

python -m spinlab.report                     all pages, from their records: make tables
python -m spinlab.report table=spinquant_1   the paper's numbers, ours beside them
python -m spinlab.report table=methods records=runs/mine     a row for each experiment; also seeds
python -m spinlab.report table=gap records=runs/mine methods=quarot,learned_blocks; also differences
python -m spinlab.report table=kv records=runs/kv/smollm2_135m    codecs of one model's cache
python -m spinlab.report table=formats records=runs/formats/smollm2_135m metric=ppl/wiki
python -m spinlab.report figure=curves run=runs/toy/KEY out=curves.pdf
python -m spinlab.report page=index.html     all records in one file, to look through: make report

With `table=`: `format=` markdown, latex or csv, and of a published one `model=` some of its models,
with commas. `records=`: where ours lie, with commas: below runs and experiments, unless said
otherwise; for tables of one's own, one folder of runs or of records `<name>_seed<N>.json`.
"""

import logging
import sys
from pathlib import Path

from spinlab.errors import InputError, did_you_mean
from spinlab.report.figures import described, make_figure, read_words
from spinlab.report.formats import FORMATS, Sheet
from spinlab.report.page.build import write_page
from spinlab.report.pages import make_files, pages, rebuilt
from spinlab.report.publications import papers
from spinlab.report.records import folders_of
from spinlab.report.tables import SHEETS
from spinlab.report.tables.paper import paper_sheet
from spinlab.streams import ending, keep_streams

_ROOT = Path(__file__).parent.parent.parent
_RECORDS = "runs,experiments"
# tables of methods that are named, and who they are
_COMPARED = {
    "gap": "BASELINE,METHOD: whose gap, and who closes it",
    "differences": "BASE,CHOICE: who is held against whom",
}
_OF_A_METRIC = ("formats",)  # tables of one measure, by its name without a variant
# what is made, by the word that asks for it, with the others that are read; figures have their own
_OUTPUTS = {
    "table": ("format", "model", "records", "methods", "metric"),
    "page": ("records",),
    "figure": (),
}


def main(words: list[str] | None = None) -> None:
    """Do what the words say; exit status 2 and one sentence for what a user can mend."""
    logging.basicConfig(format="%(message)s")
    given = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(given):
        print(f"{__doc__}\nPublished tables: {', '.join(_published())}\n\n{described()}")
        sys.exit(0)
    with ending("spinlab.report"):
        if given:
            print(_made(given))
        else:
            _rebuild()


def _made(words: list[str]) -> str:
    """Make the one output that words ask for; return it, or say where it is.

    Raises InputError for two outputs, for none, and for a word that the output does not read.
    """
    asked = read_words(words)
    outputs = [name for name in _OUTPUTS if name in asked]
    if len(outputs) > 1:
        raise InputError(f"{outputs[0]}= and {outputs[1]}= are two outputs: ask for one at a time")
    if outputs == ["figure"]:
        return str(make_figure(words))
    output = outputs[0] if outputs else ""
    every = [*_OUTPUTS, *_OUTPUTS["table"]]
    for name, value in asked.items():
        if name not in every:
            raise InputError(f"{name}= is unknown: {did_you_mean(name, every)}")
        if not output:
            needed = "table=NAME, page=FILE or figure=KIND"
            raise InputError(f"{name}={value} needs an output: write {needed}")
        if name not in (output, *_OUTPUTS[output]):
            raise InputError(f"{output}= does not read {name}=: leave it out")
    if output == "page":
        page = Path(asked["page"]).expanduser()
        return write_page(_folders(asked.get("records", _RECORDS)), page)
    return _table(asked)


def _table(asked: dict[str, str]) -> str:
    """Return a table in the format that is asked for."""
    kind, table = asked.get("format", "markdown"), asked["table"]
    if kind not in FORMATS:
        raise InputError(f"format={kind} is unknown: choose one of {', '.join(FORMATS)}")
    own, published = table in SHEETS, _published()
    if not own and table not in published:
        near = did_you_mean(table, [*SHEETS, *published], "--help")
        raise InputError(f"unknown table {table!r}: {near}")
    unread = ("model",) if own else ("methods",)
    for word in (*unread, *(("metric",) if table not in _OF_A_METRIC else ())):
        if word in asked:
            raise InputError(f"table={table} does not read {word}=: leave it out")
    if own:
        return FORMATS[kind](_own(table, asked))
    models = asked["model"].split(",") if "model" in asked else []
    folders = _folders(asked.get("records", _RECORDS))
    return FORMATS[kind](paper_sheet(folders, table, models))


def _published() -> list[str]:
    """Return the names of all published tables."""
    return [name for paper in papers().values() for name in paper.tables]


def _own(table: str, asked: dict[str, str]) -> Sheet:
    """Return a table of one folder of records. Raises InputError for words it lacks, or has not."""
    folders = folders_of(asked["records"]) if "records" in asked else []
    if len(folders) != 1:
        raise InputError(f"table={table} is of one folder of records: write records=FOLDER")
    methods = asked["methods"].split(",") if "methods" in asked else []
    if table in _COMPARED and len(methods) < 2:
        raise InputError(f"table={table} needs methods={_COMPARED[table]}")
    if table not in _COMPARED and methods:
        raise InputError(f"table={table} has all methods of its folder: leave methods= out")
    metric = [asked["metric"]] if "metric" in asked else []
    return SHEETS[table](folders[0], *methods, *metric)


def _folders(places: str) -> list[Path]:
    """Return the folders of records; of the two that are looked into anyway, none need be there."""
    if places == _RECORDS:
        return [Path("runs"), _ROOT / "experiments"]
    return folders_of(places)


def _rebuild() -> None:
    """Write every table into its page, and the files that pages have marks of."""
    for page in pages(_ROOT):
        text = page.read_text(encoding="utf-8")
        page.write_text(rebuilt(text, _ROOT), encoding="utf-8")
        for path in (page, *make_files(text, _ROOT)):
            print(path.relative_to(_ROOT))


if __name__ == "__main__":
    keep_streams()
    main()
