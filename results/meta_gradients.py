"""Relaxed updates on real heads, and ΔW_ICL against ΔW_FT (icl.meta_gradients).

A row is one measure of one task and one draw of demonstrations: its mean over
layers, heads and queries. ``weights`` says which update of ΔW_ICL is compared
("same" demonstrations as the finetuning's, or a control) with which of ΔW_FT.
Runs (task, seed) that the table already has are not computed again.
"""

import argparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from icl.duality import frobenius_cosine, subspace_overlap
from icl.finetuning import kv_sgd
from icl.heads import attention_inputs
from icl.meta_gradients import encode_prompt, ft_update, icl_update, relaxation
from icl.models import DEFAULT, load_model
from icl.results import provenance, read_table, table_path, write_table
from icl.tasks import PAPER_TASKS, load_task

TABLE = "meta_gradients"
K, LEARNING_RATE, RANK = 16, 1e-3, 4  # demonstrations, of finetuning, of subspaces
READ, COMPARED = 16, 4  # queries for the relaxation, for the weights


def main(model_name, tasks, seeds):
    model, tokenizer = load_model(model_name)
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    untrained.to(model.device).eval().requires_grad_(False)
    rows, about = [], {}
    if table_path(TABLE).exists():
        table, about = read_table(TABLE)
        rows = table.to_dict("records")
    for name in tasks:
        task = load_task(name)
        for seed in seeds:
            fixed = {"model": model_name, "task": name, "seed": seed}
            if any({f: r[f] for f in fixed} == fixed for r in rows):
                continue
            found = [
                *relaxations(model, tokenizer, task, seed, "trained"),
                *relaxations(untrained, tokenizer, task, seed, "untrained"),
                *weights(model, tokenizer, task, seed),
            ]
            rows += [fixed | row for row in found]
            about[f"{model_name}/{name}/{seed}"] = provenance(
                model=model_name,
                seeds=[seed],
                data_sha256=task.digest(),
                data_source=task.source,
                demonstrations=K,
                learning_rate=LEARNING_RATE,
                rank=RANK,
                queries=[READ, COMPARED],
            )
            write_table(TABLE, rows, about)
            print(*fixed.values(), len(found), "rows", flush=True)


def encode_queries(tokenizer, task, n):
    texts = [task.query(example) for example in task.evaluation[:n]]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def relaxations(model, tokenizer, task, seed, which):
    prompt = encode_prompt(
        task, task.sample(K, seed), tokenizer, model.config.max_position_embeddings
    )
    queries = encode_queries(tokenizer, task, READ)
    found = relaxation(model, prompt, queries, [len(prompt)])
    ratio = found.pop("norm: relaxed") / found.pop("norm: change")
    yield row("ratio of norms", which, "", np.median(ratio))
    for name, values in found.items():
        yield row(name, which, "", values.mean())


def weights(model, tokenizer, task, seed):
    """Compare ΔW_FT with ΔW_ICL of its own demonstrations and of controls."""
    context = model.config.max_position_embeddings
    demonstrations, classes = task.sample(K, seed), len(task.label_words)
    wrong = [dict(e, label=(e["label"] + 1) % classes) for e in demonstrations]
    prompt = encode_prompt(task, demonstrations, tokenizer, context)
    order = np.random.default_rng(seed).permutation(prompt[1:]).tolist()
    other = task.sample(K, seed + 100)
    prompts = {
        "same": prompt,
        "wrong labels": encode_prompt(task, wrong, tokenizer, context),
        "shuffled tokens": prompt[:1] + order,
        "other demonstrations": encode_prompt(task, other, tokenizer, context),
    }
    read = {name: attention_inputs(model, ids) for name, ids in prompts.items()}
    icl = {
        (name, form): icl_update(layers, centred=form == "centred")
        for name, layers in read.items()
        for form in ("raw", "centred")
    }
    texts = [task.demonstration(e) for e in demonstrations]
    update, _ = kv_sgd(model, tokenizer, texts, LEARNING_RATE)
    g = torch.Generator().manual_seed(seed)
    noise = {
        name: torch.randn(w.shape, generator=g).to(w) * w.norm() / w.numel() ** 0.5
        for name, w in update.items()
    }
    found = {}
    for ids in encode_queries(tokenizer, task, COMPARED):
        for learnt, change in (("demonstrations", update), ("noise", noise)):
            parts = ft_update(model, change, prompt[:1] + ids, len(prompt) - 1)
            ft = sum(parts)
            share = torch.linalg.matrix_norm(parts.by_value)
            share = share / torch.linalg.matrix_norm(ft)
            found.setdefault(("share by value", learnt, ""), []).append(share)
            for (name, form), W in icl.items():
                left, right = subspace_overlap(W, ft, RANK)
                measures = {
                    "cosine": frobenius_cosine(W, ft),
                    "left overlap": left,
                    "right overlap": right,
                }
                for measure, value in measures.items():
                    key = (f"{measure} {form}", learnt, name)
                    found.setdefault(key, []).append(value)
    for key, values in found.items():
        yield row(*key, torch.stack(values).mean().item())
    for form in ("raw", "centred"):
        for name in prompts:
            if name != "same":
                alike = frobenius_cosine(icl["same", form], icl[name, form])
                yield row(f"ICL with ICL {form}", "", name, alike.mean().item())


def row(measure, which, weights, value):
    value = float(f"{value:.6g}")
    return {"measure": measure, "of": which, "weights": weights, "value": value}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--tasks", nargs="+", default=list(PAPER_TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(1, 6)))
    options = parser.parse_args()
    main(options.model, options.tasks, options.seeds)
