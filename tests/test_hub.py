"""A directory as the Hub's tools meet it: transformers 4.57 and 5 open it, and whose work it is stays with it."""
import json

import pytest
import torch

import compress
from data.tokenizer import Tokenizer
from model import Config, Transformer, load, save

CARD = """---
license: other
license_name: example-community
license_link: https://example.org/license
language:
- en
- de
base_model: example/Base-135M
tags: [chat]
---
# A model
"""


@pytest.fixture
def directory(tmp_path):
    model = Transformer(Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                               num_key_value_heads=1, head_dim=16, max_position_embeddings=64)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    save(model, tmp_path / "m", Tokenizer.from_bytes())
    return tmp_path / "m"


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_generate_takes_what_the_tokenizer_gives(directory, recwarn):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer("import os", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    import sample
    ours = [int(i) for i in sample.generate(load(directory), inputs.input_ids, 5, temperature=0)]
    assert ids[0, inputs.input_ids.shape[1]:].tolist() == ours
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.8, 0.95)


@pytest.mark.parametrize("specials", [True, False])
def test_the_template_marks_what_the_assistant_says(specials, directory):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(directory)
    if not specials:                                                         # the template for tokenizers without chat tokens
        from data.template import PLAIN
        ours.chat_template = PLAIN
        ours.save(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"},
            {"role": "user", "content": "e"}, {"role": "assistant", "content": "fg"}]
    marked = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, mask in zip(marked["input_ids"], marked["assistant_masks"]) if mask]
    end, space = ("<|im_end|>", "") if specials else ("<|endoftext|>", " ")
    assert tokenizer.decode(learned) == f"{space}bcd{end}{space}fg{end}"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == ours.render(chat, add_generation_prompt=False)


def test_licence_and_sampling_stay_with_all_that_is_made_of_a_model(directory, tmp_path):
    (directory / "README.md").write_text(CARD, encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.2, "do_sample": True, "top_k": 7, "eos_token_id": 256,
                                                                  "transformers_version": "4.40"}), encoding="utf-8")
    made = directory
    for i, step in enumerate(("ffn:0.5:magnitude", "int8", "dequantize")):
        compress.main([str(made), step, "--out", str(tmp_path / str(i))])
        made = tmp_path / str(i)
        front = (made / "README.md").read_text(encoding="utf-8").split("---\n")[1].splitlines()
        assert CARD.splitlines()[1:8] == front[:7] and "tags: [chat]" not in front
        settings = read(made / "generation_config.json")
        assert (settings["temperature"], settings["top_k"], "top_p" in settings) == (0.2, 7, False)
        card = (made / "README.md").read_text(encoding="utf-8")
        assert "python sample.py DIR" in card
        assert ("transformers does not know its layers" in card and "gguf:q8_0" in card) == (step == "int8")
        assert ("library_name: transformers" in card) == (step != "int8")
        assert not {"card", "sampling"} & read(made / "config.json").keys()
