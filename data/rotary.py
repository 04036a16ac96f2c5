"""Rotary positions for windows longer than those of the first training: kinds, fields, frequencies."""
import math

import torch

from data import UserError
from data.values import check_values

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
SCALED = {"default": (), "linear": ("factor",), "dynamic": ("factor",),   # kinds of rotary positions: fields they need
          "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
          "longrope": ("factor", "short_factor", "original_max_position_embeddings"),
          "yarn": ("factor", "original_max_position_embeddings")}
ENDING = ("longrope", "dynamic")            # kinds whose frequencies change beyond the window: ours ends there
# Fields of Config.rope: a type, and for numbers the smallest and the largest value.
ROPE_FIELDS = {"rope_type": (str,), "rope_theta": (float, 1e-3, 1e30), "partial_rotary_factor": (float, 0, 1),
               "local_theta": (float, 1e-3, 1e30), "truncate": (bool,),
               **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), (float, 1e-3, 1e6)),
               **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), (float, 0, 1e6)),
               "original_max_position_embeddings": (int, 2, 2 ** 24), "attention_factor": (float, 0, 1e6),
               **dict.fromkeys(("short_factor", "long_factor"), ([float], 1e-3, 1e6))}


def check_rope(rope, head_dim):
    """Raises UserError for fields of Config.rope that are missing or contradictory."""
    kind, rotary = rope["rope_type"], int(head_dim * rope["partial_rotary_factor"])
    if rotary % 2 or not rotary:
        raise UserError(f"head_dim ({head_dim}) must be even: rotary positions turn pairs of channels")
    check_values(rope, ROPE_FIELDS, f"rope_type {kind!r}", needed=SCALED[kind])
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(f"low_freq_factor ({rope['low_freq_factor']}) must be below high_freq_factor "
                        f"({rope['high_freq_factor']})")
    for name in {"short_factor", "long_factor"} & rope.keys() if kind == "longrope" else ():
        if len(rope[name]) != rotary // 2:
            raise UserError(f"{name} has {len(rope[name])} numbers; {rotary} rotary channels need {rotary // 2}")


def scaled_frequencies(f, rope):
    """(rotary frequencies (R/2,), a factor for cos and sin) for windows longer than the first ones.

    f (R/2,): the frequencies of the first training; rope: Config.rope, of kind linear (Chen et al.,
    2023), llama3 (Dubey et al., 2024), longrope (Ding et al., 2024) or yarn (Peng et al., 2023).
    Dynamic ones (2023) are the first ones up to the window, where ours ends.
    """
    if rope["rope_type"] == "linear":
        return f / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":         # slow rotations are stretched, fast ones stay, those between are blended
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)      # in the window of the first training
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return f * (keep + (1 - keep) / rope["factor"]), 1.0
    if rope["rope_type"] == "longrope":       # the short factors only: our window ends where the long ones begin
        stretch, scale = rope["factor"], rope.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(max(1, stretch)) / math.log(rope["original_max_position_embeddings"]))
        return f / torch.tensor(rope["short_factor"], device="cpu"), scale
    if rope["rope_type"] == "yarn":
        return yarn_frequencies(f, rope)
    return f, 1.0


def yarn_frequencies(f, rope):
    """scaled_frequencies of kind yarn: slow rotations are stretched, fast ones stay, a ramp is between."""
    def pair(turns):                          # the number of the pair that turns so often in the first window
        first = rope["original_max_position_embeddings"]
        return len(f) * math.log(first / (turns * 2 * math.pi)) / math.log(rope["rope_theta"])

    def scale(m):
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    factor, low, high = rope["factor"], pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(f) - 1)
    stretch = ((torch.arange(len(f), device="cpu") - low) / ((high - low) or 0.001)).clamp(0, 1)
    m, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    usual = scale(m) / scale(all_dim) if m and all_dim else scale(1)
    return f * (1 - stretch + stretch / factor), rope.get("attention_factor", usual)
