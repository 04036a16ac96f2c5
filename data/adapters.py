"""Adapters of PEFT: LoRA (Hu et al., 2022) is merged into the base model's tensors when a model is loaded.

An adapter is a directory with adapter_config.json and adapter_model.safetensors. Its base model is in
the same directory, or in the one (of a run best/) that adapter_config.json names.
"""
import hashlib, math, re
from pathlib import Path

import torch
from safetensors import safe_open

from data import UserError
from data.files import read_json
from data.hub import FAMILIES, parts_of
from data.values import check_values

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it with peft: model.merge_and_unload().save_pretrained(NEW_DIR)"
# Settings with which an adapter is more than W + scale * B A.
OTHER_KINDS = ("use_dora", "lora_bias", "layer_replication", "use_qalora", "target_parameters", "use_bdlora",
               "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config")
FIELDS = {"peft_type": (str,), "base_model_name_or_path": (str,), "bias": (str,), "use_rslora": (bool,),
          "lora_alpha": (float, 0, 1e6), "alpha_pattern": (dict,), "modules_to_save": ([str],)}


def is_adapter(directory):
    """Whether a directory holds an adapter."""
    return (Path(directory) / CONFIG).is_file()


def base_of(directory):
    """The directory of an adapter's base model; of another directory, the directory itself.

    Raises UserError if the base is not on this machine, or is an adapter in turn.
    """
    directory = Path(directory)
    own = [file for file in directory.glob("*.safetensors") if file.name != WEIGHTS]
    if not is_adapter(directory) or own and (directory / "config.json").is_file():
        return directory
    name = read_adapter_config(directory).get("base_model_name_or_path") or ""
    for place in (Path(name), Path(name, "best"), directory / name, directory / name / "best") if name else ():
        if (place / "config.json").is_file():
            if is_adapter(place):
                raise UserError(f"{directory} is an adapter of {place}, which holds an adapter itself; {MERGE}")
            return place
    raise UserError(f"{directory} is an adapter of {name or 'a model without a name'}, which is not a directory here: "
                    f"write the base model's directory as base_model_name_or_path in {directory / CONFIG}")


def read_adapter_config(directory):
    """adapter_config.json as a dict, null fields left out. Raises UserError for all but plain LoRA."""
    path = directory / CONFIG
    config = {k: v for k, v in read_json(path).items() if v is not None}
    check_values(config, FIELDS, path)
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind!r} is not supported, only LORA; {MERGE}")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias = {config['bias']!r} is not supported, only none; {MERGE}")
    if not isinstance(start, bool) and start != "gaussian":          # such a start changes the base's weights, too
        raise UserError(f"{path}: init_lora_weights = {start!r} is not supported; {MERGE}")
    patterns = config.get("alpha_pattern", {})
    check_values(patterns, dict.fromkeys(patterns, (float, 0, 1e6)), f"{path}: alpha_pattern")
    for pattern in patterns:                                         # in peft a regular expression: here an ending
        if not re.fullmatch(r"[\w.]+", pattern):
            raise UserError(f"{path}: alpha_pattern {pattern!r} is not the name of a module; {MERGE}")
    for name in OTHER_KINDS:
        if config.get(name):
            raise UserError(f"{path}: {name} is not supported, only plain LoRA; {MERGE}")
    return config


def merged(tensors, directory, config, settings):
    """(tensors with the adapter in `directory` merged, [entry for the history]); ([] where there is none).

    tensors: {the family's name: tensor} of the base model; config: its Config; settings: its
    config.json. W becomes W + scale * B A, in float32, where scale is alpha / rank, with use_rslora
    alpha / sqrt(rank). Modules of modules_to_save are replaced. Raises UserError for tensors that do
    not fit the base.
    """
    if not is_adapter(directory):
        return tensors, []
    if settings.get("compression"):
        raise UserError(f"{directory} is an adapter, and only dense layers can be adapted: take the base model before "
                        "it was compressed")
    settings, (pairs, whole), tensors = read_adapter_config(directory), read_pairs(directory), dict(tensors)
    for key, t in whole.items():
        name = base_name(key, tensors, config, directory)
        if t.shape != tensors[name].shape:
            raise UserError(f"{directory}: {key} is {tuple(t.shape)}, in the base model {tuple(tensors[name].shape)}; "
                            f"{MERGE}")
        tensors[name] = t
    for module, (down, up) in pairs.items():
        name, rank = base_name(module + ".weight", tensors, config, directory), len(down)
        alpha = next((alpha for ending, alpha in settings.get("alpha_pattern", {}).items()
                      if f".{module}".endswith(f".{ending}")), settings.get("lora_alpha", 8))
        delta = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank) * (up.float() @ down.float())
        embeds = name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight"))
        if embeds or parts_of(name, FAMILIES[config.model_type])[1] == "transposed":
            delta = delta.T                           # (out, in) -> (in, out), as the base stores this weight
        if delta.shape != tensors[name].shape:
            raise UserError(f"{directory}: the adapter of {module} is {tuple(delta.shape)}, the base model's weight "
                            f"{tuple(tensors[name].shape)}: they do not belong together")
        tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
    digest = hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()[:16]
    return tensors, [{"step": "adapter", "name": directory.resolve().name, "sha256": digest,
                      "modules": len(pairs) + len(whole)}]


def base_name(name, tensors, config, directory):
    """The base model's name of an adapter's tensor. Raises UserError if there is none, or a tied one."""
    other = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}.get(name)    # of GPT-NeoX
    found = next((n for n in (name, name.removeprefix("transformer."), other) if n in tensors), None)
    if config.tie_word_embeddings and any(word in name for word in ("lm_head", "embed_", ".wte.")):
        raise UserError(f"{directory} adapts {name}, but in the base model the head is the embedding; {MERGE}")
    if found is None:
        raise UserError(f"{directory} adapts {name}, which the base model does not have: they do not belong together")
    return found


def read_pairs(directory):
    """({module: (A (rank, in), B (out, rank))}, {name: whole tensor}) of an adapter's file.

    Raises UserError for other tensors, or half of a pair.
    """
    path, found, whole = directory / WEIGHTS, {}, {}
    if not path.is_file():
        raise UserError(f"{directory} has no {WEIGHTS} (adapter_model.bin is a pickle, which may run code and is not "
                        "opened: save it anew with peft)")
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}
    except Exception as error:                        # any error of the library means that the file is broken
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from None
    for key, t in tensors.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        module, part, letter = re.fullmatch(r"(.*?)(?:\.(lora_embedding_|lora_)([AB])(?:\.weight)?)?", name).groups()
        if not part and name.endswith((".weight", ".bias")) and ".lora_" not in name:
            whole[name] = t
        elif not part or t.ndim != 2 or not torch.isfinite(t).all():
            raise UserError(f"{path} holds {key}, which is no part of a plain LoRA of finite numbers; {MERGE}")
        else:
            found.setdefault(module, {})[letter] = t
    for module, pair in found.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
            raise UserError(f"{path} has no two fitting factors A and B of {module}")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}, whole
