#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes layer bundles: one Gated DeltaNet layer, its input, and what another implementation computed from them.

The peer is transformers' own `Qwen3_5GatedDeltaNet` (split weights) or `Qwen3NextGatedDeltaNet` (interleaved weights)
in fp32 on the CPU. Its PyTorch fallback knows no document boundaries, so each document runs through the module on its
own, all in one autograd graph. `--check` recomputes each bundle with a token recurrence in fp64 that shares no formula
with the module's chunks, and `--peer oracle` writes that recurrence's own values, in F64.

  make_bundles.py                          the samples of tests/data
  make_bundles.py --random 40 --out DIR    random layers, sizes and features
  make_bundles.py --real --out DIR         one layer of published size
  make_bundles.py --hostile DIR            broken bundles, and cases.json: file, options, exit code, word in the message
  make_bundles.py --check FILE...          worst rms(error)/rms(exact) per tensor

Requires Python 3.11 with torch==2.8.0, transformers==5.23.0, safetensors==0.8.0, numpy==2.4.6. Fast kernels (packages
fla, causal_conv1d, kernels) must not be importable: they would replace it. Same versions and seed, same bytes.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import random
import struct
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PREFIX = "linear_attn."
SPLIT = ["in_proj_qkv.weight", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight"]
INTERLEAVED = ["in_proj_qkvz.weight", "in_proj_ba.weight"]
SHARED = ["conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight"]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}


# ---------------------------------------------------------------------------------------------------------------- files


def to_bytes(x):
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def layout_of(tensors, metadata):
    """The header object and the data of a safetensors file, widest dtype first so that every tensor is aligned."""
    header, data = {"__metadata__": dict(sorted(metadata.items()))}, bytearray()
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        x = tensors[name]
        begin = len(data)
        data += to_bytes(x)
        header[name] = {"dtype": DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, len(data)]}
    return header, bytes(data)


def file_bytes(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write_bundle(path, config, peer, tensors):
    metadata = {"config": json.dumps(config), "peer": peer}
    Path(path).write_bytes(file_bytes(*layout_of(tensors, metadata)))


def read_bundle(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        metadata = f.metadata()
        return json.loads(metadata["config"]), metadata["peer"], {name: f.get_tensor(name) for name in f.keys()}


# ------------------------------------------------------------------------------------------------------------ documents


def documents(t):
    """[(row, positions)] in the order of the state tensors; positions are token indices within the row."""
    b, s, _ = t["hidden_states"].shape
    if "cu_seqlens" in t:
        cu = t["cu_seqlens"].tolist()
        return [(0, torch.arange(lo, hi)) for lo, hi in zip(cu, cu[1:])]
    if "attention_mask" not in t:
        return [(row, torch.arange(s)) for row in range(b)]
    mask = t["attention_mask"].long()
    if int(mask.max()) <= 1:  # one document per row, empty where the row is padding only
        return [(row, torch.nonzero(mask[row]).flatten()) for row in range(b)]
    return [
        (row, torch.nonzero(mask[row] == i).flatten()) for row in range(b) for i in mask[row].unique().tolist() if i > 0
    ]


def parameter_names(t):
    return [n for n in SPLIT + INTERLEAVED + SHARED if PREFIX + n in t]


def finish(t, dtype, hidden, parameters, initial, initial_conv, docs, outputs, convs, states):
    """The expected tensors of prefill and backward, from what each document gave."""
    b, s, hid = hidden.shape
    n = len(docs)
    rows = torch.cat([row * s + index for row, index in docs])
    output = torch.zeros(b * s, hid, dtype=dtype).index_copy(0, rows, torch.cat(outputs)).reshape(b, s, hid)
    conv_state, state = torch.stack(convs), torch.stack(states)
    expected = {"output": output, "conv_state": conv_state, "recurrent_state": state}
    if "grad_output" in t:
        leaves = {"hidden_states": hidden} | {PREFIX + k: v for k, v in parameters.items()}
        if "initial_state" in t:
            leaves["initial_state"] = initial
        if "initial_conv_state" in t:
            leaves["initial_conv_state"] = initial_conv
        valid = torch.zeros(b * s, dtype=torch.bool).index_fill(0, rows, True).reshape(b, s, 1)
        arriving = [torch.where(valid, t["grad_output"].to(dtype), 0)]
        arriving.append(t["grad_conv_state"].to(dtype) if "grad_conv_state" in t else torch.zeros_like(conv_state))
        arriving.append(t["grad_recurrent_state"].to(dtype) if "grad_recurrent_state" in t else torch.zeros_like(state))
        grads = torch.autograd.grad([output, conv_state, state], list(leaves.values()), arriving, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads):
            expected["grad." + name] = torch.zeros_like(leaf) if grad is None else grad
    assert conv_state.shape[0] == n
    return {"expected." + k: v.detach() for k, v in expected.items()}


# --------------------------------------------------------------------------------------------------- peer: transformers


class StateCache:
    """The part of transformers' cache that the layer talks to, without in-place copies: gradients reach the states."""

    def __init__(self, conv, state, width, decoding=False):
        self.conv, self.state, self.width, self.decoding = conv, state, width, decoding

    def get_conv_state(self, layer, state_idx=0):
        return self.conv

    def get_recurrent_state(self, layer, state_idx=0):
        return self.state

    def is_recording_past(self, layer):  # True keeps the layer off the in-place single-token path
        return not self.decoding

    def update_conv_state(self, new, layer, **kwargs):
        full = new if self.conv is None else torch.cat([self.conv, new], -1)
        full = F.pad(full, (max(0, self.width - full.shape[-1]), 0))
        self.conv = full[..., full.shape[-1] - self.width :]
        return full

    def update_recurrent_state(self, new, layer):
        self.state = new


def transformers_module(config, t):
    for package in ("fla", "causal_conv1d", "kernels"):
        assert (
            importlib.util.find_spec(package) is None
        ), f"{package} is importable and would replace the PyTorch fallback"
    import transformers

    transformers.logging.set_verbosity_error()
    settings = dict(config, num_hidden_layers=1, layer_types=["linear_attention"])
    if PREFIX + INTERLEAVED[0] in t:
        from transformers.models.qwen3_next import modeling_qwen3_next as m

        module = m.Qwen3NextGatedDeltaNet(transformers.Qwen3NextConfig(**settings), 0)
    else:
        from transformers.models.qwen3_5 import modeling_qwen3_5 as m

        module = m.Qwen3_5GatedDeltaNet(m.Qwen3_5TextConfig(**settings), 0)
    module.load_state_dict({n: t[PREFIX + n].float() for n in parameter_names(t)}, strict=True)
    torch_version = torch.__version__.split("+")[0]
    return module, f"transformers {transformers.__version__} {type(module).__name__} (fp32, CPU, torch {torch_version})"


def transformers_peer(config, t):
    module, peer = transformers_module(config, t)
    hv, k, v, w = (
        config[x]
        for x in ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim")
    )
    dc = 2 * config["linear_num_key_heads"] * k + hv * v
    docs = documents(t)
    n = len(docs)
    hidden = t["hidden_states"].float().requires_grad_()
    carried = "initial_state" in t or "initial_conv_state" in t
    state0 = t.get("initial_state", torch.zeros(n, hv, k, v)).float().requires_grad_()
    conv0 = t.get("initial_conv_state", torch.zeros(n, dc, w)).float().requires_grad_()

    outputs, convs, states = [], [], []
    # Rows without padding go through the module as one batch, the way a model runs it; the rest document by document.
    batches = [range(n)] if "attention_mask" not in t and "cu_seqlens" not in t else [[i] for i in range(n)]
    for batch in batches:
        batch = list(batch)
        x = torch.stack([hidden[docs[i][0], docs[i][1]] for i in batch])
        if x.shape[1] == 0:
            y, conv, state = x, conv0[batch], state0[batch]
        else:
            cache = StateCache(conv0[batch] if carried else None, state0[batch] if carried else None, w)
            y = module(x, cache_params=cache)
            conv, state = cache.conv, cache.state
        outputs += list(y)
        convs += list(conv)
        states += list(state)

    parameters = {name: p for name, p in module.named_parameters()}
    assert sorted(parameters) == sorted(parameter_names(t))
    expected = finish(t, torch.float32, hidden, parameters, state0, conv0, docs, outputs, convs, states)

    mask = t.get("attention_mask")
    with torch.no_grad():
        if mask is not None and not carried and int(mask.max()) <= 1 and bool(hidden.isfinite().all()):
            plain = module(hidden, attention_mask=mask.float())  # with one document per row, the mask itself must agree
            assert (plain - expected["expected.output"]).abs().max() < 1e-4
        if "decode.hidden_states" in t:
            cache = StateCache(
                expected["expected.conv_state"].clone(), expected["expected.recurrent_state"], w, decoding=True
            )
            tokens = t["decode.hidden_states"].float().split(1, 1)
            expected["expected.decode.output"] = torch.cat([module(x, cache_params=cache) for x in tokens], 1)
            expected["expected.decode.conv_state"] = cache.conv
            expected["expected.decode.recurrent_state"] = cache.state
    return expected, peer


# ----------------------------------------------------------------------------------------- peer: token recurrence, fp64


def recur(q, k, v, g, beta, state):
    """Per token S~ = e^g S, delta = beta (v - S~^T k), S' = S~ + k delta^T, o = S'^T q; q [n, H, K], S [H, K, V]."""
    outputs = []
    for t in range(q.shape[0]):
        decayed = g[t].exp()[:, None, None] * state
        delta = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", decayed, k[t]))
        state = decayed + k[t][:, :, None] * delta[:, None, :]
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outputs), state


def oracle_document(config, p, x, conv, state):
    """x [n, hid], conv [Dc, W], state [Hv, K, V] -> output [n, hid] and both states after the last token."""
    hk, hv, dk, dv, w = (
        config["linear_" + s]
        for s in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    )
    n, r = x.shape[0], hv // hk
    if n == 0:
        return x, conv, state
    if "in_proj_qkv.weight" in p:
        qkv, z, b, a = (x @ p[name].T for name in SPLIT)
    else:  # group h of qkvz holds q (K), k (K), v (R V), z (R V); of ba: b (R), a (R)
        h = torch.arange(hk)[:, None] * (2 * dk + 2 * r * dv)
        q_rows, k_rows = h + torch.arange(dk), h + dk + torch.arange(dk)
        v_rows, z_rows = h + 2 * dk + torch.arange(r * dv), h + 2 * dk + r * dv + torch.arange(r * dv)
        qkvz, ba = x @ p["in_proj_qkvz.weight"].T, x @ p["in_proj_ba.weight"].T
        qkv, z = qkvz[:, torch.cat([q_rows.flatten(), k_rows.flatten(), v_rows.flatten()])], qkvz[:, z_rows.flatten()]
        b_rows = (torch.arange(hk)[:, None] * 2 * r + torch.arange(r)).flatten()
        b, a = ba[:, b_rows], ba[:, b_rows + r]
    past = torch.cat([conv.T, qkv])  # token t stands at row W + t
    taps = p["conv1d.weight"][:, 0]  # [Dc, W], the last one meets the current token
    mixed = sum(taps[:, j] * past[1 + j : 1 + j + n] for j in range(w))
    mixed = mixed / (1 + torch.exp(-mixed))
    q = mixed[:, : hk * dk].reshape(n, hk, 1, dk).expand(n, hk, r, dk).reshape(n, hv, dk)
    k = mixed[:, hk * dk : 2 * hk * dk].reshape(n, hk, 1, dk).expand(n, hk, r, dk).reshape(n, hv, dk)
    v = mixed[:, 2 * hk * dk :].reshape(n, hv, dv)
    q = q / torch.sqrt(torch.sum(q * q, -1, keepdim=True) + 1e-6) / math.sqrt(dk)
    k = k / torch.sqrt(torch.sum(k * k, -1, keepdim=True) + 1e-6)
    beta = 1 / (1 + torch.exp(-b))
    g = -torch.exp(p["A_log"]) * torch.logaddexp(a + p["dt_bias"], torch.zeros((), dtype=a.dtype))
    pieces = []
    for lo in range(0, n, 32):
        piece = [y[lo : lo + 32] for y in (q, k, v, g, beta)]
        large = n * state.numel() > 20_000_000  # then keep only the states between pieces
        o, state = checkpoint(recur, *piece, state, use_reentrant=False) if large else recur(*piece, state)
        pieces.append(o)
    o = torch.cat(pieces)
    o = o / torch.sqrt(torch.mean(o * o, -1, keepdim=True) + config["rms_norm_eps"])
    z = z.reshape(n, hv, dv)
    y = p["norm.weight"] * o * z / (1 + torch.exp(-z))
    return y.reshape(n, hv * dv) @ p["out_proj.weight"].T, past[n:].T, state


def oracle_peer(config, t):
    hk, hv, k, v, w = (
        config["linear_" + s]
        for s in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    )
    docs = documents(t)
    n = len(docs)
    parameters = {name: t[PREFIX + name].double().requires_grad_() for name in parameter_names(t)}
    hidden = t["hidden_states"].double().requires_grad_()
    state0 = t.get("initial_state", torch.zeros(n, hv, k, v)).double().requires_grad_()
    conv0 = t.get("initial_conv_state", torch.zeros(n, 2 * hk * k + hv * v, w)).double().requires_grad_()
    results = [
        oracle_document(config, parameters, hidden[row, index], conv0[i], state0[i])
        for i, (row, index) in enumerate(docs)
    ]
    expected = finish(t, torch.float64, hidden, parameters, state0, conv0, docs, *map(list, zip(*results)))
    with torch.no_grad():
        if "decode.hidden_states" in t:
            after = [
                oracle_document(config, parameters, x, conv, state)
                for x, conv, state in zip(
                    t["decode.hidden_states"].double(),
                    expected["expected.conv_state"],
                    expected["expected.recurrent_state"],
                )
            ]
            for name, parts in zip(("output", "conv_state", "recurrent_state"), zip(*after)):
                expected["expected.decode." + name] = torch.stack(parts)
    return expected, "fp64 token recurrence"


PEERS = {"transformers": transformers_peer, "oracle": oracle_peer}


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclasses.dataclass
class Case:
    name: str
    seed: int
    layout: str = "split"  # or "interleaved"
    batch: int = 2
    tokens: int = 96
    hidden: int = 64
    key_heads: int = 2
    ratio: int = 2
    key_dim: int = 32
    value_dim: int = 32
    width: int = 4
    mask: list | None = None  # rows of [(id, length)], id 0 is padding
    cu_seqlens: list | None = None
    seq_index: object = None  # list of lists, or a number of ranks for a random permutation
    initial: str = ""  # any of "s" (recurrent state) and "c" (conv state)
    grad: str = "o"  # any of "o" (output), "s" and "c" (final states)
    decode: int = 0
    act: str = "silu"
    eps: float = 1e-6
    dtype: str = "F32"  # of weights and activations in the file
    integers: str = "I64"
    padding: str = "garbage"  # or "nan", "zero": what padding rows hold


def inverse_softplus(x):
    return x + torch.log(-torch.expm1(-x))


def make_inputs(case, exact):
    """config and all tensors but expected.*; values in fp64 if exact, else such that fp32 holds them."""
    gen = torch.Generator().manual_seed(case.seed)
    hk, hv, k, v, w, hid = (
        case.key_heads,
        case.key_heads * case.ratio,
        case.key_dim,
        case.value_dim,
        case.width,
        case.hidden,
    )
    b, s, dc, e = case.batch, case.tokens, 2 * hk * k + hv * v, hv * v
    normal = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    uniform = lambda lo, hi, n: lo + (hi - lo) * torch.rand(n, generator=gen, dtype=torch.float64)
    weight = lambda *shape: normal(*shape) / math.sqrt(shape[-1])
    narrow = lambda x: x if exact else x.to(DTYPES[case.dtype])
    single = lambda x: x if exact else x.float()
    integer = lambda x: torch.as_tensor(x).to(DTYPES[case.integers])

    t = {}
    if case.layout == "split":
        t |= {
            "in_proj_qkv.weight": weight(dc, hid),
            "in_proj_z.weight": weight(e, hid),
            "in_proj_b.weight": weight(hv, hid),
            "in_proj_a.weight": weight(hv, hid),
        }
    else:
        t |= {"in_proj_qkvz.weight": weight(dc + e, hid), "in_proj_ba.weight": weight(2 * hv, hid)}
    t |= {"conv1d.weight": weight(dc, 1, w), "out_proj.weight": weight(hid, e)}
    t = {PREFIX + name: narrow(x) for name, x in t.items()}
    # Trained layers mix slow heads (dt of 1e-3 … 0.1) with fast ones (a bias near 1); the first head is always slow.
    slow = inverse_softplus(torch.exp(uniform(math.log(1e-3), math.log(0.1), hv)))
    fast = 1 + 0.5 * normal(hv)
    pick = torch.rand(hv, generator=gen) < 0.3
    pick[0] = False
    t[PREFIX + "A_log"] = single(torch.log(uniform(0.01, 16, hv)))
    t[PREFIX + "dt_bias"] = single(torch.where(pick, fast, slow))
    t[PREFIX + "norm.weight"] = single(1 + 0.2 * normal(v))
    t["hidden_states"] = normal(b, s, hid)
    if case.mask is not None:
        t["attention_mask"] = integer([[i for i, n in row for _ in range(n)] for row in case.mask])
    if case.cu_seqlens is not None:
        t["cu_seqlens"] = integer(case.cu_seqlens)
    if case.seq_index is not None:
        index = case.seq_index
        t["seq_index"] = integer(
            torch.randperm(s, generator=gen).reshape(index, -1) if isinstance(index, int) else index
        )
    n = len(documents(t))
    if "s" in case.initial:
        t["initial_state"] = single(0.3 * normal(n, hv, k, v))
    if "c" in case.initial:
        t["initial_conv_state"] = single(normal(n, dc, w))
    if case.grad:
        t["grad_output"] = normal(b, s, hid)
    if "s" in case.grad:
        t["grad_recurrent_state"] = single(normal(n, hv, k, v))
    if "c" in case.grad:
        t["grad_conv_state"] = single(normal(n, dc, w))
    if case.decode:
        t["decode.hidden_states"] = normal(b, case.decode, hid)
    if case.mask is not None:
        padding = t["attention_mask"] == 0
        for name in ("hidden_states", "grad_output"):
            if name in t:
                t[name][padding] *= {"garbage": 50, "nan": math.nan, "zero": 0}[case.padding]
    for name in ("hidden_states", "grad_output", "decode.hidden_states"):
        if name in t:
            t[name] = narrow(t[name])
    config = {
        "hidden_size": hid,
        "linear_num_key_heads": hk,
        "linear_num_value_heads": hv,
        "linear_key_head_dim": k,
        "linear_value_head_dim": v,
        "linear_conv_kernel_dim": w,
        "rms_norm_eps": case.eps,
        "hidden_act": case.act,
        "mamba_ssm_dtype": "float32",
    }
    return config, t


SAMPLES = [
    Case("qwen3_5_plain", 1),
    Case(
        "qwen3_5_packed_padded",
        2,
        key_dim=16,
        value_dim=24,
        mask=[[(1, 32), (2, 48), (0, 16)], [(1, 16), (2, 64), (3, 16)]],
        grad="osc",
    ),
    Case(
        "qwen3_5_packed_full",
        3,
        batch=1,
        tokens=192,
        key_dim=16,
        value_dim=16,
        cu_seqlens=[0, 48, 48, 144, 192],
        integers="I32",
        initial="sc",
        grad="osc",
    ),
    Case(
        "qwen3_5_packed_ragged",
        4,
        hidden=48,
        key_dim=16,
        value_dim=16,
        grad="osc",
        initial="sc",
        integers="I32",
        padding="nan",
        mask=[[(0, 3), (1, 1), (3, 2), (4, 37), (0, 4), (7, 3), (9, 46)], [(1, 65), (2, 5), (5, 24), (0, 2)]],
    ),
    Case("qwen3_5_cached_decode", 5, tokens=48, key_dim=32, value_dim=16, initial="sc", grad="osc", decode=8),
    Case("qwen3_5_short_prompt", 6, tokens=2, key_dim=16, value_dim=16, initial="sc", grad="osc", decode=6),
    Case("qwen3_5_ratio1", 7, key_heads=3, ratio=1, key_dim=16, value_dim=16, hidden=48),
    Case("qwen3_5_ratio3", 8, ratio=3, key_dim=16, value_dim=24, hidden=48),
    Case("qwen3_5_ratio4", 9, key_heads=1, ratio=4, key_dim=32, value_dim=16, width=3, hidden=48, decode=4),
    Case("qwen3_5_width1", 10, batch=1, key_dim=8, value_dim=8, width=1, hidden=32, initial="sc", grad="osc", decode=3),
    Case(
        "qwen3_5_right_padding",
        11,
        key_dim=16,
        value_dim=16,
        mask=[[(1, 96)], [(1, 71), (0, 25)]],
        grad="osc",
        decode=4,
    ),
    Case(
        "qwen3_5_seq_index_even_odd",
        12,
        batch=1,
        key_dim=16,
        value_dim=16,
        initial="sc",
        seq_index=[list(range(0, 96, 2)), list(range(1, 96, 2))],
    ),
    Case(
        "qwen3_5_seq_index_permuted",
        13,
        key_dim=16,
        value_dim=16,
        seq_index=4,
        mask=[[(1, 40), (2, 50), (0, 6)], [(1, 96)]],
    ),
    Case(
        "qwen3_5_odd",
        14,
        batch=3,
        tokens=37,
        hidden=20,
        key_heads=1,
        ratio=3,
        key_dim=7,
        value_dim=5,
        width=2,
        act="swish",
        eps=1e-5,
        decode=2,
    ),
    Case("qwen3_5_bf16_weights", 15, batch=1, tokens=48, dtype="BF16", decode=4),
    Case("qwen3_next_ratio2", 16, layout="interleaved", hidden=48, key_dim=16, value_dim=32),
    Case(
        "qwen3_next_packed",
        17,
        layout="interleaved",
        hidden=48,
        ratio=3,
        key_dim=16,
        value_dim=16,
        initial="sc",
        grad="osc",
        mask=[[(1, 48), (2, 48)], [(1, 96)]],
    ),
    Case(
        "qwen3_next_left_padding",
        18,
        layout="interleaved",
        tokens=48,
        key_dim=16,
        value_dim=8,
        mask=[[(0, 11), (1, 37)], [(1, 48)]],
        decode=5,
    ),
]
EXACT_SAMPLES = [  # written with the fp64 recurrence as the peer
    Case("exact_split", 19, tokens=48, hidden=32, key_dim=16, value_dim=16, initial="sc", grad="osc", decode=4),
    Case(
        "exact_interleaved_packed",
        20,
        layout="interleaved",
        batch=1,
        hidden=32,
        key_dim=8,
        value_dim=16,
        cu_seqlens=[0, 48, 49, 96],
        initial="sc",
        grad="osc",
    ),
]
REAL = Case(
    "qwen3_5_real",
    21,
    batch=1,
    tokens=512,
    hidden=2048,
    key_heads=16,
    key_dim=128,
    value_dim=128,
    initial="sc",
    grad="osc",
    decode=4,
)


def cut(rng, total, pieces):
    cuts = sorted(rng.randint(0, total) for _ in range(pieces - 1))
    return [hi - lo for lo, hi in zip([0] + cuts, cuts + [total])]


def random_case(i, seed, head_sizes):
    rng = random.Random(f"{seed}/{i}")
    case = Case(f"random_{i:03}", rng.getrandbits(40), layout=rng.choice(["split", "interleaved"]))
    case.batch = rng.choice([1, 1, 2, 2, 3])
    case.tokens = rng.choice([1, 2, 3, 5, 7, 16, 24, 31, 48, 64, 65, 96, 100, 127, 144, 192, 200])
    case.hidden = rng.choice([5, 16, 24, 32, 50, 64])
    case.key_heads, case.ratio, case.width = (
        rng.choice([1, 1, 2, 3, 4]),
        rng.choice([1, 2, 3, 4, 5]),
        rng.choice([1, 2, 3, 4, 4, 4, 5, 7]),
    )
    case.key_dim, case.value_dim = (rng.choice(head_sizes) for _ in range(2))
    case.integers, case.padding = rng.choice(["I64", "I32"]), rng.choice(["garbage", "garbage", "nan", "zero"])
    case.dtype = rng.choice(["F32", "F32", "F32", "F64", "BF16", "F16"])
    case.act, case.eps = rng.choice(["silu", "silu", "swish"]), rng.choice([1e-6, 1e-6, 1e-5, 1e-3])
    case.initial = rng.choice(["", "", "s", "c", "sc", "sc"])
    case.grad = rng.choice(["", "o", "o", "os", "oc", "osc", "osc"])
    packing = rng.choice(["none", "none", "mask", "indexed", "indexed", "cu"])
    s = case.tokens
    if packing == "mask":
        case.mask = []
        for _ in range(case.batch):
            left, valid, right = cut(rng, s, 3)
            case.mask.append([(0, left), (1, valid), (0, right)])
    elif packing == "indexed":
        case.mask = []
        for _ in range(case.batch):
            row, doc = [], 0
            for n in cut(rng, s, rng.randint(1, 7)):
                doc += rng.choice([1, 1, 1, 2, 5])
                row.append((0 if rng.random() < 0.2 else doc, n))
            case.mask.append(row)
        if rng.random() < 0.15:
            case.mask[-1] = [(0, s)]
    elif packing == "cu":
        case.batch, pieces = 1, cut(rng, s, rng.randint(1, 8))
        case.cu_seqlens = [sum(pieces[:j]) for j in range(len(pieces) + 1)]
    ranks = [p for p in range(1, 17) if s % p == 0]
    if rng.random() < 0.25:
        case.seq_index = rng.choice(ranks)
    if rng.random() < 0.5:
        probe = {"hidden_states": torch.empty(case.batch, s, 1)}
        if case.mask is not None:
            probe["attention_mask"] = torch.tensor([[d for d, n in row for _ in range(n)] for row in case.mask])
        if case.cu_seqlens is not None:
            probe["cu_seqlens"] = torch.tensor(case.cu_seqlens)
        if len(documents(probe)) == case.batch:
            case.decode = rng.choice([1, 2, 3, 9])
    return case


# ---------------------------------------------------------------------------------------------------------------- check


def errors(got, exact):
    """rms(error)/rms(exact) per tensor; 0 only for equal tensors, infinite for NaN or if exact is all 0."""
    ratios = {}
    for name, x in exact.items():
        assert got[name].shape == x.shape, f"{name} has shape {list(got[name].shape)}, not {list(x.shape)}"
        error, size = ((y.square().mean().sqrt().item() if y.numel() else 0.0) for y in (got[name].double() - x, x))
        ratios[name] = error / size if size and math.isfinite(error) else math.inf if error else 0.0
    return ratios


def check(path):
    config, _, t = read_bundle(path)
    exact, _ = oracle_peer(config, t)
    assert sorted(exact) == sorted(
        n for n in t if n.startswith("expected.")
    ), f"{path}: not the expected tensors that its input asks for"
    return errors(t, exact)


def produce(case, folder, peer, limit):
    """Writes one bundle. In fp32 some gradients (of A_log and dt_bias above all) cancel, at times more than a comparison
    bears: then the values are drawn again, until the module and the exact recurrence agree."""
    path = Path(folder) / f"{case.name}.safetensors"
    for attempt in range(50):
        config, t = make_inputs(dataclasses.replace(case, seed=case.seed + 1000 * attempt), exact=peer == "oracle")
        expected, who = PEERS[peer](config, t)
        write_bundle(path, config, who, t | expected)
        ratios = check(path) if peer != "oracle" else errors(transformers_peer(config, t)[0], expected)
        if max(ratios.values()) <= limit:
            return path
        print(
            f"{case.name}: drawn again, transformers is off by",
            ", ".join(f"{r:.1e} in {n}" for n, r in ratios.items() if not r <= limit),
        )
    raise SystemExit(f"{case.name}: fp32 and fp64 never agree")


# -------------------------------------------------------------------------------------------------------------- hostile


class Hostile:
    """A folder of bundles that break one rule each. Most are a sound bundle with one change."""

    def __init__(self, folder, limit):
        self.folder, self.cases, self.sound = Path(folder), [], {}
        self.folder.mkdir(parents=True, exist_ok=True)
        small = dict(hidden=8, key_heads=1, ratio=2, key_dim=4, value_dim=6, grad="osc", initial="sc", padding="zero")
        for case in [
            Case("rows", 30, tokens=8, decode=2, seq_index=2, **small),
            Case("boundaries", 31, batch=1, tokens=12, cu_seqlens=[0, 4, 4, 12], **small),
            Case("ids", 32, tokens=8, mask=[[(1, 4), (2, 4)], [(1, 6), (0, 2)]], **small),
            Case("padded", 33, tokens=8, mask=[[(1, 8)], [(1, 6), (0, 2)]], decode=1, **small),
            Case("interleaved", 34, tokens=8, layout="interleaved", **small),
        ]:
            path = produce(case, self.folder, "transformers", limit)
            config, _, t = read_bundle(path)
            path.unlink()
            self.sound[case.name] = config, t

    def add(self, name, content, word, rule, options="", code=2):
        if content is not None:
            assert name not in {Path(c["file"]).stem for c in self.cases}, f"{name} stands there twice"
            (self.folder / f"{name}.safetensors").write_bytes(content)
        self.cases.append(
            {"file": f"{name}.safetensors", "options": options.split(), "exit": code, "word": word, "rule": rule}
        )

    def change(self, name, word, rule, base="rows", options="", code=2, config=None, drop=(), **tensors):
        """The sound bundle `base` with entries of config (None removes) or tensors replaced; a callable maps the old."""
        c, t = (dict(x) for x in self.sound[base])
        for key, value in (config or {}).items():
            if value is None:
                del c[key]
            else:
                c[key] = value
        for key in drop:
            del t[key]
        for key, value in tensors.items():
            t[key] = value(t[key]) if callable(value) else value
        self.add(name, file_bytes(*layout_of(t, {"config": json.dumps(c), "peer": "none"})), word, rule, options, code)

    def metadata(self, name, word, rule, metadata):
        header, data = layout_of(self.sound["rows"][1], {})
        del header["__metadata__"]
        self.add(name, file_bytes(({} if metadata is None else {"__metadata__": metadata}) | header, data), word, rule)

    def header(self, name, rule, edit, word=None, strict=True):
        """The sound bundle with an edited header: `edit` gets header and data, returns a file or edits in place."""
        config, t = self.sound["rows"]
        header, data = layout_of(t, {"config": json.dumps(config), "peer": "none"})
        content = edit(header, data)
        content = content if isinstance(content, bytes) else file_bytes(header, data)
        self.add(name, content, word or name, rule)
        if strict:  # the safetensors library itself must refuse what breaks its format
            from safetensors import SafetensorError, deserialize

            try:
                deserialize(content)
                print(f"{name}: safetensors itself accepts it")
            except SafetensorError:
                pass


def write_hostile(folder, limit):
    h = Hostile(folder, limit)
    rows, boundaries, ids = (h.sound[k][1] for k in ("rows", "boundaries", "ids"))
    config = h.sound["rows"][0]
    A = "linear_attn.A_log"
    text = lambda header: json.dumps(header, separators=(",", ":")).encode()
    raw = lambda head, data, length=None: struct.pack("<Q", len(head) if length is None else length) + head + data

    # The file
    last = lambda header: max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    h.header("file_empty", "no file header", lambda d, x: b"")
    h.header("file_seven_bytes", "no file header", lambda d, x: b"\x10\0\0\0\0\0\0")
    h.header("file_only_length", "header beyond the file", lambda d, x: struct.pack("<Q", 100))
    h.header("file_zero_header", "no header", lambda d, x: raw(b"", x))
    h.header("file_length_beyond", "header beyond the file", lambda d, x: raw(text(d), x, 10**6))
    h.header("file_length_huge", "header beyond the file", lambda d, x: raw(text(d), x, 2**63))
    h.header("file_length_max", "header beyond the file", lambda d, x: raw(text(d), x, 2**64 - 1))
    h.header("file_length_wraps", "header beyond the file", lambda d, x: raw(text(d), x, 2**64 - 8))
    h.header("file_length_short", "header is no JSON", lambda d, x: raw(text(d), x, len(text(d)) - 9))
    h.header("file_truncated_header", "header beyond the file", lambda d, x: file_bytes(d, x)[:200])
    h.header("file_truncated_data", "a tensor ends beyond the file", lambda d, x: file_bytes(d, x[:-1]))
    h.header("file_no_data", "a tensor ends beyond the file", lambda d, x: file_bytes(d, b""))
    h.header("file_trailing_data", "bytes after the last tensor", lambda d, x: file_bytes(d, x + b"\0" * 4))
    h.header(
        "file_not_utf8",
        "header is no UTF-8",
        lambda d, x: file_bytes(text(d).replace(b'"peer":"none"', b'"peer":"\xff\xfe"'), x),
    )
    h.header(
        "file_overlong_utf8",
        "header is no UTF-8",
        lambda d, x: file_bytes(text(d).replace(b'"peer":"none"', b'"peer":"\xc0\xaf"'), x),
    )
    h.header(
        "file_lone_surrogate",
        "no Unicode text",
        lambda d, x: file_bytes(text(d).replace(b'"peer":"none"', b'"peer":"\\ud800"'), x),
    )
    h.header(
        "file_control_character",
        "no JSON string",
        lambda d, x: file_bytes(text(d).replace(b'"peer":"none"', b'"peer":"a\nb"'), x),
    )
    h.header("file_not_json", "header is no JSON", lambda d, x: file_bytes(b"{this is not JSON}", x))
    h.header("file_unclosed_json", "header is no JSON", lambda d, x: file_bytes(text(d)[:-1], x))
    h.header("file_text_after_json", "header is no JSON", lambda d, x: file_bytes(text(d) + b"x", x))
    h.header("file_array", "header is no object", lambda d, x: file_bytes(b"[1,2,3]", x))
    h.header(
        "file_leading_space",
        "header must begin with {",
        lambda d, x: file_bytes(b"        " + text(d), x),
        strict=False,
    )
    h.header("file_deep", "header is no JSON object of tensors", lambda d, x: file_bytes(b'{"a":' + b"[" * 200000, x))
    h.header("file_deep_object", "header is no JSON object of tensors", lambda d, x: file_bytes(b'{"a":' * 200000, x))
    h.header("file_elf", "no safetensors file", lambda d, x: b"\x7fELF\x02\x01\x01" + b"\0" * 500)
    h.header(
        "file_no_tensors",
        "tensors missing",
        lambda d, x: file_bytes({"__metadata__": d["__metadata__"]}, b""),
        strict=False,
    )
    h.header("file_empty_object", "tensors and config missing", lambda d, x: file_bytes(b"{}", b""), strict=False)

    def hole(d, x):  # eight unused bytes before the last tensor
        name = last(d)
        lo, hi = d[name]["data_offsets"]
        d[name]["data_offsets"] = [lo + 8, hi + 8]
        return file_bytes(d, x[:lo] + b"\0" * 8 + x[lo:])

    h.header("header_hole", "bytes that belong to no tensor", hole)

    def hole_at_start(d, x):
        for n in d:
            if n != "__metadata__":
                d[n]["data_offsets"] = [o + 8 for o in d[n]["data_offsets"]]
        return file_bytes(d, b"\0" * 8 + x)

    h.header("header_hole_at_start", "bytes that belong to no tensor", hole_at_start)

    def same_bytes(d, x):  # two tensors of one shape on the same bytes
        d["linear_attn.in_proj_b.weight"]["data_offsets"] = d["linear_attn.in_proj_a.weight"]["data_offsets"]

    h.header("header_same_bytes", "tensors overlap", same_bytes)

    def overlap(d, x):
        name = last(d)
        lo, hi = d[name]["data_offsets"]
        d[name]["data_offsets"] = [lo - 4, hi - 4]
        return file_bytes(d, x[:-4])

    h.header("header_overlap", "tensors overlap", overlap)

    def put(name, key, value):
        def edit(d, x):
            if value is None:
                del d[name][key]
            else:
                d[name][key] = value(d[name][key]) if callable(value) else value

        return edit

    h.header("header_dtype_unknown", "dtype unknown", put(A, "dtype", "F31"))
    h.header("header_dtype_case", "dtype unknown", put(A, "dtype", "f32"))
    h.header("header_dtype_number", "dtype is no string", put(A, "dtype", 32))
    h.header("header_dtype_other_size", "offsets do not fit dtype and shape", put(A, "dtype", "F64"))
    h.header("header_shape_larger", "offsets do not fit dtype and shape", put(A, "shape", [3]))
    h.header("header_shape_smaller", "offsets do not fit dtype and shape", put(A, "shape", [1]))
    h.header("header_shape_negative", "negative size", put(A, "shape", [-2]))
    h.header("header_shape_fraction", "size is no integer", put(A, "shape", [2.5]))
    h.header("header_shape_text", "shape is no array", put(A, "shape", "2"))
    h.header("header_shape_overflow", "size overflows", put(A, "shape", [2**32, 2**32, 2]))
    h.header("header_shape_wraps", "size overflows to the right one", put(A, "shape", [2**63, 2, 2]))
    h.header("header_shape_wraps_to_fit", "size overflows to the right one", put(A, "shape", [2**62 + 2]))
    h.header("header_shape_beyond_u64", "size is no 64-bit integer", put(A, "shape", [2**70]))
    h.header("header_shape_missing", "shape missing", put(A, "shape", None))
    h.header("header_dtype_missing", "dtype missing", put(A, "dtype", None))
    h.header("header_offsets_missing", "data_offsets missing", put(A, "data_offsets", None))
    h.header("header_offsets_reversed", "offsets reversed", put(A, "data_offsets", lambda o: o[::-1]))
    h.header("header_offsets_negative", "offset negative", put(A, "data_offsets", lambda o: [-8, 0]))
    h.header("header_offsets_beyond", "offset beyond the data", put(A, "data_offsets", lambda o: [2**40, 2**40 + 8]))
    h.header("header_offsets_overflow", "offset beyond the data", put(A, "data_offsets", lambda o: [2**64 - 8, 2**64]))
    h.header(
        "header_offsets_fraction", "offset is no integer", put(A, "data_offsets", lambda o: [o[0] + 0.5, o[1] + 0.5])
    )
    h.header("header_offsets_text", "offset is no integer", put(A, "data_offsets", lambda o: [str(x) for x in o]))
    h.header("header_offsets_single", "two offsets", put(A, "data_offsets", lambda o: o[:1]))
    h.header("header_offsets_three", "two offsets", put(A, "data_offsets", lambda o: [*o, o[1]]))
    h.header("header_entry_null", "entry is no object", lambda d, x: d.update({A: None}))
    h.header("header_entry_text", "entry is no object", lambda d, x: d.update({A: "tensor"}))
    # The library keeps the last of two equal names; the bundle format refuses them.
    duplicate = lambda d, x: file_bytes(text(d)[:-1] + b"," + text({A: d[A]})[1:], x)
    h.header("header_duplicate_name", "duplicate name", duplicate, strict=False)

    def duplicate_bytes(d, x):
        extra = {A: dict(d[A], data_offsets=[len(x), len(x) + 8])}
        return file_bytes(text(d)[:-1] + b"," + text(extra)[1:], x + x[:8])

    h.header("header_duplicate_name_own_bytes", "duplicate name", duplicate_bytes, strict=False)
    escaped = lambda d, x: file_bytes(text(d)[:-1] + b"," + text({A: d[A]})[1:].replace(b"A_log", b"\\u0041_log"), x)
    h.header("header_duplicate_name_escaped", "duplicate name, spelt another way", escaped, strict=False)
    h.header(
        "header_metadata_object", "metadata values are strings", lambda d, x: d["__metadata__"].update(config=config)
    )
    h.header("header_metadata_text", "metadata is an object", lambda d, x: d.update(__metadata__="config"))

    # config
    whole = json.dumps(config)
    h.metadata("metadata_none", "config", "config missing", None)
    h.metadata("metadata_without_config", "config", "config missing", {"peer": "none"})
    for name, value in {
        "empty": "",
        "not_json": "{hidden_size: 8}",
        "array": "[]",
        "number": "8",
        "null": "null",
        "truncated": whole[:-1],
        "trailing": whole + "}",
        "deep": "[" * 100000,
        "nan": whole.replace("1e-06", "NaN"),
        "infinity": whole.replace("1e-06", "Infinity"),
    }.items():
        h.metadata(f"config_{name}", "config", "config is no JSON object", {"config": value, "peer": "none"})
    for key in config:
        if key != "mamba_ssm_dtype":
            h.change(f"config_without_{key}", key, "config incomplete", config={key: None})
    sizes = [k for k in config if k.startswith("linear_") or k == "hidden_size"]
    for key in sizes:
        h.change(f"config_zero_{key}", key, "an integer of at least 1", config={key: 0})
        h.change(f"config_negative_{key}", key, "an integer of at least 1", config={key: -config[key]})
        h.change(f"config_huge_{key}", "", "an integer that fits the tensors", config={key: 2**62})
        h.change(f"config_wrong_{key}", "", "shapes contradict config", config={key: config[key] + 1})
    for name, value in {
        "fraction": 8.5,
        "text": "8",
        "boolean": True,
        "array": [8],
        "exponent": 1e300,
        "beyond_double": 10**400,
    }.items():
        h.change(
            f"config_{name}_hidden_size",
            "" if name == "beyond_double" else "hidden_size",
            "an integer of at least 1",
            config={"hidden_size": value},
        )
    h.metadata(
        "config_null_hidden_size",
        "hidden_size",
        "an integer of at least 1",
        {"config": json.dumps(dict(config, hidden_size=None)), "peer": "none"},
    )
    h.change(
        "config_heads_do_not_divide",
        "linear_num_",
        "Hk must divide Hv",
        config={"linear_num_key_heads": 2, "linear_num_value_heads": 3},
    )
    for name, value in {"zero": 0, "negative": -1e-6, "text": "1e-6", "boolean": True}.items():
        h.change(f"config_eps_{name}", "rms_norm_eps", "finite and positive", config={"rms_norm_eps": value})
    h.metadata(
        "config_eps_infinite",
        "rms_norm_eps",
        "finite and positive",
        {"config": whole.replace("1e-06", "1e999"), "peer": "none"},
    )
    for value in ("gelu", "relu", "SiLU", "", "silu "):
        h.change(
            f"config_act_{value.strip() or 'empty'}{'_space' if value.endswith(' ') else ''}",
            "hidden_act",
            "silu or swish",
            config={"hidden_act": value},
        )
    h.change("config_act_number", "hidden_act", "silu or swish", config={"hidden_act": 1})
    for value in ("int8", "float31", ""):
        h.change(
            f"config_ssm_dtype_{value or 'empty'}",
            "mamba_ssm_dtype",
            "a floating type",
            config={"mamba_ssm_dtype": value},
        )
    h.change("config_ssm_dtype_number", "mamba_ssm_dtype", "a floating type", config={"mamba_ssm_dtype": 32})

    # Tensors that must be there
    for base in ("rows", "interleaved"):
        for name in ["hidden_states"] + [PREFIX + n for n in parameter_names(h.sound[base][1])]:
            h.change(f"missing_{base}_{name}", name, "must be present", base, drop=[name])
    split = [PREFIX + n for n in SPLIT]
    inter = {PREFIX + n: h.sound["interleaved"][1][PREFIX + n] for n in INTERLEAVED}
    h.change("missing_projections", "in_proj", "must be present", drop=split)
    h.change("both_layouts", "in_proj", "one weight layout", **inter)
    for name in INTERLEAVED:
        h.change(f"both_layouts_{name}", "in_proj", "one weight layout", **{PREFIX + name: inter[PREFIX + name]})

    # Shapes: one more along each dimension, one dimension more, one fewer; expected tensors too
    longer = lambda x, dim: torch.cat([x, x.narrow(dim, 0, 1)], dim)
    for base in h.sound:
        for name, x in h.sound[base][1].items():
            if (
                name in ("attention_mask", "cu_seqlens", "seq_index")
                or base in ("ids", "padded")
                and not name.endswith("state")
            ):
                continue
            if base == "interleaved" and "in_proj" not in name or base == "boundaries" and "linear_attn" in name:
                continue
            for dim in range(x.dim()):
                free = (name, dim) in (("hidden_states", 0), ("hidden_states", 1), ("decode.hidden_states", 1))
                word = {"hidden_states": "", "decode.hidden_states": "decode"}.get(name, name) if free else name
                h.change(
                    f"shape_{base}_{name}_{dim}",
                    word,
                    "shape contradicts config or hidden_states",
                    base,
                    **{name: longer(x, dim)},
                )
            h.change(f"shape_{base}_{name}_more", name, "number of dimensions", base, **{name: x[None]})
            h.change(
                f"shape_{base}_{name}_flat",
                name,
                "number of dimensions",
                base,
                **{name: x.reshape(-1) if x.dim() > 1 else x[0]},
            )
            if base == "rows":
                h.change(
                    f"shape_{base}_{name}_empty",
                    name,
                    "shape contradicts config or hidden_states",
                    base,
                    **{name: x[:0]},
                )
    h.change("shape_transposed_qkv", "in_proj_qkv", "shape contradicts config", **{PREFIX + SPLIT[0]: lambda x: x.T})
    h.change(
        "shape_conv_two_dimensions", "conv1d", "number of dimensions", **{PREFIX + "conv1d.weight": lambda x: x[:, 0]}
    )
    h.change("shape_states_per_row", "initial_state", "N counts documents", "ids", initial_state=lambda x: x[:2])
    h.change(
        "shape_gradient_of_states_per_row",
        "grad_recurrent_state",
        "N counts documents",
        "ids",
        grad_recurrent_state=lambda x: x[:2],
    )
    activations = [n for n, x in rows.items() if x.dim() == 3 and x.shape[0] == 2 and "linear_attn" not in n]
    states = [n for n in rows if n.endswith("_state")]
    h.change(
        "shape_no_rows", "hidden_states", "B of 0", drop=["seq_index"], **{n: rows[n][:0] for n in activations + states}
    )
    h.change(
        "shape_no_tokens",
        "hidden_states",
        "S of 0",
        drop=["seq_index"],
        **{n: rows[n][:, :0] for n in activations if "decode" not in n},
    )

    # dtypes
    for name in (
        "hidden_states",
        A,
        PREFIX + "out_proj.weight",
        "grad_output",
        "initial_state",
        "expected.output",
        "decode.hidden_states",
    ):
        h.change(f"dtype_integer_{name}", name, "a floating dtype", **{name: lambda x: x.to(torch.int64)})
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float32):
        h.change(
            f"dtype_mask_{DTYPE_NAMES[dtype]}",
            "attention_mask",
            "I64 or I32",
            "padded",
            attention_mask=lambda x: x.to(dtype),
        )
    h.change("dtype_cu_seqlens_F32", "cu_seqlens", "I64 or I32", "boundaries", cu_seqlens=lambda x: x.float())
    h.change("dtype_seq_index_F32", "seq_index", "I64 or I32", seq_index=lambda x: x.float())

    # Masks
    rest = [2, 2, 2, 2]
    for name, row, rule in [
        ("negative", [-1, 1, 1, 1, *rest], "ids are not negative"),
        ("very_negative", [-(2**63), 1, 1, 1, *rest], "ids are not negative"),
        ("descends", [2, 2, 1, 1, 1, 1, 1, 1], "ids ascend"),
        ("descends_after_padding", [2, 2, 0, 1, 1, 1, 1, 1], "ids ascend"),
        ("two_pieces", [1, 1, 2, 2, 1, 1, 1, 1], "a document is in one piece"),
        ("two_pieces_around_padding", [1, 1, 0, 1, *rest], "a document is in one piece"),
        ("two_pieces_late", [1, 2, 2, 2, 2, 2, 0, 2], "a document is in one piece"),
    ]:
        h.change(
            f"mask_{name}",
            "attention_mask",
            rule,
            "ids",
            attention_mask=torch.tensor([row, ids["attention_mask"][1].tolist()]),
        )
        h.change(
            f"mask_{name}_row_1",
            "attention_mask",
            rule,
            "ids",
            attention_mask=torch.tensor([ids["attention_mask"][0].tolist(), row]),
        )
    h.change(
        "mask_zero_one_two_pieces",
        "attention_mask",
        "a document is in one piece",
        "padded",
        attention_mask=torch.tensor([[1] * 8, [1, 1, 0, 0, 1, 1, 1, 1]]),
    )
    h.change("mask_short", "attention_mask", "[B, S]", "ids", attention_mask=lambda x: x[:, :-1])
    h.change("mask_one_row", "attention_mask", "[B, S]", "ids", attention_mask=lambda x: x[:1])
    h.change("mask_flat", "attention_mask", "[B, S]", "ids", attention_mask=lambda x: x.reshape(-1))
    h.change("mask_four_dimensions", "attention_mask", "[B, S]", "ids", attention_mask=lambda x: x[:, None, None])
    h.change(
        "mask_and_cu_seqlens", "cu_seqlens", "not both", "boundaries", attention_mask=torch.tensor([[1] * 4 + [2] * 8])
    )

    # Boundaries
    for name, value, rule in [
        ("start", [1, 4, 4, 12], "start at 0"),
        ("negative_start", [-1, 4, 4, 12], "start at 0"),
        ("end_early", [0, 4, 4, 11], "end at S"),
        ("end_late", [0, 4, 4, 13], "end at S"),
        ("decrease", [0, 5, 4, 12], "do not decrease"),
        ("overshoot", [0, 20, 20, 12], "do not decrease"),
        ("huge", [0, 4, 2**40, 12], "do not decrease"),
        ("negative", [0, -4, 4, 12], "do not decrease"),
        ("single", [0], "end at S"),
        ("none", [], "start at 0"),
    ]:
        h.change(
            f"cu_seqlens_{name}", "cu_seqlens", rule, "boundaries", cu_seqlens=torch.tensor(value, dtype=torch.int64)
        )
    h.change(
        "cu_seqlens_wraps_32_bits",
        "cu_seqlens",
        "end at S",
        "boundaries",
        cu_seqlens=torch.tensor([0, 4, 4, 12 + 2**32]),
    )
    h.change("cu_seqlens_two_dimensions", "cu_seqlens", "[N+1]", "boundaries", cu_seqlens=lambda x: x[None])
    h.change("cu_seqlens_two_rows", "cu_seqlens", "B = 1", "rows", cu_seqlens=torch.tensor([0, 4, 8]))
    h.change("cu_seqlens_two_rows_flat", "cu_seqlens", "B = 1", "rows", cu_seqlens=torch.tensor([0, 8, 16]))

    # seq_index
    flat = torch.arange(8)
    for name, value in {
        "repeats": flat.clamp(max=6),
        "from_one": flat + 1,
        "negative": flat - 1,
        "huge": flat + 2**40,
        "wraps_32_bits": flat + 2**32,
    }.items():
        for layout in ("contiguous", "seq-index"):
            h.change(
                f"seq_index_{name}_{layout}",
                "seq_index",
                "a permutation of 0 … S-1",
                options=f"--ranks 2 --layout {layout}",
                seq_index=value.reshape(2, 4),
            )
    h.change("seq_index_short", "seq_index", "[P, S/P]", seq_index=flat[:6].reshape(2, 3))
    h.change("seq_index_long", "seq_index", "[P, S/P]", seq_index=torch.arange(10).reshape(2, 5))
    h.change("seq_index_flat", "seq_index", "[P, S/P]", seq_index=flat)
    h.change("seq_index_no_ranks", "seq_index", "[P, S/P]", seq_index=flat[:0].reshape(0, 4))
    h.change("seq_index_per_row", "seq_index", "[P, S/P]", seq_index=flat.reshape(1, 2, 4).repeat(2, 1, 1))
    h.change(
        "seq_index_other_ranks", "seq_index", "for another number of ranks", options="--ranks 4 --layout seq-index"
    )
    h.change("seq_index_one_rank", "seq_index", "for another number of ranks", options="--ranks 1 --layout seq-index")
    h.change(
        "seq_index_missing",
        "seq_index",
        "--layout seq-index without seq_index",
        options="--ranks 2 --layout seq-index",
        drop=["seq_index"],
    )

    # decode, and expected tensors without what asks for them
    h.change(
        "decode_packed_boundaries",
        "decode",
        "decode where N != B",
        "boundaries",
        **{"decode.hidden_states": torch.zeros(1, 2, 8)},
    )
    h.change(
        "decode_packed_ids", "decode", "decode where N != B", "ids", **{"decode.hidden_states": torch.zeros(2, 2, 8)}
    )
    h.change("decode_one_row", "decode", "[B, D, hid]", **{"decode.hidden_states": lambda x: x[:1]})
    h.change(
        "decode_expected_alone", "decode", "expected.decode without decode.hidden_states", drop=["decode.hidden_states"]
    )
    h.change(
        "grad_expected_alone",
        "grad",
        "expected.grad without grad_output",
        drop=["grad_output", "grad_recurrent_state", "grad_conv_state"],
    )

    # Layouts
    for ranks, layout, base, rule in [
        (3, "zigzag", "rows", "2P must divide S"),
        (8, "zigzag", "rows", "2P must divide S"),
        (64, "zigzag", "rows", "2P must divide S"),
        (4, "zigzag", "boundaries", "2P must divide S"),
        (3, "zigzag-documents", "rows", "2P must divide a document"),
        (4, "zigzag-documents", "boundaries", "2P must divide a document"),
        (3, "zigzag-documents", "boundaries", "2P must divide a document"),
        (2, "zigzag-documents", "ids", "2P must divide a document"),
        (4, "zigzag-documents", "padded", "2P must divide a document"),
    ]:
        h.change(f"layout_{layout}_{ranks}_{base}", "zigzag", rule, base, options=f"--ranks {ranks} --layout {layout}")

    # Usage, with a sound bundle
    h.change("sound", "", "everything right", code=0)
    for options in [
        "--ranks 0",
        "--ranks -1",
        "--ranks 65",
        "--ranks two",
        "--ranks 2.5",
        "--ranks 99999999999999999999",
        "--ranks",
        "--comm smoke",
        "--backend none",
        "--layout spiral",
        "--strategy hope",
        "--share nothing",
        "--dtype f8",
        "--rule golden",
        "--tolerance tight",
        "--repeat 0",
        "--repeat x",
        "--frobnicate",
        "--layout",
    ]:
        h.add("sound", None, options.split()[0], "usage: options stand before the bundle", options)
    for options in (
        "--out",
        "--json",
    ):  # the bundle becomes the option's value, so none is left, and it must not be overwritten
        h.add("sound", None, "", "usage: no bundle", options)
    h.add("sound", None, "", "usage: one bundle only", "sound.safetensors")
    h.add("no_such_file", None, "no_such_file", "the file must exist")
    (h.folder / "folder.safetensors").mkdir(exist_ok=True)
    h.add("folder", None, "folder", "a folder is no file")

    # What is not refused
    nan_rows = lambda x: x.masked_fill((h.sound["padded"][1]["attention_mask"] == 0)[..., None], math.nan)
    h.change(
        "accept_nan_padding", "", "padding is not read", "padded", code=0, hidden_states=nan_rows, grad_output=nan_rows
    )
    h.change(
        "accept_nan_padding_3_ranks",
        "",
        "padding is not read",
        "padded",
        code=0,
        options="--ranks 3",
        hidden_states=nan_rows,
        grad_output=nan_rows,
    )
    h.change(
        "accept_unknown_tensors",
        "",
        "unknown tensors are ignored",
        code=0,
        **{"linear_attn.extra": torch.ones(3, 0, dtype=torch.int8), "note": torch.zeros(5, dtype=torch.bool)},
    )
    h.change(
        "accept_unknown_keys",
        "",
        "unknown keys are ignored",
        code=0,
        config={"model_type": "qwen3_5", "rope": {"theta": [1, None, True]}, "ü": "\u4e2d\U0001f600\n"},
    )
    h.change("accept_swish", "", "swish is silu", code=0, config={"hidden_act": "swish"})
    h.change("accept_no_ssm_dtype", "", "mamba_ssm_dtype is optional", code=0, config={"mamba_ssm_dtype": None})
    h.change("accept_ssm_dtype_float64", "", "a floating type", code=0, config={"mamba_ssm_dtype": "float64"})
    h.change(
        "accept_no_expected", "", "nothing to compare", code=0, drop=[n for n in rows if n.startswith("expected.")]
    )
    h.change(
        "accept_boundaries_with_empty_document",
        "",
        "an empty document counts",
        "boundaries",
        code=0,
        options="--ranks 3",
    )
    h.change("accept_skipped_ids", "", "ids may skip numbers", "ids", code=0, attention_mask=lambda x: x * 3)
    h.change(
        "accept_int32",
        "",
        "I32 is an integer type",
        "ids",
        code=0,
        options="--ranks 2 --layout zigzag",
        attention_mask=lambda x: x.int(),
    )
    h.change(
        "accept_zigzag_documents",
        "",
        "padding is no document",
        "ids",
        code=0,
        options="--ranks 1 --layout zigzag-documents",
    )
    h.change("accept_seq_index_unused", "", "its rank count matters with its layout only", code=0, options="--ranks 3")
    h.change("accept_seq_index", "", "seq-index", code=0, options="--ranks 2 --layout seq-index")
    h.change("accept_more_ranks_than_tokens", "", "ranks may be empty", code=0, options="--ranks 64")
    h.change("accept_no_decode", "", "--no-decode leaves the part out", code=0, options="--no-decode")
    h.change("accept_no_grad", "", "--no-grad leaves the part out", code=0, options="--no-grad")
    h.change(
        "accept_wide_floats",
        "",
        "any floating dtype",
        code=0,
        hidden_states=lambda x: x.double(),
        **{PREFIX + "A_log": lambda x: x.double(), "expected.output": lambda x: x.double()},
    )
    h.change(
        "fail_nan_input",
        "",
        "NaN is computed with, then fails",
        code=1,
        hidden_states=lambda x: torch.cat([x[:, :3] * math.nan, x[:, 3:]], 1),
    )
    h.change(
        "fail_nan_weight",
        "",
        "NaN is computed with, then fails",
        code=1,
        **{PREFIX + "out_proj.weight": lambda x: x * math.nan},
    )
    h.change(
        "fail_infinite_expected", "", "expected must be met", code=1, **{"expected.output": lambda x: x * math.inf}
    )
    h.change("fail_zero_expected", "", "any error fails where all is 0", code=1, **{"expected.output": lambda x: x * 0})
    h.change(
        "fail_off",
        "expected.recurrent_state",
        "out of the limit",
        code=1,
        **{"expected.recurrent_state": lambda x: x * 1.001},
    )
    (h.folder / "cases.json").write_text(json.dumps(h.cases, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(h.cases)} cases in {h.folder}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests" / "data", metavar="DIR"
    )
    parser.add_argument("--only", metavar="NAME", help="of the samples, this one")
    parser.add_argument("--random", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the random bundles")
    parser.add_argument(
        "--head-sizes", default="4,8,12,16,17,24,31,32", help="of the random bundles; the CUDA backend takes multiples of 16"
    )
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--hostile", type=Path, metavar="DIR")
    parser.add_argument("--peer", choices=sorted(PEERS), default="transformers")
    parser.add_argument("--check", nargs="+", metavar="FILE")
    parser.add_argument("--limit", type=float, default=1e-5, help="of rms(error)/rms(exact) in --check")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one summation order, whatever the machine

    if args.hostile:
        write_hostile(args.hostile, args.limit)
        return 0
    files = args.check
    if not files:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.random:
            sizes = [int(n) for n in args.head_sizes.split(",")]
            cases = [
                (random_case(i, args.seed, sizes), "oracle" if i % 5 == 4 else args.peer) for i in range(args.random)
            ]
        elif args.real:
            cases = [(REAL, args.peer)]
        else:
            cases = [(c, args.peer) for c in SAMPLES] + [(c, "oracle") for c in EXACT_SAMPLES]
            cases = [(c, peer) for c, peer in cases if args.only in (None, c.name)]
        files = [produce(case, args.out, peer, args.limit) for case, peer in cases]
    worst, bad = {}, 0
    for path in files:
        ratios = check(path)
        bad += not max(ratios.values()) <= args.limit
        print(f"{path}  {os.path.getsize(path)} bytes, worst error {max(ratios.values()):.2e}", flush=True)
        for name, ratio in ratios.items():
            worst[name] = max(worst.get(name, (0.0, "")), (ratio, Path(path).name))
    for name, (ratio, where) in sorted(worst.items()):
        print(f"{name:55} {ratio:9.2e}  {where}{'' if ratio <= args.limit else '  above the limit'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
