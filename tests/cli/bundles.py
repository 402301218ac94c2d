# SPDX-License-Identifier: Apache-2.0
"""Small layer bundles, sound and broken, with nothing but Python's own library."""
import array
import copy
import json
import math
import random
import struct

FORMATS = {"F64": "d", "F32": "f", "BF16": "H", "F16": "H", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "B"}


class Tensor:
    """A dtype, a shape and a flat list of values."""

    def __init__(self, shape, values, dtype="F32"):
        self.dtype, self.shape = dtype, list(shape)
        self.values = list(values) if hasattr(values, "__iter__") else [values] * math.prod(shape)
        assert len(self.values) == math.prod(self.shape), (self.shape, len(self.values))

    def bytes(self):
        return array.array(FORMATS[self.dtype], self.values).tobytes()

    def like(self, **changes):
        out = copy.deepcopy(self)
        vars(out).update(changes)
        return out


def integers(shape, values, dtype="I64"):
    return Tensor(shape, values, dtype)


class Bundle:
    """A config, metadata and tensors by name."""

    def __init__(self, config, tensors):
        self.config, self.tensors = config, tensors

    def copy(self):
        return copy.deepcopy(self)

    def header(self):
        """The header object and the data."""
        out = {"__metadata__": {"config": json.dumps(self.config), "peer": "nobody"}}
        data = b""
        for name, t in self.tensors.items():
            block = t.bytes()
            out[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [len(data), len(data) + len(block)]}
            data += block
        return out, data

    def bytes(self):
        return file_bytes(*self.header())


def file_bytes(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def read(path):
    """Metadata and tensors by name; of 16-bit floats the bits."""
    with open(path, "rb") as f:
        content = f.read()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        values = array.array(FORMATS[entry["dtype"]])
        values.frombytes(data[slice(*entry["data_offsets"])])
        tensors[name] = Tensor(entry["shape"], values, entry["dtype"])
    return metadata, tensors


def sound(batch=2, seq=8, documents=None, interleaved=False, decode=0, grad=True, expected=True, states=True, key_dim=4, value_dim=6):
    """A layer with hid = 8, Hk = 1, Hv = 2, W = 4 and random values; what is expected is not computed."""
    rng = random.Random(7)
    normal = lambda *shape: Tensor(shape, [rng.gauss(0, 0.5) for _ in range(math.prod(shape))])
    hid, hk, hv, k, v, w = 8, 1, 2, key_dim, value_dim, 4
    dc, n = 2 * hk * k + hv * v, documents if documents is not None else batch
    config = {"hidden_size": hid, "linear_num_key_heads": hk, "linear_num_value_heads": hv, "linear_key_head_dim": k,
              "linear_value_head_dim": v, "linear_conv_kernel_dim": w, "rms_norm_eps": 1e-6, "hidden_act": "silu",
              "mamba_ssm_dtype": "float32"}
    weights = ({"in_proj_qkvz.weight": (dc + hv * v, hid), "in_proj_ba.weight": (2 * hv, hid)} if interleaved else
               {"in_proj_qkv.weight": (dc, hid), "in_proj_z.weight": (hv * v, hid), "in_proj_b.weight": (hv, hid),
                "in_proj_a.weight": (hv, hid)})
    weights |= {"conv1d.weight": (dc, 1, w), "A_log": (hv,), "dt_bias": (hv,), "norm.weight": (v,),
                "out_proj.weight": (hid, hv * v)}
    weights = {"linear_attn." + name: shape for name, shape in weights.items()}
    activation, state, conv = (batch, seq, hid), (n, hv, k, v), (n, dc, w)
    shapes = dict(weights, hidden_states=activation)
    if states:
        shapes |= {"initial_state": state, "initial_conv_state": conv}
    if grad:
        shapes |= {"grad_output": activation, "grad_recurrent_state": state, "grad_conv_state": conv}
    if decode:
        shapes |= {"decode.hidden_states": (batch, decode, hid)}
    if expected:
        shapes |= {"expected.output": activation, "expected.conv_state": conv, "expected.recurrent_state": state}
        if grad:
            shapes |= {"expected.grad." + name: shape for name, shape in weights.items()}
            shapes |= {"expected.grad.hidden_states": activation}
            if states:
                shapes |= {"expected.grad.initial_state": state, "expected.grad.initial_conv_state": conv}
        if decode:
            shapes |= {"expected.decode.output": (batch, decode, hid), "expected.decode.conv_state": conv,
                       "expected.decode.recurrent_state": state}
    return Bundle(config, {name: normal(*shape) for name, shape in shapes.items()})
