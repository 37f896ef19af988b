"""Tables made of records. A kind is a function: (path of records, more words) -> Markdown."""

from collections.abc import Callable, Mapping

from spinlab.report.tables.ablation import ablation_table
from spinlab.report.tables.gap import gap_table
from spinlab.report.tables.methods import methods_table
from spinlab.report.tables.record import record_table

KINDS: Mapping[str, Callable[..., str]] = {
    "record": record_table,
    "methods": methods_table,
    "ablation": ablation_table,
    "gap": gap_table,
}
