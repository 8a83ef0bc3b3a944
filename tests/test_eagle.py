"""eagle.py: EAGLE-3 heads against the speculators package's own numbers, in every form of their folders; and rounds."""

import functools
import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import generate as generate_module
import quantize as quantize_module
from checkpoint import load_model
from drafters import Pace
from eagle import Head, HeadConfig
from eagle_checkpoint import load_head, save_head
from engine import generate
from kernels.optimize import optimize_
from scripts import convert_hf_checkpoint, train_head
from speculate import Speculation, draft_and_verify
from steps import prefill
from tests.conftest import REPO, SHARED, assert_user_error, run_forked
from tests.test_generate import GREEDY, rows_of, tiny_model, tokens_of

REFERENCES = SHARED / "eagle3"
HEADS = ["llama_default", "llama_norm_before_residual", "qwen3_eagle31", "llama_full_vocabulary"]
TAP_LAYERS = (0, 1)
PROMPTS = [[3], [9, 8, 7, 6, 5], list(range(1, 40)), [11, 12]]
LENGTH = 128


@functools.cache
def trained_head(num_steps=45):
    """Teach a head the texts of the tiny model, until it is right three times in four; it lacks a few of the ids."""
    target = tiny_model()
    target.tap_layers = TAP_LAYERS
    target.setup_caches(4, LENGTH)
    texts = [p + tokens_of(generate(target, [p], LENGTH - len(p), GREEDY)) for p in PROMPTS]
    tokens = torch.tensor(texts)
    with torch.no_grad():
        target(tokens, torch.arange(LENGTH))
    ids = torch.arange(64)[tokens.flatten().bincount(minlength=64) > 1]
    layers = replace(target.config, num_hidden_layers=1)
    head = Head(HeadConfig(layers, len(ids), layers.hidden_size, TAP_LAYERS, norm_before_residual=True))
    torch.manual_seed(0)
    for name, parameter in head.named_parameters():
        parameter.data.fill_(1) if name.endswith("norm.weight") else parameter.data.normal_(0, 0.1)
    head.ids = ids
    places = torch.full((64,), len(ids)).scatter(0, ids, torch.arange(len(ids)))
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(num_steps):
        drafts = train_head.unroll(head, tokens[:, :-1], target.taps[:, : LENGTH - 1], 3)
        wanted = [places[tokens[:, 2 + i : 2 + i + logits.shape[1]]] for i, logits in enumerate(drafts)]
        losses = [
            F.cross_entropy(a.flatten(0, 1), b.flatten(), ignore_index=len(ids))
            for a, b in zip(drafts, wanted, strict=True)
        ]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


@functools.cache
def taught_head(num_layers=1):
    """Return it as it runs, with further layers that add a little noise to what it says."""
    first = trained_head()
    head = Head(replace(first.head_config, layers=replace(first.config, num_hidden_layers=num_layers)))
    torch.manual_seed(1)
    for name, parameter in head.named_parameters():
        parameter.data.fill_(1) if name.endswith("norm.weight") else parameter.data.normal_(0, 0.1)
    head.load_state_dict(first.state_dict(), strict=False)
    head.ids = first.ids
    head.eval().requires_grad_(False)
    optimize_(head)
    return head


@pytest.fixture(scope="module")
def target():
    model = tiny_model()
    model.tap_layers = TAP_LAYERS
    model.setup_caches(4, LENGTH + 15)
    return model


@pytest.fixture(scope="module")
def plain(target):
    return [tokens_of(generate(target, [p], LENGTH - len(p), GREEDY)) for p in PROMPTS]


@pytest.fixture
def head():
    head = taught_head()
    head.setup_caches(4, LENGTH + 15)
    return head


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic, and the folders


def as_eagle(tensors, config):
    """A folder of EAGLE's own: the layer has another name, and its config is the whole."""
    layer = config.pop("transformer_layer_config")
    flags = {key: config[key] for key in ("norm_before_residual", "fc_norm", "norm_output") if config[key]}
    config = {**layer, **flags, "architectures": ["LlamaForCausalLM"]}
    config |= {"draft_vocab_size": tensors["lm_head.weight"].shape[0], "torch_dtype": "float32"}
    return {name.replace("layers.0.", "midlayer."): value for name, value in tensors.items()}, config


def as_nvidia(tensors, config):
    tensors, config = as_eagle(tensors, config)
    config["architectures"] = ["LlamaForCausalLMEagle3"]
    inner = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True, "next_layer_regular": True}
    return tensors, {**config, "eagle_config": inner}


FORMS = {"speculators": lambda *folder: folder, "EAGLE": as_eagle, "NVIDIA": as_nvidia}


def write_head(path, name="llama_default", form="speculators", tensors=(), **changes):
    """Write one of the heads with other tensors, of which None is none, and other keys in config.json."""
    if not REFERENCES.is_dir():
        pytest.skip(f"{REFERENCES} is not on this machine")
    held, config = load_file(REFERENCES / name / "model.safetensors"), json.loads(
        (REFERENCES / name / "config.json").read_text()
    )  # fmt: skip
    held, config = FORMS[form]({**held, **dict(tensors)}, {**config, **changes})
    path.mkdir()
    save_file({key: value for key, value in held.items() if value is not None}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def target_folder():
    if not REFERENCES.is_dir():
        pytest.skip(f"{REFERENCES} is not on this machine")
    return REFERENCES / "target"


def reference_target(**options):
    return load_model(target_folder(), dtype=torch.float32, **options)


@torch.inference_mode()
def assert_equals_reference(path, name, optimize=True):
    """Compare taps and logits over the prompt and four drafts in a row."""
    expected, target = load_file(REFERENCES / name / "reference.safetensors"), reference_target(optimize=optimize)
    head = load_head(path, target, optimize)
    for model in (target, head):
        model.setup_caches(1, 64)
    head.follow_(target)
    ids = expected["input_ids"]
    target(ids, torch.arange(24))
    torch.testing.assert_close(target.taps[:, :24], expected["aux_hidden_states"], atol=1e-4, rtol=1e-4)
    tokens, positions, features = torch.cat((ids[:, 1:], expected["next_id"][None]), 1), torch.arange(1, 25)[None], ()
    for i in range(4):
        hidden = head.hidden_states(tokens, positions, None, *features)
        logits = head.logits(hidden)[0]
        if i == 0:
            torch.testing.assert_close(logits, expected["first_step_logits_all_rows"], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[-1], expected["draft_logits"][i], atol=1e-4, rtol=0)
        chosen = head.ids[logits[-1].argmax()]
        assert chosen == expected["draft_target_ids"][i]
        tokens, positions, features = chosen.view(1, 1), positions[:, -1:] + 1, (hidden[:, -1:],)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_the_speculators_package(tmp_path, name, form):
    path = write_head(tmp_path / "head", name, form)
    assert_equals_reference(path, name, optimize=form != "EAGLE")


def test_eagles_own_weights_go_through_the_converter(tmp_path):
    path = write_head(tmp_path / "head", form="EAGLE")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="convert_hf_checkpoint"):
        load_head(path, reference_target())
    result = run_forked(convert_hf_checkpoint.main, "--checkpoint_dir", path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_equals_reference(tmp_path / "head-converted", "llama_default")


def test_eagles_own_form_has_one_layer_whatever_config_says(tmp_path):
    path = write_head(tmp_path / "head", form="EAGLE")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 40}))
    assert_equals_reference(path, "llama_default")


def test_windows_of_a_llama_are_heeded_as_the_speculators_package_does(tmp_path):
    """Of several layers those that layer_types names; a window that the text does not fill changes nothing."""
    layers = json.loads((REFERENCES / HEADS[0] / "config.json").read_text())["transformer_layer_config"] \
        if REFERENCES.is_dir() else {}  # fmt: skip
    slides = {**layers, "use_sliding_window": True, "layer_types": ["sliding_attention"]}
    wide = write_head(tmp_path / "wide", transformer_layer_config={**slides, "sliding_window": 28})
    assert_equals_reference(wide, HEADS[0])
    narrow = write_head(tmp_path / "narrow", transformer_layer_config={**slides, "sliding_window": 8})
    first, target = load_file(REFERENCES / HEADS[0] / "reference.safetensors"), reference_target(optimize=False)
    ids, taps = first["input_ids"], first["aux_hidden_states"]
    tokens = torch.cat((ids[:, 1:], first["next_id"][None]), 1)
    rows = []
    with torch.inference_mode():
        for path, count in ((narrow, 24), (wide, 8)):  # a layer that sees eight tokens, and eight tokens
            head = load_head(path, target, optimize=False)
            target.taps = taps[:, -count:]
            head.follow_(target)
            hidden = head.hidden_states(tokens[:, -count:], torch.arange(1, count + 1)[None], None)
            rows.append(head.logits(hidden)[0, -1])
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=0)
    assert not torch.allclose(rows[0], first["first_step_logits_all_rows"][-1], atol=1e-2)
    odd = write_head(tmp_path / "odd", transformer_layer_config={**slides, "sliding_window": None})
    with pytest.raises(ValueError, match="sliding_window is None"):
        load_head(odd, target)


def test_a_head_without_an_embedding_has_its_targets(tmp_path):
    own = load_file(REFERENCES / "target/model.safetensors") if REFERENCES.is_dir() else {}
    first = write_head(tmp_path / "own", tensors={"embed_tokens.weight": own.get("model.embed_tokens.weight")})
    second, target = write_head(tmp_path / "none", tensors={"embed_tokens.weight": None}), reference_target()
    assert load_head(second, target).embed_tokens is target.embed_tokens
    assert_equals_reference(second, "llama_default")
    assert_equals_reference(first, "llama_default")


def test_norm_before_fc_divides_all_taps_together(tmp_path):
    weight = torch.rand(192)
    path = write_head(tmp_path / "head", tensors={"input_norm.weight": weight}, norm_before_fc=True)
    head, taps = load_head(path, reference_target(), optimize=False), torch.randn(1, 5, 192)
    expected = F.linear(F.rms_norm(taps, (192,), weight, 1e-5), head.fc.weight)
    torch.testing.assert_close(head.features(taps), expected)


def test_a_second_layer_that_adds_nothing_changes_nothing(tmp_path):
    held = load_file(REFERENCES / "llama_default/model.safetensors") if REFERENCES.is_dir() else {}
    second = {
        name.replace("layers.0", "layers.1"): value[
            ..., : 64 if "_proj.w" in name and "down" not in name else None
        ].clone()
        for name, value in held.items()
        if name.startswith("layers.0.") and "hidden_norm" not in name
    }
    for name in ("layers.1.self_attn.o_proj.weight", "layers.1.mlp.down_proj.weight"):
        second[name] = torch.zeros_like(second[name]) if held else None
    config = json.loads((REFERENCES / "llama_default/config.json").read_text()) if held else {}
    layers = {**config.get("transformer_layer_config", {}), "num_hidden_layers": 2}
    assert_equals_reference(
        write_head(tmp_path / "head", tensors=second, transformer_layer_config=layers), "llama_default"
    )


def test_where_the_residual_begins_is_said_by_the_form_where_config_is_silent(tmp_path):
    for form, expected in (("speculators", True), ("EAGLE", False)):
        path = write_head(tmp_path / form, form=form)
        config = json.loads((path / "config.json").read_text())
        config.pop("norm_before_residual", None)
        (path / "config.json").write_text(json.dumps(config))
        assert load_head(path, reference_target()).head_config.norm_before_residual is expected


def test_a_saved_head_is_the_same_when_it_is_loaded(tmp_path):
    target = reference_target(optimize=False)
    head = load_head(REFERENCES / "llama_default", target, optimize=False)
    raw = json.loads((REFERENCES / "llama_default/config.json").read_text())
    (tmp_path / "head").mkdir()
    save_head(head, raw, head.ids, tmp_path / "head", torch.float32)
    expected = load_file(REFERENCES / "llama_default/model.safetensors")
    found = load_file(tmp_path / "head/model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


LAYER = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LAYER |= {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1, "vocab_size": 512, "rms_norm_eps": 1e-5}
MISTAKES = {
    "another vocabulary": ({"transformer_layer_config": LAYER | {"vocab_size": 500}}, {}, "vocab_size 500", "512"),
    "another size": ({"target_hidden_size": 80}, {}, "hidden_size 80", "64"),
    "more taps": ({"eagle_aux_hidden_state_layer_ids": [1, 2, 4, 5]}, {}, "reads 192", "4 taps", "256"),
    "a tap beyond the last layer": ({"eagle_aux_hidden_state_layer_ids": [2, 4, 8]}, {}, "[2, 4, 8]", "8 layers"),
    "taps of no numbers": ({"eagle_aux_hidden_state_layer_ids": ["2"]}, {}, "taps layers", "8 layers"),
    "taps that are a number": ({"eagle_aux_hidden_state_layer_ids": 0}, {}, "taps layers 0", "8 layers"),
    "an eagle_config that is a number": ({"eagle_config": 0}, {}, "eagle_config is 0"),
    "another drafter": ({"speculators_model_type": "dflash"}, {}, "'dflash' is not supported"),
    "no layers": ({"transformer_layer_config": None}, {}, "transformer_layer_config is None"),
    "another family": ({"transformer_layer_config": LAYER | {"model_type": "mixtral"}}, {}, "'mixtral'", "llama"),
    "an unknown norm": ({"norm_after_fc": True}, {}, "norm_after_fc True"),
    "a flag that is none": ({"norm_output": "yes"}, {}, "norm_output is 'yes'"),
    "two norms before fc": ({"norm_before_fc": True, "fc_norm": True}, {}, "norm_before_fc and fc_norm"),
    "one tap alone": ({"eagle_config": {"use_aux_hidden_state": False}}, {}, "use_aux_hidden_state False"),
    "codes": ({"quantization_config": {"quant_method": "fp8"}}, {}, "quantization_config", "not supported"),
    "too many ids": ({"draft_vocab_size": 513}, {}, "draft_vocab_size is 513", "512"),
    "too many layers": ({"transformer_layer_config": LAYER | {"num_hidden_layers": 3000}}, {}, "3000", "of 1 layers"),
    "no fc": ({}, {"fc.weight": None}, "lacks tensor fc.weight"),
    "a norm that no flag asks for": ({}, {"input_norm.weight": torch.ones(192)}, "unexpected tensor input_norm.weight"),
    "a tensor twice": ({}, {"midlayer.hidden_norm.weight": torch.ones(64)}, "midlayer.hidden", "layers.0.hidden"),
    "no d2t": ({}, {"d2t": None}, "160 ids of the model's 512", "no d2t"),
    "d2t beyond": ({}, {"d2t": torch.full((160,), 400)}, "d2t maps to ids from 400 to 559", "511"),
    "d2t twice": ({}, {"d2t": -torch.arange(160)}, "from 0 to 0, 1 of them", "160"),
    "d2t of floats": ({}, {"d2t": torch.zeros(160)}, "d2t is torch.float32"),
    "a short d2t": ({}, {"d2t": torch.zeros(9, dtype=torch.long)}, "shape [9]", "160"),
    "a wrong shape": ({}, {"layers.0.self_attn.q_proj.weight": torch.zeros(9, 9)}, "q_proj.weight has shape [9, 9]"),
    "not finite": ({}, {"norm.weight": torch.full((64,), torch.nan)}, "norm.weight has values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_wrong_with_a_head_is_one_line(tmp_path, mistake):
    changes, tensors, *fragments = MISTAKES[mistake]
    path = write_head(tmp_path / "head", tensors=tensors, **changes)
    options = ("--checkpoint_path", target_folder(), "--draft_checkpoint_path", path, "--prompt", "a")
    assert_user_error(run_forked(generate_module.main, *options, cwd=tmp_path), path, *fragments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_head_in_several_files_and_any_dtype_is_the_same(tmp_path, dtype):
    path, target = write_head(tmp_path / "head"), reference_target(optimize=False)
    expected = load_head(path, target, optimize=False).state_dict()
    tensors, files = load_file(path / "model.safetensors"), ("model-00001-of-00002", "model-00002-of-00002")
    (path / "model.safetensors").unlink()
    where = {name: f"{files[i % 2]}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        held = {name: value for name, value in tensors.items() if where[name] == file}
        save_file({name: v.to(dtype) if v.is_floating_point() else v for name, v in held.items()}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for name, value in load_head(path, target, optimize=False).state_dict().items():
        torch.testing.assert_close(value, expected[name].to(dtype).float())


def test_the_training_refuses_what_cannot_be_before_it_begins(tmp_path):
    (tmp_path / "demo-eagle3").mkdir()
    (tmp_path / "demo-eagle3" / "kept").touch()
    result = run_forked(train_head.main, "--output_dir", tmp_path, cwd=tmp_path)
    assert_user_error(result, tmp_path / "demo-eagle3", "exists already")
    options = ("--output_dir", tmp_path / "new", "--checkpoint_path", target_folder())
    assert_user_error(run_forked(train_head.main, *options, cwd=tmp_path), "draft_vocab_size is 2048", "512")
    (tmp_path / "adapter_config.json").write_text("{}")
    options = ("--output_dir", tmp_path / "new", "--checkpoint_path", tmp_path)
    assert_user_error(run_forked(train_head.main, *options, cwd=tmp_path), "an adapter is not read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "demo-eagle3"]


def test_a_head_is_not_taken_for_a_model(tmp_path):
    path = write_head(tmp_path / "head", form="EAGLE")
    for main, options in (
        (generate_module.main, ("--checkpoint_path", path, "--prompt", "a")),
        (quantize_module.main, ("--checkpoint_path", path, "--mode", "int8")),
    ):
        assert_user_error(run_forked(main, *options, cwd=tmp_path), "a draft head", "--draft_checkpoint_path")
    assert [file.name for file in tmp_path.iterdir()] == ["head"]


# ---------------------------------------------------------------------------------------------------------------------
# Rounds. What holds for every drafter is in test_speculation.py, with this head too.


def test_most_drafts_of_the_taught_head_are_accepted_and_some_are_not(target, plain, head):
    speculation = Speculation(head, 4, (4,))
    assert rows_of(generate(target, PROMPTS, 80, GREEDY, speculation=speculation)) == [ids[:80] for ids in plain]
    counts = [sum(column) for column in zip(*speculation.accept_counts, strict=True)]
    assert sum(counts[:4]) > 20 and counts[4] > 20, counts


@pytest.mark.parametrize("num_layers", [1, 3])
def test_what_is_drafted_does_not_depend_on_how_the_text_was_divided(target, plain, monkeypatch, num_layers):
    """Whatever was decoded plainly, found or prefilled before: the drafts are those from the target's taps alone."""
    head, drafted = taught_head(num_layers), {}
    head.setup_caches(1, LENGTH + 15)

    def watched(model, tokens, positions, slots, drafts, k, *rest):
        result = draft_and_verify(model, tokens, positions, slots, drafts, k, *rest)
        drafted.setdefault(int(positions[0, -1]), set()).add(int(result[0, 0]))
        return result

    for turns in ([(0, 3)], [(5, 0), (0, 3)], [(0, 3), (1, 0)], [(0, 1), (0, 3)]):
        asked = itertools.cycle(turns)
        monkeypatch.setattr(Pace, "next_plan", lambda pace, room, asked=asked: next(asked))
        speculation = Speculation(head, 3, (3, 1), watched)
        assert tokens_of(generate(target, [PROMPTS[2]], 80, GREEDY, speculation=speculation)) == plain[2][:80]
    assert len(drafted) > 40
    for n in drafted.values():  # accepted by the shorter of two drafts, too, as far as it went
        assert len(n) == 1 or (1 in n and max(n) > 1 and len(n) == 2), drafted


def test_a_round_is_one_call_whatever_the_number_of_drafts_before(target, plain, head, monkeypatch):
    calls = []

    def watched(name, step):
        return lambda *args: (calls.append(name), step(*args))[1]

    asked = itertools.cycle([(0, 5), (0, 1), (0, 3), (0, 1)])
    monkeypatch.setattr(Pace, "next_plan", lambda pace, room: next(asked))
    speculation = Speculation(head, 5, (5, 3, 1, 0), watched("round", draft_and_verify), watched("prefill", prefill))
    found = rows_of(generate(target, PROMPTS, 60, GREEDY, speculation=speculation))
    assert found == [ids[:60] for ids in plain]
    assert calls == ["prefill"] + ["round"] * (len(calls) - 1)


def test_taps_of_a_prompt_in_chunks_and_of_a_second_turn_are_those_of_one(target, plain, head, monkeypatch):
    text = [*PROMPTS[2], *plain[2]][:100]
    whole, turns = Speculation(head, 3, (3,)), Speculation(head, 3, (3,))
    expected = tokens_of(generate(target, [text], 20, GREEDY, speculation=whole))
    monkeypatch.setattr("steps.PREFILL_CHUNK", 20)
    list(generate(target, [text[:50]], 9, GREEDY, speculation=turns))
    assert tokens_of(generate(target, [text], 20, GREEDY, cached=50, speculation=turns)) == expected
    assert turns.accept_counts == whole.accept_counts and sum(whole.accept_counts[0][1:]) > 2


def test_a_target_without_the_heads_taps_is_refused(head):
    model = tiny_model()
    model.setup_caches(1, 64)
    with pytest.raises(ValueError, match="set its tap_layers"):
        next(generate(model, [[1, 2]], 5, GREEDY, speculation=Speculation(head, 2)))


def test_the_command_prints_the_plain_text_of_a_quantized_model(tmp_path):
    path = write_head(tmp_path / "head")
    options = ("--mode", "int4", "--groupsize", 32, "--output_path", tmp_path / "target")
    result = run_forked(quantize_module.main, "--checkpoint_path", target_folder(), *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    options = ("--checkpoint_path", tmp_path / "target", "--prompt", "Once", "--temperature", 0, "--max_new_tokens", 40)
    plain, found = (
        run_forked(generate_module.main, *options, "--ignore_eos", *how, cwd=tmp_path)
        for how in ((), ("--draft_checkpoint_path", path, "--prompt_lookup"))
    )
    assert (found.returncode, found.stdout) == (0, plain.stdout), found.stderr


def test_random_weights_need_only_the_heads_config(tmp_path):
    path = write_head(tmp_path / "head")
    (path / "model.safetensors").unlink()
    shutil.copytree(REFERENCES / "target", tmp_path / "target")
    options = ("--random_weights", "--prompt_length", 4, "--max_new_tokens", 30, "--ignore_eos")
    options += ("--checkpoint_path", tmp_path / "target", "--draft_checkpoint_path", path)
    result = run_forked(generate_module.main, *options, cwd=REPO)
    assert result.returncode == 0, result.stderr
    assert "30 tokens" in result.stderr
