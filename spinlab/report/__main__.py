"""Rebuild every table under experiments/ from the records beside it: `make tables`."""

from pathlib import Path

from spinlab.report.methods import methods_table, read_records

_EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
_START, _END = "<!-- table -->\n", "<!-- end -->"


def rebuilt(text: str, table: str) -> str:
    """Return a page with the table between its marks replaced; the words around it stay."""
    start, end = text.index(_START) + len(_START), text.index(_END)
    return f"{text[:start]}{table}\n{text[end:]}"


def main() -> None:
    """Write the table of methods into its page."""
    page = _EXPERIMENTS / "methods_smollm2.md"
    table = methods_table(read_records(_EXPERIMENTS / "methods_smollm2"))
    page.write_text(rebuilt(page.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(f"{table}\n\n{page}")


if __name__ == "__main__":
    main()
