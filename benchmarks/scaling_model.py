#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A model of a layer's time over P GPUs: what plans say that it moves, kernel times of one GPU, and links.

  scaling_model.py --plans SCALING_PLANS [--ranks 64,512,4096] [--near GB/s,us] [--far GB/s,us] ...   what it predicts
  scaling_model.py --plans SCALING_PLANS --fit RESULTS.json [--holdout ranks=8]
        links and summaries from measurements, checked where ranks, tokens (of each rank) or the model are as held back
  scaling_model.py --plans SCALING_PLANS --self-test

RESULTS.json is what `scaling_bench --json` wrote. One pass is forward and backward:

  t(P) = t(1) + summaries + sum over exchanges (latency + bytes / bandwidth) + rounds of the state chain (compose, fold)

Bytes are those of the busiest rank, exact, from the plans; of a rank's own node over `--near`, others over `--far`. Rounds
of the chain wait for each other. Kernels and messages do not overlap: the layer does not overlap them either. Summaries
take a time per token, which depends on the model and on whether a rank has one piece of a document or, in place, two.
"""
import argparse
import json
import subprocess
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--plans", required=True, help="the program scaling_plans")
parser.add_argument("--ranks", default="64,512,4096")
parser.add_argument("--tokens", type=int, default=32768, help="of each rank")
parser.add_argument("--node", type=int, default=8, help="GPUs that share the near links")
parser.add_argument("--near", default="350,10", help="GB/s and microseconds per exchange within a node")
parser.add_argument("--far", default="45,25", help="the same between nodes")
parser.add_argument("--per-message", type=float, default=1, help="microseconds for each message of an exchange beyond the first")
parser.add_argument("--compose", type=float, default=20, help="microseconds in which two summaries are composed")
parser.add_argument("--fold", type=float, default=5, help="microseconds in which one summary is folded")
parser.add_argument("--kernels", default="{}", help='milliseconds per pass: {"35b": {"layer": 19.8, "summaries": 1.2}, ...}; summaries may be '
                    '{"reshard": 1.2, "in-place": 1.0}')
parser.add_argument("--fit")
parser.add_argument("--holdout", default="", help="ranks=8, tokens=65536 or model=397b")
parser.add_argument("--self-test", action="store_true")
options = parser.parse_args()


def link(text):
    bandwidth, latency = (float(v) for v in text.split(","))
    return {"ms_per_byte": 1e-6 / bandwidth, "latency": latency * 1e-3}


def plans(ranks, tokens, node):
    out = subprocess.run([options.plans, "--ranks", ranks, "--tokens", str(tokens), "--node", str(node)], check=True,
                         capture_output=True, text=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def key(row):
    return row["model"], row["ranks"], row["layout"], row["strategy"], row["share"]


def features(plan):
    """What an exchange costs in each unit: [near latencies, far latencies, near bytes, far bytes, messages, compositions, folds]."""
    f = [0.0] * 7
    for way in (plan["forward"], plan["backward"]):
        # Undo and redo are two exchanges, the halo is one, the chain has one per round.
        for name, count, far_count in (("activations", 2, 2), ("halo", 1, 1), ("state", way["rounds"], way["far_rounds"])):
            near_bytes, far_bytes, messages = way[name]
            if near_bytes + far_bytes == 0:
                continue
            distant = min(count, far_count) if far_bytes else 0
            f[0] += count - distant
            f[1] += distant
            f[2] += near_bytes
            f[3] += far_bytes
            f[4] += max(0, messages - count)
        if plan["share"] == "prefix-scan":
            f[5] += way["rounds"]
        f[6] += way["rounds"] if plan["share"] == "relay" else way["folds"]
    return f


def predict(plan, kernels, near, far, per_message, compose, fold):
    units = [near["latency"], far["latency"], near["ms_per_byte"], far["ms_per_byte"], per_message, compose, fold]
    exchange = sum(n * u for n, u in zip(features(plan), units))
    summaries = kernels["summaries"]
    if isinstance(summaries, dict):
        summaries = summaries[plan["strategy"]]
    return kernels["layer"] + summaries + exchange, exchange


def gathered(plan, kernels, near, far, node):
    """Every rank gets the rest of the sequence four times: x, y and the two gradients; then the layer on contiguous slices."""
    P = plan["ranks"]
    rows = plan["tokens"] // P * plan["hidden"] * 2
    near_peers = min(P, node) - 1
    ms = 4 * (rows * near_peers * near["ms_per_byte"] + rows * (P - 1 - near_peers) * far["ms_per_byte"])
    return ms + 4 * (far["latency"] if P > node else near["latency"])


def solve(rows, right):
    """Least squares of a few unknowns, none negative: those that come out so are left out, the worst first."""
    use = list(range(len(rows[0])))
    while use:
        n = len(use)
        a = [[sum(r[i] * r[j] for r in rows) for j in use] + [sum(r[i] * b for r, b in zip(rows, right))] for i in use]
        scale = [a[i][i] ** 0.5 or 1.0 for i in range(n)]
        a = [[a[i][j] / scale[i] / (scale[j] if j < n else 1) for j in range(n + 1)] for i in range(n)]
        for i in range(n):
            a[i][i] += 1e-12
        for i in range(n):
            pivot = max(range(i, n), key=lambda k: abs(a[k][i]))
            a[i], a[pivot] = a[pivot], a[i]
            for k in range(n):
                if k != i:
                    factor = a[k][i] / a[i][i]
                    a[k] = [x - factor * y for x, y in zip(a[k], a[i])]
        x = [a[i][n] / a[i][i] / scale[i] for i in range(n)]
        if min(x) >= 0:
            return {use[i]: x[i] for i in range(n)}
        use.pop(min(range(n), key=lambda i: x[i] * scale[i]))
    return {}


def fit(results, holdout, node):
    """Latency, time per byte and per message on one node, and summaries per 32,768 tokens, by model and strategy; the rest
    is as the options say."""
    results = [dict(r, tokens=r["tokens"] // r["ranks"]) for r in results if r["ranks"] > 1 and r["documents"] == "one"]
    known = {}
    for r in results:
        shape = (r["ranks"], r["tokens"])
        if shape not in known:
            known[shape] = {key(p): p for p in plans(str(shape[0]), shape[1], node)}
    walks = sorted({(r["model"], r["strategy"]) for r in results})
    rest = options.compose * 1e-3, options.fold * 1e-3
    name, _, value = holdout.partition("=")

    def held(r):
        return bool(name) and str(r[name]) == value

    def row(r):
        f = features(known[(r["ranks"], r["tokens"])][key(r)])
        if f[1] or f[3]:
            raise SystemExit(f"{r['ranks']} ranks are more than a node of {node}: the fit is of one kind of link")
        part = [f[0], f[2] * 1e-6, f[4]] + [r["tokens"] / 32768 if (r["model"], r["strategy"]) == w else 0.0 for w in walks]
        return part, r["ms"] - r["one_gpu_ms"] - f[5] * rest[0] - f[6] * rest[1]

    learn = [row(r) for r in results if not held(r)]
    found = solve([a for a, _ in learn], [b for _, b in learn])
    names = ["latency", "ms per MB", "per message"] + [f"summaries {m} {s}" for m, s in walks]
    print("fitted:", ", ".join(f"{names[i]} {v:.6f} ms" for i, v in sorted(found.items())))
    if found.get(1):
        print(f"        bandwidth {1 / found[1]:.1f} GB/s")
    worst = 0.0
    for r in results:
        a, b = row(r)
        t = r["ms"] - b + sum(v * a[i] for i, v in found.items())
        if held(r) or not name:
            worst = max(worst, abs(t - r["ms"]) / r["ms"])
            print(f"{' '.join(str(v) for v in key(r)):45s} {r['tokens']:6d} tokens: measured {r['ms']:9.3f} ms, model {t:9.3f} ms, "
                  f"{100 * (t / r['ms'] - 1):+6.1f} %")
    print(f"largest error {100 * worst:.1f} %" + (f" where held back: {holdout}" if name else ""))
    return {names[i]: v for i, v in found.items()}, worst


def self_test():
    """A fit of what the model itself predicts finds its parameters, and predicts a P that it has not seen."""
    near, per_message = {"latency": 0.012, "ms_per_byte": 1e-6 / 300}, 0.0015
    results = []
    for ranks in (2, 4, 8):
        for p in plans(str(ranks), 4096, 8):
            kernels = {"layer": 10.0, "summaries": 0.4 if p["model"] == "35b" else 0.7}
            ms, _ = predict(p, kernels, near, near, per_message, options.compose * 1e-3, options.fold * 1e-3)
            results.append(dict(p, documents="one", ms=ms, one_gpu_ms=10.0))
    found, worst = fit(results, "ranks=8", 8)
    right = {"latency": 0.012, "ms per MB": 1 / 300, "summaries 397b reshard": 0.7 * 8, "summaries 35b in-place": 0.4 * 8}
    good = all(abs(found[name] / v - 1) < 1e-3 for name, v in right.items()) and worst < 1e-3
    print("self-test", "passed" if good else "FAILED")
    return 0 if good else 1


def table():
    near, far = link(options.near), link(options.far)
    times = json.loads(options.kernels)
    rest = options.per_message * 1e-3, options.compose * 1e-3, options.fold * 1e-3
    print("| model | P | layout | strategy | share | ms | in exchanges | weak efficiency | gather: in exchanges |")
    print("|---|---|---|---|---|---|---|---|---|")
    best = {}
    for p in plans(options.ranks, options.tokens, options.node):
        if p["model"] not in times:
            continue
        kernels = times[p["model"]]
        ms, exchange = predict(p, kernels, near, far, *rest)
        gather = gathered(p, kernels, near, far, options.node)
        print(f"| {p['model']} | {p['ranks']} | {p['layout']} | {p['strategy']} | {p['share']} | {ms:.2f} | {exchange:.2f} | "
              f"{kernels['layer'] / ms:.3f} | {gather:.1f} |")
        group = p["model"], p["ranks"], p["layout"]
        if group not in best or ms < best[group][0]:
            best[group] = ms, f"{p['strategy']}, {p['share']}", kernels["layer"] / ms
    print("\n| model | P | layout | choose | ms | weak efficiency |\n|---|---|---|---|---|---|")
    for (model, ranks, layout), (ms, what, efficiency) in best.items():
        print(f"| {model} | {ranks} | {layout} | {what} | {ms:.2f} | {efficiency:.3f} |")


if options.self_test:
    sys.exit(self_test())
elif options.fit:
    with open(options.fit) as file:
        fit([json.loads(line) for line in file], options.holdout, options.node)
else:
    table()
