"""Reads the tokenizer files of a model directory and checks every value: strangers wrote them."""
import functools, json, re
from pathlib import Path

from data import UserError
from data.adapters import base_of
from data.vocabulary import tokenizer_json

MOST_IDS = 1 << 24  # a larger id in a file is a mistake: the list of all tokens would fill the memory
ID_RANGE = f"it must be from 0 to {MOST_IDS - 1:,}"
NAMED_TOKENS = ("eos_token", "bos_token", "unk_token", "pad_token")


def must(condition, message):
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def is_id(value):
    """Whether a value from a file can be a token id."""
    return type(value) is int and 0 <= value < MOST_IDS


def read_text(path):
    """A file's text. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from None


def read_object(path):
    """A file's JSON object as a dict; {} if there is no file. Raises UserError."""
    def refuse_constant(name):
        raise ValueError(f"{name} is not a number")

    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None
    must(isinstance(content, dict), f"{path} must hold a JSON object")
    return content


def read_tokenizer(directory):
    """(tokenizer.json, tokenizer_config.json, ids of further end tokens) of a model directory.

    GPT-2's vocab.json and merges.txt stand in for tokenizer.json. Raises UserError if there is
    neither, or a file cannot be read; check_tokenizer and check_tokenizer_config check the values.
    """
    base = base_of(directory)                         # the directory itself, unless this is an adapter
    directory = Path(directory) if (Path(directory) / "tokenizer.json").is_file() else base
    data, config = read_object(directory / "tokenizer.json"), read_object(directory / "tokenizer_config.json")
    names = read_object(directory / "special_tokens_map.json")
    check_tokenizer_config(names, directory / "special_tokens_map.json")
    for key in NAMED_TOKENS:
        if config.get(key) is None and names.get(key) is not None:
            config[key] = names[key]
    ends = [i for name in ("generation_config.json", "config.json")
            for i in end_ids(read_object(base / name), base / name)]
    if (directory / "chat_template.jinja").is_file():
        config["chat_template"] = read_text(directory / "chat_template.jinja")
    if not (directory / "tokenizer.json").is_file():
        data = read_gpt2(directory)
    return data, config, ends


def read_gpt2(directory):
    """GPT-2's vocab.json and merges.txt as the content of a tokenizer.json. Raises UserError."""
    vocab = read_object(directory / "vocab.json")
    if not vocab or not (directory / "merges.txt").is_file():
        raise UserError(f"{directory} holds no tokenizer.json, nor vocab.json with merges.txt"
                        " (a tokenizer.model alone, SentencePiece, is not supported)")
    lines = read_text(directory / "merges.txt").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return tokenizer_json(vocab, merges, {t: vocab[t] for t in ["<|endoftext|>"] if t in vocab})


def check_tokenizer(data):
    """Raises UserError if a used part of tokenizer.json has the wrong type, size or number."""
    model = data.get("model") if isinstance(data, dict) else None
    must(isinstance(model, dict), "tokenizer.json has no model (an object with a vocabulary)")
    for name, inner in ("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders"), (
            "post_processor", "processors"):
        part = data.get(name)
        must(part is None or isinstance(part, dict) and all_objects(part.get(inner, [])),
             f"tokenizer.json: {name} must be an object, and its {inner} a list of objects")
    tokens = check_vocabulary(model.get("vocab"))
    merges = model.get("merges")
    must(merges is None or isinstance(merges, list) and all(map(is_merge, merges)),
         "tokenizer.json: merges must be a list of pairs of tokens")
    check_added_tokens(data.get("added_tokens"), tokens)


def all_objects(value):
    """Whether a value is a list of dicts."""
    return isinstance(value, list) and all(isinstance(v, dict) for v in value)


def is_merge(value):
    """Whether a value is [left, right], or "left right" as in older files."""
    if isinstance(value, list):
        return len(value) == 2 and all(isinstance(t, str) and t for t in value)
    return isinstance(value, str) and re.fullmatch(r"[^ ]+ [^ ]+", value) is not None


def check_vocabulary(vocab):
    """{id: token} of a vocabulary: {token: id}, or Unigram's list of [token, log probability].

    Raises UserError.
    """
    if isinstance(vocab, list):
        must(all(isinstance(v, list) and len(v) == 2 and isinstance(v[0], str) and type(v[1]) in (int, float)
                 and abs(v[1]) < 1e30 for v in vocab), "tokenizer.json: vocab must hold pairs of a text and a number")
        must(len({token for token, _ in vocab}) == len(vocab), "tokenizer.json: a token stands twice in vocab")
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    must(isinstance(vocab, dict), "tokenizer.json: vocab must be an object of tokens and ids")
    for token, i in vocab.items():
        must(is_id(i), f"tokenizer.json: the id of {token!r} is {i!r:.40}; {ID_RANGE}")
    tokens = {i: token for token, i in vocab.items()}
    must(len(tokens) == len(vocab), "tokenizer.json: two tokens of vocab have the same id")
    return tokens


def check_added_tokens(added, tokens):
    """Raises UserError for added tokens of wrong types, or that clash with {id: token}."""
    must(added is None or all_objects(added), "tokenizer.json: added_tokens must be a list of objects")
    names = set()
    for t in added or []:
        name, i = t.get("content"), t.get("id")
        must(isinstance(name, str) and name, f"tokenizer.json: an added token's content is {name!r:.40}, not a text")
        must(is_id(i), f"tokenizer.json: the id of the added token {name!r:.80} is {i!r:.40}; {ID_RANGE}")
        must(name not in names and tokens.setdefault(i, name) == name,
             f"tokenizer.json: the added token {name!r:.80} or its id {i} stands there twice")
        flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
        must(all(isinstance(t.get(flag, False), bool) for flag in flags),
             f"tokenizer.json: a flag of the added token {name!r:.80} is neither true nor false")
        names.add(name)


def check_tokenizer_config(config, file="tokenizer_config.json"):
    """Raises UserError if a part of tokenizer_config.json that is used has the wrong type."""
    must(isinstance(config, dict), f"{file} must hold an object")
    for key, value in config.items():
        written = json.dumps(value, ensure_ascii=False)
        whole = written.isascii() or not re.search("[\ud800-\udfff]", written)
        must(whole, f"{file}: {key} holds half a surrogate pair")
    for key in NAMED_TOKENS:
        name = config.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        must(name is None or isinstance(name, str), f"{file}: {key} must be a text, not {name!r:.40}")
    chat, longest = config.get("chat_template"), config.get("model_max_length")
    must(chat is None or isinstance(chat, str) or all_objects(chat) and all(
        isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in chat),
        f"{file}: chat_template must be a text, or a list of objects with name and template")
    must(longest is None or type(longest) in (int, float), f"{file}: model_max_length must be a number")


def end_ids(config, file):
    """eos_token_id of generation_config.json or config.json, as a list. Raises UserError."""
    ids = config.get("eos_token_id", [])
    if ids is None:
        ids = []
    ids = ids if isinstance(ids, list) else [ids]
    must(all(map(is_id, ids)), f"{file}: eos_token_id must be an id or a list of ids, not {ids!r:.60}")
    return ids


def is_panic(error):
    """Whether an exception is a panic of a Rust library, whose class cannot be imported."""
    return type(error).__name__ == "PanicException"


def library_errors(function):
    """Decorator: turns panics and errors of the Rust libraries into UserError.

    The libraries raise no class narrower than Exception.
    """
    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except BaseException as e:
            if type(e) is Exception or is_panic(e):
                reason = " ".join(str(e).split())[:200]
                raise UserError(f"the tokenizer's library gave up ({reason}): the regex or the vocabulary in "
                                "tokenizer.json is broken, take the model's own file anew") from None
            raise
    return guarded
