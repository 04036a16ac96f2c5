"""Whether tiktoken gives the ids of a tokenizer.json: it encodes several times faster than the `tokenizers` library."""
import re

from data.tokenizer_files import any_of, byte_alphabet, pairs


# How text is cut into words before BPE merges bytes within them. Qwen2's: one digit at a time, newlines end a word.
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's after `Digits(individual_digits=True)` (SmolLM, StarCoder): a digit stands alone and ends what is before it
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# A regex of these parts alone means the same to Oniguruma (tokenizers) and to fancy-regex (tiktoken)
SAME_REGEX = re.compile(r"(?!.*([?*+]|3})[?*+])(\\p\{(L[ultmo]?|N|M|P|S)\}|\\[srnS]|\(\?(i:|!|:)|\{1,3\}"
                        r"|[][()|^?+*' /a-z])+")


def tiktoken_plan(data):
    """(regex, normal form or None) with which tiktoken gives the very ids of a tokenizer.json; None if it may not.

    tiktoken merges any two neighbours that make a known token, lowest id first, and looks whole words up before; the
    `tokenizers` library follows the list of merges. They agree if the list is in the order of ids and every token comes
    out of its own merges. Tokens that do not (Llama 3 has some) must be found by looking words up (ignore_merges), with
    every pair that makes them in the list.
    """
    import tokenizers
    model, normalizer = data["model"], (data.get("normalizer") or {}).get("type")
    steps = data.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds, first, builtin, regex = [s.get("type") for s in steps], steps[0], steps[-1].get("use_regex", True), None
    if kinds == ["ByteLevel"] and builtin:
        regex = GPT2
    elif kinds == ["Digits", "ByteLevel"] and builtin and first["individual_digits"]:
        regex = GPT2_DIGITS
    elif kinds == ["Split", "ByteLevel"] and not builtin and first["behavior"] == "Isolated" and not first["invert"]:
        regex = first["pattern"].get("Regex")
    others = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if (not regex or not SAME_REGEX.fullmatch(regex) or steps[-1].get("add_prefix_space") or "merges" not in model
            or normalizer not in (None, "NFC") or any(model.get(k) for k in others)
            or (data.get("decoder") or {}).get("type") != "ByteLevel"):
        return None

    # of added tokens that overlap or take spaces with them the library knows which one wins
    vocab, added = model["vocab"], {t["content"]: t for t in data.get("added_tokens") or []}
    find, begins = any_of(added), {t[:n] for t in added for n in range(1, len(t))}
    if any(find.search(t, 1) or any(t[i:] in begins for i in range(len(t))) for t in added) or any(
            t.get("lstrip") or t.get("rstrip") or t.get("single_word") or normalizer and t.get("normalized")
            for t in added.values()):
        return None
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated").pre_tokenize_str
    if model.get("ignore_merges") and any(t in vocab and len(words(t)) == 1 for t in added):
        return None  # as plain text it would still be that token

    merges = [tuple(m) for m in pairs(model)]
    made = [vocab.get(a + b, -1) for a, b in merges]
    if (made != sorted(made) or not {vocab.get(t) for t in added}.isdisjoint(made)
            or not set().union(*(vocab.keys() - added.keys())) <= set(byte_alphabet())):
        return None
    merge, listed = tokenizers.models.BPE(vocab, merges).tokenize, set(merges)
    for token in vocab:
        if len(token) > 1 and len(merge(token)) != 1 and token not in added:
            ways = {(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab}
            if not model.get("ignore_merges") or not ways <= listed:
                return None
    return regex, normalizer
