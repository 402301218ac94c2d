#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What each rounding to 16 bits costs: the fp64 recurrence of a bundle, rounded at chosen places and nowhere else.

  rounding.py [--dtype bf16|f16] [--places P,P,...] [--each] [--own] BUNDLE...
  rounding.py [--dtype bf16|f16] --program GDN_RUN BUNDLE...

Places are the tensors of a layer: forward `f:` qkv z b a (projections), conv (q, k before l2norm), v, qk (of unit
length), beta, o, n, y; backward `b:` the gradients that arrive at the same tensors. Weights and input are always rounded:
that is the floor, what a layer of this type loses before it computes anything. `--each` adds one place at a time to
the floor; `--own` compares with the exact results of the rounded weights and input, so that only the places count.
Prints rms(error)/rms(exact) per expected tensor, the worst over the bundles.

`--program` runs gdn-run instead and compares its errors with the floor, and with the floor plus what a layer has to
round (unit q and k, beta): quantiles of the ratios, and how many tensors exceed their limits. Small random layers
are badly conditioned now and then: a vector that is nearly 0 before it gets unit length. There one rounding more or
less moves a gradient by many times the floor, either way.

Requires the packages of scripts/make_bundles.py.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("make_bundles", Path(__file__).parents[1] / "scripts/make_bundles.py")
make_bundles = sys.modules["make_bundles"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_bundles)

PLACES = [way + ":" + name for way in "fb" for name in "qkv z b a conv v qk beta o n y".split()]
LIMITS = {"bf16": (2e-2, 5e-2), "f16": (4e-3, 8e-3)}
KEPT = ("A_log", "dt_bias", "norm.weight", "initial_state", "grad_recurrent_state")  # fp32 in every layer


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, there, back):
        ctx.dtype = dtype if back else None
        return x.to(dtype).double() if there else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).double() if ctx.dtype else grad, None, None, None


def document(config, p, x, conv, state, at):
    """make_bundles.oracle_document with at(name, tensor) at each place."""
    hk, hv, dk, dv, w = (
        config["linear_" + s]
        for s in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    )
    n, r = x.shape[0], hv // hk
    if n == 0:
        return x, conv, state
    if "in_proj_qkv.weight" in p:
        qkv, z, b, a = (x @ p[name].T for name in make_bundles.SPLIT)
    else:
        h = torch.arange(hk)[:, None] * (2 * dk + 2 * r * dv)
        q_rows, k_rows = h + torch.arange(dk), h + dk + torch.arange(dk)
        v_rows, z_rows = h + 2 * dk + torch.arange(r * dv), h + 2 * dk + r * dv + torch.arange(r * dv)
        qkvz, ba = x @ p["in_proj_qkvz.weight"].T, x @ p["in_proj_ba.weight"].T
        qkv, z = qkvz[:, torch.cat([q_rows.flatten(), k_rows.flatten(), v_rows.flatten()])], qkvz[:, z_rows.flatten()]
        b_rows = (torch.arange(hk)[:, None] * 2 * r + torch.arange(r)).flatten()
        b, a = ba[:, b_rows], ba[:, b_rows + r]
    qkv, z, b, a = at("qkv", qkv), at("z", z), at("b", b), at("a", a)
    past = torch.cat([conv.T, qkv])
    taps = p["conv1d.weight"][:, 0]
    mixed = sum(taps[:, j] * past[1 + j : 1 + j + n] for j in range(w))
    mixed = mixed / (1 + torch.exp(-mixed))
    keys = at("conv", mixed[:, : 2 * hk * dk]).reshape(n, 2 * hk, dk)
    v = at("v", mixed[:, 2 * hk * dk :]).reshape(n, hv, dv)
    unit = at("qk", keys / torch.sqrt(torch.sum(keys * keys, -1, keepdim=True) + 1e-6))
    spread = lambda y: y[:, :, None].expand(n, hk, r, dk).reshape(n, hv, dk)
    q, k = spread(unit[:, :hk]) / math.sqrt(dk), spread(unit[:, hk:])
    beta = at("beta", 1 / (1 + torch.exp(-b)))
    g = -torch.exp(p["A_log"]) * torch.logaddexp(a + p["dt_bias"], torch.zeros((), dtype=a.dtype))
    o, state = make_bundles.recur(q, k, v, g, beta, state)
    o = at("o", o)
    o = o / torch.sqrt(torch.mean(o * o, -1, keepdim=True) + config["rms_norm_eps"])
    z = z.reshape(n, hv, dv)
    y = at("n", p["norm.weight"] * o * z / (1 + torch.exp(-z)))
    return at("y", y.reshape(n, hv * dv) @ p["out_proj.weight"].T), past[n:].T, state


def run(config, t, dtype, places):
    """Expected tensors of a bundle; dtype None: exact."""
    narrow = lambda name, x: x.double() if dtype is None or name.endswith(KEPT) else x.to(dtype).double()
    at = lambda name, x: x if dtype is None else Round.apply(x, dtype, "f:" + name in places, "b:" + name in places)
    docs, n = make_bundles.documents(t), len(make_bundles.documents(t))
    hk, hv, k, v, w = (
        config["linear_" + s]
        for s in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    )
    prefix = make_bundles.PREFIX
    t = {name: narrow(name, x) if x.is_floating_point() else x for name, x in t.items() if "expected" not in name}
    parameters = {name: t[prefix + name].requires_grad_() for name in make_bundles.parameter_names(t)}
    hidden = t["hidden_states"].requires_grad_()
    state = t.get("initial_state", torch.zeros(n, hv, k, v, dtype=torch.float64)).requires_grad_()
    conv = t.get("initial_conv_state", torch.zeros(n, 2 * hk * k + hv * v, w, dtype=torch.float64)).requires_grad_()
    results = [
        document(config, parameters, hidden[row, index], conv[i], state[i], at) for i, (row, index) in enumerate(docs)
    ]
    return make_bundles.finish(
        t, torch.float64, hidden, parameters, state, conv, docs, *map(list, zip(*results))
    )


def errors(config, t, exact, dtype, places):
    got = run(config, t, dtype, places)
    size = lambda x: float(x.pow(2).mean().sqrt())
    return {name: size(got[name] - want) / size(want) for name, want in exact.items() if want.numel() and size(want)}


KINDS = {
    "outputs and states": lambda n: "grad." not in n,
    "gradients through the norms of q and k": lambda n: any(
        k in n for k in ("grad.hidden_states", "in_proj_qkv", "conv1d", "initial_conv_state")
    ),
    "other gradients": lambda n: True,
}


def compare_program(options, dtype):
    """errors of gdn-run beside the floor's: kind -> [(error, floor, required, limit)]"""
    found = {kind: [] for kind in KINDS}
    for path in options.bundles:
        config, _, t = make_bundles.read_bundle(path)
        exact = run(config, t, None, [])
        floor, required = (errors(config, t, exact, dtype, places) for places in ([], ["f:qk", "f:beta"]))
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report"
            command = [options.program, "--dtype", options.dtype, "--json", report, path]
            subprocess.run(command, stdout=subprocess.DEVNULL)
            for row in json.loads(report.read_text())["tensors"]:
                name = row["name"] if row["name"].startswith("expected.") else "expected." + row["name"]
                if floor.get(name, 0) > 1e-2 * row["limit"]:  # a bundle of 16-bit numbers loses nothing at the floor
                    kind = next(k for k, holds in KINDS.items() if holds(name))
                    found[kind].append((row["rel_rms"], floor[name], required[name], row["limit"]))
    print(f"| {options.dtype} | tensors | error / floor: half, 90 % below | error / required: half, 90 %, 98 % below"
          " | over the limit: floor, required, gdn |\n|---|---|---|---|---|")
    for kind, rows in found.items():
        at = lambda values, q: f"{sorted(values)[min(len(rows) - 1, int(q * len(rows)))]:.2f}"
        by_floor, by_required = [e / f for e, f, _, _ in rows], [e / r for e, _, r, _ in rows]
        over = [sum(value[i] > value[3] for value in rows) for i in (1, 2, 0)]
        print(f"| {kind} | {len(rows)} | {at(by_floor, .5)}, {at(by_floor, .9)} | {at(by_required, .5)}, "
              f"{at(by_required, .9)}, {at(by_required, .98)} | {over[0]}, {over[1]}, {over[2]} |")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bundles", nargs="+")
parser.add_argument("--dtype", default="bf16", choices=LIMITS)
parser.add_argument("--places", default="")
parser.add_argument("--each", action="store_true")
parser.add_argument("--own", action="store_true")
parser.add_argument("--program", metavar="GDN_RUN")
options = parser.parse_args()
dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[options.dtype]
if options.program:
    compare_program(options, dtype)
    sys.exit()
sets = {"floor": []} | ({p: [p] for p in PLACES} if options.each else {})
if options.places:
    sets[options.places] = PLACES if options.places == "all" else options.places.split(",")
worst = {}
for path in options.bundles:
    config, _, t = make_bundles.read_bundle(path)
    exact = run(config, t, dtype if options.own else None, [])
    for label, places in sets.items():
        for name, e in errors(config, t, exact, dtype, places).items():
            limit = LIMITS[options.dtype]["grad." in name]
            row = worst.setdefault(label, {})
            kind = name.removeprefix("expected.").replace("linear_attn.", "").replace("qkvz", "qkv")
            row[kind] = max(row.get(kind, (0, "", False)), (e, Path(path).stem, e > limit))
for label, row in worst.items():
    print(label)
    for kind, (e, bundle, over) in row.items():
        print(f"  {kind:38} {e:9.2e}  {bundle}{'  over the limit' if over else ''}")
