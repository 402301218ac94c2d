#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gdn-run refuses what bundle.md says it refuses: exit code 2, one line that names the place, nothing written.

refusals_test.py GDN_RUN [--data DIR] [SUITE]
"""
import json
import os
import subprocess
import sys
import tempfile
import unittest

from bundles import Tensor, file_bytes, integers, sound

PROGRAM = ""


class Program(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def run_program(self, *arguments):
        return subprocess.run([PROGRAM, *arguments], cwd=self.folder.name, capture_output=True, timeout=60,
                              stdin=subprocess.DEVNULL)

    def refuses(self, content, *words, options=()):
        """`content` is a Bundle, the bytes of a file, or None for no file; the message names the file and has all words."""
        with self.subTest(words=words, options=options):
            if content is not None:
                with open(self.path("input"), "wb") as f:
                    f.write(content if isinstance(content, bytes) else content.bytes())
                options = [*options, "input"]
                words += ("input",)
            with open(self.path("out"), "w") as f:
                f.write("before")
            files = set(os.listdir(self.folder.name))
            result = self.run_program("--out", "out", "--json", "json", *options)
            message = result.stderr.decode()
            self.assertEqual(result.returncode, 2, message)
            self.assertEqual(result.stdout, b"")
            self.assertRegex(message, r"\Agdn-run: [^\n]+\n\Z")
            for word in words:
                self.assertIn(word, message)
            with open(self.path("out")) as f:
                self.assertEqual(f.read(), "before")
            self.assertEqual(set(os.listdir(self.folder.name)), files)

    def changed(self, base, *words, drop=(), config=None, options=(), **tensors):
        """The sound bundle `base` with tensors replaced, added or dropped, and entries of config replaced."""
        bundle = base.copy()
        for name in drop:
            del bundle.tensors[name]
        bundle.tensors |= {name.replace("__", "."): t for name, t in tensors.items()}
        bundle.config |= config or {}
        self.refuses(bundle, *words, options=options)


class Refusals(Program):
    # ---- the file

    def test_a_file_that_is_no_file(self):
        os.mkdir(self.path("folder"))
        os.mkfifo(self.path("pipe"))
        for name in ("absent", "folder", "pipe", "/dev/null", "folder/x", "a\nb"):
            self.refuses(None, name.replace("\n", "?"), options=[name])

    def test_lengths(self):
        whole = sound().bytes()
        header, data = sound().header()
        for n in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            self.refuses(whole[:n])
        self.refuses(whole + b"\0", "data")
        for length in (0, 1, 2**31, 2**63, 2**64 - 8, 2**64 - 1):
            self.refuses(file_bytes(header, data, length), "header")

    def test_headers_that_are_no_json_objects(self):
        header, data = sound().header()
        text = json.dumps(header).encode()
        for other in (b"", b"x", b"[]", b"null", b" " + text, text[:-1], text + b"}", text + b"\0", b"{" * 100000,
                      b'{"a":' + b"[" * 100000, text.replace(b"nobody", b"\xff"), text.replace(b"nobody", b"\\ud800"),
                      text.replace(b"nobody", b"\n")):
            self.refuses(file_bytes(other, data))

    def test_entries(self):
        name = "linear_attn.A_log"
        for key, values in {"dtype": ["F31", "f32", 32, None], "shape": [[-2], [2.5], ["2"], 2, [3], [2**63], [2**62 + 2], [2**32, 2**32]],
                            "data_offsets": [[0], [0, 4, 8], [8, 0], [-8, 0], [0.0, 8.0], [2**64 - 8, 2**64], "0", [0, 2**40]]}.items():
            for value in values:
                header, data = sound().header()
                header[name][key] = value
                self.refuses(file_bytes(header, data), name)
            header, data = sound().header()
            del header[name][key]
            self.refuses(file_bytes(header, data), name, key)

    def test_overlaps_and_holes(self):
        header, data = sound().header()
        header["linear_attn.dt_bias"]["data_offsets"] = header["linear_attn.A_log"]["data_offsets"]
        self.refuses(file_bytes(header, data), "overlap")
        header, data = sound().header()
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [o + 4 for o in entry["data_offsets"]]
        self.refuses(file_bytes(header, b"\0" * 4 + data), "belong to no tensor")

    def test_duplicate_names(self):
        header, data = sound().header()
        text = json.dumps(header)
        entry = json.dumps(header["linear_attn.A_log"])
        self.refuses(file_bytes(f'{text[:-1]}, "linear_attn.A_log": {entry}}}'.encode(), data), "linear_attn.A_log", "twice")
        self.refuses(file_bytes(f'{text[:-1]}, "linear_attn.\\u0041_log": {entry}}}'.encode(), data), "linear_attn.A_log", "twice")

    # ---- config

    def metadata(self, metadata, *words):
        header, data = sound().header()
        del header["__metadata__"]
        self.refuses(file_bytes(header if metadata is None else {"__metadata__": metadata} | header, data), *words)

    def test_config_that_is_missing_or_no_object(self):
        self.metadata(None, "config")
        self.metadata({}, "config")
        self.metadata({"peer": "nobody"}, "config")
        for text in ("", "null", "[]", "8", "{", "{}", "{} {}", '{"hidden_size": NaN}', "[" * 100000):
            self.metadata({"config": text}, "config")

    def test_config_that_is_incomplete(self):
        for key in sound().config:
            if key != "mamba_ssm_dtype":
                bundle = sound()
                del bundle.config[key]
                self.refuses(bundle, key)

    def test_config_that_is_impossible(self):
        for key in sound().config:
            if key == "hidden_size" or key.startswith("linear_"):
                for value in (0, -1, 1.5, 8.0, "8", None, True, 2**62, 2**63, 2**64, 10**30):
                    self.changed(sound(), key, config={key: value})
        self.changed(sound(), "linear_num_value_heads", config={"linear_num_key_heads": 2, "linear_num_value_heads": 3})
        for value in (0, -1e-6, "1e-6", None, True, float("nan"), float("inf")):
            self.changed(sound(), "config", config={"rms_norm_eps": value})
        for value in ("gelu", "relu", "SILU", "", None, 1):
            self.changed(sound(), "hidden_act", config={"hidden_act": value})
        for value in ("int32", "float33", "", None, 32):
            self.changed(sound(), "mamba_ssm_dtype", config={"mamba_ssm_dtype": value})

    # ---- tensors

    def test_missing_tensors(self):
        for bundle in (sound(), sound(interleaved=True)):
            for name in bundle.tensors:
                if name == "hidden_states" or name.startswith("linear_attn."):
                    self.changed(bundle, name, "missing", drop=[name])

    def test_both_weight_layouts(self):
        other = sound(interleaved=True).tensors
        for names in (["in_proj_qkvz.weight"], ["in_proj_ba.weight"], ["in_proj_qkvz.weight", "in_proj_ba.weight"]):
            bundle = sound()
            bundle.tensors |= {"linear_attn." + n: other["linear_attn." + n] for n in names}
            self.refuses(bundle, names[0], "layout")

    def test_shapes(self):
        for bundle in (sound(decode=3), sound(interleaved=True)):
            for name, t in bundle.tensors.items():
                others = [[1, *t.shape], [*t.shape, 1], [len(t.values)] if len(t.shape) > 1 else [1, len(t.values)]]
                for axis, extent in enumerate(t.shape):
                    # B, S and D are free; other tensors contradict them then.
                    if (name, axis) not in (("hidden_states", 0), ("hidden_states", 1), ("decode.hidden_states", 1)):
                        others += [[*t.shape[:axis], other, *t.shape[axis + 1:]] for other in (0, extent + 1)]
                for shape in others:
                    self.changed(bundle, name, **{name: Tensor(shape, 0.5)})
        self.changed(sound(), "'grad_output'", hidden_states=Tensor((2, 9, 8), 0.5))
        self.changed(sound(decode=3), "'expected.decode.output'", decode__hidden_states=Tensor((2, 4, 8), 0.5))

    def test_states_count_documents(self):
        mask = integers((2, 8), [1, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 0])
        for name in ("initial_state", "initial_conv_state", "grad_recurrent_state", "grad_conv_state", "expected.conv_state",
                     "expected.recurrent_state", "expected.grad.initial_state", "expected.grad.initial_conv_state"):
            bundle = sound(documents=3)
            t = bundle.tensors[name]
            self.changed(bundle, name, **{name: Tensor([2, *t.shape[1:]], 0.5), "attention_mask": mask})

    def test_batches_without_rows_or_tokens(self):
        for batch, seq in ((0, 8), (2, 0), (0, 0)):
            self.refuses(sound(batch=batch, seq=seq), "hidden_states")

    def test_dtypes(self):
        for name in sound(decode=2).tensors:
            for dtype in ("I64", "I32", "U8", "BOOL"):
                t = sound(decode=2).tensors[name]
                self.changed(sound(decode=2), name, dtype, **{name: Tensor(t.shape, 1, dtype)})
        for dtype in ("BOOL", "U8", "I8", "I16", "F32", "F64"):
            self.changed(sound(), "attention_mask", dtype, attention_mask=Tensor((2, 8), 1, dtype))
            self.changed(sound(), "seq_index", dtype, seq_index=Tensor((2, 4), 1, dtype))
            self.changed(sound(batch=1), "cu_seqlens", dtype, cu_seqlens=Tensor((2,), 1, dtype))

    # ---- documents

    def test_masks(self):
        right = [1, 1, 1, 1, 1, 1, 1, 1]
        for row, position in (([-1, 1, 1, 1, 1, 1, 1, 1], "0"), ([1, 1, -2**63, 1, 1, 1, 1, 1], "2"),
                              ([2, 2, 1, 1, 1, 1, 1, 1], "2"), ([1, 3, 0, 2, 2, 2, 2, 2], "3"),
                              ([1, 1, 0, 1, 1, 1, 1, 1], "3"), ([1, 2, 2, 2, 2, 2, 0, 2], "7"), ([1, 1, 2, 2, 1, 1, 1, 1], "4")):
            for dtype in ("I64", "I32"):
                if min(row) >= -2**31 or dtype == "I64":
                    self.changed(sound(), "attention_mask", "row 0 position " + position,
                                 attention_mask=integers((2, 8), row + right, dtype))
                    self.changed(sound(), "attention_mask", "row 1 position " + position,
                                 attention_mask=integers((2, 8), right + row, dtype))
        for shape in ((2, 7), (1, 8), (16,), (2, 8, 1), (2, 1, 8), (0, 8)):
            self.changed(sound(), "attention_mask", attention_mask=integers(shape, 1))
        self.changed(sound(batch=1), "attention_mask", "cu_seqlens", attention_mask=integers((1, 8), 1),
                     cu_seqlens=integers((2,), [0, 8]))

    def test_cu_seqlens(self):
        for values in ([1, 8], [-1, 8], [0, 7], [0, 9], [0, 5, 4, 8], [0, 9, 8], [0, 2**40, 8], [0, -4, 8], [0], [], [0, 0], [8],
                       [0, 8 + 2**32]):
            self.changed(sound(batch=1, documents=max(len(values) - 1, 0)), "cu_seqlens", cu_seqlens=integers((len(values),), values))
        self.changed(sound(batch=1), "cu_seqlens", cu_seqlens=integers((1, 2), [0, 8]))
        self.changed(sound(batch=2), "cu_seqlens", cu_seqlens=integers((2,), [0, 8]))
        self.changed(sound(batch=2), "cu_seqlens", cu_seqlens=integers((3,), [0, 8, 16]))

    def test_seq_index(self):
        for values in ([0, 1, 2, 3, 4, 5, 6, 6], [1, 2, 3, 4, 5, 6, 7, 8], [-1, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 2**32 + 7]):
            for layout in ("contiguous", "seq-index"):
                self.changed(sound(), "seq_index", seq_index=integers((2, 4), values), options=["--ranks", "2", "--layout", layout])
        for shape in ((2, 3), (2, 5), (8,), (1, 2, 4), (0, 4), (8, 0), (16, 0), (3, 3)):
            count = 1
            for extent in shape:
                count *= extent
            self.changed(sound(), "seq_index", seq_index=integers(shape, range(count)))
        index = integers((2, 4), range(8))
        for ranks in ("1", "4"):
            self.changed(sound(), "--layout seq-index", "seq_index", seq_index=index, options=["--ranks", ranks, "--layout", "seq-index"])
        self.changed(sound(), "--layout seq-index", "seq_index", options=["--layout", "seq-index"])

    def test_decoding_of_packed_rows(self):
        self.changed(sound(documents=3, decode=2), "decode", attention_mask=integers((2, 8), [1] * 4 + [2] * 4 + [1] * 8))
        self.changed(sound(batch=1, documents=2, decode=2), "decode", cu_seqlens=integers((3,), [0, 3, 8]))

    def test_expected_tensors_without_what_asks_for_them(self):
        for name in [n for n in sound().tensors if n.startswith("expected.grad.")] + ["expected.grad.other"]:
            bundle = sound(grad=False)
            bundle.tensors[name] = sound().tensors.get(name, Tensor((1,), 0))
            self.refuses(bundle, name, "grad_output")
        for name in [n for n in sound(decode=2).tensors if n.startswith("expected.decode.")] + ["expected.decode.other"]:
            bundle = sound()
            bundle.tensors[name] = sound(decode=2).tensors.get(name, Tensor((1,), 0))
            self.refuses(bundle, name, "decode.hidden_states")
        bundle = sound()
        bundle.tensors["expected.grad.linear_attn.in_proj_ba.weight"] = Tensor((4, 8), 0.5)
        self.refuses(bundle, "expected.grad.linear_attn.in_proj_ba.weight", "layout")

    # ---- options

    def test_layouts_that_do_not_fit(self):
        for ranks in ("3", "8", "64"):
            self.changed(sound(), "--layout zigzag", "--ranks " + ranks, "S = 8", options=["--ranks", ranks, "--layout", "zigzag"])
        mask = integers((2, 8), [1] * 4 + [2] * 4 + [1] * 6 + [0] * 2)
        for ranks, document in (("2", "document 2"), ("4", "document 0"), ("3", "document 0")):
            self.changed(sound(documents=3), "--layout zigzag-documents", document, attention_mask=mask,
                         options=["--ranks", ranks, "--layout", "zigzag-documents"])
        self.changed(sound(batch=1, documents=3), "--layout zigzag-documents", "document 0", cu_seqlens=integers((4,), [0, 2, 2, 8]),
                     options=["--ranks", "2", "--layout", "zigzag-documents"])

    def test_usage(self):
        good = sound()
        for options, word in ((["--ranks", "0"], "--ranks"), (["--ranks", "65"], "--ranks"), (["--ranks", "x"], "--ranks"), (["--ranks", "1.5"], "--ranks"),
                              (["--comm", "smoke"], "--comm"), (["--backend", "x"], "--backend"),
                              (["--layout", "x"], "--layout"), (["--strategy", "x"], "--strategy"), (["--share", "x"], "--share"),
                              (["--dtype", "x"], "--dtype"), (["--dtype", "f8"], "--dtype"),
                              (["--rule", "x"], "--rule"), (["--products", "x"], "--products"), (["--products", "tf32"], "--products"),
                              (["--tolerance", "0"], "--tolerance"), (["--tolerance", "nan"], "--tolerance"),
                              (["--tolerance", "inf"], "--tolerance"), (["--repeat", "0"], "--repeat"), (["--frobnicate"], "--frobnicate")):
            with open(self.path("input"), "wb") as f:
                f.write(good.bytes())
            self.refuses(None, word, options=[*options, "input"])
        self.refuses(None, "BUNDLE")
        self.refuses(None, "second", options=["input", "second"])

    def test_files_that_cannot_be_written(self):
        with open(self.path("input"), "wb") as f:
            f.write(sound().bytes())
        os.mkdir(self.path("folder"))
        for option in ("--out", "--json"):
            for name in ("folder", "no/such/folder", "", "input"):
                result = self.run_program(option, name, "input")
                self.assertEqual(result.returncode, 2, (option, name, result.stderr))
                self.assertIn(option.encode(), result.stderr)
                self.assertEqual(result.stderr.count(b"\n"), 1)
        result = self.run_program("--out", "same", "--json", "./same", "input")
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertEqual(set(os.listdir(self.folder.name)), {"input", "folder"})
        with open(self.path("input"), "rb") as f:
            self.assertEqual(f.read(), sound().bytes())


class CudaRefusals(Program):
    """Of a gdn-run with the CUDA backend, before it looks for a GPU."""

    def test_heads_that_are_no_multiples_of_16_up_to_256(self):
        for k, v, key in ((4, 16, "key"), (24, 16, "key"), (272, 16, "key"), (16, 6, "value"), (16, 40, "value"), (16, 257, "value")):
            for options in ([], ["--dtype", "bf16"], ["--ranks", "2", "--strategy", "in-place"]):
                self.refuses(sound(key_dim=k, value_dim=v), f"linear_{key}_head_dim is {k if key == 'key' else v}", "multiples of 16 up to 256",
                             options=["--backend", "cuda", *options])

    def test_options(self):
        for options, word in ((["--dtype", "f64"], "--dtype f64"), (["--rule", "recurrent"], "--rule recurrent"),
                              (["--comm", "threads"], "--comm threads"), (["--products", "tf32", "--dtype", "f16"], "--products tf32")):
            self.refuses(None, word, options=["--backend", "cuda", *options, "input"])


if __name__ == "__main__":
    PROGRAM = os.path.abspath(sys.argv[1])
    unittest.main(argv=sys.argv[:1], defaultTest="CudaRefusals" if "CudaRefusals" in sys.argv else "Refusals", verbosity=2)
