"""
A checkpoint as a folder that Hugging Face's libraries read: the plain GPT and its tokenizer.

python -m scripts.export --stage sft --out exported
python -c "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.from_pretrained('exported', trust_remote_code=True))"

    config.json, model.safetensors                  the shape, and the weights in fp32
    modeling_nanochat.py, gpt.py, attention.py, ... what AutoModelForCausalLM runs: our own files, only their imports are rewritten. Transformers has a
                                                    NanoChat of its own, of an older shape without value embeddings, that cannot hold these weights
    tokenizer.json, tokenizer_config.json           the same ids for every text, and the chat format as a template

Left out: GistNet and LensNet, so there is no memory, and the context is as long as the rows that were trained on; a KV cache, so generate() reads everything again
for each token. Rows of a batch have one length. Unlike ours, their tokenizer takes "<|bos|>" within a text for the special token.
"""
import argparse
import json
import re
from pathlib import Path

from safetensors.torch import save_file

from nanochat import gpt as gpt_module
from nanochat.common import UserError, run_main
from scripts.load import load_stage

MODEL = '''"""A GPT of the nanochat kind for AutoModelForCausalLM, over the files beside this one; scripts/export.py wrote it."""
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .gpt import GPT, GPTConfig


class NanochatConfig(PretrainedConfig):
    model_type = "nanochat-gists"

    def __init__(self, gpt=None, **kwargs):
        self.gpt = gpt or {}
        super().__init__(**kwargs)


class NanochatForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanochatConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.post_init()

    def _init_weights(self, module):
        """All weights are in the file."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("padded rows are not supported: expected rows of one length, or one row at a time")
        if input_ids.size(1) > self.gpt.config.seq_len:
            raise ValueError(f"{input_ids.size(1)} tokens: the longest row that this model was trained on has {self.gpt.config.seq_len}")
        logits = self.gpt(input_ids)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
'''

TEMPLATE = ("{{ '<|bos|>' }}{% for message in messages %}{% if message['role'] not in ('user', 'assistant') %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
            "{{ '<|' + message['role'] + '_start|>' + message['content'] + '<|' + message['role'] + '_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}")

parser = argparse.ArgumentParser(description="A checkpoint in the format of Hugging Face's libraries", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--stage", default="sft", help="base, mid, sft or rl")
parser.add_argument("--tag", default=None, help="name of the checkpoint folder (default: the newest)")
parser.add_argument("--step", type=int, default=None, help="step of the checkpoint (default: the last)")
parser.add_argument("--out", required=True, help="folder to write, new or empty")


def main():
    args = parser.parse_args()
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: expected a folder that is new or empty")
    loaded = load_stage(args.stage, args.tag, args.step)
    out.mkdir(parents=True, exist_ok=True)
    config, tokenizer = loaded.gpt.config, loaded.tokenizer
    write = lambda name, data: (out / name).write_text(data if isinstance(data, str) else json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    auto = dict(AutoConfig="modeling_nanochat.NanochatConfig", AutoModelForCausalLM="modeling_nanochat.NanochatForCausalLM")
    write("config.json", dict(model_type="nanochat-gists", architectures=["NanochatForCausalLM"], auto_map=auto, gpt=config.to_dict(), vocab_size=config.vocab_size,
                              hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=config.seq_len, dtype="float32",
                              bos_token_id=tokenizer.bos, eos_token_id=tokenizer.special("<|assistant_end|>"), use_cache=False, tie_word_embeddings=False))
    save_file({f"gpt.{name}": tensor.float().contiguous() for name, tensor in loaded.gpt.state_dict().items()}, out / "model.safetensors", metadata=dict(format="pt"))
    write("modeling_nanochat.py", MODEL)
    for name, source in needed(Path(gpt_module.__file__)).items():
        write(name, source)
    write("tokenizer.json", tokenizer_json(tokenizer))
    write("tokenizer_config.json", dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|bos|>", eos_token="<|assistant_end|>", clean_up_tokenization_spaces=False,
                                        model_max_length=config.seq_len, chat_template=TEMPLATE))
    print(f"{loaded.stage}/{loaded.tag}, step {loaded.meta['step']}: {', '.join(sorted(path.name for path in out.iterdir()))} in {out}")


def needed(path):
    """{file name: source} of a file of our package and of all that it imports from there, made to import each other from one folder."""
    found, waiting = {}, [path]
    while waiting:
        path = waiting.pop()
        source = re.sub(r"^(\s*)from nanochat\.(\w+) import", r"\1from .\2 import", path.read_text(encoding="utf-8"), flags=re.M)
        assert not re.search(r"^\s*(?:import|from) nanochat", source, re.M), f"{path} imports a module of ours in a way that the export does not know"
        found[path.name] = source
        waiting += [path.with_name(f"{name}.py") for name in re.findall(r"^\s*from \.(\w+) import", source, re.M) if f"{name}.py" not in found]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

def tokenizer_json(tokenizer):
    """Our tokens as the `tokenizers` library writes a byte-level BPE: bytes as printable characters, and for each token the two that it was merged from."""
    shown = printable()
    spell = lambda token: "".join(shown[byte] for byte in token)
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    special = [dict(id=tokenizer.special(name), content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True) for name in tokenizer.specials]
    split = dict(type="Split", pattern=dict(Regex=tokenizer.pattern), behavior="Isolated", invert=False)
    as_bytes = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
                 vocab={spell(token): rank for token, rank in ranks.items()}, merges=[[spell(part) for part in halves(token, ranks)] for token in tokenizer.tokens if len(token) > 1])
    return dict(version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None, pre_tokenizer=dict(type="Sequence", pretokenizers=[split, as_bytes]),
                post_processor=None, decoder=as_bytes, model=model)


def printable():
    """Byte -> a character to see it by, as GPT-2 chose them: itself where it can be seen, else one of those from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def halves(token, ranks):
    """The two tokens that a token was merged from: merge its bytes, least rank first, with the tokens that came before it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(left + right, len(ranks)), i) for i, (left, right) in enumerate(zip(parts, parts[1:])))
        assert rank < ranks[token], f"token {token!r} is not made of tokens before it"
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


if __name__ == "__main__":
    run_main(main)
