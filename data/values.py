"""Values from JSON files: a table says which types and ranges may be, before a value takes memory or begins a loop."""
from data import UserError

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list",
         dict: "a JSON object"}


def check_values(values, table, where, needed=()):
    """Raises UserError for the first value that is missing or is not as the table says.

    values  a dict; what the table does not name may be anything
    table   {name: (type,)}, or (type, smallest, largest) of numbers. [type] is a list of that type
    where   the beginning of the sentence: the file
    needed  names that must be there
    """
    for name in (*needed, *table):
        if name not in values and name in needed:
            raise UserError(f"{where} has no {name}")
        if name in values and not fits(values[name], *table[name]):
            kind, *limits = table[name]
            words = f"a list, each item {WORDS[kind[0]]}" if isinstance(kind, list) else WORDS[kind]
            words += f" from {limits[0]:,} to {limits[1]:,}" if limits else ""
            shown = repr(values[name])
            shown = shown if len(shown) < 80 else shown[:76] + " ..."
            raise UserError(f"{where}: {name} is {shown}; it must be {words}")


def fits(value, kind, *limits):
    """Whether a value has the type and lies in the range. A whole number is a number, true and NaN are none."""
    if isinstance(kind, list):
        return type(value) is list and all(fits(item, kind[0], *limits) for item in value)
    right = type(value) in ((int, float) if kind is float else (kind,))
    return right and (not limits or limits[0] <= value <= limits[1])
