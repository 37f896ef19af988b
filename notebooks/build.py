"""Build the notebooks: every numbered .py here becomes an .ipynb with its outputs.

The .py (jupytext's percent format) are what is written and reviewed: `make notebooks`.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LARGEST = 200_000  # bytes of a notebook with its outputs


def sources() -> list[Path]:
    """Return the notebooks' sources in their order."""
    return sorted(HERE.glob("[0-9]*.py"))


def read_source(path: Path) -> nbformat.NotebookNode:
    """Return a source as a notebook without outputs, the same for the same text."""
    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the format's own are random
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel})
    return notebook


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run a notebook in a folder that goes away; progress bars and warnings are left out."""
    with TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    return notebook


def main() -> None:
    """Write every notebook; a status other than 0 if one is too large."""
    large = []
    for source in sources():
        target = source.with_suffix(".ipynb")
        target.write_text(nbformat.writes(executed(read_source(source))) + "\n", encoding="utf-8")
        size = target.stat().st_size
        print(f"{target.name}: {size / 1000:.0f} kB")
        large += [target.name] * (size > LARGEST)
    if large:
        sys.exit(f"larger than {LARGEST / 1000:.0f} kB: {', '.join(large)}")


if __name__ == "__main__":
    main()
