"""eval.py: perplexity and KL against `transformers`, the harness against its own `hf` model, and the command."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import tokenizers
import torch
from tokenizers import decoders, normalizers

import eval as eval_module
import likelihood
from checkpoint import load_model
from config import eos_token_ids
from engine import generate
from eval import main
from harness import Generation, generate_texts, harness_model, parse_generation
from likelihood import Window, kl_divergence, log_probabilities, loglikelihoods, perplexity, sliding_windows
from model import Transformer
from steps import Sampling
from tests.conftest import REPO, HubCheckpoint, assert_user_error, run_command, shared_data
from tests.test_tokenizer import byte_level_backend, llama2_style_backend
from tokenizer import load_tokenizer

DEMO = REPO / "checkpoints" / "demo"
GetCheckpoint = Callable[[str], HubCheckpoint]


def random_ids(length: int, vocab_size: int = 96) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def gqa_model(hub_checkpoint: GetCheckpoint) -> Transformer:
    return load_model(hub_checkpoint("gqa").path, dtype=torch.float32)


@torch.no_grad()
def strided_nll(model: Any, ids: list[int], length: int, stride: int) -> tuple[float, int]:
    """Sum the losses of a `transformers` model over strided windows, and count them, as its documentation does."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        tokens = torch.tensor([ids[begin:end]])
        labels = tokens.clone()
        labels[:, : -(end - previous)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        total += float(model(tokens, labels=labels).loss.double()) * scored
        count += scored
        previous = end
        if end == len(ids):
            break
    return total, count


# ---------------------------------------------------------------------------------------------------------------------
# Windows, perplexity and KL divergence


@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 24, 25, 100])
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (16, 1), (2, 1), (3, 1)])
def test_windows_predict_each_token_but_the_first_once_with_the_context_promised(length, window, stride):
    predicted = []
    for piece in sliding_windows(range(length), window, stride):
        assert len(piece.ids) <= window and 1 <= piece.num_targets < len(piece.ids)
        targets = piece.ids[-piece.num_targets :]
        predicted += targets
        assert piece.ids[0] == 0 or targets[0] - piece.ids[0] >= window - stride
    assert predicted == list(range(1, length))


@pytest.mark.parametrize("stride", [0, 16, 17])
def test_windows_that_do_not_overlap_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride of {stride} .* windows of 16"):
        sliding_windows(range(40), 16, stride)


@pytest.mark.parametrize("family", ["gqa", "rope_llama3", "mistral_window", "tied"])
def test_perplexity_equals_transformers(hub_checkpoint: GetCheckpoint, family):
    from transformers import AutoModelForCausalLM

    path, ids = hub_checkpoint(family).path, random_ids(150)
    expected, count = strided_nll(AutoModelForCausalLM.from_pretrained(path).eval(), ids, 64, 32)
    result = perplexity(load_model(path, dtype=torch.float32), ids, 64, batch_size=3)
    assert result.num_tokens == count == 149
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected / count), rel=1e-5)


def test_perplexity_of_stories_equals_transformers():
    from transformers import AutoModelForCausalLM

    path = shared_data("stories260k")
    text = (shared_data("text") / "tinystories_197k.txt").read_text()[:6000]
    ids = load_tokenizer(path).encode(text)
    expected, count = strided_nll(AutoModelForCausalLM.from_pretrained(path).eval(), ids, 512, 256)
    result = perplexity(load_model(path), ids)
    assert result.num_tokens == count == len(ids) - 1
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert 3 < result.perplexity < 6  # a trained model: the text and its ids belong together


def test_perplexity_of_a_uniform_model_is_its_vocabulary_and_a_byte_costs_its_share_of_bits(gqa_model):
    gqa_model.lm_head.weight.data.zero_()
    result = perplexity(gqa_model, random_ids(65), 16)
    assert result.perplexity == pytest.approx(96)
    assert result.bits_per_byte(num_bytes=128) == pytest.approx(64 * math.log2(96) / 128)


@pytest.mark.parametrize("family", ["gqa", "rope_dynamic", "phi4_mini"])
def test_perplexity_leaves_a_model_with_caches_as_it_was(hub_checkpoint: GetCheckpoint, family):
    model = load_model(hub_checkpoint(family).path, dtype=torch.float32)
    model.setup_caches(1, 400)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    perplexity(model, random_ids(65), 16)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_kl_divergence_equals_its_definition_and_is_zero_for_the_same_model(gqa_model, hub_checkpoint: GetCheckpoint):
    other = load_model(hub_checkpoint("codellama").path, dtype=torch.float32)
    ids = random_ids(40)
    tokens, positions = torch.tensor([ids[:-1]]), torch.arange(39)
    p, q = (model(tokens, positions).double().softmax(dim=-1) for model in (gqa_model, other))
    expected = float((p * (p / q).log()).sum(dim=-1).mean())
    assert kl_divergence(gqa_model, other, ids, 64) == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(gqa_model, other, ids, 16, batch_size=3) == pytest.approx(
        kl_divergence(gqa_model, other, ids, 16), rel=1e-5
    )
    assert kl_divergence(gqa_model, gqa_model, ids) == 0


def test_log_probabilities_come_in_pieces_of_bounded_size(gqa_model, monkeypatch):
    windows = sliding_windows(random_ids(100), 32, 16)
    [(whole, targets)] = log_probabilities(gqa_model, windows)
    monkeypatch.setattr(likelihood, "PIECE_ELEMENTS", 7 * 96 + 5)
    pieces = list(log_probabilities(gqa_model, windows))
    assert [len(piece) for piece, _ in pieces] == [7] * 14 + [1]
    torch.testing.assert_close(torch.cat([piece for piece, _ in pieces]), whole, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([ids for _, ids in pieces]), targets)


def test_bf16_logits_are_summed_in_fp32(gqa_model):
    gqa_model.to(torch.bfloat16)
    [(log_p, _)] = log_probabilities(gqa_model, sliding_windows(random_ids(30), 32, 16))
    torch.testing.assert_close(log_p.exp().sum(dim=-1), torch.ones(29), atol=1e-5, rtol=0)


def test_loglikelihoods_do_not_depend_on_the_batch_nor_on_caches(gqa_model):
    ids = random_ids(400)
    windows = [
        Window(ids[7 * i : 7 * i + n], m) for i, (n, m) in enumerate([(2, 1), (50, 49), (9, 3), (33, 1), (9, 8)])
    ]
    alone = loglikelihoods(gqa_model, windows, 1)
    gqa_model.setup_caches(1, 64)
    cache = gqa_model.layers[0].self_attn.cache
    for batch_size in (2, 3, 5, 8):
        together = loglikelihoods(gqa_model, windows, batch_size)
        assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
        assert [x for x, _ in together] == pytest.approx([x for x, _ in alone], abs=1e-4)
    assert gqa_model.layers[0].self_attn.cache is cache


def test_greedy_says_whether_every_target_is_the_likeliest(gqa_model):
    gqa_model.setup_caches(1, 64)
    prompt = random_ids(5)
    made = [i for [step] in generate(gqa_model, [prompt], 6, Sampling(temperature=0)) for i in step]
    wrong = [*made[:3], (made[3] + 1) % 96, *made[4:]]
    windows = [Window(prompt + made, 6), Window(prompt + wrong, 6), Window(prompt + wrong, 2)]
    assert [greedy for _, greedy in loglikelihoods(gqa_model, windows, 3)][:2] == [True, False]


def test_logits_that_are_not_finite_are_refused(gqa_model):
    gqa_model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"not finite in torch.float32; its weights are damaged"):
        perplexity(gqa_model, random_ids(20))


def test_models_of_different_vocabularies_have_no_divergence(gqa_model):
    with torch.device("meta"):
        other = Transformer(replace(gqa_model.config, vocab_size=97))
    with pytest.raises(ValueError, match="96 and 97 ids"):
        kl_divergence(gqa_model, other, random_ids(20))


# ---------------------------------------------------------------------------------------------------------------------
# The harness, on tasks of our own

CONTEXT = 128  # of both models here: short enough that texts are cut and rolled
SOURCE = (REPO / "model.py").read_text()
CHOICES = [
    {"text": "import ", "choices": ["os", "banana", "sys\nimport os"], "label": 0},
    {"text": "def f(self):\n    return ", "choices": ["self.x", "class", "def def"], "label": 0},
    {"text": "class Stack", "choices": ["(metaclass=abc.ABCMeta):", "[Heap]"], "label": 0},
    {"text": "", "choices": ["import os", "oops"], "label": 0},
    {"text": "for i in ", "choices": ["while", "range(10):"], "label": 1},
    {"text": SOURCE[:900] + "\nclass ", "choices": ["Stack(object):", "(", "import"], "label": 2},
]
TEXTS = [{"text": SOURCE[:200]}, {"text": SOURCE[3000:5000]}, {"text": "x"}]
PROMPTS = [
    {"text": "import ", "answer": "os"},
    {"text": "def read(self, size=-1):", "answer": "pass"},
    {"text": "class Stack", "answer": ":"},
    {"text": SOURCE[:900], "answer": "x"},
]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {  # examples, yaml, metrics
    "tiny_choice": (
        CHOICES,
        {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"},
        ["acc", "acc_norm"],
    ),
    "tiny_rolling": (
        TEXTS,
        {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"},
        ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    ),
    "tiny_generate": (
        PROMPTS,
        {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n\n", "return"], "max_gen_toks": 24, "do_sample": False},
        },
        ["exact_match"],
    ),
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tasks as a user does: a yaml and a file of examples each. (JSON is YAML.)"""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (documents, fields, metrics) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "doc_to_text": "text",
            "target_delimiter": "",
            "metric_list": [{"metric": metric} for metric in metrics],
            **fields,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    group = {"group": "tiny", "task": ["tiny_choice", "tiny_rolling"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "tiny.yaml").write_text(json.dumps(group))
    return folder


def run_tasks(lm: Any, folder: Path) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """Return what the model answered to each request, documents in order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for [answer] in sample["resps"]]


def demo_in_harness(batch_size: int) -> Any:
    model = load_model(DEMO, dtype=torch.float32)
    return harness_model(model, load_tokenizer(DEMO), eos_token_ids(DEMO), CONTEXT, batch_size)


@pytest.fixture(scope="module")
def ours(task_folder: Path) -> dict[str, Any]:
    return run_tasks(demo_in_harness(batch_size=1), task_folder)


def in_harness_own_model(path: Path, backend: tokenizers.Tokenizer) -> Any:
    """Load a checkpoint with `transformers` into the harness's own model."""
    pytest.importorskip("accelerate", reason="the harness's own model needs accelerate, see requirements-dev.txt")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # Its logits_cache gives a wrong answer where "import" + " os" and "" + "import os" are asked in one task.
    return HFLM(model, tokenizer=tokenizer, max_length=CONTEXT, device="cpu", logits_cache=False)


@pytest.fixture(scope="module")
def theirs(task_folder: Path) -> dict[str, Any]:
    """Run the same tasks on the same checkpoint through the harness's own model."""
    backend = llama2_style_backend(DEMO / "tokenizer.model")
    backend.normalizer = normalizers.Replace(" ", "▁")  # unlike Llama 2's, the demo's puts no space before a text
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return run_tasks(in_harness_own_model(DEMO, backend), task_folder)


@pytest.mark.parametrize("task", TASKS)
def test_metrics_equal_the_harness_own_model(ours, theirs, task):
    assert ours["results"][task].keys() == theirs["results"][task].keys()
    for name, value in theirs["results"][task].items():
        if isinstance(value, float):
            tolerance = 1e-4 if task == "tiny_rolling" else 0
            assert ours["results"][task][name] == pytest.approx(value, rel=tolerance), name


def test_loglikelihoods_equal_the_harness_own_model(ours, theirs):
    expected, answers = responses(theirs, "tiny_choice"), responses(ours, "tiny_choice")
    assert len(expected) == 15 and len({greedy for _, greedy in expected}) == 2
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    assert [x for x, _ in answers] == pytest.approx([x for x, _ in expected], abs=1e-3)


def test_rolling_loglikelihoods_equal_the_harness_own_model(ours, theirs):
    assert responses(ours, "tiny_rolling") == pytest.approx(responses(theirs, "tiny_rolling"), abs=1e-3)


def test_generated_texts_equal_the_harness_own_model(ours, theirs):
    answers = responses(ours, "tiny_generate")
    assert answers == responses(theirs, "tiny_generate")
    assert len(set(answers)) == len(PROMPTS)
    assert not any(stop in text for text in answers for stop in ("\n\n", "return"))


def test_generated_texts_of_stories_equal_the_harness_own_model():
    """Unlike the demo's, this tokenizer puts a space before a text and takes it away in decoding."""
    from lm_eval.api.instance import Instance

    path = shared_data("stories260k")
    lm = harness_model(load_model(path), load_tokenizer(path), eos_token_ids(path), CONTEXT, batch_size=2)
    how = {"until": ["\n"], "max_gen_toks": 12}
    contexts = ["Once upon a time, there was a", "Lily went to the park and", "One day, a little girl named"]
    requests = [Instance("generate_until", {}, (context, how), i) for i, context in enumerate(contexts)]
    reference = in_harness_own_model(path, llama2_style_backend(path / "tokenizer.model"))
    assert lm.generate_until(requests) == reference.generate_until(requests)


@pytest.fixture(scope="module")
def byte_level_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny model for the ids of `byte_level_backend`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(**sizes, vocab_size=340, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1)
    folder = tmp_path_factory.mktemp("byte_level")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("own_bos", [True, False], ids=["post-processor", "no-post-processor"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": "<bos>"},
        {"bos_token": "<bos>", "add_bos_token": True},
        {"bos_token": {"content": "<bos>", "__type": "AddedToken"}, "add_bos_token": False},
        {"bos_token": None},
        {},
    ],
    ids=["bos", "added", "not-added", "null", "unnamed"],
)
def test_figures_equal_the_harness_own_model_wherever_bos_stands(byte_level_model, tmp_path, own_bos, settings):
    pytest.importorskip("accelerate", reason="the harness's own model needs accelerate, see requirements-dev.txt")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path / "model"
    shutil.copytree(byte_level_model, folder)
    byte_level_backend(own_bos).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    contexts = ("import ", "", "<bos>import", "<eos>import")
    pairs = [Instance("loglikelihood", {}, (context, "os or sys"), i) for i, context in enumerate(contexts)]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("def read(self):", "<bos>x", "<eos>x y")]
    how = {"until": [], "max_gen_toks": 6}
    prompts = [Instance("generate_until", {}, (text, how), 0) for text in ("import os", "<bos>x", "<eos>x")]
    theirs = HFLM(str(folder), dtype="float32", batch_size=1, device="cpu", logits_cache=False)
    mine = harness_model(load_model(folder), load_tokenizer(folder), eos_token_ids(folder), CONTEXT)
    assert mine.prefix_token_id == theirs.prefix_token_id and mine.eot_token_id == theirs.eot_token_id
    answers, expected = (lm.loglikelihood(pairs, disable_tqdm=True) for lm in (mine, theirs))
    assert [x for x, _ in answers] == pytest.approx([x for x, _ in expected], abs=1e-4)
    rolled, expected_rolled = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (mine, theirs))
    assert rolled == pytest.approx(expected_rolled, abs=1e-4)
    assert mine.generate_until(prompts) == theirs.generate_until(prompts)


def test_a_generated_text_ends_at_the_tokenizers_own_eos_too():
    from lm_eval.api.instance import Instance

    model, tokenizer = load_model(DEMO, dtype=torch.float32), load_tokenizer(DEMO)
    request = [Instance("generate_until", {}, ("class Stack", {"until": [], "max_gen_toks": 8}), 0)]
    model.setup_caches(1, CONTEXT)
    made = [i for [step] in generate(model, [tokenizer.encode("class Stack")], 8, Sampling(0)) for i in step]
    ended = harness_model(model, replace(tokenizer, named_eos_id=made[4]), (2,), CONTEXT).generate_until(request)
    assert ended == [tokenizer.decode(made[:4])]


def test_task_results_do_not_depend_on_the_batch_size(ours, task_folder):
    together = run_tasks(demo_in_harness(batch_size=3), task_folder)
    assert responses(together, "tiny_generate") == responses(ours, "tiny_generate")
    assert responses(together, "tiny_rolling") == pytest.approx(responses(ours, "tiny_rolling"), abs=1e-4)
    for (log_p, greedy), (alone, alone_greedy) in zip(
        responses(together, "tiny_choice"), responses(ours, "tiny_choice"), strict=True
    ):
        assert log_p == pytest.approx(alone, abs=1e-4) and greedy == alone_greedy


def test_a_context_is_cut_on_the_left_to_leave_room_for_what_is_scored(ours, task_folder):
    """The harness may hand over a text as long as it likes; what is left is what the model would see anyway."""
    from lm_eval.api.instance import Instance

    lm = demo_in_harness(batch_size=1)
    ids = lm.tok_encode(SOURCE)
    model = load_model(DEMO, dtype=torch.float32)
    [(log_p, _)] = lm._loglikelihood_tokens([(("", ""), ids[:500], ids[500:510])])
    [(expected, _)] = loglikelihoods(model, [Window(ids[510 - CONTEXT - 1 : 510], 10)], 1)
    assert log_p == pytest.approx(expected, abs=1e-4)

    how = {"until": [], "max_gen_toks": 5}
    [text] = lm.generate_until([Instance("generate_until", {}, (SOURCE, how), 0)])
    model.setup_caches(1, CONTEXT)
    steps = generate(model, [ids[5 - CONTEXT :]], 5, Sampling(0), eos_ids=eos_token_ids(DEMO))
    assert text == load_tokenizer(DEMO).decode(i for [step] in steps for i in step)


def test_a_text_ends_before_eos_and_before_the_first_stop_text():
    model, tokenizer = load_model(DEMO, dtype=torch.float32), load_tokenizer(DEMO)
    prompt = tokenizer.encode("class Stack")
    model.setup_caches(1, CONTEXT)
    made = [i for [step] in generate(model, [prompt], 8, Sampling(0)) for i in step]
    assert len(set(made)) > 4 and made[4] not in made[:4]

    def text(eos_ids: tuple[int, ...], *until: str) -> str:
        [text] = generate_texts(model, tokenizer, eos_ids, [prompt], Generation(until, 8, Sampling(0)))
        return text

    whole = tokenizer.decode(made)
    assert text(()) == whole
    assert text((made[4],)) == tokenizer.decode(made[:4])
    assert text((), whole[6:9], whole[3:5]) == whole[: min(whole.find(whole[6:9]), whole.find(whole[3:5]))]


def test_a_continuation_that_cannot_be_scored_is_refused():
    lm = demo_in_harness(batch_size=1)
    for length in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match=rf"'text' has {length} tokens of its own, expected 1 to {CONTEXT}"):
            lm._loglikelihood_tokens([(("", "text"), [1], [5] * length)])


def test_the_prefix_is_bos_else_eos_and_a_model_without_either_is_refused(gqa_model):
    tokenizer = load_tokenizer(DEMO)
    unnamed = replace(tokenizer, bos_id=None, named_bos_id=None)
    without_bos = replace(unnamed, named_eos_id=None)
    assert harness_model(gqa_model, tokenizer, (2,), 64).prefix_token_id == 1
    assert harness_model(gqa_model, replace(tokenizer, bos_id=None), (2,), 64).prefix_token_id == 1
    assert harness_model(gqa_model, unnamed, (3,), 64).prefix_token_id == 2
    assert harness_model(gqa_model, without_bos, (3,), 64).prefix_token_id == 3
    with pytest.raises(ValueError, match="neither a BOS nor an EOS"):
        harness_model(gqa_model, without_bos, (), 64)
    lm = harness_model(gqa_model, unnamed, (3,), 64)
    of_spaces, of_nothing = (lm._loglikelihood_tokens([((" ", "x"), ids, [5, 6])]) for ids in ([], [2]))
    assert of_spaces == of_nothing


def test_generation_kwargs_are_read_with_their_aliases():
    greedy = parse_generation({"until": "\n", "max_new_tokens": 7, "temperature": 1.0, "do_sample": False}, 64)
    assert (greedy.until, greedy.max_new_tokens, greedy.sampling) == (("\n",), 7, Sampling(0))
    nulls = dict.fromkeys(("max_gen_toks", "temperature", "top_k", "top_p", "min_p", "num_beams", "do_sample"))
    assert parse_generation({"until": None, **nulls}, 300) == Generation((), 256, Sampling(0))
    with pytest.raises(ValueError, match="generation_kwargs is None"):
        parse_generation(None, 300)
    drawn = parse_generation({"until": ["", "a"], "do_sample": True, "temperature": 0.5, "top_p": 0.9}, 300)
    assert (drawn.until, drawn.max_new_tokens, drawn.sampling) == (("a",), 256, Sampling(0.5, 0, 0.9))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"repetition_penalty": 1.2}, "'repetition_penalty': 1.2"),
        ({"num_beams": 4}, "num_beams 4"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"do_sample": True, "temperature": math.inf}, "temperature is inf"),
        ({"do_sample": True, "temperature": math.nan}, "temperature is nan"),
        ({"do_sample": True, "temperature": "hot"}, "hot"),
        ({"do_sample": True, "temperature": [1]}, "temperature"),
        ({"do_sample": "yes", "temperature": 1}, "do_sample 'yes'"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0, expected a number from 1e-30 to 1"),
        ({"temperature": 1, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1, "min_p": -0.1}, "min_p is -0.1"),
        ({"temperature": 1, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1, "top_k": "5"}, "top_k is '5'"),
        ({"max_gen_toks": -3}, "max_gen_toks is -3"),
        ({"max_gen_toks": math.inf}, "inf"),
        ({"max_gen_toks": "many"}, "many"),
        ({"until": ["a", 3]}, "until"),
        ({"do_sample": True}, "do_sample is true and temperature 0"),
        ({"max_gen_toks": 64}, "max_gen_toks 64 leaves the prompt no room in a context of 64"),
    ],
)
def test_generation_kwargs_that_are_not_supported_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        parse_generation({"until": ["x"], "max_gen_toks": 8, **kwargs}, 64)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def run_here(capfd: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `main` in this process, which spares a test the seconds of importing torch again."""

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        status: Any = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess([], status, *capfd.readouterr())

    return run


@pytest.fixture
def no_weights(tmp_path: Path) -> Path:
    """Make a folder that has all but the weights: what is refused with it is refused before they load."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_the_command_reports_the_figures_of_a_text(tmp_path):
    text = "\ufeffdef main():\r\n    return '<s> é'\n" * 30
    (tmp_path / "text.py").write_bytes(text.encode())
    options = ("--max_seq_length", 64, "--dtype", "float32", "--metrics_path", "metrics.json")
    result = run_command("eval.py", "--text_file", "text.py", *options, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    metrics = json.loads((tmp_path / "metrics.json").read_text())

    text = text.removeprefix("\ufeff")  # a mark of the file, no part of its text
    ids = load_tokenizer(DEMO).encode(text, parse_special=False)
    assert ids.count(1) == 1  # the BOS before the text, none in it
    expected = perplexity(load_model(DEMO, dtype=torch.float32), ids, 64)
    assert metrics.keys() == {"perplexity", "bits_per_byte", "tokens"}
    assert metrics["tokens"] == len(ids) - 1
    assert metrics["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(expected.nll / math.log(2) / len(text.encode()), rel=1e-5)
    first, second, third = result.stdout.splitlines()
    assert first == f"perplexity {metrics['perplexity']:.4f}"
    assert second == f"bits per byte {metrics['bits_per_byte']:.4f}"
    assert third.startswith(f"tokens {len(ids) - 1},")


def test_without_a_bos_the_first_tokens_bytes_do_not_count(tmp_path, run_here):
    shutil.copytree(REPO / "checkpoints/demo", tmp_path / "demo")
    settings = tmp_path / "demo/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": False}))
    (tmp_path / "text").write_text(text := "return self.value")
    tokenizer = load_tokenizer(tmp_path / "demo")
    ids = tokenizer.encode(text)
    assert ids[0] != tokenizer.bos_id
    args = ["--checkpoint_path", tmp_path / "demo", "--text_file", tmp_path / "text"]
    result = run_here(*args, "--metrics_path", tmp_path / "m.json")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "m.json").read_text())
    nll = math.log(metrics["perplexity"]) * (len(ids) - 1)
    num_bytes = len(text) - len(tokenizer.decode(ids[:1]))
    assert metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-4)


def test_a_first_token_that_is_a_part_of_a_character_counts_its_bytes(tmp_path, run_here):
    shutil.copytree(REPO / "checkpoints/demo", tmp_path / "demo")
    settings = tmp_path / "demo/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": False}))
    tokenizer = load_tokenizer(tmp_path / "demo")
    (tmp_path / "text").write_text(text := "漢字")
    first, *rest = tokenizer.encode(text)
    assert len(tokenizer.token_bytes[first]) == 1  # of the three of a character
    num_bytes = len(text.encode()) - 1
    args = ["--checkpoint_path", tmp_path / "demo", "--text_file", tmp_path / "text"]
    result = run_here(*args, "--metrics_path", tmp_path / "m.json")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "m.json").read_text())
    nll = math.log(metrics["perplexity"]) * len(rest)
    assert metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-4)


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave of the harness's 14,000 tasks, which take seconds to find, a few; the command looks for them as for all."""
    from lm_eval.tasks import manager

    (tmp_path / "harness").mkdir()
    shutil.copytree(Path(manager.__file__).with_name("hellaswag"), tmp_path / "harness" / "hellaswag")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "harness" / "manager.py"))


@pytest.mark.usefixtures("few_tasks")
def test_the_command_runs_tasks_and_groups(run_here, ours, task_folder, tmp_path):
    result = run_here(
        *("--tasks", "tiny,tiny_generate", "--include_path", task_folder, "--max_seq_length", CONTEXT),
        *("--dtype", "float32", "--batch_size", 2, "--metrics_path", tmp_path / "metrics.json"),
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics.keys() == {"tasks"} and metrics["tasks"].keys() == {"tiny", *TASKS}
    for task, expected in ours["results"].items():
        for name, value in expected.items():
            if isinstance(value, float):
                assert metrics["tasks"][task][name] == pytest.approx(value, rel=1e-4), name
    assert metrics["tasks"]["tiny"]["acc,none"] == ours["results"]["tiny_choice"]["acc,none"]
    assert all(f"|{word}" in result.stdout for word in ("Groups", "tiny_generate", " - tiny_rolling"))


def test_figures_that_are_numpy_s_are_written_too_and_what_hf_would_obey_is_named(run_here, monkeypatch, tmp_path):
    monkeypatch.setattr(eval_module, "load_tasks", lambda *_: ["a task"])
    results = {"tasks": {"m": numpy.float32(0.5), "n": numpy.int64(3)}}
    monkeypatch.setattr(eval_module, "evaluate_tasks", lambda *_: {"results": results})
    monkeypatch.setattr(eval_module, "print_tasks", lambda _: None)
    shutil.copytree(DEMO, tmp_path / "demo")
    (tmp_path / "demo/generation_config.json").write_text('{"repetition_penalty": 1.1}')
    options = ("--checkpoint_path", tmp_path / "demo", "--metrics_path", tmp_path / "metrics.json")
    result = run_here("--tasks", "x", *options)
    assert result.returncode == 0 and "asks for repetition_penalty 1.1: not supported" in result.stderr
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"tasks": {"tasks": {"m": 0.5, "n": 3}}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to evaluate; give --text_file, --tasks or both"),
        (["--text_file", "{tmp}/absent.txt"], "absent.txt cannot be read"),
        (["--text_file", "{tmp}/empty.txt"], "empty.txt is empty"),
        (["--text_file", "{tmp}/latin1.txt"], "latin1.txt is not UTF-8"),
        (["--text_file", "{tmp}/good.txt", "--max_seq_length", "1025"], "1025 is out of range; expected 2 to"),
        (["--text_file", "{tmp}/good.txt", "--max_seq_length", "1"], "--max_seq_length: 1 is out of range"),
        (["--text_file", "{tmp}/good.txt", "--limit", "3"], "--limit is for tasks"),
        (["--text_file", "{tmp}/good.txt", "--metrics_path", "{tmp}/no/m.json"], "no/m.json cannot be written"),
        (["--text_file", "{tmp}/good.txt", "--device", "mps"], "--device mps"),
        (["--text_file", "{tmp}/good.txt", "--checkpoint_path", "{tmp}"], "has no config.json"),
        (["--tasks", "x", "--include_path", "{tmp}/absent"], "--include_path {tmp}/absent is not a folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_the_weights_load(run_here, no_weights, tmp_path, options, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("def main():")
    options = [option.format(tmp=tmp_path) for option in options]
    assert_user_error(run_here("--checkpoint_path", no_weights, *options), message.format(tmp=tmp_path))


def test_a_text_of_one_token_is_refused_where_there_is_no_bos(run_here, no_weights, tmp_path):
    settings = json.loads((no_weights / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (no_weights / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text").write_text("x")
    result = run_here("--checkpoint_path", no_weights, "--text_file", tmp_path / "text")
    assert_user_error(result, "the text has 1 tokens", "at least 2")


@pytest.fixture
def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the harness's 14,000 tasks, which take seconds to find."""
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.mark.usefixtures("only_own_tasks")
def test_tasks_that_cannot_run_are_named_before_the_weights_load(run_here, no_weights, task_folder, tmp_path):
    def refused(name: str, *fragments: str) -> None:
        result = run_here("--checkpoint_path", no_weights, "--tasks", "tiny_choice", name, "--include_path", folder)
        assert_user_error(result, "--tasks: ", *fragments)

    folder = tmp_path / "tasks"
    shutil.copytree(task_folder, folder, ignore=shutil.ignore_patterns("cache"))
    generation = json.loads((folder / "tiny_generate.yaml").read_text())
    beams = generation | {"task": "beams", "generation_kwargs": {"until": ["x"], "num_beams": 3}}
    lost = generation | {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "absent.jsonl")}}}
    for task in (beams, lost):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))
    refused("tiny_chioce", "'tiny_chioce'", "is it tiny_choice")
    refused("beams", "beams: ", "num_beams 3")
    refused("lost", "lost cannot be loaded", "absent.jsonl")


def test_without_lm_eval_tasks_are_refused_with_the_command_that_installs_it(run_here, no_weights, monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_user_error(run_here("--checkpoint_path", no_weights, "--tasks", "x"), "pip install lm_eval")


def test_the_harness_is_imported_only_where_it_is_used(tmp_path):
    text = tmp_path / "text"
    text.write_text("def main():")
    code = f"import sys, eval; eval.main(['--text_file', {str(text)!r}]); print('lm_eval' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "False"


def test_ctrl_c_ends_quietly(run_here, monkeypatch, tmp_path):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "text").write_text("def main():")
    monkeypatch.setattr(likelihood, "log_probabilities", interrupted)
    result = run_here("--text_file", tmp_path / "text", "--metrics_path", tmp_path / "metrics.json")
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert not (tmp_path / "metrics.json").exists()
