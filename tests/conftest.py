"""Fixtures: tiny random models of the covered families, and text to score."""

import pytest
import torch
import transformers
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

install_import_hook("icl", "beartype.beartype")  # annotations hold at every call

WORDS = (
    "<s> </s> [UNK] the a film was good bad dull bright story and but not very "
    "plot actors boring moving Review : Sentiment Positive Negative Neither True "
    "Type subjective objective so is of . ,"
).split()

SMALL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
)
SHARED = SMALL | dict(num_key_value_heads=2)  # keys and values, by two heads each

TINY = {
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "opt": dict(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
    ),
    "xglm": dict(
        d_model=32,
        ffn_dim=64,
        num_layers=3,
        attention_heads=4,
        max_position_embeddings=256,
    ),
    "gpt_neox": SMALL,
    "llama": SHARED,
    "gemma3_text": SHARED
    | dict(head_dim=8, sliding_window=256, sliding_window_pattern=2),
    "qwen3": SHARED | dict(head_dim=8),
}


def word_tokenizer():
    """A tokenizer in which "Unclearly" has three tokens and most words one."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "Un", "clear", "ly"])}
    model = models.WordPiece(
        vocabulary, unk_token="[UNK]", continuing_subword_prefix=""
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="[UNK]",
    )


def marking_tokenizer():
    """Marks the start of a text, as that of Llama 2 does, and splits words."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=["\n"],
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS[3:])] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def tiny_model(family, **changes):
    """A random model of a family, large enough weights to tell tokens apart."""
    torch.manual_seed(0)
    options = TINY.get(family, {}) | dict(
        vocab_size=len(WORDS) + 3, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    config = transformers.AutoConfig.for_model(family, **(options | changes))
    return _spread(transformers.AutoModelForCausalLM.from_config(config).eval())


def tiny_encoder(family, labels=2):
    """A random encoder, bert or roberta, with a head; without dropout."""
    torch.manual_seed(0)
    options = dict(SMALL, vocab_size=len(WORDS) + 3, pad_token_id=1, num_labels=labels)
    options |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.AutoConfig.for_model(family, **options)
    kind = transformers.AutoModelForSequenceClassification
    return _spread(kind.from_config(config).eval())


def _spread(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def assert_same_token_by_token(model, ids, whole, pad=5):
    """Logits of the whole pass come out of decoding, and behind padding."""
    cache, steps = None, []
    for first, last in [(0, 4), *((n, n + 1) for n in range(4, ids.shape[1]))]:
        out = model(ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    padded, mask = padded_left(ids, pad)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    options = {} if model.config.model_type == "opt" else {"position_ids": position}
    behind = model(padded, attention_mask=mask, **options).logits[:, pad:]
    torch.testing.assert_close(behind, whole, rtol=1e-4, atol=1e-4)


def padded_left(ids, pad):
    """``ids`` behind so many tokens of padding, and their mask."""
    padded = torch.cat([torch.ones(len(ids), pad, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :pad] = 0
    return padded, mask


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="session", params=list(TINY))
def model(request):
    return tiny_model(request.param)
