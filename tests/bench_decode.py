"""Generation beside transformers and llama.cpp: the same weights, the same threads, in turns, in one process.

    python tests/bench_decode.py DIR                        # a model directory, or a training run's
    python tests/bench_decode.py DIR --threads 1 --rounds 9

DIR is measured as it is (float32), as int8 and as int4, which are made in a temporary directory; without the C kernels
("Python"); in transformers (float32), if that is installed; and in llama.cpp (F32, Q8_0, Q4_0: our integers and scales,
unchanged), if llama-cpp-python is. Each turn is one prompt of --prompt tokens and --new tokens after it. llama.cpp is
given the new tokens and need not choose them. Printed are medians of the rounds, ratios are medians of each round's
ratio, and the share of the memory bandwidth: bytes of weights that a token reads, times tokens/s, over what reading an
array of 512 MB reached in the same rounds (a model that fits the cache may exceed it).
"""
import argparse, contextlib, functools, statistics, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import compress
import sample
from data import UserError, native
from data.checkpoints import find_model
from data.hub import config_from_hub, read_config
from data.speed import one_turn
from model import Config, load


def ours(model, ids, new):
    """(seconds to the first new token, median seconds of a later one) of sample.generate."""
    turn = one_turn(functools.partial(sample.generate, model), ids, new, time.perf_counter)
    return turn[0], statistics.median(turn[1])


@torch.inference_mode()
def theirs(model, ids, new):
    """The same of transformers, whose cache grows by itself."""
    start, times = time.perf_counter(), []
    out = model(ids, use_cache=True, logits_to_keep=1)
    token, first = out.logits[:, -1:].argmax(-1), time.perf_counter() - start
    for _ in range(new):
        start = time.perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - start)
    return first, statistics.median(times)


def llama_cpp(model, ids, new):
    """The same of llama.cpp."""
    tokens, times = ids[0].tolist(), []
    model.reset()
    start = time.perf_counter()
    model.eval(tokens)
    first = time.perf_counter() - start
    for i in range(new):
        start = time.perf_counter()
        model.eval(tokens[i % len(tokens):][:1])
        times.append(time.perf_counter() - start)
    return first, statistics.median(times)


def read_bandwidth(array):
    start = time.perf_counter()
    array.sum()
    return array.nbytes / (time.perf_counter() - start)


def weight_bytes(model):
    """Bytes of the weights that every token reads: all but an embedding that is not the head too."""
    tied = model.config.tie_word_embeddings
    table = sum(t.nbytes for t in (*model.model.embed_tokens.parameters(), *model.model.embed_tokens.buffers()))
    return model.resident_bytes() - (0 if tied else table)


def contenders(directory, work, threads, context):
    """{name: (function of (ids, new), bytes that a token reads)}."""
    plain, found = load(directory, dtype=torch.float32), {}
    models = {"float32": native.attach(load(directory, dtype=torch.float32))}
    for kind in ("int8", "int4"):
        compress.main([str(directory), kind, "--out", str(work / kind)])
        models[kind] = native.attach(load(work / kind, dtype=torch.float32))
    found["float32, Python"] = functools.partial(ours, plain), weight_bytes(plain)
    found |= {name: (functools.partial(ours, m), weight_bytes(m)) for name, m in models.items()}
    with contextlib.suppress(ImportError):
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(find_model(directory), dtype=torch.float32).eval()
        found["transformers float32"] = functools.partial(theirs, model), weight_bytes(models["float32"])
    try:
        from llama_cpp import Llama
        for source, kind, name in ((directory, "f32", "float32"), (work / "int8", "q8_0", "int8"),
                                   (work / "int4", "q4_0", "int4")):
            compress.main([str(source), f"gguf:{kind}", "--out", str(work / f"{kind}.gguf")])
            model = Llama(str(work / f"{kind}.gguf"), n_ctx=context, n_batch=context, n_threads=threads,
                          n_threads_batch=threads, verbose=False)
            found[f"llama.cpp {kind.upper()}"] = functools.partial(llama_cpp, model), weight_bytes(models[name])
    except (ImportError, UserError) as error:
        print(f"llama.cpp is left out: {error}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a training run's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default: 256, or what the window leaves)")
    parser.add_argument("--new", type=int, default=64, help="tokens (default: 64, or a quarter of the window)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        config = Config(**config_from_hub(read_config(find_model(args.model)), Config))
        new = min(args.new, config.max_position_embeddings // 4)
        prompt = min(args.prompt, config.max_position_embeddings - new - 1)
        all_of_them = contenders(args.model, Path(work), args.threads, prompt + new + 1)
        ids = torch.randint(min(1000, config.vocab_size), (1, prompt), generator=torch.Generator().manual_seed(0))
        seconds, bandwidth, array = {name: [] for name in all_of_them}, [], torch.ones(2 ** 27)
        for i in range(args.rounds + 1):                                     # the first warms up
            bandwidth.append(read_bandwidth(array))
            for name, (turn, _) in all_of_them.items():
                seconds[name].append(turn(ids, new))
    peak = statistics.median(bandwidth[1:])
    print(f"\n{args.threads} thread(s), prompt {prompt}, {new} new tokens, {args.rounds} rounds; reading "
          f"{peak / 1e9:.1f} GB/s; {'C' if native.library()[0] else native.library()[1]}\n\n| | prefill, tokens/s | decode, tokens/s | of "
          "the bandwidth | decode, x transformers | x llama.cpp of that kind | prefill, x llama.cpp |\n"
          "|---|---:|---:|---:|---:|---:|---:|")
    rivals = {"float32": "llama.cpp F32", "int8": "llama.cpp Q8_0", "int4": "llama.cpp Q4_0"}
    for name, (_, n_bytes) in all_of_them.items():
        first, later = (statistics.median(column) for column in zip(*seconds[name][1:]))

        def ratio(other, column, name=name):
            if other not in seconds or other == name:
                return ""
            return f"{statistics.median(b[column] / a[column] for a, b in zip(seconds[name][1:], seconds[other][1:])):.2f}"

        rival = rivals.get(name)
        print(f"| {name} | {prompt / first:,.0f} | {1 / later:,.1f} | {n_bytes / later / peak:.0%} | "
              f"{ratio('transformers float32', 1)} | {ratio(rival, 1)} | {ratio(rival, 0)} |")


if __name__ == "__main__":
    main()
