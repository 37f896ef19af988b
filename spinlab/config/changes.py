"""What overrides give of a group of settings: what is left out stays as it is."""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Change:
    """Give what differs from settings, in fields of their names; None where nothing is given.

    It is not frozen: OmegaConf merges nothing into what is, where it stands in a list.
    """

    @property
    def given(self) -> dict[str, Any]:
        """What is not left out, by name, that of groups by theirs."""
        parts = {n: v.given if isinstance(v, Change) else v for n, v in vars(self).items()}
        return {name: part for name, part in parts.items() if part not in (None, {})}

    def applied(self, settings: T) -> T:
        """Return settings, a dataclass, with what is given."""
        found = {}
        for name, part in vars(self).items():
            if isinstance(part, Change):
                found[name] = part.applied(getattr(settings, name))
            elif part is not None:
                found[name] = part
        return replace(settings, **found)  # type: ignore[type-var]
