"""
A proof that tiktoken gives the ids of a tokenizer.json.

tiktoken encodes several times faster than the `tokenizers` library. tiktoken merges any two
neighbours that form a token, lowest id first, and looks whole words up before it merges. The
`tokenizers` library follows the list of merges. Each function below proves one part of the claim
that both give the same ids; False means "not proven", and the library encodes.
"""
import re

from data.vocabulary import any_of, byte_alphabet, pairs

# The regex that cuts text into words; BPE merges bytes within words only.
# Qwen2's: one digit at a time, newlines end a word.
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's after `Digits(individual_digits=True)` (SmolLM, StarCoder): each digit is a word
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# A regex of only these parts means the same to Oniguruma (tokenizers) and to fancy-regex (tiktoken)
SAME_REGEX = re.compile(r"(?!.*([?*+]|3})[?*+])(\\p\{(L[ultmo]?|N|M|P|S)\}|\\[srnS]|\(\?(i:|!|:)|\{1,3\}"
                        r"|[][()|^?+*' /a-z])+")


def tiktoken_plan(data):
    """(regex, normal form or None) for tiktoken to give the ids of a tokenizer.json, or None."""
    model, normalizer, regex = data["model"], (data.get("normalizer") or {}).get("type"), split_regex(data)
    added = {t["content"]: t for t in data.get("added_tokens") or []}
    if (regex and SAME_REGEX.fullmatch(regex) and normalizer in (None, "NFC") and is_byte_level(data)
            and added_tokens_are_cut_alike(added, normalizer) and added_tokens_stay_text(model, added, regex)
            and merges_are_in_order_of_ids(model, added) and tokens_are_reached_alike(model, added)):
        return regex, normalizer
    return None


def split_regex(data):
    """The regex by which the pre-tokenizer cuts words; None for a pre-tokenizer of another form."""
    steps = data.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds, first, last = [s.get("type") for s in steps], steps[0], steps[-1]
    builtin = last.get("use_regex", True)  # ByteLevel cuts by GPT-2's regex
    if last.get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and builtin:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and builtin and first["individual_digits"]:
        return GPT2_DIGITS
    if kinds == ["Split", "ByteLevel"] and not builtin and first["behavior"] == "Isolated" and not first["invert"]:
        return first["pattern"].get("Regex")
    return None


def is_byte_level(data):
    """Whether the model is byte-level BPE, without the options that tiktoken lacks."""
    options = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return ("merges" in data["model"] and not any(data["model"].get(option) for option in options)
            and (data.get("decoder") or {}).get("type") == "ByteLevel")


def added_tokens_are_cut_alike(added, normalizer):
    """Whether added tokens ({text: entry}) neither overlap nor take spaces or whole words.

    Where two overlap, or one takes a space, only the library knows which one wins.
    """
    find, beginnings = any_of(added), {t[:n] for t in added for n in range(1, len(t))}
    overlap = any(find.search(t, 1) or any(t[i:] in beginnings for i in range(len(t))) for t in added)
    return not overlap and not any(t.get("lstrip") or t.get("rstrip") or t.get("single_word")
                                   or normalizer and t.get("normalized") for t in added.values())


def added_tokens_stay_text(model, added, regex):
    """Whether an added token, written as plain text, is never looked up as a whole word."""
    import tokenizers
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated").pre_tokenize_str
    return not model.get("ignore_merges") or not any(t in model["vocab"] and len(words(t)) == 1 for t in added)


def merges_are_in_order_of_ids(model, added):
    """Whether merges make ascending ids and no added token, and other tokens consist of bytes."""
    vocab = model["vocab"]
    results = [vocab.get(left + right, -1) for left, right in pairs(model)]
    characters = set().union(*(vocab.keys() - added.keys()))
    return (results == sorted(results) and {vocab.get(t) for t in added}.isdisjoint(results)
            and characters <= set(byte_alphabet()))


def tokens_are_reached_alike(model, added):
    """Whether the merges make every token, or both engines look it up as a whole word.

    A token that the merges do not make (Llama 3 has some) needs ignore_merges, and every pair of
    tokens that forms it must be a merge.
    """
    import tokenizers
    vocab, merges = model["vocab"], [tuple(pair) for pair in pairs(model)]
    merge, listed = tokenizers.models.BPE(vocab, merges).tokenize, set(merges)
    for token in vocab.keys() - added.keys():
        if len(token) > 1 and len(merge(token)) != 1:
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            ways = {(left, right) for left, right in splits if left in vocab and right in vocab}
            if not model.get("ignore_merges") or not ways <= listed:
                return False
    return True
