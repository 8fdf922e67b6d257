"""Repeats a Tallow run with PyTorch and transformers: same initial weights, batches, masks, schedule and optimizer.

    cargo run --release -p tallow-train --example twin_inputs -- RUN.toml TWIN_DIR
    python scripts/compare/torch_twin.py TWIN_DIR [--metrics RUN_DIR/metrics.jsonl]

Prints one JSON line a validation, then one with the differences: of the last validation losses, of the training losses
over the last tenth of the steps, and the first step at which the two training losses part by 1e-3. `--perturb 1e-6` changes
every initial weight by a factor of 1 + 1e-6 N(0, 1): how far rounding alone takes PyTorch from itself. Needs torch,
transformers, safetensors. The model is transformers' own LlamaForCausalLM with a mask that keeps documents apart.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

p = argparse.ArgumentParser()
p.add_argument("twin", type=Path)
p.add_argument("--metrics", type=Path, help="metrics.jsonl of the Tallow run")
p.add_argument("--threads", type=int, default=2)
p.add_argument("--perturb", type=float, default=0.0, help="relative change of the initial weights")
p.add_argument("--seed", type=int, default=0, help="of the change")
p.add_argument("--losses", type=Path, help="write the training loss of every step there, one a line")
p.add_argument("--out", type=Path, help="write the lines there too")
a = p.parse_args()
torch.set_num_threads(a.threads)
torch.manual_seed(a.seed)

run = json.loads((a.twin / "run.json").read_text())
data = load_file(a.twin / "batches.safetensors")
model = AutoModelForCausalLM.from_pretrained(a.twin / "init", dtype=torch.float32, attn_implementation="sdpa")
if dropouts := {k: v for k, v in model.config.to_dict().items() if ("drop" in k) and v}:
    raise SystemExit(f"the twin draws no dropout masks of ours: train without {dropouts}")
if a.perturb:
    with torch.no_grad():
        for q in model.parameters():
            q.mul_(1 + a.perturb * torch.randn_like(q))
no_decay = set(run["no_decay"])
named = dict(model.named_parameters())
groups = [
    {"params": [q for n, q in named.items() if n not in no_decay], "weight_decay": run["weight_decay"]},
    {"params": [q for n, q in named.items() if n in no_decay], "weight_decay": 0.0},
]
opt = torch.optim.AdamW(groups, lr=1.0, betas=tuple(run["betas"]), eps=run["eps"], fused=True)


def nll(of, rows):
    """Sum of the negative log-likelihoods of some rows, and the number of their targets."""
    ids, targets, positions, doc_start = (data[f"{of}.{k}"][rows] for k in ("ids", "targets", "positions", "doc_start"))
    t = torch.arange(ids.shape[1])
    seen = (t[None, None, :] <= t[None, :, None]) & (t[None, None, :] >= doc_start[:, :, None])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum())


@torch.no_grad()
def validate():
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(data["valid.ids"]), run["batch_size"]):
        loss, n = nll("valid", slice(start, start + run["batch_size"]))
        total, count = total + loss.item(), count + n
    model.train()
    return total / count


ours, ours_train = {}, {}
if a.metrics:
    for line in a.metrics.read_text().splitlines():
        record = json.loads(line)
        if "valid_loss" in record:
            ours[record["step"]] = record["valid_loss"]
        elif not record["skipped"]:
            ours_train[record["step"]] = record["loss"]

lines, losses, train_s, tokens = [], [], 0.0, 0
for step in range(run["steps"]):
    start = time.perf_counter()
    for group in opt.param_groups:
        group["lr"] = data["lr"][step].item()
    opt.zero_grad(set_to_none=True)
    loss, count = nll("train", slice(step * run["batch_size"], (step + 1) * run["batch_size"]))
    (loss / count).backward()
    if run["grad_clip"] > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), run["grad_clip"])
    opt.step()
    train_s += time.perf_counter() - start
    tokens += run["batch_size"] * data["train.ids"].shape[1]
    done = step + 1
    losses.append(loss.item() / count)
    if done == run["steps"] or (run["eval_every"] and done % run["eval_every"] == 0):
        lines.append(dict(step=done, train_loss=round(loss.item() / count, 5), torch_valid_loss=round(validate(), 5),
                          tallow_valid_loss=ours.get(done), torch_tokens_per_s=round(tokens / train_s, 1)))
        print(json.dumps(lines[-1]), flush=True)
if a.losses:
    a.losses.write_text("".join(f"{x!r}\n" for x in losses))
if ours and lines[-1]["tallow_valid_loss"]:
    last = lines[-1]
    # Steps that the run skipped have no loss to compare.
    both = [(step, ours_train[step], loss) for step, loss in enumerate(losses, 1) if step in ours_train]
    tail = both[-max(1, run["steps"] // 10):]
    mean = [sum(pair[of] for pair in tail) / len(tail) for of in (1, 2)]
    apart = (step for step, x, y in both if abs(x / y - 1) > 1e-3)
    lines.append(dict(
        torch=torch.__version__,
        relative_difference_of_last_validation=round(last["tallow_valid_loss"] / last["torch_valid_loss"] - 1, 6),
        relative_difference_of_last_tenth_of_training=round(mean[0] / mean[1] - 1, 6),
        first_step_apart_by_1e_3=next(apart, None),
    ))
    print(json.dumps(lines[-1]))
if a.out:
    a.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
