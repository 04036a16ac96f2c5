"""Model directories, for load and save of model.py: files, refusals, the model card."""
import contextlib, hashlib, json, re
from pathlib import Path

from safetensors import safe_open
import torch

from data import UserError
from data.adapters import base_of, is_adapter
from data.files import beside, named, read_json
from data.hub import config_to_hub
from data.tokenizer import Tokenizer

SAMPLING = dict(do_sample=True, temperature=0.8, top_p=0.95)          # sample.py's own defaults
NOT_FOR = """Text it writes may be wrong, biased, or copied from its training data. It is not for decisions about
people, for medical, legal or financial advice, or for anything where a mistake does harm unless a person checks it."""


def find_model(path):
    """The directory that holds the model, or an adapter, at `path`: for a training run best/ or last/.

    Finds also a directory that an interrupted save left beside (.NAME.new, .NAME.old). Raises
    UserError if there is none.
    """
    path = named(path)
    for base in (path, path / "best", path / "last"):
        for candidate in (base, beside(base, "new"), beside(base, "old")):
            if (candidate / "config.json").is_file() or is_adapter(candidate):        # a save writes that last
                return candidate
    if not path.exists():
        raise UserError(f"there is no directory {path}")
    raise UserError(f"there is no model in {path}: no config.json in it, nor in its best/ or last/")


WRAPPER = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
QUANTIZED = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}


def refuse_companions(directory):
    """Raises UserError for files beside the weights that change the meaning of these."""
    for name in sorted(QUANTIZED):
        if (Path(directory) / name).exists():
            raise UserError(f"{directory} holds {name}, settings of quantized weights, which is not read here; take "
                            "the model before it was quantized")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (Path(directory) / name).exists() and not is_adapter(directory):
            raise UserError(f"{directory} holds {name}, an adapter, without its adapter_config.json: add that, or move "
                            "the adapter away")


def weight_files(path):
    """The files of the weights of the model at `path`, an adapter's base included, in order."""
    directory = find_model(path)
    return [file for folder in dict.fromkeys((directory, base_of(directory)))
            for file in sorted(folder.glob("*.safetensors"))]


def read_tensors(directory):
    """{name: tensor} of model.safetensors, or of the shards of an index, mapped from the files.

    Names lose the prefixes of wrappers (DDP, torch.compile, FSDP). Raises UserError.
    """
    names, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    if index.is_file() and not (directory / names[0]).is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(n)).name != n for n in shards.values()):
            raise UserError(f"{index} has no weight_map of file names")
        names = sorted(set(shards.values()))
    tensors = {}
    for name in names:
        if not (directory / name).is_file():
            pickles = sorted(p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pt")))
            only = f", only {pickles[0]}: a pickle may run code and is not opened; convert it with transformers' " \
                   "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)" if pickles else ""
            raise UserError(f"{directory} has no {name}{only}")
        try:
            with safe_open(directory / name, framework="pt") as f:
                keys = list(f.keys())
                shard = {WRAPPER.sub("", key): f.get_tensor(key) for key in keys}
        except Exception as error:                    # any error of the library means that the file is broken
            raise UserError(f"{directory / name} is truncated or not a safetensors file ({error})") from None
        if len(shard) < len(keys):
            raise UserError(f"{directory / name} holds a tensor twice, once behind module. or _orig_mod.: save it anew")
        tensors.update(shard)
    return tensors


@contextlib.contextmanager
def config_to_blame(directory):
    """Context in which every error becomes a UserError that names config.json."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{directory / 'config.json'} has a value that cannot be ({error!r})") from None


def is_tied(tensors):
    """Whether the head is the embedding, or absent. A head that is equal leaves `tensors`."""
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or table is None or head.dtype == table.dtype and torch.equal(head, table):
        tensors.pop("lm_head.weight", None)
        return True
    return False


def check_tensors(model, tensors, directory, finite):
    """Raises UserError for tensors of wrong names, shapes or types, or (finite=True) values."""
    check_shapes(model, tensors, directory)
    for name, t in model.named_buffers():                        # integers and scales: read, never converted
        if tensors[name].dtype != t.dtype:
            raise UserError(f"{directory}: {name} is {tensors[name].dtype}, config.json says {t.dtype}")
    for name in dict(model.named_parameters()).keys() & tensors.keys():
        if tensors[name].dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise UserError(f"{directory}: {name} is {tensors[name].dtype}, which is not read here: write the model as "
                            "float32, float16 or bfloat16")
    for name, t in tensors.items() if finite else ():
        # the sum is fast, but may overflow where all values are finite
        if t.is_floating_point() and not t.sum(dtype=torch.float32).isfinite() and not t.isfinite().all():
            raise UserError(f"{directory}: {name} holds values that are infinite or not a number: its training "
                            "diverged, or the file is damaged; take an earlier checkpoint")


def check_shapes(model, tensors, directory):
    """Raises UserError for tensors that are missing or unknown, or have another shape."""
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("lm_head.")}
    missing, unknown = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    for problem, names in (("lacks", missing), ("has an unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the model in {directory} {problem} tensor {min(names)}{more}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(f"{directory}: {name} is {tuple(tensors[name].shape)}, config.json says {tuple(shape)}")


def model_name(path):
    """The name of the model at `path` in a history: the directory's, or the run's."""
    directory = find_model(path).resolve()
    return directory.parent.name if directory.name in ("best", "last") else directory.name


def checkpoint_hash(path):
    """sha256 of the weights (16 hex digits), by which a history identifies a parent."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with open(file, "rb") as f:
            while block := f.read(2 ** 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def only_opens_here(model):
    """Whether only this project opens the model: the family lacks one of the layers or switches."""
    return bool(model.compression) or "switches" in config_to_hub(model.config)


def front_matter(file):
    """Lines of a model card's front matter on licence, base model and languages: a list of str.

    The lines stay in the card of every model that is made from this one. file: may be missing.
    """
    if not file.is_file():
        return []
    _, _, text = file.read_text(encoding="utf-8", errors="replace")[:2 ** 16].partition("---\n")
    lines, keep = [], False
    for line in text.partition("\n---")[0].splitlines():
        if not line.startswith((" ", "-")):
            keep = line.startswith(("license", "base_model:", "language:"))
        if keep:
            lines.append(line)
    return lines


def sampling_settings(directory):
    """The authors' settings of sampling in generation_config.json: a dict, {} if there are none."""
    file = directory / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: settings[name] for name in names if name in settings}


def generation_config(model, tokenizer):
    """generation_config.json as a dict: the settings of sampling, and the ids that end a text."""
    return {**(model.config.hub.get("sampling") or SAMPLING), "eos_token_id": sorted(tokenizer.eos_ids),
            "pad_token_id": tokenizer.eos_id}


def card(model):
    """The model card (README.md of a model directory): size, how to open it, history, limits."""
    c, ours = model.config, only_opens_here(model)
    library = [] if ours else ["library_name: transformers"]
    lines = ["---", *c.hub.get("card", []), *library, "pipeline_tag: text-generation", "---", "",
             "# A small language model", "",
             f"{model.parameters_count():,} parameters: {c.num_hidden_layers} layers of width {c.hidden_size}, "
             f"{c.num_attention_heads} heads, {c.vocab_size:,} ids, a window of {c.max_position_embeddings} tokens.",
             "", "## How to open it", "", "    python sample.py DIR                # DIR: this directory"]
    if not ours:
        lines += ["    AutoModelForCausalLM.from_pretrained(DIR)       # transformers"]
    if model.compression:
        lines += ["", "transformers does not know its layers. In a form for other programs:", "",
                  "    python compress.py DIR dequantize --out DIR2           # dense: transformers opens it",
                  "    python compress.py DIR gguf:q8_0 --out FILE.gguf       # llama.cpp; of int4 layers gguf:q4_0"]
    elif ours:
        lines += ["", f"Only the model.py that wrote it: {c.model_type} of transformers has not all of its switches."]
    lines += ["", "## What made it", ""]
    for entry in model.history:
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}
        lines.append("- " + "; ".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in shown.items()))
    return "\n".join(lines + ["", "## What it is not for", "", NOT_FOR, ""])


def by_name(paths, flag):
    """{name: model directory}: the names of the directories, or the paths if two names are equal.

    Raises UserError, naming `flag`, for a path that is given twice.
    """
    names = [model_name(path) for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{flag} {twice}: it is named twice")
    return dict(zip(names, map(find_model, paths)))


def tokenizer_of(model, directory):
    """The tokenizer in a model's directory. Raises UserError if the model has fewer ids."""
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer in {directory} has {tokenizer.vocab_size} ids, the model only "
                        f"{model.config.vocab_size}: they do not belong together")
    return tokenizer
