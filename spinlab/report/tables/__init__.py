"""Tables and files made of records, by kind.

A table is a function of (path of records, more words) to Markdown; a file is made by one that
returns its path.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from spinlab.report.figures import figure_file
from spinlab.report.formats import Sheet
from spinlab.report.tables.ablation import ablation_table
from spinlab.report.tables.differences import differences_sheet, differences_table
from spinlab.report.tables.estimates import estimates_table
from spinlab.report.tables.exports import exports_table
from spinlab.report.tables.formats import formats_sheet, formats_table
from spinlab.report.tables.gap import gap_sheet, gap_summary, gap_table
from spinlab.report.tables.kv import kv_sheet, kv_summary, kv_table
from spinlab.report.tables.memory import memory_table
from spinlab.report.tables.methods import methods_sheet, methods_table
from spinlab.report.tables.paper import paper_table
from spinlab.report.tables.pareto import pareto_table
from spinlab.report.tables.quality import quality_summary
from spinlab.report.tables.record import record_table
from spinlab.report.tables.seeds import seeds_sheet, seeds_table

KINDS: Mapping[str, Callable[..., str]] = {
    "record": record_table,
    "methods": methods_table,
    "ablation": ablation_table,
    "gap": gap_table,
    "paper": paper_table,
    "exports": exports_table,
    "seeds": seeds_table,
    "differences": differences_table,
    "pareto": pareto_table,
    "kv": kv_table,
    "formats": formats_table,
    "memory": memory_table,
    "estimates": estimates_table,
}

# of records of one's own, in any format
SHEETS: Mapping[str, Callable[..., Sheet]] = {
    "methods": methods_sheet,
    "gap": gap_sheet,
    "seeds": seeds_sheet,
    "differences": differences_sheet,
    "kv": kv_sheet,
    "formats": formats_sheet,
}

FILES: Mapping[str, Callable[..., Path]] = {
    "gap": gap_summary,
    "quality": quality_summary,
    "kv": kv_summary,
    "figure": figure_file,
}
