"""Makes a toy Llama that vLLM serves like a real model: `toy_model.py DIRECTORY`, run in the engine environment.

Two layers of random weights from a fixed seed and its own byte-level tokenizer, so nothing is downloaded and the same
versions give the same files. Its answers are noise, but at temperature 0 always the same noise.

As in real models, a matrix is larger than 1 MiB, also half of it: for those vLLM takes oneDNN, which asks the kernel
for AMX. vLLM's own kernels use AMX without asking: where there is AMX, a smaller model ends with SIGILL when it is not
compiled (--enforce-eager).
"""

import os
import shutil
import sys
from pathlib import Path

os.environ["USE_TORCH"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
INTERMEDIATE = 4160
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Enough text for 512 merges; what it says does not matter.
CORPUS = """A worker asks the router for work, takes a lease and streams the answer back in small numbered frames.
The router keeps what it has not acknowledged; a frame that was lost is sent again and one that came twice is dropped.
Models are cut into chunks, every chunk is checked before it is unpacked and every file before it is served.
When the engine dies its requests end with an error at once, and the next request finds a new engine.
Numbers such as 1024, 2048 and 65536, punctuation (brackets, quotes), and a few long words: acknowledgement,
configuration, distributed, quantization, understanding, neighbourhood. Tokens stay short, which keeps byte boundaries
interesting."""


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS.splitlines() * 2, trainer)
    if raw.get_vocab_size() != VOCABULARY:
        sys.exit(f"toy_model: the corpus gives {raw.get_vocab_size()} tokens, not {VOCABULARY}")
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model(eos: int) -> LlamaForCausalLM:
    torch.manual_seed(20240)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=16384,
            initializer_range=0.2,  # wide enough that the noise is not one token repeated
            eos_token_id=eos,
            bos_token_id=None,
            pad_token_id=eos,
            tie_word_embeddings=False,
        )
    )
    for layer in made.model.layers:  # so that many intermediate values weigh no more than 256
        layer.mlp.down_proj.weight.data *= (256 / INTERMEDIATE) ** 0.5
    return made.to(torch.bfloat16)


def main() -> None:
    target = Path(sys.argv[1])
    scratch = target.with_name(target.name + f".{os.getpid()}.tmp")
    words = tokenizer()
    words.save_pretrained(scratch)
    model(words.eos_token_id).save_pretrained(scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


if __name__ == "__main__":
    main()
