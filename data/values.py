"""Values from JSON files, checked by a table of types and ranges before they are used."""
from data import UserError

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list",
         dict: "a JSON object"}


def check_values(values, table, where, needed=()):
    """Raises UserError for the first value that is missing or not as the table says.

    values  a dict; names outside the table may have any value
    table   {name: (type,)}, or (type, smallest, largest) for numbers; [type]: a list of that type
    where   the file, for the message
    needed  names that must be there
    """
    for name in (*needed, *table):
        if name not in values and name in needed:
            raise UserError(f"{where} has no {name}")
        if name in values and not fits(values[name], *table[name]):
            kind, *limits = table[name]
            words = f"a list, each item {WORDS[kind[0]]}" if isinstance(kind, list) else WORDS[kind]
            words += f" from {limits[0]:,} to {limits[1]:,}" if limits else ""
            text = repr(values[name])
            text = text if len(text) < 80 else text[:76] + " ..."
            raise UserError(f"{where}: {name} is {text}; it must be {words}")


def fits(value, kind, *limits):
    """Whether a value has the type and is in range. int counts as float; bool and NaN do not."""
    if isinstance(kind, list):
        return type(value) is list and all(fits(item, kind[0], *limits) for item in value)
    right = type(value) in ((int, float) if kind is float else (kind,))
    return right and (not limits or limits[0] <= value <= limits[1])
