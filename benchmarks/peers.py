#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times public gated delta rule kernels beside gdn's, on the same tensors of one GPU, in one process.

  peers.py LIBRARY check errors forward:16x32,2x8 backward decode [--table FILE]

LIBRARY is libgdn_peers.so (target gdn_peers). Peers: fla (flash-linear-attention), qla (FlashQLA), fi (FlashInfer);
those that do not import are left out, and it says so. All calls are captured in CUDA graphs; a time is the median of
20 replays, before each of which the L2 is filled with 256 MB of zeros, written and then read. K = V = 128, bf16, states
in and out in float, a quarter of the heads without decay. `check` compares everyone with a loop over tokens in fp32, or
with FLA where that takes too long, and must run first for a table that is to be believed. `errors` measures everyone
against that loop in fp64, on random and on hostile inputs. A part may name its heads.

FLA tunes its kernels for each head count, on one long sequence and again on a batch. Whatever else the peers compile
stays in TRITON_CACHE_DIR and TILELANG_CACHE_DIR; nothing in those depends on the machine but its kind of GPU.
"""
import argparse
import ctypes
import functools
import json
import os
import re
import signal
import statistics
import sys

os.environ["FLA_CACHE_RESULTS"] = "0"  # tunes in this process, never from a file
os.environ.setdefault("FLA_FLASH_QLA", "0")  # else FLA hands the rule over to FlashQLA on Hopper
import torch
import torch.nn.functional as F

DEV = "cuda"
FORWARD_HEADS = [(16, 32), (16, 64), (16, 48), (16, 16), (8, 32), (4, 16), (2, 8)]
FORWARD = {"1x32768": [32768], "1x8192": [8192], "1x2048": [2048], "8192x4": [8192] * 4, "4096x8": [4096] * 8,
           "1024x8": [1024] * 8}
BACKWARD_HEADS = [(16, 32), (8, 16), (4, 8), (16, 64)]
BACKWARD = {"1x32768": [32768], "1x8192": [8192], "2048x4": [2048] * 4, "4096x8": [4096] * 8}
DECODE_HEADS, BATCHES = [(16, 32), (16, 64)], (1, 16, 32, 64, 256)
NAMES = {"gdn": "gdn", "fla": "FLA", "qla": "FlashQLA", "fi": "FlashInfer"}
WARM = False  # only compile
LIMIT = 1e-2  # of the relative rms difference between any two, in bf16


# ---- gdn ------------------------------------------------------------------------------------------------------------

class Gdn:
    """The C interface of libgdn_peers.so over torch's tensors and current stream."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.gdn_rule_create.restype = ctypes.c_void_p

    @staticmethod
    def args(*values):
        for v in values:
            if torch.is_tensor(v):
                assert v.is_contiguous()
                yield ctypes.c_void_p(v.data_ptr())
            else:
                yield ctypes.c_int64(v) if isinstance(v, int) else v
        yield ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def call(self, name, *values):
        if getattr(self.lib, name)(*self.args(*values)):
            raise RuntimeError(f"{name} failed")

    def rule(self, d):
        return GdnRule(self, d)


class GdnRule:
    def __init__(self, gdn, d):
        self.gdn, self.d = gdn, d
        lengths = (ctypes.c_int64 * len(d["lengths"]))(*d["lengths"])
        hk, hv = d["q"].shape[1], d["v"].shape[1]
        self.handle = ctypes.c_void_p(gdn.lib.gdn_rule_create(ctypes.c_int64(hk), ctypes.c_int64(hv), lengths,
                                                              ctypes.c_int64(len(lengths))))
        assert self.handle.value, "gdn_rule_create failed"
        new, f32 = torch.empty_like, torch.float32
        self.o, self.ht = new(d["v"]), new(d["h0"])
        self.dq, self.dk, self.dv, self.dh0 = new(d["q"]), new(d["k"]), new(d["v"]), new(d["h0"])
        self.dg, self.dbeta = new(d["g"]), new(d["beta"], dtype=f32)

    def __del__(self):
        torch.cuda.synchronize()
        self.gdn.lib.gdn_rule_destroy(self.handle)

    def inputs(self):
        return [self.d[n] for n in ("q", "k", "v", "g", "beta", "h0")]

    def forward(self):
        self.gdn.call("gdn_rule_forward", self.handle, *self.inputs(), self.o, self.ht)
        return self.o, self.ht

    def backward(self):
        self.gdn.call("gdn_rule_backward", self.handle, *self.inputs(), self.d["do"], self.d["dht"], self.dq, self.dk,
                      self.dv, self.dg, self.dbeta, self.dh0)
        return self.dq, self.dk, self.dv, self.dbeta, self.dg, self.dh0


# ---- peers ----------------------------------------------------------------------------------------------------------

def load_peers():
    """name -> (forward, backward or None)."""
    def fla():
        from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd
        return chunk_gated_delta_rule_fwd, chunk_gated_delta_rule_bwd

    def qla():
        from flash_qla import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd
        return chunk_gated_delta_rule_fwd, chunk_gated_delta_rule_bwd

    def fi():
        from flashinfer.gdn_prefill import chunk_gated_delta_rule, chunk_gated_delta_rule_sm90
        assert chunk_gated_delta_rule_sm90 is not None, "its kernel for SM90 did not import"
        return chunk_gated_delta_rule, None

    peers = {}
    for name, get in (("fla", fla), ("qla", qla), ("fi", fi)):
        try:
            peers[name] = get()
        except Exception as e:
            print(f"without {NAMES[name]}: {e!r}"[:300], flush=True)
    if "fla" in peers:
        tune_again()
    return peers


def tune_again():
    """Lets FLA's Triton kernels tune anew, over 20 ms each: their keys hold the heads, not the lengths."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface
    from triton.testing import do_bench
    for name, module in list(sys.modules.items()):
        for o in list(vars(module).values()) if name.startswith("fla.") else ():
            while isinstance(o, KernelInterface):
                if isinstance(o, Autotuner):
                    o.cache.clear()
                    o.do_bench = functools.partial(do_bench, warmup=5, rep=20)
                o = getattr(o, "fn", None)


def data(lengths, hk, hv):
    torch.manual_seed(0)
    rows, n, d = sum(lengths), len(lengths), 128
    randn = lambda *s: torch.randn(*s, device=DEV)
    unit = lambda x: (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).bfloat16()
    g = F.logsigmoid(randn(rows, hv)) / 16
    g[:, torch.randperm(hv, device=DEV)[: hv // 4]] = 0
    offsets = torch.tensor([0] + lengths, device=DEV).cumsum(0).int()
    return dict(q=unit(randn(rows, hk, d)), k=unit(randn(rows, hk, d)), v=randn(rows, hv, d).bfloat16(), g=g,
                beta=randn(rows, hv).sigmoid().bfloat16(), h0=randn(n, hv, d, d), do=randn(rows, hv, d).bfloat16(),
                dht=randn(n, hv, d, d) / 8, lengths=lengths, offsets=offsets, scale=d**-0.5)


def forward_calls(gdn, peers, d):
    """name -> a call that returns the output and the final state [N, Hv, K, V]."""
    rule = gdn.rule(d)
    calls = {"gdn": rule.forward}
    x = [d[n][None] for n in ("q", "k", "v", "g", "beta")]
    x[4] = x[4].float()  # the peers take float; the values are those of bf16
    kw = dict(scale=d["scale"], initial_state=d["h0"], output_final_state=True, cu_seqlens=d["offsets"])
    if "fla" in peers:
        def fla():
            r = peers["fla"][0](*x, **kw)
            return r[1], r[3]
        calls["fla"] = fla
    if "qla" in peers:
        def qla():
            r = peers["qla"][0](*x, auto_cp=True, **kw)
            return r[2], r[4]
        calls["qla"] = qla
    if "fi" in peers:
        y = dict(q=d["q"], k=d["k"], v=d["v"], g=d["g"].exp(), beta=x[4][0], cu_seqlens=d["offsets"],
                 initial_state=d["h0"].mT.contiguous(), max_seqlen=max(d["lengths"]), scale=d["scale"],
                 output_final_state=True)
        def fi():
            o, ht = peers["fi"][0](**y)
            return o, ht.mT
        calls["fi"] = fi
    return calls


def backward_calls(gdn, peers, d):
    """name -> a call that returns dq, dk, dv, dbeta, dg, dh0. Each keeps from its forward what its autograd keeps."""
    rule = gdn.rule(d)
    rule.forward()
    calls = {"gdn": rule.backward}
    x = [d[n][None] for n in ("q", "k", "v", "g", "beta")]
    x[4] = x[4].float()
    do, kw = d["do"][None], dict(scale=d["scale"], initial_state=d["h0"], cu_seqlens=d["offsets"])
    if "fla" in peers:
        r = peers["fla"][0](*x, output_final_state=True, **kw)
        g, A = r[0], r[2]
        calls["fla"] = lambda: peers["fla"][1](*x[:3], g, x[4], A, d["scale"], d["h0"], do, d["dht"],
                                               cu_seqlens=d["offsets"])[:6]
    if "qla" in peers:
        s = peers["qla"][0](*x, auto_cp=True, enable_fwd_cp_cache=True, is_train=True, output_final_state=True, **kw)
        calls["qla"] = lambda: peers["qla"][1](*x[:3], s[0], x[4], s[1], do, d["dht"], auto_cp=True, cp_cache=s[5],
                                               **kw)
    return calls


def decode_calls(gdn, peers, hk, hv, batch):
    """One token of each sequence. gdn gets its gates and unit keys ready made, the peers make them in the kernel."""
    torch.manual_seed(0)
    r = lambda *s: torch.randn(*s, device=DEV).bfloat16()
    q, k, v, a, b = r(batch, 1, hk, 128), r(batch, 1, hk, 128), r(batch, 1, hv, 128), r(batch, 1, hv), r(batch, 1, hv)
    A_log, dt_bias = torch.rand(hv, device=DEV).mul(16).log(), torch.randn(hv, device=DEV)
    h = torch.randn(batch, hv, 128, 128, device=DEV) / 8
    unit = lambda x: F.normalize(x.float(), dim=-1, eps=1e-6).bfloat16()
    g = -A_log.exp() * F.softplus(a.float() + dt_bias)
    qn, kn, beta, slots = unit(q), unit(k), b.sigmoid(), torch.arange(batch, dtype=torch.int32, device=DEV)
    calls = {}
    for kind, bf16 in (("float", 0), ("bf16", 1)):
        state, o = h.bfloat16() if bf16 else h.clone(), torch.empty_like(v)
        def step(state=state, o=o, bf16=bf16):
            gdn.call("gdn_step", ctypes.c_int(bf16), batch, hk, hv, qn, kn, v, g, beta, state, slots, o)
            return o, state
        calls["gdn " + kind] = step
    if "fla" in peers:
        from fla.ops.gated_delta_rule.fused_recurrent import fused_recurrent_gated_delta_rule_fwd as fla
        for kind, state in (("float", h), ("bf16", h.bfloat16())):
            calls["fla " + kind] = lambda state=state: fla(
                q=q, k=k, v=v, g=a, beta=b, A_log=A_log, dt_bias=dt_bias, scale=128**-0.5, initial_state=state,
                output_final_state=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    if "fi" in peers:
        from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose as fi
        for kind, state in (("float", h.mT.contiguous()), ("bf16", h.mT.bfloat16().contiguous())):
            o = torch.empty_like(v)
            calls["fi " + kind] = lambda state=state, o=o: (
                fi(q, k, v, None, A_log, a, dt_bias, b, scale=128**-0.5, output=o, use_qk_l2norm=True,
                   initial_state=state, initial_state_indices=slots, backend="flashinfer")[0], state.mT)
    return calls


# ---- agreement ------------------------------------------------------------------------------------------------------

def loop(d, dtype=torch.float32):
    """The rule and its gradients, one token at a time, by autograd."""
    leaves = [d[n].to(dtype, copy=True).requires_grad_() for n in ("q", "k", "v", "g", "beta", "h0")]
    q, k, v, g, beta, h0 = leaves
    repeat = lambda t: t.repeat_interleave(v.shape[1] // t.shape[1], 1)
    q, k, decay, outputs, finals, t = repeat(q) * d["scale"], repeat(k), g.exp(), [], [], 0
    for n, length in enumerate(d["lengths"]):
        S = h0[n]
        for t in range(t, t + length):
            S = S * decay[t, :, None, None]
            u = (v[t] - torch.einsum("hkv,hk->hv", S, k[t])) * beta[t, :, None]
            S = S + k[t, :, :, None] * u[:, None, :]
            outputs.append(torch.einsum("hkv,hk->hv", S, q[t]))
        t += 1
        finals.append(S)
    o, ht = torch.stack(outputs), torch.stack(finals)
    gradients = torch.autograd.grad((o, ht), [leaves[i] for i in (0, 1, 2, 4, 3, 5)],
                                    [d[n].to(dtype) for n in ("do", "dht")])
    return (o.detach(), ht.detach()), gradients


TENSORS = ("o", "ht"), ("dq", "dk", "dv", "dbeta", "dg", "dh0")


def difference(a, b):
    b = b.double()
    return ((a.double().reshape(b.shape) - b).norm() / b.norm()).item()


def checked(kind, heads, lengths, peer, against, errors):
    row = dict(part="check", kind=kind, heads=heads, lengths=lengths, peer=peer, against=against, errors=errors,
               agree=all(e < LIMIT for e in errors.values()))
    print(json.dumps(row), flush=True)
    return row


def part_check(gdn, peers, _):
    sets = [(2, 8, [300, 129, 64]), (16, 32, [2000, 1111, 3000, 77]), (4, 8, [8192])]
    for hk, hv, lengths in sets:
        d = data(lengths, hk, hv)
        small = sum(lengths) < 1000
        truth = dict(zip(("forward", "backward"), loop(d))) if small else {}
        for kind, make, tensors in zip(("forward", "backward"), (forward_calls, backward_calls), TENSORS):
            calls = make(gdn, peers, d)
            results = {n: [t.clone() for t in f()] for n, f in calls.items()}
            reference = truth.get(kind) or results.get("fla") or results["gdn"]
            against = "loop in fp32" if small else "FLA" if "fla" in results else "gdn"
            for name, r in results.items():
                if not small and NAMES[name] == against:
                    continue
                errors = {t: difference(a, b) for t, a, b in zip(tensors, r, reference)}
                yield checked(kind, f"{hk},{hv}", lengths, name, against, errors)
    for name, f in decode_calls(gdn, peers, 16, 32, 3).items():  # gdn's is the reference
        o, h = [t.clone() for t in f()][:2]
        if name == "gdn float":
            want = o, h
        elif "float" in name:
            errors = {t: difference(a, b) for t, a, b in zip(("o", "state"), (o, h), want)}
            yield checked("decode", "16,32", [1, 1, 1], name.split()[0], "gdn", errors)


def hostile(name, d):
    """The random inputs with some made hostile."""
    d, g, beta = dict(d), d["g"], d["beta"]
    if "no decay" in name:
        d["g"] = torch.zeros_like(g)
    if "strong decay" in name:
        d["g"] = -5 - 15 * torch.rand_like(g)
    if "resets" in name:
        d["g"] = torch.where(torch.rand_like(g) < 1 / 64, -20.0, 0.0)
    if "keys alike" in name:  # cosine of any two about 0.9
        for x in ("q", "k"):
            d[x] = F.normalize(3 * F.normalize(torch.randn_like(d[x][:1].float()), dim=-1) +
                               F.normalize(d[x].float(), dim=-1), dim=-1).bfloat16()
    if "beta 0 or 1" in name:
        d["beta"] = (beta > 0.5).to(beta.dtype)
    if "beta 1" in name:
        d["beta"] = torch.ones_like(beta)
    return d


def part_errors(gdn, peers, _):
    """Relative rms errors of everyone against the loop in fp64, on the same inputs."""
    for name in ("random", "no decay", "strong decay", "resets", "keys alike", "beta 0 or 1",
                 "beta 0 or 1, no decay, keys alike", "beta 1, no decay, keys alike"):
        d = hostile(name, data([700, 300, 65, 1], 16, 32))
        truth = loop(d, torch.float64)
        row = dict(part="errors", set=name)
        for make, tensors, want in zip((forward_calls, backward_calls), TENSORS, truth):
            for who, call in make(gdn, peers, d).items():
                row.setdefault(who, {}).update({t: difference(a, b) for t, a, b in zip(tensors, call(), want)})
        print(json.dumps(row), flush=True)
        del truth
        torch.cuda.empty_cache()
        yield row


# ---- time -----------------------------------------------------------------------------------------------------------

def milliseconds(call, replays=20):
    if WARM:
        call()
        torch.cuda.synchronize()
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles and tunes
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(64 << 20, dtype=torch.float32, device=DEV)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once():
        flush.zero_()
        flush.max()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    warm = 0.0
    while warm < 30:
        warm += once() + 0.2
    return statistics.median(once() for _ in range(replays))


def measure(row, calls):
    for name, call in calls.items():
        if WARM and name.startswith("gdn"):
            continue
        try:
            row[name] = milliseconds(call)
        except Exception as e:
            if "CUDA error" in repr(e) or "illegal" in repr(e):
                raise
            row[name] = None
            print(f"{row}: {name}: {e!r}"[:300], flush=True)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return row


def part_forward(gdn, peers, heads, kind="forward", make=forward_calls, all_heads=FORWARD_HEADS, sets=FORWARD):
    for hk, hv in heads or all_heads:
        for name, lengths in sets.items():
            if WARM and name not in ("1x32768", "2048x4", "1024x8"):
                continue
            if "fla" in peers and name in ("1x32768", "8192x4", "2048x4") and not WARM:
                tune_again()
            yield measure(dict(part=kind, heads=f"{hk},{hv}", set=name), make(gdn, peers, data(lengths, hk, hv)))


def part_backward(gdn, peers, heads):
    return part_forward(gdn, peers, heads, "backward", backward_calls, BACKWARD_HEADS, BACKWARD)


def part_decode(gdn, peers, heads):
    for hk, hv in heads or DECODE_HEADS:
        for batch in BATCHES:
            yield measure(dict(part="decode", heads=f"{hk},{hv}", batch=batch), decode_calls(gdn, peers, hk, hv, batch))


# ---- tables ---------------------------------------------------------------------------------------------------------

def table(head, rows):
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def cell(x, digits=3):
    return "-" if x is None else f"{x:.{digits}f}"


def report(info, rows):
    """The tables as they stand in docs/performance.md."""
    out, errors = [info], []
    titles = {"forward": "Forward, ms (gdn: with its preparation of the chunks)", "backward": "Backward, ms",
              "decode": "Decode, one token per sequence, µs (FLA writes new states in float, whatever it reads)"}
    for part, title in titles.items():
        mine = [r for r in rows if r["part"] == part]
        if not mine:
            continue
        names = [n for n in mine[0] if n not in ("part", "heads", "set", "batch")]
        peers = [n for n in names if not n.startswith("gdn")]
        shown = lambda n: " ".join([NAMES[n.split()[0]], *n.split()[1:]])
        ratio = [(p, "gdn" + p[len(p.split()[0]):]) for p in peers]
        unit, digits = (1000, 1) if part == "decode" else (1, 3)
        body = [[r["heads"], str(r.get("set", r.get("batch"))),
                 *[cell(None if r[n] is None else r[n] * unit, digits) for n in names],
                 *[cell(r[p] / r[g] if r[p] and r[g] else None, 2) for p, g in ratio]] for r in mine]
        head = ["Hk,Hv", "batch" if part == "decode" else "sequences", *map(shown, names),
                *[f"{shown(p)} / gdn" for p, _ in ratio]]
        out.append(f"#### {title}\n\n{table(head, body)}")
    for row in (r for r in rows if r["part"] == "errors"):
        fla = row.get("fla", {})
        for who, mine in ((w, row[w]) for w in NAMES if w in row):
            larger = [f"{t} {e / fla[t]:.2f}" for t, e in mine.items() if t in fla and not e <= fla[t]]
            errors.append([row["set"], NAMES[who], *[cell(mine.get(t), 5) for t in sum(TENSORS, ())],
                           ", ".join(larger) or "none"])
    if errors:
        out.append("#### Relative rms errors against the recurrence in fp64, 16,32 heads, 1066 tokens\n\n" +
                   table(["inputs", "who", *TENSORS[0], *TENSORS[1], "times FLA's, where larger"], errors))
    checks = [r for r in rows if r["part"] == "check"]
    if checks:
        body = [[f"{r['kind']} {r['heads']} {r['lengths']}", NAMES[r["peer"]], r["against"],
                 ", ".join(f"{t} {e:.4f}" for t, e in r["errors"].items()), "yes" if r["agree"] else "NO"]
                for r in checks]
        out.append("#### Agreement before timing, relative rms differences\n\n" +
                   table(["case", "who", "against", "differences", f"all under {LIMIT}"], body))
    return "\n\n".join(out) + "\n"


def write_table(path, text):
    """Replaces what stands between the marks in the file."""
    begin, end = "<!-- peers.py begin -->", "<!-- peers.py end -->"
    old = open(path).read()
    if begin not in old or end not in old:
        sys.exit(f"{path} has no '{begin}' and '{end}'")
    new = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{text}{end}", old, flags=re.S)
    open(path, "w").write(new)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("parts", nargs="+", help="check, errors, forward, backward or decode; forward:16x32,2x8")
    parser.add_argument("--without", default="", help="peers to leave out, such as fi,qla")
    parser.add_argument("--warm", action="store_true",
                        help="time nothing: fill the compilers' caches on disk (several processes may do so at once)")
    parser.add_argument("--json", help="where the rows go")
    parser.add_argument("--table", help="the file whose table is replaced")
    a = parser.parse_args()
    global WARM
    WARM = a.warm
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and writes what there is
    parts = [p.partition(":") for p in a.parts]
    for name, _, _ in parts:
        if "part_" + name not in globals():
            parser.error(f"no part is called {name}")
    gdn = Gdn(a.library)
    peers = {n: p for n, p in load_peers().items() if n not in a.without.split(",")}
    version = lambda m: f"{m} {getattr(sys.modules[m], '__version__', '')}" if m in sys.modules else None
    modules = filter(None, map(version, ("torch", "triton", "fla", "flash_qla", "tilelang", "flashinfer")))
    info = f"{torch.cuda.get_device_name()}; {', '.join(modules)}."
    print(info, flush=True)
    rows = []
    try:
        for name, _, heads in parts:
            heads = [tuple(map(int, h.split("x"))) for h in heads.split(",")] if heads else None
            for row in globals()["part_" + name](gdn, peers, heads):
                rows.append(row)
                torch.cuda.empty_cache()
    finally:
        if a.json:
            json.dump(rows, open(a.json, "w"), indent=0)
        text = report(info, rows)
        print(text)
    if a.table:
        write_table(a.table, text)
    if not all(r.get("agree", True) for r in rows):
        sys.exit("not all agree")


if __name__ == "__main__":
    main()
