"""The house: who may import whom, and how large its rooms may be. Budgets count what an import reaches."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "cli", "bench")
FILES = sorted([*ROOT.glob("*.py"), *(file for name in (*PACKAGES, "scripts") for file in ROOT.glob(f"{name}/*.py"))])


def module_of(file):
    *folders, stem = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(folders if stem == "__init__" else [*folders, stem])


MODULES = {module_of(file): file for file in FILES}
COMMANDS = {"generate", "quantize", "eval"} | {name for name in MODULES if name.startswith(("scripts.", "bench."))}


@cache
def tree_of(module):
    return ast.parse(MODULES[module].read_text())


@cache
def imports(module):
    """Return all that a module imports, anywhere in it: in a function and for type checkers too."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def own_imports(module):
    return sorted((imports(module) & MODULES.keys()) - {module, *PACKAGES})


def reached_from(*modules):
    """Return the modules that are loaded with these."""
    reached, waiting = set(), list(modules)
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += own_imports(module)
    return reached


def code_lines(module):
    """Count a module's lines of code: none that is blank, a comment or of a docstring."""
    lines = set()
    docstrings = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for number, line in enumerate(MODULES[module].read_text().splitlines(), start=1):
        if line.strip() and not line.strip().startswith("#"):
            lines.add(number)
    return len(lines - docstrings)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_leads_back_to_its_module(module):
    assert module not in reached_from(*own_imports(module))


def test_the_model_stands_on_torch_alone():
    assert own_imports("model") == []
    assert {name.split(".")[0] for name in imports("model")} - set(sys.stdlib_module_names) == {"torch"}
    assert own_imports("linears") == ["model"]


def test_kernels_stand_on_the_model_and_the_linears():
    for module in (name for name in MODULES if name.startswith("kernels")):
        others = [name for name in own_imports(module) if not name.startswith("kernels")]
        assert set(others) <= {"model", "linears"}, (module, others)
    assert set(own_imports("steps")) <= {"model", "kernels.cpu", "kernels.layers"}


@pytest.mark.parametrize("module", ["engine", "speculate"])
def test_the_engine_knows_no_files_texts_or_terminals(module):
    outside = {"checkpoint", "config", "files", "tokenizer"}
    assert not {name for name in reached_from(module) if name in outside or name.startswith("cli")}


def test_the_engine_needs_no_speculation():
    assert reached_from("engine") & {"speculate", "drafters", "eagle", "suffix"} == set()


def test_only_commands_import_words_to_a_user():
    for module in MODULES.keys() - COMMANDS:
        if not module.startswith("cli"):
            assert not [name for name in imports(module) if name.split(".")[0] == "cli"], module


def test_what_the_engine_and_quantize_reach_is_small():
    """Whatever they reach counts, in whichever file it is: what computes a text, and what reads and cuts a folder."""
    apart = {"kernels.cpu", "kernels.cuda", "kernels.inductor", "tokenizer", "special_tokens", "detokenizer", "tekken"}
    folder = {"config", "families", "rope", "names", "checkpoint", "files"}
    folder |= {"formats", "quantization", "compressed", "tp"}
    counts = {name: code_lines(name) for name in reached_from("engine", "quantize") - apart}
    counts = {name: count for name, count in counts.items() if not name.startswith("cli")}
    assert sum(count for name, count in counts.items() if name not in folder) <= 1363, counts
    assert sum(counts[name] for name in folder) <= 1494, counts
    assert counts["model"] <= 312


def test_what_measures_is_small():
    assert sum(code_lines(name) for name in MODULES if name.startswith("bench")) <= 2300


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    if module not in ("kernels.cpu", "kernels.cuda"):
        assert len(MODULES[module].read_text().splitlines()) <= (500 if module == "model" else 450)
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef) and not is_triton_kernel(node):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has more than 60 lines"
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert len([a for a in arguments if a.arg != "self"]) <= 8, f"{node.name} has more than 8 parameters"


def is_triton_kernel(function):
    """Say whether it is launched on a GPU: its arguments are pointers and sizes."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_one_token_is_followed_with_few_concepts():
    page = (ROOT / "docs/design.md").read_text().partition("## Where to add")[0]
    concepts = set(re.findall(r"\*\*(.*?)\*\*", page, re.DOTALL)) - {"bold"}
    assert f"{len(concepts)} of them" in page
    assert len(concepts) <= 27


# Whatever an import could leave behind, in a process of its own.
WATCH = """
import sys, signal, torch
import importlib
def state():
    from torch._inductor import config as inductor
    from torch._dynamo import config as dynamo
    return [torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.distributed.is_initialized(), inductor.get_config_copy(), dynamo.get_config_copy(),
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.excepthook, sys.unraisablehook]
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = state()
    assert after == before, name
"""


def test_imports_change_nothing():
    names = [name for name in MODULES if name.split(".")[0] not in ("bench", "scripts") and name != "kernels.cuda"]
    subprocess.run([sys.executable, "-c", WATCH, *names], cwd=ROOT, check=True)
