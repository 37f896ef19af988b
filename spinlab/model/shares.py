"""Who sees how much of an input: all linears the same tensor, or each expert its own rows of it."""

from spinlab.model.map import ModelMap, Site


def watched(model_map: ModelMap) -> dict[str, str]:
    """Return the linears, by path, that are given the whole of an input, by its key.

    It is the first that is quantized, or the router where experts share the input out.
    """
    shared = {site.key for site in model_map.sites if site.expert is not None}

    def rank(site: Site) -> tuple[bool, bool]:  # a shared expert's path is that of all experts
        return site.expert is not None, site.quantized == (site.key in shared)

    best = sorted(model_map.sites, key=rank)
    return {site.key: site.path for site in reversed(best)}


def numbers_read(model_map: ModelMap) -> dict[str, float]:
    """Return how many numbers of an input are read for a token, by its key.

    They are those of its row, once, or once by each of the experts that the token goes to.
    """
    found: dict[str, float] = {}
    for (key, _), share in {s.rows: s.share for s in model_map.sites if s.quantized}.items():
        found[key] = found.get(key, 0) + share * model_map.input_at[key].width
    return found


def numbers_given(model_map: ModelMap, layer: int) -> float:
    """Return how many numbers the experts of a layer give for a token, before they are summed."""
    experts = (s for s in model_map.sites if s.layer == layer and s.expert is not None)
    return sum(site.share * site.out_features for site in experts if site.writes == "R1")


def active_numbers(model_map: ModelMap) -> float:
    """Return how many weights of all layers a token meets."""
    return sum(site.numbers * site.share for site in model_map.sites)
