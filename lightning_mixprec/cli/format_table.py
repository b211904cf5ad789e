"""The table of number formats, as ``mixprec formats`` prints it."""

from lightning_mixprec.numerics.formats import FORMATS, Format
from lightning_mixprec.policy.table import align

_COLUMNS = (
    "format",
    "bits",
    "largest",
    "smallest normal",
    "smallest",
    "next after 1",
    "in a policy",
    "too large/coarse",
)
_NUMBERS = _COLUMNS[1:6]


def lines() -> list[str]:
    """The lines of the table, and one that says what its last columns mean."""
    rows = [_row(format) for format in FORMATS.values()]
    return [
        *align([_COLUMNS, *rows], right=_NUMBERS),
        "",
        "In a policy: what a layer may do in it; products are its matrix products alone, scaled by tensor or row.",
        "Too large/coarse: the format to go to where numbers leave its range, and where it rounds too coarsely.",
    ]


def _row(format: Format) -> tuple[str, ...]:
    use = format.use
    uses = ["compute"] * (use.is_computed_in and not use.products) + ["products"] * bool(use.products)
    uses += ["store weights"] * use.stores_weights + ["needs a loss scale"] * (use.is_computed_in and use.needs_scaling)
    numbers = (format.max, format.smallest_normal, format.smallest_subnormal, format.epsilon)
    smallest = [f"{number:.6g}" for number in numbers]
    if format.is_integer:
        smallest[1], smallest[3] = "-", "-"
    onwards = f"{use.for_range or '-'}/{use.for_precision or '-'}"
    return (format.name, str(format.bits), *smallest, ", ".join(uses) or "statistics", onwards)
