"""Programs of others open a trained best/ and do what they are for; each is skipped where its package is missing."""
import json

import pytest
import torch

import sample
from data.checkpoints import find_model
from data.loader import stream_batches
from data.tokenizer import Tokenizer
from model import load

from test_train import data, whole_run  # noqa: F401 - fixtures

transformers = pytest.importorskip("transformers")
PROMPTS = ["w3 = f(3)\n", "w1"]


@pytest.fixture
def best(whole_run):
    return str(find_model(whole_run))


def greedy(best, prompt, count):
    """The text of the prompt and of the next `count` tokens, by our own code."""
    model, tokenizer = load(best).eval(), Tokenizer.load(best)
    ids = torch.tensor([tokenizer.encode(prompt)])
    new = sample.generate(model, ids, count, tokenizer.eos_ids, tokenizer.vocab_size, temperature=0)
    return prompt + tokenizer.decode([int(i) for i in new])


def test_the_pipeline_of_transformers_writes_what_sample_py_writes(best):
    pipeline = transformers.pipeline("text-generation", model=best, device="cpu")
    for prompt in PROMPTS:
        written = pipeline(prompt, max_new_tokens=10, do_sample=False)[0]["generated_text"]
        assert written == greedy(best, prompt, 10) and len(written) > len(prompt)


def test_two_prompts_padded_on_the_left_are_each_alone(best):
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(best), transformers.AutoTokenizer.from_pretrained(best)
    tokenizer.padding_side = "left"
    both = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert both.attention_mask[1, 0] == 0
    texts = tokenizer.batch_decode(model.generate(**both, max_new_tokens=10, do_sample=False), skip_special_tokens=True)
    assert texts == [greedy(best, prompt, 10) for prompt in PROMPTS]


def rows(best):
    ids = torch.tensor(Tokenizer.load(best).encode("w3 = f(3)\nw4 = f(4)\n" * 10)[:128]).view(4, 32)
    return [{"input_ids": row, "labels": row} for row in ids]


def test_the_trainer_of_transformers_trains_it_and_the_result_opens_here(best, tmp_path):
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(best)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = transformers.TrainingArguments(output_dir=str(tmp_path / "trainer"), max_steps=2, per_device_train_batch_size=2,
                                              learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows(best))
    assert trainer.train().global_step == 2
    assert all((p - before[name]).abs().max() > 0 for name, p in model.named_parameters() if p.ndim > 1)
    trainer.save_model(str(tmp_path / "saved"))
    ids = rows(best)[0]["input_ids"][None]
    assert (load(tmp_path / "saved")(ids) - model.eval()(ids).logits).abs().max() < 1e-4


def test_peft_adds_an_adapter_and_the_merged_model_opens_here(best, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(best)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    batch = {key: torch.stack([row[key] for row in rows(best)]) for key in ("input_ids", "labels")}
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(3):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0] - 1e-3
    logits = model.eval()(batch["input_ids"]).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (load(tmp_path / "merged")(batch["input_ids"]) - logits).abs().max() < 1e-4


@pytest.mark.slow                                               # importing it takes half a minute
def test_the_evaluation_harness_counts_the_same_bits_per_byte(best, tmp_path, monkeypatch):
    """The harness puts the end token before a text and reads disjoint windows, as here where they are full."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load(best).eval(), Tokenizer.load(best)
    ids = tokenizer.encode("w3 = f(3)\nw44 = f(2)\nw5 = f(5) # é\n" * 8)[:3 * 32]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    task = {"task": "own_text", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
            "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}]}
    result = lm_eval.simple_evaluate(model="hf", model_args={"pretrained": best, "dtype": "float32"}, tasks=[task], device="cpu",
                                     batch_size=1, bootstrap_iters=0)["results"]["own_text"]["bits_per_byte,none"]
    ours = sample.score(model, stream_batches([tokenizer.eos_id, *ids], 32), tokenizer.token_bytes())
    assert result == pytest.approx(sample.figures(*ours)["bits_per_byte"], abs=1e-3)
