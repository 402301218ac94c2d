#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gdn-run runs bundles as bundle.md says: exit codes 0 and 1, the table, the files it writes.

run_test.py GDN_RUN --data DIR
"""
import json
import math
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from bundles import Tensor, file_bytes, integers, read, sound

PROGRAM, DATA = "", Path()


class Runs(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def run_program(self, bundle, *options, code=0):
        """`bundle` is a Bundle, bytes or a path. Returns standard output, what --json wrote and what --out wrote."""
        if not isinstance(bundle, (str, Path)):
            with open(self.path("input"), "wb") as f:
                f.write(bundle if isinstance(bundle, bytes) else bundle.bytes())
            bundle = "input"
        for name in ("out", "json"):
            if os.path.exists(self.path(name)):
                os.remove(self.path(name))
        result = subprocess.run([PROGRAM, *options, "--out", "out", "--json", "json", str(bundle)], cwd=self.folder.name,
                                capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
        self.assertEqual(result.returncode, code, result.stdout.decode() + result.stderr.decode())
        self.assertEqual(result.stderr, b"")
        with open(self.path("json")) as f:
            report = json.load(f)
        self.assertEqual(report["ok"], code == 0)
        return result.stdout.decode(), report, read(self.path("out"))[1]

    def altered(self, sample, **edits):
        """A sample of the repository with the values of some tensors mapped, as bytes."""
        content = (DATA / sample).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8:8 + length]), bytearray(content[8 + length:])
        _, tensors = read(DATA / sample)
        for name, edit in edits.items():
            name = name.replace("__", ".")
            t = tensors[name]
            data[slice(*header[name]["data_offsets"])] = t.like(values=[edit(x) for x in t.values]).bytes()
        return file_bytes(header, bytes(data))

    def test_every_sample_is_within_its_limits_on_one_rank_and_on_several(self):
        samples = sorted(DATA.glob("*.safetensors"))
        self.assertTrue(samples)
        for sample in samples:
            for options in ((), ("--ranks", "3"), ("--ranks", "2", "--layout", "interleaved", "--strategy", "in-place", "--dtype", "f64")):
                with self.subTest(sample=sample.name, options=options):
                    _, report, _ = self.run_program(sample, *options)
                    self.assertTrue(report["tensors"])

    def test_table_and_json_hold_the_same(self):
        text, report, _ = self.run_program(DATA / "qwen3_5_plain.safetensors", "--ranks", "4", "--layout", "zigzag")
        _, tensors = read(DATA / "qwen3_5_plain.safetensors")
        expected = {n: t.shape for n, t in tensors.items() if n.startswith("expected.")}
        self.assertEqual({t["name"]: t["shape"] for t in report["tensors"]}, expected)
        for t in report["tensors"]:
            self.assertIn(t["name"], text)
            self.assertEqual(set(t), {"name", "shape", "max_abs", "rel_rms", "limit", "ok"})
            self.assertTrue(t["ok"] and t["rel_rms"] <= t["limit"] == 3e-5 and t["max_abs"] >= 0)
        self.assertEqual([b["rank"] for b in report["bytes_received"]], [0, 1, 2, 3])
        for b in report["bytes_received"]:
            self.assertEqual(set(b), {"rank", "halo", "state", "activations"})
            self.assertTrue(all(isinstance(x, int) and x >= 0 for x in b.values()))
        self.assertGreater(sum(b["state"] for b in report["bytes_received"]), 0)
        self.assertTrue(all(x >= 0 for x in report["milliseconds"].values()))
        for word in ("tokens", "ranks", "halo", "state", "activations", "milliseconds"):
            self.assertIn(word, text)

    def test_one_rank_receives_nothing(self):
        _, report, _ = self.run_program(DATA / "qwen3_5_plain.safetensors")
        self.assertEqual(report["bytes_received"], [{"rank": 0, "halo": 0, "state": 0, "activations": 0}])

    def test_in_place_moves_no_activations(self):
        for layout in ("contiguous", "zigzag"):
            _, report, _ = self.run_program(DATA / "qwen3_5_plain.safetensors", "--ranks", "4", "--layout", layout, "--strategy", "in-place")
            self.assertEqual([b["activations"] for b in report["bytes_received"]], [0] * 4)
        _, report, _ = self.run_program(DATA / "qwen3_5_plain.safetensors", "--ranks", "4", "--layout", "zigzag")
        self.assertTrue(all(b["activations"] > 0 for b in report["bytes_received"]))

    def test_results_are_written_under_their_names(self):
        for sample in ("qwen3_5_cached_decode.safetensors", "qwen3_next_packed.safetensors"):
            for dtype, name in (("f32", "F32"), ("f64", "F64")):
                _, _, out = self.run_program(DATA / sample, "--ranks", "2", "--dtype", dtype)
                _, tensors = read(DATA / sample)
                expected = {n.removeprefix("expected."): t for n, t in tensors.items() if n.startswith("expected.")}
                self.assertEqual({n: t.shape for n, t in out.items()}, {n: t.shape for n, t in expected.items()})
                self.assertEqual({t.dtype for t in out.values()}, {name})
                for n, t in expected.items():
                    self.assertLess(max(abs(a - b) for a, b in zip(t.values, out[n].values)), 1e-2)

    def test_narrow_layers_write_states_and_gates_in_full_precision(self):
        for dtype, name in (("bf16", "BF16"), ("f16", "F16")):
            _, _, out = self.run_program(sound(decode=2, expected=False), "--ranks", "2", "--dtype", dtype)
            full = {n for n, t in out.items() if t.dtype == "F32"}
            self.assertEqual({t.dtype for t in out.values()}, {"F32", name})
            self.assertEqual(full, {n for n in out if n.endswith(("_state", "A_log", "dt_bias"))})

    def test_states_are_written_always(self):
        bundle = sound(grad=False, expected=False, states=False)
        text, report, out = self.run_program(bundle)
        self.assertEqual(set(out), {"output", "conv_state", "recurrent_state"})
        self.assertEqual(report["tensors"], [])
        self.assertIn("nothing to compare", text)

    def test_parts_are_left_out(self):
        _, report, out = self.run_program(DATA / "qwen3_5_cached_decode.safetensors", "--no-grad")
        self.assertFalse([n for n in out if n.startswith("grad.")] + [t for t in report["tensors"] if ".grad." in t["name"]])
        self.assertIn("decode.output", out)
        _, report, out = self.run_program(DATA / "qwen3_5_cached_decode.safetensors", "--no-decode")
        self.assertFalse([n for n in out if n.startswith("decode.")] + [t for t in report["tensors"] if ".decode." in t["name"]])
        self.assertIn("grad.hidden_states", out)

    def test_a_tensor_out_of_its_limit_is_exit_1_and_the_results_are_written(self):
        sample = "qwen3_5_cached_decode.safetensors"
        for name in ("expected.output", "expected.recurrent_state", "expected.grad.linear_attn.A_log", "expected.decode.output"):
            for edit in (lambda x: x * 1.01, lambda x: 0.0, lambda x: math.nan, lambda x: math.inf):
                text, report, out = self.run_program(self.altered(sample, **{name: edit}), code=1)
                self.assertEqual([t["name"] for t in report["tensors"] if not t["ok"]], [name])
                self.assertIn("FAILED", text)
                self.assertIn("output", out)

    def test_tolerance_is_the_limit_of_every_tensor(self):
        _, report, _ = self.run_program(DATA / "qwen3_5_plain.safetensors", "--tolerance", "1e-30", code=1)
        self.assertEqual({t["limit"] for t in report["tensors"]}, {1e-30})
        self.run_program(self.altered("qwen3_5_plain.safetensors", expected__output=lambda x: x * 1.01), "--tolerance", "0.02")

    def test_values_that_are_no_numbers_are_computed_with(self):
        for name in ("hidden_states", "linear_attn.out_proj.weight"):
            self.run_program(self.altered("qwen3_5_plain.safetensors", **{name: lambda x: math.nan}), code=1)

    def test_what_padding_holds_changes_nothing(self):
        mask = [0, 0, 1, 1, 1, 2, 2, 2] + [1, 1, 1, 1, 1, 1, 0, 0]
        bundle = sound(documents=3, expected=False)
        bundle.tensors["attention_mask"] = integers((2, 8), mask)
        results = []
        for padding in (0.0, 50.0, math.nan, math.inf):
            for name in ("hidden_states", "grad_output"):
                t = bundle.tensors[name]
                t.values = [x if mask[i // 8] else padding for i, x in enumerate(t.values)]
            results.append({n: t.values for n, t in self.run_program(bundle, "--ranks", "3")[2].items()})
        self.assertEqual(results.count(results[0]), len(results))
        for name in ("output", "grad.hidden_states"):
            self.assertTrue(all(x == 0 for i, x in enumerate(results[0][name]) if not mask[i // 8]))

    def test_what_is_unknown_is_ignored(self):
        bundle = sound(expected=False)
        plain = self.run_program(bundle)[2]
        bundle.tensors |= {"other": Tensor((3, 0), [], "I8"), "linear_attn.other": Tensor((2,), [0, 1], "BOOL"), "expected.other": Tensor((1,), 7)}
        bundle.config |= {"model_type": "qwen3_5", "rope": {"theta": [1, None]}, "\u00fc": "\n"}
        bundle.config["hidden_act"] = "swish"
        del bundle.config["mamba_ssm_dtype"]
        other = self.run_program(bundle)[2]
        self.assertEqual({n: t.values for n, t in plain.items()}, {n: t.values for n, t in other.items()})

    def test_documents_may_be_given_in_several_ways(self):
        def results(**tensors):
            bundle = sound(batch=1, documents=2, expected=False)
            bundle.tensors |= tensors
            return {n: t.values for n, t in self.run_program(bundle, "--ranks", "2", "--layout", "zigzag")[2].items()}
        mask = [1, 1, 1, 2, 2, 2, 2, 2]
        first = results(attention_mask=integers((1, 8), mask))
        self.assertEqual(first, results(attention_mask=integers((1, 8), [3 * x for x in mask], "I32")))
        self.assertEqual(first, results(cu_seqlens=integers((3,), [0, 3, 8])))
        self.assertEqual(first, results(cu_seqlens=integers((3,), [0, 3, 8], "I32")))

    def test_the_final_state_of_an_empty_document_is_its_initial_state(self):
        bundle = sound(batch=1, documents=3, expected=False)
        bundle.tensors["cu_seqlens"] = integers((4,), [0, 3, 3, 8])
        for ranks in ("1", "3"):
            out = self.run_program(bundle, "--ranks", ranks)[2]
            for state, initial in (("recurrent_state", "initial_state"), ("conv_state", "initial_conv_state")):
                third = len(out[state].values) // 3
                want = Tensor(out[state].shape, bundle.tensors[initial].values)
                self.assertEqual(out[state].values[third:2 * third], list(memoryview(want.bytes()).cast("f"))[third:2 * third])

    def test_gradient_of_a_state_that_is_not_given_is_that_of_a_zero_state(self):
        bundle = sound(expected=False)
        for name in ("initial_state", "initial_conv_state"):
            bundle.tensors[name] = Tensor(bundle.tensors[name].shape, 0.0)
        want = self.run_program(bundle)[2]
        for name in ("initial_state", "initial_conv_state"):
            del bundle.tensors[name]
            bundle.tensors["expected.grad." + name] = want["grad." + name]
        self.run_program(bundle, "--ranks", "2")

    def test_layouts_give_one_rank_s_results(self):
        bundle = sound(seq=16, decode=2, expected=False)
        bundle.tensors["seq_index"] = integers((4, 4), [(7 * i) % 16 for i in range(16)])
        want = self.run_program(bundle, "--dtype", "f64")[2]
        for layout in ("contiguous", "zigzag", "zigzag-documents", "interleaved", "seq-index"):
            for strategy in ("reshard", "in-place"):
                for share in ("all-gather", "prefix-scan", "relay"):
                    options = ("--dtype", "f64", "--ranks", "4", "--layout", layout, "--strategy", strategy, "--share", share)
                    with self.subTest(options=options):
                        out = self.run_program(bundle, *options)[2]
                        for n, t in want.items():
                            self.assertLess(max(abs(a - b) for a, b in zip(t.values, out[n].values)), 1e-12, n)

    def test_ranks_may_hold_nothing(self):
        self.run_program(sound(expected=False, decode=2), "--ranks", "64")

    def test_rules_agree_and_repeated_runs_too(self):
        bundle = sound(expected=False, decode=2)
        want = self.run_program(bundle, "--dtype", "f64")[2]
        for options in (("--rule", "recurrent"), ("--repeat", "3")):
            out = self.run_program(bundle, "--dtype", "f64", *options)[2]
            for n, t in want.items():
                self.assertLess(max(abs(a - b) for a, b in zip(t.values, out[n].values)), 1e-12, n)

    def test_help_and_version(self):
        for option, word in (("--help", "--layout"), ("-h", "--ranks"), ("--version", "gdn-run ")):
            result = subprocess.run([PROGRAM, option], capture_output=True, timeout=60)
            self.assertEqual((result.returncode, result.stderr), (0, b""))
            self.assertIn(word, result.stdout.decode())

    def test_files_may_be_devices(self):
        with open(self.path("input"), "wb") as f:
            f.write(sound(expected=False).bytes())
        result = subprocess.run([PROGRAM, "--out", "/dev/null", "--json", "/dev/stdout", self.path("input")], capture_output=True, timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue(json.loads(result.stdout.splitlines()[0])["ok"])
        self.assertTrue(Path("/dev/null").is_char_device())


if __name__ == "__main__":
    PROGRAM = os.path.abspath(sys.argv[1])
    DATA = Path(sys.argv[sys.argv.index("--data") + 1]).resolve()
    unittest.main(argv=sys.argv[:1], verbosity=2)
