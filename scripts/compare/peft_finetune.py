"""Fine-tunes a Hugging Face model with LoRA or QLoRA by unmodified peft, on the CPU, from rows that Tallow writes too.

    python scripts/compare/peft_finetune.py MODEL_DIR ADAPTER_DIR ROWS.jsonl --steps 20 --batch 8 --micro 2
        [--lr 2e-4 --warmup 2 --min-ratio 0.1 | --lr-list LR.json] [--dtype bf16] [--four-bit nf4 [--dequantized]]

ADAPTER_DIR is a PEFT directory: both programs start from its weights. ROWS.jsonl has one object a row, read in order and
again from the start when it ends:

    input_ids     the row
    labels        as transformers takes them: the id itself where it is to be predicted, else -100
    targets       or, instead: the next id of each, else -100
    position_ids  0, 1, 2.. where absent
    doc_start     index within the row of the first id of the document that each id belongs to. Where absent a row is one
                  document, or as many as its position_ids start again, which transformers sees by itself

Rows of a micro-batch are padded at the end to the longest; causal attention keeps padding out of sight. The loss of a
step is the sum over its targets by their number in all its micro-batches. `--warmup` and `--min-ratio` are Tallow's cosine:
`lr (s + 1) / warmup`, then `lr (r + (1 - r) (1 + cos(pi p)) / 2)`. Weight decay is for matrices alone.

QLoRA: `--four-bit` quantizes every linear layer but the head as it is loaded, by bitsandbytes. With `--dequantized` weights
go through 4 bits and back once, then stay in `--dtype`: the same arithmetic without its memory or its time.

Prints one JSON line a step, then one with medians and the peak of resident memory. The first step is in no median.
Needs torch, transformers, peft, and bitsandbytes for 4 bits.
"""

import argparse
import json
import math
import resource
import statistics
import time
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from transformers.pytorch_utils import Conv1D

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("adapter", type=Path, help="PEFT directory with the initial weights")
    p.add_argument("rows", type=Path)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--batch", type=int, default=8, help="rows a step")
    p.add_argument("--micro", type=int, help="rows a forward pass; all of the step unless told")
    p.add_argument("--dtype", choices=DTYPES, default="f32", help="of the frozen weights and the activations")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--warmup", type=int, default=0)
    p.add_argument("--min-ratio", type=float, default=1.0, help="end of the cosine, as a share of --lr; 1 is constant")
    p.add_argument("--lr-list", type=Path, help="JSON list with the rate of every step, instead")
    p.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    p.add_argument("--eps", type=float, default=1e-8)
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--grad-clip", type=float, default=1.0, help="0 for none")
    p.add_argument("--four-bit", choices=["nf4", "fp4"])
    p.add_argument("--block", type=int, default=64)
    p.add_argument("--single", action="store_true", help="without double quantization")
    p.add_argument("--dequantized", action="store_true")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations of each block")
    p.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    p.add_argument("--save", type=Path, help="write the trained adapter there")
    p.add_argument("--out", type=Path, help="write the lines there too")
    return p.parse_args()


def load(a):
    options = dict(dtype=DTYPES[a.dtype], attn_implementation=a.attention)
    if a.four_bit and not a.dequantized:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=a.four_bit,
            bnb_4bit_use_double_quant=not a.single,
            bnb_4bit_compute_dtype=DTYPES[a.dtype],
        )
        if a.block != 64:
            raise SystemExit("transformers quantizes in blocks of 64: --block takes effect with --dequantized alone")
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, **options)
    if a.four_bit and a.dequantized:
        through_four_bits(model, a)
    if a.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.PeftModel.from_pretrained(model, a.adapter, is_trainable=True)
    # Dropout masks would differ from ours; the rows alone decide a step.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            raise SystemExit(f"a dropout of {module.p}: both programs can only be compared without")
    return model.train()


@torch.no_grad()
def through_four_bits(model, a):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    head = model.get_output_embeddings()
    for module in model.modules():
        if module is head or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        # A row is an output: Conv1D keeps them as columns.
        weight = module.weight.data.t() if isinstance(module, Conv1D) else module.weight.data
        codes, state = quantize_4bit(
            weight.contiguous(), blocksize=a.block, quant_type=a.four_bit, compress_statistics=not a.single
        )
        back = dequantize_4bit(codes, state)
        module.weight.data.copy_(back.t() if isinstance(module, Conv1D) else back)


def rates(a):
    if a.lr_list:
        rates = json.loads(a.lr_list.read_text())
        if len(rates) < a.steps:
            raise SystemExit(f"{a.lr_list} has {len(rates)} rates for {a.steps} steps")
        return rates

    def cosine(step):
        progress = (step - a.warmup) / max(1, a.steps - a.warmup)
        return a.min_ratio + (1 - a.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return [a.lr * ((s + 1) / a.warmup if s < a.warmup else cosine(s)) for s in range(a.steps)]


def read_rows(path):
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = json.loads(line)
        ids = row["input_ids"]
        if not ids:
            raise SystemExit(f"{path}:{number}: an empty row")
        if "targets" not in row:
            row["targets"] = row.pop("labels")[1:] + [-100]
        lists = {key: row[key] for key in ("targets", "position_ids", "doc_start") if row.get(key) is not None}
        for key, values in lists.items():
            if len(values) != len(ids):
                raise SystemExit(f"{path}:{number}: {len(values)} {key} for {len(ids)} input_ids")
        rows.append({"input_ids": ids, **lists})
    if not any(target != -100 for row in rows for target in row["targets"]):
        raise SystemExit(f"{path}: nothing to learn in it")
    return rows


def collate(rows, window):
    """Tensors `[b, t]` of some rows, and a mask where causal attention alone is not enough."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key, fill, absent=None):
        lists = [row[key] if key in row else absent(len(row["input_ids"])) for row in rows]
        return torch.tensor([values + [fill] * (longest - len(values)) for values in lists])

    batch = {
        "input_ids": padded("input_ids", 0),
        "targets": padded("targets", -100),
        "position_ids": None,
        "attention_mask": None,
    }
    if any("position_ids" in row for row in rows):
        batch["position_ids"] = padded("position_ids", 0, lambda n: list(range(n)))
    if any("doc_start" in row for row in rows):
        start = padded("doc_start", 0, lambda n: [0] * n)
        t = torch.arange(longest)
        seen = (t[None, None, :] <= t[None, :, None]) & (t[None, None, :] >= start[:, :, None])
        if window:
            seen &= t[None, None, :] > t[None, :, None] - window
        batch["attention_mask"] = seen[:, None]
    return batch


def nll(model, batch, dtype):
    """Sum of the negative log-likelihoods of the targets."""
    mask = batch["attention_mask"]
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    out = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
    )
    logits, targets = out.logits.float().flatten(0, 1), batch["targets"].flatten()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    transformers.utils.logging.disable_progress_bar()
    rows, lrs = read_rows(a.rows), rates(a)
    model = load(a)
    window = getattr(model.config, "sliding_window", None) if getattr(model.config, "use_sliding_window", True) else None
    trained = [q for q in model.parameters() if q.requires_grad]
    groups = [
        {"params": [q for q in trained if q.ndim > 1], "weight_decay": a.weight_decay},
        {"params": [q for q in trained if q.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=tuple(a.betas), eps=a.eps, fused=True)
    micro = a.micro or a.batch

    lines = []
    for step in range(a.steps):
        start = time.perf_counter()
        of_step = [rows[(step * a.batch + i) % len(rows)] for i in range(a.batch)]
        count = sum(target != -100 for row in of_step for target in row["targets"])
        tokens = sum(len(row["input_ids"]) for row in of_step)
        for group in optimizer.param_groups:
            group["lr"] = lrs[step]
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for first in range(0, a.batch, micro):
            loss = nll(model, collate(of_step[first:first + micro], window), DTYPES[a.dtype])
            (loss / max(1, count)).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, a.grad_clip if a.grad_clip > 0 else math.inf)
        optimizer.step()
        seconds = time.perf_counter() - start
        line = dict(
            step=step + 1,
            loss=total / max(1, count),
            grad_norm=norm.item(),
            lr=lrs[step],
            targets=count,
            tokens=tokens,
            seconds=round(seconds, 4),
            tokens_per_s=round(tokens / seconds, 2),
        )
        lines.append(line)
        print(json.dumps(line), flush=True)

    if a.save:
        model.save_pretrained(a.save)
    steady = lines[1:] or lines
    lines.append(dict(
        steps=a.steps,
        median_tokens_per_s=round(statistics.median(line["tokens_per_s"] for line in steady), 2),
        median_seconds=round(statistics.median(line["seconds"] for line in steady), 4),
        # Linux counts it in KiB.
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        trained_parameters=sum(q.numel() for q in trained),
        trained_dtypes=sorted({str(q.dtype).removeprefix("torch.") for q in trained}),
        four_bit=a.four_bit and f"{a.four_bit}{' and back' if a.dequantized else ''}",
        threads=a.threads,
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
    ))
    print(json.dumps(lines[-1]))
    if a.out:
        a.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
