#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/*.md say what is so. Checked are

 - code blocks: each is an excerpt of a file that is compiled or run; a line `// ...` (or `# ...`) leaves something out
 - commands: scripts, programs, options, values, presets, targets and files exist
 - links within the repository, with their headings
 - names in `code`: of files, of tests, of identifiers, which must occur in the sources
 - tables that a program makes, between `<!-- begin NAME -->` and `<!-- end NAME -->`, and figures

check_docs.py [--tables PROGRAM] [--write]    with --write it puts the tables into place
"""
import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [p for folder in ("include", "backends", "benchmarks", "examples", "tests", "scripts") for p in (ROOT / folder).rglob("*")
           if p.suffix in (".hpp", ".cuh", ".cpp", ".cu", ".py", ".sh", ".txt") or p.parent.name == "scripts" and p.is_file()]
SOURCES = [p for p in SOURCES if p.name != "check_docs.py"] + [ROOT / "CMakeLists.txt"]

# Names of other projects, which the pages explain; identifiers that start with these are theirs, too.
FOREIGN = set("""
    torch torch_dtype argsort gather searchsorted repeat_interleave requires_grad fully_shard
    A_log dt_bias position_ids cache_position cache_params qkv_format attention_mask hidden_states seq_idx conv_state
    blockdiag_state is_first_rank pre_num_ranks post_num_ranks pre_num_conv_tokens cu_seq_lens_q
    Qwen3_5RMSNormGated linear_attn nemo_automodel cp_linear_attn qwen3_5_moe conv_states recurrent_states input_layernorm
    seq_len chunk_size cp_size cp_rank cp_group local_tensor mixed_qkv original_positions sorted_positions layer_idx num_v_heads fp32_dtype
    chunk_gated_delta_rule fused_recurrent_gated_delta_rule build_cp_context cp_context output_final_state
    conv1d_kernel_size cu_seqlens_global d_final_state use_qk_l2norm_in_kernel allow_neg_eigval
    CPAwareGatedDeltaNet SSMGate install_ssm_gate DualChunkSwap
""".split())

# What NeMo's page names, all of which coming_from_nemo.md must have.
NEMO = """
    CPAwareGatedDeltaNet SSMGate _AllGatherConcatFn _SSMGateParam _resolve_ssm_dtype install_ssm_gate _FP32_PARAM_NAMES
    _all_gather_concat _build_dual_chunk_local_positions _compute_gate _conv1d_with_cp _extract_local_seq_index
    _forward_no_cp _forward_with_cp _redo_attention_load_balancing _undo_attention_load_balancing forward _cp_mesh
    cache_params cache_position attention_mask position_ids qkv_format cu_seqlens indices seq_index
""".split()

problems = []


def problem(page, line, text):
    problems.append(f"{page.relative_to(ROOT)}:{line}: {text}")


def squeeze(text):
    return " ".join(text.split())


class Page:
    """The lines of a page, its blocks as (line, language, text), and its text without them."""

    def __init__(self, path):
        self.path, self.lines, self.blocks, self.prose = path, path.read_text().splitlines(), [], []
        start = None
        for number, line in enumerate(self.lines, 1):
            if line.startswith("```"):
                if start is None:
                    start, language, body = number, line[3:].strip(), []
                else:
                    self.blocks.append((start, language, "\n".join(body)))
                    start = None
            elif start is None:
                self.prose.append((number, line))
            else:
                body.append(line)
        if start is not None:
            problem(path, start, "a code block without an end")

    def anchors(self):
        out = set()
        for _, line in self.prose:
            if match := re.match(r"#+ +(.*)", line):
                plain = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", match[1]).lower())
                out.add(plain.replace(" ", "-"))
        return out


# ---- code -------------------------------------------------------------------------------------------------------------

def check_excerpt(page, line, block, suffixes, skip):
    parts = [squeeze(part) for part in re.split(rf"^\s*{re.escape(skip)} \.\.\.\s*$", block, flags=re.M)]
    for source in SOURCES:
        if source.suffix not in suffixes:
            continue
        text, at = squeeze(source.read_text(errors="replace")), 0
        for part in parts:
            at = text.find(part, at)
            if at < 0:
                break
            at += len(part)
        else:
            return
    problem(page, line, "this code is no excerpt of a file that is compiled")


# ---- commands ---------------------------------------------------------------------------------------------------------

RUN_OPTIONS = (ROOT / "examples/run_layer/options.cpp").read_text()
PRESETS = json.loads((ROOT / "CMakePresets.json").read_text())
CMAKE = "\n".join(p.read_text() for p in SOURCES if p.name == "CMakeLists.txt")
CMAKE_VARIABLES = {"Kokkos_ROOT", "gdn_ROOT", "CMAKE_PREFIX_PATH", "CMAKE_INSTALL_PREFIX", "CMAKE_BUILD_TYPE", "CMAKE_CXX_COMPILER"}


def commands(block):
    for number, line in enumerate(block.replace("\\\n", "  ").splitlines()):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield number, words


def check_options(say, words, texts, values=""):
    for word, following in zip(words, [*words[1:], ""]):
        if not word.startswith("--"):
            continue
        name, _, value = word.partition("=")
        if not any(re.search(re.escape(name) + r"(?![\w-])", t) for t in texts):
            say(f"there is no option {name}")
        value = value or following
        choices = re.search(rf'"{name}", (\w+),', values)
        listed = choices and re.search(rf"{choices[1]} = \{{\{{.*?\}};", values, re.S)
        if listed and f'"{value}"' not in listed[0]:
            say(f"{name} has no value {value}")


def is_program(name):
    """Examples and benchmarks are programs of one file."""
    return any(ROOT.glob(f"examples/{name}.c*")) or any(ROOT.glob(f"benchmarks/{name}.c*"))


def check_command(page, line, words):
    say = lambda text: problem(page, line, f"{text}: {' '.join(words)}")
    program = words[0]
    name = Path(program).name
    for word in words[1:]:
        path = re.sub(r"^(-I|-isystem)", "", word)
        if "/" in path and re.fullmatch(r"[\w./-]+", path) and not path.startswith(("/", "build/", "-")):
            if not list(ROOT.glob(path)):
                say(f"there is no {path}")
    if program.startswith("scripts/"):
        script = ROOT / program
        if not script.exists() or not script.stat().st_mode & 0o100:
            say("there is no such script")
        else:
            run = name == "run"
            check_options(say, words[1:], [script.read_text(), *([RUN_OPTIONS] if run else [])], RUN_OPTIONS if run else "")
    elif name == "gdn-run":
        check_options(say, words[1:], [RUN_OPTIONS], RUN_OPTIONS)
    elif program == "python3":
        if (ROOT / words[1]).exists():
            check_options(say, words[2:], [(ROOT / words[1]).read_text()])
    elif program == "cmake" or program == "ctest":
        kind = "configurePresets" if program == "cmake" else "testPresets"
        for word, following in zip(words, [*words[1:], ""]):
            if word == "--preset" and following not in [p["name"] for p in PRESETS[kind]]:
                say(f"there is no preset {following}")
            if word == "--target" and following not in CMAKE and not is_program(following):
                say(f"there is no target {following}")
            if (match := re.match(r"-D(\w+)", word)) and match[1] not in CMAKE_VARIABLES and match[1] not in CMAKE:
                say(f"there is no variable {match[1]}")
    elif program.startswith("build/"):
        if not is_program(name) and f"({name}" not in CMAKE:
            say("there is no such program")
    elif program not in ("c++", "git", "cd", "export"):
        say("an unknown command")


# ---- prose ------------------------------------------------------------------------------------------------------------

ALL = "\n".join(p.read_text(errors="replace") for p in SOURCES)
WORDS = set(re.findall(r"[A-Za-z_]\w*", ALL))
TESTS = {f"{suite}.{test}" for suite, test in re.findall(r"TEST(?:_F|_P)?\(\s*(\w+),\s*(\w+)\s*\)", ALL)}


def check_link(page, line, target, pages):
    if re.match(r"https?://", target):
        return
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        problem(page, line, f"there is no {target}")
    elif anchor and (file not in pages or anchor not in pages[file].anchors()):
        problem(page, line, f"{path or page.name} has no heading #{anchor}")


def check_code(page, line, code):
    if re.fullmatch(r"[\w./*-]+\.(hpp|cuh|cpp|cu|py|md|txt|svg)|(scripts|tests|docs|include|examples|backends)/[\w./*-]*", code):
        folders = (ROOT, ROOT / "include", ROOT / "include/gdn", *ROOT.glob("backends/*/include"), ROOT / "docs", ROOT / "tests/data")
        suffix = any(f"/{source}".endswith(f"/{code}") for source in SOURCES)
        if not suffix and not any(list(folder.glob(code.rstrip("/"))) for folder in folders):
            problem(page, line, f"there is no file {code}")
        return
    if re.fullmatch(r"\w+\.[A-Z]\w+", code) and code not in TESTS:
        problem(page, line, f"there is no test {code}")
        return
    if re.search(r"[^\w\s.,:;()<>\[\]&*=+|/{}'\"^-]", code):
        return  # a formula
    for word in re.findall(r"[A-Za-z_]\w*", code):
        known = word in WORDS or word in FOREIGN or word.startswith("_")
        if "_" in word and not known:
            problem(page, line, f"`{word}` does not occur in the sources")


# ---- tables and figures ---------------------------------------------------------------------------------------------

def check_tables(program, write):
    made = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    tables = {name: body.strip() for name, body in re.findall(r"begin (\w+)\n(.*?)end \1\n", made, re.S)}
    found = set()
    for path in PAGES:
        text = path.read_text()

        def replace(match):
            found.add(match[1])
            if match[1] not in tables:
                problem(path, 1, f"no program makes the table {match[1]}")
                return match[0]
            return f"<!-- begin {match[1]} -->\n{tables[match[1]]}\n<!-- end {match[1]} -->"

        new = re.sub(r"<!-- begin (\w+) -->\n(.*?)<!-- end \1 -->", replace, text, flags=re.S)
        if new != text:
            if write:
                path.write_text(new)
            else:
                problem(path, 1, "a table is not as its program makes it; check_docs.py --write puts it right")
    for name in tables.keys() - found:
        problem(PAGES[0], 1, f"the table {name} is on no page")


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tables", metavar="PROGRAM")
    arguments.add_argument("--write", action="store_true")
    given = arguments.parse_args()

    if given.tables:
        check_tables(given.tables, given.write)
    pages = {path: Page(path) for path in PAGES}
    pages |= {path: Page(path) for path in (ROOT / "tests/data/README.md",)}
    for path in PAGES:
        page = pages[path]
        for line, language, block in page.blocks:
            if language == "cpp":
                check_excerpt(path, line, block, (".hpp", ".cuh", ".cpp", ".cu"), "//")
            elif language == "cmake":
                check_excerpt(path, line, block, (".txt",), "#")
            elif language == "sh":
                for offset, words in commands(block):
                    check_command(path, line + 1 + offset, words)
            elif language != "text":
                problem(path, line, f"a block of '{language}'; it must be cpp, cmake, sh or text")
        for line, text in page.prose:
            for target in re.findall(r"\]\(([^)\s]+)\)", text):
                check_link(path, line, target, pages)
            for target in re.findall(r'(?:src|href)="([^"]+)"', text):
                check_link(path, line, target, pages)
            for code in re.findall(r"`([^`]+)`", text):
                check_code(path, line, code)
    nemo = (ROOT / "docs/coming_from_nemo.md").read_text()
    for name in NEMO:
        if not re.search(rf"(?<!\w){name}(?!\w)", nemo):
            problems.append(f"docs/coming_from_nemo.md does not have {name}")
    figures = subprocess.run([sys.executable, ROOT / "docs/figures.py", "--check"], capture_output=True, text=True)
    if figures.returncode != 0:
        problems.append(figures.stderr.strip())

    print("\n".join(problems) if problems else f"{len(PAGES)} pages are sound")
    sys.exit(1 if problems else 0)


main()
