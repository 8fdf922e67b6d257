"""Training speed over model size and over context: a table, and a picture where matplotlib is installed.

    cargo build --release
    python scripts/compare/throughput.py [--tallow target/release/tallow] [--dtype f32] [--svg docs/throughput.svg]

Each point is the median step of `tallow bench train`. `GFLOP/s` counts the model's arithmetic alone (6 a parameter and
token, and attention), so a flat line means that cost grows as the arithmetic does; the least squares of log time over log
FLOPs are printed as the exponent, 1 where it does so exactly.
"""

import argparse
import json
import math
import subprocess

# (channels, blocks, heads, feed-forward, vocabulary, rows of 512 tokens): 1 M to 350 M parameters
SIZES = [
    (128, 3, 2, 384, 2048, 4),
    (192, 4, 3, 512, 4096, 4),
    (320, 6, 5, 896, 4096, 4),
    (512, 8, 8, 1408, 8192, 2),
    (768, 12, 12, 2048, 16384, 1),
    (1024, 24, 16, 2816, 16384, 1),
]
CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192]


def bench(tallow, dtype, **shape):
    flags = [part for key, value in shape.items() for part in (f"--{key}", str(value))]
    command = [tallow, "bench", "train", "--json", "--dtype", dtype, "--warmup", "1", *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def exponent(points):
    """Slope of log(seconds a token) over log(FLOPs a token)."""
    x = [math.log(p["model_gflops"] / p["tokens_per_s"]) for p in points]
    y = [-math.log(p["tokens_per_s"]) for p in points]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tallow", default="target/release/tallow")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--svg")
    args = parser.parse_args()
    sizes, contexts = [], []
    print("| parameters | tokens/s | GFLOP/s | peak memory, MB |\n|---|---|---|---|")
    for dim, layers, heads, ffn, vocab, rows in SIZES:
        steps = 5 if dim < 512 else 2
        shape = dict(dim=dim, layers=layers, heads=heads, ffn=ffn, vocab=vocab, context=512, batch=rows, steps=steps)
        point = bench(args.tallow, args.dtype, **shape)
        sizes.append(point)
        millions, mb = point["params"] / 1e6, point["peak_bytes"] / 1e6
        print(f"| {millions:.1f} M | {point['tokens_per_s']:,.0f} | {point['model_gflops']:.1f} | {mb:,.0f} |", flush=True)
    print(f"\nexponent of time over arithmetic: {exponent(sizes):.2f}\n")
    print("| context | tokens/s | GFLOP/s | peak memory, MB |\n|---|---|---|---|")
    for context in CONTEXTS:
        point = bench(args.tallow, args.dtype, context=context, batch=max(1, 2048 // context), steps=3)
        contexts.append(point)
        mb = point["peak_bytes"] / 1e6
        print(f"| {context} | {point['tokens_per_s']:,.0f} | {point['model_gflops']:.1f} | {mb:,.0f} |", flush=True)
    print(f"\nexponent of time over arithmetic: {exponent(contexts):.2f}")
    if args.svg:
        draw(args.svg, sizes, contexts)


def draw(path, sizes, contexts):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tallow"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=False)
    panels = [(axes[0], [p["params"] / 1e6 for p in sizes], sizes, "parameters, millions"),
              (axes[1], CONTEXTS, contexts, "context, tokens")]
    for axis, x, points, label in panels:
        axis.loglog(x, [p["tokens_per_s"] for p in points], "o-", color="#1f6f8b")
        axis.set_xlabel(label)
        axis.set_ylabel("tokens/s", color="#1f6f8b")
        axis.grid(True, which="major", alpha=0.3)
        rate = axis.twinx()
        rate.semilogx(x, [p["model_gflops"] for p in points], "s--", color="#b5651d", markersize=4)
        rate.set_ylim(bottom=0)
        rate.set_ylabel("GFLOP/s", color="#b5651d")
    axes[1].set_xticks(CONTEXTS, [str(c) for c in CONTEXTS], rotation=45, fontsize=8)
    axes[1].minorticks_off()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
