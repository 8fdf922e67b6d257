#!/usr/bin/env python3
"""Loads a model directory that tallow wrote in unmodified transformers, and compares what the two make of it.
Needs torch and transformers, and a built `tallow`.

    python3 scripts/parity/transformers_load.py MODEL_DIR [--tallow PATH] [--no-tokenizer]

- Weights: `AutoModelForCausalLM` finds every tensor, and none that it has no place for.
- Logits: log-probabilities of the whole vocabulary at every position, from `tallow score --top V`, in f32.
- Text: for a few difficult texts, the ids of `AutoTokenizer` against `tallow tokenizer encode`, with and without the
  special tokens around them, and the decoded text against `tallow tokenizer decode`.
- Special ids: the tokenizer's end of text is one of the configuration's, and inside the vocabulary.

Prints one JSON line; the exit status is 1 if anything differs, or a log-probability by more than 1e-4.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import torch
import transformers

TOLERANCE = 1e-4
TEXTS = [
    "The state of the Union is strong.",
    "",
    " leading and trailing spaces   ",
    "line one\nline two\r\n\n\n\tindented\n",
    "It's we'll I'd THEY'RE don't; 3.14159, 1,000,000 and 0x7fff_ffff",
    "fn main() { println!(\"{:>8}\", vec![1u8; 4].len()); } // done",
    "Größe, naïveté, œuvre; Москва; 東京は日本の首都です。 مرحبا हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇨🇭 e\u0301 \u00e9 \ufb01 \u200b\u00a0\u3000 zero\u0000byte \ufffd",
    "a" * 70 + " " * 33 + "=" * 40,
]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=pathlib.Path, metavar="MODEL_DIR")
    parser.add_argument("--tallow", help="the binary; default: target/release, target/debug, then PATH")
    parser.add_argument("--no-tokenizer", action="store_true", help="the directory has none: compare logits only")
    parser.add_argument("--rows", type=int, default=2, help="rows of random ids to score")
    parser.add_argument("--length", type=int, default=64, help="ids in a row, at most")
    return parser.parse_args()


def find_binary(given):
    root = pathlib.Path(__file__).resolve().parents[2]
    built = [root / "target" / profile / "tallow" for profile in ("release", "debug")]
    candidates = [given] if given else [*(str(path) for path in built if path.exists()), shutil.which("tallow")]
    if not candidates or candidates[0] is None:
        sys.exit("error: no tallow binary: cargo build --release, or give --tallow PATH")
    return candidates[0]


def run(binary, *args, text=None):
    """The JSON object that a command prints; `text` goes to its standard input."""
    done = subprocess.run([binary, *args], input=text, capture_output=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: tallow {' '.join(args)}: {done.stderr.decode(errors='replace')}")
    return json.loads(done.stdout)


def load(path):
    """The model in f32, and the tensors that did not fit."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    misfits = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return model.eval(), {kind: names for kind, names in misfits.items() if names}


def positions(config):
    return getattr(config, "max_position_embeddings", None) or config.n_positions


@torch.no_grad()
def largest_difference(model, binary, path, ids):
    """Of any log-probability after any of `ids`, which both models see as they are."""
    vocab = model.config.vocab_size
    given = ",".join(map(str, ids))
    score = run(binary, "score", "--model", str(path), "--ids", given, "--top", str(vocab), "--dtype", "f32", "--json")
    ours = torch.full((len(ids), vocab), float("nan"), dtype=torch.float64)
    for row, top in zip(ours, score["top"], strict=True):
        row[torch.tensor([i for i, _ in top])] = torch.tensor([p for _, p in top], dtype=torch.float64)
    theirs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    chosen = torch.tensor(score["logprobs"][1:], dtype=torch.float64)
    along = (chosen - theirs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]).abs()
    differences = torch.cat([(ours - theirs).abs().flatten(), along])
    # A position or a token that one of them lacks is NaN, and no difference is more than that.
    return float("inf") if differences.isnan().any() else float(differences.max())


def compare_texts(tokenizer, binary, path):
    """The texts on which ids or the text read back differ."""
    texts = list(TEXTS)
    if tokenizer.eos_token:
        texts.append(f"one{tokenizer.eos_token}two {tokenizer.eos_token} three")
    different, rows = [], []
    for text in texts:
        raw = text.encode()
        for special in (True, False):
            options = ["--parse-special", *(["--add-special"] if special else [])]
            command = ["tokenizer", "encode", "--tokenizer", str(path), "--input", "-", "--json"]
            ours = run(binary, *command, *options, text=raw)["ids"]
            theirs = tokenizer.encode(text, add_special_tokens=special)
            if ours != theirs:
                different.append({"text": text, "special": special, "tallow": ours, "transformers": theirs})
        rows.append(theirs)
        given = ",".join(map(str, theirs))
        command = ["tokenizer", "decode", "--tokenizer", str(path), "--input", "-", "--json"]
        ours = run(binary, *command, text=given.encode())["text"]
        back = tokenizer.decode(theirs, clean_up_tokenization_spaces=False)
        if ours != back:
            different.append({"ids": theirs, "tallow": ours, "transformers": back})
    return different, rows


def eos_disagrees(tokenizer, model):
    stated = model.generation_config.eos_token_id
    stated = stated if isinstance(stated, list) else [stated]
    eos = tokenizer.eos_token_id
    return eos is not None and (eos not in stated or eos >= model.config.vocab_size)


def main():
    args = arguments()
    binary = find_binary(args.tallow)
    torch.manual_seed(7)
    model, misfits = load(args.model)
    limit = min(args.length, positions(model.config))
    rows = torch.randint(model.config.vocab_size, (args.rows, limit)).tolist()
    report = {"model": str(args.model), "architecture": type(model).__name__, "misfits": misfits}
    ok = not misfits
    if not args.no_tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        different, encoded = compare_texts(tokenizer, binary, args.model)
        rows += [ids[:limit] for ids in encoded if len(ids) > 1]
        report["texts"] = len(encoded)
        report["texts_different"] = different
        report["eos_disagrees"] = eos_disagrees(tokenizer, model)
        ok = ok and not different and not report["eos_disagrees"]
    worst = max(largest_difference(model, binary, args.model, ids) for ids in rows)
    report["positions"] = sum(map(len, rows))
    report["vocab_size"] = model.config.vocab_size
    report["max_logprob_difference"] = worst
    report["tolerance"] = TOLERANCE
    report["ok"] = ok and worst <= TOLERANCE
    report["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(report, ensure_ascii=False))
    sys.exit(0 if report["ok"] else 1)


if __name__ == "__main__":
    main()
