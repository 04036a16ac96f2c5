"""Which format each matrix gets (step mixed of compress.py): a knapsack of bits, filled for the least loss."""
import collections, math

import numpy as np

from data import UserError
from data.structure import check_storable, dense_layers, split_name

# The formats of the step mixed, as in model.compression. int8 costs so little loss that no layer need stay dense.
FORMATS = (*({"kind": "int4", "group": group} for group in (128, 64, 32)), {"kind": "int8"})


def knapsack(choices, budget, cells=100_000):
    """{name: number of a choice} with the least sum of losses, and costs of together at most `budget`.

    choices  {name: [(cost, loss), ...]}; costs and the budget are whole numbers
    Dynamic programming over what may be spent (Bellman, 1957). Exact if at most `cells` multiples of
    the costs' common divisor fit; otherwise each cost is rounded up by at most budget / cells.
    None: even the lowest costs are too much.
    """
    spare = budget - sum(min(cost for cost, _ in pairs) for pairs in choices.values())
    if spare < 0:
        return None
    more = {name: [cost - min(c for c, _ in pairs) for cost, _ in pairs] for name, pairs in choices.items()}
    spare = min(spare, sum(map(max, more.values())))
    unit = max(1, math.gcd(*(cost for costs in more.values() for cost in costs)), -(-spare // cells))
    least, picks = np.zeros(spare // unit + 1), {}               # [c]: the least loss for c units more
    for name, pairs in choices.items():
        options = np.full((len(pairs), len(least)), np.inf)
        for option, cost, (_, loss) in zip(options, more[name], pairs):
            start = -(-cost // unit)
            option[start:] = least[:max(0, len(least) - start)] + loss
        picks[name], least = options.argmin(0).astype(np.int16), options.min(0)
    chosen, left = {}, len(least) - 1
    for name in reversed(choices):
        chosen[name] = int(picks[name][left])
        left -= -(-more[name][chosen[name]] // unit)
    return {name: chosen[name] for name in choices}


def spec_of(entry):
    """(class, keyword arguments) of an entry of model.compression: (Int4Linear, {"group": 32})."""
    from model import LAYERS                                     # here, as the scripts import this file
    return LAYERS[entry["kind"]], {k: v for k, v in entry.items() if k not in ("module", "kind")}


def layers_to_quantize(model, bits, group, head_bits):
    """Lists the layers to quantize, {"module", "kind", ...spec} each, as in model.compression.

    bits       8 (one scale for each row) or 4 (one for each `group` of a row), in the blocks
    head_bits  8, 4 or 16 (stays float), of the embedding and the head: the most sensitive layers
    Raises UserError if groups do not divide the rows of a layer, or float16 cannot hold weights.
    """
    from model import LAYERS                                     # here, as the scripts import this file
    entries = []
    for name, layer in dense_layers(model).items():
        width = head_bits if name in ("model.embed_tokens", "lm_head") else bits
        if width == 16:
            continue
        spec = {"group": group} if width == 4 else {}
        check_storable(f"int{bits}", name, layer)
        try:
            LAYERS[f"int{width}"].group(layer.weight.shape[1], **spec)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        entries.append({"module": name, "kind": f"int{width}", **spec})
    return entries


def possible_formats(model):
    """{name: [entry of model.compression, ...]}: the FORMATS that fit each dense layer, smallest first.

    Raises UserError for weights that float16 scales cannot express.
    """
    entries = {}
    for name, layer in dense_layers(model).items():
        check_storable("mixed", name, layer)
        entries[name] = [{"module": name, **form} for form in FORMATS
                         if layer.weight.shape[1] % form.get("group", 1) == 0]
    return entries


def chosen_formats(bits, entries, layers, losses):
    """([entry, ...], history) of the format of each layer, for which the loss grows least.

    bits     mean stored bits per weight, scales counted, at most
    entries  as of possible_formats; layers: the same, rounded; losses: the same, nats per token
    Prints the plan. Raises UserError for fewer bits than the smallest formats take.
    """
    choices, weights = bits_and_losses(layers, losses)
    chosen = knapsack(choices, int(bits * weights))
    if chosen is None:
        least = sum(min(pairs)[0] for pairs in choices.values()) / weights
        raise UserError(f"mixed:{bits:g}: the matrices of this model take at least {math.ceil(1000 * least) / 1000} "
                        "bits per weight, scales and all: give as many, or cut the model before (width, depth, vocab)")
    spent, loss = (sum(choices[name][i][j] for name, i in chosen.items()) for j in (0, 1))
    result = [entries[name][i] for name, i in chosen.items()]
    plan = plan_of(result)
    print(f"mixed: {spent / weights:.3f} bits per weight; the loss should grow by about {loss:.4f} nats per token",
          *(f"  {form:8} {names}" for form, names in plan.items()), sep="\n", flush=True)
    return result, {"bits": bits, "plan": plan, "predicted_loss": loss}


def bits_and_losses(layers, losses):
    """({name: [(bits with scales, loss), ...]} for `knapsack`, number of weights) of rounded layers."""
    choices = {name: [(8 * (layer.q.nbytes + layer.scales.nbytes), loss) for layer, loss in zip(ways, losses[name])]
               for name, ways in layers.items()}
    return choices, sum(ways[0].in_features * ways[0].out_features for ways in layers.values())


def plan_of(entries):
    """{"int8": "embed_tokens, v_proj 0-2 5", "int4:32": "all others"}: matrices, and which layers'."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for entry in entries:
        form = ":".join(str(entry[key]) for key in ("kind", "group") if key in entry)
        layer, local = split_name(entry["module"])
        groups[form][local.split(".", 1)[-1]] += [layer] if ".layers." in entry["module"] else []
    most = max(groups, key=lambda form: sum(max(1, len(layers)) for layers in groups[form].values()))
    plan = {form: ", ".join(f"{name} {spans(layers)}".strip() for name, layers in groups[form].items())
            for form in sorted(groups, reverse=True) if form != most}
    return {**plan, most: "all others" if plan else "all"}


def spans(numbers):
    """Ascending whole numbers as text: "0-2 5"."""
    parts = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return " ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts)
