"""The README's use of an attention, as it stands there, on a tiny model."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from icl_book.store import ROOT


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_an_attention_trains_with_the_librarys_trainer_and_comes_back(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 40}
    config = LlamaConfig(**sizes, max_position_embeddings=32)
    AutoModelForCausalLM.from_config(config).save_pretrained("MODEL")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = [block for block in blocks if "Trainer" in block]
    ids = torch.arange(12) % 40
    names = {"data": [{"input_ids": ids, "labels": ids}] * 8}
    exec(block, names)
    model, again = names["model"].eval(), names["again"].eval()
    with torch.no_grad():
        want, got = (m(ids[None]).logits for m in (model, again))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        plain = AutoModelForCausalLM.from_pretrained("mine")
        with pytest.raises(ValueError, match="restore_attention"):
            plain(ids[None])
