"""scripts/convert_gguf.py: the folder that it writes is the model that the GGUF file was made of."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import ModelReader, load_model, meta_model, save_hub_checkpoint, tensor_specs
from cli.template import load_template
from compressed import hub_specs
from config import eos_token_ids, parse_config, read_config
from random_weights import random_model
from scripts import convert_gguf, gguf_reader
from scripts.gguf_reader import GgufFile
from tests.conftest import REPO, SHARED, assert_user_error, run_forked
from tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")

FAMILIES = [
    "gqa", "wide_heads", "rope_linear", "rope_llama3", "tied", "biased", "mistral", "qwen2", "qwen2_tied",
    "qwen3", "mixtral", "qwen3_moe", "granite", "granite_tied", "phi3", "phi4_mini", "seed_oss", "seed_oss_biased",
    "olmo2",
]  # fmt: skip
BYTE_TOKENS = ["Ġa", "12", "123", "Ġ1", "ab"]


def byte_alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


TOKENS = [*byte_alphabet(), *BYTE_TOKENS, "<|begin|>", "<|end|>", "<user>", "[PAD264]"]
TYPES = [1] * (len(TOKENS) - 4) + [3, 3, 4, 5]
MERGES = ["Ġ a", "Ġ 1", "1 2", "12 3", "a b"]


def add_tokenizer(writer, pre="smollm", **special):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(TOKENS.index("<|begin|>"))
    writer.add_eos_token_id(special.get("eos", TOKENS.index("<|begin|>")))
    writer.add_chat_template("{% for m in messages %}<user>{{ m.content }}<|end|>{% endfor %}")


def pair_neighbours(weight, heads):
    """Order rows as llama.cpp's rope takes them: row j of a head, then row j + D/2."""
    weight = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return weight.swapaxes(1, 2).reshape(-1, *weight.shape[3:])


def write_gguf(source, path, kind=None, tokenizer=True, **changes):
    """Write a folder of the Hub's as llama.cpp's converter does. kind: of the matrices, or of each name; else fp32."""
    raw, tensors = (
        read_config(source),
        {k: v.float().numpy() for k, v in load_file(source / "model.safetensors").items()},
    )
    other_names = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
    architecture = other_names.get(raw["model_type"], raw["model_type"])
    writer = gguf.GGUFWriter(path, changes.get("architecture", architecture))
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    writer.add_block_count(changes.get("block_count", raw["num_hidden_layers"]))
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    rope = raw["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if raw.get("head_dim"):
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if experts := raw.get("num_local_experts", raw.get("num_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(raw["num_experts_per_tok"])
    add_family(writer, raw, rope)
    for key, value in changes.get("metadata", {}).items():
        writer.add_key_value(key, *value)
    if tokenizer:
        add_tokenizer(writer, **changes.get("vocabulary", {}))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), raw["num_hidden_layers"])
    stacks = {}
    for name, value in sorted(tensors.items()):
        if architecture in ("llama", "smollm3", "granite") and ("q_proj" in name or "k_proj" in name):
            value = pair_neighbours(value, heads if "q_proj" in name else kv_heads)
        if ".experts." in name:
            layer, number, part = (name.split(".")[i] for i in (2, 5, 6))
            stacks.setdefault((layer, part), {})[int(number)] = value
            continue
        add_matrix(writer, names.get_name(name, (".weight", ".bias")), value, kind)
    for (layer, part), stack in stacks.items():
        place = {"w1": "gate", "w2": "down", "w3": "up"}.get(part, part.removesuffix("_proj"))
        add_matrix(writer, f"blk.{layer}.ffn_{place}_exps.weight", [stack[i] for i in range(len(stack))], kind)
    for name, value in changes.get("tensors", {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_family(writer, raw, rope):
    """Add what llama.cpp's converter says of a family besides what it says of all."""
    import numpy as np

    if raw["model_type"] == "qwen3_moe":
        writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
    if raw["model_type"] == "granite":
        writer.add_attention_scale(raw["attention_multiplier"])
        writer.add_embedding_scale(raw["embedding_multiplier"])
        writer.add_residual_scale(raw["residual_multiplier"])
        writer.add_logit_scale(raw["logits_scaling"])
    if raw["model_type"] == "phi3":
        head_dim = raw["hidden_size"] // raw["num_attention_heads"]
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
        writer.add_rope_scaling_orig_ctx_len(raw["original_max_position_embeddings"])
        if raw["sliding_window"]:
            writer.add_sliding_window(raw["sliding_window"])
        if rope["rope_type"] == "longrope":
            ratio = raw["max_position_embeddings"] / raw["original_max_position_embeddings"]
            factor = (1 + np.log(ratio) / np.log(raw["original_max_position_embeddings"])) ** 0.5
            writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or factor)
            for kind in ("long", "short"):
                writer.add_tensor(f"rope_factors_{kind}.weight", np.float32(rope[f"{kind}_factor"]))


def add_matrix(writer, name, value, kind):
    import numpy as np

    value = np.asarray(value)
    kind = kind(name) if callable(kind) else kind
    if kind is None or value.ndim == 1 or value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        writer.add_tensor(name, value)
    else:
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


def llama3_factors():
    """Compute rope_freqs of conftest's rope_llama3, as llama.cpp's converter does."""
    import numpy as np

    wavelengths = 2 * np.pi * 5e5 ** (np.arange(0, 16, 2) / 16)
    parts = (32 / wavelengths - 1) / 3
    between = 1 / ((1 - parts) / 8 + parts)
    return np.where(wavelengths < 8, 1, np.where(wavelengths > 32, 8, between)).astype(np.float32)


def convert(path, output, *options):
    convert_gguf.main([str(path), "--output_dir", str(output), *options])


def logits_of(folder, ids):
    return load_model(folder, dtype=torch.float32, optimize=False)(ids, torch.arange(ids.shape[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_the_model_that_the_file_was_made_of(tmp_path, hub_checkpoint, family):
    reference = hub_checkpoint(family)
    tensors = {"rope_freqs.weight": llama3_factors()} if family == "rope_llama3" else {}
    write_gguf(reference.path, tmp_path / "model.gguf", tensors=tensors)
    convert(tmp_path / "model.gguf", tmp_path / "out", "--dtype", "float32")
    torch.testing.assert_close(logits_of(tmp_path / "out", reference.tokens), reference.logits, atol=1e-4, rtol=0)
    tied = read_config(reference.path)["tie_word_embeddings"]
    assert ("lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")) == tied


def test_every_fourth_layer_of_smollm3_does_not_rotate(tmp_path, hub_checkpoint):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    raw = {"model_type": "smollm3", "num_key_value_heads": 2, "vocab_size": 120, "rms_norm_eps": 1e-6, **sizes}
    raw |= {"max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    model = random_model(raw, dtype=torch.float32, optimize=False)
    (tmp_path / "hub").mkdir()
    save_hub_checkpoint(model, raw, tmp_path / "hub", torch.float32)
    write_gguf(tmp_path / "hub", tmp_path / "model.gguf", tokenizer=False)
    convert(tmp_path / "model.gguf", tmp_path / "out", "--dtype", "float32")
    ids = torch.arange(50).unsqueeze(0)
    torch.testing.assert_close(logits_of(tmp_path / "out", ids), model(ids, torch.arange(50)), atol=1e-5, rtol=0)
    assert parse_config(read_config(tmp_path / "out")).no_rope_layers == (3,)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_rows_are_dequantized_and_then_reordered(tmp_path, hub_checkpoint, kind, monkeypatch):
    monkeypatch.setattr(gguf_reader, "ELEMENTS_AT_ONCE", 1000)  # several pieces a matrix
    kind = gguf.GGMLQuantizationType[kind]
    source = hub_checkpoint("mixtral_tied").path  # whose sizes are multiples of 32
    write_gguf(source, tmp_path / "model.gguf", kind)
    convert(tmp_path / "model.gguf", tmp_path / "out", "--dtype", "float32")
    found = load_file(tmp_path / "out/model.safetensors")
    for name, value in load_file(source / "model.safetensors").items():
        if value.ndim > 1:  # whole rows move, and blocks lie within one: the order does not matter to a code
            value = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind).copy())
        assert torch.equal(found[name], value), name


Q8_0, Q4_0, Q5_1 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q5_1"))
KINDS = {
    "attn_q": Q8_0, "attn_k": Q4_0, "attn_v": Q4_0, "attn_output": Q4_0, "ffn_gate_exps": Q8_0, "ffn_up_exps": Q8_0,
    "ffn_down_exps": Q5_1, "token_embd": Q8_0, "ffn_gate_inp": Q8_0,
}  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral_tied", "tied"])
@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        (Q8_0, {"qkv_proj": 8, "o_proj": 8, "gate_up_proj": 8, "down_proj": 8, "lm_head": 8}),
        (Q4_0, {"qkv_proj": 4, "o_proj": 4, "gate_up_proj": 4, "down_proj": 4, "lm_head": 4}),
        (lambda name: KINDS.get(name.split(".")[-2]), {"o_proj": 4, "lm_head": 8}),  # q differs from k and v
    ],
    ids=["Q8_0", "Q4_0", "mixed"],
)
def test_codes_that_are_kept_say_what_their_dequantized_weights_do(tmp_path, hub_checkpoint, family, kind, forms):
    reference = hub_checkpoint(family)
    write_gguf(reference.path, tmp_path / "model.gguf", kind)
    convert(tmp_path / "model.gguf", tmp_path / "codes", "--dtype", "float32", "--keep_codes")
    convert(tmp_path / "model.gguf", tmp_path / "plain", "--dtype", "float32")
    expected = logits_of(tmp_path / "plain", reference.tokens)
    torch.testing.assert_close(logits_of(tmp_path / "codes", reference.tokens), expected, atol=1e-5, rtol=1e-5)
    reader = ModelReader(tmp_path / "codes", torch.float32)
    found = {name.split(".")[-1]: form.bits for name, form in reader.forms.items()}
    if family == "tied":  # rows of down_proj are no multiple of 32, and it has no experts
        forms = {name: bits for name, bits in forms.items() if name != "down_proj"}
    elif len(forms) == 2:
        forms = {**forms, "gate_up_proj": 8}
    assert found == forms
    assert {form.scale_dtype for form in reader.forms.values()} == {torch.float16}


def test_codes_are_kept_only_where_there_are_some(tmp_path, gqa_path):
    write_gguf(gqa_path, tmp_path / "model.gguf")
    result = run_forked(convert_gguf.main, "model.gguf", "--output_dir", "out", "--keep_codes", cwd=tmp_path)
    assert_user_error(result, "no linears in Q8_0 or Q4_0 whose codes --keep_codes could keep, only F32; leave it out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_k_quants_are_read(tmp_path, kind):
    import numpy as np

    kind = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 60, (3, 256 // size[0] * size[1]), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", blocks, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    value = GgufFile(tmp_path / "a.gguf").read("x", torch.float32)
    assert value.shape == (3, 256)
    assert torch.equal(value, torch.from_numpy(gguf.quants.dequantize(blocks, kind).copy()))


@pytest.mark.parametrize("name", ["gguf_llama_bf16", "gguf_llama_q4_0", "gguf_qwen2_q8_0"])
def test_files_of_llama_cpp_give_their_reference(tmp_path, name):
    folder = SHARED / "formats" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    convert(folder / "model.gguf", tmp_path / "out", "--dtype", "float32")
    reference = load_file(folder / "reference.safetensors")
    torch.testing.assert_close(
        logits_of(tmp_path / "out", reference["input_ids"]), reference["logits"], atol=1e-4, rtol=0
    )
    if "llama" in name:
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        assert read_config(tmp_path / "out")["rope_scaling"] == {**scaling, "original_max_position_embeddings": 128}


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


@pytest.fixture
def gqa_path(hub_checkpoint):
    return hub_checkpoint("gqa").path


def converted(tmp_path, source, **changes):
    write_gguf(source, tmp_path / "model.gguf", **changes)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    return load_tokenizer(tmp_path / "out")


def ids_of(*tokens):
    return [TOKENS.index(token) for token in tokens]


@pytest.mark.parametrize(
    ("pre", "expected"),
    {
        "smollm": ["ab", "Ġ", "1", "2", "3", "4"],
        "gpt-2": ["ab", "Ġ1", "2", "3", "4"],
        "llama-bpe": ["ab", "Ġ", "123", "4"],
        "qwen2": ["ab", "Ġ", "1", "2", "3", "4"],
        "tekken": ["ab", "Ġ", "1", "2", "3", "4"],
    }.items(),
)
def test_the_name_of_the_pre_tokenizer_decides_how_digits_are_split(tmp_path, gqa_path, pre, expected):
    tokenizer = converted(tmp_path, gqa_path, vocabulary={"pre": pre})
    assert tokenizer.encode("ab 1234", bos=False) == ids_of(*expected)
    assert tokenizer.decode(tokenizer.encode("ab 1234 é<user>")) == "ab 1234 é<user>"
    assert (tokenizer.bos_id is not None) == (pre in ("llama-bpe", "tekken"))


def test_special_tokens_ends_and_the_chat_template_are_the_files(tmp_path, gqa_path):
    tokenizer = converted(tmp_path, gqa_path)
    begin, end, user = ids_of("<|begin|>", "<|end|>", "<user>")
    assert tokenizer.encode("<|begin|>ab<user><|end|>") == [begin, *ids_of("ab"), user, end]
    assert tokenizer.decode([begin, *ids_of("ab"), user, end]) == "ab<user>", "control tokens are no text"
    assert "[PAD264]" not in tokenizer.added_ids and TOKENS.index("[PAD264]") not in tokenizer.token_bytes
    assert tokenizer.named_bos_id == tokenizer.named_eos_id == begin
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings == {"bos_token_id": begin, "eos_token_id": [begin, end]}
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["bos_token"] == "<|begin|>"
    template = load_template(tmp_path / "out", tokenizer)
    assert template.render([{"role": "user", "content": "ab"}], True) == "<user>ab<|end|>"


def test_a_file_may_ask_for_bos_or_for_none(tmp_path, gqa_path):
    asked = {"tokenizer.ggml.add_bos_token": (True, gguf.GGUFValueType.BOOL)}
    assert converted(tmp_path, gqa_path, metadata=asked).encode("ab") == ids_of("<|begin|>", "ab")


def test_tokens_with_scores_encode_as_sentencepiece_does(tmp_path, gqa_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    text = (REPO / "README.md").read_text() + (REPO / "model.py").read_text()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(tmp_path / "sp"), vocab_size=700, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    reference = SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    kinds = {reference.is_unknown: 2, reference.is_control: 3, reference.is_byte: 6}
    pieces = range(reference.vocab_size())
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([reference.id_to_piece(i) for i in pieces])
    writer.add_token_scores([reference.get_score(i) for i in pieces])
    writer.add_token_types([next((kind for test, kind in kinds.items() if test(i)), 1) for i in pieces])
    for name in ("bos", "eos", "unk"):
        getattr(writer, f"add_{name}_token_id")(getattr(reference, f"{name}_id")())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert_gguf.write_tokenizer(GgufFile(tmp_path / "a.gguf").values, tmp_path)
    (tmp_path / "sp.model").rename(tmp_path / "elsewhere.model")
    tokenizer = load_tokenizer(tmp_path)
    for line in ["  two  spaces", "é ☃ 漢", "a\tb", *text.splitlines()[:150]]:
        ids = reference.encode(line)
        if line:
            assert tokenizer.encode(line) == [reference.bos_id(), *ids], line
            assert tokenizer.decode(ids) == reference.decode(ids)


def test_a_file_without_a_tokenizer_gives_a_folder_without(tmp_path, gqa_path, capsys):
    write_gguf(gqa_path, tmp_path / "model.gguf", tokenizer=False)
    convert(tmp_path / "model.gguf", tmp_path / "out", "--dtype", "float16")
    assert "no tokenizer" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert load_model(tmp_path / "out").embed_tokens.weight.dtype == torch.float16
    assert eos_token_ids(tmp_path / "out") == ()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def key(value, kind="UINT32"):
    return (value, gguf.GGUFValueType[kind])


REFUSED = {
    "architecture": ({"architecture": "gemma3"}, "architecture gemma3 is not supported; supported: llama"),
    "pre_tokenizer": ({"vocabulary": {"pre": "falcon"}}, "tokenizer.ggml.pre 'falcon' is not supported"),
    "split": ({"metadata": {"split.count": key(3, "UINT16")}}, "one of 3 files; join them"),
    "layers": ({"block_count": 4000}, "block_count is 4000 and 2 have tensors"),
    "rope_type": ({"metadata": {"llama.rope.scaling.type": key("yarn", "STRING")}}, "rope.scaling.type 'yarn'"),
    "unknown_key": ({"metadata": {"llama.logit_scale": key(0.5, "FLOAT32")}}, "llama.logit_scale 0.5 is not supported"),
    "wrong_type": ({"metadata": {"llama.expert_count": key("two", "STRING")}}, "expert_count is 'two', expected int"),
    "eos": ({"vocabulary": {"eos": 10**6}}, "eos_token_id is 1000000, and there are"),
    "no_scale": ({"architecture": "granite"}, "granite.attention.scale is None, expected float"),
    "fused_experts": (
        {"tensors": {"blk.0.ffn_gate_up_exps.weight": torch.zeros(3).numpy()}}, "in one tensor are not supported"
    ),
    "extra_tensor": ({"tensors": {"blk.0.odd.weight": torch.zeros(3).numpy()}}, "has tensor blk.0.odd.weight"),
    "rope_freqs": ({"tensors": {"rope_freqs.weight": torch.arange(1.0, 9).numpy()}}, "not the scaling of Llama 3.1"),
    "infinite": ({"tensors": {"output_norm.weight": torch.full((64,), torch.inf).numpy()}}, "output_norm.weight has"),
}  # fmt: skip


def run(tmp_path, name="model.gguf"):
    return run_forked(convert_gguf.main, name, "--output_dir", "out", cwd=tmp_path)


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_not_supported_is_named_in_a_line(tmp_path, gqa_path, changes, words, monkeypatch):
    if "output_norm.weight" in changes.get("tensors", {}):  # twice: drop the model's own
        own = gguf.GGUFWriter.add_tensor
        monkeypatch.setattr(
            gguf.GGUFWriter, "add_tensor", lambda self, name, value, **kwargs: (
                None if name == "output_norm.weight" and value.max() < 9 else own(self, name, value, **kwargs)
            ),
        )  # fmt: skip
    write_gguf(gqa_path, tmp_path / "model.gguf", **changes)
    assert_user_error(run(tmp_path), words)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_none_is_named_in_a_line(tmp_path, gqa_path):
    assert_user_error(run(tmp_path, "absent.gguf"), "absent.gguf is not a file")
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4")
    assert_user_error(run(tmp_path), "is not a GGUF file")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", 1))
    assert_user_error(run(tmp_path), "version 1 is not supported")
    write_gguf(gqa_path, tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[:-500])
    assert_user_error(run(tmp_path), f"has {len(whole) - 500} bytes and tensor", "download it again")
    (tmp_path / "model.gguf").write_bytes(whole[:500])
    assert_user_error(run(tmp_path), "(500 bytes) ends within its header")
    assert not (tmp_path / "out").exists()


def test_without_package_gguf_a_line_says_how_to_get_it(tmp_path, gqa_path, monkeypatch, capsys):
    monkeypatch.setattr(convert_gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert "pip install gguf" in capsys.readouterr().err


def test_damaged_headers_end_in_a_line(tmp_path, gqa_path):
    """Whatever byte is another: a folder, or one of the two errors that a command turns into a line."""
    write_gguf(gqa_path, tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    header = whole.index(b"token_embd.weight") + 100
    generator, refused = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 8))):
            damaged[generator.randrange(4, header)] = generator.choice((0, 1, 255, generator.randrange(256)))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            file = GgufFile(tmp_path / "damaged.gguf")
            model = meta_model(convert_gguf.build_config(file))
            convert_gguf.find_sources(file, hub_specs(model, tensor_specs(model, torch.float32)), model.config)
            convert_gguf.GgufVocabulary(file.values)
        except (ValueError, OSError):
            refused += 1
    assert refused > 50


def test_tensors_that_overlap_or_lie_askew_are_damage(tmp_path, gqa_path):
    write_gguf(gqa_path, tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    places = {}
    for name in (b"blk.0.ffn_up.weight", b"blk.0.ffn_gate.weight"):
        begin = whole.index(name) + len(name) + 4 + 2 * 8 + 4  # behind the number of dimensions, these, and the type
        places[name] = begin, int.from_bytes(whole[begin : begin + 8], "little")
    (at, offset), (_, other) = places.values()
    for wrong, words in ((other, "overlap"), (offset + 4, "no multiple of 32")):
        damaged = whole[:at] + wrong.to_bytes(8, "little") + whole[at + 8 :]
        (tmp_path / "model.gguf").write_bytes(damaged)
        assert_user_error(run(tmp_path), words, "download it again")


def test_a_gguf_named_as_a_checkpoint_is_answered_with_the_command(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"run `python scripts/convert_gguf.py .*model.gguf`"):
        read_config(tmp_path / "model.gguf")
