"""How well do models predict text of other kinds? Perplexity and bits per byte, domain by domain.

    python eval_lm.py out/11m out/11m-vanilla --data=DIR    # a domain is a file, or a folder of .txt files
    python eval_lm.py out/11m --data=DIR --step=all         # every checkpoint, for the phase figure
    python eval_lm.py out/11m --data=hf:allenai/paloma      # a domain is a configuration; log in first

A document is read after an end-of-text, so that its first token is scored too; the end-of-text after it is
not, as in the validation loss of training. Perplexity is exp(nats / tokens), bits per byte is nats / ln 2 /
bytes, over all of a domain: long documents weigh more. Models of different vocabularies compare in bits per
byte only. A document longer than the context is read in overlapping windows, each scored from where the one
before it ended (Press et al. 2021, appendix B, arxiv.org/abs/2012.15832). Intervals are 95% bootstrap
intervals over documents; the seed of training varies more than they show.
"""
import json
from dataclasses import dataclass

from plumbing import settings  # before torch: Ctrl-C prints no traceback from here on
from plumbing.files import fail, write_atomic
from plumbing.settings import Whole

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from plumbing import figures
from plumbing.checkpoint import checkpoints, load_model, load_models
from plumbing.corpus import datasets_library, hub_rows, read_columns, read_files, text_files
from plumbing.machine import choose_device

@dataclass
class Config:
    data: str = ""  # a folder or file of text; or a Hugging Face dataset, hf:NAME or hf:NAME,CONFIG
    split: str = ""  # of a Hugging Face dataset; empty takes validation, val or test, the first it has
    column: str = "text"  # that holds the text
    context: Whole = 0  # most tokens that a prediction sees; 0 takes the first model's block_size
    stride: Whole = 0  # tokens from one window to the next; 0 takes half the context
    step: str = "newest"  # checkpoint: newest, a number, or all
    out: str = ""  # folder of the results of all; empty puts each model's into its own, for spectra.py too

RULES = [(lambda c: c.data, "data must name a folder, a file, or a Hugging Face dataset as hf:NAME"),
         (lambda c: c.step in ("newest", "all") or c.step.isdecimal(), "step takes newest, all, or a number")]
DRAWS = 2000  # of the bootstrap
BATCH = 8192  # tokens in a batch of windows

def windows(n, context, stride):
    """Cut a document of n tokens, which follow an end-of-text, token 0, into windows (start, end, scored).

    A window reads tokens start to end - 1 to predict start + 1 to end, of which the last `scored` count.
    """
    ends = [*range(min(context, n), n, stride), n] if n else []
    return [(max(0, end - context), end, end - before)
            for before, end in zip([0, *ends], ends, strict=False)]

@torch.no_grad()
def score(model, eot, documents, context, stride, title):
    """The nats (D,) of D documents, lists of ids. Windows of about equal length are read together."""
    device, nats, rows = model.norm.weight.device, np.zeros(len(documents)), max(1, BATCH // context)
    cut = [(d, *window) for d, ids in enumerate(documents) for window in windows(len(ids), context, stride)]
    cut.sort(key=lambda window: window[2] - window[1])
    documents = [[eot, *ids] for ids in documents]
    for first in tqdm(range(0, len(cut), rows), title, unit=" batches", leave=False, disable=None):
        batch = cut[first : first + rows]
        ids = [torch.tensor(documents[d][start : end + 1]) for d, start, end, _ in batch]
        idx = pad_sequence([row[:-1] for row in ids], batch_first=True)  # causal attention ignores padding
        scored = pad_sequence([torch.arange(len(row) - 1) >= len(row) - 1 - window[3]
                               for row, window in zip(ids, batch, strict=True)], batch_first=True)  # (B, T)
        targets = pad_sequence([row[1:] for row in ids], batch_first=True)[scored].to(device)  # (S,)
        x = model.features(idx.to(device))[scored.to(device)]  # (S, C)
        losses = F.cross_entropy(model.unembedding(x).float(), targets, reduction="none")
        of_document = np.repeat([d for d, *_ in batch], scored.sum(1))  # (S,)
        np.add.at(nats, of_document, losses.cpu().double().numpy())
    return nats

def rates(totals):
    """nats, tokens, bytes (..., 3) -> perplexity and bits per byte (..., 2)."""
    nats, tokens, size = np.moveaxis(totals, -1, 0)
    return np.stack([np.exp(nats / tokens), nats / np.log(2) / size], axis=-1)

def bootstrap(totals):
    """Rates (DRAWS, 2) of D documents drawn with replacement, the same for every model; (1, 2) if D = 1."""
    D = len(totals)
    counts = np.random.default_rng(0).multinomial(D, np.full(D, 1 / D), DRAWS if D > 1 else 1)  # (DRAWS, D)
    return rates(counts[(counts @ totals)[:, 2] > 0] @ totals)  # without draws of only empty documents

def with_interval(key, number, draws):
    """A number by its key, and its 95% interval, from draws. One document alone gives none."""
    interval = {f"{key}_interval": np.percentile(draws, (2.5, 97.5)).tolist()} if len(draws) > 1 else {}
    return {key: number} | interval

def summary(totals):
    """The metrics of documents, given nats, tokens and bytes of each (D, 3)."""
    nats, tokens, size = totals.sum(0)
    (perplexity, bits), draws = rates(totals.sum(0)), bootstrap(totals)
    metrics = with_interval("perplexity", perplexity, draws[:, 0])
    metrics |= with_interval("bits_per_byte", bits, draws[:, 1])
    return metrics | {"documents": len(totals), "tokens": int(tokens), "bytes": int(size), "nats": nats}

def difference(totals, first):
    """Bits per byte of documents (D, 3) minus those of the first model, in the same draws."""
    bits, bits_first = rates(totals.sum(0))[1], rates(first.sum(0))[1]
    return with_interval("bits_per_byte", bits - bits_first, (bootstrap(totals) - bootstrap(first))[:, 1])

def read_domains(config):
    """{domain: list of texts}. A missing text (null) is an empty one."""
    rows = {}
    if config.data.startswith("hf:"):
        name, *parts = config.data[3:].split(",")
        with datasets_library(name) as datasets:
            for part in parts or datasets.get_dataset_config_names(name):
                splits = datasets.get_dataset_split_names(name, part)
                usable = [split for split in ("validation", "val", "test") if split in splits]
                split = config.split or [*usable, "validation"][0]
                rows[part] = read_columns([config.column], hub_rows, name, part, split)
    else:
        rows = {name: read_files(paths, [config.column]) for name, paths in text_files(config.data).items()}
    texts = {domain: [text or "" for (text,) in of_domain] for domain, of_domain in rows.items()}
    for domain, of_domain in texts.items():
        if not any(of_domain) or not all(isinstance(text, str) for text in of_domain):
            fail(f"{domain} holds nothing, or not only text, in its column {config.column} (see --column)")
    return texts

def cell(metrics, key, form):
    """A number, and its interval if it has one."""
    ends = ", ".join(f"{end:{form}}" for end in metrics.get(f"{key}_interval", []))
    return f"{metrics[key]:{form}} [{ends}]" if ends else f"{metrics[key]:{form}}"

def table(result):
    """The metrics of a model's last step as text, a row for each domain."""
    rows, minus = {}, result.get("difference")
    for domain, metrics in list(result["steps"].values())[-1].items():
        rows[domain] = {"documents": f"{metrics['documents']:,}", "bytes": f"{metrics['bytes']:,}",
                        "perplexity": cell(metrics, "perplexity", ".2f"),
                        "bits per byte": cell(metrics, "bits_per_byte", ".3f")}
        if minus:
            rows[domain][f"minus {minus['from']}"] = cell(minus[domain], "bits_per_byte", "+.3f")
    return pd.DataFrame(rows).T.to_string()

def main():
    config, paths = settings.load(Config, __doc__, RULES)
    device = choose_device("auto")
    models = load_models(paths, int(config.step) if config.step.isdecimal() else -1, device)
    context = config.context or models[paths[0]].model.config.block_size
    stride = min(config.stride or (context + 1) // 2, context)
    domains = read_domains(config)
    texts = sum(domains.values(), [])
    where = np.repeat(list(domains), [len(of_domain) for of_domain in domains.values()])  # (D,)
    groups = {domain: where == domain for domain in domains} | {"all": np.ones(len(texts), bool)}
    results, totals = {}, {}
    for path, loaded in models.items():
        ids, steps = loaded.tokenizer.encode_ordinary_batch(texts), {}
        sizes = [(len(row), len(text.encode())) for row, text in zip(ids, texts, strict=True)]
        for step in (checkpoints(path) if config.step == "all" else {}) or [loaded.step]:
            model = loaded.model if step == loaded.step else load_model(path, step, device).model
            nats = score(model, loaded.tokenizer.eot, ids, context, stride, f"{path}, step {step}")
            totals[path] = np.column_stack([nats, sizes])  # (D, 3)
            steps[step] = {name: summary(totals[path][of]) for name, of in groups.items()}
            bits = cell(steps[step]["all"], "bits_per_byte", ".4f")
            print(f"{path}, step {step}: {bits} bits per byte over all")
        results[path] = {"data": config.data, "context": context, "stride": stride, "steps": steps}
        if path != paths[0]:  # both at their last step
            results[path]["difference"] = {"from": paths[0]} | {
                name: difference(totals[path][of], totals[paths[0]][of]) for name, of in groups.items()}
    print(f"{config.data}: at most {context} tokens of context, windows {stride} apart; [95% over documents]")
    for path, result in results.items():
        print(f"\n{path}\n{table(result)}")
    out = config.out or paths[0]
    for folder, content in ({out: results} if config.out else results).items():
        write_atomic(f"{folder}/eval_lm.json", json.dumps(content, indent=2))
    figures.save(figures.lm_bars(results), f"{out}/eval_lm.png")
    print(f"\nwritten eval_lm.json in {out if config.out else 'each folder'}, and {out}/eval_lm.png")

if __name__ == "__main__":
    main()
