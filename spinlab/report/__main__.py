"""Rebuild every table and file that pages have marks of, show a published table, or all records.

python -m spinlab.report                     all pages, from their records: make tables
python -m spinlab.report table=spinquant_1   the paper's numbers, ours beside them
python -m spinlab.report figure=curves run=runs/toy/KEY out=curves.pdf
python -m spinlab.report page=index.html     all records in one file, to look through: make report

With `table=`: `format=` markdown, latex or csv, and `model=` some of its models, with commas. With
both: `records=` where ours lie, with commas: below runs and experiments, unless said otherwise.
"""

import logging
import sys
from pathlib import Path

from spinlab.errors import InputError, did_you_mean
from spinlab.report.figures import described, make_figure
from spinlab.report.formats import FORMATS
from spinlab.report.page.build import write_page
from spinlab.report.pages import make_files, pages, rebuilt
from spinlab.report.publications import papers
from spinlab.report.records import folders_of
from spinlab.report.tables.paper import paper_sheet

_ROOT = Path(__file__).parent.parent.parent
_WORDS = {"table": "", "page": "", "format": "markdown", "model": "", "records": "runs,experiments"}


def main(words: list[str] | None = None) -> None:
    """Do what the words say; exit status 2 and one sentence for what a user can mend."""
    logging.basicConfig(format="%(message)s")
    given = sys.argv[1:] if words is None else words
    figure = any(word.startswith("figure=") for word in given)
    if {"-h", "--help"} & set(given):
        tables = [name for paper in papers().values() for name in paper.tables]
        print(f"{__doc__}\nPublished tables: {', '.join(tables)}\n\n{described()}")
        sys.exit(0)
    try:
        if figure:
            print(make_figure(given))
            return
        asked = _read(given)
        if asked["table"]:
            print(_published(asked))
        elif asked["page"]:
            print(write_page(_folders(asked["records"]), Path(asked["page"]).expanduser()))
        elif given:
            raise InputError(f"{given[0]} needs a table: write table=NAME or figure=KIND")
        else:
            _rebuild()
    except InputError as error:
        print(f"spinlab.report: {error}", file=sys.stderr)
        sys.exit(2)


def _read(words: list[str]) -> dict[str, str]:
    """Return the words `key=value` over their defaults."""
    asked = dict(_WORDS)
    for word in words:
        key, equals, value = word.partition("=")
        if key not in _WORDS or not equals or not value:
            raise InputError(f"{word!r} is no key=value: {did_you_mean(key, [*_WORDS, 'figure'])}")
        asked[key] = value
    return asked


def _published(asked: dict[str, str]) -> str:
    if asked["format"] not in FORMATS:
        raise InputError(f"format={asked['format']} is unknown: choose one of {', '.join(FORMATS)}")
    models = asked["model"].split(",") if asked["model"] else []
    sheet = paper_sheet(_folders(asked["records"]), asked["table"], models)
    return FORMATS[asked["format"]](sheet)


def _folders(places: str) -> list[Path]:
    """Return the folders of records; of the two that are looked into anyway, none need be there."""
    if places == _WORDS["records"]:
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
    main()
