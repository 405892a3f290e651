"""A checkpoint exported for Hugging Face's libraries: the same ids, the same logits, where those libraries are installed."""

import json
import random
import sys

import pytest
import torch
from safetensors.torch import load_file

from nanochat.common import UserError
from scripts import export
from tests.tiny_run import make_run, tiny_tokenizer

TEXTS = ["", "def f(x):\n    return x  +  1\n\n\n", "It's 12345 o'clock, I'LL be\tthere!!", "Größe €  日本語 🎉🎉 e\u0301", " \n \r\n  x ", "a" * 50 + "\x00\x7f\xa0\xad\ufffd"]


@pytest.fixture
def exported(base, tmp_path, monkeypatch, capsys):
    networks = make_run("sft", seq_len=128)
    monkeypatch.setattr(sys, "argv", ["export", "--out", str(tmp_path / "out")])
    export.main()
    told = capsys.readouterr().out
    assert told.startswith("sft/t, step 3: ") and all(name in told for name in ("attention.py", "config.json", "gpt.py", "model.safetensors", "tokenizer.json"))
    return networks[0].eval(), tmp_path / "out"


def test_the_files_hold_the_model(exported, monkeypatch):
    gpt, out = exported
    config = json.loads((out / "config.json").read_text())
    assert config["gpt"] == gpt.config.to_dict() and config["use_cache"] is False
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == {f"gpt.{name}" for name in gpt.state_dict()}
    assert all(torch.equal(weights[f"gpt.{name}"], tensor) for name, tensor in gpt.state_dict().items())
    for path in out.glob("*.py"):
        compile(path.read_text(), path.name, "exec")
        assert "nanochat." not in "".join(line for line in path.read_text().splitlines() if line.lstrip().startswith(("from", "import")))


def test_a_merge_is_found_again():
    """By hand: "ab" before "bc", so "abc" is ab + c though a + bc would spell it too."""
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b"c", b"ab", b"bc", b"abc"])}
    assert export.halves(b"abc", ranks) == [b"ab", b"c"] and export.halves(b"bc", ranks) == [b"b", b"c"]
    assert len(set(export.printable().values())) == 256 and export.printable()[ord(" ")] == "Ġ"


def test_a_folder_with_something_in_it_is_left_alone(exported, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export", "--out", str(exported[1])])
    with pytest.raises(UserError, match="new or empty"):
        export.main()


def test_the_tokenizer_gives_the_same_ids(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed, and the project does not need it")
    ours = tiny_tokenizer()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_json(ours)))
    rng = random.Random(0)
    texts = TEXTS + ["".join(rng.choice("ab e'lsS1\n\r \té世🎉._") for _ in range(rng.randrange(80))) for _ in range(300)]
    for text in [*texts, open(export.__file__, encoding="utf-8").read().replace("<|", "<")]: # no name of a special
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text), text[:50]
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    assert theirs.token_to_id("<|assistant_end|>") == ours.special("<|assistant_end|>") and theirs.get_vocab_size() == ours.vocab_size


def test_transformers_reads_the_same_logits_and_the_same_chat(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed, and the project does not need it")
    gpt, out = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    ids = torch.randint(gpt.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, gpt(ids), atol=0, rtol=0)
        torch.testing.assert_close(model(ids, labels=ids).loss, gpt(ids[:, :-1], ids[:, 1:]))
        said = model.generate(ids[:1], max_new_tokens=5, do_sample=False, eos_token_id=None)[0]
        greedy = ids[0].tolist()
        for _ in range(5):
            greedy.append(gpt(torch.tensor([greedy]))[0, -1].argmax().item())
        assert said.tolist() == greedy
        for wrong, says in ((dict(input_ids=ids, attention_mask=torch.tensor([[0] + [1] * 39] * 2)), "padded"), (dict(input_ids=ids.repeat(1, 4)), "longest row")):
            with pytest.raises(ValueError, match=says):
                model(**wrong)
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(out), tiny_tokenizer()
    messages = [dict(role="user", content="What is 6*7?"), dict(role="assistant", content="42"), dict(role="user", content="  Sure?\n")]
    assert tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), add_special_tokens=False) == ours.render_prompt({"messages": messages})
